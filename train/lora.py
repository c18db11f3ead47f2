"""Low-rank adapters (Hu et al. 2021) put into a model and merged out of it again.

An adapted layer is still an `nn.Linear` with its own `weight` and `bias` under their plain names, so a
checkpoint's base weights keep the names of the plain model; the adapter adds `lora_A.weight` and
`lora_B.weight` beside them, the names other packages read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr.base.cli import UserError
from flashvsr.base.draws import generator


class LoRALinear(nn.Linear):
    """y = W x + b + (alpha/rank)·B A x, with W and b frozen.

    A starts Kaiming-uniform as in the paper's code (bound 1/√in), B at zero, so a fresh adapter changes
    nothing.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, init: torch.Generator) -> None:
        # super().__init__ would allocate and draw a weight only to drop it; the base's own parameters are
        # kept.
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha = rank, float(alpha)
        self.weight, self.bias = base.weight, base.bias
        # merge() gives back what was frozen here.
        self.trained_before = {name: p.requires_grad for name, p in base.named_parameters(recurse=False)}
        for _, param in self.named_parameters(recurse=False):
            param.requires_grad_(False)
        where = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = _empty_linear(base.in_features, rank, where)
        self.lora_B = _empty_linear(rank, base.out_features, where)
        bound = 1.0 / math.sqrt(base.in_features)
        with torch.no_grad():
            self.lora_A.weight.copy_(
                torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=init)
            )
            self.lora_B.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        return F.linear(x, self.weight, self.bias) + self.lora_B(self.lora_A(x)) * (self.alpha / self.rank)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, alpha={self.alpha:g}"


def _empty_linear(inputs: int, outputs: int, where: Mapping[str, Any]) -> nn.Linear:
    # torch's skip_init cannot do this under fake tensors
    layer = nn.Linear(inputs, outputs, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.empty(outputs, inputs, **where))
    return layer


def adapted(module: nn.Module) -> dict[str, LoRALinear]:
    """The adapted layers of `module` by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoRALinear)}


def inject(
    module: nn.Module, targets: Sequence[str], rank: int, alpha: float | None = None, *, seed: int = 0
) -> list[str]:
    """Adapts, in place, every `nn.Linear` of `module` whose dotted name matches one of the shell patterns.

    Freezes the adapted layers' own weights; what else is trained is the caller's choice. `alpha` defaults to
    `rank`. A's start depends only on (seed, layer name). Returns the adapted names in module order.

    Raises:
        UserError: a pattern that matches no linear layer, a rank below 1, or a module that is adapted
        already.
    """
    if rank < 1:
        raise UserError(f"the adapter rank is {rank}: give at least 1")
    if adapted(module):
        raise UserError("the model already carries an adapter: merge it before adding another")
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name}
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise UserError(
                f"the adapter target {pattern!r} matches no linear layer; "
                f"there is for example {next(iter(linears), None)!r}"
            )
    chosen = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in targets)]
    for name in chosen:
        init = generator("lora", seed, name)
        _replace(module, name, LoRALinear(linears[name], rank, rank if alpha is None else alpha, init))
    return chosen


@torch.no_grad()
def merge(module: nn.Module) -> list[str]:
    """Turns every adapted layer back into a plain `nn.Linear` with W + (alpha/rank)·B A; returns their names.

    The weight stays the same Parameter object, changed in place; the product is formed in float32.
    """
    layers = adapted(module)
    for name, layer in layers.items():
        delta = (layer.alpha / layer.rank) * (layer.lora_B.weight.float() @ layer.lora_A.weight.float())
        layer.weight.copy_(layer.weight.float() + delta)
        has_bias = layer.bias is not None
        plain = nn.utils.skip_init(
            nn.Linear, layer.in_features, layer.out_features, bias=has_bias, device="meta"
        )
        plain.weight, plain.bias = layer.weight, layer.bias
        for param_name, param in plain.named_parameters(recurse=False):
            param.requires_grad_(layer.trained_before[param_name])
        _replace(module, name, plain.train(layer.training))
    return list(layers)


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapter alone: per layer `.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank], `.alpha` []."""
    state: dict[str, Tensor] = {}
    for name, layer in adapted(module).items():
        state[f"{name}.lora_A.weight"] = layer.lora_A.weight.detach()
        state[f"{name}.lora_B.weight"] = layer.lora_B.weight.detach()
        state[f"{name}.alpha"] = torch.tensor(layer.alpha)
    return state


@torch.no_grad()
def load_adapter(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `adapter_state` gave into a module that was adapted alike.

    Raises:
        UserError: a tensor is missing, unknown, of another shape, or alpha differs; nothing is changed then.
    """
    wanted = adapter_state(module)
    if different := sorted(wanted.keys() ^ state.keys()):
        kind = "misses" if different[0] in wanted else "has the unknown"
        raise UserError(
            f"the adapter {kind} {different[0]!r} ({len(different)} names differ from the model's)"
        )
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise UserError(
                f"the adapter's {name!r} is {tuple(state[name].shape)}, the model's {tuple(tensor.shape)}"
            )
        if name.endswith(".alpha") and float(state[name]) != float(tensor):
            raise UserError(
                f"the adapter's {name!r} is {float(state[name]):g}, the model's {float(tensor):g}"
            )
    for name, tensor in wanted.items():
        tensor.copy_(state[name])


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)
