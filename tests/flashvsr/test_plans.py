"""One forward, three ways: the plans compute the same function where they overlap.

Masks are compared first: a pair in which two ways differ lies within 1e-6 of its threshold (relative); then
outputs are compared, computed with the same masks. `pytest -s` prints the worst errors.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flashvsr.attention.plans import CachedStreaming, PackedDense, SparseCausal, training_ratio
from flashvsr.attention.ring import Ring
from flashvsr.attention.selection import budget, local_window
from flashvsr.config import DiTConfig
from flashvsr.models.dit import DiT
from tests.watched import Watched

CONFIG = DiTConfig(dim=24, ffn=32, layers=3, heads=2, freq_dim=16, text_dim=8, text_len=4, block=(2, 2, 2))
WAN_LIKE = replace(CONFIG, dim=96, layers=2, block=(2, 8, 8))  # heads of 48: odd thirds for rows and columns
ROWS, COLUMNS = 8, 6  # tokens: 4x3 blocks in a chunk


@dataclass(frozen=True)
class Case:
    config: DiTConfig
    grid: tuple[int, int]  # token rows and columns
    latents: int
    kv_chunks: int
    ratio: float | None
    local: int | None = None

    @property
    def blocks(self) -> tuple[int, int]:
        return self.grid[0] // self.config.block[1], self.grid[1] // self.config.block[2]

    @property
    def window(self) -> Tensor | None:
        return None if self.local is None else local_window(*self.blocks, self.local)


SMALL = Case(CONFIG, (ROWS, COLUMNS), 14, 3, 1.0)
CASES = [
    replace(SMALL, kv_chunks=kv, ratio=ratio, local=local)
    for kv in (2, 3, 5)
    for ratio, local in ((1.0, None), (0.4, 3), (None, None))
] + [
    Case(CONFIG, (2, 12), 10, 2, 2.0, 4),  # one block row, an even window
    Case(CONFIG, (2, 2), 10, 2, 2.0),  # one block in a chunk
    Case(WAN_LIKE, (16, 24), 12, 3, 0.75),
    Case(WAN_LIKE, (8, 40), 14, 2, 1.5, 3),
    Case(WAN_LIKE, (24, 16), 10, 4, 0.1),  # empty rows
]


def make_dit(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    dit = DiT(config).requires_grad_(False)
    dit.set_prompt(torch.randn(1, 4, 8))
    for block in dit.blocks:
        block.modulation.normal_(std=0.3)
    return dit


@pytest.fixture(scope="module")
def dit():
    dit = make_dit(CONFIG).double()
    return dit


@pytest.fixture(scope="module", params=["small", "wan-like"])
def single(request):
    """In float32, with the case that goes with it."""
    case = SMALL if request.param == "small" else Case(WAN_LIKE, (16, 24), 12, 3, 0.75)
    return make_dit(case.config), case


def clip(latents, batch=1, rows=ROWS, columns=COLUMNS, dim=24):
    """Latents and features of two layers, float64; features differ from block to block, as pictures do."""
    torch.manual_seed(latents)
    x = torch.randn(batch, 16, latents, 2 * rows, 2 * columns, dtype=torch.float64)
    features = [torch.randn(batch, latents, rows, columns, dim, dtype=torch.float64) for _ in range(2)]
    return x, features


def inputs_of(case: Case, dtype: torch.dtype, batch: int = 1):
    x, features = clip(case.latents, batch, *case.grid, case.config.dim)
    return x.to(dtype), [f.to(dtype) for f in features]


def streamed(dit, case: Case, x, features, *, first=0, given=None, backend="auto"):
    """Velocities, and the watched plan of every call."""
    s = case.blocks[0] * case.blocks[1]
    tokens = case.config.block[0] * case.config.block[1] * case.config.block[2]
    ring = Ring(case.kv_chunks, case.config.layers, s * tokens, s)
    out, calls, at = [], [], 0
    sigma = torch.ones(x.shape[0], 1)
    for n in [6, *[2] * ((x.shape[2] - 6) // 2)]:
        plan = CachedStreaming(
            (n, *case.grid), first + at, ring, block=case.config.block, head_dim=case.config.head_dim,
            ratio=case.ratio, local=case.window, backend=backend,
        )  # fmt: skip
        calls.append(Watched(plan, given))
        part = slice(at, at + n)
        out += dit([x[:, :, part]], sigma, calls[-1], [[f[:, part]] for f in features])
        ring.advance(plan.chunks)
        at += n
    return torch.cat(out, 2), calls


def masks(calls):
    return {key: mask for call in calls for key, mask in call.used.items()}


def in_parallel(dit, case: Case, x, features, *, given=None, backend="gather"):
    """Velocity of the whole clip and its watched plan, with the window that streaming has."""
    plan = SparseCausal(
        (x.shape[2], *case.grid), block=case.config.block, head_dim=case.config.head_dim, ratio=case.ratio,
        window=case.kv_chunks + 1, local=case.window, backend=backend,
    )  # fmt: skip
    watched = Watched(plan, given)
    (v,) = dit([x], torch.ones(x.shape[0], 1), watched, [[f] for f in features])
    return v, watched


def parallel(dit, x, features, *, window, ratio, local=None, sigma=None):
    plan = SparseCausal(
        (x.shape[2], ROWS, COLUMNS), block=CONFIG.block, head_dim=CONFIG.head_dim, ratio=ratio, window=window,
        local=local, backend="gather",
    )  # fmt: skip
    sigma = torch.ones(x.shape[0], 1) if sigma is None else sigma
    (v,) = dit([x], sigma, plan, [[f] for f in features])
    return v, plan.selections


def case_name(case: Case) -> str:
    block = "x".join(map(str, case.config.block))
    return f"{block}-{case.grid[0]}x{case.grid[1]}-kv{case.kv_chunks}-ratio{case.ratio}-local{case.local}"


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_masked_parallel_forward_equals_streaming(case):
    dit = make_dit(case.config)
    x, features = inputs_of(case, torch.float32, batch=2)
    v_stream, calls = streamed(dit, case, x, features)
    v_clip, watched = in_parallel(dit, case, x, features, given=masks(calls))
    assert len(watched.differences) == case.config.layers * case.latents // 2
    for (_, chunk), choice in watched.choices.items():
        call = next(call for call in calls if chunk in call.chunks)
        assert choice.visible == call.choices[0, chunk].visible, "nothing outside the window"
    difference = watched.total
    error = (v_stream - v_clip).abs().max().item()
    print(
        f"\n{case_name(case)}: velocity {error:.1e}, wrong pairs {difference.wrong}, ties {difference.ties}"
    )
    assert difference.wrong == 0, f"pairs differ up to {difference.worst:.1e} from the threshold"
    assert error < 1e-5 and v_clip.abs().max() > 0.1


@pytest.mark.parametrize("case", CASES[:3], ids=case_name)
def test_masked_parallel_forward_equals_streaming_in_float64(dit, case):
    x, features = inputs_of(case, torch.float64)
    v_stream, calls = streamed(dit, case, x, features)
    v_clip, watched = in_parallel(dit, case, x, features)
    assert all(torch.equal(mask, watched.used[key]) for key, mask in masks(calls).items())
    assert (v_stream - v_clip).abs().max() < 1e-7  # rotary angles are float32, everything else float64


def test_bfloat16_ways_differ_less_than_either_drifts(single):
    """In bfloat16 both ways go on with the same masks. Rule: their root mean square difference is at most
    what the farther of the two is away from float64 arithmetic on the same bfloat16 weights, inputs and
    masks; and that drift itself is bfloat16's (a per cent or so), not an error."""
    _, case = single
    dit = make_dit(case.config).bfloat16()
    x, features = inputs_of(case, torch.bfloat16)
    v_stream, calls = streamed(dit, case, x, features)
    chosen = masks(calls)
    v_clip, _ = in_parallel(dit, case, x, features, given=chosen)
    exact = dit.double()
    wide = x.double(), [f.double() for f in features]
    v_exact, _ = streamed(exact, case, *wide, given=chosen)

    def rms(a, b):
        return (a.double() - b.double()).square().mean().sqrt().item()

    drifts = rms(v_stream, v_exact), rms(v_clip, v_exact)
    apart, size = rms(v_stream, v_clip), v_exact.square().mean().sqrt().item()
    print(f"\n{case_name(case)}: apart {apart:.1e}, drift {drifts[0]:.1e} and {drifts[1]:.1e} of {size:.2f}")
    assert v_stream.dtype == torch.bfloat16
    assert apart <= max(drifts) and max(drifts) < 0.02 * size


