"""Model folders: what is saved is what is loaded, and everything else is one sentence."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

import flashvsr
from flashvsr.base.cli import UserError
from flashvsr.config import (
    WAN_MEAN,
    DiTConfig,
    ModelConfig,
    ProjectorConfig,
    TCDecoderConfig,
    VAEConfig,
)
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import load_prompt, random_prompt, save_prompt
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.folder import FORMAT_VERSION, ModelInfo, gather, newest, save_model
from flashvsr.weights.load import load
from flashvsr.weights.names import FILES

PARTS = ("dit", "lr_projector", "tc_decoder", "vae", "prompt")


@pytest.fixture
def saved(micro_model, tmp_path):
    """`saved(name, parts, kind, **info)`: a folder with these parts of the micro model."""

    def make(name="model", parts=PARTS, kind="one-step", **info):
        model = micro_model(kind, **info)
        given = {part: getattr(model, part) for part in parts}
        return save_model(tmp_path / name, config=model.config, info=model.info, **given)

    return make


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def test_round_trip_is_bit_exact(saved, micro_model):
    info = {"area": 123, "sparse_ratio": None, "steps": 7, "window": 4, "provenance": {"run": "x", "seed": 3}}
    folder = saved(**info)
    before, after = micro_model(**info), load(folder, verify=True)
    for part in ("dit", "lr_projector", "tc_decoder", "vae"):
        assert same(getattr(before, part), getattr(after, part)), part
    assert torch.equal(before.prompt, after.prompt)
    assert after.info == before.info and after.config == before.config
    assert sorted(p.name for p in folder.iterdir()) == sorted([*FILES.values(), "flashvsr.json"])


def test_saving_again_gives_the_same_files(saved):
    first = json.loads((saved("a") / "flashvsr.json").read_text())
    second = json.loads((saved("b") / "flashvsr.json").read_text())
    assert first == second


def test_a_vaes_own_statistics_travel_with_it(saved, micro_model, tmp_path):
    model = micro_model()
    vae = WanVAE(model.config.vae)
    torch.manual_seed(0)
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    vae.set_statistics(mean, std)
    folder = save_model(tmp_path / "vae", config=model.config, info=ModelInfo("vae"), vae=vae)
    after = load(folder)
    assert torch.equal(after.vae.latents_mean, mean) and torch.equal(after.vae.latents_std, std)
    assert after.dit is None and after.prompt is None
    again = save_model(tmp_path / "again", config=after.config, info=after.info, vae=after.vae.state_dict())
    assert torch.equal(load(again).vae.latents_mean, mean)
    assert load(saved("wan", ["vae"])).config.vae.mean == WAN_MEAN


def test_the_projectors_mode_is_the_infos(saved):
    model = load(saved(kind="teacher", projector_mode="clip"))
    assert model.lr_projector.config.mode == model.info.projector_mode == "clip"


def test_dtype_parts_and_views(saved, micro_model, tmp_path):
    model = load(saved(), dtype=torch.bfloat16, parts=["dit", "vae", "prompt"])
    assert model.tc_decoder is None and model.lr_projector is None
    assert {p.dtype for p in model.dit.parameters()} == {torch.bfloat16}
    assert model.vae.latents_std.dtype == model.prompt.dtype == torch.float32
    assert all(p.requires_grad for p in model.dit.parameters())
    # a state dict of views into one large tensor: each file holds its own numbers only
    state = micro_model().lr_projector.state_dict()
    flat = torch.cat([t.flatten() for t in state.values()])
    views = dict(zip(state, flat.split([t.numel() for t in state.values()]), strict=True))
    views = {name: v.view(state[name].shape) for name, v in views.items()}
    folder = save_model(
        tmp_path / "v", config=micro_model().config, info=ModelInfo("parts"), lr_projector=views
    )
    assert (folder / FILES["lr_projector"]).stat().st_size < 1.1 * flat.numel() * 4 + 5000


def test_an_old_folder_stays_when_saving_fails(saved, micro_model, tmp_path):
    folder = saved()
    before = (folder / "flashvsr.json").read_text()
    with pytest.raises(UserError, match=r"shape \(1, 4, 9\) where this model takes \(1, length, 8\)"):
        save_model(folder, config=micro_model().config, info=ModelInfo("parts"), prompt=torch.zeros(1, 4, 9))
    with pytest.raises(UserError, match="no part to save"):
        save_model(folder, config=micro_model().config, info=ModelInfo("parts"))
    assert (folder / "flashvsr.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


# ---- folders without our json ---------------------------------------------------------------------------

RELEASE = ModelConfig(
    dit=DiTConfig(dim=128, ffn=8, layers=2, heads=1, freq_dim=8, text_dim=4),
    lr_projector=ProjectorConfig(hidden1=2, hidden2=2, out_dim=128),
    vae=VAEConfig(dim=2),
    tc_decoder=TCDecoderConfig(channels=(2, 3, 4, 5)),
)


def write_release(folder, config=RELEASE, dit_name=FILES["dit"]):
    """As the release's files are written: plain state dicts, the prompt a bfloat16 tensor."""
    folder.mkdir()
    torch.manual_seed(0)
    modules = {
        "lr_projector": LRProjector(config.lr_projector),
        "tc_decoder": TCDecoder(config.tc_decoder),
        "vae": WanVAE(config.vae),
    }
    for part, module in modules.items():
        torch.save(module.state_dict(), folder / FILES[part])
    modules["dit"] = DiT(config.dit)
    save_file(modules["dit"].state_dict(), folder / dit_name)
    torch.save(torch.randn(1, 3, 4, dtype=torch.bfloat16), folder / FILES["prompt"])
    return modules


