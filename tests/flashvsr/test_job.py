"""A clip through a method into a file: what must be the same afterwards, and what damage does."""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from flashvsr.base.cli import UserError
from flashvsr.base.footage import Footage, Moment
from flashvsr.base.video_io import VideoWriter, probe, read_frames
from flashvsr.streaming.job import Interrupted, Target, upscale
from tests.data.footage import corrupted, scene

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared" / "data" / "lq"


class Nearest:
    """Each pixel twice, five frames late, some frames at once: holds back as a streaming model does."""

    def __init__(self, fail_at=None, error=None):
        self.held, self.seen, self.fail_at, self.error = None, 0, fail_at, error

    def push(self, frames):
        self.seen += len(frames)
        if self.fail_at is not None and self.seen >= self.fail_at:
            raise self.error
        self.held = frames if self.held is None else np.concatenate([self.held, frames])
        count = max(0, len(self.held) - 5) // 4 * 4
        out, self.held = self.held[:count], self.held[count:]
        return out.repeat(2, 1).repeat(2, 2)

    def flush(self):
        held, self.held = self.held, None
        return np.empty((0, 0, 0, 3), np.uint8) if held is None else held.repeat(2, 1).repeat(2, 2)


def go(source, out, method=None, start=None, end=None, **target):
    moments = (None if m is None else Moment.parse(m) for m in (start, end))
    footage = Footage(source, *moments)
    size = 2 * footage.height, 2 * footage.width
    return upscale(footage, method or Nearest(), size, Target(str(out), **target))


def larger(clip):
    return clip.repeat(2, 1).repeat(2, 2)


def read(path):
    return np.stack(list(read_frames(path)))


