"""`python -m data inspect`: a corpus on one page, with pictures and distributions."""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.curate import BUILT_IN, SCORES, key_of, segments
from data.journal import Journal
from data.reader import Reader
from data.shards import Index, Sample
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.page import Page

WIDTH = 230  # of a small picture, pixels
UNITS = {"motion": "motion, % of the width per second", "change": "change, levels", "noise": "noise, levels"}


def picture(reader: Reader, clip: Sample, numbers: Sequence[int]) -> np.ndarray:
    """Frames of a clip, by number from its start, small and one above the other: uint8 `H W 3`."""
    height = max(1, round(clip.height * WIDTH / clip.width))
    if height > 2 * WIDTH:
        size = (2 * WIDTH, max(1, round(clip.width * 2 * WIDTH / clip.height)))
    else:
        size = (height, WIDTH)
    return np.concatenate([reader.frames(clip, number, 1, size)[0] for number in numbers])


def spread(items: Sequence, most: int) -> list:
    """At most `most` of the items, evenly from beginning to end."""
    return [items[i * len(items) // most] for i in range(most)] if len(items) > most else list(items)


def facts(clip: Sample) -> str:
    """A line about a clip."""
    if clip.kind == "image":
        return f"{clip.width}×{clip.height}"
    length = f"{clip.frames} frames, {clip.frames / clip.fps:.1f} s"
    return f"{clip.width}×{clip.height} · {clip.fps:.5g} fps · {length}"


def distributions(clips: Sequence[Sample]) -> list[tuple[str, list[float], None]]:
    """Panels for `Page.histograms` about what the index knows."""
    moving = [clip for clip in clips if clip.kind != "image"]
    panels = [
        ("width, pixels", [float(c.width) for c in clips], None),
        ("height, pixels", [float(c.height) for c in clips], None),
    ]
    if moving:
        bits = {(c.shard, c.offset): c for c in moving}.values()
        panels += [
            ("frames", [float(c.frames) for c in moving], None),
            ("seconds", [c.frames / c.fps for c in moving], None),
            ("frames per second", [c.fps for c in moving], None),
            ("megabytes per source", [c.size / 1e6 for c in bits], None),
        ]
    return panels


def known_scores(index: Index) -> dict[str, list[float]]:
    """What `data curate` found for the clips of the index, by name of the score; empty when it never ran."""
    if not (index.folder / SCORES).exists():
        return {}
    with Journal(index.folder / SCORES) as journal:
        table = journal.known
    clips = [clip for rows in index.splits.values() for clip in rows if key_of(clip) in table]
    part = Index(index.folder, index.request, {"": tuple(clips)}, ())
    rows = [s.scores for s in segments(part, {c.content: table[key_of(c)] for c in clips}, ())]
    return {name: [r[name] for r in rows if r.get(name) is not None] for name in BUILT_IN if rows}


def inspect(index: Index, out: Path, most: int, quiet: bool) -> None:
    """Writes the contact sheet of a corpus, with pictures of at most `most` clips of each split."""
    if most < 1:
        raise UserError(f"--clips {most} must be at least 1")
    clips = [clip for rows in index.splits.values() for clip in rows]
    page = Page(f"Corpus {index.folder.resolve().name}")
    page.table(
        [_totals(split, rows) for split, rows in index.splits.items()],
        [("split", "split", None), ("clips", "clips", ","), ("images", "images", ","),
         ("sources", "sources", ","), ("frames", "frames", ","), ("hours", "hours", ".2f"),
         ("gigabytes", "GB", ".3f"), ("shards", "shards", ",")],
    )  # fmt: skip
    page.heading("Distributions")
    page.histograms(distributions(clips))
    if scores := known_scores(index):
        page.heading("Scores")
        page.text(
            "Of segments of eight seconds, four frames each, by `python -m data curate`. What they measure: "
            "`data/scores.py`."
        )
        page.histograms([(UNITS.get(name, name), values, None) for name, values in scores.items() if values])
    reader = Reader(index)
    for split, rows in index.splits.items():
        shown = spread(rows, most)
        page.heading(f"{split}: {len(shown)} of {len(rows)} clips")
        page.text("First, middle and last frame.")
        pictures = []
        with Progress(len(shown), f"pictures of {split}", unit="clip", quiet=quiet) as progress:
            for clip in shown:
                numbers = sorted({0, clip.frames // 2, clip.frames - 1})
                pictures.append((f"{clip.key}\n{facts(clip)}", picture(reader, clip, numbers)))
                progress.update()
        page.gallery(pictures)
    if index.skipped:
        page.heading("Left out")
        rows = [{"name": name, "reason": reason} for name, reason in index.skipped[:1000]]
        page.table(rows, [("name", "source", None), ("reason", "why", None)])
    page.save(out)


def _totals(split: str, clips: Sequence[Sample]) -> dict:
    moving = [c for c in clips if c.kind != "image"]
    members = {(c.shard, c.offset): c.size for c in clips}
    kinds = collections.Counter(c.kind for c in clips)
    return {
        "split": split,
        "clips": len(moving),
        "images": kinds["image"],
        "sources": len({c.source for c in clips}),
        "frames": sum(c.frames for c in moving),
        "hours": sum(c.frames / c.fps for c in moving) / 3600,
        "gigabytes": sum(members.values()) / 1e9,
        "shards": len({c.shard for c in clips}),
    }