def test_a_release_folder_is_read_from_names_and_shapes(tmp_path):
    modules = write_release(tmp_path / "FlashVSR-v1.1")
    model = load(tmp_path / "FlashVSR-v1.1")
    assert model.config == RELEASE
    assert model.info.kind == "one-step" and model.info.projector_mode == "causal"
    assert (model.info.area, model.info.sparse_ratio) == (768 * 1280, 2.0)
    for part, module in modules.items():
        assert same(module, getattr(model, part)), part
    assert model.prompt.dtype == torch.float32 and model.prompt.shape == (1, 3, 4)
    flashvsr.method(model)


def test_a_release_that_does_not_say_its_variant(tmp_path):
    folder = tmp_path / "FlashVSR"
    write_release(folder)
    with pytest.raises(UserError, match="v1 and v1.1 look the same: give lr_projector='v1' or 'v1.1'"):
        load(folder)
    assert load(folder, lr_projector="v1").lr_projector.config.mode == "buffer"
    assert load(folder, lr_projector="v1.1").lr_projector.config.mode == "causal"
    assert load(folder, parts=["dit"]).lr_projector is None


def test_wan_weights_are_parts_to_start_from(tmp_path):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    write_release(folder, dit_name="diffusion_pytorch_model.safetensors")
    for name in ("LQ_proj_in.ckpt", "TCDecoder.ckpt", "posi_prompt.pth"):
        (folder / name).unlink()
    model = load(folder)
    assert model.info.kind == "parts" and model.dit is not None and model.vae is not None
    with pytest.raises(UserError, match="has no LR projector .*stage=1"):
        model.denoiser()
    with pytest.raises(UserError, match="lr_projector='v1' has no effect"):
        load(folder, lr_projector="v1")
    (folder / FILES["dit"]).write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(UserError, match="holds two DiTs"):
        load(folder)


# ---- what is wrong --------------------------------------------------------------------------------------


def fails(folder, sentence, **how):
    with pytest.raises(UserError) as error:
        load(folder, **how)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_folders_that_are_none(tmp_path, saved):
    fails(tmp_path / "nowhere", "nowhere does not exist")
    fails(tmp_path, "is empty; give the folder of a model")
    (tmp_path / "file").write_text("x")
    fails(tmp_path, "holds no model: neither flashvsr.json nor any of diffusion_pytorch_model_streaming")
    fails(tmp_path / "file", "file is a file that does not say what it is; give the folder")
    folder = saved()
    fails(folder, "lr_projector='v2' is none of auto, v1, v1.1", lr_projector="v2")
    fails(folder, "lr_projector='v1' has no effect", lr_projector="v1")
    fails(folder, "parts='unet' is unknown", parts=["unet"])


def rewrite(folder, change):
    path = folder / "flashvsr.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_descriptions_that_cannot_be_used(saved):
    folder = saved()
    rewrite(folder, lambda v: v.update(format=FORMAT_VERSION + 1))
    fails(folder, f"has format {FORMAT_VERSION + 1}, this flashvsr knows {FORMAT_VERSION}: install a newer")
    rewrite(folder, lambda v: (v.update(format=1), v["config"]["dit"].update(depth=3)))
    fails(folder, "config.dit.depth")
    rewrite(folder, lambda v: (v["config"]["dit"].pop("depth"), v["info"].update(kind="student")))
    fails(folder, "info.kind='student' must be")
    (folder / "flashvsr.json").write_text('{"format": 1, "info"')
    fails(folder, "is not valid JSON")
    (folder / "flashvsr.json").write_text("[]")
    fails(folder, "does not say its format version")


def test_files_that_are_damaged(saved):
    folder = saved()
    names = {part: folder / name for part, name in FILES.items()}
    whole = names["vae"].read_bytes()
    names["vae"].write_bytes(whole[:-100])
    fails(folder, f"has {len(whole) - 100} bytes instead of {len(whole)}; copy it again")
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    names["vae"].write_bytes(changed)
    load(folder)
    fails(folder, "SHA-256 differs", verify=True)
    names["vae"].unlink()
    fails(folder, "Wan2.1_VAE.pth is missing, though flashvsr.json lists it")
    assert load(folder, parts=["dit"]).dit is not None
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
    names["dit"].write_bytes(pointer)
    fails(folder, "is a git-lfs pointer, not the file: run `git lfs pull`", parts=["dit"])