@pytest.mark.parametrize("ratio", ["selected", None])
def test_the_position_in_a_stream_does_not_matter(single, ratio):
    """Rotary positions are relative: a stream that starts at latent 1,000,000 gives what one that starts at
    20 gives, on the same input, call after call with cached keys. Angles come from the index in float64; the
    release's table ends at 1,024."""
    dit, case = single
    case = case if ratio else replace(case, ratio=None)
    x, features = inputs_of(case, torch.float32)
    near, calls = streamed(dit, case, x, features, first=20)
    shifted = {(layer, chunk - 10 + 500_000): mask for (layer, chunk), mask in masks(calls).items()}
    far, far_calls = streamed(dit, case, x, features, first=1_000_000, given=shifted)
    assert sum(len(call.differences) for call in far_calls) == case.config.layers * case.latents // 2
    error = (near - far).abs().max().item()
    print(f"\n{case_name(case)}: latent 1,000,000 against 20: {error:.1e}")
    assert sum(call.total.wrong for call in far_calls) == 0
    assert error < 1e-5 and near.abs().max() > 0.1


def test_a_position_that_is_off_by_one_matters(single):
    """The test above can fail: keys cached one latent away from where they are do change the result."""
    dit, case = single
    x, features = inputs_of(case, torch.float32)
    v, _ = streamed(dit, case, x, features)
    first = dit.forward

    def late(segments, sigma, plan, features):
        if segments[0].shape[2] == 2:
            later = plan.plan.chunks[0] * 2 + 1
            moved = CachedStreaming(
                (2, *case.grid), later, Ring(2, 1, 1, 1), block=case.config.block,
                head_dim=case.config.head_dim, ratio=None,
            )  # fmt: skip
            plan.rope = moved.rope
        return first(segments, sigma, plan, features)

    other, _ = streamed(late, case, x, features)
    assert (v[:, :, :6] - other[:, :, :6]).abs().max() == 0
    assert (v[:, :, 6:] - other[:, :, 6:]).abs().max() > 1e-4


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


