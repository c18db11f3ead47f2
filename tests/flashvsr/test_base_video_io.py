"""Reading and writing pictures over time, against pixels that are known."""

from __future__ import annotations

import io
import tarfile
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from flashvsr.base import demux
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter, list_clips, probe, read_frames


def _clip(frames: int = 12, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth colour that moves, with the frame's number readable in one corner."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    red = 128 + 100 * np.sin((x + 2 * t) / 11)
    green = 128 + 100 * np.cos((y - t) / 9)
    blue = 60 + 8 * t + 0 * x
    clip = np.stack([red, green, blue], -1).clip(0, 255).astype(np.uint8)
    clip[:, :16, :16] = (10 + 9 * np.arange(frames, dtype=np.uint8))[:, None, None, None]
    return clip


def _read(path, **kwargs) -> np.ndarray:
    return np.stack(list(read_frames(path, **kwargs)))


def _error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def _encode(path, clip, codec="libx264", pix_fmt="yuv420p", options=None, pts=None, rate=25, **context):
    """A file written without VideoWriter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[1:3], pix_fmt
        for key, value in context.items():
            setattr(stream.codec_context, key, value)
        for i, pixels in enumerate(clip):
            kind = "rgb24" if pixels.ndim == 3 else "gray"
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=kind).reformat(
                format=pix_fmt
            )
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "folder/", "folder"])
def test_lossless_gives_back_every_pixel(tmp_path, name):
    clip = np.random.default_rng(0).integers(0, 256, (5, 33, 47, 3), np.uint8)
    target = f"{tmp_path}/{name}"
    with VideoWriter(target, Fraction(30000, 1001), 33, 47, lossless=True) as writer:
        writer.write(clip[:2])
        writer.write(clip[2:])
    assert np.array_equal(_read(target), clip)
    info = probe(target)
    assert (info.height, info.width) == (33, 47) and info.frames in (5, None)
    if name == "a.mp4":
        assert info.fps == Fraction(30000, 1001) and info.frames == 5 and not info.has_audio
        assert info.duration == pytest.approx(5 * 1001 / 30000, abs=0.01)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (47, 63)])
def test_lossy_keeps_colours_and_sizes(tmp_path, height, width):
    clip = _clip(6, height, width)
    with VideoWriter(tmp_path / "a.mp4", 25, height, width) as writer:
        writer.write(clip)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    error = _error(_read(tmp_path / "a.mp4"), clip)
    inner = error[:, 20:, 20:]  # the corner's hard edge suffers from 4:2:0
    assert error.shape == clip.shape and inner.mean() < 2.5 and inner.max() < 24
    flat = np.full((1, height, width, 3), (200, 40, 90), np.uint8)  # the wrong matrix is off by 10 and more
    with VideoWriter(tmp_path / "b.mp4", 25, height, width) as writer:
        writer.write(flat)
    assert _error(_read(tmp_path / "b.mp4"), flat).max() <= 3
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.colorspace, frame.color_range) == (1, 1)
        assert frame.format.name == ("yuv420p" if height % 2 == 0 else "yuv444p")


def test_colour_follows_the_tags(tmp_path):
    # Grey levels of the luma plane, neutral chroma, by the formula: full range as is, limited (y-16)*255/219.
    luma = np.repeat(np.arange(16, 236, 4, dtype=np.uint8), 2)[None, :].repeat(48, 0)[:, :96]
    for color_range, want in ((1, (luma - 16.0) * 255 / 219), (2, luma.astype(float))):
        with av.open(str(tmp_path / "a.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=25)
            stream.height, stream.width, stream.pix_fmt = 48, 96, "yuv420p"
            stream.codec_context.color_range = color_range
            planes = np.concatenate([luma, np.full((24, 96), 128, np.uint8)])
            frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            frame.color_range = color_range
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
        got = _read(tmp_path / "a.mkv")[0]
        assert np.abs(got - want[..., None]).max() <= 1.5


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b.mp4", "libx264", {"g": "10", "bf": "3", "x264-params": "b-pyramid=normal:b-adapt=0"}),
        ("open.mp4", "libx264", {"g": "8", "bf": "3", "x264-params": "open-gop=1:b-adapt=0:scenecut=0"}),
        ("b.mkv", "libx264", {"g": "10", "bf": "3"}),
        ("b.ts", "libx264", {"g": "10", "bf": "3"}),
        ("h.mp4", "libx265", {"g": "10", "x265-params": "log-level=none:keyint=10:open-gop=1"}),
        ("m.avi", "mpeg4", {"g": "10", "bf": "2"}),
        ("v.webm", "libvpx-vp9", {"g": "10", "deadline": "realtime"}),
    ],
)
def test_starting_later_gives_the_same_frames(tmp_path, name, codec, options):
    path = _encode(tmp_path / name, _clip(26, 64, 96), codec, options=options)
    whole = _read(path)
    assert len(whole) == 26
    for start in (1, 5, 8, 9, 10, 11, 17, 20, 25):
        got = _read(path, start=start, count=3, stride=2)
        assert np.array_equal(got, whole[start : start + 6 : 2]), start
    assert list(read_frames(path, start=26)) == [] == list(read_frames(path, count=0))
    assert np.array_equal(_read(path, start=24, count=9), whole[24:])


def test_starting_later_does_not_decode_from_the_beginning(tmp_path):
    path = _encode(tmp_path / "a.mp4", _clip(60, 32, 48), options={"g": "10", "bf": "2"})
    numbers = [k for k, _ in demux.numbered(path, 47, ahead=False)]
    assert numbers == list(range(47, 60))  # from the beginning they would be 0 ... 59


def test_known_keyframes_spare_reading_the_packets(tmp_path, monkeypatch):
    path = _encode(tmp_path / "a.mp4", _clip(60, 32, 48), options={"g": "10", "bf": "2"})
    whole = _read(path)
    keyframes = demux.keyframes_of(demux.frame_times(path))
    assert [number for number, _ in keyframes] == [0, 20, 40]  # every tenth is one, closer ones are left out
    assert [number for number, _ in demux.keyframes_of(demux.frame_times(path), 1)] == [0, 10, 20, 30, 40, 50]
    monkeypatch.setattr(demux, "frame_times", lambda *_: pytest.fail("read the packets"))
    assert [k for k, _ in demux.numbered(path, 47, False, keyframes)] == list(range(47, 60))
    for start in (0, 7, 20, 47, 59):
        assert np.array_equal(
            _read(path, start=start, count=3, keyframes=keyframes), whole[start : start + 3]
        )
    # time stamps of another file: decoded from the beginning, never wrong
    lies = [(number, time + 1) for number, time in keyframes]
    assert np.array_equal(_read(path, start=47, count=3, keyframes=lies), whole[47:50])


def test_variable_rate_neither_repeats_nor_drops(tmp_path):
    clip = _clip(10)
    pts = [0, 1, 2, 10, 11, 30, 31, 33, 90, 91]
    path = _encode(tmp_path / "a.mp4", clip, "libx264rgb", "rgb24", {"qp": "0", "g": "4"}, pts)
    assert np.array_equal(_read(path), clip)
    assert np.array_equal(_read(path, start=6, count=2), clip[6:8])


def test_ten_bits_grey_and_odd_subsampled_input(tmp_path):
    clip = _clip(4)
    ten = _encode(tmp_path / "ten.mp4", clip, "libx264", "yuv420p10le", {"crf": "5"})
    assert _error(_read(ten), clip)[:, 20:, 20:].mean() < 1.5
    grey = _encode(tmp_path / "grey.mkv", clip[..., 0], "ffv1", "gray")
    assert _error(_read(grey), clip[..., :1].repeat(3, -1)).max() <= 1
    odd = _clip(4, 47, 63)
    path = _encode(tmp_path / "odd.mkv", odd, "ffv1", "yuv420p")
    assert _error(_read(path), odd)[:, 20:, 20:].mean() < 1.5


def _turn(path, matrix):
    """Write a display matrix into the mp4's track header (ISO 14496-12: 40 bytes after the box's name)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = matrix
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    data[at : at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("matrix", "quarter_turns"),
    [((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)],  # a point (x, y) goes to (ax+cy, bx+dy)
)
def test_rotation_is_applied(tmp_path, matrix, quarter_turns):
    clip = np.random.default_rng(1).integers(0, 256, (3, 32, 48, 3), np.uint8)
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 25, 32, 48, lossless=True) as writer:
        writer.write(clip)
    _turn(path, matrix)
    upright = np.rot90(clip, quarter_turns, axes=(1, 2))
    assert np.array_equal(_read(path), upright)
    info = probe(path)
    assert (info.height, info.width) == upright.shape[1:3] and info.rotation % 360 == quarter_turns * 90 % 360
    assert _read(path, size=(20, 10)).shape == (3, 20, 10, 3)


