"""A degradation: draw every parameter of a clip, then send its frames through one operator after the other.

What is drawn is a list of steps that says all there is to say: `stream` needs neither the preset nor a random
generator, so a stored list gives the same bytes again. Kinds are drawn once per clip, continuous parameters
walk in small bounded steps, so the damage is steady in time as in real footage; noise samples and codecs do
the rest. Operators are generators of frames: a clip of any length needs the memory of the few dozen frames
that encoders look ahead.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from data.degradation import blur, camera, compression, noise, resize
from data.degradation.frames import Frame, bytes_of
from data.degradation.presets import preset
from data.degradation.steps import (
    Blur,
    Chroma,
    Codec,
    Grain,
    Jpeg,
    Noise,
    Preset,
    Resize,
    Sharpen,
    Shuffled,
    ToLR,
)
from flashvsr.base.cli import UserError

FORMAT = 2  # of the drawn parameters


def draw(config: Preset, frames: int, height: int, width: int, scale: int, rng: np.random.Generator) -> dict:
    """All parameters of one clip of `frames` HR frames as JSON-able values, one entry per frame where they
    walk. Raises UserError when `scale` does not divide the size."""
    if frames < 1:
        raise UserError("cannot degrade a clip without frames")
    if height % scale or width % scale:
        raise UserError(f"cannot degrade {width}x{height} by {scale}: crop it to multiples of {scale} first")
    drawing = _Drawing(frames, (height, width), scale, rng)
    drawing.steps(config)
    steps, size = [], (height, width)
    for step in drawing.drawn:
        if step["op"] == "codec":
            step = compression.fitted(step, *size)
        steps.append(step)
        size = size_after(step, size)
    return {"format": FORMAT, "noise_seed": int(rng.integers(1 << 62)), "steps": steps}


def size_after(step: dict, size: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) of a clip's first frame after a drawn step that met it at `size`."""
    if step["op"] == "resize":
        return resize.even_size(*step["of"], step["scale"][0])
    return tuple(step["size"]) if step["op"] == "to_lr" else size


class _Drawing:
    """Draws step after step and keeps track of the size that a clip's first frame has by then."""

    def __init__(self, frames: int, size: tuple[int, int], scale: int, rng: np.random.Generator) -> None:
        self.frames, self.size, self.rng = frames, size, rng
        self.area = size[0] * size[1]
        self.lr = (size[0] // scale, size[1] // scale)
        self.drawn: list[dict] = []

    def steps(self, steps: tuple) -> None:
        for step in steps:
            if isinstance(step, Shuffled):
                self._shuffled(step)
            else:
                self._add(step)

    def _add(self, step) -> None:
        name, params = self._draw(step)
        if params is None:
            return
        self.drawn.append({"op": name, **params})
        self.size = size_after(self.drawn[-1], self.size)

    def _draw(self, step) -> tuple[str, dict | None]:
        frames, rng = self.frames, self.rng
        match step:
            case Sharpen():
                return "sharpen", blur.draw_sharpen(step)
            case Blur():
                return "blur", blur.draw(step, frames, rng)
            case Resize():
                return "resize", resize.draw(step, frames, self.lr if step.of == "lr" else self.size, rng)
            case ToLR():
                kind = resize.draw_filter(step.filters, rng)
                return "to_lr", {"filter": kind, "size": list(self.lr), "clip": step.clip}
            case Noise():
                return "noise", noise.draw(step, frames, rng)
            case Grain():
                return "grain", camera.draw_grain(step, frames, rng)
            case Chroma():
                return "chroma", camera.draw_chroma(step, rng)
            case Jpeg():
                return "jpeg", compression.draw_jpeg(step, frames, rng)
            case Codec():
                return "codec", compression.draw_codec(step, self.area, rng)
        raise TypeError(f"{step!r} is no step of a degradation")

    def _shuffled(self, group: Shuffled) -> None:
        """Draws `one`, the order, `other`."""
        kept, self.drawn = self.drawn, []
        self.steps(group.one)
        one, self.drawn = self.drawn, []
        one_first = self.rng.uniform() < 0.5
        self.steps(group.other)
        self.drawn = kept + (one + self.drawn if one_first else self.drawn + one)


OPERATORS = {
    "sharpen": blur.sharpen,
    "blur": blur.apply,
    "resize": resize.apply,
    "to_lr": resize.to_size,
    "chroma": camera.apply_chroma,
    "jpeg": compression.apply_jpeg,
    "codec": compression.video,
}
NOISY = {"noise": noise.apply, "grain": camera.apply_grain}  # these also take a seed


def stream(frames: Iterable[np.ndarray], params: dict) -> Iterator[np.ndarray]:
    """Degrades uint8 RGB frames `H W 3` one by one with parameters of `draw`; yields uint8 LR frames.

    As many come out as go in, up to the count of frames the parameters were drawn for.
    """
    check(params)
    flow: Iterator[Frame] = iter(frames)
    for number, step in enumerate(params["steps"]):
        flow = operate(flow, step, number, params["noise_seed"])
    while True:
        with torch.no_grad(), one_thread():
            frame = next(flow, None)
            if frame is None:
                return
            frame = np.ascontiguousarray(bytes_of(frame))
        yield frame


def operate(frames: Iterator[Frame], step: dict, number: int, seed: int) -> Iterator[Frame]:
    """Frames through one drawn step, the `number`-th of its clip."""
    if step["op"] in NOISY:
        return NOISY[step["op"]](frames, step, seed, number)
    return OPERATORS[step["op"]](frames, step)


def check(params: dict) -> None:
    """Raises UserError unless `params` are drawn parameters of this version."""
    if not isinstance(params, dict) or params.get("format") != FORMAT or "noise_seed" not in params:
        raise UserError(f"these are not degradation parameters of format {FORMAT}: draw them again")
    for step in params.get("steps", ()):
        if step.get("op") not in OPERATORS | NOISY:
            raise UserError(f"unknown degradation step {step.get('op')!r}: draw the parameters again")


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrix products on one thread: sums are then added in the same order whatever OMP_NUM_THREADS is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def apply(frames: np.ndarray, params: dict) -> np.ndarray:
    """Applies drawn parameters to uint8 `F H W 3`; returns uint8 `F h w 3`."""
    return np.stack(list(stream(frames, params)))


def degrade(frames, scale: int, name: str, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """Low-resolution video from a high-resolution one.

    `frames` uint8 `F H W 3` RGB (numpy or torch), one frame is enough; H and W multiples of `scale`. `name`
    is a preset's, `rng` decides everything that is drawn. Returns (uint8 `F H/scale W/scale 3`, the drawn
    parameters). The same arguments give the same bytes in every process. Raises UserError on an unknown
    preset or a size that `scale` does not divide.
    """
    frames = np.asarray(frames)
    count, height, width, _ = frames.shape
    params = draw(preset(name), count, height, width, scale, rng)
    return apply(frames, params), params
