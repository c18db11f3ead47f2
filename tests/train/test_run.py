"""All five stages in miniature, in this process: what each leaves, what it must not see, and resuming."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

import flashvsr
from data import build
from flashvsr.base.cli import UserError
from flashvsr.base.draws import Draw
from flashvsr.streaming.stream import Stream, StreamSettings
from train import loop
from train.config import compose
from train.launch import World
from train.stages import make_stage
from train.turns import reduce

WORLD = World(0, 1, 0, torch.device("cpu"))
SMALL = [
    "data.height=64", "data.width=64", "data.latents_per_clip=8", "data.slots=2", "data.val_slots=1",
    "data.short_side=96", "data.workers=0", "scale.train.vae.crop=32", "steps=2", "save_every=1",
    "validate_every=2", "optim.warmup=0", "log.quiet=true", "seed=3",
]  # fmt: skip


def config(stage, folder, *overrides, run="mini"):
    return compose(
        stage, [f"runs_dir={folder}", f"run={run}", f"data.shards={folder}/data", *SMALL, *overrides]
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run that has been through every stage."""
    folder = tmp_path_factory.mktemp("runs")
    build.build([], folder / "data", synthetic_clips=3, quiet=True)
    for stage in ("vae", "teacher", "sparse_causal", "one_step", "decoder"):
        assert loop.run(config(stage, folder), WORLD) == 0
    return folder


def metrics(folder, stage, run="mini"):
    return [json.loads(line) for line in (folder / run / stage / "metrics.jsonl").read_text().splitlines()]


def test_every_stage_leaves_what_it_is_for(runs):
    kinds = {"stage1": "teacher", "stage2": "sparse", "stage3": "one-step"}
    for stage, kind in kinds.items():
        model = flashvsr.load(runs / "mini" / stage / "export")
        assert model.info.kind == kind and model.dit is not None and model.lr_projector is not None
        assert model.info.projector_mode == ("clip" if stage == "stage1" else "causal")
        assert model.info.area == 64 * 64
    assert flashvsr.load(runs / "mini/vae/export").vae is not None
    assert flashvsr.load(runs / "mini/decoder/export").tc_decoder is not None


def test_metrics_hold_every_term_and_its_gradient_norm(runs):
    (first, *_, last) = metrics(runs, "stage3")
    assert first["kind"] == "val" and first["step"] == 0 and last["kind"] == "val" and last["step"] == 2
    train = [m for m in metrics(runs, "stage3") if m["kind"] == "train"]
    assert [m["step"] for m in train] == [1, 2]
    assert "loss/dmd" not in train[0] and "loss/fake" in train[0]  # the student learns every second step
    for term in ("dmd", "mse", "lpips", "fake"):
        assert train[1][f"loss/{term}"] > 0 and train[1][f"term_grad/{term}"] > 0
    assert {"bicubic/psnr", "val/psnr", "val/loss"} <= last.keys()


def test_the_first_step_already_saves_and_validates(runs, tmp_path):
    shutil.copytree(runs / "mini/vae/export", tmp_path / "start")
    overrides = ["save_every=100", "validate_every=100", "keep_last=5", f"init={tmp_path}/start", "steps=3"]
    assert loop.run(config("vae", runs, *overrides, run="first"), WORLD) == 0
    saved = sorted(path.name for path in (runs / "first/vae/checkpoints").iterdir())
    assert saved == ["step-000001", "step-000003"]
    assert [m["step"] for m in metrics(runs, "vae", "first") if m["kind"] == "val"] == [0, 1, 3]


