"""LPIPS (Zhang et al. 2018) as a metric and as a frozen, differentiable training loss.

The trunk, the layers and the linear heads (v0.1) are those of the package lpips. Its own forward divides by
a norm whose gradient is undefined where all channels are zero, so the comparison is written here. Backbone
weights are only ever found on disk: nothing is downloaded. Without them the trunk is random but fixed by a
seed, and the metric is then called `lpips-random`: good enough to see a road work, not to be published.
"""

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from eval.metrics.frames import Stack, matched_frames
from eval.metrics.scoring import Metric
from flashvsr.base.cli import UserError
from flashvsr.base.operators import declare_torchvision

# The names torchvision gives the ImageNet checkpoints it downloads into torch's hub cache.
_CHECKPOINTS = {"alex": "alexnet-owt-*.pth", "vgg": "vgg16-*.pth", "squeeze": "squeezenet1_1-*.pth"}


class Lpips(nn.Module):
    """Learned perceptual distance; `name` is "lpips" with real backbone weights, else "lpips-random".

    `net` is alex, vgg or squeeze. `weights` is "auto" (torch's hub cache if the torchvision checkpoint is
    there, else random), "random", or the path of a torchvision checkpoint. `description` says in words what
    was used. All parameters are frozen and building draws nothing from the global generator. Raises
    UserError for an unknown net, a missing or unfit file, or when lpips or torchvision is not installed.
    """

    def __init__(self, net: str = "alex", weights: str | Path = "auto", seed: int = 0):
        super().__init__()
        if net not in _CHECKPOINTS:
            raise UserError(f"LPIPS knows the nets {', '.join(_CHECKPOINTS)}, not {net!r}")
        source = _find(net, weights)
        self.model = _build(net)
        if source is None:
            _draw_trunk(self.model.net, seed)
            self.description = f"LPIPS-random ({net}, trunk drawn with seed {seed}, heads v0.1)"
        else:
            _load_trunk(self.model.net, source)
            self.description = f"LPIPS ({net}, trunk {source.name}, heads v0.1)"
        self.name = "lpips-random" if source is None else "lpips"
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each pair, float32 `[N]`; x and y are RGB `N 3 H W` in [-1, 1].

        Differentiable in either argument; under autocast only the trunk runs in low precision. Equals the
        package's value to float32 rounding.
        """
        return self.distance(self.features(x), self.features(y))

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """The trunk's five answers to RGB `N 3 H W` in [-1, 1], each of unit length at every position."""
        answers = self.model.net(self.model.scaling_layer(x.to(next(self.parameters()).dtype)))
        with torch.autocast(x.device.type, enabled=False):
            return tuple(_normalise(answer.float()) for answer in answers)

    def distance(self, features_x: Sequence[Tensor], features_y: Sequence[Tensor]) -> Tensor:
        """Distance between frames by their `features`, float32 `[N]`."""
        heads = [head.model[-1].weight for head in self.model.lins]  # behind a dropout that only fitting uses
        distance = torch.zeros(len(features_x[0]), device=features_x[0].device)
        with torch.autocast(distance.device.type, enabled=False):
            for f, g, head in zip(features_x, features_y, heads, strict=True):
                difference = (f - g).square().mean(dim=(2, 3))
                distance = distance + difference @ head.float().flatten()
        return distance

    @torch.no_grad()
    def per_frame(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> Tensor:
        """Distance of each frame of two `F H W 3` clips as in `matched_frames`, float64 `[F]` on the CPU."""
        device = next(self.parameters()).device
        signed = ((2 * x - 1, 2 * y - 1) for x, y in matched_frames(a, b))
        values = [self(x[None].to(device), y[None].to(device)) for x, y in signed]
        return torch.cat(values).double().cpu()

    def clip(self, a: np.ndarray | Tensor, b: np.ndarray | Tensor) -> float:
        """Mean over frames of `per_frame`."""
        return self.per_frame(a, b).mean().item()

    def of_stack(self, stack: Stack) -> tuple[Tensor, ...]:
        """`features` of a stack of frames, made once."""
        return stack.once(f"features {id(self)}", lambda: self.features(2 * stack.rgb - 1))


def lpips_metric(lpips: Lpips) -> Metric:
    """LPIPS between SR and HR; its key tells real backbone weights from random ones."""
    return Metric(
        key=lpips.name,
        title="LPIPS" if lpips.name == "lpips" else "LPIPS-random",
        higher=False,
        digits=4,
        description=f"{lpips.description}, RGB, mean over frames",
        measure=lambda frames: lpips.distance(lpips.of_stack(frames.sr), lpips.of_stack(frames.hr)).double(),
    )


def _normalise(f: Tensor) -> Tensor:
    # The tiny term sits under the root, so that an all-zero position has gradient zero instead of 0/0.
    return f * torch.rsqrt(f.square().sum(dim=1, keepdim=True) + 1e-20)


def _find(net: str, weights: str | Path) -> Path | None:
    if weights == "random":
        return None
    if weights == "auto":
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        return next(iter(sorted(cache.glob(_CHECKPOINTS[net]))), None)
    if not Path(weights).is_file():
        raise UserError(
            f"LPIPS backbone weights {weights} do not exist; give a torchvision checkpoint, auto or random"
        )
    return Path(weights)


def _build(net: str) -> nn.Module:
    """The package's network with its linear heads; the trunk is still on the meta device, without memory."""
    lpips = import_lpips()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision deprecates the argument that lpips passes
        model = lpips.LPIPS(net=net, pnet_rand=True, pretrained=False, verbose=False)
    model.scaling_layer = lpips.lpips.ScalingLayer()
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / f"{net}.pth", map_location="cpu")
    for i, head in enumerate(model.lins):
        head.load_state_dict({"model.1.weight": heads[f"lin{i}.model.1.weight"]}, assign=True)
    return model


def _draw_trunk(trunk: nn.Module, seed: int) -> None:
    """Normal weights of variance 2 / fan-in (He et al. 2015) and zero biases, in the order of layers."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, p in trunk.state_dict().items():
        if name.endswith("weight"):
            spread = math.sqrt(2 / p[0].numel())
            values[name] = torch.randn(p.shape, generator=generator) * spread
        else:
            values[name] = torch.zeros(p.shape)
    trunk.load_state_dict(values, assign=True)


def _load_trunk(trunk: nn.Module, path: Path) -> None:
    """Read `features.*` of a torchvision checkpoint; lpips keeps the layers' numbers behind slice names."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        values = {name: stored[f"features.{name.partition('.')[2]}"] for name in trunk.state_dict()}
        trunk.load_state_dict({name: value.float() for name, value in values.items()}, assign=True)
    except Exception as error:  # torch raises half a dozen types for a file that is not such a checkpoint
        raise UserError(
            f"{path} is not a torchvision checkpoint of this LPIPS net ({type(error).__name__})"
        ) from error


def import_lpips():
    """Import lpips, also beside a torchvision whose compiled operators do not fit this torch."""
    if find_spec("torchvision") is None or find_spec("lpips") is None:
        raise UserError(
            "LPIPS needs the packages lpips and torchvision: pip install -c constraints.txt '.[metrics]'"
        )
    declare_torchvision()
    import lpips

    return lpips
