"""DeepSpeed ZeRO: slices of the optimiser state (1), of gradients too (2), of weights too (3) on every rank.

One DeepSpeed engine per role, in float32 with autocast as under the other engines. Micro-batches are the
loop's: DeepSpeed is told which backward is the last of a step. What is saved is whole and by parameter name,
as everywhere.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr.base.cli import UserError
from train.checkpoint import MOMENTS
from train.launch import World
from train.optim import set_lr
from train.parallel.engine import Engine, Optimizer, on_main, without_weights


class ZeroEngine(Engine):
    def __init__(self, module: nn.Module, build_optimizer: Optimizer, clip: float, world: World, level: int):
        deepspeed = _deepspeed(world)
        super().__init__(module, build_optimizer, clip)
        self.size, self.rank, self.main, self.weights_sharded = (
            world.size,
            world.rank,
            world.is_main,
            level == 3,
        )
        if self.weights_sharded:
            self.skeleton = without_weights(module)
        self.wrapped, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self.optimizer, config=_settings(level, clip), dist_init_required=False
        )

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.forget()
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def _differentiate(self, loss: Tensor) -> None:
        self.wrapped.backward(loss)

    def step(self, lr: float) -> float:
        set_lr(self.optimizer, lr)
        self.wrapped.step()
        return float(self.wrapped.get_global_grad_norm())

    def trained(self) -> dict[str, Tensor]:
        if not self.weights_sharded:
            return super().trained()
        return {name: p.ds_tensor for name, p in super().trained().items()}

    def weights(self) -> dict[str, Tensor]:
        if not self.weights_sharded:
            return super().weights()
        return on_main(self._each(), self.main)

    def _gathered(self) -> dict[str, Tensor]:
        return dict(self._each()) if self.weights_sharded else super().weights()

    def _each(self) -> Iterator[tuple[str, Tensor]]:
        params = self._parameters()
        for name, tensor in self.module.state_dict().items():
            yield name, self._join(params[name], params[name].ds_tensor) if name in params else tensor

    def optimizer_state(self) -> dict[str, Tensor]:
        return on_main(self._moments(), self.main)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        steps = self._steps()
        for name, p in super().trained().items():
            yield f"{name}/step", torch.tensor(steps, dtype=torch.float32)
            for key in MOMENTS if steps else ():
                yield f"{name}/{key}", self._moment(p, key)

    def load(self, weights: Mapping[str, Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        self._load_weights(weights)
        named, left = super().trained(), dict(optimizer_state)
        steps = {left.pop(f"{name}/step", torch.tensor(-1.0)).item() for name in named}
        if len(steps) != 1 or -1.0 in steps:
            raise UserError("the saved optimiser trained other parameters, or some less often: DeepSpeed "
                            "keeps one count of steps; resume with parallel=ddp or fsdp2")  # fmt: skip
        (step,) = steps
        if step:
            self._load_moments(step, named, left)
        if left:
            raise UserError(
                f"the saved optimiser has {next(iter(left))!r}, which is not trained here "
                f"({len(left)} too many)"
            )

    def gather(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.weights_sharded:
            return dict(named)
        params = self._parameters()
        whole = ((n, self._join(params[n], t) if n in params else t) for n, t in named.items())
        return on_main(whole, self.main)

    def shard(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.weights_sharded:
            return dict(named)
        params = self._parameters()
        return {n: self._cut(params[n], t) if n in params else t for n, t in named.items()}

    # ---- slices of ZeRO-3: flat, padded to the same length on every rank ---------------------------------

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def _join(self, like: nn.Parameter, local: Tensor) -> Tensor:
        flat = local.new_empty(local.numel() * self.size)
        dist.all_gather_into_tensor(flat, local.contiguous())
        return flat[: like.ds_numel].view(like.ds_shape)

    def _cut(self, like: nn.Parameter, whole: Tensor) -> Tensor:
        length = like.ds_tensor.numel()
        flat = F.pad(whole.flatten(), (0, length * self.size - whole.numel()))
        return flat[self.rank * length : (self.rank + 1) * length].to(like.ds_tensor)

    # ---- loading ------------------------------------------------------------------------------------------

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        if not self.weights_sharded:
            self.module.load_state_dict(dict(weights), strict=True)
            self.optimizer.refresh_fp32_params()
            return
        from deepspeed.utils import safe_set_full_fp32_param

        params = self._parameters()
        buffers = {n: t for n, t in weights.items() if n not in params}
        if missing := sorted(params.keys() - weights.keys()):
            raise UserError(f"the checkpoint has no {missing[0]!r} ({len(missing)} weights are missing)")
        self.module.load_state_dict(buffers, strict=False)
        with torch.no_grad():
            for name, p in params.items():
                p.ds_tensor.copy_(self._cut(p, weights[name]))
                if p.requires_grad:
                    safe_set_full_fp32_param(p, weights[name])

    def _load_moments(self, step: float, named: Mapping[str, nn.Parameter], left: dict[str, Tensor]) -> None:
        zero = self.optimizer
        flats = (
            zero.fp32_partitioned_groups_flat
            if self.weights_sharded
            else zero.single_partition_of_fp32_groups
        )
        for flat in flats:
            fresh = {key: torch.zeros_like(flat) for key in MOMENTS}
            zero.optimizer.state[flat] = {"step": torch.tensor(step, device=flat.device), **fresh}
        for name, p in named.items():
            for key in MOMENTS:
                moment = left.pop(f"{name}/{key}", None)
                if moment is None:
                    raise UserError(f"the saved optimiser has no {name}/{key}: it trained other parameters")
                self._set_moment(p, key, moment.to(p.device))

    # ---- moments -------------------------------------------------------------------------------------------
    # Of ZeRO-1 and 2 by the addresses DeepSpeed keeps: its own getters serve the first parameter group only.

    def _piece(self, p: nn.Parameter, key: str) -> tuple[int, Tensor] | None:
        """Where this rank's piece of a parameter's moment begins in it, and the piece, a view."""
        mapping = p._hp_mapping
        if mapping is None:
            return None
        flat = self.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        place = mapping.hp_fragment_address
        moment = self.optimizer.optimizer.state[flat][key]
        return mapping.lp_fragment_address.start, moment.narrow(0, place.start, place.numel)

    def _moment(self, p: nn.Parameter, key: str) -> Tensor:
        if self.weights_sharded:
            from deepspeed.utils import safe_get_full_optimizer_state

            return safe_get_full_optimizer_state(p, key)
        whole = torch.zeros(p.numel(), device=p.device)
        if (piece := self._piece(p, key)) is not None:
            whole[piece[0] : piece[0] + piece[1].numel()] = piece[1]
        dist.all_reduce(whole)
        return whole.view(p.shape)

    def _set_moment(self, p: nn.Parameter, key: str, whole: Tensor) -> None:
        if self.weights_sharded:
            from deepspeed.utils import safe_set_full_optimizer_state

            safe_set_full_optimizer_state(p, whole, key)
        elif (piece := self._piece(p, key)) is not None:
            piece[1].copy_(whole.flatten()[piece[0] : piece[0] + piece[1].numel()])

    def _steps(self) -> int:
        """Optimiser steps so far: the same for every parameter."""
        states = [s for s in self.optimizer.optimizer.state.values() if "step" in s]
        return int(states[0]["step"]) if states else 0


def _deepspeed(world: World):
    """The package, told that there is no GPU before it is imported where that is so."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise UserError("parallel=zero* needs DeepSpeed: pip install deepspeed, or use fsdp2") from None
    if world.device.type == "cpu":
        # gloo serves; the kernel for shared memory would be compiled for a minute first
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _settings(level: int, clip: float) -> dict:
    """DeepSpeed's configuration: nothing of it is a user's choice but the level and the clipping."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # of its own bookkeeping only
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip,
        "zero_optimization": {"stage": level},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
