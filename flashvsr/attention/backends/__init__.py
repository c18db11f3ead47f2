"""Block-sparse attention: one function, one file per backend."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from flashvsr.attention.backends.gather import gather_attention
from flashvsr.attention.backends.reference import reference_attention
from flashvsr.attention.selection import Selection
from flashvsr.base.cli import UserError

BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Selection], Tensor]] = {
    "reference": reference_attention,
    "gather": gather_attention,
}


def resolve(backend: str) -> str:
    """The backend that `auto` stands for here; UserError for an unknown name."""
    if backend == "auto":
        return "gather"
    if backend not in BACKENDS:
        raise UserError(f"attention backend {backend!r} is unknown; there are auto, {', '.join(BACKENDS)}")
    return backend


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, backend: str = "auto"
) -> Tensor:
    """Each query block attends to its selected key blocks.

    q: `B heads T d` in block order; k, v: `B heads K*block_tokens d`; returns `B heads T d`. A query block
    without any key gives zeros. Gradients flow to q, k, v and never to the selection.
    """
    return BACKENDS[resolve(backend)](q, k, v, selection)
