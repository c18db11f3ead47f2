"""A decoder that works beside the next call's DiT gives the same frames, one call later, whatever happens."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import flashvsr
from flashvsr import StreamingUpscaler
from flashvsr.base.video_io import VideoWriter, read_frames
from flashvsr.streaming import beside, stream
from flashvsr.streaming.beside import Beside
from flashvsr.streaming.stream import Stream
from tests.flashvsr.test_preflight import estimated, small_device
from tests.flashvsr.test_tiling import picture, through
from tests.flashvsr.test_upscaler import in_pieces, splits, video


@pytest.mark.parametrize("n,decoder", [(1, "tc"), (13, "vae"), (25, "tc"), (41, "tc"), (41, "vae")])
def test_the_same_frames_for_any_split(micro_model, n, decoder):
    frames = video(n)
    plain = StreamingUpscaler(micro_model(), scale=2, decoder=decoder)
    both = StreamingUpscaler(micro_model(), scale=2, decoder=decoder, pipelined=True)
    expected = in_pieces(plain, frames, [n])
    for sizes in ([n], *splits(n)):
        assert np.array_equal(in_pieces(both, frames, sizes), expected), sizes


def test_frames_come_one_call_later_or_when_asked_for(micro_model):
    upscaler = StreamingUpscaler(micro_model(), scale=1, pipelined=True)
    frames = video(41, 16, 16)
    given = [len(upscaler.push(frames[i : i + 1])) for i in range(41)]
    assert {i: g for i, g in enumerate(given) if g} == {32: 21, 40: 8}
    assert upscaler.in_use["pipelined"] and len(upscaler.settle()) == 8 and len(upscaler.settle()) == 0
    assert len(upscaler.flush()) == 4
    assert not any(thread.name.startswith("beside") for thread in threading.enumerate())


def test_the_second_half_runs_while_the_next_call_begins(micro_model, monkeypatch):
    """The first call's frames wait until the second call's DiT has begun: in turns that would be never."""
    begun, real = threading.Semaphore(0), {"sample": Stream.sample, "finish": Stream.finish}

    def sample(self, features):
        begun.release()
        return real["sample"](self, features)

    def finish(self, latent, lr):
        assert begun.acquire(timeout=20) and (self.decoder_memory or begun.acquire(timeout=20))
        return real["finish"](self, latent, lr)

    monkeypatch.setattr(Stream, "sample", sample)
    monkeypatch.setattr(Stream, "finish", finish)
    upscaler = StreamingUpscaler(micro_model(), scale=1, pipelined=True)
    assert len(upscaler.push(video(33, 16, 16))) == 21
    begun.release()
    assert len(upscaler.flush()) == 12


@pytest.mark.parametrize("half,after", [("first", 0), ("first", 4), ("second", 1), ("second", 4)])
def test_running_out_of_memory_in_either_half_loses_nothing(micro_model, monkeypatch, half, after):
    """Frame by frame what the retry gives where nothing works beside."""
    frames, said = picture(61, 16, 24), []

    def run(pipelined):
        with monkeypatch.context() as patch:
            if half == "first":
                small_device(patch, 64 * 96 - 1, after)
            else:
                real, calls = stream.decode, []

                def decode(decoder, latent, reference, memory):
                    calls.append(0)
                    if len(calls) > after and reference.shape[-2] * reference.shape[-1] >= 64 * 96:
                        raise torch.OutOfMemoryError("CUDA out of memory")
                    return real(decoder, latent, reference, memory)

                patch.setattr(stream, "decode", decode)
            one = StreamingUpscaler(micro_model(), overlap=4, pipelined=pipelined, note=said.append)
            return through(one, frames)

    assert np.array_equal(run(True), run(False))
    assert len(said) == 2 and said[0] == said[1] and "going on once with tiles" in said[0]


def test_an_error_of_the_second_half_is_raised(micro_model, monkeypatch):
    def broken(*_):
        raise ValueError("the decoder broke")

    monkeypatch.setattr(stream, "decode", broken)
    upscaler = StreamingUpscaler(micro_model(), scale=1, pipelined=True)
    with pytest.raises(ValueError, match="the decoder broke"):
        upscaler.push(video(33, 16, 16))


def test_not_where_memory_is_too_small_for_both_nor_with_tiles(micro_model):
    from flashvsr.streaming.tiling import whole

    model, frames = micro_model(), picture(2, 32, 48)
    one, two = (estimated(model, whole((64, 96)), pipelined=p).device / 2**30 for p in (False, True))
    assert one < two
    for settings, expected in (
        ({"memory": 1.01 * two}, True),
        ({"memory": (one + two) / 2}, False),
        ({"tile": 16, "overlap": 0}, False),
        ({"offload": True}, False),
    ):
        upscaler = StreamingUpscaler(model, scale=2, pipelined=True, **settings)
        upscaler.push(frames)
        assert upscaler.in_use["pipelined"] == expected, settings


def test_cores_that_torch_leaves_idle(monkeypatch):
    monkeypatch.setattr(beside.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert beside.worthwhile(torch.device("cpu"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert not beside.worthwhile(torch.device("cpu")) and beside.worthwhile(torch.device("cuda"))
    assert threads >= 1


class Recorded:
    """A CUDA stream or tensor that notes, with its name, what is done to it."""

    def __init__(self, name, seen):
        self.name, self.seen, self.device = name, seen, torch.device("cuda")

    def __getattr__(self, action):
        def act(*given, **_):
            self.seen.append((self.name, action, *(getattr(g, "name", g) for g in given)))
            return Recorded(f"{self.name}'s {action}", self.seen)

        return act

    def __enter__(self):
        self.seen.append((self.name, "is current"))

    def __exit__(self, *_):
        self.seen.append((self.name, "was current"))


def test_on_a_gpu_each_half_waits_for_the_other_and_for_nothing_else(monkeypatch):
    """The order of what is asked of streams, on recorded ones: no GPU is here to show it."""
    seen = []
    main, side = Recorded("main", seen), Recorded("side", seen)
    current = {threading.main_thread(): main}
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", lambda given: given)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: current.get(threading.current_thread(), side)
    )
    run = Beside(torch.device("cuda"))

    def work():
        beside.borrow([Recorded("latent", seen)])
        return beside.download(Recorded("frames", seen))

    run(work).result()
    run.close()
    assert seen == [
        ("main", "record_event"),
        ("side", "is current"),
        ("side", "wait_event", "main's record_event"),
        ("latent", "record_stream", "side"),
        ("frames", "to", "cpu"),
        ("side", "synchronize"),
        ("frames's to", "numpy"),
        ("side", "was current"),
    ]


def test_the_webcam_of_the_docs(micro_model, monkeypatch, tmp_path):
    """The page's lines, with a file for the camera and one for the window."""
    text = (Path(__file__).parents[2] / "docs" / "upscaling.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.S) if "/dev/video0" in block)
    with VideoWriter(tmp_path / "in.mkv", 25, 16, 16, lossless=True) as writer:
        writer.write(video(41, 16, 16))
    viewer = "ffplay -loglevel error -f rawvideo -pixel_format rgb24 -video_size 1280x960 -"
    device = '"/dev/video0", format="v4l2", options={"video_size": "320x240"}'
    for there, here in (
        (device, repr(str(tmp_path / "in.mkv"))),
        (viewer, f"cp /dev/stdin {tmp_path}/out"),
    ):
        assert code.count(there) == 1
        code = code.replace(there, here)
    monkeypatch.setattr(flashvsr, "load", lambda _: micro_model(), raising=False)
    names = {}
    exec(code, names)
    names["window"].communicate()
    plain = StreamingUpscaler(micro_model())
    expected = plain.push(np.stack(list(read_frames(tmp_path / "in.mkv"))))
    assert (tmp_path / "out").read_bytes() == expected[:29].tobytes()
