"""Layouts of a model: diffusers' own transformer agrees with ours, and there and back is the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashvsr.__main__ import main
from flashvsr.attention.plans import PackedDense
from flashvsr.base.cli import UserError
from flashvsr.base.operators import declare_torchvision
from flashvsr.config import DiTConfig, ModelConfig, ProjectorConfig, TCDecoderConfig, VAEConfig
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.convert import convert
from flashvsr.weights.folder import ModelInfo, save_model
from flashvsr.weights.load import load
from flashvsr.weights.names import FILES

CONFIG = ModelConfig(
    dit=DiTConfig(dim=48, ffn=80, layers=2, heads=2, freq_dim=32, text_dim=24),
    lr_projector=ProjectorConfig(hidden1=2, hidden2=3, out_dim=48),
    vae=VAEConfig(dim=2),
    tc_decoder=TCDecoderConfig(channels=(2, 3, 4, 5)),
)
PARTS = {"dit": DiT, "lr_projector": LRProjector, "tc_decoder": TCDecoder, "vae": WanVAE}


def noisy(module):
    """Every parameter random, also those that start at 0 or 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / max(p.shape[-1], 1) ** 0.5)
    return module


@pytest.fixture
def folder(tmp_path):
    """A folder of ours in bfloat16 (the prompt too, as in the release)."""
    torch.manual_seed(0)
    parts = {part: noisy(made(getattr(CONFIG, part))).bfloat16() for part, made in PARTS.items()}
    prompt = torch.randn(1, 7, 24).bfloat16()
    info = ModelInfo("one-step", area=123, steps=1, provenance={"run": "x"})
    return save_model(tmp_path / "ours", config=CONFIG, info=info, prompt=prompt, **parts)


def tensors(model):
    """All tensors of a model, by part and name."""
    found = {("prompt", ""): model.prompt}
    for part in PARTS:
        if getattr(model, part) is not None:
            found |= {(part, name): t for name, t in getattr(model, part).state_dict().items()}
    return {key: t for key, t in found.items() if t is not None}


def equal(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def ours(dit, latent, prompt, t):
    """Our dense forward of one clip at one timestep, through the prompt path."""
    dit.set_prompt(prompt)
    grid = (latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2)
    plan = PackedDense([grid], dit.config.head_dim)
    with torch.no_grad():
        (v,) = dit([latent], torch.tensor([[t / 1000]]), plan, [])
    return v


# ---- diffusers itself -----------------------------------------------------------------------------------


@pytest.fixture
def wan():
    """A tiny WanTransformer3DModel with random weights, and an input."""
    declare_torchvision()
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(1)
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=24, freq_dim=32, ffn_dim=80, num_layers=3
    )
    return noisy(model).eval(), (torch.randn(1, 16, 3, 8, 12), torch.randn(1, 7, 24), 700.0)


def theirs(model, latent, prompt, t):
    with torch.no_grad():
        return model(latent, torch.tensor([t]), prompt, return_dict=False)[0]


@pytest.mark.parametrize("shards", [False, True])
def test_a_transformer_of_diffusers_computes_the_same_here(wan, tmp_path, shards):
    model, (latent, prompt, t) = wan
    model.save_pretrained(tmp_path / "transformer", max_shard_size="100KB" if shards else "10GB")
    assert len(list((tmp_path / "transformer").glob("*.safetensors"))) > 1 or not shards
    expected = theirs(model, latent, prompt, t)
    for path in (tmp_path / "transformer", tmp_path):
        loaded = load(path)
        config = loaded.config.dit
        assert (config.heads, config.layers, config.dim, config.ffn) == (2, 3, 48, 80)
        assert loaded.info.kind == "parts" and loaded.vae is None
        got = ours(loaded.dit, latent, prompt, t)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max() and expected.std() > 0.1
    wrong = DiTConfig(**{**vars(config), "heads": 1})
    other = DiT(wrong)
    other.load_state_dict(loaded.dit.state_dict())
    assert (ours(other, latent, prompt, t) - expected).abs().max() > 1e-3  # the heads do matter


