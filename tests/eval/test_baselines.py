"""Interpolation and the networks as modules: values, sizes, precisions, and weights that fit or do not.

The networks' numbers against the released ones and against the oracle: tests/flashvsr/test_golden.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from eval.baselines import NETWORKS, Bicubic, Lanczos, load_network
from eval.baselines.deform import deform_conv
from eval.baselines.iconvsr import window_around
from eval.baselines.spynet import SPyNet, warp
from eval.baselines.weights import network_of, random_network
from flashvsr.base.cli import UserError

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
TINY = dict(width=6, blocks=1, detail=4, flow_widths=(3, 4, 3, 2))


def manifest(kind: str) -> dict:
    return json.loads((MANIFESTS / f"{kind}_basicsr.json").read_text())


def tiny(kind: str, seed: int = 0):
    extra = dict(groups=2, edvr_blocks=1) if kind == "iconvsr" else {}
    return random_network(kind, seed, **TINY, **extra).eval().requires_grad_(False)


# ---- interpolation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3, 4, 1.5])
def test_lanczos_is_pillows(scale):
    frames = np.random.default_rng(0).integers(0, 256, (2, 7, 10, 3), dtype=np.uint8)
    out = Lanczos(scale).push(torch.from_numpy(frames))
    size = (round(10 * scale), round(7 * scale))
    for ours, frame in zip(out.numpy(), frames, strict=True):
        assert np.array_equal(ours, np.asarray(Image.fromarray(frame).resize(size, Image.LANCZOS)))
    assert len(Lanczos(scale).flush()) == 0


def test_lanczos_keeps_more_detail_than_bicubic():
    """A wave of 2.4 LR pixels comes back nearer to what it was."""
    x = np.arange(240)[None].repeat(40, 0)
    hr = 127.5 + 100 * np.sin(2 * np.pi * (x + 0.5) / 9.6)
    hr = np.stack([hr.round().astype(np.uint8)] * 3, -1)
    lr = np.array(Image.fromarray(hr).resize((60, 10), Image.LANCZOS))[None]
    errors = [np.abs(m.push(lr)[0].numpy().astype(int) - hr).mean() for m in (Bicubic(4), Lanczos(4))]
    assert errors[1] < errors[0]


# ---- parts ------------------------------------------------------------------------------------------------


def test_warping_by_whole_pixels_is_shifting():
    x = torch.rand(2, 3, 6, 7)
    flow = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(2, 2, 6, 7)  # right, down
    out = warp(x, flow)
    assert torch.allclose(out[:, :, 1:, :-2], x[:, :, :-1, 2:], atol=1e-5)
    assert out[:, :, 0].abs().max() < 1e-5 and out[..., -2:].abs().max() < 1e-5
    border = warp(x, flow, "border")
    assert torch.allclose(border[:, :, 1:, -1], x[:, :, :-1, -1], atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 33), (32, 32), (31, 64), (64, 65), (70, 97)])
def test_flow_of_any_size_is_finite_and_of_that_size(size):
    flow = random_network("basicvsr", **TINY).spynet(torch.rand(1, 3, *size), torch.rand(1, 3, *size))
    assert flow.shape == (1, 2, *size) and flow.isfinite().all()


def test_flow_is_scaled_back_with_the_picture():
    """A network whose last level always adds (8, 8): at 40 of 64 pixels that is 8 · 40/64."""
    net = SPyNet((2, 2, 2, 2))
    for p in net.parameters():
        torch.nn.init.zeros_(p)
    torch.nn.init.constant_(net.basic_module[-1].basic_module[8].bias, 8.0)
    flow = net(torch.rand(1, 3, 40, 64), torch.rand(1, 3, 40, 64))
    assert torch.allclose(flow[:, 0], torch.tensor(8.0)) and torch.allclose(flow[:, 1], torch.tensor(5.0))


def slow_deform(x, offset, mask, weight):
    """By the formula, output by output: sums of taps, each with up to four corners."""
    (_, channels, height, width), outs = x.shape, weight.shape[0]
    groups = mask.shape[1] // 9
    out = torch.zeros(1, outs, height, width, dtype=x.dtype)
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                g = c // (channels // groups)
                for tap in range(9):
                    y = i + tap // 3 - 1 + offset[0, 18 * g + 2 * tap, i, j].item()
                    z = j + tap % 3 - 1 + offset[0, 18 * g + 2 * tap + 1, i, j].item()
                    value = 0.0
                    for r in (int(np.floor(y)), int(np.floor(y)) + 1):
                        for s in (int(np.floor(z)), int(np.floor(z)) + 1):
                            if 0 <= r < height and 0 <= s < width:
                                value += (1 - abs(y - r)) * (1 - abs(z - s)) * x[0, c, r, s].item()
                    seen = value * mask[0, 9 * g + tap, i, j].item()
                    out[0, :, i, j] += weight[:, c, tap // 3, tap % 3] * seen
    return out


def test_deformable_convolution_is_its_formula():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 4, 5, generator=g, dtype=torch.float64)
    offset = 2 * torch.randn(1, 36, 4, 5, generator=g, dtype=torch.float64)
    mask = torch.rand(1, 18, 4, 5, generator=g, dtype=torch.float64)
    weight = torch.randn(3, 4, 3, 3, generator=g, dtype=torch.float64)
    assert (deform_conv(x, offset, mask, weight) - slow_deform(x, offset, mask, weight)).abs().max() < 1e-12


def test_deformable_convolution_is_torchvisions():
    x, offset, mask = torch.randn(2, 16, 9, 11), 3 * torch.randn(2, 144, 9, 11), torch.rand(2, 72, 9, 11)
    weight, bias = torch.randn(5, 16, 3, 3), torch.randn(5)
    try:
        from torchvision.ops import deform_conv2d

        theirs = deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)
    except (ImportError, RuntimeError) as error:  # its binary does not load beside every torch
        pytest.skip(f"torchvision's operator does not load here: {str(error).splitlines()[0][:80]}")
    assert (deform_conv(x, offset, mask, weight, bias) - theirs).abs().max() < 1e-4


def test_a_deformable_convolution_that_is_not_deformed():
    x, weight = torch.randn(2, 8, 6, 7), torch.randn(4, 8, 3, 3)
    plain = torch.nn.functional.conv2d(x, weight, padding=1)
    ours = deform_conv(x, torch.zeros(2, 72, 6, 7), torch.ones(2, 36, 6, 7), weight)
    assert (ours - plain).abs().max() < 1e-5


def test_frames_around_a_keyframe():
    """As BasicSR's: before the first of a clip come frames 4 and 3, after the last its third and fourth last
    but one; of clips shorter than that, which it fails on, frames they have."""
    assert window_around(0, 9, 5) == [4, 3, 0, 1, 2] and window_around(1, 9, 5) == [3, 0, 1, 2, 3]
    assert window_around(8, 9, 5) == [6, 7, 8, 5, 4] and window_around(4, 9, 5) == [2, 3, 4, 5, 6]
    assert window_around(0, 9, 7) == [6, 5, 4, 0, 1, 2, 3] and window_around(8, 9, 7) == [5, 6, 7, 8, 4, 3, 2]
    for count in range(1, 5):
        for i in range(count):
            window = window_around(i, count, 5)
            assert window[2] == i and all(0 <= j < count for j in window)


# ---- networks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (9, 33)])
def test_odd_sizes_and_a_single_frame(kind, size):
    for count in (1, 3):
        out, _ = tiny(kind)(torch.rand(1, count, 3, *size))
        assert out.shape == (1, count, 3, 4 * size[0], 4 * size[1]) and out.isfinite().all()


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_without_weights_interpolates(kind):
    """All that is added to the bilinear picture is the last convolution's."""
    network = tiny(kind)
    torch.nn.init.zeros_(network.conv_last.weight)
    torch.nn.init.zeros_(network.conv_last.bias)
    x = torch.rand(1, 2, 3, 8, 12)
    base = torch.nn.functional.interpolate(x[0], scale_factor=4, mode="bilinear", align_corners=False)
    assert torch.equal(network(x)[0][0], base)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_stays_near_and_leaves_flow_alone(kind, dtype):
    exact, x = tiny(kind, seed=3), torch.rand(1, 6, 3, 12, 16)
    whole = exact(x)[0]
    network = tiny(kind, seed=3).to(dtype)
    network.spynet.load_state_dict(exact.spynet.float().state_dict())
    network.spynet.float()
    out, memory = network(x)
    assert out.dtype == torch.float32 and memory.hidden.dtype == dtype and memory.frame.dtype == torch.float32
    error = (out - whole).abs().max()
    assert 0 < error < (2e-2 if dtype == torch.bfloat16 else 2e-3)


