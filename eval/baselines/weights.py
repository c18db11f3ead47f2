"""Checkpoints of BasicVSR and IconVSR by BasicSR's names: widths and layers come from the tensors' shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.baselines.basicvsr import SCALE, BasicVSR, Recurrent
from eval.baselines.iconvsr import IconVSR
from eval.baselines.spynet import LEVELS, MEAN, STD
from flashvsr.base.cli import UserError
from flashvsr.base.files import load_torch, sha256
from flashvsr.weights.tensors import check_file, is_safetensors, read_tensors

NETWORKS: dict[str, type[Recurrent]] = {"basicvsr": BasicVSR, "iconvsr": IconVSR}
RELEASED = "BasicVSR_REDS-543c8261.pth, IconVSR_REDS-aaa5367f.pth and others in BasicSR's model zoo"
WRAPPERS = ("params_ema", "params", "state_dict")  # what trainers put around their tensors
Shapes = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Network:
    """A network ready for frames, what it is called, and where its weights are from."""

    module: Recurrent
    name: str
    weights: str

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())


def load_network(
    kind: str,
    weights: str | Path | None,
    *,
    scale: float = SCALE,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Network:
    """`kind` ("basicvsr" or "iconvsr") with the weights of a file, or with `weights="random"`.

    dtype: of the features; flow is always computed in float32. UserError when there are no weights, when the
    file is another network's or damaged, or when `scale` is not 4.
    """
    if kind not in NETWORKS:
        raise UserError(f"there is no baseline network {kind!r}; there are {', '.join(NETWORKS)}")
    if scale != SCALE:
        raise UserError(f"{kind} upscales by {SCALE} only, not by scale={scale:g}; take bicubic or lanczos")
    if weights is None:
        raise UserError(
            f"{kind} needs weights=FILE, an official checkpoint ({RELEASED}), or weights=random for a "
            f"demonstration that is marked as such"
        )
    name = NETWORKS[kind].__name__
    if str(weights) == "random":
        module, source = random_network(kind), "random weights (seed 0), a demonstration only"
    else:
        path = Path(weights)
        module = network_of(kind, read_checkpoint(path), str(path))
        source = f"{path.name} (sha256 {sha256(path)[:12]})"
    module = module.eval().requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)
    module.spynet.float()
    return Network(module, name, source)


def random_network(kind: str, seed: int = 0, **settings: Any) -> Recurrent:
    """An untrained network: residual branches a tenth as strong as torch makes them, all else its default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = NETWORKS[kind](**settings)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if re.search(r"\.conv[12]\.(weight|bias)$", name):
                weight.mul_(0.1)
    return module


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, safetensors or torch's, without wrappers and without `module.`."""
    check_file(path)
    content: Any = read_tensors([path], None, "cpu") if is_safetensors(path) else load_torch(path)
    while isinstance(content, Mapping):
        inner = next((w for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path} holds no named tensors; take a checkpoint of BasicSR ({RELEASED})")
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"{path} holds {_some(strange)} beside tensors; take a checkpoint of BasicSR")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def network_of(kind: str, tensors: Mapping[str, Tensor], where: str) -> Recurrent:
    """The network with these weights, every name used; UserError, naming tensors, where they do not fit.

    SPyNet's mean and std may be missing: they are constants.
    """
    other = next(k for k in NETWORKS if k != kind)
    found = "iconvsr" if any(n.startswith("edvr.") for n in tensors) else "basicvsr"
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):
            module = NETWORKS[kind](**settings_of(kind, shapes))
    except (KeyError, ValueError, IndexError):
        module = None
    own = {} if module is None else {n: tuple(t.shape) for n, t in module.state_dict().items()}
    constants = {"spynet.mean": MEAN, "spynet.std": STD}
    missing = sorted(own.keys() - shapes.keys() - constants.keys())
    unknown = sorted(shapes.keys() - own.keys())
    wrong = sorted(n for n in own.keys() & shapes.keys() if own[n] != shapes[n])
    if module is not None and not (missing or unknown or wrong):
        given = {n: torch.tensor(v).view(1, 3, 1, 1) for n, v in constants.items()} | dict(tensors)
        module.load_state_dict({n: given[n] for n in own}, strict=True, assign=True)
        return module
    name = NETWORKS[kind].__name__
    if found == other and "forward_trunk.main.0.weight" in shapes:
        raise UserError(f"{where} holds {NETWORKS[other].__name__}, not {name}; write {other} in its place")
    if module is None:
        raise UserError(f"{where} is no checkpoint of {name} by BasicSR's names: it holds {_some(unknown)}")
    reasons = [
        f"{verb} {_some(names)}"
        for verb, names in (
            ("lacks", missing),
            ("holds the unknown", unknown),
            ("has another shape of", wrong),
        )
        if names
    ]
    raise UserError(f"{where} does not fit {name} by BasicSR's names: it {', '.join(reasons)}")


def settings_of(kind: str, shapes: Shapes) -> dict[str, Any]:
    """Widths and layers of the network, by the shapes of its tensors; KeyError where one is missing."""
    width = shapes["forward_trunk.main.0.weight"][0]
    if sum("basic_module.0.weight" in name for name in shapes) != LEVELS:
        raise KeyError("spynet.basic_module")
    settings: dict[str, Any] = {
        "width": width,
        "blocks": _count(r"forward_trunk\.main\.2\.(\d+)\.", shapes),
        "detail": shapes["conv_hr.weight"][0],
        "flow_widths": [shapes[f"spynet.basic_module.0.basic_module.{i}.weight"][0] for i in range(0, 8, 2)],
    }
    if kind == "iconvsr":
        settings |= {
            "window": shapes["edvr.fusion.feat_fusion.weight"][1] // width,
            "edvr_blocks": _count(r"edvr\.feature_extraction\.(\d+)\.", shapes),
            "groups": shapes["edvr.pcd_align.cas_dcnpack.conv_offset.weight"][0] // 27,
        }
    return settings


def _count(pattern: str, names: Shapes) -> int:
    return len({m[1] for name in names if (m := re.match(pattern, name))})


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
