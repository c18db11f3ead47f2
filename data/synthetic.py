"""Procedural clips on which super-resolution means something, for when no footage is at hand.

A clip is a camera moving (pan, zoom, turn) over a large sheet of detail, with smaller cut-outs and lines of
text moving over it and over each other. All motion is sub-pixel; sheets are drawn at twice their size and
shrunk, so that edges are sharp but not jagged. Everything follows from the seed.
"""

import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flashvsr.base.cli import Progress
from flashvsr.base.draws import numpy_rng
from flashvsr.base.video_io import VideoWriter

VERSION = 1  # raise it when the pictures change, so that shards made before are made again
SIZES = ((192, 320), (208, 352), (216, 384))
FRAMES = (49, 56)
SHEET = (640, 896)  # what the camera moves over, pixels
WORDS = (
    "the river keeps its own time and every stone remembers light quick brown foxes jump over lazy dogs",
    "while seventeen grey herons wait beside an old brick mill window glass paper copper salt 0123456789",
    "Quartz VEXING Jumble Sphinx of black judge my vow & five dozen liquor jugs; north-west, 48.2% (B/W) +37",
)
WORDS = [word for line in WORDS for word in line.split()]


def _palette(rng: np.random.Generator, count: int) -> np.ndarray:
    """Colours `[count, 3]` with well separated brightness, shuffled."""
    colours = rng.uniform(0, 255, (count, 3)) * 0.4 + np.linspace(5, 250, count)[:, None] * 0.6
    return rng.permutation(colours).astype(np.uint8)


def _ink(rng: np.random.Generator, bright: bool) -> tuple[int, ...]:
    return tuple(int(c) for c in rng.integers(0, 90, 3) + (160 if bright else 0))


