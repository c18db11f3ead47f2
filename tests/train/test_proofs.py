"""What the stages' maths must do, each against an oracle that shares no code with it."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from eval.metrics import Lpips
from flashvsr.attention.plans import PackedDense, SparseCausal
from flashvsr.config import DiTConfig, ModelConfig
from flashvsr.flow import add_noise, denoised
from flashvsr.models.dit import DiT
from train.config import compose
from train.losses.dmd import dmd, dmd_direction
from train.losses.flow_matching import flow_matching
from train.losses.pixel import difference, frame_weights, lpips_frames, mse
from train.stages.sparse_causal import causal_plan

DIT = DiTConfig(dim=24, ffn=32, layers=2, heads=2, freq_dim=16, text_dim=8, text_len=4, block=(2, 2, 2))


class DenseCausal(PackedDense):
    """Dense attention under a mask of tokens in plain order: chunk c of two latents sees c - window + 1
    to c, and the first three chunks see each other."""

    def __init__(self, grid, head_dim, window):
        super().__init__([grid], head_dim)
        chunk = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2]) // 2
        own, other = chunk[:, None], chunk[None]
        self.mask = ((other <= own) & (other > own - window)) | ((own < 3) & (other < 3))

    def attend(self, layer, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask).transpose(1, 2)


@pytest.mark.parametrize("window", [4, 6])
def test_stage_2_without_selection_is_dense_causal_and_with_the_releases_k_it_is_not(window):
    """The plan that stage 2 makes, at 12 latents of 64x64: six chunks of four blocks."""
    torch.manual_seed(0)
    dit = DiT(DIT).double().requires_grad_(False)
    dit.set_prompt(torch.randn(1, 4, 8))
    latent, sigma = torch.randn(1, 16, 12, 8, 8, dtype=torch.float64), torch.tensor([[0.6]])

    def velocity(plan):
        (v,) = dit([latent], sigma, plan, [])
        return v

    def stage(ratio):
        given = ["data.height=64", "data.width=64", "data.latents_per_clip=12", f"stage.sparse_ratio={ratio}"]
        config = compose("sparse_causal", given)
        return SimpleNamespace(config=config, sizes=ModelConfig(dit=DIT), device=torch.device("cpu"))

    dense = velocity(DenseCausal((12, 4, 4), DIT.head_dim, window))
    assert torch.allclose(velocity(causal_plan(stage("null"), latent, window)), dense, rtol=1e-9, atol=1e-9)
    sparse = causal_plan(stage(2.0), latent, window)
    assert (velocity(sparse) - dense).abs().max() > 1e-3
    kept = [int(selection.counts.sum()) for selection in sparse.selections.values()]
    legal = [4 * 4 * len(seen) for seen in sparse.visible]
    assert kept == [2 * sum(min(int(4 * 4 * 2.0) - 1, n - 1) for n in legal)] * 2  # of both heads
    full = velocity(DenseCausal((12, 4, 4), DIT.head_dim, 99))
    assert (window == 6) == torch.equal(full, dense)


def test_no_gradient_passes_through_the_choice_of_blocks():
    """The gradient of a sparse forward is that of attention under the chosen pairs as a constant mask."""
    torch.manual_seed(0)
    grid, tokens = (8, 4, 4), 8
    q, k, v, g = (torch.randn(1, 128, 2, 12, dtype=torch.float64) for _ in range(4))
    plan = SparseCausal(grid, block=(2, 2, 2), head_dim=12, ratio=1.0, window=4)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = plan.attend(0, *inputs)
    gradients = torch.autograd.grad(out, inputs, g)
    chosen = plan.selections[0]
    assert not chosen.columns.requires_grad and not chosen.counts.requires_grad
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    columns = iter(chosen.columns.tolist())
    for head in range(2):
        for row in range(16):
            for _ in range(int(chosen.counts[0, head, row])):
                mask[head, row, next(columns)] = True
    assert 0 < mask.float().mean() < 0.5
    mask = mask.repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 12**0.5
    weights = scores.exp() * mask
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    assert torch.allclose(out, expected, rtol=1e-9, atol=1e-9)
    for given, wanted in zip(gradients, torch.autograd.grad(expected, inputs, g), strict=True):
        assert torch.allclose(given, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 0.9])
def test_the_fake_scores_optimum_is_the_students_score(sigma):
    """Student N(m, S): the linear velocity that minimises flow matching on its samples gives the score of
    N((1 - sigma) m, (1 - sigma)^2 S + sigma^2) in closed form. The moments are made exact, so that no
    sampling error is left; where the teacher is that same Gaussian, DMD has no direction."""
    d, n = 3, 512
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(n, 2 * d, generator=generator, dtype=torch.float64)
    drawn = drawn - drawn.mean(0)
    drawn = torch.linalg.solve_triangular(torch.linalg.cholesky(drawn.T @ drawn / n), drawn.T, upper=False).T
    root = torch.tensor([[1.0, 0, 0], [0.6, 0.5, 0], [-0.4, 0.3, 1.5]], dtype=torch.float64)
    mean, covariance = torch.tensor([0.7, -1.2, 0.1], dtype=torch.float64), root @ root.T
    z, noise = mean + drawn[:, :d] @ root.T, drawn[:, d:]
    level = torch.full((n,), sigma, dtype=torch.float64)
    x = add_noise(z, noise, level)

    weight = torch.zeros(d, d, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(d, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = flow_matching([x @ weight + bias], [z], [noise]).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    fake = denoised(x, (x @ weight + bias).detach(), level)
    a = 1 - sigma
    spread = a * a * covariance + sigma * sigma * torch.eye(d, dtype=torch.float64)
    score = -torch.linalg.solve(spread, (x - a * mean).T).T
    assert torch.allclose((a * fake - x) / sigma**2, score, rtol=0, atol=5e-3 * score.std())
    teacher = mean + a * (x - a * mean) @ torch.linalg.solve(spread, covariance)
    assert dmd_direction(z, teacher, fake).abs().max() < 0.02
    assert dmd_direction(z, teacher + 0.5, fake).abs().mean() > 0.1


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("weighted", [False, True])
def test_pixel_losses_and_dmd_equal_float64_with_their_gradients(weighted):
    """Values and gradients of the losses against the formulas written out in float64."""
    sr, hr = randn(2, 3, 5, 64, 64), randn(2, 3, 5, 64, 64, seed=1)
    sr = sr.clamp(-1, 1).requires_grad_()
    hr = hr.clamp(-1, 1)
    weights = frame_weights(0, 5, 4.0, torch.device("cpu")) if weighted else None
    share = torch.tensor([4.0, 1, 1, 1, 1] if weighted else [1.0] * 5, dtype=torch.float64)
    share = share / share.sum()
    lpips = Lpips("alex", weights="random")
    package = copy.deepcopy(lpips.model).double()

    def exact_lpips(x, y):
        frames = [package(x[:, :, i], y[:, :, i]).flatten() for i in range(5)]
        return torch.stack(frames, 1) @ share

    def exact_difference(x, y):
        return ((x[:, :, 1:] - x[:, :, :-1]) - (y[:, :, 1:] - y[:, :, :-1])).square().mean((1, 2, 3, 4))

    pairs = [
        (mse(sr, hr, weights), lambda x, y: (x - y).square().mean((1, 3, 4)) @ share),
        (lpips_frames(lpips, sr, hr, weights, frame_by_frame=True), exact_lpips),
        (difference(sr, hr), exact_difference),
    ]
    for value, exact in pairs:
        x = sr.detach().double().requires_grad_()
        expected = exact(x, hr.double())
        assert torch.allclose(value.double(), expected, rtol=1e-4)
        (gradient,) = torch.autograd.grad(value.sum(), sr)
        (wanted,) = torch.autograd.grad(expected.sum(), x)
        assert (gradient - wanted).norm() < 1e-4 * wanted.norm()


def test_dmd_equals_float64():
    z, real, fake = (randn(2, 16, 4, 4, 4, seed=i) for i in range(3))
    a, b, c = (x.double() for x in (z, real, fake))
    g = (c - b) / (a - b).abs().mean((1, 2, 3, 4), keepdim=True)
    z.requires_grad_()
    value = dmd(z, dmd_direction(z, real, fake))
    assert torch.allclose(value.double(), 0.5 * g.square().mean((1, 2, 3, 4)), rtol=1e-5)
    value.sum().backward()
    assert (z.grad.double() - g / g[0].numel()).norm() < 1e-5 * (g / g[0].numel()).norm()
