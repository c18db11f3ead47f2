"""WebDataset shards and the index beside them.

A shard is an ordinary tar that the stock webdataset reads. A *member* of it is one source: `KEY.mp4` +
`KEY.json` for a video (the original bytes), `KEY.jpg|png` + `KEY.json` for an image, `KEY.000000.png …` +
`KEY.json` for a folder of frames. A *clip* is a run of frames of a member, such as one scene of a video; an
image is a clip of one frame. `index.json` lists the clips and says where every member lies, so that any clip
is opened with one seek; `KEY.json` repeats the clips, so that the index can be made again from the tars.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic, read_json

INDEX = "index.json"
FORMAT = "flashvsr-data"
VERSION = 2


@dataclass(frozen=True)
class Sample:
    """One clip or image of the corpus and where its bytes lie."""

    key: str  # of the clip: the member's key, with @START where the clip is only a part of the member
    shard: str  # file name beside the index
    offset: int  # bytes into the shard; of a frame folder: its first frame
    size: int  # bytes of the whole member; of a frame folder: of all frames together
    kind: str  # video | image | frames
    frames: int  # of the clip
    fps: float
    height: int  # as shown, rotation applied
    width: int
    sha256: str  # of the bytes of the whole member, frame files in order
    source: str  # name of the file or folder it came from
    members: tuple[tuple[int, int], ...] = ()  # frame folders only: (offset, size) of every frame
    start: int = 0  # the clip's first frame in the member
    keyframes: tuple[tuple[int, int], ...] = ()  # (frame, time stamp): where the member can be entered

    @property
    def content(self) -> str:
        """What the pixels depend on: equal for equal clips, whatever shard they lie in."""
        return f"{self.sha256}:{self.start}:{self.frames}"


@dataclass(frozen=True)
class Index:
    """What `index.json` holds: clips by split."""

    folder: Path  # where the shards lie
    request: str  # fingerprint of the build that made it
    splits: dict[str, tuple[Sample, ...]]
    skipped: tuple[tuple[str, str], ...]  # (name, reason)


_CLIP_FIELDS = ("key", "start", "frames")  # the rest of a Sample is its member's


def write_index(index: Index, path: Path | None = None) -> None:
    """Writes the index to `path` (default: `index.folder/index.json`), atomically, a row per line."""
    path = index.folder / INDEX if path is None else path
    members: dict[tuple[str, int], int] = {}
    rows, splits = [], {}
    for split, samples in index.splits.items():
        clips = splits[split] = []
        for sample in samples:
            place = (sample.shard, sample.offset)
            if place not in members:
                members[place] = len(rows)
                fields = {k: v for k, v in vars(sample).items() if k not in _CLIP_FIELDS and v != ()}
                rows.append(fields)
            clips.append([sample.key, members[place], sample.start, sample.frames])
    head = {"format": FORMAT, "version": VERSION, "request": index.request}
    if index.folder.resolve() != path.parent.resolve():
        head["shards"] = os.path.relpath(index.folder, path.parent)
    head["skipped"] = [{"source": name, "reason": reason} for name, reason in index.skipped]
    lines = [f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in head.items()]
    lines.append(f'"members": [{_lines(rows)}]')
    by_split = ",\n".join(f"{json.dumps(split)}: [{_lines(clips)}]" for split, clips in splits.items())
    lines.append(f'"splits": {{\n{by_split}}}')
    with atomic(path) as part:
        part.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")


def _lines(rows: Iterable[Any]) -> str:
    return "\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def read_index(path: str | Path) -> Index:
    """The index at `path` (its folder or the file).

    Raises UserError when it, or a shard it names, is missing or of another format, with the command that
    makes them.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / INDEX
    if not file.is_file():
        raise UserError(
            f"no {file.name} in '{file.parent}': make it with `python -m data build SRC --out "
            f"{file.parent}`, or from tars made elsewhere with `python -m data index {file.parent}`"
        )
    raw = read_json(file)
    folder = file.parent
    if isinstance(raw, dict) and "shards" in raw:
        folder = file.parent / raw["shards"]
    index = parse_index(raw, folder, str(file))
    for shard in {s.shard for rows in index.splits.values() for s in rows}:
        if not (index.folder / shard).is_file():
            raise UserError(
                f"shard '{index.folder / shard}' is missing: make it again with "
                f"`python -m data build SRC --out {index.folder}`"
            )
    return index


def parse_index(raw: Any, folder: Path, where: str) -> Index:
    """The index held by the JSON value `raw`, its shards in `folder`; `where` names it in messages.

    Raises UserError when it is of another format or damaged. Shards are not looked for.
    """
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise UserError(
            f"'{where}' is not a data index of version {VERSION}: build it again with `python -m data build`"
        )
    try:
        members = [_member(row, f"{where}:members[{i}]") for i, row in enumerate(raw["members"])]
        splits = {}
        for split, rows in raw["splits"].items():
            splits[split] = tuple(
                dataclasses.replace(members[number], key=key, start=start, frames=frames)
                for key, number, start, frames in rows
            )
        skipped = tuple((s["source"], s["reason"]) for s in raw["skipped"])
        return Index(folder, raw["request"], splits, skipped)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{where}' is damaged ({type(error).__name__}: {error}): make it again with "
            "`python -m data index`"
        ) from error


