"""Shards that lie elsewhere: http(s), `pipe:` and whatever webdataset opens, through a bounded local cache.

A shard is fetched whole when the first clip of it is asked for. All processes of a machine that name the same
cache folder share its copies; the one used least recently goes first.
"""

import errno
import hashlib
import io
import json
import os
import posixpath
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urljoin

from data.shards import INDEX, Index, parse_index
from flashvsr.base.cli import UserError

ATTEMPTS = 5  # with 0.5, 1, 2, 4 seconds between them
FIRST_PAUSE = 0.5
SILENCE = 60.0  # seconds without a byte after which an http server is given up
AFTER_LAST = 1 << 16  # room for what follows the last clip of a tar: its JSON, the end marker
CACHE = Path.home() / ".cache" / "flashvsr" / "shards"


def is_remote(location: str) -> bool:
    """Whether a location of shards is no path on this machine."""
    return "://" in location or location.startswith("pipe:")


class _Lasting(Exception):
    """A failure that another attempt would meet again."""


def _http(url: str) -> Iterator[bytes]:
    try:
        with urllib.request.urlopen(url, timeout=SILENCE) as answer:
            announced = answer.headers.get("Content-Length")
            got = 0
            while chunk := answer.read(1 << 20):
                got += len(chunk)
                yield chunk
            if announced is not None and got != int(announced):
                raise OSError(f"{got} of {announced} bytes came")
    except urllib.error.HTTPError as error:
        if error.code in (408, 425, 429) or error.code >= 500:
            raise
        raise _Lasting(f"HTTP {error.code} {error.reason}") from error


def _opened_by_webdataset(url: str) -> Iterator[bytes]:
    from webdataset.gopen import gopen, gopen_schemes

    scheme = url.split(":", 1)[0]
    if scheme not in {*gopen_schemes, "file"}:
        raise _Lasting(f"'{scheme}:' is nothing that webdataset opens")
    with closing(gopen(url, "rb")) as stream:  # a command that failed raises OSError when it is closed
        while chunk := stream.read(1 << 20):
            yield chunk


def fetch(url: str, file: BinaryIO, least: int = 1) -> None:
    """Writes what `url` holds into `file`, from its beginning, trying several times.

    Raises UserError when the last attempt fails too or fewer than `least` bytes come, and at once where
    trying again is no use (the address is unknown to the server, the disk is full).
    """
    chunks = _http if url.startswith(("http://", "https://")) else _opened_by_webdataset
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_PAUSE * 2 ** (attempt - 1))
        file.seek(0)
        try:
            for chunk in chunks(url):
                _write(file, chunk)
            file.truncate()
            if file.tell() >= least:
                return
            reason = f"only {file.tell()} bytes of at least {least} came"
        except _Lasting as error:
            raise UserError(f"cannot fetch '{shown(url)}' ({error}): check data.shards") from error
        except (OSError, HTTPException) as error:
            text = str(error) or type(error).__name__
            reason = re.sub(r"(?s).*: exit (\d+) \(read\).*", r"the command ended with code \1", text)
    raise UserError(
        f"cannot fetch '{shown(url)}' ({ATTEMPTS} attempts; the last: {reason}): check address and network"
    )


def _write(file: BinaryIO, chunk: bytes) -> None:
    try:
        file.write(chunk)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"the disk of '{file.name}' is full: lower data.cache_gb or give another data.cache_dir"
        ) from error


def shown(url: str) -> str:
    """A URL for messages: without its query, which may hold a key."""
    return url.split("?")[0] if "://" in url else url


