"""`python -m data presets`: presets measured against their formulas, and shown on a clip."""

import math
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from data.degradation import blur, compression, noise, pipeline
from data.degradation.presets import PRESETS, preset
from data.degradation.steps import Blur, Codec, Grain, Jpeg, Noise, Resize, Shuffled, Walk
from flashvsr.base.draws import numpy_rng

Line = tuple[str, float, float]  # what, measured, by formula


def listing() -> str:
    """The presets and the order of their steps."""

    def words(steps: tuple) -> str:
        parts = [
            f"{{{words(s.one)} | {words(s.other)}}}" if isinstance(s, Shuffled) else type(s).__name__.lower()
            for s in steps
        ]
        return ", ".join(parts).replace("tolr", "resize to LR")

    return "\n".join(f"{name:20} {words(steps)}" for name, steps in PRESETS.items())


def table(name: str) -> str:
    """Measured and expected statistics of a preset, as text."""
    preset(name)
    lines = [*operators(), *draws(name)]
    head = f"{name:52} {'measured':>10} {'formula':>10}"
    return "\n".join([head, *(f"{what:52} {found:10.4f} {wanted:10.4f}" for what, found, wanted in lines)])


def operators() -> Iterator[Line]:
    """What the operators do to a known picture."""
    yield from kernels()
    flat = torch.full((3, 512, 512), 0.5)
    for sigma in (1.0, 12.0, 30.0):
        out = noise.gaussian(flat, sigma, False, 1) - flat
        yield f"noise: Gaussian, sigma {sigma:g}, in levels", float(out.std() * 255), sigma
    ramp = (torch.arange(256) / 255).expand(3, 2048, 256)
    photon = noise.poisson(ramp, 1.0, False, 2) - ramp
    for level in (16, 128, 255):
        found = float(photon[:, :, level].square().mean().sqrt() * 255)
        yield f"noise: Poisson, scale 1, level {level}, in levels", found, math.sqrt(level * 255 / 256)
    slope = np.polyfit(np.arange(256) / 255, photon.square().mean((0, 1)).numpy(), 1)[0]
    yield "noise: Poisson variance by intensity, x 256", float(slope * 256), 1.0
    yield from jpegs()


def kernels() -> Iterator[Line]:
    """Second moments of kernels and where a sinc stops."""
    sx, sy, turn = 2.0, 0.9, 0.6
    kernel = blur.gaussian_kernels("aniso", 21, [sx], [sy], [turn], [1.0])[0].double()
    axis = torch.arange(21, dtype=torch.float64) - 10
    c, s = math.cos(turn), math.sin(turn)
    yield (
        "blur: aniso, variance along x",
        float((kernel.sum(0) * axis**2).sum()),
        (c * sx) ** 2 + (s * sy) ** 2,
    )
    yield (
        "blur: aniso, variance along y",
        float((kernel.sum(1) * axis**2).sum()),
        (s * sx) ** 2 + (c * sy) ** 2,
    )
    beta, sigma = 2.5, 2.0
    kernel = blur.gaussian_kernels("generalized_iso", 21, [sigma], [sigma], [0.0], [beta])[0].double()
    # E[r^2] of exp(-(r/s)^(2b) / 2) in the plane: s^2 2^(1/b) Gamma(2/b) / Gamma(1/b)
    wanted = sigma**2 * 2 ** (1 / beta) * math.gamma(2 / beta) / math.gamma(1 / beta) / 2
    yield "blur: generalised, beta 2.5, variance along x", float((kernel.sum(0) * axis**2).sum()), wanted
    omega = math.pi / 2
    response = torch.fft.rfft(blur.sinc_kernels(61, [omega])[0].sum(0), 2048).abs()
    half = int((response < 0.5).nonzero()[0]) * 2 * math.pi / 2048
    yield "blur: sinc, cut-off pi/2, where half passes", half, omega


def jpegs() -> Iterator[Line]:
    """The quality that a file's quantisation table says."""
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for quality in (30, 60, 95):
        tables = Image.open(BytesIO(compression.jpeg_bytes(picture, quality))).quantization
        yield f"jpeg: quality {quality}, by its quantisation table", quality_of(tables[0]), quality


def quality_of(table: list[int]) -> int:
    """The quality at which libjpeg makes this luma table (65 entries tell it; the first would be too few)."""
    from PIL import Image

    for quality in range(1, 101):
        file = BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        if list(Image.open(file).quantization[0]) == list(table):
            return quality
    raise ValueError("no libjpeg quality has this table")


