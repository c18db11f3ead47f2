"""The timer: order of measurement, medians, memory."""

from __future__ import annotations

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


def test_peak_memory_grows_with_what_is_held():
    before = measure.peak_rss_bytes()
    block = np.ones(before, np.uint8)  # as much again as ever was held
    grown = measure.peak_rss_bytes()
    assert block.nbytes < grown <= 2 * before + (16 << 20)
    del block
    assert measure.peak_rss_bytes() >= grown - (1 << 20)  # the kernel counts in batches


def test_machine_says_what_it_was():
    facts = measure.machine()
    assert facts["cores"] >= 1 and facts["cpu"] and facts["torch"] and "T" in facts["date"]
