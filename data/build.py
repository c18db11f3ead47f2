"""`python -m data build`: videos, images and folders of frames become shards and an index.

Three steps, each of which survives being killed: every source is looked at by a worker process (results in a
journal), shards are written one after another, and all is moved into place. Until then everything lies in
`OUT/.building`; the same command goes on there.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data import sources as finding
from data import workers
from data.journal import Journal
from data.scan import Options
from data.shards import INDEX, Index, Member, Sample, divide, placed, read_index, write_index, write_shard
from flashvsr.base.cli import Progress, UserError

HOLD_OUT = 8  # without --val, every eighth source is held out
WORK = ".building"
# What a build or a curation leaves in its folder; anything else there is not ours to replace.
OURS = re.compile(
    r"(train|val)-\d{6}\.tar|(index|curated)\.json|scores\.jsonl|(inspect|curated)\.html|\.index\.jsonl|\.building"
)


@dataclass(frozen=True)
class How:
    """How a build is carried out; none of it but `options` and `shard_mb` changes the result."""

    options: Options = Options()
    shard_mb: int = 1024  # a shard is closed once it is this large
    workers: int | None = None  # default: one per core
    silence: float = 60.0  # seconds without a frame after which a file is given up
    quiet: bool = False


@dataclass(frozen=True)
class Item:
    """A usable source and what becomes of it."""

    key: str
    source: str
    members: tuple[Member, ...]


def build(
    sources: Sequence[str | Path],
    out: str | Path,
    val: Sequence[str | Path] = (),
    synthetic_clips: int = 12,
    seed: int = 0,
    quiet: bool = False,
    how: How | None = None,
) -> Index:
    """Writes `out/train-*.tar`, `out/val-*.tar` and `out/index.json`.

    `sources`, `val`: see `data.sources.find`. Without `val` every eighth source is held out. Without sources,
    makes `synthetic_clips` procedural clips to train on and a quarter as many to hold out from `seed`. What
    cannot be used and what is there twice is left out and listed in the index. If `out` already holds the
    result of the same call on the same files, nothing is done; if a call was killed, the same call goes on
    and ends with the same bytes. Raises UserError when nothing usable is found, the disk is full, or `out`
    holds anything that is not ours; an older build in `out` stays until the new one is complete.
    """
    out, how = Path(out), how or How(quiet=quiet)
    skipped: list[tuple[str, str]] = []
    splits: dict[str, list[Path]] = {}
    if sources:
        for split, given in (("train", sources), ("val", val)):
            splits[split], unreadable = finding.find(given)
            skipped += unreadable
        files = [[split, str(path), *_stamps(path)] for split, paths in splits.items() for path in paths]
        request = _fingerprint("files", files, asdict(how.options), how.shard_mb)
    else:
        from data import synthetic  # its draws bring torch

        what = (synthetic.VERSION, synthetic_clips, seed, asdict(how.options), how.shard_mb)
        request = _fingerprint("synthetic", *what)
    if (existing := _up_to_date(out, request)) is not None:
        return existing
    _refuse_foreign(out)
    with _work_folder(out, request) as work:
        if not sources:
            counts = {"train": synthetic_clips, "val": max(1, synthetic_clips // 4)}
            splits = synthetic.write(work / "synthetic", counts, seed, how.quiet)
        if not (work / INDEX).exists():
            _make(splits, work, request, skipped, how)
        _install(work, out)
    return read_index(out)


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


@contextmanager
def _work_folder(out: Path, request: str) -> Iterator[Path]:
    """`out/.building`, as a killed build of the same request left it, or empty. One build at a time.

    It stays when the build is interrupted or the disk is full; when the build cannot succeed it goes, and
    `out` too if this call made it.
    """
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    try:
        with open(work / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise _Busy(f"another build is writing '{out}': wait for it, or end it first") from None
            kept = work / "request"
            if not kept.exists() or kept.read_text() != request:
                for old in work.iterdir():
                    if old.name != "lock":
                        shutil.rmtree(old) if old.is_dir() else old.unlink()
                kept.write_text(request)
            yield work
    except _Busy:
        raise
    except OSError as error:
        if workers.full_disk(error):
            raise UserError(_no_room(out)) from error
        raise
    except UserError as error:
        if workers.full_disk(error):
            raise UserError(_no_room(out)) from error
        shutil.rmtree(work)
        if not any(out.iterdir()):
            out.rmdir()
        raise


class _Busy(UserError):
    """The work folder is another process's."""