class ShardCache:
    """Copies of remote shards in a folder, at most `limit` bytes, shared by any number of processes."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit

    def open(self, url: str, version: str, size: int) -> BinaryIO:
        """The shard at `url`, fetched if there is no copy; stays readable when the copy is dropped meanwhile.

        `version` names the content (another one is another copy), `size` is about how large it is. Raises
        UserError when it cannot be fetched or is larger than the whole cache.
        """
        key = hashlib.sha256(f"{url} {version}".encode()).hexdigest()[:32]
        path = self.folder / f"{key}.tar"
        try:
            if (file := _touched(path)) is not None:
                return file
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{key}.lock"):
                return _touched(path) or self._fetched(url, path, size)
        except OSError as error:
            raise UserError(
                f"the cache '{self.folder}' cannot be used ({error.strerror or error}): "
                "give another data.cache_dir"
            ) from error

    def _fetched(self, url: str, path: Path, size: int) -> BinaryIO:
        part = path.with_suffix(".part")
        try:
            self._reserve(part, size + AFTER_LAST, url)
            with open(part, "r+b") as file:
                fetch(url, file, size)
            # Opened before its name is known to those who drop copies.
            file = open(part, "rb")  # noqa: SIM115
            os.replace(part, path)
            return file
        finally:
            part.unlink(missing_ok=True)

    def _reserve(self, part: Path, size: int, url: str) -> None:
        """Makes a file of that size, which counts; drops copies until all fits, or waits for others."""
        if size > self.limit:
            raise UserError(
                f"data.cache_gb={self.limit / 1e9:g} holds not even '{shown(url)}' of {size / 1e9:.2f} GB: "
                "raise it"
            )
        while True:
            with _locked(self.folder / "all.lock"):
                # Parts first: one that becomes a copy meanwhile is counted twice, not never.
                used = sum(self._being_fetched())
                copies = sorted(self._copies(), key=lambda copy: copy[1])
                used += sum(held for _, _, held in copies)
                while copies and used + size > self.limit:
                    path, _, freed = copies.pop(0)
                    path.unlink(missing_ok=True)
                    used -= freed
                if used + size <= self.limit:
                    with open(part, "wb") as file:
                        file.truncate(size)
                    return
            time.sleep(0.1)

    def _copies(self) -> Iterator[tuple[Path, int, int]]:
        for path in self.folder.glob("*.tar"):
            facts = path.stat()
            yield path, facts.st_mtime_ns, facts.st_size

    def _being_fetched(self) -> Iterator[int]:
        """Sizes of the parts somebody writes; those of killed processes are removed."""
        for part in self.folder.glob("*.part"):
            try:
                with _locked(part.with_suffix(".lock"), wait=False):
                    part.unlink(missing_ok=True)
            except BlockingIOError:
                try:
                    yield part.stat().st_size
                except FileNotFoundError:
                    continue  # became a copy just now


def _touched(path: Path) -> BinaryIO | None:
    """A copy as an open file, marked as just used; None when there is none."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return None
    try:
        os.utime(path)
    except FileNotFoundError:
        return file  # dropped this moment; the open file lives on
    return file


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends. Raises BlockingIOError if not to `wait`."""
    import fcntl

    with open(path, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


class RemoteShards:
    """The shards of an index at a URL. What beside it is called `index.json` is called as the shard there."""

    def __init__(self, url: str, cache: ShardCache) -> None:
        if INDEX not in url:
            raise UserError(f"data.shards='{shown(url)}' must name an {INDEX}: the shards lie beside it")
        self.url, self.cache = url, cache
        self.name, self.folder = shown(url), "."
        self._facts: dict[str, tuple[str, int]] = {}

    def index(self) -> Index:
        """Fetches and reads the index; raises UserError when it is no index."""
        text = io.BytesIO()
        fetch(self.url, text)
        try:
            raw = json.loads(text.getvalue())
        except ValueError as error:
            raise UserError(f"what '{self.name}' gives is no index ({error}): check data.shards") from error
        index = parse_index(raw, self.cache.folder, self.name)
        self.folder = raw.get("shards", ".")  # an index may speak of shards in another folder
        content: dict[str, list] = {}
        for sample in (s for rows in index.splits.values() for s in rows):
            content.setdefault(sample.shard, []).append((sample.offset, sample.size, sample.sha256))
        for shard, rows in content.items():
            version = hashlib.sha256(repr(sorted(set(rows))).encode()).hexdigest()
            self._facts[shard] = version, max(offset + size for offset, size, _ in rows)
        return index

    def open(self, shard: str) -> BinaryIO:
        """See `ShardCache.open`."""
        return self.cache.open(self.place(shard), *self._facts[shard])

    def place(self, shard: str) -> str:
        """The shard's URL."""
        before, _, after = self.url.rpartition(INDEX)
        path = posixpath.join(self.folder, shard) if self.folder != "." else shard
        return (urljoin(before, path) if before.startswith("http") else before + path) + after