def operations(module, x) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


def test_parameters_and_operations():
    """6.29 M and 8.69 M, not the 28.8 M of a popular guide; operations of a frame from 192x320 to 768x1280,
    60 times 32x32. One of IconVSR's keyframes costs nearly as much as a frame of BasicVSR."""
    networks = {kind: NETWORKS[kind]().eval() for kind in NETWORKS}
    sizes = {kind: sum(p.numel() for p in net.parameters()) for kind, net in networks.items()}
    assert sizes == {"basicvsr": 6_291_311, "iconvsr": 8_694_991}
    one, two = (torch.rand(1, frames, 3, 32, 32) for frames in (1, 2))
    more = {kind: 60 * (operations(net, two) - operations(net, one)) for kind, net in networks.items()}
    keyframe = 60 * operations(networks["iconvsr"].edvr, torch.rand(1, 5, 3, 32, 32))
    mixing = 60 * 2 * operations(networks["iconvsr"].forward_fusion, torch.rand(1, 128, 32, 32))
    assert more["basicvsr"] == pytest.approx(0.7991e12, rel=1e-3)
    one_in_five = more["iconvsr"] - 0.8 * (keyframe + mixing)  # of one and two frames all are keyframes
    assert one_in_five == pytest.approx(0.9626e12, rel=1e-3)
    assert keyframe == pytest.approx(0.7815e12, rel=1e-3)


