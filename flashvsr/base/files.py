"""Files that are whole or absent: atomic writes, hashes, JSON."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError


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
    try:
        yield part
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_dir(path: str | Path, replace: bool = False) -> Iterator[Path]:
    """The same for a folder: give an empty temporary folder that becomes `path` on success.

    A non-empty `path` raises UserError, unless `replace`: then the old folder goes when the new one is
    complete.
    """
    path = Path(path)
    _refuse_full(path, replace)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, old = _beside(path), _beside(path)
    part.mkdir()
    try:
        yield part
        for item in part.rglob("*"):
            if item.is_file() and not item.is_symlink():
                _sync(item)
        _sync(part)
        _refuse_full(path, replace)  # someone may have written it meanwhile
        if path.exists():
            os.rename(path, old)
        os.rename(part, path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
    """The JSON value in a file; UserError when the file is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); write it again") from None


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically."""
    text = json.dumps(obj, indent=2, ensure_ascii=False) + "\n"
    with atomic(path) as part:
        part.write_text(text, encoding="utf-8")


def load_torch(path: str | Path) -> Any:
    """What a torch file holds (plain tensors and containers), on the CPU, executing nothing in it.

    UserError, naming the file, when it is missing, damaged or holds anything else.
    """
    import torch

    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; check the path")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever it likes over damaged bytes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a whole file of plain tensors ({reason}); copy it again") from None