def test_packed_segments_in_float32():
    dit = make_dit(CONFIG)
    segments = [clip(4), clip(1, rows=4, columns=10), clip(7, rows=6, columns=4)]
    xs = [x.float() for x, _ in segments]
    features = [[f[layer].float() for _, f in segments] for layer in range(2)]
    sigma = torch.tensor([[0.9, 0.2, 0.55]])
    grids = [(x.shape[2], x.shape[3] // 2, x.shape[4] // 2) for x in xs]
    packed = dit(xs, sigma, PackedDense(grids, CONFIG.head_dim), features)
    worst = 0.0
    for i, x in enumerate(xs):
        plan = PackedDense([grids[i]], CONFIG.head_dim)
        (alone,) = dit([x], sigma[:, i : i + 1], plan, [[f[i]] for f in features])
        worst = max(worst, (packed[i] - alone).abs().max().item())
    print(f"\npacked against alone: {worst:.1e}")
    assert worst < 1e-5


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


def test_training_ratio():
    assert training_ratio(2.0, 768 * 1280, 768, 1280) == 2.0
    assert training_ratio(2.0, 768 * 1280, 384, 640) == 8.0
    assert training_ratio(None, 1, 1, 1) is None


@pytest.mark.parametrize(
    "sparse_ratio,height,width,k",
    [
        (2.0, 768, 1280, 7199),  # 60 blocks a chunk: 60 * 60 * 2 - 1
        (1.5, 768, 1280, 5399),
        (2.0, 768, 1408, 7919),
        (2.0, 1152, 1920, 16199),  # 1080p padded: 135 blocks, 18225 * 0.8888888888888888 = 16200.0
        (1.5, 1152, 1920, 12149),
        (2.0, 1536, 2688, 30239),
        (1.4, 768, 1280, 5038),  # 1.4 * 768 * 1280 is rounded twice: 3600 * 1.3999999999999997 -> 5039
        (1.9, 1152, 1920, 15388),
        (2.0, 256, 256, 15),  # more than there are: all but one of 4 * 4 * visible chunks is the most
    ],
)
def test_k_is_the_released_scripts(sparse_ratio, height, width, k):
    """`topk_ratio = sparse_ratio*768*1280/(th*tw)`, then `int(square*topk_ratio) - 1`, to the last pair."""
    s = (height // 128) * (width // 128)
    ratio = training_ratio(sparse_ratio, 768 * 1280, height, width)
    assert ratio == sparse_ratio * 768 * 1280 / (height * width)
    n = s * s * (4 if s > 4 else 1)
    assert budget(s, n, ratio) == k


def test_causal_pattern_of_a_plan():
    plan = SparseCausal((10, 2, 2), block=(2, 2, 2), head_dim=12, ratio=None, window=3)
    assert plan.visible == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4]]
