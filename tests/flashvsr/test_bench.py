"""Measurements: the right things in the right units, selections as plans make them, errors in a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flashvsr import flops
from flashvsr.attention import backends
from flashvsr.attention.plans import SparseCausal
from flashvsr.base.cli import UserError
from flashvsr.bench import attention, gpu, modules
from flashvsr.bench.models import Subject
from flashvsr.bench.pipeline import bench_pipeline
from flashvsr.bench.report import Report, Row
from flashvsr.commands import bench

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick_ceiling(monkeypatch):
    from flashvsr.base import measure

    monkeypatch.setattr(measure, "matmul_rate", lambda device, dtype: 2e11)


@pytest.fixture
def tiny() -> Subject:
    return Subject("tiny", (64, 128), CPU, torch.float32)


def test_a_table_and_json_say_the_same():
    rows = [Row("dense", 0.5, 10**11, 2**20, 0.5), Row("ours", 0.25, 2 * 10**10, None, 0.5, "note")]
    report = Report("title", {"device": CPU}, 4e11, rows, {"density": 0.2})
    lines = report.table().splitlines()
    assert lines[-2].split() == ["dense", "500.00", "0.2", "50%", "1.00x", "1"]
    assert lines[-1].split() == ["ours", "250.00", "0.08", "20%", "2.00x", "note"]
    ours = json.loads(json.dumps(report.as_dict()))
    assert ours["rows"][1]["work_per_second"] == 8e10 and ours["rows"][1]["vs_dense"] == 2
    assert ours["density"] == 0.2 and ours["machine"]["torch"] == torch.__version__


def test_the_clip_is_chosen_as_a_plan_chooses():
    shape = attention.whole_clip(10, 128, 128, (2, 4, 4), heads=3, head_dim=16)
    q, k, v = shape.inputs(CPU, torch.float32)
    plan = SparseCausal((10, 8, 8), block=(2, 4, 4), head_dim=16, ratio=2.0, backend="gather")
    plan.attend(0, *(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.equal(plan.selections[0].mask(), shape.choose(q, k, None, None).mask())


def test_the_steady_chunk_of_the_release():
    shape = attention.steady(768, 1408)
    assert (
        shape.tokens == (8448, 4 * 8448)
        and shape.per_chunk == 66
        and shape.ratio == 2 * 768 * 1280 / (768 * 1408)
    )


@pytest.mark.parametrize("backward", [False, True])
def test_attention(backward):
    shape = attention.of_density(1024, 0.25, 32, heads=2, head_dim=16)
    report = attention.bench(shape, CPU, torch.float32, backward=backward, repeats=1)
    rows = {row.name: row for row in report.rows}
    kept = int(32 * 32 * 0.25) - 1  # one budget for all pairs, less one
    assert report.extra["density"] == kept / 32**2
    work = 4 * kept * 32**2 * 2 * 16
    assert rows["gather"].work == work and rows["dense sdpa"].work == 4 * 1024**2 * 32
    assert rows["ideal"].seconds == pytest.approx(rows["dense sdpa"].seconds * kept / 32**2)
    assert rows["gather"].dense == rows["dense sdpa"].seconds
    assert ("gather + backward" in rows) == backward
    if backward:
        assert rows["gather + backward"].work == 3 * work
    assert "flex" in report.extra["not_usable"] and not report.extra["failed"]


def test_a_backend_that_breaks_is_named_and_the_others_are_measured(monkeypatch):
    module = type("Broken", (), {"why_not": staticmethod(lambda *facts: None)})

    def broken(q, k, v, selection):
        raise RuntimeError("out of resources\nsecond line")

    module.attention = staticmethod(broken)
    monkeypatch.setattr(
        backends, "why_not", lambda name, *facts: None if name in ("gather", "flex") else "no"
    )
    real = backends.importlib.import_module
    monkeypatch.setattr(
        backends.importlib, "import_module", lambda name: module if name.endswith("flex") else real(name)
    )
    shape = attention.of_density(256, 0.5, 32, heads=1, head_dim=16)
    report = attention.bench(shape, CPU, torch.float32, repeats=1)
    assert report.extra["failed"] == {"flex": "RuntimeError: out of resources"}
    assert {"gather", "gather + backward"} <= {row.name for row in report.rows}


def test_a_step_of_the_transformer(tiny):
    report = modules.bench_dit(tiny, repeats=1, profile=True)
    rows = {row.name: row for row in report.rows}
    assert set(report.extra["shares"]) == {"attention", "convolution", "matmul", "other"}
    tokens = 2 * 4 * 8
    step = rows["step"].work
    kept = report.extra["density"] * tokens * 4 * tokens  # a ring of four chunks
    expected = flops.dit(tiny.config.dit, tokens=tokens, pairs=round(kept))
    assert step == pytest.approx(expected.forward, rel=0.01)
    blocks = sum(row.work for name, row in rows.items() if name.startswith("block") and "choose" not in name)
    outside = sum(expected.parts[name] for name in ("patch", "time", "head"))
    assert 6 * blocks + outside == pytest.approx(step, rel=1e-3)


@pytest.mark.parametrize("run", [modules.bench_projector, modules.bench_decoder])
def test_other_modules(run, tiny):
    rows = run(tiny, repeats=1).rows
    assert all(row.seconds > 0 and row.work > 0 for row in rows) and len(rows) >= 3
    if run is modules.bench_projector:
        parts = flops.projector(tiny.config.lr_projector, frames=8, height=64, width=128, start=False).parts
        assert {row.work for row in rows[1:]} == {parts["conv1"], parts["conv2"]}


def test_the_pipeline_and_its_parts(tiny):
    report = bench_pipeline(tiny, repeats=1)
    step, *parts = report.rows
    assert report.extra["fps"] == 8 / step.seconds and "FPS" in step.note
    names = [row.name for row in parts]
    assert names == ["upsampling", "projector", "DiT", "decoder", "colour fix", "to uint8 on the CPU", "rest"]
    assert all(row.seconds > 0 for row in parts)
    assert step.work == sum(row.work for row in parts if row.work)


def test_the_campaign_goes_through_on_a_cpu(tiny):
    said = []
    done = gpu.run(tiny, [(64, 64)], minutes=5, repeats=1, compiling=False, say=said.append)
    assert not done.missing and len(done.reports) == 3
    names = [row["name"] for row in done.switches]
    assert names[0] == "plain" and "projector as matrix products" in names
    # float32: other ways of computing the same move a pixel by a level at most
    assert all(row["max_error"] <= 1 and row["neutral"] for row in done.switches)
    text = done.text()
    assert "steady chunk of 64x64" in text and "training clip of 10 latents" in text and "FPS" in text
    json.dumps(done.as_dict())


def test_a_campaign_without_time_says_what_is_missing(tiny):
    done = gpu.run(tiny, [tiny.size], minutes=0.0, repeats=1, compiling=False, say=lambda text: None)
    assert set(done.missing.values()) == {"no time left"} and not done.reports


def test_a_switch_that_changes_frames_is_not_neutral(tiny, monkeypatch):
    def spoil(model):
        model.tc_decoder.decoder["26"].weight.data.mul_(1.5)

    monkeypatch.setattr(gpu, "switches", lambda subject, compiling: [gpu.Switch("spoil", apply=spoil)])
    done = gpu.Campaign()
    gpu._switches(done, tiny, gpu.measure.Deadline(60), 1, False, lambda text: None)
    plain, spoiled = done.switches
    assert plain["neutral"] and plain["psnr"] is None
    assert spoiled["max_error"] > 3 and not spoiled["neutral"]


@pytest.mark.slow
def test_compiled_blocks_are_two_functions_for_all_layers(tiny):
    from torch._dynamo.utils import counters

    model = tiny.model("dit", "lr_projector")
    call, dit, plan, _ = modules.step_of(tiny)
    with torch.no_grad():
        expected = call()[0]
        model.dit = dit
        dit.compile_blocks()
        before = counters["stats"]["unique_graphs"]
        assert (call()[0] - expected).abs().max() < 1e-5
    assert counters["stats"]["unique_graphs"] == before + 2


@pytest.mark.parametrize(
    "argv,sentence",
    [
        (["attention", "--density", "1.5"], "density=1.5 must be above 0"),
        (["attention", "--tokens", "1000"], "tokens=1000 must be a multiple"),
        (["attention", "--backends", "flex"], "'flex' cannot be used here"),
        (["attention", "--repeats", "0"], "--repeats 0 must be above 0"),
        (["dit", "--size", "big"], "--size 'big' must be a height and a width"),
        (["pipeline", "--scale", "tiny", "--size", "100x64"], "multiples of 64x64 at scale=tiny"),
        (["projector", "--scale", "huge"], "scale='huge' is unknown; there are tiny"),
        (["decoder", "--device", "warp"], "--device warp cannot be used here"),
    ],
)
def test_mistakes_end_in_a_sentence(argv, sentence):
    with pytest.raises(UserError, match=sentence):
        bench.main(argv)


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "new" / "attention.json"
    argv = ["attention", "--tokens", "256", "--block", "32", "--heads", "1", "--head-dim", "16"]
    assert bench.main([*argv, "--device", "cpu", "--repeats", "1", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "vs dense" in out and "not usable here: flex" in out
    assert json.loads(path.read_text())["rows"][0]["name"] == "dense sdpa"


def test_tiling_is_measured_against_untiled(tmp_path, capsys):
    """A tile larger than the picture is the same picture; smaller ones compute more and differ."""
    out = tmp_path / "tiling.json"
    argv = ["tiling", "--scale", "tiny", "--device", "cpu", "--size", "16x32", "--tiles", "64,16"]
    bench.main([*argv, "--overlap", "8", "--frames", "5", "--json", str(out)])
    untiled, same, cut = json.loads(out.read_text())["tilings"]
    assert (untiled["tiles"], same["tiles"], cut["tiles"]) == (1, 1, 3)
    assert same["ssim"] == pytest.approx(1) and same["psnr"] is None and cut["psnr"] < 60
    assert cut["redundancy"] == 3 * 64 * 64 / (64 * 128) and cut["seconds"] > 0 and untiled["peak_bytes"] > 0
    assert "1.50x the pixels" in capsys.readouterr().out
    with pytest.raises(UserError, match="--tiles big must be whole numbers"):
        bench.main([*argv[:-1], "big"])


def test_similarity_of_frames_is_that_of_the_evaluation():
    from eval.metrics.psnr import psnr
    from eval.metrics.ssim import ssim
    from flashvsr.bench import tiling

    a = tiling.moving_picture(3, 24, 40)
    b = (a.astype(int) + np.random.default_rng(0).integers(-20, 20, a.shape)).clip(0, 255).astype(np.uint8)
    assert tiling.psnr(a, b) == pytest.approx(psnr(a, b), abs=1e-6)
    assert tiling.ssim(a, b) == pytest.approx(ssim(a, b), abs=1e-5) and tiling.ssim(a, b) < 0.99
