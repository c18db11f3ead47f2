"""`python -m flashvsr upscale`: inputs and outputs of every kind, what is kept, exit codes, the report."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flashvsr import load, method
from flashvsr.__main__ import main
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter, probe, read_frames
from flashvsr.weights.folder import save_model
from tests.data.footage import scene
from tests.flashvsr.test_job import make, packets, times

ROOT = Path(__file__).parents[2]
H, W, SCALE = 10, 14, 2


@pytest.fixture
def model(micro_model, tmp_path):
    m = micro_model()
    parts = {p: getattr(m, p) for p in ("dit", "lr_projector", "prompt", "tc_decoder")}
    return save_model(tmp_path / "model", config=m.config, info=m.info, **parts)


def upscale(model, *arguments):
    return main(["upscale", *map(str, arguments), "--model", str(model), "--scale", str(SCALE)])


def read(path):
    return np.stack(list(read_frames(path)))


def expected(model, frames):
    upscaler = method(load(model), scale=SCALE)
    return np.concatenate([upscaler.push(frames), upscaler.flush()])


@pytest.fixture
def clips(tmp_path):
    """Two videos with sound, in a folder."""
    (tmp_path / "in").mkdir()
    for number in (1, 2):
        make(tmp_path / "in" / f"{number}.mp4", scene(number, 30 - number, H, W), sound="aac")
    return tmp_path / "in"


@pytest.mark.parametrize("n", [1, 21, 22, 33])
@pytest.mark.parametrize("size", [(1, 1), (9, 23)])
def test_n_frames_in_n_out_through_the_model(model, tmp_path, n, size):
    """Frames as the method gives them to whoever pushes them all at once."""
    clip = scene(n, n, *size)
    with VideoWriter(tmp_path / "in", 25, *size) as writer:
        writer.write(clip)
    assert upscale(model, tmp_path / "in", tmp_path / "out", "--quiet") is None
    got = read(tmp_path / "out")
    assert got.shape == (n, 2 * size[0], 2 * size[1], 3) and np.array_equal(got, expected(model, clip))


@pytest.mark.parametrize("form", ["several", "folder", "pattern"])
def test_several_inputs_go_into_a_folder(model, clips, tmp_path, form, capsys):
    given = {
        "several": [clips / "1.mp4", clips / "2.mp4"],
        "folder": [clips],
        "pattern": [f"{clips}/*.mp4"],
    }[form]
    assert upscale(model, *given, tmp_path / "out") is None
    for number in (1, 2):
        out, source = tmp_path / "out" / f"{number}.mp4", clips / f"{number}.mp4"
        assert times(out) == times(source) and packets(out) == packets(source)
        assert probe(out).width == SCALE * W
    changed = (tmp_path / "out" / "1.mp4").stat().st_mtime_ns
    (tmp_path / "out" / "2.mp4").unlink()
    capsys.readouterr()
    assert upscale(model, *given, tmp_path / "out") is None
    printed = capsys.readouterr().out
    assert printed.count("exists and is kept") == 1 and (tmp_path / "out" / "2.mp4").exists()
    assert (tmp_path / "out" / "1.mp4").stat().st_mtime_ns == changed


def test_one_of_several_that_fails_does_not_stop_the_others(model, clips, tmp_path, capsys):
    (clips / "1.mp4").write_bytes(b"no video")
    assert upscale(model, clips, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "1.mp4 cannot be read" in said and "1 of 2 inputs failed" in said
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["2.mp4"]


def test_inputs_and_outputs_that_do_not_go_together(model, clips, tmp_path):
    one = clips / "1.mp4"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.mp4").write_bytes(one.read_bytes())
    Image.fromarray(scene(1, 1)[0]).save(tmp_path / "a.png")
    for arguments, sentence in (
        ([one, clips / "2.mp4", tmp_path / "out.mp4"], "one output for 2 inputs; give a folder"),
        ([one, tmp_path / "b" / "1.mp4", tmp_path / "out"], "would both become .*upscale them apart"),
        ([clips, clips], "would be replaced by its own output"),
        ([f"{clips}/*.avi", tmp_path / "out"], r"\*.avi matches no file"),
        ([one, tmp_path / "out.xyz"], "unknown suffix '.xyz'"),
        ([one, tmp_path / "out.mp4", "--fps", "30"], "--fps has no effect on .*1.mp4"),
        ([one, tmp_path / "out.mp4", "--size", "4x4"], "IN is not -"),
        ([one, tmp_path / "out/", "--crf", "3"], "--crf has no effect on .*out, which is no video"),
        ([one, tmp_path / "out.mp4", "--codec", "h266"], "codec 'h266' is unknown"),
        ([one, tmp_path / "out.mp4", "--json", "x.json"], "--benchmark writes; give both"),
        ([one, tmp_path / "out.mp4", "--start", "9"], "--start lies behind its end"),
    ):
        with pytest.raises(UserError, match=sentence):
            upscale(model, *arguments)
    with pytest.raises(SystemExit):
        upscale(model, one, tmp_path / "out.mp4", "--start", "later")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b", "in", "model"]


def test_a_truncated_input_is_exit_code_1_with_what_could_be_read(model, tmp_path, capsys):
    source = make(tmp_path / "in.mkv", scene(6, 40, 48, 64), options={"g": "10"})
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    assert upscale(model, source, tmp_path / "out.mp4") == 1
    said = capsys.readouterr().err
    assert "warning: " in said and "what could be read is in" in said and "in.mkv" in said
    assert 5 < probe(tmp_path / "out.mp4").frames < 40


def test_pipes_of_raw_frames_and_y4m(model, tmp_path):
    clip = scene(3, 12, H, W)
    command = [sys.executable, "-m", "flashvsr", "upscale", "-", "-", "--model", str(model), "--scale", "2"]
    done = subprocess.run(
        [*command, "--size", f"{W}x{H}", "--fps", "30"], input=clip.tobytes(), capture_output=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(model, clip).tobytes()
    assert b"-s 28x20 -r 30" in done.stderr
    y4m = tmp_path / "in.y4m"
    planes = [b"FRAME\n" + bytes([40 + 10 * k]) * (H * W) + bytes([128]) * (H * W // 2) for k in range(9)]
    y4m.write_bytes(f"YUV4MPEG2 W{W} H{H} F25:1 Ip A1:1 C420jpeg\n".encode() + b"".join(planes))
    with open(y4m, "rb") as pipe:
        done = subprocess.run(command, stdin=pipe, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(model, read(y4m)).tobytes()


def test_a_video_with_everything_through_a_pipeless_run(model, clips, tmp_path):
    upscale(
        model, clips / "1.mp4", tmp_path / "out.mkv", "--start", "0.2", "--end", "0:01", "--10bit", "--quiet"
    )
    assert len(times(tmp_path / "out.mkv")) == 20 and probe(tmp_path / "out.mkv").has_audio
    frames = read(clips / "1.mp4")[5:25]
    got = read(tmp_path / "out.mkv").astype(int)
    assert np.abs(got - expected(model, frames)).mean() < 4


def test_the_benchmark_adds_up(model, clips, tmp_path, capsys):
    file = tmp_path / "report.json"
    upscale(model, clips / "1.mp4", tmp_path / "out.mp4", "--quiet", "--benchmark", "--json", file)
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    for said in (
        "first output",
        "latency p50",
        "latency p95",
        "throughput",
        "DiT",
        "model waited for frames",
        "peak rss",
    ):
        assert printed.count(said) == 1, said
    assert found["frames"] == 29 and found["fps"] == pytest.approx(29 / found["seconds"])
    parts = found["part_seconds"]
    assert sum(parts.values()) == pytest.approx(found["busy_seconds"]["model"])
    assert all(
        parts[name] > 0 for name in ("upsampling", "LR projector", "DiT", "decoder", "colour fix", "rest")
    )
    assert found["latency_p50"] <= found["latency_p95"] <= found["busy_seconds"]["model"]
    assert found["first_output_seconds"] <= found["seconds"]
    assert found["peak_bytes"]["rss"] > 2**26 and found["in_use"]["method"] == "one-step, streaming"


def test_resume_is_the_same_file(model, clips, tmp_path):
    upscale(model, clips / "1.mp4", tmp_path / "out", "--quiet")
    upscale(model, clips / "1.mp4", tmp_path / "resumed", "--quiet", "--resume")
    assert np.array_equal(read(tmp_path / "out"), read(tmp_path / "resumed"))
    assert not (tmp_path / "resumed.resume").exists()


@pytest.mark.slow
def test_ctrl_c_is_exit_code_130_and_a_playable_file(model, tmp_path):
    import signal
    import time

    make(tmp_path / "in.mp4", scene(1, 900, 32, 48), sound="aac")
    command = [
        sys.executable,
        "-m",
        "flashvsr",
        "upscale",
        "in.mp4",
        "out.mp4",
        "--model",
        "model",
        "--scale",
        "2",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env=_with_root(),
        # a shell's background jobs ignore Ctrl-C, and so would what they start
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*")) and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "frames are in out.partial.mp4" in said and "Traceback" not in said
    assert 8 < len(read(tmp_path / "out.partial.mp4")) < 900
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "model", "out.partial.mp4"]


def _with_root():
    import os

    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_an_estimate_writes_nothing_and_counts_the_calls(model, clips, tmp_path, capsys, monkeypatch):
    """29 frames: 25 in the first call, of which 21 come, and one more; 53 frames of a longer clip: 4 more."""
    from flashvsr.base import measure

    seconds = iter([30.0, 10.0, 30.0, 10.0])
    monkeypatch.setattr(measure, "timed", lambda fn: (fn(), next(seconds)))
    upscale(model, clips / "1.mp4", tmp_path / "out.mp4", "--quiet", "--estimate")
    make(tmp_path / "long.mp4", scene(1, 53, H, W))
    upscale(model, tmp_path / "long.mp4", tmp_path / "out.mp4", "--quiet", "--estimate")
    short, memory, longer = capsys.readouterr().out.splitlines()[1:]
    assert short == "time: about 00:40 for 29 frames"
    assert longer == "time: about 01:10 for 53 frames: a first call of 30 s and 4 of 10 s"
    upscaler = method(load(model), scale=SCALE)
    upscaler.push(scene(1, 1, H, W))
    assert memory == f"memory: about {upscaler.memory}, tiles: none" and "GiB (weights" in memory
    assert not (tmp_path / "out.mp4").exists()
    with pytest.raises(UserError, match="--estimate is of one input, not of 2"):
        upscale(model, clips, tmp_path / "out", "--estimate")
