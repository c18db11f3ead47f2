"""What a run tells: the metrics file line by line, resume cuts it, the console line, W&B only when asked."""

import json
import sys
from types import SimpleNamespace

import pytest

from flashvsr.base.cli import UserError
from train.telemetry import Telemetry

RECORD = {
    "loss/flow": 0.8123456789012345,
    "grad_norm/student": 1.93,
    "lr": 3e-4,
    "counter": 8,
    "seconds": 0.5,
    "data_seconds": 0.02,
    "samples": 2,
}


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_step_is_a_line_and_floats_are_exact(tmp_path, capsys):
    telemetry = Telemetry(tmp_path / "stage1", "stage1", 4, quiet=True)
    telemetry.val(0, {"val/loss": 1.5})
    for step in (1, 2):
        telemetry.train(step, RECORD)
    # Flushed at once: another process reads it while the run goes on.
    found = lines(tmp_path / "stage1")
    telemetry.close()
    assert found[0] == {"step": 0, "stage": "stage1", "kind": "val", "val/loss": 1.5}
    assert [(r["step"], r["kind"]) for r in found[1:]] == [(1, "train"), (2, "train")]
    assert all(found[1][name] == value for name, value in RECORD.items())
    assert found[1]["peak_memory_bytes"] > 10e6
    assert "".join(capsys.readouterr()) == ""


def test_resuming_cuts_what_came_after_and_a_torn_line(tmp_path):
    first = Telemetry(tmp_path, "stage2", 9, quiet=True)
    first.truncate(0)  # nothing there yet
    for step in range(1, 6):
        first.train(step, {"loss/flow": float(step)})
        first.val(step, {"val/loss": -float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "stage": "st')
    second = Telemetry(tmp_path, "stage2", 9, quiet=True)
    second.truncate(3)
    second.train(4, {"loss/flow": 40.0})
    second.close()
    assert [(r["step"], r["kind"]) for r in lines(tmp_path)] == [
        (1, "train"), (1, "val"), (2, "train"), (2, "val"), (3, "train"), (3, "val"), (4, "train"),
    ]  # fmt: skip
    assert lines(tmp_path)[-1]["loss/flow"] == 40.0
    second.truncate(-1)
    assert lines(tmp_path) == []


def test_the_console_line(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("train.telemetry.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr("train.telemetry.peak_memory_bytes", lambda: 1_234_000_000)
    telemetry = Telemetry(tmp_path, "stage1", 250, every=2)
    now[0] += 7  # the first step is slow and does not count for the ETA
    for step in range(38, 41):
        telemetry.train(step, {**RECORD, "loss/flow": float(step)})
        now[0] += 0.5
    telemetry.val(40, {"val/loss": 0.75, "val/psnr": 21.5})
    telemetry.close()
    first, second, val = capsys.readouterr().out.splitlines()
    assert first.startswith("stage1   step  38/250  flow 38  ")
    assert first.endswith("ETA -")
    # Mean of steps 39 and 40; 4 samples in 1 s, 0.04 s of it waiting; 210 steps of half a second are left.
    assert second == (
        "stage1   step  40/250  flow 39.5    |g| student 1.93    lr 3.0e-04    4.00 samples/s"
        "  wait  4%  1.2 GB  ETA 1:45"
    )
    assert val == "stage1   step  40/250  val  loss 0.75    psnr 21.5  "


def test_other_ranks_are_silent(tmp_path, capsys):
    telemetry = Telemetry(tmp_path / "x", "stage1", 1, wandb={}, main=False)
    telemetry.truncate(0)
    telemetry.train(1, RECORD)
    telemetry.val(1, {"val/loss": 1.0})
    telemetry.close()
    assert not (tmp_path / "x").exists() and "".join(capsys.readouterr()) == ""


def test_wandb_is_offline_without_a_key_and_gets_every_record(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        id="abc", log=lambda record, step: calls.append((record, step)), finish=lambda: calls.append("finish")
    )
    begun = {}
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **given: begun.update(given) or run)
    )
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    telemetry = Telemetry(tmp_path, "stage1", 3, quiet=True, wandb={"project": "p", "id": "abc"})
    telemetry.val(2, {"val/loss": 1.0})
    telemetry.close()
    assert begun == {"project": "p", "id": "abc", "mode": "offline", "resume": "allow", "dir": str(tmp_path)}
    assert calls == [({"stage1/val/loss": 1.0}, 2), "finish"]
    monkeypatch.setenv("WANDB_API_KEY", "k")
    begun.clear()
    assert Telemetry(tmp_path, "stage1", 3, wandb={}).wandb_id == "abc"
    assert "mode" not in begun


def test_asking_for_a_missing_wandb_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Telemetry(tmp_path, "stage1", 3, wandb={"project": "p"})