def test_diffusers_computes_the_same_with_what_we_write(folder, wan, tmp_path):
    import diffusers

    _, (latent, prompt, t) = wan
    convert(folder, tmp_path / "d", "diffusers", dtype=torch.float32)
    model, report = diffusers.WanTransformer3DModel.from_pretrained(
        tmp_path / "d", subfolder="transformer", output_loading_info=True
    )
    assert not any(report.values())
    expected = theirs(model.eval(), latent, prompt, t)
    got = ours(load(folder).dit, latent, prompt, t)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    written = json.loads((tmp_path / "d" / "transformer" / "config.json").read_text())
    read = {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items()}
    assert {k: v for k, v in written.items() if k[0] != "_"} == {k: read[k] for k in written if k[0] != "_"}
    assert {k for k in read if k[0] != "_"} <= written.keys()  # nothing is left to diffusers' defaults


def test_what_diffusers_folders_lack_is_said(wan, tmp_path):
    model, _ = wan
    folder = tmp_path / "wan"
    model.save_pretrained(folder / "transformer", max_shard_size="100KB")
    for name in ("vae", "text_encoder"):
        (folder / name).mkdir()
    (folder / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKLWan"}')
    said = []
    load(folder, note=said.append)
    assert "its vae/ is in diffusers' layout and is not read" in said[0] and "text_encoder/" in said[1]
    with pytest.raises(UserError, match="is the VAE in diffusers' layout.*take the original Wan2.1_VAE.pth"):
        load(folder / "vae")
    shards = sorted((folder / "transformer").glob("*-of-*"))
    content = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(UserError, match=f"lacks shard 2 of {len(shards)} of diffusion_pytorch_model"):
        load(folder)
    shards[1].write_bytes(content)
    config = folder / "transformer" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "image_dim": 1280}))
    with pytest.raises(UserError, match="describes a Wan image-to-video model"):
        load(folder)
    config.write_text(json.dumps({**values, "num_layers": 4}))
    with pytest.raises(UserError, match="holds 3 blocks of 4: it is a part of the model"):
        load(folder)
    (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (folder / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="is a diffusers pipeline without a WanTransformer3DModel"):
        load(folder)


# ---- there and back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["diffusers", "single", "release"])
def test_there_and_back_is_the_same_model(folder, tmp_path, there):
    middle = tmp_path / ("m.safetensors" if there == "single" else "m")
    convert(folder, middle, there)
    convert(middle, tmp_path / "back", "release")
    first, between, last = (load(p, dtype=None) for p in (folder, middle, tmp_path / "back"))
    assert equal(first, between) and equal(first, last)
    assert first.info == between.info == last.info and first.config == between.config == last.config
    assert (tmp_path / "back" / "flashvsr.json").read_text() == (folder / "flashvsr.json").read_text()
    assert first.prompt.dtype == torch.bfloat16 and load(middle).prompt.dtype == torch.float32


def test_layouts_have_the_names_that_others_look_for(folder, tmp_path):
    convert(folder, tmp_path / "d", "diffusers")
    names = sorted(str(p.relative_to(tmp_path / "d")) for p in (tmp_path / "d").rglob("*") if p.is_file())
    assert names == sorted(
        ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors", "flashvsr.json"]
        + [FILES[p] for p in ("lr_projector", "tc_decoder", "vae", "prompt")]
    )
    convert(folder, tmp_path / "s.safetensors", "single")
    stored = load_file(tmp_path / "s.safetensors")
    assert {n.split(".")[0] for n in stored} == {"dit", "lr_projector", "tc_decoder", "vae", "prompt"}
    assert stored["prompt"].shape == (1, 7, 24) and {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert torch.equal(stored["dit.head.head.bias"], load(folder, dtype=None).dit.head.head.bias)


def test_dtypes(folder, tmp_path):
    wide = convert(folder, tmp_path / "wide", "release", dtype=torch.float32)
    assert {t.dtype for t in tensors(wide).values()} == {torch.float32}
    single = convert(tmp_path / "wide", tmp_path / "s.safetensors", "single")  # bfloat16 by default
    assert equal(single, load(folder, dtype=None))
    half = load(tmp_path / "s.safetensors", dtype=torch.float16)
    assert (
        {p.dtype for p in half.dit.parameters()}
        == {torch.float16}
        == {p.dtype for p in half.vae.parameters()}
    )


def test_a_converted_release_keeps_its_variant_and_statistics(folder, tmp_path):
    model = load(folder)
    model.vae.set_statistics(torch.linspace(-1, 1, 16), torch.linspace(1, 2, 16))
    release = tmp_path / "FlashVSR"
    release.mkdir()
    wide = ModelConfig(dit=DiTConfig(dim=128, ffn=8, layers=1, heads=1, freq_dim=8, text_dim=4))
    save_file(DiT(wide.dit).state_dict(), release / FILES["dit"])
    torch.save(LRProjector(ProjectorConfig(2, 2, 128)).state_dict(), release / FILES["lr_projector"])
    convert(release, tmp_path / "s.safetensors", "single", lr_projector="v1")
    again = load(tmp_path / "s.safetensors")
    assert again.lr_projector.config.mode == again.info.projector_mode == "buffer"
    assert again.info.provenance == {"release": "FlashVSR v1"}
    with pytest.raises(UserError, match="lr_projector='v1.1' has no effect"):
        load(tmp_path / "s.safetensors", lr_projector="v1.1")
    save_model(tmp_path / "v", config=model.config, info=ModelInfo("vae"), vae=model.vae)
    convert(tmp_path / "v", tmp_path / "v.safetensors", "single", dtype=torch.float32)
    assert torch.equal(load(tmp_path / "v.safetensors").vae.latents_std, torch.linspace(1, 2, 16))


def test_another_prompt(folder, tmp_path):
    torch.save(torch.ones(1, 3, 24), tmp_path / "p.pth")
    model = convert(folder, tmp_path / "m", "release", prompt=tmp_path / "p.pth")
    assert torch.equal(model.prompt, torch.ones(1, 3, 24))
    assert torch.equal(load(tmp_path / "m", verify=True).prompt, torch.ones(1, 3, 24))
    torch.save(torch.ones(1, 3, 23), tmp_path / "p.pth")
    with pytest.raises(UserError, match=r"\(1, 3, 23\) where this model takes \(1, length, 24\)"):
        convert(folder, tmp_path / "n", "release", prompt=tmp_path / "p.pth")
    assert not (tmp_path / "n").exists()


def test_the_command(folder, tmp_path, capsys):
    out = tmp_path / "m.safetensors"
    main(["convert", str(folder), str(out), "--to", "single"])
    printed = capsys.readouterr().out
    assert "DiT" in printed and "bfloat16" in printed and "LR projector's mode: causal" in printed
    assert printed.splitlines()[-1].startswith(f"{out}: single, ") and "read back equal" in printed
    before = out.read_bytes()
    with pytest.raises(UserError, match="already exists; --force replaces it"):
        main(["convert", str(folder), str(out), "--to", "single"])
    main(["convert", str(folder), str(out), "--to", "single", "--force", "--quiet"])
    assert out.read_bytes() == before and capsys.readouterr().out == ""


def test_what_is_refused_leaves_all_as_it_was(folder, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("x")
    before = sorted(tmp_path.iterdir())
    for out, to, sentence in (
        (folder, "release", "is the model itself"),
        (tmp_path / "m.pth", "single", "ends in .safetensors"),
        (mine, "diffusers", "is not empty and no model folder"),
        (mine / "thesis.txt", "release", "is a file where a folder"),
    ):
        with pytest.raises(UserError, match=sentence):
            convert(folder, out, to, force=True)
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out", "release")
    vae = load(folder, parts=["vae"])
    save_model(tmp_path / "vae", config=vae.config, info=ModelInfo("vae"), vae=vae.vae)
    with pytest.raises(UserError, match="has no DiT"):
        convert(tmp_path / "vae", tmp_path / "out", "diffusers")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "vae"])


def test_a_single_file_that_is_none(folder, tmp_path):
    path = tmp_path / "s.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="is a file that does not say what it is"):
        load(path)
    convert(folder, path, "single", force=True)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        load(path)
    save_file({"a": torch.zeros(1)}, path, {"flashvsr": '{"format": 99}'})
    with pytest.raises(UserError, match="has format 99, this flashvsr knows 1"):
        load(path)
