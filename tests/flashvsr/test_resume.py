"""An upscale that is killed goes on and ends in the very same file."""

import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from flashvsr.base.cli import UserError
from flashvsr.base.footage import Footage
from flashvsr.base.video_io import read_frames
from flashvsr.streaming.clip import ClipUpscaler
from flashvsr.streaming.job import Interrupted, Target
from flashvsr.streaming.resume import upscale_resumable, work_folder
from flashvsr.streaming.state import restore, state_of
from flashvsr.streaming.upscaler import StreamingUpscaler
from tests.data.footage import scene
from tests.flashvsr.test_job import make, packets, times

ROOT = Path(__file__).parents[2]
FRAMES, H, W = 61, 10, 14


class Killed(BaseException):
    """What a SIGKILL leaves: nothing in the process goes on."""


@pytest.fixture
def upscaler(micro_model):
    def make_one(**settings):
        settings = {"scale": 2, "note": lambda sentence: None, **settings}
        return StreamingUpscaler(micro_model(), **settings)

    return make_one


def go(source, out, method, die_after=None, error=Killed, **target):
    footage = Footage(source)
    if die_after is not None:
        push = method.push
        seen = 0

        def dies(frames):
            nonlocal seen
            seen += len(frames)
            if seen > die_after:
                raise error
            return push(frames)

        method.push = dies
    return upscale_resumable(footage, method, (2 * H, 2 * W), Target(str(out), **target), segment_frames=16)


@pytest.fixture
def source(tmp_path):
    pts = [k + (k > 20) * 5 + (k > 40) * 3 for k in range(FRAMES)]
    return make(tmp_path / "in.mp4", scene(1, FRAMES, H, W), pts=pts, sound="aac", options={"bf": "2"})


@pytest.mark.parametrize(
    "settings",
    [{}, {"decoder": "vae"}, {"tile": 8, "overlap": 0}, {"tile": 8, "overlap": 0, "offload": True}],
)
def test_a_saved_state_goes_on_with_the_same_bits(upscaler, settings):
    frames = scene(2, 50, H, W)
    whole = upscaler(**settings)
    want = [whole.push(frames[:32]), whole.push(frames[32:]), whole.flush()]
    one, other = upscaler(**settings), upscaler(**settings)
    assert np.array_equal(one.push(frames[:32]), want[0])
    state = state_of(one)
    one.push(frames[32:])  # what it does later changes nothing in the state
    restore(other, state)
    assert np.array_equal(other.push(frames[32:]), want[1]) and np.array_equal(other.flush(), want[2])
    assert len(np.concatenate(want)) == 50


def test_a_state_of_other_tiles_is_refused(upscaler):
    one = upscaler(tile=8, overlap=0)
    one.push(scene(2, 32, H, W))
    with pytest.raises(UserError, match="give the same --tile"):
        restore(upscaler(), state_of(one))