def _no_room(out: Path) -> str:
    return f"no space left on the disk of '{out}': make room and run the same command again, it goes on"


def _make(
    splits: dict[str, list[Path]],
    work: Path,
    request: str,
    skipped: list[tuple[str, str]],
    how: How,
) -> None:
    """Shards and index, in the work folder."""
    scanned = _scan([p for paths in splits.values() for p in paths], work, how)
    usable = _usable(splits, scanned, skipped)
    if not splits["val"]:
        usable["train"], usable["val"] = _hold_out(usable["train"])
    for split, items in usable.items():
        if not items:
            given = splits[split] or splits["train"]
            why = "; ".join(f"'{name}' {reason}" for name, reason in skipped[:3])
            raise UserError(f"none of the {len(given)} clips given for {split} can be used: {why}")
    rows = {split: _write(split, usable[split], work, how.shard_mb << 20, how.quiet) for split in splits}
    write_index(Index(work, request, rows, tuple(skipped)))


def _scan(paths: list[Path], work: Path, how: How) -> dict[Path, dict[str, Any]]:
    """The worker's answer for every source: {"result": …} or {"failed": reason}."""
    pieces = work / "pieces"
    pieces.mkdir(exist_ok=True)
    unique = list(dict.fromkeys(paths))
    stems = {path: f"{number:08d}" for number, path in enumerate(unique)}
    megabytes = {path: max(1, sum(_stamps(path)[::2]) >> 20) for path in unique}
    with Journal(work / "scan.jsonl") as journal:
        known = {path: journal.known[str(path)] for path in unique if str(path) in journal.known}
        total = sum(megabytes.values())
        with Progress(total, "reading clips", unit="MB", quiet=how.quiet) as progress:
            progress.update(sum(megabytes[path] for path in known), clips=len(known))
            asked = {"do": "scan", "folder": str(pieces), "options": asdict(how.options)}
            todo = [path for path in unique if path not in known]
            jobs = ((str(path), {**asked, "path": str(path), "stem": stems[path]}) for path in todo)
            pool = workers.Pool(min(workers.count(how.workers), max(1, len(todo))), how.silence)
            with pool:
                for name, answer in pool.run(jobs):
                    journal.add(name, answer)
                    known[Path(name)] = answer
                    progress.update(megabytes[Path(name)], clips=len(known))
    return known


def _usable(
    splits: dict[str, list[Path]], scanned: dict[Path, dict[str, Any]], skipped: list[tuple[str, str]]
) -> dict[str, list[Item]]:
    """Usable sources by split, each content once (held out if it is given for both); the rest is added to
    `skipped`."""
    usable: dict[str, list[Item]] = {"val": [], "train": []}
    seen: dict[str, str] = {}
    keys: set[str] = set()
    for split, items in usable.items():
        for path in splits[split]:
            answer = scanned[path]
            if "failed" in answer:
                skipped.append((path.name, answer["failed"]))
                continue
            result = answer["result"]
            if result["sha256"] in seen:
                skipped.append((path.name, f"has the same bytes as '{seen[result['sha256']]}'"))
                continue
            seen[result["sha256"]] = path.name
            items.append(_item(path, result, keys))
    return usable


