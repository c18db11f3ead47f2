"""Sparse attention: backends against the reference, the reference against plain attention."""

import pytest
import torch

from flashvsr.attention import Selection, sparse_attention
from flashvsr.attention.backends import gather
from flashvsr.base.cli import UserError

BLOCK, D = 4, 6


def random_inputs(batch, heads, queries, keys):
    torch.manual_seed(0)
    shapes = [(batch, heads, n * BLOCK, D) for n in (queries, keys, keys)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def with_gradients(backend, inputs, selection):
    out = sparse_attention(*inputs, selection, backend=backend)
    torch.manual_seed(1)
    gradient = torch.randn_like(out)
    # with nothing selected anywhere, keys and values may not enter at all
    return [
        out.detach(),
        *torch.autograd.grad(out, inputs, gradient, allow_unused=True, materialize_grads=True),
    ]


def masks():
    torch.manual_seed(2)
    ragged = torch.rand(2, 3, 5, 7) < torch.rand(2, 3, 5, 1)
    empty = ragged.clone()
    empty[0, 1] = False
    empty[:, :, 2] = False
    single = torch.zeros(2, 3, 5, 7, dtype=torch.bool)
    single.scatter_(3, torch.randint(7, (2, 3, 5, 1)), True)
    everything = torch.ones(2, 3, 5, 7, dtype=torch.bool)
    return {
        "ragged": ragged, "empty rows": empty, "single": single, "all": everything, "none": ~everything,
    }  # fmt: skip


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize("group_bytes", [gather.SCRATCH, 1])
@pytest.mark.parametrize("backend", ["gather"])
def test_backend_equals_reference_forward_and_backward(backend, kind, group_bytes, monkeypatch):
    monkeypatch.setattr(gather, "SCRATCH", group_bytes)
    mask = masks()[kind]
    selection = Selection.from_mask(mask, BLOCK)
    inputs = random_inputs(2, 3, 5, 7)
    ours, expected = (with_gradients(b, inputs, selection) for b in (backend, "reference"))
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-13
    rows = mask.any(-1).repeat_interleave(BLOCK, 2)
    assert (ours[0][~rows] == 0).all() and (ours[1][~rows] == 0).all()


def test_reference_equals_attention_token_by_token():
    """Softmax over exactly the chosen keys, written out."""
    mask = masks()["ragged"]
    q, k, v = (x.detach() for x in random_inputs(2, 3, 5, 7))
    out = sparse_attention(q, k, v, Selection.from_mask(mask, BLOCK), backend="reference")
    for b, h, t in [(0, 0, 0), (1, 2, 7), (0, 2, 19), (1, 0, 13)]:
        chosen = [j * BLOCK + i for j in range(7) if mask[b, h, t // BLOCK, j] for i in range(BLOCK)]
        expected = torch.zeros(D, dtype=torch.float64)
        if chosen:
            weights = torch.stack([(q[b, h, t] * k[b, h, j]).sum() / D**0.5 for j in chosen]).exp()
            expected = sum(w * v[b, h, j] for w, j in zip(weights, chosen, strict=True)) / weights.sum()
        assert (out[b, h, t] - expected).abs().max() < 1e-14


def test_selection_round_trip_and_density():
    mask = masks()["empty rows"]
    selection = Selection.from_mask(mask, BLOCK)
    assert torch.equal(selection.mask(), mask)
    assert selection.density == mask.double().mean().item()
    assert torch.equal(selection.counts, mask.sum(-1, dtype=torch.int32))


def test_no_gradient_reaches_the_unselected():
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    mask[..., 1] = True
    q, k, v = random_inputs(1, 1, 2, 3)
    out = sparse_attention(q, k, v, Selection.from_mask(mask, BLOCK), backend="gather")
    _, gk, gv = torch.autograd.grad(out.sum(), (q, k, v))
    for g in (gk, gv):
        per_block = g.unflatten(2, (3, BLOCK)).abs().sum((0, 1, 3, 4))
        assert per_block[0] == 0 and per_block[2] == 0
    assert gv.sum() != 0


def test_unknown_backend():
    q, k, v = random_inputs(1, 1, 1, 1)
    selection = Selection.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), BLOCK)
    with pytest.raises(UserError, match="'flash' is unknown.*gather"):
        sparse_attention(q, k, v, selection, backend="flash")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
def test_derived_forms_of_a_selection(dtype):
    """Offsets, rows and the transpose, with entries behind the last row that mean nothing."""
    mask = masks()["empty rows"]
    exact = Selection.from_mask(mask, BLOCK)
    slack = torch.cat([exact.columns, torch.tensor([30000, -1, 5], dtype=torch.int16)]).to(dtype)
    selection = Selection(exact.counts, slack, exact.key_blocks, BLOCK)
    for s in (exact, selection):
        assert torch.equal(s.mask(), mask) and s.density == mask.double().mean().item()
        assert s.offsets.tolist() == [0, *mask.flatten(0, 2).sum(-1).cumsum(0).tolist()]
        assert s.rows[: exact.columns.numel()].tolist() == mask.flatten(0, 2).nonzero()[:, 0].tolist()
        back = s.transposed()
        assert torch.equal(back.mask(), mask.transpose(2, 3)) and back.key_blocks == 5
        assert back is s.transposed() and s.offsets is s.offsets
    assert selection.most > selection.density == exact.most