def test_validation_gives_the_numbers_of_eval_on_what_it_saved(runs, tmp_path):
    """`python -m eval` on samples/, read from disk, equals the last `val` line and bicubic's numbers."""
    from eval.__main__ import main as evaluate

    samples = runs / "mini/stage3/samples"
    wanted = ["--metrics", "psnr,ssim,lpips,tdiff,chunk_edge_ratio"]
    methods = ["--method", f"sr={samples}/SR", "--method", "bicubic"]
    evaluate([*methods, "--data", str(samples), "--out", str(tmp_path / "check"), "--quiet", *wanted])
    means = json.loads((tmp_path / "check/eval.json").read_text())["means"]
    *_, last = (m for m in metrics(runs, "stage3") if m["kind"] == "val")
    for mean, prefix in zip(means, ("val", "bicubic"), strict=True):
        told = {k: v for k, v in last.items() if k.startswith(f"{prefix}/") and k != "val/loss"}
        assert len(told) == 5
        for name, value in told.items():
            assert mean["values"][name.split("/")[1]]["mean"] == pytest.approx(value, rel=1e-12), name
    assert (samples / "step-000002.png").exists() and (samples / "step-000002-clip-0.mp4").exists()


def test_a_gradient_that_is_not_finite_ends_the_run_before_it_does_harm(runs, monkeypatch):
    """With step, role, samples and the last checkpoint; which then continues as if nothing had been."""
    shutil.copytree(runs / "mini/vae", runs / "broken/vae")
    for folder in (runs / "mini").glob("*-*"):
        shutil.copytree(folder, runs / "broken" / folder.name)
    sound = loop.reduce

    def spoiled(losses, *rest):
        if len(list((runs / "broken/stage1/checkpoints").glob("step-*"))):
            losses.terms["flow"] = losses.terms["flow"] * float("inf")
        return sound(losses, *rest)

    monkeypatch.setattr(loop, "reduce", spoiled)
    said = r"loss/flow of role teacher is not finite at step 2 \(samples .*step-000001: lower"
    with pytest.raises(UserError, match=said):
        loop.run(config("teacher", runs, run="broken"), WORLD)
    monkeypatch.setattr(loop, "reduce", sound)
    assert loop.run(config("teacher", runs, run="broken"), WORLD) == 0
    a, b = (flashvsr.load(runs / run / "stage1/export").dit.state_dict() for run in ("mini", "broken"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_profile_of_a_few_steps_is_written_and_printed(runs, tmp_path, capsys):
    import gzip

    shutil.copytree(runs / "mini/vae/export", tmp_path / "start")
    overrides = [f"init={tmp_path}/start", "log.profile=2", "log.quiet=false"]
    assert loop.run(config("vae", runs, *overrides, run="profile"), WORLD) == 0
    folder = runs / "profile/vae/profile"
    trace = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))
    assert any("convolution_backward" in event["name"] for event in trace["traceEvents"])
    table = (folder / "operations.txt").read_text()
    assert "convolution_backward" in table and table in capsys.readouterr().out
    with pytest.raises(UserError, match="log.profile=9 is no step of 1 to steps=2"):
        config("vae", runs, "log.profile=9")


def test_stage_3_shows_a_panel_and_its_numbers(runs):
    """Before the first step the fake score is the teacher: both see the same, and DMD pushes nowhere."""
    first, last = (m for m in metrics(runs, "stage3") if m["kind"] == "val" and m["step"] in (0, 2))
    assert first["panel/gap"] == 0 and first["panel/direction"] == 0
    assert last["panel/gap"] > 0 and last["panel/direction"] > 0
    assert all(last[f"panel/fake@{sigma}"] > 0 for sigma in (0.1, 0.9))
    assert last["panel/saturation"] > 0 and last["panel/contrast"] > 0
    sheet = Image.open(runs / "mini/stage3/samples/panel-000002.png")
    assert sheet.size == (5 * 64, 64 + 14)


def test_the_same_command_again_does_nothing(runs, capsys):
    assert loop.run(config("teacher", runs), WORLD) == 0
    assert "complete" in capsys.readouterr().out


