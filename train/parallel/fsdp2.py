"""FSDP2: every rank holds a slice of each weight, gradient and optimiser state; blocks gather as they run.

Weights stay float32 and autocast computes in bf16, as under the other engines: `MixedPrecisionPolicy` would
also round what must stay float32 (noise-level embedding, norms, modulation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flashvsr.models.dit import Block
from flashvsr.models.lr_projector import LRProjector
from train.checkpoint import load_optimizer, optimizer_tensors
from train.launch import World
from train.optim import squared_norm
from train.parallel.engine import Engine, Optimizer, on_main, without_weights

UNITS = (Block, LRProjector)  # gathered one at a time; what is left of the role is gathered as a whole


class Fsdp2Engine(Engine):
    """`module` is sharded in place. `build_optimizer` is called on the sharded parameters."""

    def __init__(self, module: nn.Module, build_optimizer: Optimizer, clip: float, world: World):
        self.skeleton = without_weights(module)
        mesh = init_device_mesh(world.device.type, (world.size,))
        for unit in module.modules():
            if isinstance(unit, UNITS):
                fully_shard(unit, mesh=mesh)
        fully_shard(module, mesh=mesh)
        super().__init__(module, build_optimizer, clip)
        self.size, self.main = world.size, world.is_main

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.forget()
        self.wrapped.set_requires_gradient_sync(last)
        yield

    def _squares(self, gradients: Sequence[Tensor]) -> Tensor:
        squares = squared_norm(g.to_local() for g in gradients)
        dist.all_reduce(squares)
        return squares

    def trained(self) -> dict[str, Tensor]:
        return {name: p.detach().to_local() for name, p in super().trained().items()}

    def weights(self) -> dict[str, Tensor]:
        return on_main(self._each(), self.main)

    def _gathered(self) -> dict[str, Tensor]:
        return dict(self._each())

    def _each(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, _full(tensor.detach())) for name, tensor in self.module.state_dict().items())

    def optimizer_state(self) -> dict[str, Tensor]:
        state = optimizer_tensors(self.optimizer, super().trained())
        return on_main(((name, _full(tensor)) for name, tensor in state.items()), self.main)

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        own = self.module.state_dict()
        sharded = {name: _like(own[name], t) if name in own else t for name, t in weights.items()}
        self.module.load_state_dict(sharded, strict=True, assign=False)
        trained = super().trained()
        moments = {
            name: tensor if tensor.ndim == 0 else _like(trained[name.rpartition("/")[0]], tensor)
            for name, tensor in optimizer_state.items()
        }
        load_optimizer(self.optimizer, trained, moments)

    def gather(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        params = dict(self.module.named_parameters())

        def whole(name: str, local: Tensor) -> Tensor:
            like = params[name]
            return DTensor.from_local(
                local, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
            ).full_tensor()

        return on_main(((n, whole(n, t) if n in params else t) for n, t in named.items()), self.main)

    def shard(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        params = dict(self.module.named_parameters())
        return {n: _like(params[n], t).to_local() if n in params else t for n, t in named.items()}


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(sharded: Tensor, whole: Tensor) -> Tensor:
    """The shard of `whole` that `sharded` (a DTensor, or a plain tensor: returned whole) has on this rank."""
    if not isinstance(sharded, DTensor):
        return whole
    whole = whole.to(sharded.to_local().device)
    # every rank read the same file: nothing is sent
    return distribute_tensor(whole, sharded.device_mesh, sharded.placements, src_data_rank=None)
