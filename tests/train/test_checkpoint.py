"""Checkpoints: bit-exact continuation, whole or absent, strict accounting."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from flashvsr.base.cli import UserError
from train import checkpoint
from train.checkpoint import latest, load, load_optimizer, optimizer_tensors, save
from train.ema import Ema
from train.launch import World
from train.lock import run_lock
from train.optim import build_optimizer, lr_at, set_lr

META = {"stage": "stage1", "counter": 7}
PARTS = {
    "student": {"w": torch.arange(6.0).view(2, 3)},
    "student.ema": {"w": torch.ones(3, dtype=torch.bfloat16)},
}


ALONE = World(0, 1, 0, torch.device("cpu"))


class Run:
    """A small training run whose steps depend on nothing but the step number and the weights."""

    def __init__(self):
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(9, 17), nn.SiLU(), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(45, 2)
        )
        self.idle = nn.Parameter(torch.ones(2, 2))  # trained in name, but without a gradient so far
        self.params = {**dict(self.net.named_parameters()), "idle": self.idle}
        self.optimizer = build_optimizer(self.params, 1.0, 0.1, (0.9, 0.99))
        self.ema = Ema(self.params, 0.99)

    def train(self, first, last):
        for step in range(first, last):
            x = torch.randn(4, 1, 9, generator=torch.Generator().manual_seed(step))
            set_lr(self.optimizer, lr_at(step, base=1e-2, warmup=2, total=6, schedule="cosine"))
            self.optimizer.zero_grad()
            self.net(x).square().mean().backward()
            self.optimizer.step()
            self.ema.update(self.params)

    def parts(self):
        return {
            "student": self.params,
            "student.optimizer": optimizer_tensors(self.optimizer, self.params),
            "student.ema": self.ema.state_dict(),
        }

    def restore(self, restored):
        weights = restored.take("student")
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(weights[name])
        load_optimizer(self.optimizer, self.params, restored.take("student.optimizer"))
        self.ema.load_state_dict(restored.take("student.ema"))
        restored.finish()


def test_six_steps_equal_three_and_three_bit_for_bit(tmp_path):
    whole, first, second = Run(), Run(), Run()
    whole.train(0, 6)
    first.train(0, 3)
    path = save(tmp_path, 3, first.parts().items(), META, keep_last=2)
    second.train(0, 1)  # what a fresh object holds must not matter
    restored = load(path, stage="stage1")
    assert restored.step == 3 and restored.state("counter") == 7
    second.restore(restored)
    second.train(3, 6)
    for (part, a), b in zip(whole.parts().items(), second.parts().values(), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), (part, name)


def test_the_folder_is_what_the_docstring_says(tmp_path):
    path = save(tmp_path / "checkpoints", 40, PARTS.items(), META, keep_last=1)
    assert path == tmp_path / "checkpoints" / "step-000040" and latest(path.parent) == path
    assert {f.name for f in path.iterdir()} == {
        "student.safetensors", "student.ema.safetensors", "state.json", "manifest.json",
    }  # fmt: skip
    restored = load(path)
    taken = {part: restored.take(part) for part in PARTS}
    for part, tensors in PARTS.items():
        for name, tensor in tensors.items():
            assert taken[part][name].dtype == tensor.dtype and torch.equal(taken[part][name], tensor)


def test_old_and_abandoned_checkpoints_go(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step, PARTS.items(), META, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000030", "step-000040"]
    (tmp_path / ".step-000050.0a.part").mkdir()
    save(tmp_path, 35, PARTS.items(), META, keep_last=2)  # resumed from 30: 40 is a future that was given up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000030", "step-000035"]
    assert latest(tmp_path).name == "step-000035"


def test_every_nth_stays_beside_the_newest(tmp_path):
    for step in range(2, 22, 2):
        save(tmp_path, step, PARTS.items(), META, keep_last=2, keep_every=6)
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["06", "12", "18", "20"]
    save(tmp_path, 10, PARTS.items(), META, keep_last=2, keep_every=6)  # resumed from 6
    assert sorted(p.name[-2:] for p in tmp_path.iterdir()) == ["06", "10"]


def test_clock_jumps_do_not_matter(tmp_path, monkeypatch):
    """Order is by step: the newest has the oldest times, and the next is saved while the clock says 1970."""
    for step in (1, 2, 3):
        save(tmp_path, step, PARTS.items(), META, keep_last=3)
        for path in (tmp_path / f"step-{step:06d}", *(tmp_path / f"step-{step:06d}").iterdir()):
            os.utime(path, (1e9 - step, 1e9 - step))
    assert latest(tmp_path).name == "step-000003"
    monkeypatch.setattr(time, "time", lambda: 0.0)
    (tmp_path / ".step-000004.0a.part").mkdir()
    save(tmp_path, 4, PARTS.items(), META, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_tidying_ends_a_save_and_leaves_later_ones(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, PARTS.items(), META, keep_last=9)
    (tmp_path / ".step-000004.0a.part").mkdir()
    checkpoint.tidy(tmp_path, 5, keep_last=2, keep_every=3)
    assert sorted(p.name[-1] for p in tmp_path.iterdir()) == ["3", "4", "5", "6"]


def test_removing_is_all_or_nothing(tmp_path, monkeypatch):
    """Killed while the old one is removed: it is either there, whole, or hidden until it is tidied up."""
    save(tmp_path, 1, PARTS.items(), META, keep_last=1)
    real = checkpoint.shutil.rmtree

    def killed(path, **options):
        if ".old." not in path.name:
            return real(path, **options)
        os.unlink(path / "manifest.json")
        raise SystemExit

    monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
    with pytest.raises(SystemExit):
        save(tmp_path, 2, PARTS.items(), META, keep_last=1)
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-000002"] and len(list(tmp_path.iterdir())) == 2
    monkeypatch.undo()
    save(tmp_path, 3, PARTS.items(), META, keep_last=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000003"]


def test_a_torn_checkpoint_is_skipped_with_a_sentence(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step, PARTS.items(), META, keep_last=3)
    (tmp_path / "step-000003" / "manifest.json").unlink()
    weights = tmp_path / "step-000002" / "student.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert latest(tmp_path).name == "step-000001"
    said = capsys.readouterr().err.splitlines()
    assert "step-000003" in said[0] and "manifest.json is missing" in said[0]
    assert "step-000002" in said[1] and "student.safetensors has" in said[1]
    assert latest(tmp_path / "nowhere") is None


def test_mistakes_are_named(tmp_path):
    path = save(tmp_path, 5, PARTS.items(), META, keep_last=1)
    with pytest.raises(UserError, match="stage 'stage1', not of 'stage2'"):
        load(path, stage="stage2")
    restored = load(path)
    restored.take("student")
    for missing in ("student", "fake"):
        with pytest.raises(UserError, match=f"no part '{missing}'"):
            restored.take(missing)
    with pytest.raises(UserError, match="student.ema"):
        restored.finish()
    weights = path / "student.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="student.safetensors does not match its hash"):
        load(path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        load(path)


def test_optimiser_states_that_do_not_fit_are_refused():
    run = Run()
    run.train(0, 2)
    good = optimizer_tensors(run.optimizer, run.params)
    assert good["idle/step"] == 0 and "idle/exp_avg" not in good
    bad = {
        "no state of '0.weight'": {k: v for k, v in good.items() if not k.startswith("0.weight/")},
        "0.weight/exp_avg is absent": {k: v for k, v in good.items() if k != "0.weight/exp_avg"},
        r"0.weight/exp_avg is \(9, 17\)": {**good, "0.weight/exp_avg": good["0.weight/exp_avg"].T},
        "'9.weight/step', which is not trained": {**good, "9.weight/step": torch.tensor(1.0)},
    }
    for message, tensors in bad.items():
        with pytest.raises(UserError, match=message):
            load_optimizer(run.optimizer, run.params, tensors)


def test_killed_inside_saves_leaves_a_complete_checkpoint(tmp_path):
    code = (
        "import sys, torch, pathlib\nfrom train.checkpoint import save\n"
        "for step in range(1, 10**6):\n"
        "    parts = {'student': {f'{i}': torch.full((1000, 50), float(step)) for i in range(20)}}\n"
        "    save(pathlib.Path(sys.argv[1]), step, parts.items(), {'stage': 's'}, 1)\n"
        "    print(step, flush=True)\n"
    )
    for wait in (0.003, 0.011):
        with subprocess.Popen(
            [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True
        ) as process:
            done = int(process.stdout.readline())
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
        restored = load(latest(tmp_path))
        assert restored.step >= done
        assert all(bool((t == restored.step).all()) for t in restored.take("student").values())


def test_two_runs_in_one_directory(tmp_path):
    code = (
        "import sys, time, pathlib\nfrom train.launch import init_group\nfrom train.lock import run_lock\n"
        "with run_lock(pathlib.Path(sys.argv[1]), init_group('cpu')):\n    print('in', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "in\n"
        with (
            pytest.raises(UserError, match=f"process {process.pid} on .*run=NAME"),
            run_lock(tmp_path, ALONE),
        ):
            pass
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    with run_lock(tmp_path, ALONE):  # the killed process holds nothing
        pass
