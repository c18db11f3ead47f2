"""PyTorch's FlexAttention: forward and backward on NVIDIA GPUs from Ampere on, without another package.

Its block mask is written from the selection's indices, never found by evaluating a mask over all pairs. Index
tables are as wide as there are key blocks: their shapes, and with them the compiled kernels, depend on sizes
alone: from step to step nothing is compiled again. Each set of sizes has a compiled function of its own,
because `torch.compile` gives up on a function after a few sizes.
"""

from __future__ import annotations

import importlib.util
import types
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from flashvsr.attention.selection import Selection

BLOCK_TOKENS = 128  # the kernels' own tiles divide it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str | None:
    """See `backends`. On a CPU there is a forward, but no backward: that is not enough to be usable."""
    if device.type != "cuda":
        return f"FlexAttention has no backward on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton, which it compiles with, is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if dtype not in DTYPES:
        return f"does not compute in {dtype}"
    if block_tokens % BLOCK_TOKENS:
        return f"needs blocks of a multiple of {BLOCK_TOKENS} tokens, not {block_tokens}"
    return None


def table(selection: Selection) -> Tensor:
    """Key blocks of every row, int32 `B heads Q key_blocks`: the first `counts` of a row, then anything."""
    rows, width = selection.counts.numel(), selection.key_blocks
    indices = selection.counts.new_zeros(rows + 1, width)  # the last row takes what means nothing
    entry = torch.arange(selection.columns.numel(), dtype=torch.int32, device=selection.counts.device)
    row = selection.rows.long()
    place = (entry - selection.offsets[row]).clamp_(max=width - 1)
    indices[row, place.long()] = selection.columns.int()
    return indices[:rows].unflatten(0, selection.counts.shape)


def block_mask(selection: Selection, *, backward: bool) -> BlockMask:
    """The selection as FlexAttention wants it; `backward` also gives the queries of every key block."""
    n, queries = selection.block_tokens, selection.counts.shape[2]
    by_key = selection.transposed() if backward else None
    return BlockMask(
        seq_lengths=(queries * n, selection.key_blocks * n),
        kv_num_blocks=selection.counts,
        kv_indices=table(selection),
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=None if by_key is None else by_key.counts,
        q_indices=None if by_key is None else table(by_key),
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(n, n),
        mask_mod=noop_mask,
    )


@cache
def _compiled(*sizes: Any) -> Any:
    """FlexAttention compiled for one set of sizes."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        return flex_attention(q, k, v, block_mask=mask)

    # compiled code is kept per code object: a copy has room of its own
    own = types.FunctionType(
        attend.__code__.replace(), attend.__globals__, "attend", None, attend.__closure__
    )
    return torch.compile(own, dynamic=False, fullgraph=True)


def attention(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """See `sparse_attention`."""
    backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    sizes = (q.shape, k.shape, q.dtype, q.device, selection.block_tokens, backward)
    return _compiled(*sizes)(q, k, v, block_mask(selection, backward=backward))
