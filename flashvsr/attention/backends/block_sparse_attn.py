"""The MIT-licensed package `block_sparse_attn`, which the model's authors used: optional, built from source.

Kernels in the style of FlashAttention 2, written for Ampere: blocks of 128 tokens, half precision, heads of
32, 64 or 128 channels. Source of the call: the package's README.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashvsr.attention.selection import Selection

BLOCK_TOKENS = 128
HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16)
SPARSE = 1  # its head type "by block mask"


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str | None:
    """See `backends`."""
    try:
        import block_sparse_attn  # noqa: F401
    except ImportError as error:
        return f"the package block_sparse_attn cannot be imported ({error})"
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, not {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or newer"
    if dtype not in DTYPES:
        return f"computes in float16 and bfloat16, not {dtype}"
    if head_dim not in HEAD_DIMS:
        return f"has kernels for heads of 32, 64 and 128 channels, not {head_dim}"
    if block_tokens != BLOCK_TOKENS:
        return f"needs blocks of {BLOCK_TOKENS} tokens, not {block_tokens}"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """See `sparse_attention`. The package wants all sequences one behind the other, heads inside."""
    from block_sparse_attn import block_sparse_attn_func

    batch, heads, queries, _ = q.shape
    keys = k.shape[2]

    def ends(length: int) -> Tensor:
        return torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=q.device)

    out = block_sparse_attn_func(
        *(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)),
        ends(queries),
        ends(keys),
        torch.full((heads,), SPARSE, dtype=torch.int32, device=q.device),
        None,  # streaming_info: for heads of another type
        selection.mask(),
        queries,
        keys,
        0.0,  # dropout
        deterministic=torch.are_deterministic_algorithms_enabled(),
        softmax_scale=None,  # 1 / sqrt(d)
        is_causal=False,  # causality is in the selection
    )
    return out.unflatten(0, (batch, queries)).transpose(1, 2)
