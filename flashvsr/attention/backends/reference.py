"""Dense attention under the selection as a mask: the oracle of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from flashvsr.attention.selection import Selection
from flashvsr.models.norm import widen


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str | None:
    """Runs everywhere."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """See `sparse_attention`. Memory grows with queries times keys."""
    n = selection.block_tokens
    mask = selection.mask().repeat_interleave(n, 2).repeat_interleave(n, 3)
    scores = widen(q) @ widen(k).transpose(-1, -2) / q.shape[-1] ** 0.5
    p = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    p = torch.where(mask.any(-1, keepdim=True), p, torch.zeros_like(p))
    return (p @ widen(v)).to(q.dtype)
