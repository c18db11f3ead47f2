"""Activation memory of a DiT's blocks in training: what a forward keeps, what the backward pass computes
again, and where the kept part waits.

none       everything autograd asks for is kept
full       a block's input is kept; the whole block is computed again
selective  a block's input and its attention's q, k, v and output are kept; what is around attention (norms,
           modulation, RoPE, projections, feed-forward) is computed again, attention, the largest part of a
           long clip, is not

The gradients are the same bit for bit. With `offload` the kept tensors wait in host memory (pinned on a GPU).
Blocks are changed by methods of their own instance, so that a deep copy keeps them and runs its own weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from flashvsr.models.dit import Block, DiT


def recompute(dit: DiT, kind: str, *, offload: bool = False) -> None:
    """Changes, in place, what the blocks of `dit` keep; `kind` none, full or selective."""
    for block in dit.blocks:
        vars(block).pop("forward", None)
        if kind != "none":
            block.forward = MethodType(partial(_FORWARDS[kind], offload), block)


def _full(offload: bool, block: Block, x: Tensor, e: Tensor, plan: Any, layer: int) -> Tensor:
    run = partial(Block.forward, block)
    if not torch.is_grad_enabled():
        return run(x, e, plan, layer)
    with _kept(offload, e):
        return _again(run, x, e, plan, layer)


def _selective(offload: bool, block: Block, x: Tensor, e: Tensor, plan: Any, layer: int) -> Tensor:
    if not torch.is_grad_enabled():
        return Block.forward(block, x, e, plan, layer)
    with _kept(offload, e):
        q, k, v = _again(block.before, x, e, plan.rope)
        return _again(block.after, x, plan.attend(layer, q, k, v), e)


_FORWARDS = {"full": _full, "selective": _selective}


def _again(run: Any, *args: Any) -> Any:
    # nothing in a block is drawn: no generator's state to keep
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def _kept(offload: bool, shared: Tensor) -> AbstractContextManager:
    """`shared` is every layer's: it stays where it is."""
    return OnHost([shared]) if offload else nullcontext()


def to_host(storage: torch.UntypedStorage) -> Tensor:
    """A copy of the bytes in host memory. On a GPU it is pinned and queued behind the work that made them, on
    the same stream: the memory may be used again at once, and reading back needs no waiting either."""
    host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")
    return host.copy_(_bytes(storage), non_blocking=True)


class _Parked:
    """A storage that waits in host memory; brought back once for all its views in use."""

    def __init__(self, storage: torch.UntypedStorage):
        self.device, self.host = storage.device, to_host(storage)
        self.back: weakref.ref[torch.UntypedStorage] | None = None

    def storage(self) -> torch.UntypedStorage:
        live = None if self.back is None else self.back()
        if live is None:
            live = self.host.to(self.device, non_blocking=True, copy=True).untyped_storage()
            self.back = weakref.ref(live)
        return live


class OnHost(saved_tensors_hooks):
    """Floating-point tensors kept for the backward pass by what runs inside `with` wait in host memory,
    parameters and `stay` excepted."""

    def __init__(self, stay: Sequence[Tensor]):
        super().__init__(self._pack, _unpack)
        self.stay = {t.untyped_storage()._cdata for t in stay}
        # the storages are held while `with` lasts, so that no address is used twice
        self.parked: dict[int, tuple[torch.UntypedStorage, _Parked]] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.parked.clear()

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        key = storage._cdata
        leaf = tensor.requires_grad and tensor.is_leaf
        if key in self.stay or leaf or not tensor.is_floating_point():
            return tensor
        if key not in self.parked:
            self.parked[key] = storage, _Parked(storage)
        view = tensor.storage_offset(), tensor.shape, tensor.stride()
        return self.parked[key][1], tensor.dtype, view


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    parked, dtype, view = packed
    storage = parked.storage()
    return torch.empty(0, dtype=dtype, device=storage.device).set_(storage, *view)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
