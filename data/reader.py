"""Frames out of shards: any clip is opened with one seek, its bytes are checked when it is first used."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from data.shards import Index, Sample
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import read_frames

# How much may be read to decode a member: a container damaged just so makes FFmpeg go in circles.
TIMES_SIZE = 64
AT_LEAST = 64 << 20


class Damaged(UserError):
    """A clip whose bytes or frames are not what the index says."""


class Shards(Protocol):
    """Where shards lie. `name` stands in messages."""

    name: str

    def open(self, shard: str) -> BinaryIO:
        """The shard as an open file; raises UserError when it cannot be had."""

    def place(self, shard: str) -> str:
        """Path or URL of the shard, for messages."""


class LocalShards:
    """Shards in a folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, str(folder)

    def open(self, shard: str) -> BinaryIO:
        try:
            return open(self.folder / shard, "rb", buffering=0)
        except OSError as error:
            raise UserError(f"cannot open shard '{self.place(shard)}' ({error.strerror})") from error

    def place(self, shard: str) -> str:
        return str(self.folder / shard)

    def refuse_short(self, index: Index) -> None:
        """Raises UserError, naming it, when a shard ends before the last clip that the index has in it."""
        ends: dict[str, int] = {}
        for s in (s for rows in index.splits.values() for s in rows):
            ends[s.shard] = max(ends.get(s.shard, 0), s.offset + s.size)
        for shard, end in ends.items():
            have = (self.folder / shard).stat().st_size
            if have < end:
                raise UserError(
                    f"shard '{self.place(shard)}' has {have} bytes, its index speaks of {end}: it is cut "
                    "short or belongs to another index; copy both again"
                )


class _Window(io.RawIOBase):
    """A part of an open file as a read-only, seekable file."""

    def __init__(self, file: BinaryIO, offset: int, size: int, name: str) -> None:
        self.file, self.offset, self.size, self.at, self.name = file, offset, size, 0, name
        self.allowed = TIMES_SIZE * size + AT_LEAST

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        self.at = max(0, base + offset)
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer) -> int:
        count = max(0, min(len(buffer), self.size - self.at))
        self.allowed -= max(count, 4096)
        if self.allowed < 0:
            raise OSError("the same bytes are read again and again")
        self.file.seek(self.offset + self.at)
        got = self.file.readinto(memoryview(buffer)[:count])
        self.at += got
        return got


class Reader:
    """Reads frames of an index's clips.

    `shards` opens the files (default: those of the index's folder). Members are hashed once per process.
    """

    def __init__(self, index: Index, shards: Shards | None = None) -> None:
        self.index = index
        self.shards = LocalShards(index.folder) if shards is None else shards
        self._checked: dict[
            tuple[str, int], bool
        ] = {}  # by shard and offset: whether the hash is the index's

    @property
    def name(self) -> str:
        return self.shards.name

    @property
    def splits(self) -> dict[str, tuple[Sample, ...]]:
        return self.index.splits

    def frames(
        self,
        sample: Sample,
        start: int = 0,
        count: int | None = None,
        size: tuple[int, int] | None = None,
        crop: tuple[int, int, int, int] | None = None,
        stride: int = 1,
    ) -> np.ndarray:
        """Frames start, start + stride, … (`count` of them, default: all) of a clip: uint8 `F H W 3`.

        `size` scales to (h, w) on the way (bicubic, antialiased); `crop` (top, left, height, width) then
        cuts; of large frames only what is cut is ever converted or copied. Raises Damaged, naming the clip,
        when its bytes are not those of the index or give fewer frames than it says, and UserError when the
        shard cannot be opened.
        """
        count = len(range(start, sample.frames, stride)) if count is None else count
        shape = crop[2:] if crop else size or (sample.height, sample.width)
        frames = np.empty((count, *shape, 3), np.uint8)
        with self.shards.open(sample.shard) as file:
            self._check(sample, file)
            found = 0
            try:
                for frame in self._decode(sample, file, start, count, size, crop, stride):
                    if frame.shape != frames.shape[1:]:
                        raise ValueError(f"its frames are {frame.shape[1]}x{frame.shape[0]}")
                    frames[found] = frame
                    found += 1
            except Exception as error:  # decoders raise whatever they like over what they cannot understand
                raise Damaged(f"{self._called(sample)} cannot be decoded ({error})") from error
        if found != count:
            raise Damaged(f"{self._called(sample)} gave {found} of {count} frames from {start} on")
        return frames

    def _decode(
        self, sample: Sample, file: BinaryIO, start: int, count: int, size, crop, stride: int
    ) -> Iterator[np.ndarray]:
        first, name = sample.start + start, self.shards.place(sample.shard)
        if sample.kind == "frames":
            for spot in sample.members[first::stride][:count]:
                yield from read_frames(_Window(file, *spot, name), size=size, crop=crop)
        else:
            window = _Window(file, sample.offset, sample.size, name)
            yield from read_frames(
                window, first, count, stride, size=size, crop=crop, keyframes=sample.keyframes
            )

    def _check(self, sample: Sample, file: BinaryIO) -> None:
        member = (sample.shard, sample.offset)
        if member not in self._checked:
            digest = hashlib.sha256()
            for offset, size in sample.members or ((sample.offset, sample.size),):
                window = _Window(file, offset, size, sample.shard)
                while chunk := window.read(1 << 20):
                    digest.update(chunk)
            self._checked[member] = digest.hexdigest() == sample.sha256
        if not self._checked[member]:
            raise Damaged(f"{self._called(sample)} is damaged (its hash is not the index's)")

    def _called(self, sample: Sample) -> str:
        return f"'{sample.key}' in {self.shards.place(sample.shard)}"
