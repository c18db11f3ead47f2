"""`python -m data build`: videos, images and folders of frames become shards and an index."""

import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from data import synthetic
from data.shards import INDEX, Index, Sample, read_index, write_index, write_split
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.files import atomic_dir
from flashvsr.base.video_io import is_image, list_clips, probe, read_frames

HOLD_OUT = 8  # without --val, every eighth clip is held out
OURS = re.compile(r"(train|val)-\d{6}\.tar|index\.json")

Item = tuple[Sample, list[Path]]  # a clip and the files that become its members


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    val: Sequence[str | Path] = (),
    synthetic_clips: int = 12,
    seed: int = 0,
    quiet: bool = False,
) -> Index:
    """Writes `out/train-*.tar`, `out/val-*.tar` and `out/index.json`, all or nothing.

    `sources`, `val`: videos, images, or folders of them. Without `val` every eighth clip is held out. Without
    sources, makes `synthetic_clips` procedural clips to train on and a quarter as many to hold out from
    `seed`. What cannot be read and what is there twice is left out and listed in the index. If `out` already
    holds the result of the same call on the same files, nothing is done. Raises UserError when nothing usable
    is found or `out` holds anything that is not ours.
    """
    out = Path(out)
    if sources:
        splits = {"train": _find(sources), "val": _find(val)}
        files = [[split, str(path), *_stamps(path)] for split, paths in splits.items() for path in paths]
        request = _fingerprint("files", files)
    else:
        request = _fingerprint("synthetic", synthetic.VERSION, synthetic_clips, seed)
    _refuse_foreign(out)
    if (existing := _up_to_date(out, request)) is not None:
        return existing
    if sources:
        return _write(splits, out, request, quiet)
    with tempfile.TemporaryDirectory() as folder:
        counts = {"train": synthetic_clips, "val": max(1, synthetic_clips // 4)}
        return _write(synthetic.write(Path(folder), counts, seed, quiet), out, request, quiet)


def _find(sources: Sequence[str | Path]) -> list[Path]:
    clips = []
    for source in sources:
        found = list_clips(source)
        if not found:
            raise UserError(
                f"no video or image in '{source}': give a folder with videos, images or folders of frames"
            )
        clips += found
    return clips


def _stamps(path: Path) -> list[int]:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [n for f in files for n in (f.stat().st_size, f.stat().st_mtime_ns)]


def _fingerprint(*what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _refuse_foreign(out: Path) -> None:
    foreign = [p.name for p in out.iterdir() if not OURS.fullmatch(p.name)] if out.is_dir() else []
    if foreign:
        raise UserError(
            f"'{out}' holds '{foreign[0]}', which a build would delete: give another folder as --out"
        )


def _up_to_date(out: Path, request: str) -> Index | None:
    if not (out / INDEX).exists():
        return None
    try:
        index = read_index(out)
    except UserError:
        return None  # half gone or of another format: written anew
    samples = [s for rows in index.splits.values() for s in rows]
    whole = all((out / s.shard).stat().st_size >= s.offset + s.size for s in samples)
    return index if whole and index.request == request else None


def _write(splits: dict[str, list[Path]], out: Path, request: str, quiet: bool) -> Index:
    usable, skipped = _usable(splits, quiet)
    if not splits["val"]:
        usable["train"], usable["val"] = _hold_out(usable["train"])
    for split, items in usable.items():
        if not items:
            given = splits[split] or splits["train"]
            why = "; ".join(f"'{name}' {reason}" for name, reason in skipped[:3])
            raise UserError(f"none of the {len(given)} clips given for {split} can be used: {why}")
    with (
        atomic_dir(out, replace=True) as folder,
        Progress(sum(map(len, usable.values())), "writing shards", unit="clip", quiet=quiet) as progress,
    ):
        rows = {split: write_split(folder, split, _ticking(usable[split], progress)) for split in splits}
        write_index(Index(folder, request, rows, tuple(skipped)))
    return read_index(out)


def _usable(
    splits: dict[str, list[Path]], quiet: bool
) -> tuple[dict[str, list[Item]], list[tuple[str, str]]]:
    """Readable clips by split, each content once (held out if it is given for both), and (name, reason) of
    the rest."""
    usable: dict[str, list[Item]] = {"val": [], "train": []}
    skipped, seen, keys = [], {}, set()
    with Progress(sum(map(len, splits.values())), "reading clips", unit="clip", quiet=quiet) as progress:
        for split, items in usable.items():
            for path in splits[split]:
                try:
                    sample, files = inspect(path)
                    if sample.sha256 in seen:
                        raise UserError(f"has the same bytes as '{seen[sample.sha256]}'")
                except (UserError, OSError) as error:
                    skipped.append((path.name, str(error)))
                else:
                    seen[sample.sha256] = path.name
                    items.append((replace(sample, key=_unique(sample.key, keys)), files))
                progress.update()
    return usable, skipped


def inspect(path: Path) -> Item:
    """What the index needs to know of a clip; decodes its first frame and counts the rest without decoding.

    Raises UserError when it cannot be read.
    """
    info = probe(path)
    first = next(read_frames(path, count=1), None)
    if first is None:
        raise UserError("holds no frame that can be decoded")
    height, width = first.shape[:2]
    kind = "frames" if path.is_dir() else "image" if is_image(path) else "video"
    files, frames = [path], 1
    if kind == "frames":
        names = (p for p in path.iterdir() if is_image(p) and not p.name.startswith("."))
        files = sorted(names, key=lambda p: (len(p.name), p.name))
        frames = len(files)
    elif kind == "video":
        frames = _count_frames(path)
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
    name = path.name if kind == "frames" else path.stem
    key = re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "clip"  # webdataset ends a key at the first dot
    return Sample(
        key, "", 0, 0, kind, frames, round(float(info.fps), 6), height, width, digest.hexdigest(), path.name
    ), files  # fmt: skip


def _count_frames(path: Path) -> int:
    import av

    with av.open(str(path)) as container:
        stream = next(s for s in container.streams.video if not s.disposition & s.disposition.attached_pic)
        return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _unique(key: str, keys: set[str]) -> str:
    free, number = key, 1
    while free in keys:
        number += 1
        free = f"{key}-{number}"
    keys.add(free)
    return free


def _hold_out(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Every eighth clip, at least one, in the order of a hash of the names: the same whatever the folder's
    order."""
    if len(items) == 1:
        raise UserError(
            f"only '{items[0][0].source}' can be used and one must be held out: give two or more, or --val"
        )
    order = sorted(items, key=lambda item: hashlib.sha256(item[0].key.encode()).digest())
    held = {item[0].key for item in order[::HOLD_OUT]}
    return [i for i in items if i[0].key not in held], [i for i in items if i[0].key in held]


def _ticking(items: list[Item], progress: Progress) -> Iterator[Item]:
    for item in items:
        yield item
        progress.update()


def summary(index: Index) -> str:
    """What a build made, for the end of the command."""
    lines = [f"skipped {name}: {reason}" for name, reason in index.skipped]
    for split, samples in index.splits.items():
        moving = [s for s in samples if s.kind != "image"]
        lines.append(
            f"{split}: {len(moving)} clips, {len(samples) - len(moving)} images, "
            f"{sum(s.frames for s in moving)} frames, {sum(s.size for s in samples) / 1e6:.1f} MB"
        )
    if index.skipped:
        lines.append(f"{len(index.skipped)} skipped")
    lines.append(f"data: {index.folder}")
    return "\n".join(lines)
