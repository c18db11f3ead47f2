"""`python -m data bench`: frames per second per core of decoding and of every part of a degradation.

The plain per-frame OpenCV/NumPy form (data/degradation/plain.py) runs in turns with ours, with the same drawn
parameters. A row is a plain dict, so that other parts can add theirs.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import torch

from data.degradation import pipeline, plain
from data.degradation.presets import preset
from flashvsr.base.cli import UserError
from flashvsr.base.draws import numpy_rng
from flashvsr.base.files import write_json
from flashvsr.base.measure import interleaved, machine, time_median
from flashvsr.base.video_io import VideoWriter, read_frames

Row = dict  # name, frames_per_second; where there is one: plain_frames_per_second, samples_per_second


def run(clip: str | None, size: str, frames: int, draws: int, name: str, json: str | None) -> str:
    """Measures, writes `json` if asked, returns the table."""

    height, _, width = size.partition("x")
    if not (height.isdigit() and width.isdigit()) or int(height) % 4 or int(width) % 4:
        raise UserError(f"--size {size!r} must be HEIGHTxWIDTH, multiples of 4, for example 256x256")
    if frames < 1 or draws < 1:
        raise UserError(f"--frames {frames} and --draws {draws} must be at least 1")
    preset(name)
    pictures = footage(clip, frames, int(height), int(width))
    with pipeline.one_thread():
        rows = [decode_row(pictures), *degrade_rows(pictures, draws, name)]
    if json is not None:
        facts = {"machine": machine(), "clip": clip, "size": size, "frames": len(pictures)}
        write_json(json, facts | {"preset": name, "draws": draws, "rows": rows})
    return table(rows, "frames/s on one core", 22)


def footage(clip: str | None, frames: int, height: int, width: int) -> np.ndarray:
    """The middle of the first frames of a clip (or of a procedural one), uint8 `F H W 3`."""
    if clip is None:
        from data.synthetic import clip as synthetic

        found = list(synthetic(0, 0)[:frames])
    else:
        found = list(read_frames(clip, count=frames))
    high, wide = found[0].shape[:2]
    if high < height or wide < width:
        name = clip or "the procedural clip"
        raise UserError(
            f"{name} is {wide}x{high}, smaller than --size {height}x{width}: name a larger --clip"
        )
    top, left = (high - height) // 2, (wide - width) // 2
    return np.stack([f[top : top + height, left : left + width] for f in found])


def decode_row(pictures: np.ndarray) -> Row:
    """Reading an H.264 file of these pictures."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        with VideoWriter(path, 25, *pictures.shape[1:3]) as writer:
            writer.write(pictures)
        seconds = time_median(lambda: sum(1 for _ in read_frames(path)), repeats=3)
    return {"name": "decode H.264", "frames_per_second": len(pictures) / seconds}


def degrade_rows(pictures: np.ndarray, draws: int, name: str) -> list[Row]:
    """Every operator, ours and plain, over `draws` clips; then sums with and without codecs."""
    ours, other = Counter(), Counter()
    for seed in range(draws):
        rng = numpy_rng("bench", seed)
        count, height, width, _ = pictures.shape
        params = pipeline.draw(preset(name), count, height, width, 4, rng)
        x, y = list(pictures), plain.start(pictures)
        for number, step in enumerate(params["steps"]):
            seconds, x, y = _timed(step, number, params["noise_seed"], x, y)
            op = step["op"]
            ours[op] += seconds["ours"]
            other[op] += seconds.get("plain", np.nan)
    frames = draws * len(pictures)
    rows = [_row(op, frames, ours[op], other[op]) for op in ours]
    rest = [{op: s for op, s in side.items() if op != "codec"} for side in (ours, other)]
    rows.append(_row("all but codec", frames, *(sum(side.values()) for side in rest)))
    rows.append(_row(f"whole {name}", frames, sum(ours.values()), sum(other.values())))
    return rows


@torch.no_grad()
def _timed(step: dict, number: int, seed: int, x: list, y: list) -> tuple[dict, list, list]:
    """Seconds of one step in both forms, and what they leave. Each form goes on from its own frames."""
    results = {}

    def run_ours() -> None:
        results["x"] = list(pipeline.operate(iter(x), step, number, seed))

    def run_plain() -> None:
        results["y"] = plain.OPERATORS[step["op"]](y, step)

    fns = {"ours": run_ours}
    if step["op"] in plain.OPERATORS:
        fns["plain"] = run_plain
    seconds = interleaved(fns, repeats=2, warmup=0)
    return seconds, results["x"], results.get("y", y)


def _row(name: str, frames: int, ours: float, other: float) -> Row:
    row = {"name": name, "frames_per_second": frames / ours}
    return row if np.isnan(other) else row | {"plain_frames_per_second": frames / other}


def table(rows: list[Row], title: str, width: int) -> str:
    """The rows as text, names in a column of `width`."""
    lines = [f"{title:{width}} {'ours':>9} {'plain':>9} {'ratio':>6}"]
    for row in rows:
        line = f"{row['name']:{width}} {row['frames_per_second']:9.1f}"
        if "plain_frames_per_second" in row:
            slow = row["plain_frames_per_second"]
            line += f" {slow:9.1f} {row['frames_per_second'] / slow:6.2f}"
        if "samples_per_second" in row:
            line += f"  ({row['samples_per_second']:.2f} samples/s)"
        lines.append(line)
    return "\n".join(lines)
