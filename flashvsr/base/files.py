"""Files that are whole or absent: atomic writes, hashes, JSON, torch files."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError

# An unlocked temporary folder this old, in seconds, was left by a killed process.
ABANDONED = 60.0


def _beside(path: Path) -> Path:
    # Hidden, in the same folder (a rename stays on one disk), with the suffix that writers go by.
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Give a temporary path to write to; on success it becomes `path`, on any error it is removed.

    Missing parent folders are made. Readers see the old file or the new one, never a part, also after a
    power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _beside(path)
    part.touch()
    mode = part.stat().st_mode  # as the user's umask wants it; some writers make files only the owner reads
    try:
        yield part
        part.chmod(mode)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """The same for a folder: give an empty temporary folder that becomes `path` on success.

    A non-empty `path` raises UserError, unless `replace`: then the old folder goes when the new one is
    complete; where the system can swap two folders (Linux), `path` is never absent in between. What a killed
    process left beside `path` is removed.
    """
    path = Path(path)
    _refuse_full(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    part, old = _beside(path), _beside(path)
    part.mkdir()
    lock = _lock(part)
    try:
        yield part
        for item in part.rglob("*"):
            if item.is_file() and not item.is_symlink():
                _sync(item)
        _sync(part)
        _refuse_full(path, replace)  # someone may have written it meanwhile
        if not path.exists():
            os.rename(part, path)
        elif not _exchange(part, path):  # else `part` is now the old folder
            os.rename(path, old)
            os.rename(part, path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of <linux/fs.h>
    if renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _lock(folder: Path) -> int | None:
    """Marks a folder as being written, until the process ends however it ends; None where locks are not."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_abandoned(path: Path) -> None:
    name = re.compile(re.escape(f".{path.stem}.") + "[0-9a-f]{8}" + re.escape(f".part{path.suffix}"))
    for left in path.parent.iterdir():
        if name.fullmatch(left.name) and left.is_dir() and time.time() - left.stat().st_mtime > ABANDONED:
            lock = _lock(left)
            if lock is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)


def _refuse_full(path: Path, replace: bool) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file where a folder is to be written; choose another path")
    if not replace and path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} already exists and is not empty; remove it or choose another path")


def sha256(path: str | Path) -> str:
    """The file's SHA-256 in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> Any:
    """The JSON value in a file; UserError when the file cannot be read or is not JSON."""
    try:
        with reading(path):
            return json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again") from None


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically."""
    text = json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Turns what the system says against reading `path` into a UserError of one sentence."""
    path = Path(path)
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink() and not path.exists():
            where = os.readlink(path)
            raise UserError(
                f"{path} is a link to {where}, which does not exist; copy the file itself"
            ) from None
        missing = error.filename if error.filename is not None else path
        raise UserError(f"{missing} does not exist; check the path") from None
    except PermissionError as error:
        denied = error.filename if error.filename is not None else path
        raise UserError(f"{denied} may not be read by this user; change its permissions or copy it") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); copy it again") from None


def load_torch(path: str | Path) -> Any:
    """What a torch file holds (plain tensors and containers), on the CPU, executing nothing in it.

    Tensors are mapped from the file where its format allows: read when used, shared between processes;
    changing one changes no file. UserError, naming the file, when it is missing, damaged or holds anything
    that would need code to be run.
    """
    import pickle

    import torch

    with reading(path), open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # torch's format since 1.6, the one that can be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other protocols, before they are refused
            if is_zip and Path(path).suffix != ".safetensors":  # torch would go by that name
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            with open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever it likes over damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            if code := re.search(r"GLOBAL (\S+)", reason):
                raise UserError(
                    f"{path} is refused: reading it would run {code[1]!r}, and weights need no code; take a "
                    f"file of plain tensors, best safetensors"
                ) from None
            reason = "no plain pickle"
        elif "TorchScript" in reason:
            reason = "a TorchScript program"
        raise UserError(
            f"{path} is not a whole file of plain tensors ({reason[:200]}); copy it again"
        ) from None
