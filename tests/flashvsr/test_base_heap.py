import os
import platform
import subprocess
import sys

import pytest

# Page faults of ten blocks of 64 MiB, taken and given back one after the other, the last five in a thread.
# The block before them is not counted: its pages are new in any case.
CODE = """
import resource
import threading

from flashvsr.base.heap import keep_memory


def faults(work):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def blocks(count=5):
    for _ in range(count):
        bytearray(64 << 20)


def in_a_thread():
    thread = threading.Thread(target=blocks)
    thread.start()
    thread.join()


done = keep_memory()
blocks(1)
print(int(done), faults(blocks), faults(in_a_thread))
"""


# MiB resident: with 256 blocks of 1 MiB and a small one above them that stays, without the 256, and after
# free memory was asked for.
RESIDENT = """
import torch

from flashvsr.base.heap import keep_memory
from flashvsr.base.measure import resident_bytes
from flashvsr.streaming.preflight import free_bytes

keep_memory()
blocks = [bytearray(b"x" * (1 << 20)) for _ in range(256)] + [bytearray(4096)]
taken = resident_bytes()
del blocks[:256]
kept = resident_bytes()
free_bytes(torch.device("cpu"))
print(*(size >> 20 for size in (taken, kept, resident_bytes())))
"""

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told what to keep"
)


def run(code: str, **environment: str) -> tuple[int, ...]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=True
    )
    return tuple(map(int, out.stdout.split()))


def test_freed_memory_is_kept_for_all_threads_unless_the_environment_says_otherwise():
    done, here, thread = run(CODE)
    assert done and here < 100 and thread < 100
    done, here, thread = run(CODE, MALLOC_ARENA_MAX="8")
    assert not done and here > 1000 and thread > 1000


def test_what_is_kept_counts_as_free_memory():
    """Else a second clip in the same process would find less memory than the first, and be cut otherwise."""
    taken, kept, after = run(RESIDENT)
    assert kept > taken - 16 and after < taken - 240
