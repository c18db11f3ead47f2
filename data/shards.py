"""WebDataset shards and the index beside them.

A shard is an ordinary tar that the stock webdataset reads: `KEY.mp4` + `KEY.json` for a video (the original
bytes), `KEY.jpg|png` + `KEY.json` for an image, `KEY.000000.png …` + `KEY.json` for a folder of frames.
`index.json` says where every member lies, so that any clip is opened with one seek.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from flashvsr.base.cli import UserError, build
from flashvsr.base.files import read_json, write_json

INDEX = "index.json"
FORMAT = "flashvsr-data"
VERSION = 1
SHARD_BYTES = 1 << 30  # a shard is closed once it is this large


@dataclass(frozen=True)
class Sample:
    """One clip or image of the corpus and where its bytes lie."""

    key: str
    shard: str  # file name beside the index
    offset: int  # bytes into the shard; of a frame folder: its first frame
    size: int  # bytes; of a frame folder: of all frames together
    kind: str  # video | image | frames
    frames: int
    fps: float
    height: int  # as shown, rotation applied
    width: int
    sha256: str  # of the bytes of all members, in order
    source: str  # name of the file or folder it came from
    members: tuple[tuple[int, int], ...] = ()  # frame folders only: (offset, size) of every frame


@dataclass(frozen=True)
class Index:
    """What `index.json` holds: samples by split."""

    folder: Path
    request: str  # fingerprint of the build that made it
    splits: dict[str, tuple[Sample, ...]]
    skipped: tuple[tuple[str, str], ...]  # (name, reason)


def write_index(index: Index) -> None:
    """Writes `index.folder/index.json`, atomically."""
    splits = {}
    for split, samples in index.splits.items():
        rows = [asdict(s) for s in samples]
        splits[split] = [{k: v for k, v in row.items() if v != ()} for row in rows]
    write_json(
        index.folder / INDEX,
        {
            "format": FORMAT,
            "version": VERSION,
            "request": index.request,
            "splits": splits,
            "skipped": [{"source": name, "reason": reason} for name, reason in index.skipped],
        },
    )


def read_index(path: str | Path) -> Index:
    """The index at `path` (its folder or the file).

    Raises UserError when it, or a shard it names, is missing or of another format, with the command that
    makes them.
    """
    path = Path(path)
    file = path if path.suffix == ".json" else path / INDEX
    if not file.is_file():
        raise UserError(
            f"no {INDEX} in '{file.parent}': make it with `python -m data build SRC --out {file.parent}`"
        )
    raw = read_json(file)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or raw.get("version") != VERSION:
        raise UserError(
            f"'{file}' is not a data index of version {VERSION}: build it again with `python -m data build`"
        )
    splits = {
        split: tuple(build(Sample, row, where=f"{file.name}:{split}") for row in rows)
        for split, rows in raw["splits"].items()
    }
    index = Index(
        file.parent, raw["request"], splits, tuple((s["source"], s["reason"]) for s in raw["skipped"])
    )
    for shard in {s.shard for rows in splits.values() for s in rows}:
        if not (index.folder / shard).is_file():
            raise UserError(
                f"shard '{index.folder / shard}' is missing: make it again with "
                f"`python -m data build SRC --out {index.folder}`"
            )
    return index


def write_split(folder: Path, split: str, items: Iterable[tuple[Sample, list[Path]]]) -> tuple[Sample, ...]:
    """Writes `folder/SPLIT-NNNNNN.tar` from (sample without a place, its files); returns them with their
    places."""
    import tarfile

    from webdataset import ShardWriter

    pattern = str(folder).replace("%", "%%") + f"/{split}-%06d.tar"
    written: list[Sample] = []
    # mtime=0 and no encoder: the same sources give the same bytes
    with ShardWriter(pattern, maxsize=SHARD_BYTES, verbose=0, mtime=0.0, encoder=False) as writer:
        for sample, files in items:
            record: dict[str, str | bytes] = {"__key__": sample.key}
            for i, file in enumerate(files):
                name = f"{i:06d}{file.suffix.lower()}" if sample.kind == "frames" else file.suffix.lower()[1:]
                record[name] = file.read_bytes()
            facts = {k: getattr(sample, k) for k in ("frames", "fps", "height", "width", "source", "sha256")}
            record["json"] = json.dumps(facts).encode()
            writer.write(record)
            written.append(replace(sample, shard=Path(writer.fname).name))
    places: dict[str, list[tuple[int, int]]] = {}
    for shard in sorted({s.shard for s in written}):
        with tarfile.open(folder / shard) as tar:
            for member in tar:
                key, _, name = member.name.partition(".")
                if name != "json":
                    places.setdefault(key, []).append((member.offset_data, member.size))
    done = []
    for sample in written:
        spots = tuple(places[sample.key])
        total = sum(size for _, size in spots)
        members = spots if sample.kind == "frames" else ()
        done.append(replace(sample, offset=spots[0][0], size=total, members=members))
    return tuple(done)
