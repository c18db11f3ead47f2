"""Excerpts of real clips through `upscale`: what must be the same afterwards, and pictures side by side.

    python -m tests.contract CLIP... --model DIR --out page.html [--frames 13] [options of upscale]

Every clip's first frames are upscaled by the command into a file of the same type. Checked against the
source: number of frames, time stamps, frame rate, size, sound packet by packet, colour tags. The page has the
table and, of the first, middle and last frame, the bicubic enlargement beside the result. Exit code 1 when
something differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from flashvsr.__main__ import main as command
from flashvsr.base.cli import Progress, run
from flashvsr.base.page import Page, embed
from flashvsr.base.video_io import probe, read_frames

BT709 = (1, 1, 1, 1)  # what an open tag is written as: matrix, range, primaries, transfer


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m tests.contract", description=__doc__.partition("\n")[0])
    p.add_argument("clips", nargs="+", metavar="CLIP")
    p.add_argument("--model", required=True, metavar="DIR")
    p.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page")
    p.add_argument("--frames", type=int, default=13, help="of each clip (%(default)s)")
    p.add_argument("--scale", type=int, default=4, help="%(default)s")
    return p


def main(argv: list[str]) -> int:
    """Upscales, compares, writes the page."""
    given, more = parser().parse_known_args(argv)
    page, rows, pictures = Page("Real clips, upscaled"), [], []
    with tempfile.TemporaryDirectory() as folder, Progress(len(given.clips), "upscale", "clip") as progress:
        for source in given.clips:
            out = Path(folder) / Path(source).name
            options = ["--model", given.model, "--scale", str(given.scale), "--end", f"{given.frames}f"]
            command(["upscale", source, str(out), "--quiet", *options, *more])
            rows.append(compared(source, out, given.frames, given.scale))
            pictures.append((Path(source).name, side_by_side(source, out, given.frames)))
            progress.update()
    page.text(f"First {given.frames} frames of each clip, model `{given.model}`, scale {given.scale}, "
              f"options `{' '.join(more) or 'none'}`.")  # fmt: skip
    page.table(rows, [(key, key, None) for key in rows[0]])
    for name, choices in pictures:
        page.heading(name)
        page.viewer(choices)
    page.save(given.out)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    return int(any(row["differs"] != "nothing" for row in rows))


def compared(source: str, out: Path, frames: int, scale: int) -> dict[str, Any]:
    """A row of the table; `differs` names what is not as it must be."""
    before, after = facts(source, frames), facts(out, None)
    begin = before["times"][0]
    end = before["times"][-1] + before["length"]
    sound = [data for at, data in before["sound"] if begin <= at < end]
    expected = {
        "frames": len(before["times"]),
        "times": [t - begin for t in before["times"]],
        "size": tuple(scale * side for side in before["size"]),
        "fps": before["fps"],
        "sound": sound,
        "tags": tuple(t if known else d for t, known, d in zip(*tags_of(before), BT709, strict=True)),
    }
    found = {
        "frames": len(after["times"]),
        "times": after["times"],
        "size": after["size"],
        "fps": after["fps"],
        "sound": [data for _, data in after["sound"]],
        "tags": after["tags"],
    }
    wrong = [name for name in expected if found[name] != expected[name]]
    for name in wrong:
        print(f"{source}: {name}: {expected[name]!s:.200} became {found[name]!s:.200}", file=sys.stderr)
    width, height = before["size"][::-1]
    return {
        "clip": Path(source).name,
        "size": f"{width}x{height} -> {after['size'][1]}x{after['size'][0]}",
        "frames": found["frames"],
        "fps": f"{float(found['fps']):.5g}",
        "sound packets": len(found["sound"]) if before["sound"] else "no sound",
        "tags": " ".join(map(str, found["tags"])),
        "differs": ", ".join(wrong) or "nothing",
    }


def facts(path: str | Path, frames: int | None) -> dict[str, Any]:
    """What is compared, of the first `frames`: their times in seconds, and all packets of the first sound."""
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        first, times, length = None, [], Fraction(0)
        for frame in islice(file.decode(video), frames):
            first = first or frame
            times.append(frame.pts * video.time_base)
            length = (frame.duration or 0) * video.time_base
        tags = first.colorspace, first.color_range, first.color_primaries, first.color_trc
        size = first.height, first.width
        length = length or 1 / video.average_rate
    sound = []
    if probe(path).has_audio:
        with av.open(str(path)) as file:
            track = file.streams.audio[0]
            sound = [(p.pts * p.time_base, bytes(p)) for p in file.demux(track) if p.size]
    fps = len(times) / (times[-1] + length - times[0])
    return {"times": times, "length": length, "tags": tags, "fps": fps, "size": size, "sound": sound}


def tags_of(before: dict[str, Any]) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The source's tags, and which of them say something: 0 of the range and 2 of the others do not."""
    return before["tags"], tuple(t != silent for t, silent in zip(before["tags"], (2, 0, 2, 2), strict=True))


def side_by_side(source: str, out: Path, frames: int) -> list[tuple[str, dict[str, Any]]]:
    """For the page's viewer: first, middle and last frame of both."""
    before, after = (list(islice(read_frames(path), frames)) for path in (source, out))
    choices = []
    for i in dict.fromkeys((0, len(after) // 2, len(after) - 1)):
        height, width = after[i].shape[:2]
        larger = np.asarray(Image.fromarray(before[i]).resize((width, height), Image.Resampling.BICUBIC))
        choices.append((f"frame {i}", {"bicubic": embed(larger, 85), "upscaled": embed(after[i], 85)}))
    return choices


if __name__ == "__main__":
    run(main)
