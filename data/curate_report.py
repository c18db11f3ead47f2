"""The page `data curate` writes: what each filter took away, with pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data.curate import BUILT_IN, Limit, Segment
from data.inspect import UNITS, facts, picture, spread
from data.reader import Reader
from data.shards import Index
from flashvsr.base.cli import Progress
from flashvsr.base.page import Page


def report(
    out: Path,
    index: Index,
    chosen: Index,
    found: Sequence[Segment],
    removed: Mapping[str, Sequence[Segment]],
    twins: Mapping[str, Segment],
    limits: Sequence[Limit],
    pictures: int,
    quiet: bool,
) -> None:
    """Writes the page; of every reason at most `pictures` segments are shown, the closest calls."""
    page = Page(f"Curation of {index.folder.resolve().name}")
    gone = {id(s) for rows in removed.values() for s in rows}
    kept = [s for s in found if id(s) not in gone]
    page.text(
        "Segments of eight seconds, scored on four frames. A segment goes by the first filter that it fails, "
        "in the order of the table; neighbours that stay are one clip again. No shard is copied."
    )
    rows = [_row("all", found)] + [_row(reason, rows) for reason, rows in removed.items()]
    rows.append(_row("kept", kept))
    page.table(
        rows,
        [("what", "segments", None), ("count", "number", ","), ("seconds", "seconds", ",.0f"),
         ("images", "images", ",")],
    )  # fmt: skip
    counts = {split: len(clips) for split, clips in chosen.splits.items()}
    page.text("Clips now: " + ", ".join(f"{split} {n:,}" for split, n in counts.items()) + ".")
    bounds = {limit.name: limit.bound for limit in limits}
    names = [*BUILT_IN, *(name for name in bounds if name not in BUILT_IN)]
    values = {name: [s.scores[name] for s in found if s.scores.get(name) is not None] for name in names}
    page.heading("Scores and limits")
    page.text("Of all segments; a red line is a limit in use. What is measured: `data/scores.py`.")
    page.histograms([(UNITS.get(n, n), values[n], bounds.get(n)) for n in names if values[n]])
    reader = Reader(index)
    shown = {**removed, "kept": kept}
    total = sum(min(len(rows), pictures) for reason, rows in shown.items() if reason != "unreadable")
    with Progress(total, "pictures", unit="segment", quiet=quiet) as progress:
        for reason, rows in shown.items():
            if not rows:
                continue
            page.heading(f"{reason}: {len(rows):,}")
            if reason == "unreadable":
                failures = [{"name": s.name, "why": s.scores["failed"]} for s in rows[:200]]
                page.table(failures, [("name", "segment", None), ("why", "why", None)])
                continue
            chosen_rows = _near(rows, reason, limits, pictures)
            page.gallery([_picture(reader, s, twins.get(s.name), progress) for s in chosen_rows])
    page.save(out)


def _row(what: str, rows: Sequence[Segment]) -> dict:
    seconds = sum(s.frames / s.clip.fps for s in rows if s.clip.kind != "image")
    images = sum(s.clip.kind == "image" for s in rows)
    return {"what": what, "count": len(rows), "seconds": seconds, "images": images}


def _near(rows: Sequence[Segment], reason: str, limits: Sequence[Limit], most: int) -> list[Segment]:
    """The closest calls of a limit, where it would have to be moved first; a spread where there is none."""
    limit = next((x for x in limits if str(x) == reason), None)
    if limit is None:
        return spread(rows, most)
    return sorted(rows, key=lambda s: abs(s.scores[limit.name] - limit.bound))[:most]


def _picture(
    reader: Reader, segment: Segment, twin: Segment | None, progress: Progress
) -> tuple[str, np.ndarray]:
    clip, start = segment.clip, segment.start - segment.clip.start
    shown = picture(reader, clip, sorted({start, start + segment.frames - 1}))
    values = [f"{n} {segment.scores[n]:.3g}" for n in BUILT_IN if segment.scores.get(n) is not None]
    others = [
        f"{n} {v:.3g}"
        for n, v in segment.scores.items()
        if isinstance(v, float) and n not in BUILT_IN and n != "seconds"
    ]
    lines = [segment.name, facts(clip), ", ".join(values + others)]
    if twin is not None:
        lines.append(f"like {twin.name} ({twin.split})")
        height = shown.shape[0]
        beside = picture(reader, twin.clip, [twin.start - twin.clip.start])
        shown = np.concatenate([shown[: height // 2], _fitted(beside, shown.shape[1])])
    progress.update()
    return "\n".join(lines), shown


def _fitted(picture_: np.ndarray, width: int) -> np.ndarray:
    """A picture cut or padded to a width."""
    cut = picture_[:, :width]
    return np.pad(cut, ((0, 0), (0, width - cut.shape[1]), (0, 0)))
