"""Weights that are not what they should be: one clear sentence each, and nothing in them is run."""

import argparse
import json
import os
import pickle
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashvsr.base.cli import UserError
from flashvsr.config import DiTConfig, ModelConfig, ProjectorConfig, TCDecoderConfig, VAEConfig
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights import folder as folder_module
from flashvsr.weights import names
from flashvsr.weights.explain import listed
from flashvsr.weights.folder import ModelInfo, save_model
from flashvsr.weights.load import load
from flashvsr.weights.names import FILES, WAN_DIT
from flashvsr.weights.tensors import is_safetensors, read_tensors

CONFIG = ModelConfig(
    dit=DiTConfig(dim=128, ffn=8, layers=2, heads=1, freq_dim=8, text_dim=4),
    lr_projector=ProjectorConfig(hidden1=2, hidden2=2, out_dim=128),
    vae=VAEConfig(dim=2),
    tc_decoder=TCDecoderConfig(channels=(2, 3, 4, 5)),
)
PARTS = {"dit": DiT, "lr_projector": LRProjector, "tc_decoder": TCDecoder, "vae": WanVAE}


@pytest.fixture(scope="module")
def states():
    """A state dict for each part."""
    torch.manual_seed(0)
    return {part: made(getattr(CONFIG, part)).state_dict() for part, made in PARTS.items()}


@pytest.fixture
def release(states, tmp_path):
    """A FlashVSR-v1.1 folder, as released."""
    folder = tmp_path / "FlashVSR-v1.1"
    folder.mkdir()
    save_file(states["dit"], folder / FILES["dit"])
    for part in ("lr_projector", "tc_decoder", "vae"):
        torch.save(states[part], folder / FILES[part])
    torch.save(torch.randn(1, 3, 4).bfloat16(), folder / FILES["prompt"])
    return folder


