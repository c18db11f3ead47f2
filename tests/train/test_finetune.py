"""Every stage starts from a folder as FlashVSR v1.1 is released: its names, nothing of ours beside them."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

import flashvsr
from data import build
from flashvsr.base.cli import UserError
from flashvsr.config import WAN_MEAN, DiTConfig, ModelConfig, ProjectorConfig, TCDecoderConfig, VAEConfig
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.folder import save_model
from flashvsr.weights.names import FILES
from tests.train.test_grow import taehv
from train import loop
from train.__main__ import main
from train.config import compose
from train.launch import World
from train.stages import make_stage

WORLD = World(0, 1, 0, torch.device("cpu"))
RELEASE = ModelConfig(  # heads of 128 and blocks of 2x8x8, as in everything that has no flashvsr.json
    dit=DiTConfig(dim=128, ffn=32, layers=2, heads=1, freq_dim=16, text_dim=8),
    lr_projector=ProjectorConfig(hidden1=8, hidden2=8, out_dim=128),
    vae=VAEConfig(dim=4),
    tc_decoder=TCDecoderConfig(channels=(8, 8, 6, 6)),
)
SETTINGS = [
    "data.height=128", "data.width=128", "data.latents_per_clip=2", "data.slots=1", "data.val_slots=1",
    "data.latents=off", "data.images=1", "data.short_side=null", "data.workers=0", "scale.train.vae.crop=32",
    "scale.train.vae.latents=2", "stage.validation_steps=1", "steps=1", "save_every=1", "validate_every=1",
    "optim.warmup=0", "log.quiet=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "FlashVSR-v1.1"
    folder.mkdir()
    torch.manual_seed(0)
    modules = {
        "lr_projector": LRProjector(RELEASE.lr_projector),
        "tc_decoder": TCDecoder(RELEASE.tc_decoder),
        "vae": WanVAE(RELEASE.vae),
    }
    for part, module in modules.items():
        torch.save(module.state_dict(), folder / FILES[part])
    save_file(DiT(RELEASE.dit).state_dict(), folder / FILES["dit"])
    torch.save(torch.randn(1, 4, 8, dtype=torch.bfloat16), folder / FILES["prompt"])
    build.build([], folder.parent / "data", synthetic_clips=2, quiet=True)
    return folder


def config(stage, release, *overrides, run="run", init=True):
    runs = release.parent
    given = [s for s in SETTINGS if not s.startswith("stage.") or stage in ("teacher", "sparse_causal")]
    start = [f"init={release}"] if init else []
    return compose(
        stage, [f"runs_dir={runs}", f"run={run}", f"data.shards={runs}/data", *given, *start, *overrides]
    )


def trained(release, stage, folder, *overrides, run="run"):
    """What a stage leaves after one step."""
    made = make_stage(config(stage, release, *overrides, run=run), WORLD)
    micro = next(made.feed.batches(made.feed.clips("train"), 0))
    loop.train_step(made, [micro], 0)
    return flashvsr.load(save_model(release.parent / run / folder / "export", **made.parts()))


def changed(before, after):
    a, b = before.state_dict(), after.state_dict()
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def test_every_denoising_stage_starts_from_the_release_and_carries_it_on(release):
    """A teacher made of the released student; a sparse student; one step with that teacher's DMD, and one
    step by LoRA without any."""
    start = flashvsr.load(release)
    teacher = trained(release, "teacher", "stage1", run="teacher")
    assert (teacher.info.kind, teacher.info.projector_mode) == ("teacher", "clip")
    sparse = trained(release, "sparse_causal", "stage2", run="sparse")
    assert (sparse.info.kind, sparse.info.projector_mode) == ("sparse", "causal")
    given = f"teacher={release.parent}/teacher/stage1/export"
    one = trained(release, "one_step", "stage3", given, "stage.student_every=1", run="dmd")
    lora = trained(release, "one_step", "stage3", "stage.loss.dmd=0", "stage.lora_rank=2", run="lora")
    for model in (teacher, sparse, one, lora):
        assert model.config.dit == start.config.dit and model.config.vae.mean == WAN_MEAN
        assert torch.equal(model.prompt, start.prompt)
        assert not changed(start.vae, model.vae)
        assert changed(start.lr_projector, model.lr_projector)
    targets = tuple(
        [f"self_attn.{x}.weight" for x in "qkvo"] + ["cross_attn.q.weight", "cross_attn.o.weight"]
    )
    assert changed(start.dit, lora.dit) == {k for k in start.dit.state_dict() if k.endswith(targets)}
    assert (one.info.kind, lora.info.kind) == ("one-step", "one-step")


def test_the_decoder_goes_on_from_the_releases_and_may_learn_on_its_student(release):
    start = flashvsr.load(release)
    for name in ("vae", "student"):
        decoder = trained(release, "decoder", "decoder", f"stage.latents={name}", run=f"decoder-{name}")
        assert decoder.config.tc_decoder == RELEASE.tc_decoder
        assert "decoder.1.weight" in changed(start.tc_decoder, decoder.tc_decoder)
        assert decoder.info.provenance["start"] == "the TC decoder of init"


def test_the_decoder_grows_from_a_taehv_file_or_a_folder_that_holds_one(release):
    runs = release.parent
    (runs / "tiny").mkdir()
    torch.save({**taehv(), "encoder.0.weight": torch.zeros(1)}, runs / "tiny/taew2_1.pth")
    alone = config("decoder", release, f"init={runs}/tiny/taew2_1.pth", run="grown", init=False)
    with pytest.raises(
        UserError, match=r"give a model folder with init= in which taew2_1.pth lies beside it"
    ):
        make_stage(alone, WORLD)
    shutil.copy(release / FILES["vae"], runs / "tiny" / FILES["vae"])
    made = trained(release, "decoder", "decoder", f"init={runs}/tiny", run="grown")
    assert made.info.provenance["start"] == "grown from taew2_1.pth, its function unchanged"
    assert made.config.tc_decoder.channels == (64, 48, 32, 32)
    with pytest.raises(UserError, match="has no TC decoder|needs the dit"):
        make_stage(config("decoder", release, f"init={runs}/tiny", "stage.latents=student", run="g"), WORLD)


def test_a_wan_vae_is_tuned_with_its_statistics_kept(release):
    folder = release.parent / "Wan2.1"
    folder.mkdir()
    shutil.copy(release / FILES["vae"], folder)
    made = trained(release, "vae", "vae", f"init={folder}", run="vae")
    assert made.config.vae == RELEASE.vae and made.config.vae.mean == WAN_MEAN
    moved = changed(flashvsr.load(folder).vae, made.vae)
    assert {"encoder.conv1.weight", "decoder.conv1.weight", "conv1.weight", "conv2.weight"} <= moved


def test_a_student_from_v1_trains_in_the_form_that_it_is_exported_in(release):
    """v1's projector has the same tensors and is another function."""
    shutil.copytree(release, release.parent / "FlashVSR-v1")
    assert flashvsr.load(release.parent / "FlashVSR-v1").lr_projector.config.mode == "buffer"
    old = f"init={release.parent}/FlashVSR-v1"
    for stage in ("sparse_causal", "one_step"):
        made = make_stage(config(stage, release, old, "stage.loss.dmd=0" if stage == "one_step" else "seed=0",
                                 init=False, run="v1"), WORLD)  # fmt: skip
        mode = made.roles["student"].module.lr_projector.config.mode
        assert mode == made.parts()["info"].projector_mode == "causal"


def test_in_a_range_of_stages_only_the_first_starts_from_init(release, monkeypatch):
    started = []
    monkeypatch.setattr("train.launch.spawn", lambda command, n, **how: started.append(command) or 0)
    monkeypatch.setattr("train.launch.processes", lambda asked, device: 1)
    assert main(["stage=1..3", "init=FlashVSR-v1.1", "seed=4"]) == 0
    assert [["init=FlashVSR-v1.1" in command, "seed=4" in command] for command in started] == [
        [True, True], [False, True], [False, True]
    ]  # fmt: skip


def test_a_model_of_the_wrong_kind_is_refused_and_nothing_else_taken(release):
    teacher = release.parent / "teacher/stage1/export"
    with pytest.raises(UserError, match="is a teacher model, and stage3 starts from sparse or one-step"):
        make_stage(config("one_step", release, f"init={teacher}", "stage.loss.dmd=0", run="sparse"), WORLD)
    with pytest.raises(UserError, match="without a teacher set stage.loss.dmd=0"):
        make_stage(config("one_step", release, run="nothing"), WORLD)
    with pytest.raises(UserError, match="is a one-step model, not one of stage 1"):
        make_stage(config("one_step", release, f"teacher={release}", run="nothing"), WORLD)