def test_resizing_while_decoding_matches_pillow(tmp_path):
    clip = _clip(3, 96, 128)
    clip[:, 40:80, 40:80] = 255 * ((np.arange(40)[:, None] + np.arange(40)) % 2)[None, :, :, None]
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 25, 96, 128, lossless=True) as writer:
        writer.write(clip)
    for size in ((24, 32), (33, 50), (192, 256)):
        want = [Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC) for f in clip]
        error = _error(_read(path, size=size), np.stack([np.asarray(w) for w in want]))
        assert error.mean() < 1.0 and np.percentile(error, 99) <= 12, size
    # A one-pixel checkerboard becomes grey, not a moire.
    assert _error(_read(path, size=(24, 32))[:, 12:18, 12:18], np.array(128)).max() < 8


def test_bytes_and_file_objects(tmp_path):
    clip = _clip(8, 32, 48)
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 25, 32, 48, lossless=True) as writer:
        writer.write(clip)
    data = path.read_bytes()
    assert np.array_equal(_read(data, start=5), clip[5:])
    assert np.array_equal(_read(io.BytesIO(data), start=2, count=2), clip[2:4])
    assert probe(data).frames == 8
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(path, "x.mp4")
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert np.array_equal(_read(tar.extractfile("x.mp4"), start=3), clip[3:])
    png = io.BytesIO()
    Image.fromarray(clip[0]).save(png, "png")
    assert np.array_equal(_read(png.getvalue()), clip[:1])
    png.seek(0)
    assert np.array_equal(_read(png), clip[:1])


