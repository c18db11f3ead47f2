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


def run(**environment: str) -> tuple[int, ...]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    out = subprocess.run(
        [sys.executable, "-c", CODE], env=clean | environment, capture_output=True, text=True, check=True
    )
    return tuple(map(int, out.stdout.split()))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap can be told so")
def test_freed_memory_is_kept_for_all_threads_unless_the_environment_says_otherwise():
    done, here, thread = run()
    assert done and here < 100 and thread < 100
    done, here, thread = run(MALLOC_ARENA_MAX="8")
    assert not done and here > 1000 and thread > 1000