def test_stopping_and_going_on_equals_never_stopping(runs):
    """One step, then the same command again up to two, equals two steps at once, bit for bit."""
    copy = runs / "again"
    for stage in ("vae", "stage2"):
        shutil.copytree(runs / "mini" / stage, copy / stage)
    for folder in (runs / "mini").glob("*-*"):
        shutil.copytree(folder, copy / folder.name)
    for name, stage in (("teacher", "stage1"), ("one_step", "stage3")):
        full = runs / "mini" / stage
        shutil.copytree(full, copy / stage)
        shutil.rmtree(copy / stage / "export")
        shutil.rmtree(copy / stage / "checkpoints" / "step-000002")
        again = config(name, runs, "resume=force", run="again")
        assert loop.run(again, WORLD) == 0
        a = flashvsr.load(full / "export").dit.state_dict()
        b = flashvsr.load(copy / stage / "export").dit.state_dict()
        assert all(torch.equal(a[key], b[key]) for key in a)
        keep = ("step", "kind", "counter", "lr")
        numbers = [
            [{k: v for k, v in m.items() if k in keep or k.startswith(("loss/", "grad_norm/"))} for m in rows]
            for rows in (metrics(runs, stage), metrics(runs, stage, "again"))
        ]
        assert numbers[0] == numbers[1]


def test_training_from_the_cache_equals_training_without(runs):
    """Clips decoded, degraded and encoded at every step, or read as they were once made: the same bits."""
    shutil.copytree(runs / "mini/vae", runs / "off/vae")
    assert loop.run(config("teacher", runs, "data.latents=off", run="off"), WORLD) == 0
    assert not list((runs / "off").glob("latents-train*")) and list((runs / "mini").glob("latents-train*"))
    a, b = (flashvsr.load(runs / run / "stage1/export") for run in ("mini", "off"))
    for part in ("dit", "lr_projector"):
        one, other = getattr(a, part).state_dict(), getattr(b, part).state_dict()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_changed_settings_are_refused_with_a_diff(runs):
    shutil.rmtree(runs / "mini/stage2/export", ignore_errors=True)
    with pytest.raises(UserError, match=r"optim\.lr: .* -> 0\.5"):
        loop.run(config("sparse_causal", runs, "optim.lr=0.5", "steps=2"), WORLD)
    assert loop.run(config("sparse_causal", runs), WORLD) == 0  # and the run itself is intact


@pytest.mark.parametrize(("stage", "needed"), [("teacher", "vae"), ("sparse_causal", "stage=1|vae")])
def test_a_stage_before_the_one_it_needs(runs, stage, needed):
    with pytest.raises(UserError, match=needed):
        make_stage(config(stage, runs, run="empty"), WORLD)
    assert not (runs / "empty" / "stage1" / "export").exists()


def test_the_attention_backend_is_named_and_kept(runs):
    told = flashvsr.load(runs / "mini/stage2/export").info.provenance["attention"]
    assert told == "gather (auto; dense from density 0.7)"
    with pytest.raises(UserError, match="backend 'fast' is unknown; usable: auto, reference, gather"):
        make_stage(config("sparse_causal", runs, "stage.attention=fast"), WORLD)


@pytest.fixture(scope="module")
def one_step(runs):
    stage = make_stage(config("one_step", runs), WORLD)
    with torch.no_grad():  # a fake score equal to the teacher would give no direction at all
        stage.roles["fake"].module.dit.head.head.bias += 0.1
    clips = stage.feed.clips("train")
    sample = clips.sample(0)
    micro = {"segments": [{k: v[None] for k, v in s.items()} for s in sample["segments"]]}
    draw = Draw(0, 0, [0])
    return stage, stage.prepare(micro, draw), draw


def test_the_student_sees_nothing_of_hr(one_step):
    stage, inputs, draw = one_step
    losses = stage.student_loss(inputs, draw)
    blank = type(inputs)([torch.zeros_like(x) for x in inputs.hr], inputs.lr,
                         [torch.zeros_like(x) for x in inputs.latents], inputs.extra)  # fmt: skip
    assert torch.equal(losses.outputs[0], stage.student_loss(blank, draw).outputs[0])


