"""The timer: order of measurement, medians, memory."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

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


class Work:
    def __init__(self, clock):
        self.clock = clock

    def first(self):
        self.clock[0] += 2.0
        return "first"

    def second(self):
        self.clock[0] += 5.0

    def all(self):
        assert self.first() == "first"
        self.second()
        self.second()
        self.clock[0] += 1.0


def test_parts_of_a_call_and_the_rest(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    work = Work(clock)
    result = measure.split(work.all, {"a": (work, "first"), "b": (Work, "second")}, repeats=2)
    assert result == {"a": 2.0, "b": 10.0, "rest": 1.0, "all": 13.0}
    assert "first" not in vars(work) and Work.second.__name__ == "second"

    def breaks():
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError):
        measure.split(breaks, {"a": (work, "first")})
    assert "first" not in vars(work)


def test_shares_of_operations():
    a, b = torch.randn(2, 400, 400)
    by_kind, others = measure.shares(
        lambda: (a @ b, torch.exp(a)), {"matmul": r"aten::(mm|addmm)$"}, torch.device("cpu")
    )
    assert by_kind["matmul"] > 0.3 and sum(by_kind.values()) == pytest.approx(1)
    assert "aten::exp" in others and "aten::mm" not in others


@pytest.mark.parametrize("mib", [2, 100])
def test_memory_of_a_call(mib):
    """Of large pieces, and of small ones that the C library keeps when they are freed."""

    def work():
        return [torch.ones(mib << 18) for _ in range(100 // mib)]

    work()
    held = measure.peak_bytes(work, torch.device("cpu"))
    if held is None:
        pytest.skip("this system does not tell")
    assert 98 << 20 <= held < 116 << 20


def test_matmul_rate_is_a_rate():
    device = torch.device("cpu")
    assert 1e8 < measure.matmul_rate(device, torch.float32, repeats=1) < 1e14
