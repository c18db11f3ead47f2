"""N frames in, N frames out, the same bits however they are pushed; whole clips against the stream."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from flashvsr import ClipUpscaler, StreamingUpscaler, method
from flashvsr.base.cli import UserError
from flashvsr.base.resize import bicubic_8bit, to_signed, to_uint8
from flashvsr.streaming.color import correct
from flashvsr.streaming.frames import Canvas, mirrored
from flashvsr.streaming.stream import Stream, StreamSettings, seeded_noise
from flashvsr.streaming.upscaler import first_latents

H, W, SCALE = 5, 13, 3  # 15x39 at the output, 16x48 for the model: 3 blocks in a chunk


def video(frames, height=H, width=W):
    rng = np.random.default_rng(frames)
    smooth = rng.integers(0, 256, (frames, 1, 1, 3)) * 0.5 + rng.integers(0, 128, (frames, height, width, 3))
    return smooth.astype(np.uint8)


def in_pieces(upscaler, frames, sizes):
    out, at = [], 0
    for size in sizes:
        out.append(upscaler.push(frames[at : at + size]))
        at += size
    assert at == len(frames)
    return np.concatenate([*out, upscaler.flush()])


def splits(n):
    rng = np.random.default_rng(n)
    ragged = []
    while sum(ragged) < n:
        ragged.append(int(min(rng.integers(0, 12), n - sum(ragged))))
    return [[1] * n, [0, n], ragged]


@pytest.mark.parametrize(
    "n,decoder",
    [*((n, "tc") for n in (1, 2, 5, 6, 13, 21, 22, 25, 26, 41)), *((n, "vae") for n in (1, 6, 13, 26))],
)
def test_as_many_frames_out_as_in_and_the_same_bits_for_any_split(micro_model, n, decoder):
    frames = video(n)
    upscaler = StreamingUpscaler(micro_model(), scale=SCALE, decoder=decoder)
    whole = in_pieces(upscaler, frames, [n])
    assert whole.shape == (n, H * SCALE, W * SCALE, 3) and whole.dtype == np.uint8
    for sizes in splits(n):
        assert (in_pieces(upscaler, frames, sizes) == whole).all(), sizes


def test_what_comes_out_when(micro_model):
    """21 frames after the 25th, then 8 after every 8."""
    upscaler = StreamingUpscaler(micro_model(), scale=1)
    frames = video(41, 16, 16)
    given = [len(upscaler.push(frames[i : i + 1])) for i in range(41)]
    assert {i: g for i, g in enumerate(given) if g} == {24: 21, 32: 8, 40: 8}
    assert len(upscaler.flush()) == 4
    assert len(upscaler.flush()) == 0


def test_the_stream_is_what_the_upscaler_runs(micro_model):
    """Upsample, pad by mirroring, 25 + 8 frames through a Stream, crop, round: written out."""
    model = micro_model()
    frames = video(33)
    big = bicubic_8bit(torch.from_numpy(frames).permute(3, 0, 1, 2), (H * SCALE, W * SCALE))
    rows, columns = [*range(15), 13], [*range(39), *range(37, 28, -1)]
    padded = to_signed(big[..., rows, :][..., columns])[None]
    stream = Stream(model.denoiser(), model.tc_decoder, StreamSettings(area=model.info.area), seeded_noise(0))
    expected = torch.cat([stream.step(padded[:, :, :25]), stream.step(padded[:, :, 25:])], 2)
    expected = to_uint8(expected[0, :, :, :15, :39]).permute(1, 2, 3, 0).numpy()
    upscaler = StreamingUpscaler(model, scale=SCALE)
    assert (upscaler.push(frames) == expected).all() and len(expected) == 29


@pytest.mark.parametrize("sparse_ratio", [2.0, None])
def test_a_sparse_clip_in_one_forward_equals_the_stream(micro_model, sparse_ratio):
    """kind sparse, one step, window = kv_chunks + 1: the same frames to a rounding of the last bit."""
    frames = video(37)
    streaming = StreamingUpscaler(
        micro_model(), scale=SCALE, local_range=None, sparse_ratio=sparse_ratio, seed=3
    )
    whole = ClipUpscaler(
        micro_model("sparse", window=4), scale=SCALE, steps=1, sparse_ratio=sparse_ratio, seed=3
    )
    a, b = (in_pieces(u, frames, [37]).astype(int) for u in (streaming, whole))
    assert a.shape == b.shape and abs(a - b).max() <= 1 and (a != b).mean() < 1e-3


@pytest.mark.parametrize("kind,mode", [("teacher", "clip"), ("sparse", "causal")])
@pytest.mark.parametrize("n", [1, 2, 6, 10])
def test_whole_clips(micro_model, kind, mode, n):
    seen = []
    upscaler = ClipUpscaler(
        micro_model(kind, projector_mode=mode), steps=2, scale=SCALE, on_step=lambda *x: seen.append(x)
    )
    frames = video(n)
    whole = in_pieces(upscaler, frames, [n])
    assert whole.shape == (n, H * SCALE, W * SCALE, 3)
    assert (in_pieces(upscaler, frames, [1] * n) == whole).all()
    total = seen[0][1]
    assert seen[: len(seen) // 2] == [(i + 1, total) for i in range(total)]


def test_more_steps_are_other_frames_and_seeds_matter(micro_model):
    frames = video(5)
    runs = [
        in_pieces(ClipUpscaler(micro_model("teacher"), steps=steps, seed=seed), frames, [5])
        for steps, seed in ((1, 0), (1, 0), (3, 0), (1, 1))
    ]
    assert (runs[0] == runs[1]).all()
    assert (runs[0] != runs[2]).any() and (runs[0] != runs[3]).any()


def test_noise_may_be_injected(micro_model):
    """As a function of the latent's index, or as a mapping from it."""
    frames, asked = video(9), []

    def drawn(index, shape):
        asked.append((index, shape))
        return torch.full(shape, 0.1 * index)

    out = in_pieces(StreamingUpscaler(micro_model(), scale=SCALE, noise=drawn), frames, [9])
    assert asked == [(i, (16, 2, 6)) for i in range(4)]
    assert (out != in_pieces(StreamingUpscaler(micro_model(), scale=SCALE), frames, [9])).any()
    mapping = {i: torch.full((16, 2, 6), 0.1 * i) for i in range(4)}
    upscaler = StreamingUpscaler(micro_model(), scale=SCALE, noise=mapping)
    assert (in_pieces(upscaler, frames, [4, 5]) == out).all()
    clip = ClipUpscaler(micro_model("sparse"), scale=SCALE, steps=1, noise=mapping)
    assert len(in_pieces(clip, frames, [9])) == 9


