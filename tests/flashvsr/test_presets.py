"""The presets: real sparsity and causality at every scale's training size, Wan's names at the paper's."""

import json
from pathlib import Path

import pytest
import torch

from flashvsr.attention.plans import CHUNK, CachedStreaming, SparseCausal, training_ratio
from flashvsr.attention.ring import Ring
from flashvsr.attention.selection import causal_chunks
from flashvsr.base.operators import declare_torchvision
from flashvsr.config import PRESETS
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.diffusers import config_json, from_wan, to_wan

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "tests" / "data" / "manifests"  # every tensor name and shape of the release's files


def training_size(scale: str) -> tuple[int, int, int]:
    """Latents, height and width a scale trains at."""
    yaml = pytest.importorskip("yaml")
    train = yaml.safe_load((ROOT / "configs" / "scale" / f"{scale}.yaml").read_text())["train"]
    return train["latents"], train["height"], train["width"]


@pytest.mark.parametrize("scale", sorted(PRESETS))
def test_training_is_sparse_and_causal_and_streaming_picks_the_same_blocks(scale):
    latents, height, width = training_size(scale)
    config, kv_chunks = PRESETS[scale].dit, 3
    rows, columns = height // 16, width // 16
    block = config.block
    if scale == "wan1.3b":  # 84,480 tokens: a token per block and latent has the same blocks and chunks
        rows, columns, block = rows // block[1], columns // block[2], (2, 1, 1)
    shared = {
        "block": block,
        "head_dim": config.head_dim,
        "ratio": training_ratio(2.0, height * width, height, width),
    }
    plan = SparseCausal((latents, rows, columns), window=kv_chunks + 1, **shared)
    torch.manual_seed(0)
    tokens = latents * rows * columns
    q, k, v = (torch.randn(1, tokens, 2, config.head_dim) for _ in range(3))  # each head chooses for itself
    out = plan.attend(0, q, k, v)
    mask = plan.selections[0].mask()
    s = plan.per_chunk
    assert latents >= 10 and s >= 4

    seen = causal_chunks(latents // CHUNK, kv_chunks + 1)
    causal = seen.repeat_interleave(s, 0).repeat_interleave(s, 1)
    assert not causal.all(), "some chunk must not be seen"
    assert (mask <= causal).all(), "nothing outside the causal window"
    for chunk in range(len(seen)):
        part = mask[:, :, chunk * s : (chunk + 1) * s]
        share = part.sum((-1, -2)) / causal[chunk * s : (chunk + 1) * s].sum()
        assert (share < 0.95).all() and (share > 0).all(), "every chunk and head selects"

    ring = Ring(kv_chunks, 1, plan.chunk_tokens, s)
    at = 0
    for n in [6, *[2] * ((latents - 6) // 2)]:
        call = CachedStreaming((n, rows, columns), at, ring, **shared)
        part = slice(at * rows * columns, (at + n) * rows * columns)
        streamed = call.attend(0, q[:, part], k[:, part], v[:, part])
        assert (streamed - out[:, part]).abs().max() < 1e-5
        in_time = [*ring.chunks, *call.chunks]
        ours = call.selections[0].mask()
        theirs = mask[:, :, at // 2 * s : (at + n) // 2 * s]
        for chunk in in_time:
            assert torch.equal(ours[..., ring.blocks(chunk)], theirs[..., chunk * s : (chunk + 1) * s])
        assert ours.sum() == theirs.sum()
        ring.advance(call.chunks)
        at += n


@pytest.mark.parametrize(
    "manifest,part,module",
    [
        ("flashvsr_dit", "dit", DiT),
        ("flashvsr_lq_proj_in", "lr_projector", LRProjector),
        ("flashvsr_tc_decoder", "tc_decoder", TCDecoder),
        ("wan2.1_vae", "vae", WanVAE),
    ],
)
def test_names_and_shapes_are_those_of_the_release(manifest, part, module):
    listed = json.loads((MANIFESTS / f"{manifest}.json").read_text())
    with torch.device("meta"):
        state = module(getattr(PRESETS["wan1.3b"], part)).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == listed["tensors"]
    assert sum(tensor.numel() for tensor in state.values()) == listed["parameters"]


def test_names_in_diffusers():
    """The released map, and at real size diffusers' own transformer, tensor by tensor."""
    released = json.loads((MANIFESTS / "diffusers_wan_to_wan.json").read_text())["map"]
    assert {name: to_wan(name) for name in released} == released
    assert {ours: from_wan(ours) for ours in released.values()} == {o: t for t, o in released.items()}
    declare_torchvision()
    diffusers = pytest.importorskip("diffusers")
    config = PRESETS["wan1.3b"].dit
    given = {k: v for k, v in config_json(config).items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**given).state_dict()
        ours = DiT(config).state_dict()
    assert {from_wan(n): t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}
    assert {to_wan(n) for n in theirs} == ours.keys()


def test_parameter_counts():
    """What the papers say."""
    counts = {}
    with torch.device("meta"):
        for part, module in (
            ("dit", DiT),
            ("lr_projector", LRProjector),
            ("tc_decoder", TCDecoder),
            ("vae", WanVAE),
        ):
            made = module(getattr(PRESETS["wan1.3b"], part))
            counts[part] = sum(p.numel() for p in made.parameters())
    assert counts == {
        "dit": 1_418_996_800, "lr_projector": 287_845_888, "tc_decoder": 45_338_371, "vae": 126_892_531,
    }  # fmt: skip
