"""The timer: order of measurement, medians, memory."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from flashvsr.base import measure


def test_interleaved_takes_turns_after_the_warm_up():
    calls = []
    measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert "".join(calls) == "aabb" + "ab" + "ba" + "ab"


def test_the_median_is_not_moved_by_one_slow_run(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    lengths = iter([9.0, 1.0, 5.0, 2.0, 100.0, 3.0])  # the first is the warm-up

    def work():
        clock[0] += next(lengths)

    assert measure.time_median(work, repeats=5, warmup=1) == 3.0
    with pytest.raises(ValueError, match="repeats=0"):
        measure.time_median(work, repeats=0)


def test_seconds_are_seconds():
    assert 0.02 <= measure.time_median(lambda: time.sleep(0.02), repeats=3, warmup=0) < 0.2


def test_peak_memory_is_this_process_own():
    before = measure.peak_rss_bytes()
    block = np.ones(64 << 20, np.uint8)
    assert measure.peak_rss_bytes() > 60 << 20 and measure.peak_rss_bytes() >= before
    del block
    keeps = "import numpy as np; np.ones(300 << 20, np.uint8)\n"
    shows = "from flashvsr.base.measure import peak_rss_bytes as p; a = p()\n"
    out = subprocess.run(
        [sys.executable, "-c", f"{shows}{keeps}print(p() - a)"], capture_output=True, check=True
    )
    assert 280 << 20 < int(out.stdout) < 340 << 20


def test_machine_says_what_it_was():
    facts = measure.machine()
    assert facts["cores"] >= 1 and facts["cpu"] and facts["torch"] and "T" in facts["date"]
