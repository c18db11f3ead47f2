"""Tiles: how a picture is cut and put together, and what streaming in tiles may and may not change."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flashvsr import StreamingUpscaler
from flashvsr.base.cli import UserError
from flashvsr.base.draws import generator
from flashvsr.base.resize import to_signed
from flashvsr.streaming.stream import LOOK_AHEAD, Stream, StreamSettings, seeded_noise
from flashvsr.streaming.tiling import TiledStream, Tiles, candidates, lay, positions, weights, whole


def picture(frames, height, width, seed=0):
    """Smooth uint8 frames: neighbouring pixels differ little, as in footage."""
    x = torch.rand(frames, 3, height // 8 + 2, width // 8 + 2, generator=generator(seed, "test"))
    x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
    return (x * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def through(upscaler, frames):
    return np.concatenate([upscaler.push(frames), upscaler.flush()])


# ---- cutting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile,tiles,redundancy", [(128, 15, 2.14), (160, 8, 1.79), (192, 6, 1.93)])
def test_the_tiles_of_the_published_measurement(tile, tiles, redundancy):
    """256x448 input, overlap 24, times 4: as many tiles and as much redundant work as published."""
    cut = lay((1024, 1792), tile, 24, 4, (128, 128))
    assert len(cut.places) == tiles and round(cut.redundancy, 2) == redundancy


@pytest.mark.parametrize("side,overlap", [(32, 16), (48, 16), (64, 48), (64, 0), (128, 96)])
@pytest.mark.parametrize("length", [64, 128, 144, 240, 1040])
def test_tiles_cover_overlap_and_sum_to_one(length, side, overlap):
    side = min(side, length)
    starts = positions(length, side, overlap)
    assert starts[0] == 0 and starts[-1] == length - side
    assert all(s % 16 == 0 for s in starts)
    assert all(0 < b - a <= side - overlap for a, b in zip(starts, starts[1:], strict=False))
    total = torch.zeros(length)
    for start, w in zip(starts, weights(length, starts, side, overlap), strict=True):
        assert w.shape == (side,) and w.min() >= 0
        total[start : start + side] += w
    assert torch.equal(total, torch.ones(length))


@pytest.mark.parametrize("size,overlap", [((64, 64), 32), ((128, 48), 16), ((64, 240), 0)])
def test_weights_sum_to_one_exactly_and_the_border_keeps_full_weight(size, overlap):
    tiles = Tiles((128, 240), size, overlap)
    total = torch.zeros(tiles.canvas)
    for (top, left), w in zip(tiles.places, tiles.weights, strict=True):
        total[top : top + size[0], left : left + size[1]] += w
        # a tile at the border of the picture: what it is alone with has weight one up to the last pixel
        if (top, left) == (0, 0):
            assert w[0, 0] == 1
    assert torch.equal(total, torch.ones(tiles.canvas))
    assert len(tiles.places) > 1


def test_a_seam_is_sampled_at_pixel_centres():
    """Two tiles of 32 that share 16: (i + 0.5) / 16, so both fade alike and neither reaches 0 or 1."""
    first, second = weights(48, [0, 16], 32, 16)
    ramp = ((torch.arange(16) + 0.5) / 16 * 4096).round() / 4096
    assert torch.equal(second, torch.cat([ramp, torch.ones(16)]))
    assert torch.equal(first, second.flip(0))


def test_tiles_are_chosen_by_redundancy_not_by_size():
    best = candidates((1024, 1792), 96, (128, 128))
    assert best[0] == Tiles((1024, 1792), (1024, 1792), 96) and best[0].redundancy == 1
    assert [t.computed for t in best] == sorted(t.computed for t in best)
    # of tiles of at most 768 x 768: fewer pixels than the largest square's 6 tiles (1.93)
    small = next(t for t in best if t.area <= 768 * 768)
    assert small.redundancy < 1.79
    assert all(s == n or s >= 192 for t in best for s, n in zip(t.size, t.canvas, strict=True))


def test_a_tile_that_is_all_overlap():
    with pytest.raises(UserError, match="overlap=24 leaves nothing of a tile=24"):
        lay((256, 256), 24, 24, 4, (16, 16))
    assert lay((64, 64), 24, 24, 4, (16, 16)).places == [(0, 0)]  # larger than the picture: nothing to share


# ---- streaming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
@pytest.mark.parametrize("decoder", ["tc", "vae"])
def test_one_tile_is_the_stream_bit_for_bit(micro_model, decoder, color_fix):
    """Also with its parts in the host's memory between turns."""
    model = micro_model()
    last = model.tc_decoder if decoder == "tc" else model.vae
    settings = StreamSettings(area=model.info.area, color_fix=color_fix)

    def make(noise):
        return Stream(model.denoiser(), last, settings, noise)

    frames = torch.from_numpy(picture(33, 32, 48)).permute(3, 0, 1, 2)[None]
    one = make(seeded_noise(0))
    tiled = [
        TiledStream(whole((32, 48)), make, seeded_noise(0), torch.device("cpu"), offload)
        for offload in (False, True)
    ]
    for part in frames.split([25, 8], 2):
        expected = one.step(to_signed(part))
        assert all(torch.equal(t.step(part), expected) for t in tiled)


