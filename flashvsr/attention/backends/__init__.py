"""Block-sparse attention: one function, one file per backend.

A backend is a module with two functions:

    why_not(device, dtype, head_dim, block_tokens) -> None when it can compute that, else the reason
    attention(q, k, v, selection) -> out            as `sparse_attention`

It is imported when first asked for; one whose packages are missing is listed with the reason.

`auto` is the first of `AUTO` that is usable for device, dtype, head width and block size; selections at
`dense_from` or above go to `dense`, which computes the same.
"""

from __future__ import annotations

import importlib
from functools import cache

import torch
from torch import Tensor

from flashvsr.attention.selection import Selection
from flashvsr.base.cli import UserError

BACKENDS: dict[str, str] = {
    name: f"{__name__}.{name}"
    for name in ("reference", "gather", "flex", "block_sparse_attn", "triton", "dense")
}
# What `auto` tries, in order: the first that is usable.
AUTO = ("flex", "triton", "block_sparse_attn", "gather")


def dense_from(device: torch.device, block_tokens: int) -> float:
    """The density from which `auto` takes dense attention.

    Where everything is selected there is no mask, and torch's fastest kernel runs. A mask costs more than it
    spares, except for small blocks on a CPU: there `gather` moves much for little work (measured).
    """
    return 0.7 if device.type == "cpu" and block_tokens < 64 else 1.0


@cache
def why_not(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int
) -> str | None:
    """Why the backend of this name cannot compute that; None when it can."""
    try:
        module = importlib.import_module(BACKENDS[name])
    except ImportError as error:
        return f"cannot be imported ({error})"
    return module.why_not(device, dtype, head_dim, block_tokens)


def available(
    device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int
) -> dict[str, str | None]:
    """Every backend with None where it is usable, else with the reason."""
    return {name: why_not(name, device, dtype, head_dim, block_tokens) for name in BACKENDS}


def resolve(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    block_tokens: int,
    density: float = 0.0,
) -> str:
    """The backend's name, of `auto` the one it stands for at that density; UserError for an unknown or
    unusable one."""
    facts = (device, dtype, head_dim, block_tokens)
    if backend == "auto":
        if density >= dense_from(device, block_tokens):
            return "dense"
        return next(name for name in AUTO if why_not(name, *facts) is None)
    if backend in BACKENDS and (reason := why_not(backend, *facts)) is None:
        return backend
    usable = ", ".join(name for name, reason in available(*facts).items() if reason is None)
    what = f"cannot be used here: {reason}" if backend in BACKENDS else "is unknown"
    raise UserError(f"attention backend {backend!r} {what}; usable: auto, {usable}")


def describe(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, block_tokens: int) -> str:
    """`resolve` in words, for what a command prints and a report keeps."""
    name = resolve(backend, device, dtype, head_dim, block_tokens)
    limit = dense_from(device, block_tokens)
    return f"{name} (auto; dense from density {limit:g})" if backend == "auto" else name


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, backend: str = "auto"
) -> Tensor:
    """Each query block attends to its selected key blocks.

    q: `B heads T d` in block order; k, v: `B heads K*block_tokens d`; returns `B heads T d`. A query block
    without any key gives zeros. Gradients flow to q, k, v and never to the selection.
    """
    name = resolve(backend, q.device, q.dtype, q.shape[-1], selection.block_tokens, selection.most)
    return importlib.import_module(BACKENDS[name]).attention(q, k, v, selection)
