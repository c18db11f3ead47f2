"""`data degrade`: clips and folders, kept or made again, replayed to the byte, refused in a sentence."""

import json
import subprocess
import sys

import numpy as np
import pytest

from data import __main__ as command
from data.degrade import Request, degrade_path
from flashvsr.base.cli import UserError, run
from flashvsr.base.video_io import read_frames
from tests.data.conftest import moving, write_clip


def pixels(path):
    return np.stack(list(read_frames(path)))


def call(*argv, code=0):
    with pytest.raises(SystemExit) as end:
        run(command.main, ["degrade", *map(str, argv), "--quiet"])
    assert end.value.code == code


def test_a_clip_as_frames_or_video_with_its_parameters(footage, tmp_path, capsys):
    call(footage / "cedar.mkv", tmp_path / "lr", "--seed", 3)
    lr = pixels(tmp_path / "lr")
    assert lr.shape == (5, 16, 16, 3)
    record = json.loads((tmp_path / "lr.json").read_text())
    assert record["seed"] == 3 and record["hr"] == [64, 64] and record["frames"] == 5
    call(footage / "cedar.mkv", tmp_path / "lr.v1.mkv", "--seed", 3)
    assert np.array_equal(pixels(tmp_path / "lr.v1.mkv"), lr)
    assert (tmp_path / "lr.v1.json").exists()
    assert "5 frames of 16x16, parameters in" in capsys.readouterr().out


def test_what_is_there_is_kept_unless_forced_and_never_overwritten_by_other_settings(
    footage, tmp_path, capsys
):
    out = tmp_path / "lr"
    call(footage / "cedar.mkv", out, "--preset", "dove")
    (out / "frame-000000.png").write_bytes(b"mine")
    call(footage / "cedar.mkv", out, "--preset", "dove")
    assert (out / "frame-000000.png").read_bytes() == b"mine"
    assert "kept" in capsys.readouterr().out
    call(footage / "cedar.mkv", out, "--preset", "dove", "--seed", 1, code=2)
    assert "made with seed 0, not 1: --force" in capsys.readouterr().err
    call(footage / "cedar.mkv", out, "--preset", "dove", "--seed", 1, "--force")
    assert pixels(out).shape == (5, 16, 16, 3)


@pytest.mark.parametrize("preset", ["realbasicvsr", "modern"])
def test_replay_gives_the_same_bytes_in_another_process(footage, tmp_path, preset):
    call(footage / "birch.mkv", tmp_path / "a", "--preset", preset, "--seed", 5)
    argv = ["degrade", footage / "birch.mkv", tmp_path / "b", "--replay", tmp_path / "a.json"]
    done = subprocess.run(
        [sys.executable, "-m", "data", *map(str, argv)], capture_output=True, text=True, check=True
    )
    assert "the same bytes as recorded" in done.stdout
    for frame in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / frame.name).read_bytes() == frame.read_bytes()
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_replay_is_for_the_clip_it_was_drawn_for(footage, tmp_path, capsys):
    call(footage / "cedar.mkv", tmp_path / "a")
    call(footage / "birch.mkv", tmp_path / "b", "--replay", tmp_path / "a.json", code=2)
    assert "13 frames of 64x80, the parameters are for 5 frames of 64x64" in capsys.readouterr().err
    call(footage / "cedar.mkv", tmp_path / "b", "--replay", tmp_path / "a.json", "--seed", 1, code=2)
    assert "drop --seed" in capsys.readouterr().err
    (tmp_path / "c.json").write_text("{}")
    call(footage / "cedar.mkv", tmp_path / "b", "--replay", tmp_path / "c.json", code=2)
    assert "is not the JSON of a degraded clip" in capsys.readouterr().err
    call(footage, tmp_path / "b", "--replay", tmp_path / "a.json", code=2)
    assert "name that clip" in capsys.readouterr().err


def test_a_folder_of_clips_goes_on_where_it_stopped(tmp_path):
    source, out = tmp_path / "hr", tmp_path / "lr"
    for name, frames in (("one.mkv", 3), ("deep/two.mkv", 2), ("deep/three.mkv", 4)):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        write_clip(source / name, moving(0, frames, 32, 36))
    request = Request(preset="realesrgan", quiet=True)
    assert degrade_path(source, out, request).endswith("3 of 3 clips made, 0 kept")
    first = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert {str(p) for p in first if p.suffix == ".json"} == {"one.json", "deep/two.json", "deep/three.json"}
    draws = [json.loads((out / f"{n}.json").read_text())["parameters"] for n in ("one", "deep/two")]
    assert draws[0]["noise_seed"] != draws[1]["noise_seed"]
    (out / "deep/two.json").unlink()  # as if killed before the clip was complete
    assert degrade_path(source, out, request).endswith("1 of 3 clips made, 2 kept")
    assert first == {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_bad_input_is_refused_and_leaves_nothing(footage, tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    (tmp_path / "empty").mkdir()
    write_clip(tmp_path / "tiny.mkv", moving(0, 2, 16, 16))
    before = set(tmp_path.iterdir())
    for argv, said in (
        ((footage / "cedar.mkv", tmp_path / "o", "--preset", "nicer"), "unknown degradation preset"),
        ((footage / "cedar.mkv", tmp_path / "o", "--scale", 0), "--scale 0 must be at least 1"),
        ((tmp_path / "tiny.mkv", tmp_path / "o", "--scale", 17), "too small for --scale 17"),
        ((tmp_path / "empty", tmp_path / "o"), "holds no video"),
        ((tmp_path / "nowhere", tmp_path / "o"), "does not exist"),
        ((broken, tmp_path / "o"), "cannot be read"),
        ((footage, tmp_path / "o.mp4"), "give a folder"),
    ):
        call(*argv, code=2)
        assert said in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


def test_sizes_that_the_scale_does_not_divide_are_cropped_and_said(tmp_path, capsys):
    write_clip(tmp_path / "odd.mkv", moving(0, 2, 35, 46))
    call(tmp_path / "odd.mkv", tmp_path / "lr")
    assert pixels(tmp_path / "lr").shape == (2, 8, 11, 3)
    assert "cropped from 46x35 to multiples of 4" in capsys.readouterr().out


FULL = """
import resource, signal, sys
from data import __main__ as command
from flashvsr.base.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))  # every file: as if the disk were full from there on
run(command.main, ["degrade", *sys.argv[1:], "--quiet"])
"""


def test_a_full_disk_ends_in_a_sentence_and_leaves_nothing(footage, tmp_path):
    argv = [sys.executable, "-c", FULL, str(footage / "cedar.mkv"), str(tmp_path / "lr")]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_clips_of_one_name_are_refused(tmp_path):
    (tmp_path / "hr").mkdir()
    write_clip(tmp_path / "hr" / "a.mkv", moving(0, 1, 16, 16))
    write_clip(tmp_path / "hr" / "a.mp4", moving(1, 1, 16, 16))
    with pytest.raises(UserError, match="would have the same result; rename one"):
        degrade_path(tmp_path / "hr", tmp_path / "lr", Request(quiet=True))