def test_images_of_every_kind(tmp_path):
    rgb = _clip(1)[0]
    Image.fromarray(rgb).save(tmp_path / "a.png")
    assert np.array_equal(_read(tmp_path / "a.png")[0], rgb)
    assert list(read_frames(tmp_path / "a.png", start=1)) == []
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    assert np.array_equal(_read(tmp_path / "grey.png")[0], rgb[..., :1].repeat(3, -1))
    Image.fromarray(rgb[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert np.array_equal(_read(tmp_path / "deep.png")[0], rgb[..., :1].repeat(3, -1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(_read(tmp_path / "turned.png")[0], np.rot90(rgb, -1))
    assert _read(tmp_path / "a.png", size=(12, 16)).shape == (1, 12, 16, 3)


def test_a_folder_is_read_in_natural_order(tmp_path):
    clip = _clip(12)
    for i, frame in enumerate(clip):
        Image.fromarray(frame).save(tmp_path / f"im{i}.png")
    assert np.array_equal(_read(tmp_path), clip)
    assert np.array_equal(_read(tmp_path, start=1, count=3, stride=4), clip[[1, 5, 9]])
    Image.fromarray(clip[0, :20]).save(tmp_path / "im12.png")
    with pytest.raises(UserError, match="im12.png is 64x20"):
        _read(tmp_path)


def test_list_clips(tmp_path):
    frame = Image.fromarray(_clip(1)[0])
    for name in ("gt/a/frame-000000.png", "gt/b/frame-000000.png", "gt/b/frame-000001.png", "stills/01.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        frame.save(tmp_path / name)
    frame.resize((10, 10)).save(tmp_path / "stills" / "02.png")
    for name in ("clip10.mp4", "clip2.MOV", "notes.txt", ".hidden.mp4", "._clip2.MOV"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [str(p.relative_to(tmp_path)) for p in list_clips(tmp_path)]
    assert found == ["clip2.MOV", "clip10.mp4", "gt/a", "gt/b", "stills/01.png", "stills/02.png"]
    assert list_clips(tmp_path / "gt" / "b") == [tmp_path / "gt" / "b"]
    assert list_clips(tmp_path / "clip2.MOV") == [tmp_path / "clip2.MOV"]
    with pytest.raises(UserError, match="does not exist"):
        list_clips(tmp_path / "none")


def test_unreadable_input_is_one_sentence_naming_the_file(tmp_path):
    good = _encode(tmp_path / "good.mp4", _clip(4))
    (tmp_path / "cut.mp4").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mkv").write_bytes(b"")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nxxxx")
    (tmp_path / "folder").mkdir()
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    broken = ["cut.mp4", "text.mp4", "empty.mkv", "folder", "sound.mp4", "none.mp4", "broken.png", "none.png"]
    for name in broken:
        actions = [lambda p: list(read_frames(p)), probe]
        if not name.endswith(".png"):
            actions.append(lambda p: list(read_frames(p, start=2)))
        for action in actions:
            with pytest.raises(UserError, match=name) as caught:
                action(tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="a clip of 11 bytes"):
        list(read_frames(b"not a video"))
    with pytest.raises(ValueError, match="stride=0"):
        read_frames(good, stride=0)


def test_writing_is_all_or_nothing(tmp_path):
    clip = _clip(3)
    for name in ("a.mp4", "folder"):
        with pytest.raises(RuntimeError), VideoWriter(tmp_path / name, 25, 48, 64) as writer:
            writer.write(clip)
            raise RuntimeError
        with pytest.raises(RuntimeError), VideoWriter(tmp_path / name, 25, 48, 64):
            raise RuntimeError
        with pytest.raises(UserError, match="no frames"), VideoWriter(tmp_path / name, 25, 48, 64):
            pass
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="not uint8"), VideoWriter(tmp_path / "a.mp4", 25, 48, 64) as writer:
        writer.write(clip[:, :-1])
    for name, wrong in (("a.mp4", {"codec": "nosuch"}), ("a.webm", {"lossless": True})):
        with pytest.raises(UserError, match="libx264 in .mp4 works"):  # noqa: SIM117
            with VideoWriter(tmp_path / name, 25, 48, 64, **wrong) as writer:
                writer.write(clip)
    with pytest.raises(UserError, match="unknown video suffix '.xyz'"):
        VideoWriter(tmp_path / "a.xyz", 25, 48, 64)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_when_it_is_ours(tmp_path):
    clip = _clip(3)
    for frames in (3, 2):
        with VideoWriter(tmp_path / "out", 25, 48, 64) as writer:
            writer.write(clip[:frames])
        assert len(list((tmp_path / "out").iterdir())) == frames
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"), VideoWriter(tmp_path / "out", 25, 48, 64) as writer:
        writer.write(clip)
    assert (tmp_path / "out" / "notes.txt").exists()
