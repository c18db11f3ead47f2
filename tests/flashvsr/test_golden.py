"""This code against the numbers of the released code: the cut files always, the full ones where they are."""

from pathlib import Path

import pytest
import torch

from tests import golden
from tests.cut_golden import last_taps, restore_vae

ROOT = Path(__file__).parents[2]
CUT = sorted((ROOT / "tests" / "data" / "golden").glob("*.safetensors"))
FULL = ROOT.parent / "shared" / "golden"
NAMES = ("misc", "dit_stream", "lr_proj_v1", "lr_proj_v11", "tc_decoder", "wan_vae", "pipeline_v11_tiny")


def all_pass(path: Path) -> None:
    rows = golden.check(path)
    assert rows
    failed = [
        f"{row.name}: {row.error:.2e} > {row.tolerance:.0e} {row.note}" for row in rows if not row.passed
    ]
    assert not failed


@pytest.mark.parametrize("path", CUT, ids=lambda path: path.stem)
def test_cut_files(path):
    all_pass(path)


def test_the_cut_files_are_here_and_small():
    assert {path.stem for path in CUT} == {"misc", "wan_vae_encoder", "wan_vae_decoder"}
    assert all(path.stat().st_size < 10**6 for path in CUT)


@pytest.mark.parametrize("name", NAMES)
def test_full_files(name):
    path = FULL / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    all_pass(path)


def test_the_runner_sees_a_wrong_number(tmp_path):
    from safetensors.torch import save_file

    given = golden.Golden(CUT[0])
    assert given.path.stem == "misc"
    wrong = dict(given.tensors)
    wrong["color.adain"] = wrong["color.adain"] + 1e-4
    mask = next(name for name in wrong if name.startswith("local_mask."))
    wrong[mask] = wrong[mask].clone()
    wrong[mask].view(-1)[5] ^= True
    save_file(wrong, tmp_path / "wrong.safetensors")
    failed = {row.name for row in golden.check(tmp_path / "wrong.safetensors") if not row.passed}
    assert failed == {"color.adain", mask}
    assert golden.main([str(tmp_path / "wrong.safetensors")]) == 1


def test_a_cut_of_the_vae_restores_what_the_first_frame_needs():
    from flashvsr.config import VAEConfig
    from flashvsr.models.wan_vae import WanVAE

    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=4))
    restored = WanVAE(VAEConfig(dim=4))
    restored.load_state_dict(restore_vae(last_taps(vae.state_dict()), 4))
    video = torch.rand(1, 3, 1, 16, 16)
    with torch.no_grad():
        ours, theirs = (v.decode(v.encode(video)[0])[0] for v in (vae, restored))
    assert torch.equal(ours, theirs)


def test_the_upscaler_gives_the_released_frames():
    """From uint8 to uint8: the pipeline file's LR frames through `StreamingUpscaler`, pushed unevenly."""
    import numpy as np

    from flashvsr.base.resize import to_uint8
    from flashvsr.streaming.upscaler import StreamingUpscaler
    from flashvsr.weights.folder import FlashVSR, ModelInfo

    path = FULL / "pipeline_v11_tiny.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    given = golden.Golden(path)
    lr = given["lq_uint8_CFHW"].permute(1, 2, 3, 0)
    model = FlashVSR(
        dit=golden.build_dit(given),
        lr_projector=golden.build_projector(given),
        tc_decoder=golden.build_tc_decoder(given),
        info=ModelInfo("one-step", area=lr.shape[1] * lr.shape[2]),
    )
    upscaler = StreamingUpscaler(
        model,
        scale=1,
        sparse_ratio=given.get("topk_ratio", 2.0),
        kv_chunks=int(given.get("kv_ratio", 3)),
        local_range=int(given.get("local_range", 11)),
        noise=lambda i, shape: given["noise"][0, :, min(i, 9)],  # flush asks for more than the file has
    )
    out = np.concatenate([upscaler.push(lr[:7]), upscaler.push(lr[7:38]), upscaler.push(lr[38:])])
    assert len(out) == 37 and len(upscaler.flush()) == 4
    ours = torch.from_numpy(out)[given["frames_index"]].int()
    theirs = to_uint8(given["frames_CFHW"]).permute(1, 2, 3, 0).int()
    assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 1e-3
