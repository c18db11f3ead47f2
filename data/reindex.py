"""`python -m data index`: the index of tars that are already there, whoever made them."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data import workers
from data.build import HOLD_OUT
from data.journal import Journal
from data.scan import Options
from data.shards import Index, Sample, clip_key, spots, write_index
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.stills import IMAGE_SUFFIXES
from flashvsr.base.video_io import VIDEO_SUFFIXES

JOURNAL = ".index.jsonl"


def reindex(folder: Path, options: Options, how_many: int | None, silence: float, quiet: bool) -> Index:
    """Writes `folder/index.json` for the tars there, and returns it.

    A member is a key with one video, one image, or numbered frames (`KEY.000000.png …`), and optionally JSON.
    Each is decoded to its end, unless its JSON is ours and agrees with its bytes: then its clips are as they
    were built. `val-*.tar` is held out; without any, every eighth member. Killed, the same call goes on.
    Raises UserError for a folder without tars, a tar that is cut short, and when nothing can be used.
    """
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise UserError(f"no .tar in '{folder}': give the folder of the shards")
    members = [(tar, *member) for tar in tars for member in _members(tar)]
    samples: list[Sample] = []
    skipped: list[tuple[str, str]] = []
    request = hashlib.sha256(json.dumps(["index", asdict(options)]).encode()).hexdigest()
    with Journal(folder / JOURNAL) as journal:
        names = {_name(m, request): m for m in members}
        todo = {name: m for name, m in names.items() if name not in journal.known}
        jobs = ((name, _job(m, options)) for name, m in todo.items())
        with (
            Progress(len(names), "reading members", unit="member", quiet=quiet) as progress,
            workers.Pool(min(workers.count(how_many), max(1, len(todo))), silence) as pool,
        ):
            progress.update(len(names) - len(todo))
            for name, answer in pool.run(jobs):
                journal.add(name, answer)
                progress.update()
        keys: set[str] = set()
        for name, member in names.items():
            answer = journal.known[name]
            if member[1] in keys:
                answer = {"failed": "has the key of a member before it"}
            if "failed" in answer:
                skipped.append((f"{member[0].name}:{member[1]}", answer["failed"]))
                continue
            keys.add(member[1])
            samples += _samples(member, answer["result"])
    if not samples:
        why = "; ".join(f"'{name}' {reason}" for name, reason in skipped[:3])
        raise UserError(
            f"no member of the {len(tars)} tars in '{folder}' can be used: {why or 'they are empty'}"
        )
    index = Index(folder, request, _split(samples), tuple(skipped))
    write_index(index)
    (folder / JOURNAL).unlink()
    return index


Found = tuple[str, str, tuple[tuple[int, int], ...], tuple[int, int] | None]  # key, kind, files, JSON


def _members(tar: Path) -> list[Found]:
    """The members of a tar that hold pictures."""
    files: dict[str, dict[str, tuple[int, int]]] = {}
    for key, extension, offset, size in spots(tar):
        files.setdefault(key, {})[extension.lower()] = (offset, size)
    found: list[Found] = []
    for key, by_extension in files.items():
        suffixes = {name: "." + name.rpartition(".")[2] for name in by_extension}
        videos = [name for name, suffix in suffixes.items() if suffix in VIDEO_SUFFIXES]
        images = [name for name, suffix in suffixes.items() if suffix in IMAGE_SUFFIXES]
        facts = by_extension.get("json")
        numbered = sorted(name for name in images if name.partition(".")[0].isdecimal() and "." in name)
        if videos:
            found.append((key, "video", (by_extension[videos[0]],), facts))
        elif numbered:
            found.append((key, "frames", tuple(by_extension[name] for name in numbered), facts))
        elif images:
            found.append((key, "image", (by_extension[images[0]],), facts))
    return found


Member = tuple[Path, str, str, tuple[tuple[int, int], ...], tuple[int, int] | None]


def _name(member: Member, request: str) -> str:
    tar, key, _, places, _ = member
    stat = tar.stat()
    return f"{request[:16]}:{tar.name}:{stat.st_size}:{stat.st_mtime_ns}:{key}:{places[0][0]}"


def _job(member: Member, options: Options) -> dict[str, Any]:
    tar, _, kind, places, facts = member
    asked = {"shard": str(tar), "kind": kind, "places": places, "facts": facts, "options": asdict(options)}
    return {"do": "scan_member", **asked}


def _samples(member: Member, result: dict[str, Any]) -> list[Sample]:
    tar, key, kind, places, _ = member
    samples = []
    for start, frames in result["clips"]:
        samples.append(
            Sample(
                key=clip_key(key, start, frames, result["frames"]),
                shard=tar.name,
                offset=places[0][0],
                size=sum(size for _, size in places),
                kind=kind,
                frames=frames,
                fps=result["fps"],
                height=result["height"],
                width=result["width"],
                sha256=result["sha256"],
                source=result.get("source", key),
                members=places if kind == "frames" else (),
                start=start,
                keyframes=tuple(map(tuple, result["keyframes"])),
            )
        )
    return samples


def _split(samples: list[Sample]) -> dict[str, tuple[Sample, ...]]:
    held = {s.shard for s in samples if s.shard.startswith("val-")}
    if held:
        chosen = {(s.shard, s.offset) for s in samples if s.shard in held}
    else:
        members = {(s.shard, s.offset): s.sha256 for s in samples}
        if len(members) < 2:
            raise UserError("only one member can be used and one must be held out: add a val-000000.tar")
        chosen = set(sorted(members, key=members.__getitem__)[::HOLD_OUT])
    place = [(s.shard, s.offset) in chosen for s in samples]
    train = tuple(s for s, out in zip(samples, place, strict=True) if not out)
    if not train:
        raise UserError("every tar is named val-*: nothing is left to train on")
    return {"train": train, "val": tuple(s for s, out in zip(samples, place, strict=True) if out)}
