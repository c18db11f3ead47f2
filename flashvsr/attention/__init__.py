"""Attention: block order, selection of blocks, plans, and the backends that compute it."""

from flashvsr.attention.backends import sparse_attention
from flashvsr.attention.selection import Selection

__all__ = ["Selection", "sparse_attention"]
