"""Torch's dense attention under the selection as a mask: the same result at the cost of all pairs.

Pays where nearly everything is selected; `auto` says from which density on. Where everything is, there is no
mask. Memory for the mask grows with queries times keys: forward it is bounded by working on parts of the
queries, backward torch keeps all parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flashvsr.attention.selection import Selection

MASK_ELEMENTS = 2**24  # of the part of the mask in use


def why_not(device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str | None:
    """Runs everywhere."""
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, selection: Selection) -> Tensor:
    """See `sparse_attention`."""
    if selection.most >= 1 and selection.density == 1:
        return F.scaled_dot_product_attention(q, k, v)
    n = selection.block_tokens
    blocks = selection.mask()
    # A row without keys sees all of them instead, and is set to zero afterwards: no gradient passes there.
    empty = ~blocks.any(-1, keepdim=True)
    blocks = blocks | empty
    rows = max(1, MASK_ELEMENTS // (blocks[:, :, 0].numel() * n * n))
    parts = []
    for q_part, mask, none in zip(
        q.split(rows * n, 2), blocks.split(rows, 2), empty.split(rows, 2), strict=True
    ):
        mask = mask.repeat_interleave(n, 2).repeat_interleave(n, 3)
        out = F.scaled_dot_product_attention(q_part, k, v, attn_mask=mask)
        parts.append(out.masked_fill(none.repeat_interleave(n, 2), 0))
    return torch.cat(parts, 2)