def refusal(path, **how):
    """The one sentence with which loading fails."""
    with pytest.raises(UserError) as error:
        load(path, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- a DiT that is none ---------------------------------------------------------------------------------


def lora(dit):
    names_ = [n.removesuffix(".weight") for n in dit if n.endswith("attn.q.weight")]
    down = {f"{n}.lora_A.weight": torch.zeros(3, 128) for n in names_}
    return dit | down | {f"{n}.lora_B.weight": torch.zeros(128, 3) for n in names_}


def like(shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


STRANGERS = {
    "it holds 8 tensors of a LoRA of rank 3": lambda s: lora(s["dit"]),
    "it looks like Wan's UMT5 text encoder; `python -m flashvsr prompt`": lambda s: like(
        {"token_embedding.weight": (9, 4), "blocks.0.attn.q.weight": (4, 4), "norm.weight": (4,)}
    ),
    "it looks like a T5 text encoder of transformers": lambda s: like(
        {"shared.weight": (9, 4), "encoder.block.0.layer.0.SelfAttention.q.weight": (4, 4)}
    ),
    "it looks like a CLIP image encoder": lambda s: like({"visual.patch_embedding.weight": (4, 3, 2, 2)}),
    "it looks like Wan's VAE, whose file is Wan2.1_VAE.pth": lambda s: s["vae"],
    "it looks like a VAE of diffusers": lambda s: like({"encoder.conv_in.weight": (4, 3, 3, 3, 3)}),
    "it looks like an LR projector": lambda s: s["lr_projector"],
    "it looks like a TC decoder": lambda s: s["tc_decoder"],
    "it looks like a Wan image-to-video model": lambda s: s["dit"] | like({"img_emb.proj.1.weight": (4, 4)}),
    "it is Wan2.1-14B, 5120 wide": lambda s: like(
        {
            "patch_embedding.weight": (5120, 16, 1, 2, 2), "blocks.0.ffn.0.weight": (1, 1),
            "time_embedding.0.weight": (1, 1), "text_embedding.0.weight": (1, 1),
            "blocks.0.self_attn.q.weight": (1, 1),
        }
    ),
    "it is Wan2.2-TI2V-5B, 3072 wide": lambda s: like({"patch_embedding.weight": (3072, 48, 1, 2, 2)}),
    "it holds an optimizer's state": lambda s: {f"0.{k}.exp_avg": v for k, v in s["dit"].items()},
    **{
        f"every name begins with '{p}', as": (lambda s, p=p: {p + k: v for k, v in s["dit"].items()})
        for p in ("module.", "_orig_mod.", "model.", "model.diffusion_model.", "base_model.model.")
    },
}  # fmt: skip


@pytest.mark.parametrize("sentence", STRANGERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_what_a_stranger_looks_like(states, tmp_path, sentence, suffix):
    """Given as the DiT of a Wan folder, in either format."""
    state = {name: t.contiguous() for name, t in STRANGERS[sentence](states).items()}
    path = tmp_path / f"diffusion_pytorch_model{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    said = refusal(tmp_path)
    assert said.startswith(str(path)) and sentence in said


def test_a_dit_in_place_of_a_projector_and_other_mix_ups(states, release):
    torch.save(states["dit"], release / FILES["lr_projector"])
    said = refusal(release)
    assert (
        "LQ_proj_in.ckpt does not fit this LRProjector: it looks like a Wan DiT; missing: conv1.bias" in said
    )
    assert "not ours: blocks.0-1.cross_attn.k.bias" in said and "head.modulation" in said
    torch.save(states["lr_projector"], release / FILES["lr_projector"])
    torch.save(states["vae"], release / FILES["tc_decoder"])
    assert "does not fit this TCDecoder: it looks like Wan's VAE" in refusal(release)


def test_both_lists_are_whole_and_by_name(states, tmp_path):
    """Every missing and every extra tensor can be read from the sentence, numbers gathered."""
    state = dict(states["dit"])
    removed = [n for n in state if n.startswith("blocks.1.cross_attn.")] + ["head.modulation"]
    for name in removed:
        del state[name]
    save_file(state | {"extra.0.a": torch.zeros(1), "extra.2.a": torch.zeros(1)}, tmp_path / WAN_DIT)
    said = refusal(tmp_path)
    for name in removed:
        assert name in said
    assert said.endswith("not ours: extra.0,2.a")
    assert listed(["a.3.b", "a.1.b", "a.2.b", "a.7.b", "c"]) == "a.1-3,7.b, c"
    assert listed([f"x{i}" for i in range(50)]).endswith("and 10 more")


def test_wrong_widths_are_named(release, states):
    state = dict(states["vae"])
    state["decoder.head.2.bias"] = torch.zeros(7)
    torch.save(state, release / FILES["vae"])
    assert refusal(release).endswith("of another size: decoder.head.2.bias (7,) instead of (3,)")
    torch.save(states["vae"], release / FILES["vae"])
    torch.save(LRProjector(ProjectorConfig(2, 2, 64)).state_dict(), release / FILES["lr_projector"])
    assert "the LR projector gives 64, the DiT is wide 128: they belong to different models" in refusal(
        release
    )
    torch.save(torch.zeros(1, 3, 5), release / FILES["prompt"])
    torch.save(states["lr_projector"], release / FILES["lr_projector"])
    assert "(1, 3, 5) where this model takes (1, length, 4)" in refusal(release)


def test_lost_blocks_are_noticed(states, tmp_path):
    """A Wan of full width with fewer blocks is a cut file, not a smaller model."""
    config = {"_class_name": "WanModel", "dim": 128, "num_heads": 2, "num_layers": 3, "eps": 1e-5}
    save_file(states["dit"], tmp_path / WAN_DIT)
    assert load(tmp_path).dit.config.heads == 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "holds 2 blocks of 3: it is a part of the model; copy it again" in refusal(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_layers": 2}))
    assert (load(tmp_path).dit.config.heads, load(tmp_path).dit.config.eps) == (2, 1e-5)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "i2v"}))
    assert "is Wan's i2v model" in refusal(tmp_path)


def test_other_number_formats_are_refused(states, release):
    state = {n: t.to(torch.float8_e4m3fn) if n == "head.head.weight" else t for n, t in states["dit"].items()}
    save_file(state, release / FILES["dit"])
    assert "holds head.head.weight in float8_e4m3fn; take a file in float32, bfloat16, float16" in refusal(
        release
    )


def test_what_the_tc_decoder_has_beyond_itself_is_named_and_left_out(states, release, tmp_path):
    """The release loads this file non-strictly; a folder of ours is strict."""
    extra = {"encoder.0.weight": torch.zeros(1), "encoder.1.weight": torch.zeros(1)}
    torch.save(states["tc_decoder"] | extra, release / FILES["tc_decoder"])
    said = []
    model = load(release, note=said.append)
    (line,) = [s for s in said if "TCDecoder.ckpt" in s]
    assert line.endswith("left out, for the TC decoder has no such tensors: encoder.0-1.weight")
    assert torch.equal(
        model.tc_decoder.state_dict()["decoder.26.bias"], states["tc_decoder"]["decoder.26.bias"]
    )
    lacking = {n: t for n, t in states["tc_decoder"].items() if n != "decoder.24.weight"}
    torch.save(lacking | extra, release / FILES["tc_decoder"])
    assert "missing: decoder.24.weight; not ours: encoder.0-1.weight" in refusal(release)
    ours = save_model(
        tmp_path / "ours", config=CONFIG, info=ModelInfo("decoder"), tc_decoder=states["tc_decoder"] | extra
    )
    assert "not ours: encoder.0-1.weight" in refusal(ours)


# ---- files ----------------------------------------------------------------------------------------------


class Hostile:
    """Unpickled by anything that trusts it, this makes a folder."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("part", ["tc_decoder", "prompt", "dit"])
def test_a_hostile_pickle_is_refused_and_not_run(release, tmp_path, form, part):
    mark = tmp_path / "was here"
    content = {"decoder.1.weight": torch.zeros(1), "x": Hostile(mark)}
    path = release / FILES[part]
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["x"], protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    said = refusal(release)
    assert f"{path} is refused: reading it would run 'posix.mkdir'" in said
    assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "the pickle is one that acts when it is trusted"


CONTENTS = {
    "a training checkpoint whose weights are under 'state_dict'; save that alone": {
        "state_dict": {"a": torch.zeros(1)}, "epoch": 3,
    },
    "an optimizer's state; take the model's file": {"state": {}, "param_groups": []},
    "a DeepSpeed checkpoint; make one state dict of it with its `zero_to_fp32.py`": {
        "module": {}, "ds_version": "0.19", "dp_world_size": 4,
    },
    "epoch, lr; give the release's file": {"epoch": 3, "lr": 0.1},
    "a list; give the release's file": [torch.zeros(1)],
}  # fmt: skip


@pytest.mark.parametrize("sentence", CONTENTS)
def test_other_content_is_named(release, sentence):
    torch.save(CONTENTS[sentence], release / FILES["vae"])
    assert f"Wan2.1_VAE.pth holds something else than named tensors: {sentence}" in refusal(release)


def test_objects_are_refused_by_name(release):
    torch.save({"args": argparse.Namespace(lr=1)}, release / FILES["vae"])
    assert "is refused: reading it would run 'argparse.Namespace'" in refusal(release)


def test_half_downloads_pointers_and_pages(release):
    for part in ("dit", "vae"):
        path = release / FILES[part]
        whole = path.read_bytes()
        for content, sentence in (
            (whole[: len(whole) // 2], "is not a whole"),
            (whole[:-1], "is not a whole"),
            (b"", "is not a whole"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
            (b"<!DOCTYPE html><html>log in</html>", "is a web page, not weights"),
        ):
            path.write_bytes(content)
            said = refusal(release)
            assert said.startswith(f"{path} ") and sentence in said
        path.write_bytes(whole)
    load(release)


FOLDERS = {
    "is empty; give the folder of a model": [],
    "a download that has not finished (diffusion_pytorch_model.safetensors.part)": [f"{WAN_DIT}.part"],
    "a DeepSpeed checkpoint (bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt)": [
        "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
    ],
    "a LoRA (adapter_config.json); merge it into its base first": ["adapter_config.json"],
    "GGUF files (wan-q4.gguf), which are not read": ["wan-q4.gguf"],
    "a text encoder (spiece.model); `python -m flashvsr prompt` uses it": ["spiece.model"],
    "a distributed checkpoint of torch (__0_0.distcp)": ["__0_0.distcp"],
    "is a stage that has not finished": ["config.yaml", "metrics.jsonl"],
    "holds no model: neither flashvsr.json nor": ["notes.txt"],
}


@pytest.mark.parametrize("sentence", FOLDERS)
def test_folders_without_a_model(tmp_path, sentence):
    for name in FOLDERS[sentence]:
        (tmp_path / name).write_text("x")
    assert sentence in refusal(tmp_path)


def test_links_files_and_doubles(release, tmp_path):
    gone = tmp_path / "gone"
    link = tmp_path / "link"
    link.symlink_to(gone)
    assert f"{link} is a link to {gone}, which does not exist" in refusal(link)
    path = release / FILES["vae"]
    content = path.read_bytes()
    path.unlink()
    path.symlink_to(gone)  # as a cache whose blob was removed leaves it
    assert f"{path} is a link to {gone}, which does not exist" in refusal(release)
    path.unlink()
    path.write_bytes(content)
    assert "is a file that does not say what it is; give the folder" in refusal(path)
    assert "does not exist" in refusal(path / "inside")
    (release / "Wan2.1_VAE.safetensors").write_bytes(b"")
    assert "holds Wan2.1_VAE.safetensors and Wan2.1_VAE.pth for one vae; move one away" in refusal(release)


@contextmanager
def without_roots_rights():
    """Root may read everything; as this effective user, permissions count."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_what_may_not_be_read(release):
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        folder = Path(place) / release.name
        shutil.copytree(release, folder)
        for file in folder.iterdir():
            file.chmod(0o644)
        load(folder)  # and all that is imported on the way
        for denied, sentence in ((folder / FILES["vae"], "Wan2.1_VAE.pth"), (folder, "FlashVSR-v1.1")):
            mode = denied.stat().st_mode
            denied.chmod(0)
            with without_roots_rights():
                said = refusal(folder)
            denied.chmod(mode)
            assert f"{sentence} may not be read by this user; change its permissions" in said
        with without_roots_rights():
            load(folder)


def test_shards_and_other_suffixes(states, release, tmp_path):
    """A DiT in shards or in a torch file, and parts under another suffix, are the same model."""
    folder = tmp_path / "FlashVSR-v1.1-again"
    folder.mkdir()
    halves = [dict(list(states["dit"].items())[i::2]) for i in range(2)]
    stem = FILES["dit"].removesuffix(".safetensors")
    for i, half in enumerate(halves):
        save_file(half, folder / f"{stem}-{i + 1:05d}-of-00002.safetensors")
    for part in ("lr_projector", "tc_decoder", "vae"):
        save_file(states[part], folder / f"{FILES[part].split('.ckpt')[0].removesuffix('.pth')}.safetensors")
    (release / FILES["dit"]).unlink()
    torch.save(states["dit"], release / f"{stem}.ckpt")
    for model in (load(folder), load(release)):
        for part in PARTS:
            got = getattr(model, part).state_dict()
            assert all(torch.equal(t, got[n]) for n, t in states[part].items())
    save_file(halves[0], folder / f"{stem}-00002-of-00002.safetensors")
    assert "repeats the tensor" in refusal(folder)


@pytest.mark.parametrize("first", [0x80, 0x50])
def test_formats_are_told_apart_by_bytes(states, tmp_path, first):
    """A safetensors header may be as long as a pickle's or a zip's first byte says; the name says nothing."""
    path = tmp_path / "a.ckpt"
    for pad in range(512):
        save_file(states["vae"], path, {"pad": "x" * pad})
        if path.read_bytes()[0] == first:
            break
    else:
        raise AssertionError("no such length")
    assert is_safetensors(path)
    assert read_tensors([path], None, "cpu").keys() == states["vae"].keys()
    torch.save(states["vae"], tmp_path / "b.safetensors")
    assert not is_safetensors(tmp_path / "b.safetensors")
    assert read_tensors([tmp_path / "b.safetensors"], None, "cpu").keys() == states["vae"].keys()


# ---- which release --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "release,folders",
    [
        (
            "v1.1",
            ["FlashVSR-v1.1", "flashvsr_v1.1", "FlashVSR-v1_1-bf16", "FlashVSRv1.1"],
        ),
        ("v1.1", ["models--JunhaoZhuang--FlashVSR-v1.1", "FlashVSR-bf16-v1.1"]),
        ("v1", ["FlashVSR-v1", "FlashVSR_V1.0", "FlashVSR v1 copy"]),
        (None, ["FlashVSR", "models--JunhaoZhuang--FlashVSR", "v1.1", "my-v1.1", "FlashVSR-v1-v1.1"]),
        (None, ["FlashVSR-v1.10", "FlashVSR-v1.2", "FlashVSR-v11", "FlashVSR_plus"]),
    ],
)
def test_only_an_unmistakable_name_says_the_release(release, folders):
    assert [names.release_in(name) for name in folders] == [release] * len(folders)