@pytest.mark.parametrize(
    "name,codec", [("out.mp4", "libx264"), ("out.mov", "libx265"), ("out.mkv", "ffv1"), ("out", "")]
)
def test_killed_anywhere_the_file_is_the_same(source, upscaler, tmp_path, name, codec):
    target = {"codec": codec} if codec else {}
    go(source, tmp_path / "whole" / name, upscaler(), **target)
    out = tmp_path / "killed" / name
    for die_after in (8, 24, 40, 8, 24):  # frames after where it goes on
        with pytest.raises(Killed):
            go(source, out, upscaler(), die_after=die_after, **target)
        assert not out.exists() and work_folder(str(out)).is_dir()
    kept = any(work_folder(str(out)).glob("state-*"))  # but where the writer had not come so far
    done = go(source, out, upscaler(), **target)
    assert done.times.frames < FRAMES or not kept  # what was done is not done again
    assert [p.name for p in out.parent.iterdir()] == [name]
    if not codec:
        got, want = (np.stack(list(read_frames(p))) for p in (out, tmp_path / "whole" / name))
        plain = upscaler()
        frames = np.stack(list(read_frames(source)))
        assert np.array_equal(got, want) and np.array_equal(
            want, np.concatenate([plain.push(frames), plain.flush()])
        )
        return
    if name != "out.mkv":  # Matroska files carry a random number
        assert out.read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert packets(out, "video") == packets(tmp_path / "whole" / name, "video")
    assert len(times(out)) == FRAMES and packets(out) == packets(tmp_path / "whole" / name)
    if codec == "libx265":
        with av.open(str(out)) as file:  # the tag that Apple's players ask for
            assert file.streams.video[0].codec_context.codec_tag == "hvc1"
    got, want = ([t - ts[0] for t in ts] for ts in (times(out), times(source)))
    ms = 1 if name == "out.mkv" else 0  # which also begins later, by the sound that precedes the first frame
    assert max(abs(a - b) for a, b in zip(got, want, strict=True)) <= Fraction(ms, 1000)
    assert len(packets(out)) == len(packets(source)) > 10


def test_a_decoder_beside_the_dit_makes_the_same_file(source, upscaler, tmp_path):
    go(source, tmp_path / "whole.mp4", upscaler())
    with pytest.raises(Killed):
        go(source, tmp_path / "out.mp4", upscaler(pipelined=True), die_after=48)
    kept = any(work_folder(str(tmp_path / "out.mp4")).glob("state-*"))
    done = go(source, tmp_path / "out.mp4", upscaler(pipelined=True))
    assert done.times.frames < FRAMES or not kept
    assert (tmp_path / "out.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()


def test_other_settings_do_not_go_on_in_the_same_folder(source, upscaler, tmp_path):
    with pytest.raises(Killed):
        go(source, tmp_path / "out.mp4", upscaler(), die_after=40)
    with pytest.raises(UserError, match="was begun with seed=0, now it is 1; give the same"):
        go(source, tmp_path / "out.mp4", upscaler(seed=1))
    with pytest.raises(UserError, match="was begun with crf=None, now it is 3"):
        go(source, tmp_path / "out.mp4", upscaler(), crf=3)
    with pytest.raises(Interrupted, match="the same command goes on from there"):
        go(source, tmp_path / "out.mp4", upscaler(), die_after=8, error=KeyboardInterrupt)


def test_what_cannot_be_resumed_says_so(source, tmp_path, micro_model):
    with pytest.raises(UserError, match="--resume needs a one-step model"):
        go(source, tmp_path / "out.mp4", ClipUpscaler(micro_model("teacher"), scale=2, decoder="vae"))


@pytest.mark.slow
def test_killed_for_real_the_command_ends_in_the_same_file(tmp_path, micro_model):
    """SIGKILL at three moments, on a clip of three segments."""
    from flashvsr.weights.folder import save_model

    model = micro_model()
    parts = {p: getattr(model, p) for p in ("dit", "lr_projector", "prompt", "tc_decoder")}
    save_model(tmp_path / "model", config=model.config, info=model.info, **parts)
    source = make(tmp_path / "in.mp4", scene(1, 600, 32, 48), sound="aac")

    def start(out):
        command = [sys.executable, "-m", "flashvsr", "upscale", str(source), str(out), "--resume", "--quiet"]
        return subprocess.Popen([*command, "--model", str(tmp_path / "model"), "--scale", "2"], cwd=ROOT)

    assert start(tmp_path / "a.mp4").wait(300) == 0
    work = tmp_path / "b.mp4.resume"
    for segment in (1, 1, 2):
        process = start(tmp_path / "b.mp4")
        until = time.monotonic() + 120
        while not (work / f"state-{segment:06d}.pt").exists() and time.monotonic() < until:
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert not (tmp_path / "b.mp4").exists()
    assert start(tmp_path / "b.mp4").wait(300) == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes() and not work.exists()