# ---- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_released_names_and_shapes_load_strictly(kind):
    page = manifest(kind)
    tensors = {n: torch.empty(shape, device="meta") for n, shape in page["tensors"].items()}
    network = network_of(kind, tensors, "manifest")
    assert network.state_dict().keys() == tensors.keys()
    assert len(network.forward_trunk.main[2]) == page["meta"]["num_block"]
    assert sum(t.numel() for t in network.state_dict().values()) == page["parameters"]


def checkpoint(path: Path, kind: str, wrap=lambda state: state, **settings) -> Path:
    extra = dict(groups=2, edvr_blocks=1) if kind == "iconvsr" else {}
    torch.save(wrap(random_network(kind, 5, **TINY | settings, **extra).state_dict()), path)
    return path


def without_constants(state):
    return {n: t for n, t in state.items() if n not in ("spynet.mean", "spynet.std")}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"params": state},
        lambda state: {"params": {}, "params_ema": state, "iteration": 3},
        lambda state: {"state_dict": {f"module.{n}": t for n, t in state.items()}},
        without_constants,
    ],
)
def test_wrappers_and_prefixes(tmp_path, wrap):
    path = checkpoint(tmp_path / "w.pth", "basicvsr", wrap)
    network = load_network("basicvsr", path)
    theirs = random_network("basicvsr", 5, **TINY).state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in network.module.state_dict().items())
    assert network.weights.startswith("w.pth (sha256 ") and not network.module.training
    assert not any(p.requires_grad for p in network.module.parameters())


def test_safetensors_and_other_windows(tmp_path):
    state = random_network("iconvsr", 5, **TINY, groups=2, edvr_blocks=2, window=7).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    module = load_network("iconvsr", tmp_path / "w.safetensors", dtype=torch.bfloat16).module
    assert module.window == 7 and len(module.edvr.feature_extraction) == 2
    assert module.conv_last.weight.dtype == torch.bfloat16
    assert (
        module.spynet.mean.dtype
        == module.spynet.basic_module[0].basic_module[0].weight.dtype
        == torch.float32
    )


def test_random_weights_are_always_the_same_and_say_what_they_are():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a, b = (load_network("basicvsr", "random") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.module.conv_last.weight, b.module.conv_last.weight)
    assert "random weights" in a.weights and a.name == "BasicVSR" and a.parameters == 6_291_311


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-2000])


def _of(kind):
    return lambda path: checkpoint(path, kind)


def _state(change):
    def spoil(path):
        state = torch.load(path)
        change(state)
        torch.save(state, path)

    return spoil


@pytest.mark.parametrize(
    "kind,spoil,sentence",
    [
        ("basicvsr", lambda p: p.unlink(), "does not exist"),
        ("basicvsr", _truncated, "is not a whole file of plain tensors"),
        ("basicvsr", lambda p: p.write_bytes(b""), "is not a whole file"),
        ("basicvsr", lambda p: p.write_text("<html>"), "is a web page"),
        ("basicvsr", _of("iconvsr"), "holds IconVSR, not BasicVSR; write iconvsr in its place"),
        ("iconvsr", _of("basicvsr"), "holds BasicVSR, not IconVSR; write basicvsr in its place"),
        ("basicvsr", lambda p: torch.save({"a": torch.zeros(2)}, p), "no checkpoint of BasicVSR by"),
        ("basicvsr", lambda p: torch.save([1, 2], p), "holds no named tensors"),
        ("basicvsr", lambda p: torch.save({0: torch.zeros(2)}, p), "no checkpoint of BasicVSR by"),
        ("basicvsr", lambda p: torch.save({"epoch": 3}, p), "holds epoch beside tensors"),
        ("basicvsr", _state(lambda s: s.pop("conv_hr.bias")), "does not fit BasicVSR by BasicSR's names"),
        ("basicvsr", _state(lambda s: s.update(x=s["conv_hr.bias"])), "it holds the unknown x"),
        ("basicvsr", _state(lambda s: s.update({"fusion.bias": torch.zeros(9)})), "shape of fusion.bias"),
        ("basicvsr", _state(lambda s: s.pop("upconv1.weight")), "lacks upconv1.weight"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(tmp_path, kind, spoil, sentence):
    path = checkpoint(tmp_path / "w.pth", "basicvsr")
    spoil(path)
    with pytest.raises(UserError, match="w.pth") as error:
        load_network(kind, path)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_what_cannot_be_loaded_at_all():
    with pytest.raises(UserError, match=r"weights=FILE, an official checkpoint .* or weights=random"):
        load_network("basicvsr", None)
    with pytest.raises(UserError, match="by 4 only, not by scale=2"):
        load_network("iconvsr", "random", scale=2)
    with pytest.raises(UserError, match="'edvr'; there are basicvsr, iconvsr"):
        load_network("edvr", "random")
