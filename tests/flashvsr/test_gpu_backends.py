"""Backends that need a GPU or a package: what of them can be proven without, against the reference."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch

from flashvsr.attention import Selection
from flashvsr.attention.backends import block_sparse_attn, flex, reference, resolve, why_not
from flashvsr.base.cli import UserError

CPU = torch.device("cpu")


def ragged(batch: int, heads: int, queries: int, keys: int, seed: int = 0) -> torch.Tensor:
    """Rows of every length, some empty, one full."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, heads, queries, keys, generator=draw)
    mask = mask < torch.rand(batch, heads, queries, 1, generator=draw)
    mask[0, 0, 1] = False
    mask[-1, -1, 0] = True
    return mask


def padded(selection: Selection, unused: int) -> Selection:
    """The same, with entries behind the last row that mean nothing."""
    rest = torch.full((unused,), 2, dtype=selection.columns.dtype)
    columns = torch.cat([selection.columns, rest])
    return Selection(selection.counts, columns, selection.key_blocks, selection.block_tokens)


@pytest.mark.parametrize("unused", [0, 9])
def test_flex_reads_the_selection_from_index_tables(unused):
    mask = ragged(2, 3, 5, 7)
    selection = padded(Selection.from_mask(mask, 128), unused)
    blocks = flex.block_mask(selection, backward=True)
    for counts, indices, expected in (
        (blocks.kv_num_blocks, blocks.kv_indices, mask),
        (blocks.q_num_blocks, blocks.q_indices, mask.transpose(2, 3)),
    ):
        assert counts.dtype == indices.dtype == torch.int32 and indices.shape == expected.shape
        chosen = torch.zeros_like(expected)
        for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)):
            row = tuple(at.tolist())
            found = indices[row][: counts[row]].long()
            assert len(found.unique()) == len(found)
            chosen[row][found] = True
        assert torch.equal(chosen, expected)
    assert blocks.seq_lengths == (5 * 128, 7 * 128)
    assert flex.block_mask(selection, backward=False).q_indices is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_flex_forward_is_exact_and_compiled_once():
    from torch._dynamo.utils import counters

    draw = torch.Generator().manual_seed(0)
    for step in range(3):
        q, k, v = (torch.randn(1, 2, n * 128, 32, generator=draw) for n in (3, 4, 4))
        selection = padded(Selection.from_mask(ragged(1, 2, 3, 4, seed=step), 128), step)
        with torch.no_grad():
            out = flex.attention(q, k, v, selection)
            expected = reference.attention(q.double(), k.double(), v.double(), selection)
        assert (out - expected).abs().max() < 2e-6
        assert (out[0, 0, 128:256] == 0).all(), "a row without keys"
        if step == 0:
            graphs = counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs, "another selection of the same size"


def test_flex_says_why_not_on_a_cpu():
    assert "no backward on cpu" in why_not("flex", CPU, torch.float32, 64, 128)
    with pytest.raises(UserError, match="'flex' cannot be used here.*no backward"):
        resolve("flex", CPU, torch.float32, 64, 128)


def stand_in(q, k, v, ends_q, ends_k, head_mask_type, streaming_info, base_blockmask, longest_q, longest_k,
             p_dropout, deterministic=False, softmax_scale=None, is_causal=False, exact_streaming=False,
             return_attn_probs=False):  # fmt: skip
    """`block_sparse_attn_func` by its documentation: sequences one behind the other, 128-token blocks."""
    assert q.ndim == k.ndim == v.ndim == 3 and ends_q.dtype == ends_k.dtype == torch.int32
    assert head_mask_type.dtype == torch.int32 and (head_mask_type == 1).all()
    assert head_mask_type.shape == (q.shape[1],) and base_blockmask.shape[1] == q.shape[1]
    assert streaming_info is None and p_dropout == 0.0 and not is_causal and not return_attn_probs
    out = torch.zeros_like(q)
    for b in range(len(ends_q) - 1):
        rows, columns = (slice(int(e[b]), int(e[b + 1])) for e in (ends_q, ends_k))
        assert rows.stop - rows.start == longest_q and columns.stop - columns.start == longest_k
        for h in range(q.shape[1]):
            mask = base_blockmask[b, h].repeat_interleave(128, 0).repeat_interleave(128, 1)
            scores = q[rows, h] @ k[columns, h].T * (softmax_scale or q.shape[-1] ** -0.5)
            p = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask.any(1, keepdim=True), 0)
            out[rows, h] = p @ v[columns, h]
    return out


def test_block_sparse_attn_is_called_as_documented(monkeypatch):
    package = types.ModuleType("block_sparse_attn")
    package.block_sparse_attn_func = stand_in
    monkeypatch.setitem(sys.modules, "block_sparse_attn", package)
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, n * 128, 32, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3)]
    gradient = torch.randn(2, 3, 2 * 128, 32, dtype=torch.float64)
    selection = padded(Selection.from_mask(ragged(2, 3, 2, 3), 128), 3)
    results = []
    for backend in (block_sparse_attn, reference):
        out = backend.attention(*inputs, selection)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    for ours, expected in zip(*results, strict=True):
        assert (ours - expected).abs().max() < 1e-13


def test_block_sparse_attn_says_why_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "block_sparse_attn", None)
    assert "cannot be imported" in block_sparse_attn.why_not(CPU, torch.bfloat16, 128, 128)
    monkeypatch.setitem(sys.modules, "block_sparse_attn", types.ModuleType("block_sparse_attn"))
    assert "needs an NVIDIA GPU, not cpu" in block_sparse_attn.why_not(CPU, torch.bfloat16, 128, 128)


def test_they_judge_sizes_and_types(monkeypatch):
    """What a GPU's owner is told, asked of a pretended Ampere card."""
    monkeypatch.setitem(sys.modules, "block_sparse_attn", types.ModuleType("block_sparse_attn"))
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    card = torch.device("cuda")
    assert flex.why_not(card, torch.float32, 64, 128) is None
    assert flex.why_not(card, torch.bfloat16, 128, 128) is None
    assert "blocks of a multiple of 128 tokens, not 32" in flex.why_not(card, torch.bfloat16, 64, 32)
    assert "torch.float64" in flex.why_not(card, torch.float64, 64, 128)
    ask = block_sparse_attn.why_not
    assert ask(card, torch.bfloat16, 128, 128) is None
    assert "not torch.float32" in ask(card, torch.float32, 128, 128)
    assert "not 96" in ask(card, torch.float16, 96, 128)
    assert "blocks of 128 tokens, not 32" in ask(card, torch.float16, 64, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    for backend in (flex, block_sparse_attn):
        assert "8.0 or newer" in backend.why_not(card, torch.float16, 64, 128)
