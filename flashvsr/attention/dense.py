"""Exact dense attention, for segments without blocks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`B T heads d` each -> `B T heads d`."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
