"""The second-order video degradation: draw all parameters of a clip, then apply them.

HR → sharpen → blur → resize → noise → JPEG → codec → blur → resize → noise → JPEG → { codec | resize to LR,
sinc } in either order → 8 bit. Kinds are drawn once per clip, continuous parameters walk in small bounded
steps, so the damage is steady in time as in real footage; noise samples and codecs do the rest. Between
operators values are clipped to [0, 1] before they are rounded to 8 bits: nothing can wrap around.
"""

from collections.abc import Iterator

import numpy as np
import torch

from data.degradation import blur, compression, noise, resize
from data.degradation.presets import Preset, Stage, preset
from flashvsr.base.cli import UserError

CHUNK = 1 << 21  # pixels held as float at a time: keeps a long 720p clip in bounded memory


def draw_stage(config: Stage, frames: int, area: int, rng: np.random.Generator) -> dict:
    return {
        "blur": blur.draw(config.blur, frames, rng),
        "resize": resize.draw(config.resize, frames, rng),
        "noise": noise.draw(config.noise, frames, rng),
        "jpeg": compression.draw_jpeg(config.jpeg, frames, rng),
        "codec": compression.draw_codec(config.codec, area, rng),
    }


def draw(config: Preset, frames: int, height: int, width: int, rng: np.random.Generator) -> dict:
    """All parameters of one clip of `frames` HR frames as JSON-able values; one entry per frame where they
    walk."""
    return {
        "first": draw_stage(config.first, frames, height * width, rng),
        "second": draw_stage(config.second, frames, height * width, rng),
        "final": {
            "codec_first": bool(rng.uniform() < 0.5),
            "filter": resize.draw_filter(config.second.resize, rng),
            "sinc": blur.draw(config.final_sinc, frames, rng),
        },
        "noise_seed": int(rng.integers(1 << 62)),
    }


def _chunks(frames: list[np.ndarray]) -> Iterator[slice]:
    step = max(1, CHUNK // (frames[0].shape[0] * frames[0].shape[1]))
    return (slice(i, i + step) for i in range(0, len(frames), step))


def _float(frames: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous().float().div_(255)


def _bytes(frame: torch.Tensor) -> np.ndarray:
    """`C H W` in [0, 1] (clipped here again: this is where 8-bit pipelines wrap) to uint8 `H W C`."""
    return (frame.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


def _stage(frames: list[np.ndarray], params: dict, generator: torch.Generator, sharpen) -> list[np.ndarray]:
    """Blur, resize, noise, JPEG of one stage; frames leave with the sizes their walk gave them."""
    kernels = None if params["blur"] is None else blur.kernels(params["blur"])
    h, w = frames[0].shape[:2]
    out = []
    for part in _chunks(frames):
        x = _float(frames[part])
        if sharpen is not None:
            x = blur.sharpen(x, sharpen)
        if kernels is not None:
            x = blur.apply(x, kernels[part])
        for i, frame in enumerate(x, start=part.start):
            size = resize.even_size(h, w, params["resize"]["scale"][i])
            frame = resize.apply(frame[None], size, params["resize"]["filter"])[0]
            frame = noise.apply(frame, params["noise"], i, generator)
            out.append(compression.jpeg(_bytes(frame), params["jpeg"]["quality"][i]))
    return out


def _to_lr(frames: list[np.ndarray], size: tuple[int, int], params: dict) -> list[np.ndarray]:
    kernels = None if params["sinc"] is None else blur.kernels(params["sinc"])
    out = []
    for part in _chunks(frames):
        x = torch.cat([resize.apply(_float([frame]), size, params["filter"]) for frame in frames[part]])
        if kernels is not None:
            x = blur.apply(x, kernels[part])
        out += [_bytes(frame) for frame in x]
    return out


def apply(frames: np.ndarray, scale: int, config: Preset, params: dict) -> np.ndarray:
    """Applies drawn parameters to uint8 `F H W 3`; returns uint8 `F H/scale W/scale 3`."""
    generator = torch.Generator().manual_seed(params["noise_seed"])
    size = (frames.shape[1] // scale, frames.shape[2] // scale)
    x = _stage(list(frames), params["first"], generator, config.sharpen)
    x = compression.video(x, **params["first"]["codec"])
    x = _stage(x, params["second"], generator, None)
    if params["final"]["codec_first"]:
        x = _to_lr(compression.video(x, **params["second"]["codec"]), size, params["final"])
    else:
        x = compression.video(_to_lr(x, size, params["final"]), **params["second"]["codec"])
    return np.stack(x)


@torch.no_grad()
def degrade(frames, scale: int, name: str, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Low-resolution video from a high-resolution one.

    `frames` uint8 `F H W 3` RGB (numpy or torch), one frame is enough; H and W multiples of `scale`. `name`
    is a preset's, `rng` decides everything that is drawn. Returns (uint8 `F H/scale W/scale 3`, the drawn
    parameters). The same arguments give the same bytes in every process. Raises UserError on an unknown
    preset or a size that `scale` does not divide.
    """
    frames = np.asarray(frames)
    count, height, width, _ = frames.shape
    if height % scale or width % scale:
        raise UserError(f"cannot degrade {width}x{height} by {scale}: crop it to multiples of {scale} first")
    config = preset(name)
    params = draw(config, count, height, width, rng)
    return apply(frames, scale, config, params), params
