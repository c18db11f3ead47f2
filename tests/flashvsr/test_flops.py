"""Counted work against torch's counter, on fake tensors: paper sizes cost nothing there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flashvsr import flops
from flashvsr.attention import Selection, sparse_attention
from flashvsr.attention.plans import PackedDense, SparseCausal
from flashvsr.config import PRESETS
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE


def counted(fn) -> int:
    """What torch counts; the fused CPU attention is not in its list: as two products, or added to it."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    fused = {kernel: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=fused) as counter:
        fn()
    return counter.get_total_flops()


@pytest.fixture
def fake():
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("segments", [[(4, 8, 8)], [(22, 48, 80), (1, 48, 80)]])
def test_dense_transformer(fake, segments):
    config = replace(PRESETS["wan1.3b"].dit, layers=2)
    model = DiT(config)
    model.set_prompt(torch.empty(1, config.text_len, config.text_dim))
    plan = PackedDense(segments, config.head_dim)
    latents = [torch.empty(2, 16, f, 2 * h, 2 * w) for f, h, w in segments]
    features = [[torch.empty(2, f, h, w, config.dim) for f, h, w in segments]]
    sigma = torch.empty(2, len(segments))
    sizes = [f * h * w for f, h, w in segments]
    ours = flops.dit(
        config, tokens=sum(sizes), pairs=flops.dense_pairs(sizes), batch=2, segments=len(segments)
    )
    assert counted(lambda: model(latents, sigma, plan, features)) == ours.forward

    def both():
        velocities = model(latents, sigma, plan, features)
        sum(v.sum() for v in velocities).backward()

    useful, executed = ours.training()
    # torch leaves out what no gradient needs at the very start of the time embedding: its first input
    assert counted(both) == pytest.approx(useful, rel=1e-3)
    assert executed > useful
    model.requires_grad_(False)
    latents = [x.requires_grad_() for x in latents]
    assert counted(both) == pytest.approx(ours.training(weights=False, inputs=True)[0], rel=1e-3)


def test_recomputation_is_a_forward_more():
    config = PRESETS["tiny"].dit
    work = flops.dit(config, tokens=256, pairs=256 * 256)
    useful, executed = work.training()
    again_useful, again_executed = work.training(recompute=True)
    assert again_useful == useful and again_executed - executed == work.forward
    scores = work.parts["attention"] + work.parts["cross attention"]
    assert executed - useful == scores // 2


@pytest.mark.parametrize("ratio,window", [(2.0, None), (2.0, 4), (0.4, 3), (None, 4)])
def test_pairs_of_a_plan_are_those_it_chooses(ratio, window):
    config, grid = PRESETS["tiny"].dit, (10, 8, 12)
    plan = SparseCausal(
        grid, block=config.block, head_dim=config.head_dim, ratio=ratio, window=window, backend="gather"
    )
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 10 * 8 * 12, config.heads, config.head_dim) for _ in range(3))
    plan.attend(0, q, k, v)
    chosen = flops.selected_pairs(plan.selections[0])
    assert chosen == flops.clip_pairs(config, grid, ratio=ratio, window=window)


def test_sparse_attention_executes_what_was_selected():
    """Rows of equal length: nothing is padded, so torch counts exactly the selected pairs."""
    heads, d, n, rows, keys, kept = 3, 16, 8, 10, 12, 5
    torch.manual_seed(0)
    mask = torch.zeros(1, heads, rows, keys, dtype=torch.bool)
    mask.scatter_(3, torch.rand(1, heads, rows, keys).argsort(-1)[..., :kept], True)
    selection = Selection.from_mask(mask, n)
    q, k, v = (torch.randn(1, heads, x * n, d) for x in (rows, keys, keys))
    ours = flops.attention(flops.selected_pairs(selection), heads * d)
    assert ours == 4 * heads * d * rows * n * kept * n
    assert counted(lambda: sparse_attention(q, k, v, selection, backend="gather")) == ours
    assert flops.choosing(heads, d, rows, keys) == counted(
        lambda: torch.empty(3, 10, 16) @ torch.empty(3, 16, 12)
    )


@pytest.mark.parametrize("scale,height,width,n", [("tiny", 64, 96, 3), ("wan1.3b", 768, 1280, 22)])
@pytest.mark.parametrize("mode", ["causal", "clip", "buffer"])
def test_projector(fake, scale, height, width, n, mode):
    config = PRESETS[scale].lr_projector
    model = LRProjector(config)
    video = torch.empty(1, 3, 4 * n + 1, height, width)
    memory = None

    def first():
        nonlocal memory
        memory = model(video, mode=mode)[1]

    ours = flops.projector(config, frames=4 * n + 1, height=height, width=width)
    assert counted(first) == ours.forward
    later = flops.projector(config, frames=8, height=height, width=width, start=False)
    if mode != "clip":
        assert counted(lambda: model(video[:, :, :8], memory, mode)) == later.forward
    assert counted(lambda: model(video, mode=mode)[0][0].sum().backward()) == ours.training()[0]


@pytest.mark.parametrize("scale,height,width", [("tiny", 64, 96), ("wan1.3b", 768, 1408)])
def test_tc_decoder(fake, scale, height, width):
    config = PRESETS[scale].tc_decoder
    model = TCDecoder(config)
    latent = torch.empty(1, 16, 6, height // 8, width // 8)
    lr = torch.empty(1, 3, 21, height, width)
    ours = flops.tc_decoder(config, latents=6, height=height, width=width)
    assert counted(lambda: model(latent, lr)) == ours.forward
    assert counted(lambda: model(latent, lr)[0].sum().backward()) == ours.training()[0]


def test_vae(fake):
    config, height, width = PRESETS["wan1.3b"].vae, 384, 256
    model = WanVAE(config)
    video = torch.empty(1, 3, 13, height, width)
    latent = torch.empty(1, 16, 4, height // 8, width // 8)
    sizes = {"height": height, "width": width}
    memory = None

    def encode():
        nonlocal memory
        memory = model.encode(video)[1]

    assert counted(encode) == flops.vae_encode(config, frames=13, **sizes).forward
    later = flops.vae_encode(config, frames=8, start=False, **sizes)
    assert counted(lambda: model.encode(video[:, :, :8], memory)) == later.forward

    def decode():
        nonlocal memory
        memory = model.decode(latent)[1]

    ours = flops.vae_decode(config, latents=4, **sizes)
    assert counted(decode) == ours.forward
    later = flops.vae_decode(config, latents=2, start=False, **sizes)
    assert counted(lambda: model.decode(latent[:, :, :2], memory)) == later.forward
    trained = counted(lambda: model.decode(latent)[0].sum().backward())
    assert trained == pytest.approx(ours.training()[0], rel=0.01)
