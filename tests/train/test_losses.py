"""Loss maths against closed forms and float64."""

import pytest
import torch

from flashvsr.config import VAEConfig
from flashvsr.models.wan_vae import WanVAE
from train.losses.attention_kl import attention_kl, visible_blocks
from train.losses.dmd import dmd, dmd_direction
from train.losses.flow_matching import flow_matching, segment_errors
from train.losses.pixel import decode_window, difference, frame_weights, lpips_frames, mse, window_frames
from train.stages.feed import encode_clip


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_flow_matching_counts_every_segment_the_same():
    shapes = [(2, 16, 3, 4, 4), (2, 16, 1, 2, 2)]
    v, x0, eps = ([randn(*s, seed=i + 7 * k) for i, s in enumerate(shapes)] for k in range(3))
    expected = torch.stack(
        [
            sum(((a[b] - (e[b] - x[b])).double() ** 2).mean() for a, x, e in zip(v, x0, eps, strict=True)) / 2
            for b in range(2)
        ]
    )
    assert torch.allclose(flow_matching(v, x0, eps).double(), expected, rtol=1e-6)
    assert segment_errors(v, x0, eps).shape == (2, 2)


def test_flow_matching_is_zero_at_the_target():
    x0, eps = randn(1, 16, 2, 2, 2), randn(1, 16, 2, 2, 2, seed=1)
    assert flow_matching([eps - x0], [x0], [eps]).item() == 0


