"""What can be told of a clip without a reference: sharpness, blocks, noise, motion, bars, a perceptual hash.

Luma is BT.601, `H W`, 0 … 255: whole frames uint8, crops float32. Sharpness, blocks and noise are measured
on pixels as they are (a picture made smaller looks sharp), on five crops of large ones.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np

from data.shards import Index, Sample
from data.workers import Beat

REBLUR = 5  # pixels of the mean by which sharpness is measured
CROP = 448  # side of the crops: four corners and the centre
TILE = 64  # side of the tiles whose motion is estimated
CLEAR = 12  # standard deviations by which the peak of a shift stands out; unrelated pictures reach 10
MOTION_WIDTH = 256  # width at which motion is estimated
BLACK = 24  # luma up to which a border counts as black


def luma(rgb: np.ndarray) -> np.ndarray:
    """BT.601 luma, uint8 `H W`, of uint8 `H W 3`."""
    from PIL import Image

    return np.asarray(Image.fromarray(rgb).convert("L"))


def crops(picture: np.ndarray, side: int = CROP) -> list[np.ndarray]:
    """Four corners and the centre as float32, or the whole where that is hardly larger. Corners start on
    multiples of 8 counted from the top left, so that a grid of blocks stays in step."""
    height, width = picture.shape[:2]
    if height * width <= 5 * side * side:
        return [picture.astype(np.float32)]
    h, w = min(side, height), min(side, width)
    tops, lefts = ((0, (n - s) // 2 // 8 * 8, (n - s) // 8 * 8) for n, s in ((height, h), (width, w)))
    corners = [*itertools.product(tops[::2], lefts[::2]), (tops[1], lefts[1])]
    return [picture[top : top + h, left : left + w].astype(np.float32) for top, left in corners]


def sharpness(parts: list[np.ndarray]) -> float:
    """1 - the blur effect of Crete et al. 2007: how much a mean of 5 pixels along an axis takes from
    the gradient, the axis on which it takes less (Crete takes 11, which tells less of pictures enlarged 2 or
    4 times). 0 … 1; below 0.2 when soft, 0.3 to 0.6 when sharp. Noise counts as detail."""
    left = []
    for axis in (0, 1):
        before, taken = 0.0, 0.0
        for part in parts:
            sharp = np.abs(_sobel(part, axis))
            lost = np.maximum(sharp - np.abs(_sobel(_mean(part, REBLUR, axis), axis)), 0)
            before += float(sharp[1:-1, 1:-1].sum(dtype=np.float64))
            taken += float(lost[1:-1, 1:-1].sum(dtype=np.float64))
        left.append(taken / before if before else 0.0)
    return min(left)


def _sobel(picture: np.ndarray, axis: int) -> np.ndarray:
    """Derivative along `axis`, smoothed by 1 2 1 across; without the outermost pixels."""
    smooth = _along(picture, 1 - axis, (0.25, 0.5, 0.25))
    ahead, behind = (slice(2, None), slice(None)), (slice(None, -2), slice(None))
    return (smooth[ahead] - smooth[behind] if axis == 0 else smooth[ahead[::-1]] - smooth[behind[::-1]]) / 2


def _along(picture: np.ndarray, axis: int, taps: tuple[float, float, float]) -> np.ndarray:
    lines = picture if axis == 0 else picture.T
    out = taps[0] * lines[:-2] + taps[1] * lines[1:-1] + taps[2] * lines[2:]
    return out if axis == 0 else out.T


def _mean(picture: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Mean of `size` pixels along an axis, mirrored at the borders with the edge repeated."""
    pad = [(0, 0), (0, 0)]
    pad[axis] = (size // 2 + 1, size // 2)
    total = np.pad(picture, pad, mode="symmetric").cumsum(axis, dtype=np.float64)
    lines = total if axis == 0 else total.T
    out = ((lines[size:] - lines[:-size]) / size).astype(np.float32)
    return out if axis == 0 else out.T


def blockiness(parts: list[np.ndarray]) -> float:
    """How much an 8x8 grid stands out (ours): the share of pixels at which the step to the next pixel is at
    least 2 levels larger than both steps beside it, at the best of the 8 positions of a grid minus the median
    of the positions; mean of both directions. 0 without a grid, 1 when nothing but blocks is left."""
    found = []
    for axis in (0, 1):
        hits, pixels = np.zeros(8), np.zeros(8)
        for part in parts:
            step = np.abs(np.diff(part, axis=axis))
            step = step if axis == 0 else step.T
            jump = step[1:-1] >= np.maximum(step[:-2], step[2:]) + 2
            rows = jump.mean(1)
            for phase in range(8):
                own = rows[(phase - 1) % 8 :: 8]
                hits[phase] += own.sum()
                pixels[phase] += len(own)
        share = hits / np.maximum(pixels, 1)
        found.append(float(share.max() - np.median(share)))
    return sum(found) / 2


def noise(parts: list[np.ndarray], block: int = 32) -> float:
    """Standard deviation of the noise, in levels: Immerkaer 1996 in blocks of 32x32, of which the calmest
    fifth decides, so that detail does not count as noise. Blocks that reach black or white are left
    out. 0 when none is left."""
    sigmas = []
    for part in parts:
        rough = _along(_along(part, 0, (1, -2, 1)), 1, (1, -2, 1))
        inner = part[1:-1, 1:-1]
        rows, columns = (n // block * block for n in rough.shape)
        shape = (rows // block, block, columns // block, block)
        tiles = inner[:rows, :columns].reshape(shape)
        flat = np.abs(rough[:rows, :columns]).reshape(shape).mean((1, 3))
        usable = (tiles.min((1, 3)) >= 4) & (tiles.max((1, 3)) <= 251)
        sigmas += (flat[usable] * math.sqrt(math.pi / 2) / 6).tolist()
    return float(np.quantile(sigmas, 0.2)) if sigmas else 0.0


def motion(one: np.ndarray, other: np.ndarray) -> float | None:
    """How far the picture moves from one luma frame to the next, in pixels (ours).

    Both are shrunk to a width of 256; the shift of every 64x64 tile with some contrast is the peak of its
    phase correlation, to a fraction of a pixel; the mean length over the tiles whose peak is clear. None
    where less than half of the tiles with contrast tell.
    """
    height, width = one.shape
    factor = max(1.0, width / MOTION_WIDTH)
    size = (max(1, round(width / factor)), max(1, round(height / factor)))
    a, b = (_shrunk(picture, size) for picture in (one, other))
    tile = min(TILE, *a.shape)
    window = np.hanning(tile + 2)[1:-1]
    window = np.outer(window, window).astype(np.float32)
    lengths, textured = [], 0
    for top in _starts(a.shape[0], tile):
        for left in _starts(a.shape[1], tile):
            p, q = (x[top : top + tile, left : left + tile] for x in (a, b))
            if p.std() < 3:
                continue
            textured += 1
            shift = _shift((p - p.mean()) * window, (q - q.mean()) * window)
            if shift is not None:
                lengths.append(math.hypot(*shift))
    return factor * sum(lengths) / len(lengths) if lengths and 2 * len(lengths) >= textured else None


def _starts(length: int, tile: int) -> list[int]:
    count = max(1, round(length / tile))
    return sorted({round(i * (length - tile) / max(1, count - 1)) for i in range(count)})


def _shrunk(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX), np.float32)


def _shift(p: np.ndarray, q: np.ndarray) -> tuple[float, float] | None:
    """The shift from p to q, None when the peak does not stand out."""
    spectrum = np.conj(np.fft.rfft2(p)) * np.fft.rfft2(q)
    # The finest frequencies hold noise and the codec's doing: weighted down.
    fy, fx = np.fft.fftfreq(p.shape[0])[:, None], np.fft.rfftfreq(p.shape[1])[None]
    weight = np.exp(-(fx**2 + fy**2) * 8)
    surface = np.fft.irfft2(weight * spectrum / (np.abs(spectrum) + 1e-6), p.shape)
    y, x = np.unravel_index(int(surface.argmax()), surface.shape)
    peak = surface[y, x]
    if peak < CLEAR * surface.std():
        return None
    return tuple(_vertex(surface, y, x, axis) for axis in (0, 1))


def _vertex(surface: np.ndarray, y: int, x: int, axis: int) -> float:
    """Where the peak lies along an axis: the vertex of a parabola through the logarithms of three values,
    exact for the Gaussian that the weight makes of it."""
    size = surface.shape[axis]
    at = (y, x)[axis]
    line = surface[:, x] if axis == 0 else surface[y]
    a, b, c = (math.log(max(float(line[(at + d) % size]), 1e-9)) for d in (-1, 0, 1))
    bend = a - 2 * b + c
    exact = at + (0.5 * (a - c) / bend if bend < 0 else 0.0)
    return exact - size if exact > size / 2 else exact


def bars(frames: list[np.ndarray]) -> float:
    """Share of the area taken by black borders that are there in every luma frame: 0 … 1, 0 where all is
    black."""
    lit = np.maximum.reduce(frames) > BLACK
    used = [np.flatnonzero(lit.mean(axis) > 0.02) for axis in (1, 0)]  # a few specks are no picture
    if not all(len(lines) for lines in used):
        return 0.0
    height, width = (int(lines[-1] - lines[0] + 1) for lines in used)
    return 1 - height * width / lit.size


def change(frames: list[np.ndarray]) -> float:
    """The largest mean difference between luma frames that follow each other, in levels; 0 for a still."""
    small = [_shrunk(frame, (64, 36)) for frame in frames]
    return max((float(np.abs(a - b).mean()) for a, b in itertools.pairwise(small)), default=0.0)


def phash(rgb: np.ndarray) -> int:
    """64 bits that hardly change with size, compression or brightness (pHash): signs, against their median,
    of the 8x8 lowest frequencies of the cosine transform of the picture at 32x32."""
    from PIL import Image

    small = Image.fromarray(rgb).convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    n = np.arange(32)
    basis = np.cos(np.pi * (2 * n[None] + 1) * n[:8, None] / 64)
    low = basis @ np.asarray(small, np.float64) @ basis.T
    return int("".join("01"[bit] for bit in (low > np.median(low)).flatten().tolist()), 2)


def segment_scores(sample: Sample, pairs: list[np.ndarray]) -> dict[str, Any]:
    """Scores of a segment from its sampled frames, each uint8 `1 or 2 H W 3`: the frame and the next one."""
    firsts = [luma(pair[0]) for pair in pairs]
    parts = [crops(picture) for picture in firsts]
    moves = [motion(first, luma(pair[1])) for first, pair in zip(firsts, pairs, strict=True) if len(pair) > 1]
    known = [move for move in moves if move is not None]
    still = sample.kind == "image"
    return {
        "sharpness": _rounded(np.mean([sharpness(part) for part in parts])),
        "blockiness": _rounded(np.mean([blockiness(part) for part in parts])),
        "noise": _rounded(np.mean([noise(part) for part in parts])),
        # per cent of the width per second, so that it means the same at every size and rate
        "motion": _rounded(100 * sample.fps * np.mean(known) / sample.width) if known else None,
        "change": None if still else _rounded(change(firsts)),
        "bars": _rounded(bars(firsts)),
        "hashes": [f"{phash(pair[0]):016x}" for pair in pairs],
    }


def _rounded(value: float) -> float:
    return round(float(value), 4)


def score(
    folder: str, sample: dict[str, Any], segments: list[tuple[int, int]], at: int, beat: Beat
) -> list[dict[str, Any]]:
    """Scores of the segments (start, frames) of a clip, `at` frames sampled uniformly from each."""
    from data.reader import Reader

    pairs = {name: tuple(map(tuple, sample[name])) for name in ("members", "keyframes")}
    clip = Sample(**{**sample, **pairs})
    reader = Reader(Index(Path(folder), "", {}, ()))
    results = []
    for start, count in segments:
        frames = []
        for number in sampled(count, at):
            ahead = min(2, count - number)
            frames.append(reader.frames(clip, start - clip.start + number, ahead))
            beat()
        results.append(segment_scores(clip, frames))
    return results


def sampled(count: int, at: int) -> list[int]:
    """Frames in the middle of `at` equal parts of `count` frames, each once."""
    return sorted({int((i + 0.5) * count / at) for i in range(at)})
