"""One forward, three ways: the plans compute the same function where they overlap."""

import pytest
import torch

from flashvsr.attention.plans import CachedStreaming, PackedDense, SparseCausal, training_ratio
from flashvsr.attention.ring import Ring
from flashvsr.attention.selection import local_window
from flashvsr.config import DiTConfig
from flashvsr.models.dit import DiT

CONFIG = DiTConfig(dim=24, ffn=32, layers=3, heads=2, freq_dim=16, text_dim=8, text_len=4, block=(2, 2, 2))
ROWS, COLUMNS = 8, 6  # tokens: 4x3 blocks in a chunk
PER_CHUNK = 12


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    dit = DiT(CONFIG).double().requires_grad_(False)
    dit.set_prompt(torch.randn(1, 4, 8))
    for block in dit.blocks:
        block.modulation.normal_(std=0.3)
    return dit


def clip(latents, batch=1, rows=ROWS, columns=COLUMNS):
    torch.manual_seed(latents)
    x = torch.randn(batch, 16, latents, 2 * rows, 2 * columns, dtype=torch.float64)
    features = [torch.randn(batch, latents, rows, columns, 24, dtype=torch.float64) for _ in range(2)]
    return x, features


def streamed(dit, x, features, *, kv_chunks, ratio, local=None, first=0):
    """Velocities and, per call and layer, the chosen pairs with keys in time order."""
    block_tokens = 8
    ring = Ring(kv_chunks, CONFIG.layers, PER_CHUNK * block_tokens, PER_CHUNK)
    out, chosen, at = [], [], 0
    sigma = torch.ones(x.shape[0], 1)
    for n in [6, *[2] * ((x.shape[2] - 6) // 2)]:
        plan = CachedStreaming(
            (n, ROWS, COLUMNS), first + at, ring, block=CONFIG.block, head_dim=CONFIG.head_dim, ratio=ratio,
            local=local, backend="reference",
        )  # fmt: skip
        part = slice(at, at + n)
        out += dit([x[:, :, part]], sigma, plan, [[f[:, part]] for f in features])
        seen = [*ring.chunks, *plan.chunks]
        chosen.append({
            layer: (seen, torch.cat([s.mask()[..., ring.blocks(c)] for c in seen], -1))
            for layer, s in plan.selections.items()
        })  # fmt: skip
        ring.advance(plan.chunks)
        at += n
    return torch.cat(out, 2), chosen


def parallel(dit, x, features, *, window, ratio, local=None, sigma=None):
    plan = SparseCausal(
        (x.shape[2], ROWS, COLUMNS), block=CONFIG.block, head_dim=CONFIG.head_dim, ratio=ratio, window=window,
        local=local, backend="gather",
    )  # fmt: skip
    sigma = torch.ones(x.shape[0], 1) if sigma is None else sigma
    (v,) = dit([x], sigma, plan, [[f] for f in features])
    return v, plan.selections


@pytest.mark.parametrize("kv_chunks", [2, 3, 5])
@pytest.mark.parametrize("ratio,window", [(1.0, None), (0.4, 3), (None, None)])
def test_masked_parallel_forward_equals_streaming(dit, kv_chunks, ratio, window):
    x, features = clip(14, batch=2)
    local = None if window is None else local_window(4, 3, window)
    v_stream, chosen = streamed(dit, x, features, kv_chunks=kv_chunks, ratio=ratio, local=local)
    v_clip, selections = parallel(dit, x, features, window=kv_chunks + 1, ratio=ratio, local=local)
    assert (v_stream - v_clip).abs().max() < 1e-7  # rotary angles are float32, everything else float64
    row = 0
    for call in chosen:
        for layer, (seen, mask) in call.items():
            whole = selections[layer].mask()[:, :, row : row + mask.shape[2]]
            inside = torch.cat([whole[..., c * PER_CHUNK : (c + 1) * PER_CHUNK] for c in seen], -1)
            assert torch.equal(inside, mask), "training and streaming choose the same blocks"
            assert inside.sum() == whole.sum(), "nothing outside the window"
        row += mask.shape[2]


def test_a_packed_segment_equals_the_segment_alone(dit):
    segments = [clip(5), clip(1, rows=4, columns=10), clip(3)]
    xs = [x for x, _ in segments]
    features = [[f[layer] for _, f in segments] for layer in range(2)]
    sigma = torch.tensor([[0.9, 0.2, 0.55]])
    grids = [(x.shape[2], x.shape[3] // 2, x.shape[4] // 2) for x in xs]
    packed = dit(xs, sigma, PackedDense(grids, CONFIG.head_dim), features)
    for i, (x, own) in enumerate(segments):
        plan = PackedDense([grids[i]], CONFIG.head_dim)
        (alone,) = dit([x], sigma[:, i : i + 1], plan, [[f] for f in own])
        assert (packed[i] - alone).abs().max() < 1e-12


@pytest.mark.parametrize("latents", [2, 4, 6])
def test_dense_equals_sparse_without_selection_while_all_chunks_see_each_other(dit, latents):
    x, features = clip(latents, batch=2)
    sigma = torch.tensor([[0.8], [0.3]])
    sparse, _ = parallel(dit, x, features, window=1, ratio=None, sigma=sigma)
    plan = PackedDense([(latents, ROWS, COLUMNS)], CONFIG.head_dim)
    (dense,) = dit([x], sigma, plan, [[f] for f in features])
    assert (dense - sparse).abs().max() < 1e-12


def test_four_chunks_are_causal(dit):
    """The last chunk changes nothing before it; without the causal pattern it does."""
    x, features = clip(8)
    other = x.clone()
    other[:, :, 6:] += 1
    a, b = (parallel(dit, y, features, window=None, ratio=None)[0] for y in (x, other))
    assert (a[:, :, :6] - b[:, :, :6]).abs().max() == 0 and (a[:, :, 6:] - b[:, :, 6:]).abs().max() > 1e-3
    plan = PackedDense([(8, ROWS, COLUMNS)], CONFIG.head_dim)
    a, b = (dit([y], torch.ones(1, 1), plan, [[f] for f in features])[0] for y in (x, other))
    assert (a[:, :, :6] - b[:, :, :6]).abs().max() > 1e-4


def test_the_position_in_a_stream_does_not_matter(dit):
    """Rotary positions are relative: latent 1,000,000 as 20. The angles are exact, so nothing drifts."""
    x, features = clip(12)
    single = dit.float()
    inputs = x.float(), [f.float() for f in features]
    near, far = (
        streamed(single, *inputs, kv_chunks=3, ratio=None, first=first)[0] for first in (20, 1_000_000)
    )
    dit.double()
    assert near.dtype == torch.float32
    assert (near - far).abs().max() < 1e-5
    assert near.abs().max() > 0.1


def test_checkpointing_recomputes_the_same_attention(dit):
    """The choice of blocks is made once per layer and read again by the recomputation."""
    x, features = clip(8)
    gradients = []
    for checkpointing in (False, True):
        dit.checkpointing = checkpointing
        y = x.clone().requires_grad_()
        parallel(dit, y, features, window=3, ratio=0.5)[0].square().sum().backward()
        gradients.append(y.grad)
    dit.checkpointing = False
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0


def test_training_ratio():
    assert training_ratio(2.0, 768 * 1280, 768, 1280) == 2.0
    assert training_ratio(2.0, 768 * 1280, 384, 640) == 8.0
    assert training_ratio(None, 1, 1, 1) is None


def test_causal_pattern_of_a_plan():
    plan = SparseCausal((10, 2, 2), block=(2, 2, 2), head_dim=12, ratio=None, window=3)
    assert plan.visible == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
