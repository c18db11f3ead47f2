"""`python -m data curate`: which parts of a corpus are worth training on.

After the paper's VSR-120K: clips are divided into segments of eight seconds, four frames of each are scored,
segments that fail are dropped, and neighbours that pass become one clip again. Scores are computed once, into
`scores.jsonl` beside the index; thresholds are applied to what it holds, so that another choice costs
seconds. The result is an index of the same shards. Duplicates are found last, among what passed.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import workers
from data.journal import Journal
from data.shards import Index, Sample, read_index, write_index
from flashvsr.base.cli import Progress, UserError

SECONDS = 8.0  # of a segment (paper, appendix A)
FRAMES = 4  # scored per segment (paper, appendix A)
VERSION = 1  # raise it when a score changes its meaning: then all are computed again
SCORES = "scores.jsonl"
BUILT_IN = ("sharpness", "blockiness", "noise", "motion", "change", "bars")


@dataclass(frozen=True)
class Segment:
    """A part of a clip, its scores, and why it is left out."""

    clip: Sample
    split: str
    start: int  # in the member
    frames: int
    scores: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.clip.key.partition('@')[0]}@{self.start}+{self.frames}"


@dataclass(frozen=True)
class Limit:
    """A value that a segment must not fall below or exceed. A segment without the value passes."""

    name: str
    bound: float
    least: bool  # whether the bound is the least allowed value; else the largest

    def fails(self, value: float | None) -> bool:
        return value is not None and (value < self.bound if self.least else value > self.bound)

    def __str__(self) -> str:
        return f"{self.name} {'below' if self.least else 'above'} {self.bound:g}"


def divide(clip: Sample) -> list[tuple[int, int]]:
    """Segments (start in the member, frames) of a clip: eight seconds each, a rest of less than half of that
    belongs to the last one."""
    most = max(1, round(SECONDS * clip.fps))
    count = 1 if clip.kind == "image" else max(1, round(clip.frames / most))
    marks = [min(i * most, clip.frames) for i in range(count)] + [clip.frames]
    return [(clip.start + a, b - a) for a, b in zip(marks, marks[1:], strict=False)]


def score_all(index: Index, how_many: int | None, silence: float, quiet: bool) -> dict[str, list[dict]]:
    """Scores of the segments of every clip, by `Sample.content`; computed where `scores.jsonl` lacks them.

    A clip that cannot be scored has no entry. Killed, the same call goes on.
    """
    clips = {key_of(clip): clip for rows in index.splits.values() for clip in rows}
    with Journal(index.folder / SCORES) as journal:
        todo = [name for name in clips if name not in journal.known]
        with Progress(len(clips), "scoring", unit="clip", quiet=quiet) as progress:
            progress.update(len(clips) - len(todo))
            jobs = ((name, _job(index, clips[name])) for name in todo)
            with workers.Pool(min(workers.count(how_many), max(1, len(todo))), silence) as pool:
                for name, answer in pool.run(jobs):
                    rows = _rows(clips[name], answer["result"]) if "result" in answer else []
                    journal.add(name, rows if rows else {"failed": answer["failed"]})
                    progress.update()
        return {clips[name].content: journal.known[name] for name in clips}


def key_of(clip: Sample) -> str:
    """What `scores.jsonl` calls a clip: by its pixels, so that a rebuilt corpus keeps its scores."""
    return f"v{VERSION}:{clip.content}"


def _job(index: Index, clip: Sample) -> dict[str, Any]:
    sample = dataclasses.asdict(clip)
    return {
        "do": "score",
        "folder": str(index.folder),
        "sample": sample,
        "segments": divide(clip),
        "at": FRAMES,
    }


def _rows(clip: Sample, scores: list[dict]) -> list[dict]:
    names = [{"segment": f"{clip.key.partition('@')[0]}@{start}+{n}"} for start, n in divide(clip)]
    return [{**name, **row} for name, row in zip(names, scores, strict=True)]


def join(path: Path, known: set[str]) -> dict[str, dict[str, float]]:
    """Scores computed elsewhere, by clip or segment name: JSON lines `{"id": NAME, "musiq": 61.2, …}`.

    `known` are the names there are. Raises UserError for a file without a usable line.
    """
    joined: dict[str, dict[str, float]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError):
        raise UserError(f"{path} is not a file of JSON lines; check --scores") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = {k: float(v) for k, v in row.items() if k != "id"}
            joined.setdefault(row["id"], {}).update(values)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(
                f'line {number} of {path} is not like {{"id": "CLIP", "musiq": 61.2}}: {line[:60]}'
            ) from None
    if not joined.keys() & known:
        raise UserError(
            f"no id in {path} is a clip or segment of this corpus, such as '{min(known, default='')}'"
        )
    return joined


def segments(index: Index, scores: Mapping[str, Any], joined: Sequence[Mapping]) -> list[Segment]:
    """All segments with their scores, those computed elsewhere included; facts count as scores too:
    `short_side` and `seconds` (of the clip)."""
    found = []
    for split, clips in index.splits.items():
        for clip in clips:
            rows = scores[clip.content]
            for number, (start, frames) in enumerate(divide(clip)):
                values: dict[str, Any] = {"short_side": min(clip.height, clip.width)}
                if clip.kind != "image":
                    values["seconds"] = clip.frames / clip.fps
                if isinstance(rows, list):
                    values |= rows[number]
                else:
                    values["failed"] = rows["failed"]
                segment = Segment(clip, split, start, frames, values)
                for table in joined:
                    values |= {**table.get(clip.key, {}), **table.get(segment.name, {})}
                found.append(segment)
    return found


def choose(
    found: Sequence[Segment], limits: Sequence[Limit], duplicate_bits: int
) -> tuple[list[Segment], dict[str, list[Segment]], dict[str, Segment]]:
    """(kept, left out by reason, of what a duplicate is one): every segment fails by its first reason, in the
    order of `limits`; duplicates come last. `duplicate_bits` < 0 keeps them."""
    kept: list[Segment] = []
    removed: dict[str, list[Segment]] = {"unreadable": [], **{str(limit): [] for limit in limits}}
    for segment in found:
        if "failed" in segment.scores:
            removed["unreadable"].append(segment)
            continue
        first = next((x for x in limits if x.fails(segment.scores.get(x.name))), None)
        (kept if first is None else removed[str(first)]).append(segment)
    if duplicate_bits < 0:
        return kept, removed, {}
    kept, removed["duplicate"], twins = unique(kept, duplicate_bits)
    return kept, removed, twins


def unique(found: Sequence[Segment], bits: int) -> tuple[list[Segment], list[Segment], dict[str, Segment]]:
    """(kept, duplicates, what each is a duplicate of): a segment goes when one kept before it has hashes
    that differ in at most `bits` of 64 bits on average over the frames, frame by frame; held-out segments
    come first, so that none of them is trained on.

    Two that differ in n bits in all agree in one of n + 1 disjoint parts: those only are compared.
    """
    order = sorted(found, key=lambda s: s.split == "train")
    buckets: dict[tuple[int, int, int, int], list[tuple[Segment, int]]] = {}
    kept, gone, twins = [], [], {}
    for segment in order:
        hashes = segment.scores["hashes"]
        length = 64 * len(hashes)
        whole = int("".join(hashes), 16)
        most = bits * len(hashes)
        parts = _parts(whole, length, most + 1)
        # Images are compared with images, clips with clips of as many frames scored.
        places = [(length, segment.clip.kind == "image", i, part) for i, part in enumerate(parts)]
        near = (
            other
            for place in places
            for other, bits_of in buckets.get(place, ())
            if (whole ^ bits_of).bit_count() <= most and not _one_source(segment.clip, other.clip)
        )
        twin = next(near, None)
        if twin is not None:
            gone.append(segment)
            twins[segment.name] = twin
            continue
        kept.append(segment)
        for place in places:
            buckets.setdefault(place, []).append((segment, whole))
    positions = {id(s): i for i, s in enumerate(found)}
    return sorted(kept, key=lambda s: positions[id(s)]), gone, twins


def _one_source(a: Sample, b: Sample) -> bool:
    # A camera that stands still makes later segments like earlier ones: no duplicates.
    return (a.shard, a.offset) == (b.shard, b.offset)


def _parts(value: int, length: int, count: int) -> list[int]:
    edges = [length * i // count for i in range(count + 1)]
    return [(value >> a) & ((1 << (b - a)) - 1) for a, b in zip(edges, edges[1:], strict=False)]


def merged(kept: Sequence[Segment]) -> dict[str, tuple[Sample, ...]]:
    """Kept segments as clips by split; neighbours in one clip become one."""
    splits: dict[str, list[Sample]] = {}
    last: Segment | None = None
    for segment in kept:
        clips = splits.setdefault(segment.split, [])
        follows = last is not None and last.clip is segment.clip and last.start + last.frames == segment.start
        if follows:
            clips[-1] = dataclasses.replace(clips[-1], frames=clips[-1].frames + segment.frames)
        else:
            clips.append(dataclasses.replace(segment.clip, start=segment.start, frames=segment.frames))
        last = segment
    return {split: tuple(map(_named, clips)) for split, clips in splits.items()}


def _named(clip: Sample) -> Sample:
    member, at, start = clip.key.partition("@")
    begun = int(start) if at else 0
    return clip if clip.start == begun else dataclasses.replace(clip, key=f"{member}@{clip.start}")


def curate(
    path: Path,
    out: Path,
    limits: Sequence[Limit],
    tables: Sequence[Path],
    duplicate_bits: int,
    how_many: int | None = None,
    silence: float = 60.0,
    quiet: bool = False,
) -> tuple[Index, Index, list[Segment], dict[str, list[Segment]], dict[str, Segment]]:
    """Scores the corpus at `path` and writes the index of what passes to `out`.

    Returns (all, chosen, segments, left out by reason, of what duplicates are). Raises UserError for a limit
    on a score that no segment has, and when nothing is left of a split.
    """
    index = read_index(path)
    scores = score_all(index, how_many, silence, quiet)
    bare = segments(index, scores, ())
    names = {name for s in bare for name in (s.name, s.clip.key)}
    found = segments(index, scores, [join(table, names) for table in tables])
    have = {name for s in found for name, value in s.scores.items() if isinstance(value, (int, float))}
    for limit in limits:
        if limit.name not in have:
            names = ", ".join(sorted(have))
            raise UserError(f"no clip has a score '{limit.name}': there are {names}; --scores adds others")
    kept, removed, twins = choose(found, limits, duplicate_bits)
    splits = merged(kept)
    for split, clips in index.splits.items():
        if clips and not splits.get(split):
            most = max(removed, key=lambda reason: sum(s.split == split for s in removed[reason]))
            raise UserError(f"nothing is left of {split}, most went by '{most}': choose a looser limit")
    chosen = Index(index.folder, f"{index.request}:curated", splits, index.skipped)
    write_index(chosen, out)
    return index, chosen, found, removed, twins
