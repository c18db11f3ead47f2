"""Benches of a file into a file: the ways make one file, and memory is what the process held."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flashvsr.base import measure
from flashvsr.bench import files
from flashvsr.bench.tiling import moving_picture
from flashvsr.commands import bench
from flashvsr.weights.folder import save_model

ROOT = Path(__file__).parents[2]
MIB = 2**20


@pytest.fixture(autouse=True)
def no_ceiling(monkeypatch):
    """What matrix products reach here is of no interest."""
    monkeypatch.setattr(measure, "matmul_rate", lambda *_: 1e12)


@pytest.fixture
def clip(tmp_path):
    return files.write_clip(tmp_path / "in.mp4", moving_picture(130, 16, 24))


def test_all_ways_make_the_same_file_and_gains_are_of_the_same_round(micro_model, clip, monkeypatch):
    rounds = {
        name: [[6.0, 9.0, 4.0], [5.0, 9.0, 4.0], [4.0, 3.0, 4.0]][i] for i, name in enumerate(files.WAYS)
    }

    def in_turns(fns, repeats, warmup):
        for fn in fns.values():
            fn()
        return rounds

    monkeypatch.setattr(measure, "in_turns", in_turns)
    report = files.bench_overlap(micro_model(), clip, frames=37, scale=2)
    ways = report.extra["ways"]
    assert [way["gain"] for way in ways] == [1, 1, 1.5] and all(way["same_file"] for way in ways)
    assert [row.seconds for row in report.rows] == [6, 5, 4] and "9.25 FPS, 1.50x" in report.rows[2].note
    assert report.extra["beside_model"] > 0


def test_another_file_is_seen(micro_model, clip, monkeypatch):
    real = files.upscale_file

    def other(method, clip, out, frames, **more):
        real(method, clip, out, frames, **more)
        if method.pipelined:
            out.write_bytes(out.read_bytes()[:-1])

    times = real(files.StreamingUpscaler(micro_model(), scale=1), clip, Path(clip).with_name("x.mp4"), 9)
    monkeypatch.setattr(files, "upscale_file", lambda *a, **k: other(*a, **k) or times)
    report = files.bench_overlap(micro_model(), clip, frames=9, repeats=1, scale=1)
    assert [way["same_file"] for way in report.extra["ways"]] == [True, True, False]
    assert "ANOTHER FILE" in report.rows[2].note


def test_memory_is_sampled_at_every_push(micro_model, clip, tmp_path, monkeypatch):
    """What the first 100 frames held and what all did, in made-up bytes: 20 MiB more from frame 101 on."""
    held = []

    def peak():
        return (220 if len(held) > 13 else 200) * MIB

    monkeypatch.setattr(measure, "resident_bytes", lambda: held.append(0) or 100 * MIB)
    monkeypatch.setattr(measure, "peak_rss_bytes", peak)
    report = files.bench_memory(
        micro_model(), clip, frames=None, page=tmp_path / "page.html", scale=1, pipelined=False
    )
    assert report.extra["first"] == {"resident": 200 * MIB} and report.extra["all"] == {"resident": 220 * MIB}
    assert report.extra["more"]["resident"] == pytest.approx(0.1)
    assert report.extra["samples"][-1] == {"frames": 130, "resident": 100 * MIB}
    assert "200.0 MiB over the first 100 frames, +10.00% over all 130" in report.facts["resident"]
    assert "frames done" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clip(micro_model, tmp_path):
    """600 frames in a process of its own: kept, those after the first 100 would be 35 MiB, 7 % of all."""
    model = micro_model()
    parts = {p: getattr(model, p) for p in ("dit", "lr_projector", "prompt", "tc_decoder")}
    save_model(tmp_path / "model", config=model.config, info=model.info, **parts)
    out = tmp_path / "memory.json"
    options = ["--model", tmp_path / "model", "--size", "128x192", "--times", "1", "--frames", "600"]
    command = [sys.executable, "-m", "flashvsr", "bench", "memory", *map(str, options), "--json", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["samples"][-1]["frames"] == 600 and found["more"]["resident"] < 0.02, found["facts"]


def test_bad_settings(tmp_path):
    from flashvsr.base.cli import UserError

    for options, sentence in (
        (["overlap", "--frames", "0"], "--frames 0 must be above 0"),
        (["memory", "--times", "0.5", "--frames", "9", "--scale", "tiny"], "scale=0.5 must be at least 1"),
        (["overlap", "--clip", str(tmp_path / "none.mp4"), "--scale", "tiny"], "none.mp4"),
    ):
        with pytest.raises(UserError, match=sentence):
            bench.main(options)
