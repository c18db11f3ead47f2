"""Going on where a run stopped: killed at any moment, refused where the maths changed, safe on bad disks."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from data import build
from flashvsr.base.cli import UserError
from flashvsr.config import PRESETS
from tests.train import kill
from train import checkpoint, loop, resume
from train.config import STAGES, compose
from train.launch import World
from train.stages import make_stage

WORLD = World(0, 1, 0, torch.device("cpu"))
ROOT = Path(__file__).parents[2]
TRAINED = ["vae", "stage1", "stage2", "stage3", "decoder"]


# ---- killed ---------------------------------------------------------------------------------------------


def campaign(folder, *argv):
    """Rows of `python -m tests.train.kill`, in memory where that can be: fsync is not the question."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else folder
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.kill", *argv, "--out", folder / "table.json"],
        cwd=ROOT, env={**os.environ, "TMPDIR": str(memory)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.returncode in (0, 1)
    print(done.stdout)
    rows = json.loads((folder / "table.json").read_text())
    assert [row["difference"] for row in rows] == [""] * len(rows)
    return rows


# What costs most in a test: pictures of validations, and LPIPS. The slow campaigns have both.
LEAN = ("data.val_pictures=0", "scale.train.lpips=0", "scale.train.vae.lpips=0")


def test_killed_once_per_stage_equals_never_killed(tmp_path):
    """Weights, EMA, optimisers, exports and metrics, bit for bit."""
    rows = campaign(tmp_path, *LEAN, "--kills", "1", "--steps", "4")
    assert [row["stage"] for row in rows] == list(TRAINED)
    assert all(row["kills"] == 1 and row["equal"] for row in rows)


def test_two_processes_killed_in_stage_3_equal_two_never_killed(tmp_path):
    (row,) = campaign(tmp_path, *LEAN, "--stages", "3", "--kills", "1", "--steps", "4", "--processes", "2")
    assert row["kills"] == 1 and row["processes"] == "2" and row["equal"]


@pytest.mark.slow
def test_another_number_of_processes_continues_the_same_samples(tmp_path):
    """1, then 2, then 1: counters are equal, losses and norms to 1e-5."""
    rows = campaign(tmp_path, "--kills", "2", "--steps", "4", "--processes", "1+2")
    assert all(row["kills"] == row["resumes"] == 2 and row["equal"] for row in rows)


@pytest.mark.slow
def test_killed_while_a_thread_writes(tmp_path):
    rows = campaign(tmp_path, "--stages", "1", "3", "--kills", "6", "async_save=true", "save_every=1")
    assert all(row["equal"] and row["inside_saves"] for row in rows)


@pytest.mark.slow
def test_killed_twenty_times_per_stage(tmp_path, capsys):
    with capsys.disabled():
        rows = campaign(tmp_path, "--kills", "20", "--processes", "1", "2")
    assert len(rows) == 10 and all(row["kills"] == 20 and row["equal"] for row in rows)
    assert all(row["inside_saves"] >= 3 for row in rows)


# ---- refused --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def micro():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "micro", kill.SIZES)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A VAE and two of four steps of stage 1, microscopic; saved after steps 1 and 2."""
    folder = tmp_path_factory.mktemp("runs")
    build.build([], folder / "data", synthetic_clips=3, quiet=True)
    assert loop.run(config(folder, "vae", "steps=1"), WORLD) == 0
    assert loop.run(config(folder, "teacher", "keep_last=9"), WORLD) == 0
    shutil.rmtree(folder / "micro/stage1/checkpoints/step-000004")
    shutil.rmtree(folder / "micro/stage1/export")
    return folder


def config(folder, stage, *overrides, run="micro"):
    given = ["steps=4", f"runs_dir={folder}", f"data.shards={folder}/data", "data.latents=off"]
    return compose(stage, [*kill.MICRO, *given, *overrides, f"run={run}"])


@pytest.fixture
def halfway(runs, tmp_path):
    """A copy of that run to go on with; the folder of runs."""
    (tmp_path / "data").symlink_to(runs / "data")
    shutil.copytree(runs / "micro", tmp_path / "micro")
    return tmp_path


FREELY = [
    "run=other", "save_every=1", "keep_last=5", "keep_every=4", "async_save=true", "validate_every=1",
    "log.every=3", "parallel=fsdp2", "micro_batch_size=2", "checkpointing=full", "compile=true",
    "device=auto", "data.workers=1", "data.cache_gb=7", "expect=0.1", "scale.train.vae.steps=3",
]  # fmt: skip
REFUSED = [
    "seed=1", "steps=5", "global_batch_size=4", "optim.lr=1", "optim.warmup=1", "optim.schedule=constant",
    "optim.ema=0.5", "optim.clip=2.0", "precision=bf16", "data.height=64", "data.slots=5", "data.flip=false",
    "degrade=dove", "scale=small", "stage.lora_rank=2", "stage.projector_mode=causal", "init=elsewhere",
]  # fmt: skip


@pytest.mark.parametrize("override", FREELY)
def test_what_does_not_touch_the_maths_may_change(tmp_path, override):
    assert difference(tmp_path, override) == []


@pytest.mark.parametrize("override", REFUSED)
def test_what_touches_the_maths_is_in_the_diff(tmp_path, override):
    key = override.split("=")[0]
    assert any(
        line.startswith((f"{key}: ", f"{key}.")) and " -> " in line for line in difference(tmp_path, override)
    )


def difference(folder, override):
    old, new = (resume.plain(config(folder, "teacher", *more)) for more in ([], [override]))
    return resume.changed(old, new)


def test_every_free_key_exists():
    keys = set()

    def walk(values, prefix=""):
        for key, value in values.items():
            keys.add(f"{prefix}{key}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")

    for stage in STAGES:
        walk(resume.plain(compose(stage, [])))
    assert keys >= resume.FREE


def test_refused_unless_forced(halfway):
    changed = ["optim.lr=0.5"]
    with pytest.raises(UserError, match="already holds a run: give another run=NAME or resume=auto"):
        loop.run(config(halfway, "teacher", "resume=never"), WORLD)
    with pytest.raises(UserError, match=r"optim\.lr: 0\.001 -> 0\.5; give another run=NAME, or resume=force"):
        loop.run(config(halfway, "teacher", *changed), WORLD)
    assert loop.run(config(halfway, "teacher", *changed, "resume=force"), WORLD) == 0
    with pytest.raises(UserError, match=r"optim\.lr: 0\.5 -> 0\.001"):  # also when it is complete
        loop.run(config(halfway, "teacher"), WORLD)
    with pytest.raises(UserError, match="beyond steps=3"):
        loop.run(config(halfway, "teacher", *changed, "steps=3", "resume=force"), WORLD)


def test_other_clips_are_refused_wherever_they_lie(halfway):
    shutil.copytree(halfway / "data", halfway / "moved")
    stage = make_stage(config(halfway, "teacher", f"data.shards={halfway}/moved"), WORLD)
    folder = stage.config.stage_dir / "checkpoints"
    assert resume.Checkpoints(stage, folder).restore().step == 2
    build.build([], halfway / "fewer", synthetic_clips=2, quiet=True)
    stage = make_stage(config(halfway, "teacher", f"data.shards={halfway}/fewer"), WORLD)
    with pytest.raises(UserError, match="the clips of data.shards: [0-9a-f]{8} -> [0-9a-f]{8}"):
        resume.Checkpoints(stage, folder).restore()


def test_at_a_constant_rate_more_steps_go_on(halfway):
    """Two steps, then three: the weights of three at once."""
    constant = ["optim.schedule=constant"]
    shutil.copytree(halfway / "micro/vae", halfway / "whole/vae")
    shutil.rmtree(halfway / "micro/stage1")
    for steps, run in ((2, "micro"), (3, "micro"), (3, "whole")):
        assert loop.run(config(halfway, "teacher", *constant, f"steps={steps}", run=run), WORLD) == 0
    a, b = halfway / "micro/stage1", halfway / "whole/stage1"
    for part in ("teacher", "teacher.optimizer", "teacher.ema"):
        name = f"checkpoints/step-000003/{part}.safetensors"
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("hidden", [False, True])
def test_what_the_last_save_was_killed_before_removing_goes(halfway, monkeypatch, hidden):
    """The last checkpoint is there, the one it replaces too, or half removed. No save comes after it."""

    class Killed(BaseException):
        """No handler of errors runs."""

    def killed(path):
        if hidden:
            path.rename(path.with_name(f".{path.name}.old.part"))
        raise Killed

    monkeypatch.setattr(checkpoint, "_remove", killed)
    with pytest.raises(Killed):
        loop.run(config(halfway, "teacher"), WORLD)
    monkeypatch.undo()
    folder = halfway / "micro/stage1/checkpoints"
    assert len(list(folder.iterdir())) == 3
    assert loop.run(config(halfway, "teacher"), WORLD) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["step-000002", "step-000004"]


# ---- state ----------------------------------------------------------------------------------------------


def test_sample_counter_and_wandb_id_come_back(halfway):
    """Both are the state's own: another batch size goes on behind the samples seen, another name keeps the
    W&B run."""
    stage = make_stage(config(halfway, "teacher"), WORLD)
    checkpoints = resume.Checkpoints(stage, halfway / "checkpoints")
    checkpoints.save(resume.Position(step=2, counter=10, wandb_id="a1b2"))
    (halfway / "other").mkdir()
    (halfway / "other/vae").symlink_to(halfway / "micro/vae")
    other = make_stage(config(halfway, "teacher", "global_batch_size=4", "resume=force", run="other"), WORLD)
    position = resume.Checkpoints(other, halfway / "checkpoints").restore()
    assert position == resume.Position(2, 10, "a1b2")


def test_items_too_many_or_too_few_are_errors(halfway):
    stage = make_stage(config(halfway, "teacher"), WORLD)
    folder = stage.config.stage_dir / "checkpoints"
    path = checkpoint.latest(folder)
    restored = checkpoint.load(path)
    state = json.loads((path / "state.json").read_text())
    meta = {key: value for key, value in state.items() if key != "step"}
    parts = {part: restored.take(part) for part in ("teacher", "teacher.optimizer", "teacher.ema")}
    cases = {
        "no part 'teacher.ema'": ({k: v for k, v in parts.items() if "ema" not in k}, meta),
        "holds fake": ({**parts, "fake": parts["teacher"]}, meta),
        "says nothing of 'counter'": (parts, {k: v for k, v in meta.items() if k != "counter"}),
        "holds scheduler": (parts, {**meta, "scheduler": 3}),
    }
    for message, (some, more) in cases.items():
        checkpoint.save(folder, 2, some.items(), more, 2)
        with pytest.raises(UserError, match=message):
            resume.Checkpoints(stage, folder).restore()


# ---- a thread writes ------------------------------------------------------------------------------------


def stage_and_files(folder, async_save):
    stage = make_stage(
        config(folder, "teacher", f"async_save={str(async_save).lower()}", "keep_last=9"), WORLD
    )
    return stage, resume.Checkpoints(stage, folder / f"async-{async_save}")


def test_a_thread_writes_what_was_there_when_it_was_asked(halfway, monkeypatch):
    """Weights, moments and averages that change while it writes are not in the file."""
    go_on = threading.Event()
    written = {}
    for async_save in (False, True):
        stage, checkpoints = stage_and_files(halfway, async_save)
        if async_save:
            real = checkpoint.write_safetensors
            monkeypatch.setattr(
                checkpoint, "write_safetensors", lambda *a, real=real: (go_on.wait(60), real(*a))
            )
        with checkpoints:
            for step in (1, 2):  # the second uses the first one's host memory again
                engine = stage.roles["teacher"]
                with torch.no_grad():
                    for p in engine.trained().values():
                        p.grad = torch.full_like(p, float(step))
                engine.step(1e-3)
                stage.ema.update(engine.trained())
                go_on.clear()
                checkpoints.save(resume.Position(step))
                with torch.no_grad():
                    saved = {n: p.clone() for n, p in engine.trained().items()}
                    for p in engine.trained().values():
                        p.zero_()
                go_on.set()
                checkpoints.wait()
                with torch.no_grad():
                    for n, p in engine.trained().items():
                        p.copy_(saved[n])
        written[async_save] = {
            str(f.relative_to(checkpoints.folder)): f.read_bytes()
            for f in checkpoints.folder.rglob("*.safetensors")
        }
    assert written[True] == written[False] and len(written[True]) == 6


def test_the_loop_waits_for_the_copy_only(halfway, monkeypatch):
    """While the disk takes its time: `save` returns at once, the next `save` and the end wait."""
    disk, order = threading.Event(), []
    real = checkpoint.write_safetensors

    def slow(*args):
        assert disk.wait(60)
        order.append("written")
        return real(*args)

    monkeypatch.setattr(checkpoint, "write_safetensors", slow)
    stage, checkpoints = stage_and_files(halfway, True)
    with checkpoints:
        checkpoints.save(resume.Position(1))
        order.append("trained on")
        threading.Timer(0.2, disk.set).start()
        checkpoints.save(resume.Position(2))
        order.append("saved again")
    assert order[:4] == ["trained on", "written", "written", "written"] and order.count("written") == 6
    assert checkpoint.latest(checkpoints.folder).name == "step-000002"


# ---- bad disks, vanished data ---------------------------------------------------------------------------


@contextmanager
def full_in_the_tensors():
    """No file may grow beyond 100 kB: the system refuses the rest of the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_at_the_manifest():
    real = checkpoint.write_json

    def write(path, obj):
        if path.name == checkpoint.MANIFEST:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, obj)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_json", write)
        yield


@pytest.mark.parametrize("full", [full_in_the_tensors, full_at_the_manifest])
@pytest.mark.parametrize("async_save", ["false", "true"])
def test_a_full_disk_leaves_the_checkpoint_before(halfway, full, async_save):
    with full(), pytest.raises(UserError, match="step-000004.* could not be written .*(No space|large)"):
        loop.run(config(halfway, "teacher", f"async_save={async_save}"), WORLD)
    folder = halfway / "micro/stage1"
    assert sorted(os.listdir(folder / "checkpoints")) == ["step-000001", "step-000002"]
    assert not (folder / "export").exists()
    if full is full_in_the_tensors and async_save == "true":
        assert loop.run(config(halfway, "teacher"), WORLD) == 0


def test_a_folder_that_cannot_be_written(halfway):
    shutil.rmtree(halfway / "micro/stage1/checkpoints")
    (halfway / "micro/stage1/checkpoints").touch()
    with pytest.raises(UserError, match="step-000001 could not be written .*make the folder writable"):
        loop.run(config(halfway, "teacher"), WORLD)


def test_a_damaged_checkpoint_ends_in_one_sentence(halfway):
    folder = halfway / "micro/stage1/checkpoints"
    weights = folder / "step-000002/teacher.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match="does not match its hash.* delete this folder"):
        loop.run(config(halfway, "teacher"), WORLD)
    shutil.rmtree(weights.parent)
    assert loop.run(config(halfway, "teacher"), WORLD) == 0  # from step 1
    shutil.copytree(halfway / "micro/stage1/checkpoints", halfway / "micro/stage2/checkpoints")
    with pytest.raises(UserError, match="is a checkpoint of stage 'teacher', not of 'sparse_causal'"):
        loop.run(config(halfway, "sparse_causal"), WORLD)


def test_shards_that_vanish(halfway, monkeypatch):
    """In the middle and at the start: one sentence, what was saved stays; with the shards back it goes on."""
    shutil.copytree(halfway / "data", halfway / "shards")
    given = [f"data.shards={halfway}/shards", "save_every=1"]
    real = loop.train_step

    def lose(stage, micros, step):
        record = real(stage, micros, step)
        if step == 2:
            shutil.move(halfway / "shards", halfway / "gone")
        return record

    monkeypatch.setattr(loop, "train_step", lose)
    with pytest.raises(UserError, match="cannot open shard '.*/shards/.*No such file"):
        loop.run(config(halfway, "teacher", *given), WORLD)
    with pytest.raises(UserError, match="no index.json in .*shards"):
        loop.run(config(halfway, "teacher", *given), WORLD)
    assert checkpoint.latest(halfway / "micro/stage1/checkpoints").name == "step-000003"
    monkeypatch.setattr(loop, "train_step", real)
    shutil.move(halfway / "gone", halfway / "shards")
    assert loop.run(config(halfway, "teacher", *given), WORLD) == 0