def test_pixel_terms_reach_two_latents_and_dmd_all(one_step):
    stage, inputs, draw = one_step
    losses = stage.student_loss(inputs, draw)
    n = losses.at[0].shape[2]
    first = int(draw.step("pixel.window") * (n - 1))
    for term, inside in (("mse", {first, first + 1}), ("lpips", {first, first + 1}), ("dmd", set(range(n)))):
        (gradient,) = torch.autograd.grad(losses.terms[term].sum(), losses.at, retain_graph=True)
        reached = gradient.abs().amax((0, 1, 3, 4)) > 0
        assert {i for i in range(n) if reached[i]} == inside


def test_no_gradient_reaches_teacher_or_fake_in_the_students_turn(one_step):
    stage, inputs, draw = one_step
    losses = stage.student_loss(inputs, draw)
    sum(term.sum() for term in losses.terms.values()).backward()
    losses.outputs[0].sum().backward()
    assert all(p.grad is None for p in stage.teacher.parameters())
    assert all(p.grad is None for p in stage.roles["fake"].module.parameters())
    student = stage.roles["student"].trained()
    assert all(p.grad is not None for p in student.values())
    stage.roles["student"].optimizer.zero_grad()
    losses = stage.fake_loss(inputs, draw)
    losses.terms["fake"].sum().backward()
    losses.outputs[0].sum().backward()
    assert all(p.grad is None for p in student.values())


def test_the_prompt_stays_as_it_was(runs):
    """Frozen cross-attention keys and values: the prompt's K/V of stage 3 equal stage 1's."""
    first, last = (flashvsr.load(runs / f"mini/{s}/export") for s in ("stage1", "stage3"))
    assert torch.equal(first.prompt, last.prompt)
    for model in (first, last):
        model.denoiser()
    for a, b in zip(first.dit.blocks, last.dit.blocks, strict=True):
        assert torch.equal(a.cross_attn.prompt_k, b.cross_attn.prompt_k)
        assert torch.equal(a.cross_attn.prompt_v, b.cross_attn.prompt_v)


def test_an_adapter_is_merged_into_plain_weights(runs):
    """LoRA with EMA from an earlier export: only its targets and the projector change, names stay plain."""
    start = runs / "mini/stage1/export"
    overrides = ["stage.lora_rank=2", "optim.ema=0.9", "optim.lr=0.01", f"init={start}"]
    assert loop.run(config("teacher", runs, *overrides, run="lora"), WORLD) == 0
    before, after = (flashvsr.load(f) for f in (start, runs / "lora/stage1/export"))
    a, b = before.dit.state_dict(), after.dit.state_dict()
    assert a.keys() == b.keys()
    changed = {k for k in a if not torch.equal(a[k], b[k])}
    targets = [f"self_attn.{x}.weight" for x in "qkvo"] + ["cross_attn.q.weight", "cross_attn.o.weight"]
    assert changed == {k for k in a if k.endswith(tuple(targets))}
    c, d = before.lr_projector.state_dict(), after.lr_projector.state_dict()
    assert all(not torch.equal(c[k], d[k]) for k in c)


def test_the_decoder_can_learn_on_what_the_student_streams(runs):
    """`latents=student`: the clip in one masked forward gives the latents that streaming gives."""
    stage = make_stage(config("decoder", runs, "stage.latents=student", "stage.difference=0.5"), WORLD)
    micro, draw = next(stage.feed.batches(stage.feed.clips("train"), 0)), Draw(3, 0, [0])
    inputs = stage.prepare(micro, draw)
    lr, settings = inputs.lr[0], StreamSettings(area=64 * 64, local_range=None)
    noise = draw.normal("student.noise", (16, 8, 8, 8))[0]
    stream = Stream(stage.student.denoiser(), None, settings, lambda index, shape: noise[:, index])
    with torch.no_grad():
        streamed = torch.cat([stream.denoise(lr[:, :, :25]), stream.denoise(lr[:, :, 25:33])], 2)
    assert torch.allclose(inputs.latents[0], streamed, atol=2e-5)
    losses = stage.pixel_loss(inputs, draw)
    assert {"mse", "lpips", "difference", "vae_mse", "vae_lpips"} == losses.terms.keys()
    assert "latent" not in micro["segments"][0]  # nothing of HR is encoded for it


