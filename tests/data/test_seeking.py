"""A clip from the middle of a video: the pixels of decoding all, converting whole frames, then cutting."""

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation, VideoReformatter

from flashvsr.base import demux
from flashvsr.base.pixels import ToRGB
from flashvsr.base.video_io import read_frames
from tests.data.conftest import moving

FLAGS = (
    Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
)


def encoded(frames, codec, options, pix_fmt="yuv420p", form="matroska", pts=None, colour=(2, 0)) -> bytes:
    """A video of uint8 `F H W 3`; `pts` in 1/25 s."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = colour
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def slowly(data: bytes, size=None) -> np.ndarray:
    """All frames, decoded from the beginning by one thread, whole, to packed RGB: the plain way."""
    frames = []
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for frame in container.decode(stream):
            height, width = size or (frame.height, frame.width)
            reformatter = VideoReformatter()
            rgb = reformatter.reformat(frame, width, height, "rgb24", interpolation=FLAGS, threads=1)
            frames.append(rgb.to_ndarray())
    return np.stack(frames)


STREAMS = {
    "one keyframe, B frames that others refer to": (
        "libx264",
        {"g": "250", "bf": "4", "b-pyramid": "normal"},
    ),
    "open GOP": ("libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "several references, weighted": ("libx264", {"g": "20", "refs": "6", "bf": "3", "weightp": "2"}),
    "intra refresh, no keyframe but the first": ("libx264", {"g": "15", "x264-params": "intra-refresh=1"}),
    "interlaced": ("libx264", {"g": "20", "bf": "2", "flags": "+ildct+ilme", "x264-params": "tff=1"}),
    "no B frames": ("libx264", {"g": "10", "tune": "zerolatency"}),
    "HEVC with open GOP": (
        "libx265",
        {"g": "12", "x265-params": "open-gop=1:bframes=4:log-level=none", "preset": "ultrafast"},
    ),
    "VP9 with hidden frames": (
        "libvpx-vp9",
        {"g": "16", "auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "8"},
    ),
    "MPEG-4": ("mpeg4", {"g": "12", "bf": "2"}),
    "all keyframes": ("mjpeg", {}),
}


@pytest.mark.parametrize("form", ["matroska", "mp4", "mpegts"])
@pytest.mark.parametrize("name", STREAMS)
def test_any_start_gives_the_frames_of_the_whole(name, form):
    codec, options = STREAMS[name]
    if (codec, form) in {("libvpx-vp9", "mpegts"), ("mjpeg", "mpegts")}:
        pytest.skip("this container does not hold this codec")
    # A refresh is no entry; MPEG-TS is searched by decoding times, which B frames shift past the entry.
    enters = form != "mpegts" or name in ("no B frames", "one keyframe, B frames that others refer to")
    seeks = enters and "refresh" not in name
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = encoded(moving(4, 60, 64, 96), codec, options, pix_fmt, form)
    whole = slowly(data)
    assert len(whole) == 60
    keyframes = demux.keyframes_of(demux.frame_times(io.BytesIO(data)) or (), apart=1)
    begun = next(demux.numbered(io.BytesIO(data), 47, False))[0]
    assert begun == (47 if seeks else 0)  # from the beginning they are counted from 0
    for start, count, stride in ((1, 3, 1), (13, 9, 1), (29, 9, 2), (47, 5, 3), (58, 2, 1)):
        for known in ((), keyframes):
            got = np.stack(list(read_frames(data, start, count, stride, keyframes=known)))
            assert np.array_equal(got, whole[start : start + count * stride : stride])


@pytest.mark.parametrize("form", ["matroska", "mp4"])
def test_a_variable_rate_moves_no_frame(form):
    steps = np.random.default_rng(3).integers(1, 9, 60)
    options = {"g": "14", "bf": "3"}
    data = encoded(moving(5, 60, 64, 64), "libx264", options, form=form, pts=np.cumsum(steps).tolist())
    whole = slowly(data)
    for start in (5, 20, 33, 55):
        assert np.array_equal(np.stack(list(read_frames(data, start, 4))), whole[start : start + 4])


def test_frames_nothing_refers_to_are_not_decoded_on_the_way():
    data = encoded(moving(6, 60, 64, 64), "libx264", {"g": "250", "bf": "3", "b-pyramid": "none"})
    settings = []

    class Spy:
        """A codec context that notes what is skipped."""

        name = "h264"

        def __setattr__(self, name, value):
            settings.append(value)

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        proxy = type("Stream", (), {"codec_context": Spy()})
        packets = [p for p in container.demux(stream)]
        shown = sorted(p.pts for p in packets if p.pts is not None)

    class Container:
        def demux(self, _):
            return iter(packets)

    list(demux._entered(Container(), proxy, shown[0], 40))
    before = [p for p in packets if p.pts is not None and p.pts < shown[40]]
    assert settings.count("NONREF") == len(before) == 40 and settings[-1] == "DEFAULT"


@pytest.mark.parametrize(
    ("pix_fmt", "colour"),
    [
        ("yuv420p", (2, 0)), ("yuv420p", (1, 1)), ("yuv420p", (9, 2)), ("yuv422p", (2, 0)),
        ("yuv444p", (1, 1)), ("yuv411p", (2, 0)), ("yuv410p", (2, 0)), ("yuv420p10le", (9, 1)),
        ("yuva420p", (2, 0)), ("gray", (2, 0)), ("bgr0", (2, 0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(96, 128), (97, 131)])
def test_cutting_before_the_conversion_changes_no_bit(pix_fmt, colour, size):
    rng = np.random.default_rng(1)
    data = encoded(rng.integers(0, 256, (2, *size, 3), np.uint8), "ffv1", {}, pix_fmt, colour=colour)
    whole, small = slowly(data), slowly(data, (64, 80))
    assert np.array_equal(np.stack(list(read_frames(data))), whole)
    for _ in range(8):
        h, w = rng.integers(1, 65, 2).tolist()
        top, left = int(rng.integers(size[0] - h + 1)), int(rng.integers(size[1] - w + 1))
        got = np.stack(list(read_frames(data, crop=(top, left, h, w))))
        assert np.array_equal(got, whole[:, top : top + h, left : left + w])
        got = np.stack(list(read_frames(data, size=(64, 80), crop=(64 - h, 3, h, min(w, 70)))))
        assert np.array_equal(got, small[:, 64 - h : 64, 3 : 3 + min(w, 70)])


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_a_cut_of_a_turned_picture(turns):
    rng = np.random.default_rng(2)
    data = encoded(rng.integers(0, 256, (1, 96, 128, 3), np.uint8), "ffv1", {})
    upright = np.rot90(slowly(data)[0], turns)

    class Turned:
        """A decoded frame with the rotation of a phone's video."""

        def __init__(self, frame):
            self.frame, self.rotation = frame, 90 * turns

        def __getattr__(self, name):
            return getattr(self.frame, name)

    with av.open(io.BytesIO(data)) as container:
        (frame,) = container.decode(video=0)
    for _ in range(10):
        h, w = rng.integers(1, 80, 2).tolist()
        top, left = (int(rng.integers(n - k + 1)) for n, k in zip(upright.shape, (h, w), strict=False))
        convert = ToRGB(crop=(top, left, h, w))
        convert._reformatter = Unwrapping()
        convert._cut = lambda turned, *box, cut=convert._cut: cut(turned.frame, *box)
        assert np.array_equal(convert(Turned(frame)), upright[top : top + h, left : left + w])


class Unwrapping:
    """A reformatter that takes the stand-in above for the frame it wraps."""

    def __init__(self):
        self.real = VideoReformatter()

    def reformat(self, frame, *args, **options):
        return self.real.reformat(getattr(frame, "frame", frame), *args, **options)