def test_the_release_is_said_once_and_stored(release, tmp_path, capsys):
    model = load(release)
    assert capsys.readouterr().err.count("LR projector v1.1 (causal), by the folder's name") == 1
    load(release)
    assert capsys.readouterr().err == ""
    assert model.info.projector_mode == "causal" and model.info.provenance == {"release": "FlashVSR v1.1"}
    said = []
    given = load(release, lr_projector="v1", note=said.append)
    assert given.info.projector_mode == given.lr_projector.config.mode == "buffer"
    assert said == [f"{release}: LR projector v1 (buffer), as given, though its name says v1.1"]
    cache = tmp_path / "models--JunhaoZhuang--FlashVSR-v1.1" / "snapshots"
    cache.mkdir(parents=True)
    release.rename(cache / "0a1b2c")
    assert load(cache / "0a1b2c").info.projector_mode == "causal"
    plain = tmp_path / "FlashVSR"
    (cache / "0a1b2c").rename(plain)
    assert "give lr_projector='v1' or 'v1.1' (--lr-projector on the command line)" in refusal(plain)
    (tmp_path / "FlashVSR-v1").symlink_to(plain)
    assert load(tmp_path / "FlashVSR-v1").info.projector_mode == "buffer"


def test_wans_text_encoder_is_named_and_left(release):
    (release / FILES["dit"]).rename(release / WAN_DIT)
    for name in ("models_t5_umt5-xxl-enc-bf16.pth", "README.md"):
        (release / name).write_bytes(b"11 GB")
    said = []
    model = load(release, note=said.append)
    assert model.info.kind == "parts"
    assert any("models_t5_umt5-xxl-enc-bf16.pth is not loaded: the prompt is fixed" in s for s in said)


# ---- runs and formats -----------------------------------------------------------------------------------


def test_a_run_and_its_stages(states, tmp_path):
    run = tmp_path / "runs" / "x"
    prompt = torch.randn(1, 3, 4)
    parts = {"dit": states["dit"], "lr_projector": states["lr_projector"], "prompt": prompt}
    for stage, kind in (("stage1", "teacher"), ("stage3", "one-step")):
        save_model(run / stage / "export", config=CONFIG, info=ModelInfo(kind, area=64), **parts)
        (run / stage / "config.yaml").write_text("x")
    decoder = {n: t + 1 for n, t in states["tc_decoder"].items()}
    save_model(run / "decoder" / "export", config=CONFIG, info=ModelInfo("decoder"), tc_decoder=decoder)
    (run / "stage2" / "checkpoints").mkdir(parents=True)
    model = load(run, verify=True)
    assert (model.info.kind, model.info.area) == ("one-step", 64) and model.vae is None
    assert model.info.provenance["parts"]["dit"]["from"] == "stage3/export"
    assert torch.equal(model.tc_decoder.state_dict()["decoder.26.bias"], decoder["decoder.26.bias"])
    assert load(run / "stage1").info.kind == "teacher" == load(run / "stage1" / "export").info.kind
    assert "stage2 is a stage that has not finished: its model will be in" in refusal(run / "stage2")
    (tmp_path / "runs" / "y" / "stage1" / "checkpoints").mkdir(parents=True)
    assert "has no finished stage" in refusal(tmp_path / "runs" / "y")


def test_an_older_format_is_migrated_and_said(states, tmp_path, monkeypatch, capsys):
    """Format 0 of this test called `area` `pixels` and had no `window`; today's loader learns it."""
    folder = save_model(tmp_path / "m", config=CONFIG, info=ModelInfo("vae", area=77), vae=states["vae"])
    path = folder / "flashvsr.json"
    values = json.loads(path.read_text())
    assert values["format"] == 1
    values["info"]["pixels"] = values["info"].pop("area")
    del values["info"]["window"]
    path.write_text(json.dumps({**values, "format": 0}))
    assert "has format 0, which never was; export the model again" in refusal(folder)

    def migrate(old):
        info = {"area" if key == "pixels" else key: value for key, value in old["info"].items()}
        return {**old, "info": {**info, "window": None}}

    monkeypatch.setitem(folder_module.MIGRATIONS, 0, ("`pixels` is called `area`", migrate))
    assert load(folder, verify=True).info.area == 77
    said = capsys.readouterr().err
    assert said == f"{path} has format 0 and is read as format 1: `pixels` is called `area`\n"
    # two steps, and a description in the metadata of a file goes the same way
    monkeypatch.setitem(folder_module.MIGRATIONS, 1, ("nothing", dict))
    monkeypatch.setattr(folder_module, "FORMAT_VERSION", 2)
    assert load(folder).info.area == 77 and "is read as format 2: nothing" in capsys.readouterr().err
    path.write_text(json.dumps({**values, "format": 3}))
    assert "has format 3, this flashvsr knows 2: install a newer flashvsr" in refusal(folder)
    path.write_text(json.dumps({**values, "format": "1"}))
    assert "does not say its format version" in refusal(folder)


def test_a_description_may_not_name_files_elsewhere(states, tmp_path):
    folder = save_model(tmp_path / "m", config=CONFIG, info=ModelInfo("vae"), vae=states["vae"])
    path = folder / "flashvsr.json"
    values = json.loads(path.read_text())
    for name in ("../secret.pth", "/etc/passwd"):
        values["files"]["vae"]["name"] = name
        path.write_text(json.dumps(values))
        assert f"names {name!r}, a file outside its folder" in refusal(folder)


def test_weights_are_mapped_and_belong_to_nobody_else(release):
    """Loaded as stored, tensors are pages of the file; writing to them changes no file."""
    before = {name: (release / name).read_bytes() for name in FILES.values()}
    for dtype in (torch.float32, None):
        model = load(release, dtype=dtype)
        with torch.no_grad():
            for part in PARTS:
                for p in getattr(model, part).parameters():
                    p.add_(1)
    assert all((release / name).read_bytes() == content for name, content in before.items())
    maps = Path("/proc/self/maps")
    if maps.exists():
        kept = load(release)
        mapped = maps.read_text()
        assert kept.dit is not None
        for part in ("dit", "lr_projector", "vae"):
            assert str(release / FILES[part]) in mapped, part
    assert torch.equal(load_file(release / FILES["dit"])["head.head.bias"], load(release).dit.head.head.bias)