@pytest.mark.parametrize(
    "noise,sentence",
    [
        ({}, "the given noise has nothing for latent 0"),
        ({i: torch.zeros(16, 2, 6) for i in range(3)}, "nothing for latent 3; give each a tensor (16, 2, 6)"),
        (lambda i, shape: torch.zeros(16, 2, 5), "noise of latent 0 is (16, 2, 5) instead of (16, 2, 6)"),
    ],
)
def test_noise_that_does_not_fit(micro_model, noise, sentence):
    upscaler = StreamingUpscaler(micro_model(), scale=SCALE, noise=noise)
    upscaler.push(video(9))
    with pytest.raises(UserError) as error:
        upscaler.flush()
    assert sentence in str(error.value)


def new_stream(model, **settings):
    return Stream(
        model.denoiser(), model.tc_decoder, StreamSettings(area=16 * 32, **settings), seeded_noise(0)
    )


def lr_frames(frames, height=16, width=32):
    return to_signed(torch.from_numpy(video(frames, height, width)).permute(3, 0, 1, 2))[None]


@pytest.mark.parametrize("n", range(1, 61))
def test_the_wrapper_is_the_core_with_the_last_frame_repeated(micro_model, n):
    """Core: F = 8m+1 in, F-4 out. Wrapper: N in, N out, however they are pushed."""
    model = micro_model()
    padded = max(9, -(-(n + 3) // 8) * 8 + 1)
    lr = lr_frames(n)
    lr = torch.cat([lr, lr[:, :, -1:].expand(-1, -1, padded - n, -1, -1)], 2)
    core = new_stream(model).run(lr)
    assert core.shape == (1, 3, padded - 4, 16, 32) and padded - 4 - n in range(8)
    expected = to_uint8(core[0, :, :n]).permute(1, 2, 3, 0).numpy()
    frames = video(n, 16, 32)
    upscaler = StreamingUpscaler(replace_area(model, 16 * 32), scale=1)
    assert (in_pieces(upscaler, frames, splits(n)[n % 3]) == expected).all()


def replace_area(model, area):
    model.info = replace(model.info, area=area)
    return model


@pytest.mark.parametrize("frames", [1, 5, 8, 12, 24])
def test_the_core_takes_8n_plus_1_frames(micro_model, frames):
    with pytest.raises(UserError, match=f"takes 8n\\+1 LR frames from 9 on, got {frames}"):
        new_stream(micro_model()).run(lr_frames(frames))


def tensors_in(value):
    """Every tensor reachable through attributes and containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        yield from tensors_in(vars(value))


def state_bytes(stream):
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_in(stream)}
    return sum(storages.values()), len(storages), len(stream.ring.chunks)


@pytest.mark.parametrize("decoder,chunks", [("tc", 200), ("vae", 50)])
def test_nothing_grows_with_time(micro_model, decoder, chunks):
    """The state of the stream, storages behind views included, stays as it is after the fourth chunk."""
    model = micro_model()
    stream = new_stream(model)
    stream.decoder = model.tc_decoder if decoder == "tc" else model.vae
    lr = lr_frames(33, 16, 16)
    stream.step(lr[:, :, :25])
    ring = stream.ring.keys.data_ptr(), stream.ring.values.data_ptr()
    seen = []
    for _ in range(chunks):
        stream.step(lr[:, :, 25:])
        seen.append(state_bytes(stream))
    assert set(seen[3:]) == {seen[3]} and seen[3][0] > 1000
    assert (stream.ring.keys.data_ptr(), stream.ring.values.data_ptr()) == ring, (
        "the ring is never reallocated"
    )
    assert stream.next_latent == 6 + 2 * chunks


def test_a_stream_may_begin_anywhere(micro_model):
    """From LR frames to SR frames, a stream at latent 1,000,000 gives what one at 20 gives."""
    runs = []
    for first in (20, 1_000_000):
        stream = new_stream(micro_model(), color_fix="none", sparse_ratio=None)
        stream.noise = lambda i, shape, first=first: seeded_noise(0)(i - first, shape)
        stream.next_latent = first
        runs.append(stream.run(lr_frames(41)))
    error = (runs[0] - runs[1]).abs().max().item()
    print(f"\nlatent 1,000,000 against 20, frames: {error:.1e}")
    assert error < 1e-5 and runs[0].std() > 0.01


def test_the_prompts_keys_are_computed_once(micro_model):
    """Not in any call: when the model is made ready."""
    model = micro_model()
    seen = []
    attentions = [block.cross_attn for block in model.dit.blocks]
    handles = [
        layer.register_forward_hook(lambda *_: seen.append(1))
        for layer in [model.dit.text_embedding, *(p for a in attentions for p in (a.k, a.v, a.norm_k))]
    ]
    upscaler = StreamingUpscaler(model, scale=1)
    ready = len(seen)
    upscaler.push(video(41, 16, 16))
    upscaler.flush()
    upscaler.push(video(3, 16, 16))
    upscaler.flush()
    for handle in handles:
        handle.remove()
    assert ready == len(handles) and len(seen) == ready


def test_bfloat16_weights_are_close_to_float32(micro_model, tmp_path):
    import flashvsr

    model = micro_model()
    parts = {p: getattr(model, p) for p in ("dit", "lr_projector", "tc_decoder", "vae", "prompt")}
    flashvsr.save_model(tmp_path / "m", config=model.config, info=model.info, **parts)
    full, half = (flashvsr.load(tmp_path / "m", dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    for decoder in ("tc", "vae"):
        # without colours: AdaIN magnifies whatever an untrained decoder of little contrast gives
        a, b = (
            in_pieces(
                StreamingUpscaler(m, scale=SCALE, decoder=decoder, color_fix="none"), video(6), [6]
            ).astype(int)
            for m in (full, half)
        )
        assert abs(a - b).mean() < max(0.5, 0.05 * a.std())
    assert StreamingUpscaler(half).in_use["precision"] == "bfloat16"


@pytest.mark.slow
def test_compiled_blocks_give_the_same_frames(micro_model):
    """Apart from rounding: never more than a level. A second upscaler of the model compiles nothing again."""
    model = micro_model()
    plain = in_pieces(StreamingUpscaler(model), video(33), [33])
    upscaler = StreamingUpscaler(model, compile=True)
    assert upscaler.in_use["compiled"]
    before = model.dit.blocks[0].before.__func__
    assert StreamingUpscaler(model, compile=True).model.dit.blocks[0].before.__func__ is before
    frames = in_pieces(upscaler, video(33), [33])
    assert np.abs(frames.astype(int) - plain.astype(int)).max() <= 1


def test_mirroring():
    assert mirrored(4, 11).tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert mirrored(1, 3).tolist() == [0, 0, 0]
    assert mirrored(5, 5).tolist() == [0, 1, 2, 3, 4]
    canvas = Canvas((5, 13), (20, 52), (32, 64), "cpu")
    assert canvas.size == (20, 52) and canvas.padded == (32, 64)
    frames = torch.from_numpy(video(2))
    placed = canvas.place(frames)
    assert placed.shape == (1, 3, 2, 32, 64) and placed.abs().max() <= 1
    back = canvas.take(placed)
    expected = bicubic_8bit(frames.permute(3, 0, 1, 2), (20, 52)).permute(1, 2, 3, 0).numpy()
    assert (back == expected).all()


def test_first_latents():
    assert [first_latents(n) for n in (1, 5, 6, 13, 14, 21, 24)] == [2, 2, 4, 4, 6, 6, 6]


def test_color_fix():
    """AdaIN gives LR's mean and deviation; `none` only clamps."""
    torch.manual_seed(0)
    sr, lr = torch.randn(1, 3, 2, 32, 32) * 0.1 + 0.5, torch.randn(1, 3, 2, 32, 32) * 0.2
    fixed = correct(sr, lr, "adain")
    assert torch.allclose(fixed.mean((-1, -2)), lr.mean((-1, -2)), atol=1e-4)
    assert torch.allclose(fixed.std((-1, -2)), lr.std((-1, -2)), atol=1e-3)
    assert torch.equal(correct(sr * 10, lr, "none"), (sr * 10).clamp(-1, 1))


@pytest.mark.parametrize("color_fix", ["adain", "wavelet", "none"])
def test_a_frames_colours_do_not_depend_on_its_company(color_fix):
    """Frames corrected together or in any pieces: the same bits. Nothing flickers where chunks meet."""
    torch.manual_seed(0)
    sr, lr = torch.randn(2, 1, 3, 12, 24, 40) * 0.4
    together = correct(sr, lr, color_fix)
    for sizes in ([1] * 12, [5, 4, 3], [11, 1]):
        parts = zip(sr.split(sizes, 2), lr.split(sizes, 2), strict=True)
        assert torch.equal(torch.cat([correct(a, b, color_fix) for a, b in parts], 2), together)


@pytest.mark.parametrize(
    "setting,value,shown",
    [
        ("color_fix", "wavelet", "wavelet"),
        ("color_fix", "none", "none"),
        ("sparse_ratio", 0.3, 0.3),
        ("sparse_ratio", None, None),
        ("local_range", 1, 1),
        ("local_range", None, None),
        ("local_boundary", "preserved", "preserved"),
        ("kv_chunks", 2, 2),
        ("seed", 1, 1),
        ("decoder", "vae", "vae"),
        ("tile", 16, "6 of 32x32, overlap 16, 2.00 times the work"),
    ],
)
def test_every_control_has_an_effect_and_is_said(micro_model, setting, value, shown):
    """Against the defaults, with a window small enough for its border to matter."""
    frames = video(37, 24, 32)
    base = {"scale": 2, "local_range": 3, "overlap": 8}
    if setting == "local_range":
        base["local_range"] = 5
    plain = in_pieces(StreamingUpscaler(micro_model(), **base), frames, [37])
    upscaler = StreamingUpscaler(micro_model(), **(base | {setting: value}))
    assert (in_pieces(upscaler, frames, [37]) != plain).any()
    upscaler.push(frames[:1])
    assert upscaler.in_use["tiles" if setting == "tile" else setting] == shown


@pytest.mark.parametrize("scale", [1, 1.5, 2, 2.25, 3, 4, 5.7])
@pytest.mark.parametrize("height,width", [(1, 1), (7, 10)])
@pytest.mark.parametrize("kind", ["one-step", "teacher"])
def test_any_scale_from_one_and_any_size_from_one_pixel(micro_model, scale, height, width, kind):
    """The output's sides are rounded, halves up; scales other than 4 are said once per upscaler."""
    said = []
    upscaler = method(micro_model(kind), scale=scale, note=said.append)
    frames = video(2, height, width)
    assert upscaler.push(frames[:0]).shape[0] == 0
    out = in_pieces(upscaler, frames, [1, 1])
    rounded = [int(np.floor(side * scale + 0.5)) for side in (height, width)]
    assert out.shape == (2, *rounded, 3)
    assert [sentence.split(":")[0] for sentence in said] == ([] if scale == 4 else [f"scale={scale:g}"])


def test_colours_at_a_fractional_scale_are_the_inputs(micro_model):
    """The picture is neither shifted nor cut: a gradient keeps its means on all four sides."""
    ramp = np.linspace(20, 230, 20).astype(np.uint8)
    frame = np.stack([np.tile(ramp, (12, 1)), np.tile(ramp[:12, None], (1, 20)), np.full((12, 20), 90)], -1)
    canvas = Canvas((12, 20), (27, 45), (32, 64), "cpu")
    out = canvas.take(canvas.place(torch.from_numpy(frame.astype(np.uint8))[None]))[0].astype(float)
    for part, big in ((frame[:, :4], out[:, :9]), (frame[:, -4:], out[:, -9:]), (frame[:4], out[:9])):
        assert np.abs(part.mean((0, 1)) - big.mean((0, 1))).max() < 1.5


def test_method_goes_by_the_kind(micro_model):
    assert isinstance(method(micro_model(), seed=1), StreamingUpscaler)
    assert isinstance(method(micro_model("teacher"), steps=2), ClipUpscaler)
    assert isinstance(method(micro_model("sparse"), sparse_ratio=1.5), ClipUpscaler)
    assert method(micro_model("sparse", sparse_ratio=1.25)).in_use["sparse_ratio"] == 1.25
    assert method(micro_model(sparse_ratio=1.25)).settings.sparse_ratio == 1.25


@pytest.mark.parametrize(
    "kind,settings,sentence",
    [
        ("one-step", {"steps": 4}, "'steps' has no meaning for a model of kind 'one-step'"),
        ("one-step", {"kv_chunk": 4}, "did you mean 'kv_chunks'"),
        ("one-step", {"kv_chunks": 1}, "kv_chunks=1: a stream keeps at least 2"),
        ("one-step", {"local_range": 0}, "local_range=0 must be at least 1"),
        ("one-step", {"sparse_ratio": 0}, "sparse_ratio=0 must be"),
        ("one-step", {"attention": "flash"}, "'flash' is unknown"),
        ("one-step", {"decoder": "taehv"}, "decoder='taehv' must be"),
        ("one-step", {"color_fix": "lab"}, "color_fix='lab' must be"),
        ("one-step", {"scale": 0}, "scale=0 must be at least 1"),
        ("one-step", {"scale": 0.99}, "scale=0.99 must be at least 1"),
        ("one-step", {"scale": float("nan")}, "scale=nan must be at least 1"),
        ("one-step", {"scale": "4"}, "scale='4' must be int or float"),
        ("one-step", {"local_boundary": "kept"}, "boundary='kept' must be 'truncated' or 'preserved'"),
        ("one-step", {"local_range": None, "local_boundary": "preserved"}, "without a local_range"),
        ("one-step", {"tile": 0}, "tile=0 must be at least 1"),
        ("one-step", {"tile": "big"}, "tile='big' must be"),
        ("one-step", {"overlap": -1}, "overlap=-1 must be at least 0"),
        ("one-step", {"memory": 0}, "memory=0.0 must be above 0 GiB"),
        ("teacher", {"sparse_ratio": 1.5}, "no effect on a teacher"),
        ("teacher", {"kv_chunks": 3}, "'kv_chunks' has no meaning"),
        ("teacher", {"steps": 0}, "steps=0 must be"),
        ("sparse", {"steps": "4"}, "steps='4' must be"),
        ("vae", {}, "of kind 'vae' and cannot upscale"),
    ],
)
def test_settings_that_cannot_be(micro_model, kind, settings, sentence):
    with pytest.raises(UserError) as error:
        method(micro_model(kind), **settings)
    assert sentence in str(error.value)


def test_a_model_of_another_kind_or_without_a_part(micro_model):
    with pytest.raises(UserError, match="only one-step models stream"):
        StreamingUpscaler(micro_model("teacher"))
    with pytest.raises(UserError, match="a one-step model streams"):
        ClipUpscaler(micro_model())
    model = micro_model(provenance={"run": "mine"})
    model.tc_decoder = None
    assert StreamingUpscaler(model).in_use["decoder"] == "vae"
    with pytest.raises(UserError, match="no TC decoder .*`python -m train stage=decoder run=mine` makes it"):
        StreamingUpscaler(model, decoder="tc")
    model.vae = None
    with pytest.raises(UserError, match="no TC decoder"):
        StreamingUpscaler(model)


def test_frames_that_cannot_be(micro_model):
    for upscaler in (StreamingUpscaler(micro_model()), ClipUpscaler(micro_model("teacher"))):
        for wrong in (video(2).astype(float), video(2)[0], video(2)[..., :2]):
            with pytest.raises(UserError, match="frames must be uint8"):
                upscaler.push(wrong)
        upscaler.push(video(2))
        with pytest.raises(UserError, match="6x13 after frames of 5x13: flush before"):
            upscaler.push(video(2, 6, 13))
    assert StreamingUpscaler(micro_model()).flush().shape == (0, 0, 0, 3)