def make(path, clip, *, pts=None, rate=25, codec="libx264", pix_fmt="yuv420p", sound=None, context=None,
         options=None, chapters=None, metadata=None, subtitles=None):  # fmt: skip
    """A video with what else a video has; time stamps in 1/`rate`."""
    with av.open(str(path), "w") as file:
        video = file.add_stream(codec, rate=rate, options=options or {})
        video.height, video.width, video.pix_fmt = *clip.shape[1:3], pix_fmt
        video.codec_context.thread_count = 1
        for key, value in (context or {}).items():
            setattr(video.codec_context, key, value)
        audio = None if sound is None else file.add_stream(sound, rate=8000, layout="mono")
        file.metadata.update(metadata or {})
        if chapters:
            file.set_chapters(chapters)
        texts = None
        if subtitles is not None:
            lines = [
                f"{i}\n00:00:0{a},000 --> 00:00:0{a + 1},000\n{text}\n"
                for i, (a, text) in enumerate(subtitles)
            ]
            path.with_suffix(".srt").write_text("\n".join(lines))
            texts = av.open(str(path.with_suffix(".srt")))
            track = file.add_stream_from_template(texts.streams.subtitles[0])
        if audio is not None:
            audio.metadata["language"] = "deu"
        for i, pixels in enumerate(clip):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if pix_fmt.startswith("yuv"):
                matrix = {2: 5, 1: 1, 6: 5, 5: 5, 9: 9}[(context or {}).get("colorspace", 2)]
                frame = frame.reformat(
                    format=pix_fmt,
                    dst_colorspace=matrix,
                    dst_color_range=(context or {}).get("color_range", 1),
                )
            else:
                frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, rate)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        if texts is not None:
            for packet in texts.demux():
                if packet.size:
                    packet.stream = track
                    file.mux(packet)
        if audio is not None:
            seconds = (len(clip) if pts is None else pts[-1] + 1) / rate
            for k in range(int(seconds * 8000) // 1024):
                wave = np.sin((np.arange(1024) + 1024 * k) * 0.2)[None]
                kind, dtype = ("s16", np.int16) if sound != "aac" else ("fltp", np.float32)
                piece = av.AudioFrame.from_ndarray(
                    (wave * 9000 if kind == "s16" else wave).astype(dtype), kind, "mono"
                )
                piece.sample_rate, piece.pts, piece.time_base = 8000, 1024 * k, Fraction(1, 8000)
                file.mux(audio.encode(piece))
            file.mux(audio.encode())
    return path


def times(path):
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        return [frame.pts * video.time_base for frame in file.decode(video)]


def packets(path, kind="audio"):
    with av.open(str(path)) as file:
        stream = getattr(file.streams, kind)[0]
        return [(p.pts * p.time_base, bytes(p)) for p in file.demux(stream) if p.size]


# ---- the contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest", range(6))
def test_n_frames_in_n_out_each_its_own(tmp_path, rest):
    """1 ... 60 frames, sizes even and odd; lossless in and out, so each frame is known by its pixels."""
    for n in range(1 + rest, 61, 6):
        height, width = 3 + n % 5, 5 + n % 7
        clip = np.random.default_rng(n).integers(0, 256, (n, height, width, 3), np.uint8)
        with VideoWriter(tmp_path / f"{n}.mkv", 25, height, width, codec="ffv1", lossless=True) as writer:
            writer.write(clip)
        done = go(tmp_path / f"{n}.mkv", tmp_path / f"frames{n}")
        assert np.array_equal(read(tmp_path / f"frames{n}"), larger(clip)) and done.times.frames == n
        go(tmp_path / f"{n}.mkv", tmp_path / f"out{n}.mkv", codec="ffv1")
        assert times(tmp_path / f"out{n}.mkv") == times(tmp_path / f"{n}.mkv")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize("codec", ["libx264", "libx265", "ffv1"])
def test_a_variable_rate_is_kept(tmp_path, suffix, codec):
    if (codec, suffix) == ("ffv1", "mov"):
        pytest.skip("not a common pair")
    pts = [0, 1, 2, 10, 11, 30, 31, 33, 90, 91, 92, 100]
    source = make(tmp_path / f"in.{suffix}", scene(1, 12), pts=pts, options={"bf": "2"})
    go(source, tmp_path / f"out.{suffix}", codec=codec)
    assert times(tmp_path / f"out.{suffix}") == times(source) == [Fraction(p, 25) for p in pts]
    got = read(tmp_path / f"out.{suffix}").astype(int)
    assert np.abs(got - larger(read(source))).mean() < 2.5


def test_sound_chapters_and_metadata_are_the_same_afterwards(tmp_path):
    chapters = [
        {
            "id": k,
            "start": 500 * k,
            "end": 500 * k + 500,
            "time_base": Fraction(1, 1000),
            "metadata": {"title": t},
        }
        for k, t in enumerate(("one", "two"))
    ]
    source = make(
        tmp_path / "in.mp4", scene(2, 25), sound="aac", chapters=chapters, metadata={"title": "Sea"}
    )
    done = go(source, tmp_path / "out.mp4")
    assert packets(tmp_path / "out.mp4") == packets(source) and done.dropped == []
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.metadata["title"] == "Sea" and file.streams.audio[0].metadata["language"] == "deu"
        assert [(c["start"], c["end"], c["metadata"]["title"]) for c in file.chapters()] == [
            (0, 500, "one"), (500, 1000, "two"),
        ]  # fmt: skip
    go(source, tmp_path / "silent.mp4", audio=False)
    assert not probe(tmp_path / "silent.mp4").has_audio


def test_a_title_in_another_encoding_is_no_obstacle(tmp_path):
    source = make(tmp_path / "in.mp4", scene(2, 3), metadata={"title": "Café Sea"})
    source.write_bytes(source.read_bytes().replace("Café".encode(), b"Caf\xe9s"))
    go(source, tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.metadata["title"] == "Caf\N{REPLACEMENT CHARACTER}s Sea"


def test_sound_that_the_file_type_cannot_hold_is_refused_before_any_work(tmp_path):
    source = make(tmp_path / "in.avi", scene(2, 12), codec="mpeg4", sound="pcm_mulaw")
    with pytest.raises(
        UserError, match=r"pcm_mulaw cannot be .* a \.mp4 file; name OUT \.mov, or .*--no-audio"
    ):
        go(source, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    go(source, tmp_path / "out.mov")
    assert b"".join(data for _, data in packets(tmp_path / "out.mov")) == b"".join(
        d for _, d in packets(source)
    )


def test_subtitles_are_copied_or_named(tmp_path):
    source = make(tmp_path / "in.mkv", scene(2, 25), subtitles=[(0, "hello"), (2, "there")])
    assert go(source, tmp_path / "out.mkv").dropped == []
    assert packets(tmp_path / "out.mkv", "subtitles") == packets(source, "subtitles") != []
    (said,) = go(source, tmp_path / "out.mp4").dropped
    assert "subtitle track of kind s" in said and "a .mkv file can" in said


def test_a_cut_has_its_frames_its_sound_and_begins_at_zero(tmp_path):
    source = make(tmp_path / "in.mp4", scene(3, 50), sound="aac", options={"g": "10", "bf": "2"})
    whole = read(source)
    for start, end, first, last in (("10f", "30f", 10, 30), ("0.4", "1.2", 10, 30), ("0:01", None, 25, 50)):
        go(source, tmp_path / "out.mp4", start=start, end=end, crf=1)
        got = read(tmp_path / "out.mp4")
        assert len(got) == last - first and times(tmp_path / "out.mp4")[0] == 0
        assert np.abs(got.astype(int) - larger(whole[first:last])).mean() < 1
        want = [(t - Fraction(first, 25), data) for t, data in packets(source)]
        want = [(t, data) for t, data in want if 0 <= t < Fraction(last - first, 25)]
        got = packets(tmp_path / "out.mp4")
        assert [data for _, data in got] == [data for _, data in want]
        assert max(abs(a - b) for (a, _), (b, _) in zip(got, want, strict=True)) <= Fraction(1, 8000)
        (tmp_path / "out.mp4").unlink()
    with pytest.raises(UserError, match="--start lies behind its end"):
        go(source, tmp_path / "out.mp4", start="60f")


@pytest.mark.parametrize(
    "context",
    [
        {"colorspace": 1, "color_range": 1, "color_primaries": 1, "color_trc": 1},
        {"colorspace": 6, "color_range": 1, "color_primaries": 6, "color_trc": 6},
        {"colorspace": 5, "color_range": 2, "color_primaries": 5, "color_trc": 5},
        {"colorspace": 9, "color_range": 1, "color_primaries": 9, "color_trc": 14},
        {},
    ],
)
def test_colours_look_the_same_and_keep_their_tags(tmp_path, context):
    """Flat colours: subsampling plays no part, and the wrong matrix or range is off by 10 and more."""
    colours = np.array([(200, 40, 90), (30, 180, 60), (250, 250, 250), (5, 5, 5)], np.uint8)
    clip = colours[:, None, None].repeat(16, 1).repeat(32, 2)
    source = make(tmp_path / "in.mp4", clip, context=context, options={"crf": "1"})
    assert np.abs(read(source).astype(int) - clip).max() <= 4
    go(source, tmp_path / "out.mp4", crf=1)
    assert np.abs(read(tmp_path / "out.mp4").astype(int) - larger(clip)).max() <= 5
    with av.open(str(tmp_path / "out.mp4")) as file:
        frame = next(file.decode(video=0))
        tags = frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc
    assert tags == (tuple(context.values()) or (1, 1, 1, 1))


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_recognised_and_refused(tmp_path, transfer, name):
    context = {"colorspace": 9, "color_primaries": 9, "color_trc": transfer}
    source = make(tmp_path / "in.mp4", scene(1, 3), context=context)
    with pytest.raises(UserError, match=rf"in.mp4 is HDR \({name}\).*tonemap"):
        go(source, tmp_path / "out.mp4")


def test_a_turned_video_comes_out_upright_once(tmp_path):
    from tests.flashvsr.test_base_video_io import _turn

    source = make(tmp_path / "in.mp4", scene(4, 3, 32, 64), context={"sample_aspect_ratio": Fraction(4, 3)})
    _turn(source, (0, 1, -1, 0))
    upright = read(source)
    assert upright.shape[1:3] == (64, 32)
    go(source, tmp_path / "out.mp4", crf=1)
    assert probe(tmp_path / "out.mp4").rotation == 0
    assert np.abs(read(tmp_path / "out.mp4").astype(int) - larger(upright)).mean() < 1.5
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.streams.video[0].sample_aspect_ratio == Fraction(3, 4)


def test_ten_bits_and_pixel_formats(tmp_path):
    source = make(tmp_path / "in.mp4", scene(5, 4, 33, 47), codec="ffv1", pix_fmt="bgr0")
    for name, target, want in (
        ("a.mp4", {"ten_bit": True, "codec": "libx265"}, "yuv420p10le"),
        ("b.mov", {"codec": "prores_ks"}, "yuv422p10le"),
        ("c.mkv", {"pix_fmt": "yuv444p"}, "yuv444p"),
    ):
        go(source, tmp_path / name, **target)
        with av.open(str(tmp_path / name)) as file:
            assert file.streams.video[0].codec_context.pix_fmt == want
    for target, sentence in (
        ({"codec": "h265"}, "codec 'h265' is unknown"),
        ({"pix_fmt": "rgb1"}, "takes no pixels of format 'rgb1'"),
        ({"codec": "mpeg4", "ten_bit": True}, "has no 10 bits"),
        ({"codec": "ffv1", "crf": 3}, "no effect on codec ffv1"),
    ):
        with pytest.raises(UserError, match=sentence):
            Target("out.mp4", **target)
    with pytest.raises(UserError, match="--codec has no effect on frames/"):
        Target("frames/", codec="ffv1")


# ---- damage ---------------------------------------------------------------------------------------------


def test_a_truncated_file_is_upscaled_as_far_as_it_goes(tmp_path):
    source = make(tmp_path / "in.mkv", scene(6, 40), sound="aac", options={"g": "10"})
    whole = source.read_bytes()
    source.write_bytes(whole[: len(whole) * 6 // 10])
    done = go(source, tmp_path / "out.mkv")
    (said,) = done.missing
    assert "in.mkv" in said
    frames = read(tmp_path / "out.mkv")
    assert 5 < len(frames) < 40 and done.times.frames == len(frames)


def test_ctrl_c_leaves_what_is_done(tmp_path):
    source = make(tmp_path / "in.mp4", scene(7, 60), sound="aac")
    for out, left in (("out.mp4", "out.partial.mp4"), ("frames", "frames.partial")):
        method = Nearest(fail_at=41, error=KeyboardInterrupt())
        with pytest.raises(Interrupted, match="first [0-9]+ frames are in .*partial"):
            go(source, tmp_path / out, method)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name != "in.mp4") == [left]
        got = read(tmp_path / left)
        assert 8 <= len(got) <= 40
        assert np.abs(got.astype(int) - larger(read(source))[: len(got)]).mean() < 2.5
        if left.endswith(".mp4"):
            (tmp_path / left).unlink()


def test_an_error_leaves_nothing_and_the_old_file(tmp_path):
    source = make(tmp_path / "in.mp4", scene(7, 20))
    (tmp_path / "out.mp4").write_text("old")
    with pytest.raises(RuntimeError):
        go(source, tmp_path / "out.mp4", Nearest(fail_at=9, error=RuntimeError()))
    assert (tmp_path / "out.mp4").read_text() == "old" and len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_one_sentence_and_the_old_file_stays(tmp_path):
    """The system's limit on a file's size stands for the disk's end."""
    pytest.importorskip("resource")
    source = make(tmp_path / "in.mp4", np.random.default_rng(0).integers(0, 256, (30, 64, 96, 3), np.uint8))
    (tmp_path / "out.mp4").write_text("old")
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\n"
        "from flashvsr.base.cli import run\nfrom tests.flashvsr.test_job import go\n"
        "run(lambda argv: go(argv[0], argv[1], crf=1) and None)"
    )
    command = [sys.executable, "-c", code, str(source), str(tmp_path / "out.mp4")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and len(lines) == 1 and "failed (File too large)" in lines[0], done.stderr
    assert (tmp_path / "out.mp4").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_transparency_is_refused_unless_nothing_shows_through(tmp_path):
    from PIL import Image

    pixels = np.full((8, 8, 4), 255, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "opaque.png")
    pixels[2, 2, 3] = 10
    Image.fromarray(pixels).save(tmp_path / "glass.png")
    go(tmp_path / "opaque.png", tmp_path / "out.png")
    assert Image.open(tmp_path / "out.png").size == (16, 16)
    with pytest.raises(UserError, match="glass.png is transparent"):
        go(tmp_path / "glass.png", tmp_path / "out2.png")


def test_frames_of_one_pixel_become_a_video(tmp_path):
    from PIL import Image

    (tmp_path / "in").mkdir()
    for i in range(3):
        Image.fromarray(np.full((1, 1, 3), 80 * i, np.uint8)).save(tmp_path / "in" / f"{i}.png")
    go(tmp_path / "in", tmp_path / "out.mp4")
    got = read(tmp_path / "out.mp4")
    assert got.shape == (3, 2, 2, 3) and np.abs(got[:, 0, 0, 0] - [0, 80, 160]).max() <= 3


def test_raw_frames_from_a_pipe_and_to_one():
    clip = np.random.default_rng(0).integers(0, 256, (11, 6, 10, 3), np.uint8)
    out = io.BytesIO()
    footage = Footage(io.BytesIO(clip.tobytes() + b"half a frame"), raw=(6, 10))
    done = upscale(footage, Nearest(), (12, 20), Target(out))
    assert out.getvalue() == larger(clip).tobytes()
    assert "frame 11: 12 of 180 bytes" in done.missing[0]


class Same:
    """Gives what it gets: real clips have many pixels."""

    def push(self, frames):
        return frames

    def flush(self):
        return np.empty((0, 0, 0, 3), np.uint8)


def damaged_copies(tmp_path, clips, count):
    """Every corrupted copy ends well, incomplete with a sentence, or refused in one; no part is left."""
    there = {p.name for p in tmp_path.iterdir()}
    widths = [probe(clip).width for clip in clips]
    ends = {"whole": 0, "partly": 0, "refused": 0}
    for seed in range(count):
        source = clips[seed % len(clips)]
        broken = tmp_path / f"broken{source.suffix}"
        broken.write_bytes(corrupted(source.read_bytes(), seed))
        out = tmp_path / f"out{('.mp4', '.mkv')[seed // 4 % 2]}"
        try:
            footage = Footage(broken)
            done = upscale(footage, Same(), (footage.height, footage.width), Target(str(out)))
        except UserError as error:
            assert "\n" not in str(error) and not out.exists(), seed
            ends["refused"] += 1
        else:
            assert probe(out).width == widths[seed % len(clips)] and done.times.frames > 0, seed
            ends["partly" if done.missing else "whole"] += 1
            out.unlink()
        broken.unlink()
        assert {p.name for p in tmp_path.iterdir()} == there, seed
    print(ends)
    return ends


@pytest.fixture
def containers(tmp_path):
    return [
        make(tmp_path / "a.mp4", scene(1, 30, 48, 64), sound="aac", options={"g": "8", "bf": "2"}),
        make(
            tmp_path / "b.mkv",
            scene(2, 30, 48, 64),
            sound="aac",
            pts=sorted({7 * k * k % 97 for k in range(30)}),
        ),
        make(tmp_path / "c.ts", scene(3, 30, 48, 64), sound="aac"),
        make(tmp_path / "d.avi", scene(4, 30, 48, 64), codec="mpeg4"),
    ]


def test_corrupted_copies_end_in_a_file_or_a_sentence(tmp_path, containers):
    ends = damaged_copies(tmp_path, containers, 12)
    assert sum(ends.values()) == 12 and ends["whole"] < 12


@pytest.mark.slow
def test_a_hundred_corrupted_copies_end_in_a_file_or_a_sentence(tmp_path, containers):
    ends = damaged_copies(tmp_path, containers, 100)
    assert ends["partly"] >= 10 and ends["refused"] >= 10


@pytest.mark.slow
def test_a_hundred_corrupted_copies_of_real_clips_end_in_a_file_or_a_sentence(tmp_path):
    """The four of `lq/` with the fewest pixels, one of them with sound."""
    clips = [REAL / f"{name}.mp4" for name in ("dove001", "dove005", "mustache", "nasa")]
    if not all(clip.exists() for clip in clips):
        pytest.skip(f"no real clips in {REAL}")
    ends = damaged_copies(tmp_path, clips, 100)
    assert ends["partly"] >= 10 and ends["refused"] >= 10
