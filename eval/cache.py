"""What an evaluation has made, kept under the hash of everything it follows from.

    outputs/<key>.mkv, .json    frames of one method on one clip (FFV1, lossless), and how they were made
    scores/<key>.json           one metric's values of one output

A key hashes content, never names or dates: LQ's bytes, weights, settings and code for an output; the output's
pixels, GT's bytes, the window and the metric for a score. An entry's JSON is written last and whole, so what
a killed command left half-made is no entry.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from flashvsr.base.cli import UserError
from flashvsr.base.files import read_json, reading, sha256, write_json
from flashvsr.base.stills import frames_of
from flashvsr.base.video_io import VideoWriter

STALE_SECONDS = 3600.0  # a temporary file untouched for so long was left by a killed command
ROOT = Path(__file__).parent.parent


def digest(value: Any) -> str:
    """A short name for a JSON value: 24 hexadecimal digits of its SHA-256."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def files_hash(paths: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files, read by several threads; UserError where one cannot
    be read."""
    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(_file_hash, paths)
        lines = [f"{path.name} {value}" for path, value in zip(paths, hashes, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_hash(path: Path) -> str:
    with reading(path):
        return sha256(path)


def clip_hash(path: Path) -> str:
    """SHA-256 of a clip's file, or of the names and contents of its frames."""
    return files_hash([path] if path.is_file() else frames_of(path))


@cache
def code_hash(*places: str) -> str:
    """SHA-256 of the Python files at places below the repository's root: what a result may depend on."""
    files = []
    for place in places:
        path = ROOT / place
        found = [path] if path.is_file() else sorted(path.rglob("*.py"))
        assert found, place
        files += found
    return files_hash(files)


@dataclass(frozen=True)
class Output:
    """Frames of one method on one clip: where they are, how many, how large, and how they came about.

    `pixels` is the SHA-256 of the frames (of the files, for outputs somebody else made). Times are None for
    finished outputs; `timed_on` is the machine they were taken on.
    """

    path: Path
    frames: int
    height: int
    width: int
    pixels: str
    seconds_per_frame: float | None = None
    first_output_seconds: float | None = None
    timed_on: dict[str, Any] | None = None
    in_use: dict[str, Any] | None = None


class Cache:
    """Entries under one folder; with `fresh`, those of earlier commands do not count."""

    def __init__(self, folder: str | Path, fresh: bool = False):
        self.folder = Path(folder)
        self._since = time.time() if fresh else 0.0

    def output(self, key: str) -> Output | None:
        """The finished output of that key, or None."""
        record = self._read(self._record(key))
        path = self.output_path(key)
        if record is None or not path.exists() or path.stat().st_size != record["bytes"]:
            return None
        return Output(path, **{name: value for name, value in record.items() if name != "bytes"})

    def output_path(self, key: str) -> Path:
        return self.folder / "outputs" / f"{key}.mkv"

    def keep_output(self, key: str, values: dict[str, Any]) -> Output:
        """Note how the output at `output_path(key)` came about: from now on it is an entry."""
        path = self.output_path(key)
        write_json(self._record(key), {**values, "bytes": path.stat().st_size})
        return Output(path, **values)

    def score(self, key: str) -> dict[str, Any] | None:
        """One metric's values of one output: {clip, per_frame, first, reason}, or None."""
        return self._read(self.folder / "scores" / f"{key}.json")

    def keep_score(self, key: str, values: dict[str, Any]) -> None:
        write_json(self.folder / "scores" / f"{key}.json", values)

    def sweep(self) -> None:
        """Remove what commands killed while writing left behind."""
        for path in self.folder.glob("*/.*.part*"):
            try:
                if time.time() - path.stat().st_mtime > STALE_SECONDS:
                    path.unlink()
            except FileNotFoundError:
                continue

    def _record(self, key: str) -> Path:
        return self.folder / "outputs" / f"{key}.json"

    def _read(self, path: Path) -> Any:
        if not path.exists() or path.stat().st_mtime < self._since:
            return None
        return read_json(path)


class FrameSink:
    """Writes frames losslessly and hashes them on the way: uint8 `F H W 3`, all of one size.

    A context manager; the file is there when the block has ended well, and then `frames`, `height`, `width`
    and `pixels` (hash) describe it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.frames, self.height, self.width = 0, 0, 0
        self._hash = hashlib.sha256()
        self._writer: VideoWriter | None = None

    def __enter__(self) -> "FrameSink":
        return self

    def write(self, frames: np.ndarray) -> None:
        if self._writer is None:
            self.height, self.width = frames.shape[1:3]
            # FFV1: exact, and as fast to write as to read; PNG and x264 write at a third of that.
            writer = VideoWriter(self.path, 25, self.height, self.width, codec="ffv1", lossless=True)
            self._writer = writer.__enter__()
        self._writer.write(frames)
        self._hash.update(np.ascontiguousarray(frames).data)
        self.frames += len(frames)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self._writer is not None:
            self._writer.__exit__(kind, error, trace)

    @property
    def pixels(self) -> str:
        return self._hash.hexdigest()


def checked(frames: Iterable[np.ndarray], output: Output) -> Iterator[np.ndarray]:
    """The frames of a stored output, hashed as they pass: UserError at the end if they are not those that
    were written."""
    value = hashlib.sha256()
    for frame in frames:
        value.update(np.ascontiguousarray(frame).data)
        yield frame
    if value.hexdigest() != output.pixels:
        raise UserError(
            f"{output.path} does not hold the frames that were written: the disk or the codec changed them; "
            f"remove it and run again"
        )