def first_inputs(stage):
    micro = next(stage.feed.batches(stage.feed.clips("train"), 0))
    draw = Draw(3, 0, micro["counters"].tolist())
    return stage.prepare(micro, draw), draw


def test_stage_2_can_follow_the_dense_teacher(runs):
    """A student that sees everything (three chunks, no selection) and reads LR as the teacher does is the
    teacher: velocity and maps agree. The causal plan and projector part them; only the student learns."""
    options = ["stage.loss.teacher=1", "stage.loss.attention_kl=1", "stage.loss.flow=0"]
    stage = make_stage(config("sparse_causal", runs, *options, "stage.sparse_ratio=null"), WORLD)
    inputs, draw = first_inputs(stage)
    short = replace(inputs, latents=[inputs.latents[0][:, :, :6]], lr=[inputs.lr[0][:, :, :25]])
    student = stage.roles["student"].module
    causal, student.lr_projector.config = student.lr_projector.config, stage.teacher.lr_projector.config
    same = stage.flow_loss(short, draw)
    assert same.terms["teacher"].item() < 1e-9 and abs(same.terms["attention_kl"].item()) < 1e-6
    student.lr_projector.config = causal
    losses = stage.flow_loss(inputs, draw)
    assert losses.terms["teacher"].item() > 1e-6 and losses.terms["attention_kl"].item() > 1e-6
    reduced = reduce(losses, 1)
    reduced.surrogate.backward()
    assert reduced.squares["attention_kl"] > 0 and reduced.squares["flow"] == 0
    assert student.dit.blocks[0].self_attn.q.weight.grad.abs().max() > 0
    assert all(p.grad is None for p in stage.teacher.parameters())


def test_stage_3_can_begin_with_regression_and_give_the_fake_a_projector(runs):
    options = ["stage.regression_steps=2", "stage.fake_projector=own", "stage.loss.first_frame=4"]
    stage = make_stage(config("one_step", runs, *options), WORLD)
    inputs, draw = first_inputs(stage)
    warm = stage.student_loss(inputs, draw)
    expected = (warm.outputs[0] - inputs.latents[0]).square().mean()
    assert warm.terms.keys() == {"regression"}
    assert warm.terms["regression"].item() == pytest.approx(expected.item(), rel=1e-5)
    later = stage.student_loss(inputs, Draw(3, 2, draw.ids))
    assert later.terms.keys() == {"dmd", "mse", "lpips"}
    fake = stage.roles["fake"]
    shared = make_stage(config("one_step", runs), WORLD)
    assert fake.count - shared.roles["fake"].count == sum(
        p.numel() for p in stage.teacher.lr_projector.parameters()
    )
    losses = stage.fake_loss(inputs, draw)
    losses.terms["fake"].sum().backward()
    losses.outputs[0].backward(losses.at[0].grad)
    assert all(p.grad is not None for p in fake.module.lr_projector.parameters())
    assert all(p.grad is None for p in stage.teacher.parameters())


def test_distribution_matching_alone_decodes_nothing(runs):
    stage = make_stage(config("one_step", runs, "stage.loss.mse=0", "stage.loss.lpips=0"), WORLD)
    inputs, draw = first_inputs(stage)
    assert "latent" not in next(stage.feed.batches(stage.feed.clips("train"), 0))["segments"][0]
    assert stage.student_loss(inputs, draw).terms.keys() == {"dmd"}
