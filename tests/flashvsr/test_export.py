"""What stops an export in the middle leaves the old one whole, and nothing half-written in its place."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flashvsr.__main__ import main
from flashvsr.base import files
from flashvsr.base.cli import UserError
from flashvsr.weights import export as export_module
from flashvsr.weights.convert import convert
from flashvsr.weights.export import export
from flashvsr.weights.folder import ModelInfo, save_model
from flashvsr.weights.load import load

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(micro_model, tmp_path):
    """A run with two finished stages, already exported once."""
    folder = tmp_path / "runs" / "micro"
    model = micro_model(provenance={"run": "micro"})
    parts = {p: getattr(model, p) for p in ("dit", "lr_projector", "prompt", "vae")}
    save_model(folder / "stage3" / "export", config=model.config, info=model.info, **parts)
    made = {"config": model.config, "info": ModelInfo("decoder"), "tc_decoder": model.tc_decoder}
    save_model(folder / "decoder" / "export", **made)
    export(folder, folder / "export")
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def train_on(run, micro_model):
    """The run's DiT changes: the next export is another one."""
    model = micro_model()
    model.dit = type(model.dit)(model.config.dit)
    parts = {p: getattr(model, p) for p in ("dit", "lr_projector", "prompt", "vae")}
    save_model(run / "stage3" / "export", config=model.config, info=model.info, **parts)


def test_a_failing_disk_leaves_the_old_export(run, micro_model, monkeypatch):
    before = content(run / "export")
    train_on(run, micro_model)
    copied = []

    def full(source, target):
        target.write_bytes(source.read_bytes())
        copied.append(target)
        if len(copied) == 3:
            raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(export_module.shutil, "copyfile", full)
    with pytest.raises(UserError, match="could not be copied .*No space left on device.*nothing was"):
        export(run, run / "export")
    assert len(copied) == 3 and content(run / "export") == before
    assert sorted(p.name for p in run.iterdir()) == ["decoder", "export", "stage3"]


def test_too_small_a_disk_is_noticed_before_writing(run, monkeypatch):
    before = content(run / "export")
    usage = shutil.disk_usage(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="needs 0.00 GB and its disk has 0.00 GB left: free some or choose"):
        export(run, run / "export")
    with pytest.raises(UserError, match="its disk has 0.00 GB left"):
        convert(run, run / "one.safetensors", "single")
    assert content(run / "export") == before and not (run / "one.safetensors").exists()


@contextmanager
def no_file_beyond(size):
    """A really failing disk: the system lets no file of this process grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS = {
    "export": lambda run, out: export(run, out),
    "single": lambda run, out: convert(run, out, "single", force=out.exists()),
    "diffusers": lambda run, out: convert(run, out, "diffusers", force=out.exists()),
    "save": lambda run, out: save_model(
        out, config=(m := load(run)).config, info=m.info, vae=m.vae, dit=m.dit, prompt=m.prompt
    ),
    "torch": lambda run, out: save_model(out, config=(m := load(run)).config, info=m.info, vae=m.vae),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_takes_no_more_bytes(run, micro_model, tmp_path, writer):
    place = tmp_path / "place"
    place.mkdir()
    out = place / ("one.safetensors" if writer == "single" else "out")
    write = WRITERS[writer]
    write(run, out)
    before = out.read_bytes() if out.is_file() else content(out)
    train_on(run, micro_model)
    with no_file_beyond(8192), pytest.raises(UserError, match="could not be (written|copied)") as error:
        write(run, out)
    assert "\n" not in str(error.value)
    assert (out.read_bytes() if out.is_file() else content(out)) == before
    assert list(place.iterdir()) == [out]


KILLED = """
import shutil, sys, time
from flashvsr.weights import export as module
whole = shutil.copyfile
def half(source, target):
    whole(source, target)
    print("copying", flush=True)
    time.sleep(60)
module.shutil.copyfile = half
module.export(sys.argv[1], sys.argv[2])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_export_leaves_the_old_one_and_its_rest_goes_later(run, micro_model, monkeypatch):
    before = content(run / "export")
    train_on(run, micro_model)
    command = [sys.executable, "-c", KILLED, str(run), str(run / "export")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "copying\n"
    (rest,) = [p for p in run.iterdir() if p.name.startswith(".export.")]
    long_ago = time.time() - 10 * files.ABANDONED
    os.utime(rest, (long_ago, long_ago))
    export(run, run / "export")
    assert rest.exists(), "what a living process writes is not touched"
    newer = content(run / "export")
    os.utime(rest, (long_ago, long_ago))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert content(run / "export") == newer != before and load(run / "export", verify=True).dit is not None
    assert rest.exists()
    export(run, run / "export")
    assert content(run / "export") == newer
    assert sorted(p.name for p in run.iterdir()) == ["decoder", "export", "stage3"]


def test_the_old_export_is_there_until_the_new_one_is(run, monkeypatch):
    """Looked at from outside at every system call that renames, the folder is always whole."""
    whole = set(content(run / "export"))
    seen = []

    def watched(rename):
        def call(*arguments):
            seen.append(set(content(run / "export")) if (run / "export").exists() else None)
            result = rename(*arguments)
            seen.append(set(content(run / "export")) if (run / "export").exists() else None)
            return result

        return call

    monkeypatch.setattr(files.os, "rename", watched(os.rename))
    monkeypatch.setattr(files, "_exchange", watched(files._exchange))
    export(run, run / "export")
    if sys.platform == "linux":
        assert seen and all(names == whole for names in seen)


def test_without_a_swap_the_two_renames_do(run, monkeypatch):
    before = content(run / "export")
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    export(run, run / "export")
    assert content(run / "export") == before
    assert sorted(p.name for p in run.iterdir()) == ["decoder", "export", "stage3"]


def test_others_may_read_an_export_as_the_umask_says(run):
    before = os.umask(0o027)
    try:
        export(run, run / "export")
        convert(run, run / "one.safetensors", "single")
        save_model(run / "m", config=(m := load(run)).config, info=m.info, dit=m.dit, vae=m.vae)
    finally:
        os.umask(before)
    written = [*(run / "export").iterdir(), run / "one.safetensors", *(run / "m").iterdir()]
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in written} == {p.name: "0o640" for p in written}


def test_an_export_equals_its_run_and_says_so(run, tmp_path, capsys):
    main(["export", str(run), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"{tmp_path / 'out'}: a model of kind one-step"
    a, b = load(run, dtype=None), load(tmp_path / "out", dtype=None)
    for part in ("dit", "lr_projector", "tc_decoder", "vae"):
        first, second = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(a.prompt, b.prompt)
