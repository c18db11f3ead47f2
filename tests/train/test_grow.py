"""A TC decoder grown from a TAEHV file computes what TAEHV computes, and what is new in it learns."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from flashvsr.base.cli import UserError
from flashvsr.config import TCDecoderConfig
from train.stages.decoder import AS_IT_IS, SECOND_DIFFERENCE, fresh_decoder
from train.stages.grow import grown, holds_more, read_taehv, taehv_file

CHANNELS = (6, 5, 4, 3)


def taehv(channels=CHANNELS, latent=16, seed=0):
    """A state dict with the names and shapes of taew2_1, random weights large enough to matter everywhere."""
    generator = torch.Generator().manual_seed(seed)
    a, b, c, d = channels
    state = {}

    def layer(name, c_out, c_in, size=3, bias=False):
        spread = (2 / (c_in * size * size)) ** 0.5
        state[f"{name}.weight"] = spread * torch.randn(c_out, c_in, size, size, generator=generator)
        if bias:
            state[f"{name}.bias"] = 0.2 * torch.randn(c_out, generator=generator)

    def level(first, width, grow, frames, out, next_width):
        for block in (first, first + 1, first + 2):
            layer(f"decoder.{block}.conv.0", width, 2 * width, bias=True)
            layer(f"decoder.{block}.conv.2", width, width, bias=True)
            layer(f"decoder.{block}.conv.4", width, width, bias=True)
        layer(f"decoder.{grow}.conv", width * frames, width, size=1)
        layer(f"decoder.{out}", next_width, width)

    layer("decoder.1", a, latent, bias=True)
    level(3, a, 7, 1, 8, b)
    level(9, b, 13, 2, 14, c)
    level(15, c, 19, 2, 20, d)
    layer("decoder.22", 3, d, bias=True)
    return state


def decode_one_by_one(state, latents):
    """TAEHV written as a queue: one latent `16 h w` at a time goes down the layers, every memory block keeps
    its last input. Returns frames `F 3 8h 8w` in about [0,1], the first three still there."""
    memory = {}

    def conv(name, x, padding=1):
        return F.conv2d(x[None], state[f"{name}.weight"], state.get(f"{name}.bias"), padding=padding)[0]

    def frames_from(x, index):
        if index == 23:
            return [x]
        if index == 0:
            return frames_from(torch.tanh(x / 3) * 3, 1)
        if index in (2, 21):
            return frames_from(x.clamp(min=0), index + 1)
        if index in (6, 12, 18):
            return frames_from(x.repeat_interleave(2, 1).repeat_interleave(2, 2), index + 1)
        if index in (7, 13, 19):
            y = conv(f"decoder.{index}.conv", x, padding=0)
            parts = y.split(len(x))
            return [frame for part in parts for frame in frames_from(part, index + 1)]
        if index in (1, 8, 14, 20, 22):
            return frames_from(conv(f"decoder.{index}", x), index + 1)
        before = memory.get(index, torch.zeros_like(x))
        memory[index] = x
        y = conv(f"decoder.{index}.conv.0", torch.cat([x, before])).clamp(min=0)
        y = conv(f"decoder.{index}.conv.2", y).clamp(min=0)
        y = conv(f"decoder.{index}.conv.4", y)
        return frames_from((x + y).clamp(min=0), index + 1)

    return torch.stack([frame for z in latents.unbind(1) for frame in frames_from(z, 0)])


def grown_from(state, channels):
    torch.manual_seed(1)
    return grown(state, fresh_decoder(TCDecoderConfig(channels)), "taew2_1.pth")


def inputs(n=4, seed=5):
    generator = torch.Generator().manual_seed(seed)
    latents = 2 * torch.randn(1, 16, n, 3, 2, generator=generator)
    return latents, torch.rand(1, 3, 4 * n - 3, 24, 16, generator=generator) * 2 - 1


@pytest.mark.parametrize("channels", [CHANNELS, (9, 7, 6, 8), (6, 5, 4, 7)])
def test_the_grown_decoder_computes_what_taehv_computes(channels):
    """In float64, where only a wrong number tells them apart: at once and over calls with memory."""
    state = taehv()
    decoder = grown_from(state, channels).double()
    state = {name: tensor.double() for name, tensor in state.items()}
    latents, lr = (x.double() for x in inputs())
    expected = 2 * decode_one_by_one(state, latents[0])[3:] - 1
    assert expected.std() > 0.1
    with torch.no_grad():
        whole, _ = decoder(latents, lr)
        first, memory = decoder(latents[:, :, :1], lr[:, :, :1])
        second, memory = decoder(latents[:, :, 1:3], lr[:, :, 1:9], memory)
        third, _ = decoder(latents[:, :, 3:], lr[:, :, 9:], memory)
    for frames in (whole, torch.cat([first, second, third], 2)):
        assert torch.allclose(frames[0].transpose(0, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("channels", [CHANNELS, (9, 7, 6, 8)])
def test_the_condition_has_no_effect_at_first_but_a_gradient(channels):
    decoder = grown_from(taehv(), channels)
    latents, lr = inputs()
    frames, _ = decoder(latents, lr)
    assert torch.equal(frames, decoder(latents, -lr)[0])
    frames.square().mean().backward()
    into_old = decoder.decoder["1"].weight.grad[:6, :768]
    assert into_old.abs().amax((1, 2, 3)).min() > 0
    for name, parameter in decoder.named_parameters():  # what is new feeds what is old as soon as it learns
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    if channels != CHANNELS:
        last = decoder.decoder["26"].weight
        assert (last[:, 3:] == 0).all() and last.grad[:, 3:].abs().max() > 0


@pytest.mark.parametrize("channels", [(64, 48, 32, 32), (49, 13, 7, 4)])
def test_a_decoder_from_scratch_shows_lr(channels):
    """Against the same by hand: mixtures of half pixels, doubled, the two kinds by their own kernels."""
    torch.manual_seed(0)
    decoder = fresh_decoder(TCDecoderConfig(channels))
    t, y, x = torch.meshgrid(torch.arange(13), torch.arange(40), torch.arange(48), indexing="ij")
    lr = torch.stack([0.4 * torch.sin(x / (5 + c) + y / 7 + t) for c in range(3)])[None]
    shown = decoder(torch.randn(1, 16, 4, 5, 6), lr)[0]
    halves = F.avg_pool2d((3 * torch.tanh(lr / 3)).transpose(1, 2).flatten(0, 1), 4)
    for axis in (2, 3):
        halves = doubled(halves.movedim(axis, -1)).movedim(-1, axis)
    for _ in range(2):  # grey beyond the border
        halves = F.interpolate(F.pad(halves, (1, 1, 1, 1)), scale_factor=2, mode="bilinear")[..., 2:-2, 2:-2]
    assert torch.allclose(shown, halves.unflatten(0, (1, 13)).transpose(1, 2), atol=1e-5)
    inside = (..., slice(8, -8), slice(8, -8))
    assert F.mse_loss(shown[inside], lr[inside]) < 0.05 * lr.var()


def doubled(halves):
    """`... 2n` half pixels -> the `... 2n` values that the decoder makes of them, zeros beyond the ends."""
    pixels = F.pad(halves, (2, 2)).unfold(-1, 6, 2)  # ... n 6
    plain, second = (
        F.pad(pixels @ torch.tensor([*taps, *reversed(taps)]), (1, 1))
        for taps in (AS_IT_IS, SECOND_DIFFERENCE)
    )
    left = plain[..., 1:-1] + second[..., :-2] - second[..., 1:-1]
    right = plain[..., 1:-1] + second[..., 2:] - second[..., 1:-1]
    return torch.stack([left, right], -1).flatten(-2)


def test_files_that_are_no_taehv_decoder_are_named(tmp_path):
    path = tmp_path / "taew2_1.pth"

    def refused(state, *sentences, read=read_taehv):
        torch.save(state, path)
        with pytest.raises(UserError) as error:
            read(path)
        assert "\n" not in str(error.value)
        for sentence in sentences:
            assert sentence in str(error.value)

    state = taehv()
    torch.save({**state, "encoder.0.weight": torch.zeros(2)}, path)
    assert read_taehv(path).keys() == state.keys()
    without = {k: v for k, v in state.items() if k != "decoder.9.conv.2.bias"}
    refused(without, "no TAEHV decoder", "missing: decoder.9.conv.2.bias")
    refused({**state, "decoder.23.weight": torch.zeros(1)}, "not TAEHV's: decoder.23.weight")
    refused({**state, "decoder.13.conv.weight": torch.zeros(5, 5, 1, 1)}, "another size", "instead of (10, 5")
    refused(
        {"patch_embedding.weight": torch.zeros(2, 2)}, "missing: decoder.1,22.bias", "not TAEHV's: patch_emb"
    )
    refused(
        fresh_decoder(TCDecoderConfig(CHANNELS)).state_dict(), "is a TC decoder already: call it TCDecoder"
    )
    refused(torch.zeros(3), "holds one tensor")
    with pytest.raises(UserError, match="is 6/5/4/3 wide .* TC decoder 8/8/8/2 .*grows and does not shrink"):
        grown(state, fresh_decoder(TCDecoderConfig((8, 8, 8, 2))), "x.pth")
    with pytest.raises(UserError, match="for 12 latent channels"):
        grown(taehv(latent=12), fresh_decoder(TCDecoderConfig((8, 8, 8, 8))), "x.pth")


def test_where_a_taehv_file_is_looked_for(tmp_path):
    assert taehv_file(tmp_path) is None and taehv_file(tmp_path / "nowhere") is None
    path = tmp_path / "taew2_1.safetensors"
    save_file(taehv(), path)
    assert read_taehv(path).keys() == taehv().keys()
    assert taehv_file(tmp_path) == path and taehv_file(path) == path and not holds_more(tmp_path)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    assert taehv_file(tmp_path) == path and holds_more(tmp_path) and not holds_more(path)
    (tmp_path / "TCDecoder.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds taew2_1.safetensors and TCDecoder.ckpt .*move one away"):
        taehv_file(tmp_path)
