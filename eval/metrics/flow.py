"""Optical flow for the warping error: a classical one that needs nothing, or RAFT where its weights are.

A flow field is float32 `n 2 H W`, in pixels, x before y: the pixel at p in one frame is at p + flow(p) in the
other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.metrics.frames import studio_luma
from flashvsr.base.cli import UserError
from flashvsr.base.operators import declare_torchvision

_COARSEST = 24  # pixels of the shorter side at the top of the pyramid
_ROUNDS = 4  # refinements at each level
_WINDOW = 2.5  # sigma of the window in which the motion is taken as one, in pixels of each level
_SMOOTH = 1.5  # sigma of the blur of the field after each refinement
_RIDGE = 1e-4  # keeps the coarser level's motion where a window has no texture; squared gradients of [0, 1]


@dataclass(frozen=True)
class Flow:
    """An optical flow: `between` takes two stacks of RGB `n 3 H W` in [0, 1] to the field from the first."""

    name: str
    description: str
    between: Callable[[Tensor, Tensor], Tensor]


def warp(x: Tensor, flow: Tensor) -> Tensor:
    """`x`, `n C H W`, looked up bilinearly at p + flow(p); beyond the border its edge is repeated."""
    height, width = x.shape[2:]
    place = torch.stack(
        [(2 * (flow[:, i] + p) + 1) / size - 1 for i, p, size in _places(height, width, x)], 3
    )
    return F.grid_sample(x, place, mode="bilinear", padding_mode="border", align_corners=False)


def _places(height: int, width: int, like: Tensor) -> list[tuple[int, Tensor, int]]:
    columns = torch.arange(width, device=like.device, dtype=like.dtype)
    rows = torch.arange(height, device=like.device, dtype=like.dtype)[:, None]
    return [(0, columns, width), (1, rows, height)]


def lucas_kanade(first: Tensor, second: Tensor) -> Tensor:
    """Dense pyramidal Lucas-Kanade (Lucas, Kanade 1981; Bouguet 2001) on luma, the finest level at half size.

    At each level, coarse to fine, the second frame is warped by the flow so far and the rest of the motion
    solved by least squares in a Gaussian window and the field blurred a little, several times.
    """
    size = first.shape[2:]
    pyramid = [[_half(studio_luma(x)) for x in (first, second)]]
    while min(pyramid[-1][0].shape[2:]) >= 2 * _COARSEST:
        pyramid.append([_half(x) for x in pyramid[-1]])
    flow = first.new_zeros(len(first), 2, *pyramid[-1][0].shape[2:])
    for a, b in reversed(pyramid):
        flow = _resized(flow, a.shape[2:])
        for _ in range(_ROUNDS):
            flow = _blur(flow + _residual(a, warp(b, flow)), _SMOOTH)
    return _resized(flow, size)


def _half(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


def _resized(flow: Tensor, size: torch.Size) -> Tensor:
    if flow.shape[2:] == size:
        return flow
    scale = flow.new_tensor([size[1] / flow.shape[3], size[0] / flow.shape[2]])
    return F.interpolate(flow, size=tuple(size), mode="bilinear") * scale[:, None, None]


def _residual(a: Tensor, b: Tensor) -> Tensor:
    """The motion left between `a` and `b`, `n 1 H W`: least squares in each window, `n 2 H W`."""
    middle = F.pad((a + b) / 2, (1, 1, 1, 1), mode="replicate")
    dx = (middle[..., 1:-1, 2:] - middle[..., 1:-1, :-2]) / 2
    dy = (middle[..., 2:, 1:-1] - middle[..., :-2, 1:-1]) / 2
    dt = b - a
    xx, xy, yy, xt, yt = _blur(torch.cat([dx * dx, dx * dy, dy * dy, dx * dt, dy * dt], 1), _WINDOW).unbind(1)
    xx, yy = xx + _RIDGE, yy + _RIDGE
    step = torch.stack([xy * yt - yy * xt, xy * xt - xx * yt], 1) / (xx * yy - xy * xy)[:, None]
    return step.clamp(-1, 1)  # the linear model holds within a pixel


def _blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian over `n C H W`, borders repeated."""
    reach = round(3 * sigma)
    taps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    taps = torch.exp(-(taps**2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(x.shape[1], 1, -1)
    x = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    x = F.conv2d(x, taps[:, :, None], groups=x.shape[1])
    return F.conv2d(x, taps[..., None], groups=x.shape[1])


LUCAS_KANADE = Flow(
    "lk",
    "pyramidal Lucas-Kanade v1 on Y, finest level at half size",
    lucas_kanade,
)


def raft(device: str | torch.device = "cpu") -> Flow:
    """torchvision's raft_large (Teed, Deng 2020), its weights looked up in torch's hub cache on disk.

    Raises UserError when torchvision or the weights are missing, and at use for frames under 128 pixels.
    """
    if find_spec("torchvision") is None:
        raise UserError("RAFT needs the package torchvision: pip install -c constraints.txt '.[metrics]'")
    declare_torchvision()
    from torchvision.models.optical_flow import raft_large

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    file = next(iter(sorted(cache.glob("raft_large_*.pth"))), None)
    if file is None:
        raise UserError(
            f"RAFT's weights are not in {cache}: put torchvision's raft_large_C_T_SKHT_V2-ff5fadd5.pth there "
            "or take the flow lk"
        )
    model = raft_large(weights=None, progress=False)
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # torch raises half a dozen types for a file that is not such a checkpoint
        raise UserError(f"{file} is not a checkpoint of raft_large ({type(error).__name__})") from error
    model.requires_grad_(False).eval().to(device)

    def between(first: Tensor, second: Tensor) -> Tensor:
        height, width = first.shape[2:]
        if min(height, width) < 128:
            raise UserError(f"RAFT needs frames of at least 128x128 pixels, these are {width}x{height}")
        pad = (0, -width % 8, 0, -height % 8)
        pair = [F.pad(2 * x - 1, pad, mode="replicate") for x in (first, second)]
        return model(*pair)[-1][..., :height, :width]

    return Flow("raft", f"RAFT (torchvision raft_large, {file.name})", between)