def _item(path: Path, result: dict[str, Any], keys: set[str]) -> Item:
    name = path.name if result["members"][0]["kind"] == "frames" else path.stem
    # webdataset ends a key at the first dot
    key = _unique(re.sub(r"[^A-Za-z0-9_-]+", "_", name) or "clip", keys)
    several = len(result["members"]) > 1
    members = []
    for number, fields in enumerate(result["members"]):
        own = _unique(f"{key}-{number:04d}", keys) if several else key
        tuples = {name: tuple(map(tuple, fields[name])) for name in ("clips", "keyframes")}
        files = tuple(Path(file) for file in fields["files"])
        members.append(Member(**{**fields, **tuples, "files": files, "key": own, "source": path.name}))
    return Item(key, path.name, tuple(members))


def _unique(key: str, keys: set[str]) -> str:
    free, number = key, 1
    while free in keys:
        number += 1
        free = f"{key}-{number}"
    keys.add(free)
    return free


def _hold_out(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Every eighth source, at least one, in the order of a hash of the names: the same whatever the folder's
    order. Whole sources, so that no scene of a held-out video is trained on."""
    if not items:
        return [], []
    if len(items) == 1:
        raise UserError(
            f"only '{items[0].source}' can be used and one must be held out: give two or more, or --val"
        )
    order = sorted(items, key=lambda item: hashlib.sha256(item.key.encode()).digest())
    held = {item.key for item in order[::HOLD_OUT]}
    return [i for i in items if i.key not in held], [i for i in items if i.key in held]


def _write(split: str, items: list[Item], work: Path, most_bytes: int, quiet: bool) -> tuple[Sample, ...]:
    """Writes the split's shards that are not there yet; returns the clips of all with their places."""
    shards = divide([member for item in items for member in item.members], most_bytes)
    pieces = work / "pieces"
    samples: list[Sample] = []
    with Progress(len(shards), f"writing {split} shards", unit="shard", quiet=quiet) as progress:
        for number, members in enumerate(shards):
            path = work / f"{split}-{number:06d}.tar"
            if not path.exists():
                write_shard(path, members)
            samples += placed(path, members)
            for file in (file for member in members for file in member.files):
                if file.parent == pieces:
                    file.unlink(missing_ok=True)  # not twice on the disk
            progress.update()
    return tuple(samples)


def _install(work: Path, out: Path) -> None:
    """Moves what is complete into place, the index last; begun again where it was killed."""
    shards = {s.shard for rows in _rows(work / INDEX) for s in rows}
    (out / INDEX).unlink(missing_ok=True)
    for old in out.glob("*.tar"):
        if old.name not in shards:
            old.unlink()
    for name in ("curated.json", "inspect.html", "curated.html"):
        (out / name).unlink(missing_ok=True)  # about the shards that were; scores name what they are about
    for name in sorted(shards):
        if (work / name).exists():
            os.replace(work / name, out / name)
    os.replace(work / INDEX, out / INDEX)
    shutil.rmtree(work)


def _rows(path: Path) -> Iterator[tuple[Sample, ...]]:
    from data.shards import parse_index
    from flashvsr.base.files import read_json

    yield from parse_index(read_json(path), path.parent, str(path)).splits.values()


def summary(index: Index) -> str:
    """What a build made, for the end of the command."""
    lines = [f"skipped {name}: {reason}" for name, reason in index.skipped]
    for split, samples in index.splits.items():
        moving = [s for s in samples if s.kind != "image"]
        members = {(s.shard, s.offset): s.size for s in samples}
        lines.append(
            f"{split}: {len(moving)} clips, {len(samples) - len(moving)} images, "
            f"{sum(s.frames for s in moving)} frames from {len({s.source for s in samples})} sources, "
            f"{sum(members.values()) / 1e6:.1f} MB in {len({s.shard for s in samples})} shards"
        )
    if index.skipped:
        lines.append(f"{len(index.skipped)} skipped")
    lines.append(f"data: {index.folder}")
    return "\n".join(lines)
