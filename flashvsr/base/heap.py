"""glibc's heap, told to keep what is freed.

By default a block of more than 32 MiB (smaller ones at first) comes from the kernel and goes back to it as
soon as it is free. A network takes and frees such tensors all the time: each comes as pages that must be
zeroed, and threads that do so wait for each other, as a process has one map of its memory. A heap that grows
to what the work needs and stays costs nothing of that, and memory over time becomes a flat line.

Measured by `python -m flashvsr bench overlap` (docs/upscaling.md).
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of <malloc.h>


def keep_memory() -> bool:
    """From now on this process keeps freed memory for itself, one heap for all threads; its children do too
    where they are forked. Returns whether that was done: only with glibc, and not where the environment
    (MALLOC_*, GLIBC_TUNABLES) already says how to allocate.
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    mallopt = _function("mallopt")
    if mallopt is None:
        return False
    # one heap: a thread's own is made of pieces of 64 MiB, which large tensors do not fit into
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))
    return all([mallopt(option, value) == 1 for option, value in wanted])


def give_back() -> None:
    """Gives what is kept and not in use back to the kernel (glibc; else nothing happens): before free memory
    is looked at, and between jobs."""
    trim = _function("malloc_trim")
    if trim is not None:
        trim(0)


def _function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
