"""What cameras and players add and the published pipelines lack: film grain, coarse colour. Laws are ours."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from data.degradation import blur, resize
from data.degradation.frames import Frame, planes
from data.degradation.noise import GRAY, normal
from data.degradation.steps import Chroma, Grain, choose

# BT.601, full range: RGB to luma and the two colour differences, and back.
TO_YCC = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
TO_RGB = torch.tensor([[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]])
STRIDES = {"4:2:0": (2, 2), "4:2:2": (1, 2), "4:1:1": (1, 4)}  # rows, columns per colour sample


def draw_grain(config: Grain, frames: int, rng: np.random.Generator) -> dict | None:
    if rng.uniform() >= config.probability:
        return None
    return {
        "strength": config.strength.draw(frames, rng).tolist(),
        "size": config.size.draw(frames, rng).tolist(),
        "color": bool(rng.uniform() < config.color),
    }


def grain(frame: torch.Tensor, strength: float, size: float, color: bool, *seed: int) -> torch.Tensor:
    """`frame` `C H W` in [0, 1] plus grain of standard deviation `strength` (8-bit levels) at mid-gray.

    Normal noise is blurred with a Gaussian of sigma `size` pixels, brought back to unit variance and scaled
    with 2 sqrt(y (1 - y)) of the luma y: none in black and white, as developed film has it.
    """
    shape = tuple(frame.shape) if color else (1, *frame.shape[1:])
    taps = blur.gaussian_kernels("iso", 9, [size], [size], [0.0], [1.0])[0].sum(0)
    field = blur.convolve_separable(normal(shape, *seed), taps) / taps.square().sum()
    luma = sum(w * plane for w, plane in zip(GRAY, frame, strict=True)).clamp(0, 1)
    envelope = (luma * (1 - luma)).sqrt_().mul_(2 * strength / 255)
    return frame + field * envelope


def apply_grain(frames: Iterable[Frame], params: dict, seed: int, number: int) -> Iterator[torch.Tensor]:
    """Adds the grain of step `number` of a clip whose samples follow from `seed`."""
    walks = zip(frames, params["strength"], params["size"], strict=False)
    for i, (frame, strength, size) in enumerate(walks):
        yield grain(planes(frame), strength, size, params["color"], seed, number, i).clamp_(0, 1)


def draw_chroma(config: Chroma, rng: np.random.Generator) -> dict | None:
    if rng.uniform() >= config.probability:
        return None
    return {"form": choose(config.forms, rng), "filter": resize.draw_filter(config.filters, rng)}


def chroma(frame: torch.Tensor, form: str, kind: str) -> torch.Tensor:
    """`frame` `3 H W` with its colour differences averaged over cells of `form` and put back by repeating
    ("nearest") or bilinearly; luma stays."""
    y, *differences = torch.tensordot(TO_YCC, frame, dims=1)
    high, wide = STRIDES[form]
    height, width = frame.shape[1:]
    # A picture that the cells do not divide is extended by its border.
    cells = F.pad(torch.stack(differences)[None], (0, -width % wide, 0, -height % high), mode="replicate")
    small = F.avg_pool2d(cells, (high, wide))[0]
    if kind == "nearest":
        back = small.repeat_interleave(high, 1).repeat_interleave(wide, 2)
    else:
        back = resize.resized(small, tuple(cells.shape[2:]), "bilinear")
    return torch.tensordot(TO_RGB, torch.cat([y[None], back[:, :height, :width]]), dims=1)


def apply_chroma(frames: Iterable[Frame], params: dict) -> Iterator[torch.Tensor]:
    """Coarsens the colour of every frame."""
    for frame in frames:
        yield chroma(planes(frame), params["form"], params["filter"]).clamp_(0, 1)