def _member(row: dict[str, Any], where: str) -> Sample:
    # Not flashvsr.base.cli.build: it is slow, and an index has a row for each of 100,000 videos.
    for name in ("offset", "size", "height", "width"):
        if type(row[name]) is not int or row[name] < 0:
            raise UserError(f"{where}: {name}={row[name]!r} must be a number: make the index again")
    pairs = {name: tuple(map(tuple, row[name])) for name in ("members", "keyframes") if name in row}
    return Sample(**{**row, **pairs, "key": "", "frames": 0})


def clip_key(member: str, start: int, frames: int, total: int) -> str:
    """The key of a clip: its member's, with @START unless it is the whole member."""
    return member if frames == total else f"{member}@{start}"


@dataclass(frozen=True)
class Member:
    """A source, or a piece of one, before it is written: its files and what is known of it."""

    key: str
    kind: str  # video | image | frames
    files: tuple[Path, ...]
    size: int  # bytes of all files
    frames: int
    fps: float
    height: int
    width: int
    sha256: str
    source: str
    clips: tuple[tuple[int, int], ...]  # (start, frames)
    keyframes: tuple[tuple[int, int], ...] = ()

    def names(self) -> list[str]:
        """What the files are called in the tar after the key."""
        suffixes = [file.suffix.lower() for file in self.files]
        if self.kind == "frames":
            return [f"{i:06d}{suffix}" for i, suffix in enumerate(suffixes)]
        return [suffix[1:] for suffix in suffixes]

    def facts(self) -> dict[str, Any]:
        """What `KEY.json` holds."""
        names = ("kind", "frames", "fps", "height", "width", "source", "sha256", "clips", "keyframes")
        return {name: getattr(self, name) for name in names}


def divide(members: Iterable[Member], most_bytes: int) -> list[list[Member]]:
    """Members to shards, in order: a shard is closed once it holds `most_bytes` or more."""
    shards: list[list[Member]] = []
    room = 0
    for member in members:
        if room <= 0:
            shards.append([])
            room = most_bytes
        shards[-1].append(member)
        room -= member.size
    return shards


def write_shard(path: Path, members: Iterable[Member]) -> None:
    """Writes one tar with webdataset, atomically; the same members give the same bytes."""
    from webdataset import TarWriter

    # mtime=0 and no encoder: nothing in the tar but the members
    with (
        atomic(path) as part,
        open(part, "wb") as file,
        TarWriter(file, mtime=0.0, encoder=False) as writer,
    ):
        for member in members:
            record: dict[str, str | bytes] = {"__key__": member.key}
            for name, source in zip(member.names(), member.files, strict=True):
                record[name] = source.read_bytes()
            record["json"] = json.dumps(member.facts()).encode()
            writer.write(record)


def placed(shard: Path, members: Iterable[Member]) -> list[Sample]:
    """The clips of `members` with their places in the tar that holds them."""
    places: dict[str, list[tuple[int, int]]] = {}
    for key, extension, offset, size in spots(shard):
        if extension != "json":
            places.setdefault(key, []).append((offset, size))
    samples = []
    for m in members:
        where = tuple(places[m.key])
        if sum(size for _, size in where) != m.size:
            raise UserError(f"'{m.source}' changed while it was read: run the same command again")
        shared = Sample(
            m.key, shard.name, where[0][0], m.size, m.kind, m.frames, m.fps, m.height, m.width, m.sha256,
            m.source, where if m.kind == "frames" else (), 0, m.keyframes,
        )  # fmt: skip
        for start, frames in m.clips:
            key = clip_key(m.key, start, frames, m.frames)
            samples.append(dataclasses.replace(shared, key=key, start=start, frames=frames))
    return samples


def spots(shard: Path) -> Iterator[tuple[str, str, int, int]]:
    """(key, extension, offset, size) of every file in a tar; webdataset ends a key at the first dot of the
    last part of the name. Raises UserError, naming the tar, when it is cut short or no tar."""
    import tarfile

    try:
        with tarfile.open(shard, "r:") as tar:
            end = shard.stat().st_size
            for member in tar:
                if not member.isfile():
                    continue
                folder, slash, name = member.name.rpartition("/")
                base, _, extension = name.partition(".")
                if member.offset_data + member.size > end:
                    raise UserError(f"'{shard}' is cut short in '{member.name}': copy or build it again")
                yield folder + slash + base, extension, member.offset_data, member.size
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"'{shard}' is no whole tar ({error}): copy or build it again") from error
