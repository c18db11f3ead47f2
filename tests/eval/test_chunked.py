"""Recurrent networks on a stream: N frames in and out, the same whatever the pushes; context and state."""

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from eval.baselines import Chunked, Network, load_network
from eval.baselines.basicvsr import BasicVSR, Memory
from eval.baselines.weights import random_network
from flashvsr.base.cli import UserError
from tests.flashvsr.test_golden import full
from tests.golden import Golden

TINY = dict(width=6, blocks=1, detail=4, flow_widths=(3, 4, 3, 2))
KINDS = ("basicvsr", "iconvsr")


class Noted(nn.Module):
    """In a network's place: gives frames back enlarged, and notes which it was given and how."""

    def __init__(self):
        super().__init__()
        self.conv_last = nn.Conv2d(1, 1, 1)
        self.calls: list[dict] = []

    def forward(self, frames, memory=None, behind=0, ahead=0, start=0):
        given = (frames[0, :, 0, 0, 0] * 255).round().int().tolist()
        own = slice(behind, frames.shape[1] - ahead)
        self.calls.append(dict(given=given, own=given[own], memory=memory, start=start))
        large = frames[:, own].repeat_interleave(4, -1).repeat_interleave(4, -2)
        return large, Memory(torch.tensor(given[own][-1]), frames[:, -1])


