"""One writer per run directory: a second run in the same place is refused instead of mixing its files in."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch

from flashvsr.base.cli import UserError
from train.launch import World


@contextmanager
def run_lock(folder: Path, world: World) -> Iterator[None]:
    """Holds `folder`/.lock while all ranks are inside; the main one takes it, and loses it when it dies.

    Raises:
        UserError: on the main rank, when another process holds it or the folder cannot be written.
        SystemExit: on the other ranks then: one sentence is enough.
    """
    handle, error = None, None
    if world.is_main:
        try:
            handle = _take(folder / ".lock")
        except UserError as refused:
            error = refused
    refused = world.all_reduce_max(torch.tensor(int(error is not None)))
    if error is not None:
        raise error
    if refused:
        raise SystemExit(2)
    try:
        yield
    finally:
        if handle is not None:
            handle.truncate(0)
            handle.close()


def _take(path: Path) -> IO[str]:
    """A record lock (lockf), not flock: loader workers forked from this process must not keep it alive."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write into the run directory {path.parent}: {error.strerror}") from error
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        holder = handle.read().strip() or "another process"
        handle.close()
        raise UserError(
            f"{path.parent} is in use by {holder}: wait for it to end or give another run=NAME"
        ) from error
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle
