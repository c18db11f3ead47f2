"""`python -m flashvsr ...`: what it writes, what it prints, what it refuses."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flashvsr import load, method
from flashvsr.__main__ import main
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter, probe, read_frames
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.folder import ModelInfo, save_model

ROOT = Path(__file__).parents[2]
H, W, SCALE = 10, 14, 2


def frames(n=6, height=H, width=W):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def read(path):
    return np.stack(list(read_frames(path)))


@pytest.fixture
def run(micro_model, tmp_path):
    """A run whose stages have all finished: stages 1 and 3, a VAE with its own statistics, a TC decoder."""
    folder = tmp_path / "runs" / "micro"
    for stage, kind, mode in (("stage1", "teacher", "clip"), ("stage3", "one-step", "causal")):
        model = micro_model(kind, projector_mode=mode, steps=2, provenance={"run": "micro", "stage": stage})
        parts = {p: getattr(model, p) for p in ("dit", "lr_projector", "prompt")}
        save_model(folder / stage / "export", config=model.config, info=model.info, **parts)
    vae = WanVAE(model.config.vae)
    vae.load_state_dict(model.vae.state_dict())
    vae.set_statistics(torch.linspace(-1, 1, 16), torch.linspace(1, 2, 16))
    info = {"provenance": {"run": "micro"}}
    save_model(folder / "vae" / "export", config=model.config, info=ModelInfo("vae", **info), vae=vae)
    save_model(
        folder / "decoder" / "export",
        config=model.config,
        info=ModelInfo("decoder", **info),
        tc_decoder=model.tc_decoder,
    )
    return folder


@pytest.fixture
def exported(run):
    assert main(["export", str(run), "--quiet"]) is None
    return run / "export"


def upscale(source, out, model, *more):
    main(["upscale", str(source), str(out), "--model", str(model), "--scale", str(SCALE), *more])


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "in.mkv"
    with VideoWriter(path, 12, H, W, lossless=True) as writer:
        writer.write(frames())
    return path


# ---- export ---------------------------------------------------------------------------------------------


def test_export_gathers_verifies_and_says_where_from(run, capsys):
    main(["export", str(run)])
    lines = capsys.readouterr().out.splitlines()
    stages = {"DiT": "stage3", "LR projector": "stage3", "TC decoder": "decoder", "VAE": "vae"}
    for part, stage in stages.items():
        (line,) = [line for line in lines if line.startswith(part)]
        assert str(run / stage / "export") in line and line.endswith("0e+00")
    assert lines[-1] == f"{run / 'export'}: a model of kind one-step"
    model = load(run / "export", verify=True)
    assert model.info.provenance["run"] == "micro"
    assert model.info.provenance["parts"]["dit"]["from"] == "stage3/export"
    assert model.config.lr_projector.mode == "causal"
    assert torch.equal(model.vae.latents_mean, torch.linspace(-1, 1, 16))
    main(["export", str(run)])  # again, over itself


def test_export_of_an_unfinished_run(run, tmp_path, capsys):
    import shutil

    for stage in ("stage3", "decoder"):
        shutil.rmtree(run / stage)
    main(["export", str(run), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "not in this run: TC decoder" in printed and "of kind teacher" in printed
    assert load(tmp_path / "out").lr_projector.config.mode == "clip"
    shutil.rmtree(run / "stage1")
    main(["export", str(run), "--out", str(tmp_path / "out")])
    assert "of kind parts" in capsys.readouterr().out
    assert load(tmp_path / "out").dit is None


def test_export_refuses(run, tmp_path):
    with pytest.raises(UserError, match="is not a folder; give a run"):
        main(["export", str(tmp_path / "nothing")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="is not empty and no model folder; choose another --out"):
        main(["export", str(run), "--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "thesis.txt").exists()
    # damaged after the stage finished: nothing is exported
    path = run / "decoder" / "export" / "TCDecoder.ckpt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="SHA-256 differs"):
        main(["export", str(run)])
    assert not (run / "export").exists()


# ---- upscale --------------------------------------------------------------------------------------------


def test_upscale_writes_what_the_method_gives(clip, exported, tmp_path, capsys):
    upscale(clip, tmp_path / "out", exported, "--seed", "3", "--decoder", "vae")
    upscaler = method(load(exported), scale=SCALE, seed=3, decoder="vae")
    expected = np.concatenate([upscaler.push(frames()), upscaler.flush()])
    assert (read(tmp_path / "out") == expected).all()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"frame-{i:06d}.png" for i in range(6)]
    printed = capsys.readouterr().out
    for said in (
        "decoder vae",
        "attention gather",
        "precision float32",
        "lr_projector causal",
        "14x10",
        "28x20",
    ):
        assert printed.count(said) == 1
    assert "6 frames in" in printed


def test_upscale_to_a_video_keeps_rate_and_length(clip, exported, tmp_path):
    upscale(clip, tmp_path / "out.mp4", exported, "--quiet")
    info = probe(tmp_path / "out.mp4")
    assert (info.frames, info.height, info.width) == (6, H * SCALE, W * SCALE)
    assert float(info.fps) == pytest.approx(12, abs=0.05)  # Matroska, the source, counts milliseconds


def test_upscale_an_image_and_a_folder(exported, tmp_path):
    from PIL import Image

    Image.fromarray(frames(1)[0]).save(tmp_path / "in.png")
    upscale(tmp_path / "in.png", tmp_path / "out.png", exported, "--quiet")
    upscaler = method(load(exported), scale=SCALE)
    expected = np.concatenate([upscaler.push(frames(1)), upscaler.flush()])
    assert (np.asarray(Image.open(tmp_path / "out.png")) == expected[0]).all()
    with VideoWriter(tmp_path / "folder", 25, H, W) as writer:
        writer.write(frames(1))
    upscale(tmp_path / "folder", tmp_path / "frames", exported, "--quiet")
    assert (read(tmp_path / "frames") == expected).all()


def test_upscale_with_a_teacher(clip, run, tmp_path, micro_model):
    model = micro_model()
    teacher = load(run / "stage1" / "export")
    with pytest.raises(UserError, match="has no TC decoder .*train stage=decoder run=micro` makes it"):
        upscale(clip, tmp_path / "out.mp4", run / "stage1" / "export")
    folder = save_model(
        tmp_path / "teacher", config=model.config, info=teacher.info, dit=teacher.dit,
        lr_projector=teacher.lr_projector, prompt=teacher.prompt, vae=model.vae,
    )  # fmt: skip
    upscale(clip, tmp_path / "out", folder, "--steps", "3", "--quiet")
    upscaler = method(load(folder), scale=SCALE, steps=3)
    expected = np.concatenate([upscaler.push(frames()), upscaler.flush()])
    assert (read(tmp_path / "out") == expected).all()


def test_none_means_all(clip, exported, tmp_path, capsys):
    upscale(clip, tmp_path / "a", exported)
    assert "sparse_ratio 2.0" in (printed := capsys.readouterr().out) and "local_range 11" in printed
    upscale(clip, tmp_path / "b", exported, "--sparse-ratio", "none", "--local-range", "none")
    assert "sparse_ratio None" in (printed := capsys.readouterr().out) and "local_range None" in printed


def test_an_existing_output_is_kept_without_force(clip, exported, tmp_path):
    out = tmp_path / "out.mp4"
    out.write_text("mine")
    with pytest.raises(UserError, match="already exists; --force replaces it"):
        upscale(clip, out, exported)
    assert out.read_text() == "mine"
    upscale(clip, out, exported, "--force", "--quiet")
    assert probe(out).frames == 6
    with pytest.raises(UserError, match="is the input itself"):
        upscale(clip, clip, exported, "--force")


@pytest.mark.parametrize(
    "arguments,sentence",
    [
        (["--steps", "4"], "'steps' has no meaning for a model of kind 'one-step'"),
        (["--kv-chunks", "1"], "kv_chunks=1"),
        (["--attention", "flash"], "'flash' is unknown"),
        (["--lr-projector", "v1"], "lr_projector='v1' has no effect"),
        (["--device", "gpu"], "--device gpu"),
    ],
)
def test_upscale_refuses_and_leaves_nothing(clip, exported, tmp_path, arguments, sentence):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(UserError, match=sentence):
        upscale(clip, tmp_path / "out.mp4", exported, *arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_upscale_refuses_paths(clip, exported, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        upscale(tmp_path / "no.mp4", tmp_path / "out.mp4", exported)
    with pytest.raises(UserError, match="is one image"):
        upscale(clip, tmp_path / "out.png", exported)
    with pytest.raises(UserError, match="holds no model"):
        upscale(clip, tmp_path / "out.mp4", tmp_path)
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:200])
    with pytest.raises(UserError, match="broken.mp4 cannot be read"):
        upscale(broken, tmp_path / "out.mp4", exported)
    assert not (tmp_path / "out.mp4").exists()


def test_an_interrupted_upscale_leaves_nothing(clip, exported, tmp_path, monkeypatch):
    from flashvsr.streaming.upscaler import StreamingUpscaler

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(StreamingUpscaler, "flush", interrupted)
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        upscale(clip, tmp_path / "out.mp4", exported, "--quiet")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# ---- the rest -------------------------------------------------------------------------------------------


def test_doctor(capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "torch" in printed and "FAILED" not in printed
    assert "attention on cpu in bfloat16  gather (auto; dense from density" in printed
    for backend in ("reference", "gather", "dense"):
        (line,) = [line for line in printed.splitlines() if line.startswith(f"{backend} ")]
        assert float(line.split()[1]) < 5e-6 and float(line.split()[2]) < 2e-5
        assert line.split()[3] == "same" and line.endswith("ok")
    (line,) = [line for line in printed.splitlines() if line.startswith("flex ")]
    assert "not usable: FlexAttention has no backward on cpu" in line


def test_doctor_sees_a_wrong_backend(monkeypatch, capsys):
    from flashvsr.attention.backends import gather, reference

    monkeypatch.setattr(
        gather, "attention", lambda q, k, v, selection: reference.attention(q * 1.01, k, v, selection)
    )
    assert main(["doctor", "--device", "cpu", "--quiet"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_help_and_unknown_commands(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert capsys.readouterr().out.count("upscale") >= 2
    for command in ("upscale", "export", "convert", "prompt", "doctor"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0 and f"python -m flashvsr {command}" in capsys.readouterr().out
    with pytest.raises(UserError, match="unknown command 'upscael'; did you mean 'upscale'?"):
        main(["upscael"])


def test_names_are_lazy_and_errors_end_in_code_2():
    code = "import sys, flashvsr, flashvsr.__main__; assert 'torch' not in sys.modules; dir(flashvsr)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "flashvsr", "export", "runs/nothing-here"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: runs/nothing-here is not a folder") and done.stderr.count("\n") == 1


def test_unknown_names():
    import flashvsr

    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        flashvsr.lod  # noqa: B018
    assert {"load", "method", "StreamingUpscaler", "ClipUpscaler", "FlashVSR"} <= set(dir(flashvsr))
