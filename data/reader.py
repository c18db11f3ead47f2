"""Frames out of shards: any clip is opened with one seek."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.shards import Index, Sample
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import read_frames


class _Window(io.RawIOBase):
    """A part of a file as a read-only, seekable file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.at = open(path, "rb"), offset, size, 0  # noqa: SIM115
        self.name = str(path)

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
        self.file.seek(self.offset + self.at)
        got = self.file.readinto(memoryview(buffer)[:count])
        self.at += got
        return got

    def close(self) -> None:
        self.file.close()
        super().close()


class Reader:
    """Reads frames out of shards; checks a clip's bytes against the index the first time it is used."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self.checked: set[tuple[str, int]] = set()  # members by shard and offset

    def frames(
        self,
        sample: Sample,
        start: int = 0,
        count: int | None = None,
        size: tuple[int, int] | None = None,
        crop: tuple[int, int, int, int] | None = None,
    ) -> np.ndarray:
        """Frames start … start+count-1 of a sample: uint8 `F H W 3`.

        `size` scales to (h, w) on the way (bicubic, antialiased); `crop` (top, left, height, width) then
        cuts, frame by frame, so that whole large frames are never held together. Raises UserError naming the
        sample when its bytes are damaged or hold fewer frames than the index says.
        """
        count = sample.frames - start if count is None else count
        top, left, height, width = crop or (0, 0, *(size or (sample.height, sample.width)))
        self._check(sample)
        frames = np.empty((count, height, width, 3), np.uint8)
        found = -1
        for found, frame in enumerate(self._decode(sample, start, count, size)):
            frames[found] = frame[top : top + height, left : left + width]
        if found + 1 != count:
            raise UserError(
                f"'{sample.key}' in {self.index.folder / sample.shard} gave {found + 1} of {count} frames "
                f"from {start} on: build them again without '{sample.source}'"
            )
        return frames

    def _decode(self, sample: Sample, start: int, count: int, size) -> Iterator[np.ndarray]:
        path = self.index.folder / sample.shard
        try:
            if sample.kind == "frames":
                for spot in sample.members[sample.start + start :][:count]:
                    with _Window(path, *spot) as window:
                        yield from read_frames(window, size=size)
            else:
                with _Window(path, sample.offset, sample.size) as window:
                    first = sample.start + start
                    yield from read_frames(window, first, count, size=size, keyframes=sample.keyframes)
        except (UserError, OSError) as error:
            raise UserError(
                f"cannot decode '{sample.key}' in {path} ({error}): build the shards again"
            ) from error

    def _check(self, sample: Sample) -> None:
        if (sample.shard, sample.offset) in self.checked:
            return
        path = self.index.folder / sample.shard
        digest = hashlib.sha256()
        for offset, size in sample.members or ((sample.offset, sample.size),):
            with _Window(path, offset, size) as window:
                while chunk := window.read(1 << 20):
                    digest.update(chunk)
        if digest.hexdigest() != sample.sha256:
            raise UserError(
                f"'{sample.key}' in {path} is damaged (its hash is not the index's): "
                f"build the shards again with `python -m data build SRC --out {self.index.folder}`"
            )
        self.checked.add((sample.shard, sample.offset))