def test_truncated_release_files_and_foreign_content(tmp_path):
    folder = tmp_path / "FlashVSR-v1.1"
    write_release(folder)
    whole = {part: (folder / name).read_bytes() for part, name in FILES.items()}
    for part, name in FILES.items():
        (folder / name).write_bytes(whole[part][: len(whole[part]) // 2])
        fails(folder, f"{name} is not a whole")
        (folder / name).write_bytes(b"")
        fails(folder, f"{name} is not a whole")
        (folder / name).write_bytes(whole[part])
    load(folder)
    torch.save({"epoch": 3}, folder / FILES["tc_decoder"])
    fails(folder, "holds something else than named tensors")
    torch.save(torch.zeros(3), folder / FILES["tc_decoder"])
    fails(folder, "TCDecoder.ckpt holds one tensor instead of named ones")
    torch.save(ModelInfo("parts"), folder / FILES["tc_decoder"])
    fails(folder, "is refused: reading it would run 'flashvsr.weights.folder.ModelInfo'")
    torch.save({"a": torch.zeros(3)}, folder / FILES["tc_decoder"])
    fails(
        folder, "does not fit this TCDecoder: missing: decoder.1,26.bias, decoder.1,3,10,16,22,24,26.weight"
    )
    fails(folder, "not ours: a")
    (folder / FILES["tc_decoder"]).write_bytes(whole["tc_decoder"])
    torch.save(torch.full((1, 3, 4), torch.nan), folder / FILES["prompt"])
    fails(folder, "the prompt embedding is not finite")


def test_every_tensor_is_used_and_every_parameter_filled(tmp_path):
    folder = tmp_path / "FlashVSR-v1.1"
    modules = write_release(folder)
    state = modules["tc_decoder"].state_dict()
    state["decoder.99.weight"] = state.pop("decoder.24.weight")
    state["decoder.26.bias"] = torch.zeros(4)
    torch.save(state, folder / FILES["tc_decoder"])
    fails(
        folder,
        "TCDecoder.ckpt does not fit this TCDecoder: missing: decoder.24.weight; "
        "not ours: decoder.99.weight; of another size: decoder.26.bias (4,) instead of (3,)",
    )


# ---- runs -----------------------------------------------------------------------------------------------


def test_newest_goes_back_through_the_stages(saved, tmp_path):
    run = tmp_path / "run"
    assert newest(run, "dit") is None
    denoiser = ["dit", "lr_projector", "prompt"]
    first = saved("run/stage1/export", denoiser, "teacher", projector_mode="clip")
    assert newest(run, "dit") == newest(run, "prompt", ["teacher"]) == first
    third = saved("run/stage3/export", [*denoiser, "vae"])
    assert newest(run, "dit") == third
    assert newest(run, "dit", ["teacher", "sparse"]) == first
    assert newest(run, "vae") == third
    vae = saved("run/vae/export", ["vae"], "vae")
    assert newest(run, "vae") == vae and newest(run, "tc_decoder") is None
    (run / "decoder" / "export").mkdir(parents=True)  # begun, not finished
    assert newest(run, "tc_decoder") is None
    assert gather(run) == {"dit": third, "lr_projector": third, "vae": vae, "prompt": third}


def test_gather_says_what_a_run_is(tmp_path):
    with pytest.raises(UserError, match="is not a folder; give a run"):
        gather(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no finished stage"):
        gather(tmp_path)


def test_prompts(tmp_path):
    config = replace(RELEASE.dit, text_len=5)
    prompt = random_prompt(config, 3)
    assert prompt.shape == (1, 5, 4) and torch.equal(prompt, random_prompt(config, 3))
    assert not torch.equal(prompt, random_prompt(config, 4))
    save_prompt(prompt, tmp_path / "p.pth")
    assert torch.equal(load_prompt(tmp_path / "p.pth", 4), prompt)
    assert load_prompt(tmp_path / "p.pth").shape == (1, 5, 4)
    with pytest.raises(UserError, match=r"p.pth: .*\(1, 5, 4\) where this model takes \(1, length, 7\)"):
        load_prompt(tmp_path / "p.pth", 7)
    with pytest.raises(UserError, match="no.pth does not exist"):
        load_prompt(tmp_path / "no.pth")
    torch.save({"prompt": prompt}, tmp_path / "p.pth")
    with pytest.raises(UserError, match="a prompt embedding is one tensor, not dict"):
        load_prompt(tmp_path / "p.pth", 4)


def test_a_live_module_keeps_the_prompt_it_has(micro_model):
    model = micro_model()
    model.dit.set_prompt(model.prompt)
    model.prompt = None
    model.denoiser()
    model.dit = DiT(model.config.dit)
    with pytest.raises(UserError, match="has no prompt embedding"):
        model.denoiser()