def numbered(count: int) -> np.ndarray:
    """Frames of 4x5 pixels that are all as bright as their number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, 4, 5, 3)).copy()


def pushed(method: Chunked, frames: np.ndarray, drawn: random.Random | None) -> np.ndarray:
    """All that comes out, pushed at once or (drawn) in pieces of 0 to 9 frames."""
    out, at = [], 0
    while at < len(frames):
        size = drawn.randint(0, 9) if drawn else len(frames)
        piece = method.push(frames[at : at + size])
        assert piece.shape[1:] == (4 * frames.shape[1], 4 * frames.shape[2], 3) and piece.dtype == np.uint8
        out.append(piece)
        at += size
    rest = method.flush()
    return np.concatenate([*out, rest]) if len(rest) else np.concatenate(out)


@pytest.mark.parametrize("carry", [False, True])
def test_every_chunk_is_given_what_its_settings_say(carry):
    """N = 1...40, intervals 1...16 and more than the clip, overlaps, pushes of any size."""
    drawn = random.Random(0)
    for n, interval, overlap in itertools.product(range(1, 41), (*range(1, 17), 50), (0, 1, 2, 20)):
        module = Noted()
        method = Chunked(Network(module, "Noted", "none"), interval=interval, overlap=overlap, carry=carry)
        out = pushed(method, numbered(n), drawn)
        assert out[:, 0, 0, 0].tolist() == list(range(n))
        starts = range(0, n, interval)
        assert len(module.calls) == len(starts)
        for begin, call in zip(starts, module.calls, strict=True):
            stop = min(begin + interval, n)
            first = begin if carry else max(begin - overlap, 0)
            assert call["given"] == list(range(first, min(stop + overlap, n)))
            assert call["own"] == list(range(begin, stop))
            assert call["start"] == (first if carry or overlap else 0)
            if carry and begin:
                assert call["memory"].hidden == begin - 1
            else:
                assert call["memory"] is None


def test_frames_come_out_as_soon_as_their_chunk_can():
    """delay_frames is what it says: pushed one by one, the first of a chunk waits for exactly so many."""
    for interval, overlap, carry in itertools.product((1, 3, 15), (0, 2), (False, True)):
        method = Chunked(Network(Noted(), "", ""), interval=interval, overlap=overlap, carry=carry)
        assert method.delay_frames == interval - 1 + overlap
        came = []
        for i, frame in enumerate(numbered(40)):
            came += [i] * len(method.push(frame[None]))
        for first in range(0, len(came), interval):
            assert came[first] - first == method.delay_frames
    assert Chunked(Network(Noted(), "", ""), interval=None).delay_frames is None


def test_memory_of_a_stream_is_bounded():
    for carry in (False, True):
        method = Chunked(Network(Noted(), "", ""), interval=5, overlap=3, carry=carry)
        for piece in np.split(numbered(240), 80):
            method.push(piece)
            assert len(method._held) <= 5 + 2 * 3


def tiny(kind: str, seed: int = 2) -> Network:
    """Random, and unlike an untrained one strong enough that every neighbour shows in 8 bits."""
    extra = dict(groups=2, edvr_blocks=1) if kind == "iconvsr" else {}
    module = random_network(kind, seed, **TINY, **extra).eval().requires_grad_(False)
    for name, weight in module.named_parameters():
        weight.mul_(2.5 if name.startswith(("forward", "backward", "conv_last")) and weight.ndim > 1 else 1)
    return Network(module, type(module).__name__, "random weights")


def clip(count: int, height: int = 9, width: int = 10) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def to_uint8(y: torch.Tensor) -> np.ndarray:
    return (y.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def whole(network: Network, frames: np.ndarray) -> np.ndarray:
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255
    return to_uint8(network.module(x)[0][0])


def near(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal but for a rounding here and there (convolutions of other batches)."""
    off = np.abs(a.astype(int) - b)
    return off.max() <= 1 and (off > 0).mean() < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_clip_and_chunks_that_see_all_of_it(kind):
    network, frames = tiny(kind), clip(13)
    expected = whole(network, frames)
    assert near(pushed(Chunked(network, interval=None), frames, random.Random(1)), expected)
    assert near(pushed(Chunked(network, interval=4, overlap=13), frames, random.Random(2)), expected)
    assert near(pushed(Chunked(network, interval=20), frames, None), expected)
    assert not near(pushed(Chunked(network, interval=4), frames, None), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_without_context_are_clips_of_their_own(kind):
    """What BasicSR's `--interval` does."""
    network, frames = tiny(kind), clip(12)
    for interval in (1, 5, 7):
        parts = [whole(network, frames[i : i + interval]) for i in range(0, 12, interval)]
        out = pushed(Chunked(network, interval=interval), frames, random.Random(interval))
        assert near(out, np.concatenate(parts))


def test_carried_state_is_exact_forward_and_begins_anew_backward():
    """BasicVSR: forward features of the whole clip, backward ones of the chunk and the frames ahead."""
    network, frames = tiny("basicvsr"), clip(11)
    module: BasicVSR = network.module
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255
    forward, memory = [], None
    for i in range(11):
        past = module.moved(memory, x[:, i])
        forward.append(module.forward_trunk(torch.cat([x[:, i], past], 1)))
        memory = Memory(forward[-1], x[:, i])
    for interval, overlap in ((3, 0), (4, 2)):
        expected = []
        for begin in range(0, 11, interval):
            stop = min(begin + interval, 11)
            backward = module._backward(x[:, begin : stop + overlap], 0)[::-1]
            for i in range(begin, stop):
                both = module.fusion(torch.cat([backward[i - begin], forward[i]], 1))
                expected.append(module.reconstruct(nn.functional.leaky_relu(both, 0.1), x[:, i]))
        method = Chunked(network, interval=interval, overlap=overlap, carry=True)
        assert near(pushed(method, frames, random.Random(3)), to_uint8(torch.cat(expected)))


@pytest.mark.parametrize("kind", KINDS)
def test_context_and_state_bring_chunks_nearer_to_the_whole_clip(kind):
    network, frames = tiny(kind), clip(20)
    expected = whole(network, frames)

    def off(**settings) -> float:
        out = pushed(Chunked(network, interval=5, **settings), frames, None)
        return np.abs(out.astype(int) - expected).mean()

    assert off() > off(overlap=2) > off(overlap=4) and off() > off(carry=True) > off(overlap=4, carry=True)


def test_a_flush_ends_the_clip():
    network, frames = tiny("basicvsr"), clip(7)
    method = Chunked(network, interval=3, carry=True)
    first = pushed(method, frames, None)
    assert np.array_equal(pushed(method, frames, None), first)
    assert len(method.flush()) == 0
    assert pushed(method, clip(4, 5, 6), None).shape == (4, 20, 24, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_released_frames_through_push(kind):
    golden = Golden(full(kind))
    network = Network(golden.baseline(kind), kind, "")
    frames = to_uint8(golden["input_BNCHW"][0])
    x = torch.from_numpy(frames).permute(0, 3, 1, 2)[None] / 255
    out = pushed(Chunked(network, interval=None), frames, random.Random(0))
    assert near(out, to_uint8(network.module(x)[0][0]))
    theirs = to_uint8(golden["output_BNCHW"][0])  # of frames before they were rounded to 8 bits
    assert np.abs(out.astype(int) - theirs).mean() < 1


def test_in_use_tells_all_that_was_chosen():
    network = load_network("basicvsr", "random", dtype=torch.bfloat16)
    said = Chunked(network, interval=6, overlap=2, carry=True).in_use
    assert said == {
        "method": "BasicVSR, bidirectional, by chunks",
        "weights": "random weights (seed 0), a demonstration only",
        "precision": "bfloat16, flow float32",
        "device": "cpu",
        "interval": 6,
        "overlap": 2,
        "carry": True,
        "delay_frames": 7,
    }
    assert "interval" not in Chunked(network, interval=None).in_use


@pytest.mark.parametrize(
    "settings,sentence",
    [
        (dict(interval=0), "interval=0 must be a whole number of frames from 1 on, or none"),
        (dict(interval=2.5), "interval=2.5 must be"),
        (dict(interval="15"), "interval='15' must be"),
        (dict(overlap=-1), "overlap=-1 must be a whole number of frames from 0 on"),
        (dict(carry=1), "carry=1 must be true or false"),
        (dict(interval=None, overlap=2), "overlap and carry have no effect with interval=none"),
        (dict(interval=None, carry=True), "overlap and carry have no effect with interval=none"),
    ],
)
def test_settings_out_of_range(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Chunked(Network(Noted(), "", ""), **settings)


def test_frames_that_no_clip_has():
    method = Chunked(tiny("iconvsr"), interval=2)
    with pytest.raises(UserError, match="takes frames from 4x4 on, not 3x9"):
        method.push(clip(1, 3, 9))
    with pytest.raises(UserError, match="must be uint8"):
        method.push(clip(1).astype(np.float32))
    method.push(clip(2))
    with pytest.raises(UserError, match="a frame of 9x8 after frames of 9x10: flush before"):
        method.push(clip(1, 9, 8))