def test_a_tile_larger_than_the_picture_changes_nothing(micro_model):
    frames = picture(13, 7, 9)
    plain = StreamingUpscaler(micro_model(), scale=3)
    tiled = StreamingUpscaler(micro_model(), scale=3, tile=500)
    assert (through(plain, frames) == through(tiled, frames)).all()
    tiled.push(frames)
    assert tiled.in_use["tiles"] == "none"


class Local(Stream):
    """A stand-in for a model whose result at a pixel depends on the pixels near it and on the noise there."""

    def __init__(self, noise, color_fix="adain", radius=0):
        self.radius = radius
        self.noise, self.next_latent, self.pending, self.ring = noise, 0, None, None
        self.denoiser = type("D", (), {"lr_projector": None, "dit": None})
        self.decoder, self.settings = None, StreamSettings(color_fix=color_fix)

    def project(self, lr):
        return [lr]

    def sample(self, features):
        lr = features[0]
        n = lr.shape[2] // 4
        shape = (16, lr.shape[-2] // 8, lr.shape[-1] // 8)
        noise = torch.stack([self.noise(self.next_latent + i, shape) for i in range(n)], 1)
        self.next_latent += n
        return noise[None]

    def render(self, latent, lr):
        frames = lr if self.pending is None else torch.cat([self.pending, lr], 2)
        count = frames.shape[2] - LOOK_AHEAD
        frames, self.pending = frames[:, :, :count], frames[:, :, count:]
        r = self.radius
        blurred = F.avg_pool3d(F.pad(frames, (r, r, r, r, 0, 0), "replicate"), (1, 2 * r + 1, 2 * r + 1), 1)
        grain = latent[:, :3].repeat_interleave(4, 2)[:, :, -count:]
        return 0.9 * blurred + 0.1 * F.interpolate(grain, frames.shape[2:]), frames


@pytest.mark.parametrize("size,overlap", [((64, 64), 32), ((64, 96), 16), ((128, 48), 16)])
@pytest.mark.parametrize("radius,most", [(0, 2e-6), (1, 5e-3)])
def test_a_local_model_in_tiles_is_the_model_untiled(size, overlap, radius, most):
    """Noise and colours included. Where a pixel's neighbours matter, the rim of a tile is wrong: it sees
    padding there, and has next to no weight."""
    canvas = (128, 240)
    frames = torch.from_numpy(picture(33, *canvas)).permute(3, 0, 1, 2)[None]
    runs = []
    for tiles in (whole(canvas), Tiles(canvas, size, overlap)):
        stream = TiledStream(
            tiles, lambda noise: Local(noise, "adain", radius), seeded_noise(5), torch.device("cpu")
        )
        runs.append(torch.cat([stream.step(part) for part in frames.split([25, 8], 2)], 2))
    assert (runs[0] - runs[1]).abs().max() < most and runs[0].std() > 0.1


def test_a_constant_picture_stays_constant():
    """No seam and no border, without any correction of colours."""
    lr = torch.full((1, 3, 13, 48, 80), 131, dtype=torch.uint8)
    stream = TiledStream(
        Tiles((48, 80), (32, 32), 16),
        lambda noise: Local(noise, "none"),
        lambda index, shape: torch.zeros(shape),
        torch.device("cpu"),
    )
    out = stream.step(lr)
    assert (out - 0.9 * to_signed(lr[:, :, :9])).abs().max() < 1e-7


@pytest.mark.parametrize("n,height,width", [(1, 1, 1), (1, 13, 29), (5, 17, 33), (22, 19, 31), (34, 16, 40)])
def test_as_many_frames_out_as_in_of_the_size_asked(micro_model, n, height, width):
    """Odd sizes, one frame, tiles of 16 LR pixels and more."""
    upscaler = StreamingUpscaler(micro_model(), scale=2, tile=16, overlap=4)
    frames = picture(n, height, width)
    out = through(upscaler, frames)
    assert out.shape == (n, 2 * height, 2 * width, 3)
    again = np.concatenate([*(upscaler.push(frames[i : i + 1]) for i in range(n)), upscaler.flush()])
    assert (again == out).all()


def test_what_tiles_are_in_use(micro_model):
    upscaler = StreamingUpscaler(micro_model(), scale=2, tile=16, overlap=4)
    assert upscaler.in_use["tiles"] == 16
    upscaler.push(picture(1, 32, 40))
    assert upscaler.in_use["tiles"] == "12 of 32x32, overlap 16, 2.40 times the work"


def test_tiles_keep_what_a_stream_keeps_and_no_more(micro_model):
    """After the fourth chunk nothing grows."""
    from tests.flashvsr.test_upscaler import tensors_in

    model = micro_model()

    def make(noise):
        return Stream(model.denoiser(), model.tc_decoder, StreamSettings(area=512), noise)

    tiles = TiledStream(Tiles((32, 48), (32, 32), 16), make, seeded_noise(0), torch.device("cpu"))
    frames = torch.from_numpy(picture(33, 32, 48)).permute(3, 0, 1, 2)[None]
    tiles.step(frames[:, :, :25])
    seen = []
    for _ in range(10):
        tiles.step(frames[:, :, 25:])
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(tiles)}
        seen.append(sum(storages.values()))
    assert set(seen[3:]) == {seen[3]} and seen[3] > 1000


