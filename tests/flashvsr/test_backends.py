"""Sparse attention: every backend that is usable on this machine against an oracle written out in float64."""

import sys
import types
from dataclasses import replace

import pytest
import torch

from flashvsr.attention import Selection, backends, sparse_attention
from flashvsr.attention.backends import AUTO, BACKENDS, available, describe, gather, resolve
from flashvsr.base.cli import UserError
from flashvsr.base.measure import peak_bytes
from tests.flashvsr.attention_cases import CASES, TOLERANCE, Case, check, errors, make, mask_of, repeats, run

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def backend(name):
    return lambda q, k, v, selection: sparse_attention(q, k, v, selection, backend=name)


def need(name, case):
    facts = (DEVICE, case.dtype, case.head_dim, case.block_tokens)
    if reason := backends.why_not(name, *facts):
        pytest.skip(f"{name}: {reason}")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_conformance(name, case):
    need(name, case)
    check(backend(name), case, DEVICE)


@pytest.mark.parametrize("kind", ["ragged", "empty rows"])
@pytest.mark.parametrize("name", ["reference", "gather", "dense"])
def test_float64(name, kind):
    check(backend(name), Case(kind, torch.float64, head_dim=16, block_tokens=8, batch=2), DEVICE)


@pytest.mark.parametrize("name", BACKENDS)
def test_repeated_calls_give_the_same_bits(name):
    """On a CPU all backends; on a GPU all but `gather`, which says so."""
    case = Case("ragged", torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    need(name, case)
    same = repeats(backend(name), case, DEVICE)
    assert same[0] and (all(same) or (name == "gather" and DEVICE.type == "cuda")), same


def test_the_checker_sees_mistakes():
    """A wrong scale, a wrong gradient and a wrong list are each found."""
    case = Case("ragged", head_dim=32, block_tokens=16)

    def scale(q, k, v, selection):
        return sparse_attention(q * 1.001, k, v, selection, backend="reference")

    def gradient(q, k, v, selection):
        return sparse_attention(q, k, v.detach(), selection, backend="reference")

    def lists(q, k, v, selection):
        columns = selection.columns.clone()
        columns[0] = (columns[0] + 1) % selection.key_blocks
        return sparse_attention(q, k, v, replace(selection, columns=columns), backend="reference")

    for wrong in (scale, gradient, lists):
        assert max(errors(wrong, case)) > TOLERANCE[torch.float32]


# ---- gather: tiles, slabs, memory -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ragged", "empty rows", "one long row", "all"])
@pytest.mark.parametrize("tile,padding", [(1, 0), (1, 1e9), (3 * 64 * 8, 1e9), (2**20, 0), (2**20, 1e9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gather_in_any_tiles(kind, tile, padding, dtype, monkeypatch):
    """One key block at a time, three, or all; rows alone or padded; heads in half precision one by one."""
    monkeypatch.setattr(gather, "TILE_PER_THREAD", tile)
    monkeypatch.setattr(gather, "PADDING", padding)
    if tile == 1:
        monkeypatch.setattr(gather, "SCRATCH", 1)
    check(backend("gather"), Case(kind, dtype, head_dim=16, block_tokens=8, batch=2, heads=3), DEVICE)


def test_gather_agrees_with_finite_differences():
    case = Case("empty rows", torch.float64, head_dim=4, block_tokens=2, queries=3, keys=4)
    data = make(case)
    leaves = [x.requires_grad_() for x in data.inputs]
    assert torch.autograd.gradcheck(lambda *x: gather.attention(*x, data.selection), leaves)


def test_gather_tiles_cover_every_pair_once():
    """Plain lists against the greedy tiling: no row and no key block twice or left out."""
    torch.manual_seed(0)
    for most, spare, threads in [(1, 0, 1), (8, 0, 2), (8, 5, 2), (64, 1e9, 3)]:
        counts = torch.randint(0, 40, (57,)).sort(descending=True).values.tolist()
        seen = [[0] * c for c in counts]
        for start, stop, skip, length in gather._groups(counts, most, spare, threads):
            assert length * (stop - start) <= max(most, length) and length <= most
            real = [max(0, min(c - skip, length)) for c in counts[start:stop]]
            assert sum(length - r for r in real) <= spare and min(real) > 0
            for row, r in zip(range(start, stop), real, strict=True):
                for i in range(skip, skip + r):
                    seen[row][i] += 1
        assert all(all(x == 1 for x in row) for row in seen)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_scratch_stays_below_its_ceiling(dtype):
    """Beyond inputs, output and gradients, at rows far longer than a tile."""
    heads, n, d, blocks = 2, 128, 128, 160
    mask = torch.rand(1, heads, blocks, blocks) < 0.02
    mask[:, :, :2] = True
    selection = Selection.from_mask(mask.to(DEVICE), n)
    leaves = [
        torch.randn(1, blocks * n, heads, d, device=DEVICE, dtype=dtype).transpose(1, 2).requires_grad_()
        for _ in range(3)
    ]
    grad = torch.ones_like(leaves[0])
    size = leaves[0].numel() * leaves[0].element_size()
    saved = heads * blocks * n * 4  # the log-sum-exp

    def both():
        out = gather.attention(*leaves, selection)
        return out, *torch.autograd.grad(out, leaves, grad)

    with torch.no_grad():
        forward = peak_bytes(lambda: gather.attention(*leaves, selection), DEVICE)
    backward = peak_bytes(both, DEVICE)
    if forward is None:
        pytest.skip("this system does not tell resident memory")
    assert forward - size - saved < gather.SCRATCH
    assert backward - 4 * size - saved < gather.SCRATCH


# ---- the interface --------------------------------------------------------------------------------------


def test_dense_is_used_where_nothing_sparse_gains_and_gives_the_same():
    cpu = torch.device("cpu")
    assert resolve("auto", cpu, torch.float32, 64, 128) == "gather" == AUTO[-1]
    assert resolve("auto", cpu, torch.float32, 64, 128, density=0.99) == "gather"
    assert resolve("auto", cpu, torch.float32, 64, 128, density=1) == "dense"
    assert resolve("auto", cpu, torch.float32, 64, 32, density=0.7) == "dense"
    assert resolve("auto", torch.device("meta"), torch.float32, 64, 32, density=0.99) == "gather"
    assert describe("auto", cpu, torch.float32, 64, 128) == "gather (auto; dense from density 1)"
    assert describe("gather", cpu, torch.float32, 64, 128) == "gather"
    case = Case("all", head_dim=32, block_tokens=16)
    data = make(case, slack=0)
    assert data.selection.most == 1
    for density in (1.0, 0.9):
        mask = torch.rand(data.mask.shape, generator=torch.Generator().manual_seed(0)) < density
        selection = Selection.from_mask(mask, 16)
        auto = sparse_attention(*data.inputs, selection)
        assert torch.equal(auto, sparse_attention(*data.inputs, selection, backend="dense"))
        other = sparse_attention(*data.inputs, selection, backend="gather")
        assert (auto - other).abs().max() < 1e-6


def test_dense_in_parts(monkeypatch):
    monkeypatch.setattr(backends.importlib.import_module(BACKENDS["dense"]), "MASK_ELEMENTS", 1)
    check(backend("dense"), Case("empty rows", head_dim=32, block_tokens=16), DEVICE)


def test_unknown_and_unusable_backends():
    data = make(Case("all", head_dim=32, block_tokens=16, queries=1, keys=1))
    with pytest.raises(UserError, match="'flash' is unknown; usable: auto, reference, gather.*dense"):
        sparse_attention(*data.inputs, data.selection, backend="flash")
    facts = (torch.device("cpu"), torch.float32, 32, 16)
    reasons = {name: reason for name, reason in available(*facts).items() if reason}
    assert list(available(*facts)) == list(BACKENDS)
    for name, reason in reasons.items():
        with pytest.raises(UserError) as error:
            sparse_attention(*data.inputs, data.selection, backend=name)
        assert f"attention backend {name!r} cannot be used here: {reason}; usable: auto, " in str(error.value)


def test_a_backend_that_cannot_be_imported_says_why(monkeypatch):
    monkeypatch.setitem(BACKENDS, "absent", "flashvsr.attention.backends.absent")
    assert "No module named" in backends.why_not("absent", torch.device("cpu"), torch.float32, 64, 128)
    fake = types.ModuleType("flashvsr.attention.backends.present")
    fake.why_not = lambda *facts: None
    fake.attention = lambda q, k, v, selection: q + 1
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setitem(BACKENDS, "present", fake.__name__)
    q = torch.zeros(1, 1, 2, 4)
    selection = Selection.from_mask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 2)
    assert (sparse_attention(q, q, q, selection, backend="present") == 1).all()


# ---- Selection ------------------------------------------------------------------------------------------


def test_selection_round_trip_and_density():
    mask = mask_of(Case("empty rows", batch=2))
    selection = Selection.from_mask(mask, 4)
    assert torch.equal(selection.mask(), mask)
    assert selection.density == selection.most == mask.double().mean().item()
    assert torch.equal(selection.counts, mask.sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("kind", ["empty rows", "none", "all"])
def test_derived_forms_of_a_selection(dtype, kind):
    """Offsets, rows and the transpose, with entries behind the last row that mean nothing."""
    mask = mask_of(Case(kind, batch=2))
    exact = Selection.from_mask(mask, 4)
    slack = torch.cat([exact.columns, torch.tensor([30000, -1, 5], dtype=torch.int16)]).to(dtype)
    for s in (exact, replace(exact, columns=slack)):
        assert torch.equal(s.mask(), mask) and s.density == mask.double().mean().item()
        assert s.offsets.tolist() == [0, *mask.flatten(0, 2).sum(-1).cumsum(0).tolist()]
        assert s.rows[: exact.columns.numel()].tolist() == mask.flatten(0, 2).nonzero()[:, 0].tolist()
        back = s.transposed()
        assert torch.equal(back.mask(), mask.transpose(2, 3)) and back.key_blocks == 5
        assert back is s.transposed() and s.offsets is s.offsets


def test_more_key_blocks_than_int16_holds():
    mask = torch.zeros(1, 1, 2, 2**15 + 2, dtype=torch.bool)
    mask[..., -1] = True
    selection = Selection.from_mask(mask, 1)
    assert selection.columns.dtype == torch.int32 and torch.equal(selection.mask(), mask)
    data = [torch.randn(1, 1, blocks, 8) for blocks in (2, 2**15 + 2, 2**15 + 2)]
    out = sparse_attention(*data, selection, backend="gather")
    assert torch.equal(out, data[2][:, :, -1:].expand(-1, -1, 2, -1))


def test_no_gradient_reaches_the_unselected():
    mask = torch.zeros(1, 1, 2, 3, dtype=torch.bool)
    mask[..., 1] = True
    data = make(Case("all", torch.float64, head_dim=6, block_tokens=4, heads=1, queries=2, keys=3))
    data = replace(data, mask=mask, selection=Selection.from_mask(mask, 4))
    _, _, dk, dv = run(gather.attention, data)
    for g in (dk, dv):
        per_block = g.unflatten(2, (3, 4)).abs().sum((0, 1, 3, 4))
        assert per_block[0] == 0 and per_block[2] == 0 and per_block[1] > 0