def _noise(rng: np.random.Generator, height: int, width: int, octaves: int, decay: float) -> np.ndarray:
    """Fractal noise in [0, 1]: every octave twice as fine and `decay` times as strong."""
    total = np.zeros((height, width), np.float32)
    for octave in range(octaves):
        cells = 3 * 2**octave
        grid = rng.random((cells * height // width + 2, cells + 2), dtype=np.float32)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(layer) * decay**octave
    low, high = total.min(), total.max()
    return (total - low) / (high - low)


def _coloured(value: np.ndarray, palette: np.ndarray) -> Image.Image:
    """Values in [0, 1] run through a palette."""
    stops = np.linspace(0, 1, len(palette))
    channels = [np.interp(value, stops, palette[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def _leaves(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Overlapping discs, boxes and strokes of all sizes: edges and occlusions with the statistics of
    photographs."""
    sheet = Image.new("RGB", (2 * width, 2 * height), _ink(rng, False))
    draw = ImageDraw.Draw(sheet)
    palette = _palette(rng, 24)
    for radius in np.sort(5 / rng.uniform(0.02, 1, 3000))[::-1]:
        x, y = rng.uniform(0, 2 * width), rng.uniform(0, 2 * height)
        colour = tuple(int(c) for c in palette[rng.integers(len(palette))])
        dx, dy = radius * rng.uniform(0.3, 1, 2)
        kind = rng.integers(3)
        if kind == 0:
            draw.ellipse((x - dx, y - dy, x + dx, y + dy), fill=colour)
        elif kind == 1:
            draw.regular_polygon(
                (x, y, radius), int(rng.integers(3, 7)), float(rng.uniform(0, 360)), fill=colour
            )
        else:
            draw.line((x - dx, y - dy, x + dy, y + dx), fill=colour, width=int(rng.integers(2, 8)))
    return sheet.resize((width, height), Image.Resampling.BOX)


def _clouds(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    return _coloured(_noise(rng, height, width, 8, rng.uniform(0.85, 1.0)), _palette(rng, 5))


def _marble(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Fine bands bent by noise: detail whose direction and spacing change everywhere."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    turn = rng.uniform(0, math.pi)
    way = (x * math.cos(turn) + y * math.sin(turn)) / rng.uniform(8, 18)
    bend = _noise(rng, height, width, 6, 0.55) * rng.uniform(10, 30)
    return _coloured(0.5 + 0.5 * np.sin(2 * math.pi * (way * 0.5 + bend * 0.5)), _palette(rng, 4))


def _bricks(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    sheet = Image.new("RGB", (2 * width, 2 * height), _ink(rng, True))
    draw = ImageDraw.Draw(sheet)
    palette = _palette(rng, 12)
    brick, row = int(rng.integers(36, 90)), int(rng.integers(18, 40))
    for j in range(2 * height // row + 1):
        for i in range(-1, 2 * width // brick + 1):
            left = i * brick + (brick // 2) * (j % 2)
            colour = tuple(int(c) for c in palette[rng.integers(len(palette))])
            draw.rectangle((left, j * row, left + brick - 4, j * row + row - 4), fill=colour)
    flat = sheet.resize((width, height), Image.Resampling.BOX)
    grain = _noise(rng, height, width, 8, 0.9)[..., None] * 70 - 35
    return Image.fromarray((np.asarray(flat) + grain).clip(0, 255).astype(np.uint8))


def _page(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Lines of text of several sizes on paper."""
    bright = bool(rng.integers(2))
    sheet = Image.new("RGB", (width, height), _ink(rng, bright))
    draw = ImageDraw.Draw(sheet)
    top = 4
    while top < height:
        size = int(rng.integers(9, 26))
        line = " ".join(rng.choice(WORDS, 40))
        draw.text(
            (rng.uniform(-30, 8), top), line, font=ImageFont.load_default(size), fill=_ink(rng, not bright)
        )
        top += int(size * 1.25)
    return sheet


def _chart(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Test-chart tiles: gratings of several pitches, checkerboards, zone plates."""
    tile = 128
    y, x = np.mgrid[0:tile, 0:tile].astype(np.float32)
    sheet = Image.new("RGB", (width, height))
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            kind, pitch = rng.integers(3), rng.uniform(3, 16)
            if kind == 0:
                turn = rng.uniform(0, math.pi)
                value = 0.5 + 0.5 * np.sin(2 * math.pi * (x * math.cos(turn) + y * math.sin(turn)) / pitch)
            elif kind == 1:
                cell = max(2, int(pitch))
                value = ((x // cell + y // cell) % 2).astype(np.float32)
            else:
                r2 = (x - tile / 2) ** 2 + (y - tile / 2) ** 2
                value = 0.5 + 0.5 * np.cos(math.pi * r2 / (tile * rng.uniform(2.2, 6)))
            sheet.paste(_coloured(value, _palette(rng, 2)), (left, top))
    return sheet


SHEETS = (_leaves, _clouds, _marble, _bricks, _page, _chart)


def _cut_out(rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A textured shape or a line of text: picture and mask of the same size."""
    if rng.uniform() < 0.5:
        text = " ".join(rng.choice(WORDS, int(rng.integers(2, 5))))
        font = ImageFont.load_default(int(rng.integers(14, 34)))
        left, top, right, bottom = font.getbbox(text)
        size = (int(right - left) + 12, int(bottom - top) + 12)
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).text((6 - left, 6 - top), text, font=font, fill=255)
        return Image.new("RGB", size, _ink(rng, bool(rng.integers(2)))), mask
    side = int(rng.integers(50, 110))
    picture = SHEETS[rng.integers(len(SHEETS))](rng, side, side)
    mask = Image.new("L", (2 * side, 2 * side))
    draw = ImageDraw.Draw(mask)
    if rng.integers(2):
        draw.ellipse((8, 8, 2 * side - 8, 2 * side - 8), fill=255)
    else:
        draw.regular_polygon(
            (side, side, side - 8), int(rng.integers(3, 8)), float(rng.uniform(0, 360)), fill=255
        )
    return picture, mask.resize((side, side), Image.Resampling.BOX)


def _affine(size, centre, zoom: float, turn: float) -> tuple[float, ...]:
    """Pillow's coefficients that show, in a picture of `size` (w, h), the source around `centre` (x, y)."""
    c, s = math.cos(turn) / zoom, math.sin(turn) / zoom
    x, y = size[0] / 2, size[1] / 2
    return (c, s, centre[0] - c * x - s * y, -s, c, centre[1] + s * x - c * y)


class _Path:
    """A smooth way from one value to another with a slow sway."""

    def __init__(self, rng: np.random.Generator, start: float, end: float, sway: float) -> None:
        self.start, self.end, self.sway = start, end, sway
        self.phase, self.turns = rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.5)

    def at(self, t: float) -> float:
        sway = math.sin(self.phase + 2 * math.pi * self.turns * t)
        return self.start + (self.end - self.start) * t + self.sway * sway


class _Layer:
    """One cut-out with its motion."""

    def __init__(self, rng: np.random.Generator, height: int, width: int) -> None:
        self.picture, self.mask = _cut_out(rng)
        self.x = _Path(rng, *rng.uniform(0.05, 0.95, 2) * width, 0.06 * width)
        self.y = _Path(rng, *rng.uniform(0.1, 0.9, 2) * height, 0.06 * height)
        self.zoom = _Path(rng, *rng.uniform(0.95, 1.4, 2), 0.05)
        spin = 0.25 if self.picture.width > 1.5 * self.picture.height else 2.0  # text stays readable
        self.turn = _Path(rng, *rng.uniform(-spin, spin, 2), 0.05)

    def paste(self, frame: Image.Image, t: float) -> None:
        zoom, turn, x, y = self.zoom.at(t), self.turn.at(t), self.x.at(t), self.y.at(t)
        (w, h), c, s = self.picture.size, abs(math.cos(turn)), abs(math.sin(turn))
        reach_x, reach_y = zoom * (c * w + s * h) / 2 + 1, zoom * (s * w + c * h) / 2 + 1
        # Only the part of the frame that the cut-out covers, on whole pixels; the rest of the position goes
        # into the source's centre.
        left, top = max(0, math.floor(x - reach_x)), max(0, math.floor(y - reach_y))
        box = (
            min(frame.width, math.ceil(x + reach_x)) - left,
            min(frame.height, math.ceil(y + reach_y)) - top,
        )
        if min(box) <= 0:
            return
        dx, dy = left + box[0] / 2 - x, top + box[1] / 2 - y
        c, s = math.cos(turn) / zoom, math.sin(turn) / zoom
        centre = (w / 2 + c * dx + s * dy, h / 2 - s * dx + c * dy)
        how = (box, Image.Transform.AFFINE, _affine(box, centre, zoom, turn), Image.Resampling.BICUBIC)
        frame.paste(self.picture.transform(*how), (left, top), self.mask.transform(*how))


def clip(seed: int, number: int) -> np.ndarray:
    """Procedural clip `number`: uint8 `F H W 3`, F in 49…56, from 320x192 to 384x216."""
    rng = numpy_rng("synthetic", VERSION, seed, number)
    height, width = SIZES[rng.integers(len(SIZES))]
    frames = int(rng.integers(FRAMES[0], FRAMES[1] + 1))
    # Sheets take turns, so that a few clips already hold one of each.
    sheet = SHEETS[number % len(SHEETS)](rng, *SHEET)
    zoom = _Path(rng, *rng.uniform(1.0, 1.6, 2), 0.04)
    turn = _Path(rng, *rng.uniform(-0.25, 0.25, 2), 0.03)
    middle, room = (SHEET[1] / 2, SHEET[0] / 2), (0.2 * SHEET[1], 0.2 * SHEET[0])
    x = _Path(rng, *(middle[0] + rng.uniform(-1, 1, 2) * room[0]), 6)
    y = _Path(rng, *(middle[1] + rng.uniform(-1, 1, 2) * room[1]), 6)
    layers = [_Layer(rng, height, width) for _ in range(int(rng.integers(2, 5)))]
    out = np.empty((frames, height, width, 3), np.uint8)
    for i in range(frames):
        t = i / (frames - 1)
        view = _affine((width, height), (x.at(t), y.at(t)), zoom.at(t), turn.at(t))
        frame = sheet.transform((width, height), Image.Transform.AFFINE, view, Image.Resampling.BICUBIC)
        for layer in layers:
            layer.paste(frame, t)
        out[i] = np.asarray(frame)
    return out


def write(folder: Path, counts: dict[str, int], seed: int, quiet: bool = False) -> dict[str, list[Path]]:
    """Writes `counts[split]` clips per split as mp4 under `folder`, those that are not there yet; returns
    their paths by split."""
    paths: dict[str, list[Path]] = {split: [] for split in counts}
    number = 0
    with Progress(sum(counts.values()), "drawing clips", unit="clip", quiet=quiet) as progress:
        for split, count in counts.items():
            for i in range(count):
                path = folder / f"{split}-{i:03d}.mp4"
                if not path.exists():
                    frames = clip(seed, number)
                    with VideoWriter(path, 24, frames.shape[1], frames.shape[2], crf=12) as writer:
                        writer.write(frames)
                paths[split].append(path)
                number += 1
                progress.update()
    return paths