def test_noise_of_a_tile_is_a_piece_of_the_pictures(micro_model):
    """Depends on seed, latent and place; how the picture is cut does not matter, and it is drawn once."""
    drawn = []

    def noise(index, shape):
        drawn.append(index)
        return seeded_noise(7)(index, shape)

    tiles = Tiles((64, 96), (32, 48), 16)
    stream = TiledStream(tiles, Local, noise, torch.device("cpu"))
    full = seeded_noise(7)(3, (16, 8, 12))
    for s, (top, left) in zip(stream.streams, tiles.places, strict=True):
        cut = full[:, top // 8 : top // 8 + 4, left // 8 : left // 8 + 6]
        assert torch.equal(s.noise(3, (16, 4, 6)), cut)
    assert drawn == [3]


def test_offloaded_parts_come_once_per_step_whatever_the_tiles(micro_model, monkeypatch):
    """Projector, DiT, decoder: each to the device and back, for all tiles together."""
    model = micro_model()
    moves = []
    for name in ("lr_projector", "dit", "tc_decoder"):
        part = getattr(model, name)
        monkeypatch.setattr(part, "to", lambda device, name=name: moves.append((name, str(device))))

    def make(noise):
        return Stream(model.denoiser(), model.tc_decoder, StreamSettings(area=512), noise)

    device = torch.device("cpu", 0)
    tiles = TiledStream(Tiles((32, 48), (32, 32), 16), make, seeded_noise(0), device, offload=True)
    frames = torch.from_numpy(picture(33, 32, 48)).permute(3, 0, 1, 2)[None]
    for part in frames.split([25, 8], 2):
        tiles.step(part)
    turn = [(name, where) for name in ("lr_projector", "dit", "tc_decoder") for where in ("cpu:0", "cpu")]
    assert moves == 2 * turn


def test_offloading_waits_on_the_host_between_frames(micro_model):
    upscaler = StreamingUpscaler(micro_model(), offload=True, tile=8, overlap=4)
    frames = picture(34, 12, 16)
    expected = through(StreamingUpscaler(micro_model(), tile=8, overlap=4), frames)
    assert (through(upscaler, frames) == expected).all() and upscaler.in_use["offload"]
