"""What a run tells: the metrics file line by line, cut on resume, the console line, a tracker that fails."""

import json
from types import SimpleNamespace

import pytest
import torch

from flashvsr.base.cli import UserError
from train.telemetry import Telemetry, of_all_ranks

RECORD = {
    "loss/flow": 0.8123456789012345,
    "grad_norm/student": 1.93,
    "lr": 3e-4,
    "counter": 8,
    "seconds": 0.5,
    "data_seconds": 0.02,
    "samples": 2,
    "tokens": 1280,
    "mfu": 0.3,
    "hfu": 0.4,
    "peak_memory_bytes": 1_234_000_000,
    "peak_host_bytes": 1_234_000_000,
}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_a_line_and_floats_are_exact(tmp_path, capsys):
    with Telemetry(tmp_path / "stage1", "stage1", 4, quiet=True) as telemetry:
        telemetry.val(0, {"val/loss": 1.5})
        for step in (1, 2):
            telemetry.train(step, RECORD, ["not to be seen"])
        found = lines(tmp_path / "stage1")  # flushed at once: another process reads it while the run goes on
    assert found[0] == {"step": 0, "stage": "stage1", "kind": "val", "val/loss": 1.5}
    assert [(r["step"], r["kind"]) for r in found[1:]] == [(1, "train"), (2, "train")]
    assert all(found[1][name] == value for name, value in RECORD.items())
    assert "".join(capsys.readouterr()) == ""


def test_resuming_cuts_what_came_after_and_a_torn_line(tmp_path):
    with Telemetry(tmp_path, "stage2", 9, quiet=True) as first:
        assert first.resume(0) == []  # nothing there yet
        for step in range(1, 6):
            first.train(step, RECORD | {"loss/flow": float(step)})
            first.val(step, {"val/loss": -float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "stage": "st')
    with Telemetry(tmp_path, "stage2", 9, quiet=True) as second:
        assert [r["loss/flow"] for r in second.resume(3)] == [1.0, 2.0, 3.0]
        second.train(4, RECORD | {"loss/flow": 40.0})
    assert [(r["step"], r["kind"]) for r in lines(tmp_path)] == [
        (1, "train"), (1, "val"), (2, "train"), (2, "val"), (3, "train"), (3, "val"), (4, "train"),
    ]  # fmt: skip
    assert lines(tmp_path)[-1]["loss/flow"] == 40.0
    second.resume(-1)
    assert lines(tmp_path) == []


def test_the_console_line(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("train.telemetry.time", SimpleNamespace(monotonic=lambda: now[0]))
    with Telemetry(tmp_path, "stage1", 250, every=2) as telemetry:
        now[0] += 7  # the first step is slow and does not count for the ETA
        for step in range(38, 41):
            telemetry.train(step, {**RECORD, "loss/flow": float(step)})
            now[0] += 0.5
        telemetry.val(40, {"val/loss": 0.75, "val/psnr": 21.5})
        uneven = {**RECORD, "peak_memory_bytes": 5e9, "seconds": 1.5, "mfu": 0.1}
        telemetry.train(41, uneven, ["loss spike at step 41"])
        telemetry.train(42, RECORD)
    out, err = capsys.readouterr()
    first, second, val, last = out.splitlines()
    assert first.startswith("stage1   step  38/250  flow 38  ")
    assert first.endswith("ETA -")
    # Mean of steps 39 and 40; 4 samples in 1 s, 0.04 s of it waiting; 210 steps of half a second are left.
    assert second == (
        "stage1   step  40/250  flow 39.5    |g| student 1.93    lr 3.0e-04    4.00 samples/s"
        "  2560 tokens/s  MFU 30.0%  HFU 40.0%  wait  4%  1.2 GB  ETA 1:45"
    )
    assert val == "stage1   step  40/250  val  loss 0.75    psnr 21.5  "
    # 2560 tokens in 2 s; 10 % over three quarters of the time, 30 % over the rest
    assert "  1280 tokens/s  MFU 15.0%  HFU 40.0%" in last
    assert err == "warning: loss spike at step 41\n"


def test_a_device_with_memory_of_its_own_shows_both(tmp_path, capsys):
    with Telemetry(tmp_path, "stage1", 1) as telemetry:
        telemetry.train(1, {**RECORD, "peak_memory_bytes": 5e9, "peak_host_bytes": 2.5e9})
    assert "  5.0 GB, host 2.5 GB  took" in capsys.readouterr().out


def test_other_ranks_are_silent(tmp_path, capsys):
    with Telemetry(tmp_path / "x", "stage1", 1, main=False) as telemetry:
        telemetry.resume(0)
        telemetry.train(1, RECORD)
        telemetry.val(1, {"val/loss": 1.0})
    assert not (tmp_path / "x").exists() and "".join(capsys.readouterr()) == ""


def test_numbers_of_all_ranks_are_sums_and_maxima():
    tables = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, all_reduce_sum=lambda t: tables.append(t.clone()) or t)
        of_all_ranks(world, 0.25 + rank, rank + 1)
    tables[1][1, 2:] = torch.tensor([7.0, 9e12], dtype=torch.float64)  # the other rank's memory
    world = SimpleNamespace(rank=0, size=2, all_reduce_sum=lambda table: tables[0] + tables[1])
    told = of_all_ranks(world, 0.0, 0)
    assert told["data_seconds"] == 1.25 and told["data_damaged"] == 3
    assert told["peak_host_bytes"] == 9e12 and told["peak_memory_bytes"] > 1e7


class Recording:
    id = "r"

    def __init__(self, fails=False):
        self.fails, self.told = fails, []

    def log(self, step, numbers):
        if self.fails:
            raise ConnectionError("the server has gone")
        self.told.append((step, numbers))

    def media(self, step, name, path):
        self.told.append((step, name, path))

    def close(self):
        self.told.append("closed")


def test_trackers_get_what_the_file_got_and_one_that_fails_is_given_up(tmp_path, capsys):
    good, bad = Recording(), Recording(fails=True)
    with Telemetry(tmp_path, "stage1", 3, quiet=True, trackers=[bad, good]) as telemetry:
        telemetry.train(1, RECORD)
        telemetry.val(1, {"val/loss": 1.0}, {"picture": tmp_path / "a.png"})
    assert good.told == [
        (1, {f"stage1/{name}": value for name, value in RECORD.items()}),
        (1, {"stage1/val/loss": 1.0}),
        (1, "stage1/picture", tmp_path / "a.png"),
        "closed",
    ]
    assert bad.told == []
    assert capsys.readouterr().err == (
        "Recording failed (the server has gone): going on without it, metrics.jsonl has all\n"
    )
    assert [r["kind"] for r in lines(tmp_path)] == ["train", "val"]


def test_a_file_that_cannot_be_written_is_one_sentence(tmp_path):
    with Telemetry(tmp_path, "stage1", 3, quiet=True) as telemetry:
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(Is a directory\)"):
            telemetry.train(1, RECORD)