def draws(name: str, clips: int = 400, frames: int = 12) -> Iterator[Line]:
    """How often a preset's steps are drawn, and how far their walks go."""
    steps = list(_flat(preset(name)))
    drawn = [
        pipeline.draw(preset(name), frames, 512, 512, 4, numpy_rng("stats", i))["steps"] for i in range(clips)
    ]
    ops = Counter(step["op"] for clip in drawn for step in clip)
    wanted = Counter()
    for step in steps:
        wanted[_op(step)] += _probability(step)
    for op in wanted:
        yield f"draws: {op} per clip", ops[op] / clips, wanted[op]
    for op, key, limit in _walks(steps):
        moves = [
            float(np.abs(np.diff(s[key])).max()) for clip in drawn for s in clip if s["op"] == op and key in s
        ]
        if moves:
            yield f"draws: {op} {key}, largest step (bound)", max(moves), limit
    codecs = Counter(s["codec"] for clip in drawn for s in clip if s["op"] == "codec")
    shares = next((s.names for s in steps if isinstance(s, Codec)), ())
    for codec, share in shares:
        yield f"draws: share of {codec}", codecs[codec] / sum(codecs.values()), share


def _flat(steps: tuple) -> Iterator:
    for step in steps:
        if isinstance(step, Shuffled):
            yield from _flat(step.one + step.other)
        else:
            yield step


def _op(step) -> str:
    return {"ToLR": "to_lr"}.get(type(step).__name__, type(step).__name__.lower())


def _probability(step) -> float:
    return step.probability if "probability" in vars(step) else 1.0


def _walks(steps: list) -> Iterator[tuple[str, str, float]]:
    """(operator, key, largest step of any walk of that key)."""
    limits: dict[tuple[str, str], float] = {}

    def note(op: str, key: str, walk: Walk, more: float = 0.0) -> None:
        limits[op, key] = max(limits.get((op, key), 0.0), walk.step + more)

    for step in steps:
        match step:
            case Blur():
                note("blur", "sigma_x", step.sigma)
                note("blur", "sigma_y", step.sigma)
                note("blur", "rotation", step.rotation)
                note("blur", "omega", step.omega_large)
                if step.beta != "redraw":
                    note("blur", "beta", max(step.beta_gaussian, step.beta_plateau, key=lambda w: w.step))
            case Resize():
                note("resize", "scale", step.scale)
            case Noise():
                note("noise", "strength", max(step.sigma, step.scale, key=lambda w: w.step))
            case Grain():
                note("grain", "strength", step.strength)
                note("grain", "size", step.size)
            case Jpeg():
                note("jpeg", "quality", step.quality, more=1.0)  # rounded to whole numbers
    yield from ((op, key, limit) for (op, key), limit in limits.items())


def sheet(clip: str, out: str, seed: int = 0, frames: int = 9, rows: int = 3) -> str:
    """Degrades the first frames of a clip by every preset, `rows` draws each, into an HTML page."""
    from flashvsr.base.page import Page
    from flashvsr.base.video_io import read_frames

    hr = np.stack([f[: len(f) // 4 * 4, : f.shape[1] // 4 * 4] for f in read_frames(clip, count=frames)])
    middle = len(hr) // 2
    page = Page("Degradation presets")
    page.text(
        f"Frame {middle} of `{Path(clip).name}` after each preset at scale 4: {rows} draws, and the HR frame."
    )
    for name in PRESETS:
        page.heading(name)
        pictures, said = [], []
        for row in range(rows):
            rng = numpy_rng("sheet", seed, row)
            lr, params = pipeline.degrade(hr, 4, name, rng)
            pictures.append((f"draw {row}", lr[middle]))
            said.append(f"draw {row}: {in_words(params, middle)}")
        page.compare([*pictures, ("HR", hr[middle])], caption=" · ".join(said))
    page.save(out)
    return f"{out}: {len(PRESETS)} presets on {Path(clip).name}"


def in_words(params: dict, frame: int) -> str:
    """Drawn parameters at one frame, briefly."""

    def one(step: dict) -> str:
        at = {
            k: f"{v[frame]:.3g}" for k, v in step.items() if isinstance(v, list) and k not in ("of", "size")
        }
        match step["op"]:
            case "blur":
                return f"{step['shape']} blur {at.get('sigma_x', at.get('omega'))}"
            case "resize":
                return f"{step['filter']} x{at['scale']}"
            case "to_lr":
                return f"{step['filter']} to LR"
            case "noise":
                return f"{'gray ' * step['gray']}{step['kind']} {at['strength']}"
            case "grain":
                return f"grain {at['strength']}"
            case "chroma":
                return f"{step['form']} {step['filter']}"
            case "jpeg":
                return f"JPEG {at['quality']}"
            case "codec":
                return f"{step['codec']} {step['bits_per_frame'] / 1000:.3g} kbit"
        return step["op"]

    return ", ".join(map(one, params["steps"]))
