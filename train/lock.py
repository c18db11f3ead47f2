"""One writer per run directory: a second run in the same place is refused instead of mixing its files in."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flashvsr.base.cli import UserError


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Holds `folder`/.lock while entered; the main rank takes it. The kernel lets go when the process dies.

    A record lock (lockf), not flock: loader workers forked from this process must not keep it alive.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as error:
        raise UserError(f"cannot write into the run directory {folder}: {error.strerror}") from error
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "another process"
            raise UserError(
                f"{folder} is in use by {holder}: wait for it to end or give another run=NAME"
            ) from error
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield
        handle.truncate(0)