def test_dmd_gradient_is_the_direction_over_the_sample_size():
    z, real, fake = (randn(3, 4, 2, 2, 2, seed=i) for i in range(3))
    direction = dmd_direction(z, real, fake)
    for b in range(3):
        scale = (z[b] - real[b]).abs().double().mean()
        assert torch.allclose(
            direction[b].double(), (fake[b] - real[b]).double() / scale, rtol=1e-5, atol=1e-6
        )
    z.requires_grad_()
    value = dmd(z, direction)
    assert torch.allclose(value, 0.5 * direction.square().flatten(1).mean(1), rtol=1e-4)
    value.sum().backward()
    assert torch.allclose(z.grad, direction / z[0].numel(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_dmd_hides_no_fault_of_a_network(which):
    z, real, fake = (randn(2, 4, 2, 2, 2, seed=i) for i in range(3))
    (z, real, fake)[which][1, 0, 0, 0, 0] = float("nan")
    value = dmd(z, dmd_direction(z, real, fake))
    assert value[0].isfinite() and value[1].isnan()


@pytest.mark.parametrize("sign", [1, -1])
def test_dmd_moves_a_gaussian_to_the_teacher(sign):
    """Student N(m, s^2), teacher N(1, 0.5^2), both scores in closed form (a Gaussian at sigma).
    With the right sign mean and spread reach the teacher's; with the wrong one they run away."""
    generator = torch.Generator().manual_seed(0)
    mean, log_std = torch.tensor(-1.0, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    optimizer = torch.optim.SGD([mean, log_std], lr=0.1)

    def estimate(x, sigma, m, s):
        a = 1 - sigma
        return m + a * s**2 / (a**2 * s**2 + sigma**2) * (x - a * m)

    for _ in range(400):
        z = mean + log_std.exp() * torch.randn(256, 1, generator=generator)
        sigma = torch.rand(256, 1, generator=generator) * 0.96 + 0.02
        x = (1 - sigma) * z.detach() + sigma * torch.randn(256, 1, generator=generator)
        real = estimate(x, sigma, 1.0, 0.5)
        fake = estimate(x, sigma, mean.detach(), log_std.exp().detach())
        direction = (fake - real) / (z.detach() - real).abs().mean()  # one scale for the whole toy batch
        loss = dmd(z, sign * direction).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if abs(mean.item()) > 4:
            break
    if sign == 1:
        assert abs(mean.item() - 1) < 0.05 and abs(log_std.exp().item() - 0.5) < 0.05
    else:
        assert abs(mean.item() - 1) > 2


def test_window_frames_are_those_of_the_alignment():
    assert window_frames(0) == slice(0, 5)
    assert window_frames(1) == slice(1, 9)
    assert window_frames(3, 4) == slice(9, 25)


def test_decoding_a_window_equals_the_whole_and_reaches_no_other_latent():
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=4)).requires_grad_(False)
    z = randn(1, 16, 6, 4, 4).requires_grad_()
    whole, _ = vae.decode(z.detach())
    for first in (0, 1, 3, 4):
        z.grad = None
        frames = decode_window(lambda a, b, memory: vae.decode(z[:, :, a:b], memory), first, 2)
        assert torch.allclose(frames, whole[:, :, window_frames(first, 2)], atol=1e-5)
        frames.square().sum().backward()
        reached = z.grad.abs().amax((0, 1, 3, 4))
        inside = torch.zeros(6, dtype=torch.bool)
        inside[first : first + 2] = True
        assert (reached[~inside] == 0).all() and (reached[inside] > 0).all()
    with torch.no_grad():
        frames = decode_window(lambda a, b, memory: vae.decode(z[:, :, a:b], memory), 1, 5)
    assert torch.allclose(frames, whole[:, :, window_frames(1, 5)], atol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_a_clip_encoded_in_pieces_equals_the_whole(n):
    torch.manual_seed(0)
    vae = WanVAE(VAEConfig(dim=4)).requires_grad_(False)
    video = randn(1, 3, 4 * n - 3, 32, 32)
    whole, _ = vae.encode(video)
    assert whole.shape[2] == n and torch.allclose(encode_clip(vae, video), whole, atol=1e-5)


def test_pixel_losses_average_over_a_sample():
    sr, hr = randn(2, 3, 4, 8, 8), randn(2, 3, 4, 8, 8, seed=1)
    assert torch.allclose(mse(sr, hr), (sr - hr).square().mean((1, 2, 3, 4)), rtol=1e-6)

    def metric(x, y):
        return (x - y).abs().mean((1, 2, 3))

    expected = (sr - hr).abs().mean((1, 2, 3, 4))
    sr.requires_grad_()
    for frame_by_frame in (False, True):
        sr.grad = None
        value = lpips_frames(metric, sr, hr, frame_by_frame=frame_by_frame)
        assert torch.allclose(value, expected, rtol=1e-5)
        value.sum().backward()
        assert torch.allclose(sr.grad, (sr - hr).sign().detach() / sr[0].numel(), rtol=1e-4)


def test_difference_sees_change_and_not_a_constant_offset():
    hr = randn(2, 3, 4, 5, 6)
    flicker = torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(1, 1, 4, 1, 1)
    assert torch.allclose(difference(hr + 0.7, hr), torch.zeros(2), atol=1e-12)
    assert torch.allclose(difference(hr + 0.5 * flicker, hr), torch.full((2,), 0.25), rtol=1e-5)


def test_attention_kl_equals_a_loop_over_pairs():
    visible, per_chunk = [[0, 1], [0, 1], [1, 2]], 2
    seen = visible_blocks(visible, per_chunk, torch.device("cpu"))
    student, teacher = (
        [(randn(2, 3, 6, 4, seed=s + i), randn(2, 3, 6, 4, seed=s + 9 + i)) for i in range(2)]
        for s in (0, 50)
    )
    expected = torch.zeros(2, dtype=torch.float64)
    for (qs, ks), (qt, kt) in zip(student, teacher, strict=True):
        for b in range(2):
            for head in range(3):
                for row in range(6):
                    columns = [c * per_chunk + i for c in visible[row // per_chunk] for i in range(per_chunk)]

                    def p(q, k, b=b, head=head, row=row, columns=columns):
                        scores = [(q[b, head, row].double() @ k[b, head, c].double()) / 2 for c in columns]
                        return torch.stack(scores).softmax(0)

                    target, own = p(qt, kt), p(qs, ks)
                    expected[b] += (target * (target / own).log()).sum() / (2 * 3 * 6)
    assert torch.allclose(attention_kl(student, teacher, seen).double(), expected, rtol=1e-5)
    assert attention_kl(teacher, teacher, seen).abs().max() < 1e-6


def test_the_first_frame_weighs_as_asked_and_only_where_it_is():
    sr, hr = randn(2, 3, 5, 12, 12), randn(2, 3, 5, 12, 12, seed=1)
    weights = frame_weights(0, 5, 3.0, torch.device("cpu"))
    frames = (sr - hr).double().square().mean((1, 3, 4))
    expected = (3 * frames[:, 0] + frames[:, 1:].sum(1)) / 7
    assert torch.allclose(mse(sr, hr, weights).double(), expected, rtol=1e-6)
    assert torch.allclose(mse(sr, hr), (sr - hr).square().flatten(1).mean(1), rtol=1e-6)
    assert frame_weights(1, 8, 3.0, torch.device("cpu")) is None

    def distance(x, y):
        return (x - y).abs().flatten(1).mean(1)

    frames = (sr - hr).double().abs().mean((1, 3, 4))
    expected = (3 * frames[:, 0] + frames[:, 1:].sum(1)) / 7
    for one_by_one in (True, False):
        value = lpips_frames(distance, sr, hr, weights, frame_by_frame=one_by_one)
        assert torch.allclose(value.double(), expected, rtol=1e-6)
