"""Files as they are found: odd, damaged, not what their name says. None stops a build."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from PIL import Image

from data import workers
from data.build import How, build
from data.reader import Reader
from data.scan import Options
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import read_frames
from tests.data.footage import corrupted, encode, scene

QUIET = How(quiet=True, workers=1)


def everything(index):
    return {s.key: s for samples in index.splits.values() for s in samples}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder with one file of each kind, and what was built from it."""
    folder = tmp_path_factory.mktemp("odd")
    clip = scene(0, 12)
    encode(folder / "plain.mp4", clip)
    encode(folder / "variable.mp4", clip, pts=[0, 1, 2, 10, 11, 30, 31, 33, 90, 91, 92, 99])
    encode(folder / "odd_sizes.mkv", scene(1, 12, 47, 63), "ffv1", "yuv420p")
    encode(folder / "ten_bits.mp4", scene(2, 12), pix_fmt="yuv420p10le")
    alpha = np.concatenate([scene(3, 12), np.full((12, 72, 128, 1), 128, np.uint8)], -1)
    encode(folder / "alpha.mov", alpha, "qtrle", "argb")
    encode(folder / "grey.mkv", scene(4, 12)[..., 0], "ffv1", "gray")
    rotated(folder / "rotated.mp4", scene(5, 12))
    encode(folder / "one_frame.mp4", scene(6, 1))
    headless(folder / "no_frame.mp4")
    sound(folder / "sound.mp4")
    (folder / "text.mp4").write_text("not a video\n" * 100)
    (folder / "empty.mkv").write_bytes(b"")
    Image.fromarray(scene(7, 1)[0]).save(folder / "still.png")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "deep").mkdir()
    (folder / "deep" / "back").symlink_to(folder, target_is_directory=True)
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    return folder, build([folder], tmp_path_factory.mktemp("odd_out"), how=QUIET)


def rotated(path, clip):
    """The clip with a display matrix that turns it upright by 90 degrees, as telephones write it."""
    encode(path, clip)
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # version 0: the matrix stands 40 bytes into the box
    matrix = np.array([0, 1 << 16, 0, -(1 << 16) & 0xFFFFFFFF, 0, 0, 0, 0, 1 << 30], ">u4").tobytes()
    assert data[at : at + 4] == (1 << 16).to_bytes(4, "big")
    path.write_bytes(data[:at] + matrix + data[at + 36 :])


def headless(path):
    """A video whose packets are all gone: the sample table speaks of frames that are zeros."""
    encode(path, scene(6, 8))
    data = bytearray(path.read_bytes())
    begin = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)


def sound(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_what_can_be_decoded_is_taken_with_its_true_size(odd):
    folder, index = odd
    found = everything(index)
    sizes = {key: (s.frames, s.height, s.width) for key, s in found.items()}
    usual = (12, 72, 128)
    assert sizes == {
        "plain": usual, "variable": usual, "odd_sizes": (12, 47, 63), "ten_bits": usual, "alpha": usual,
        "grey": usual, "rotated": (12, 128, 72), "still": (1, 72, 128),
    }  # fmt: skip
    reader = Reader(index)
    for sample in found.values():
        whole = np.stack(list(read_frames(folder / sample.source)))
        assert np.array_equal(reader.frames(sample), whole)
        if sample.kind == "video":
            assert np.array_equal(reader.frames(sample, 7, 3), whole[7:10])


def test_what_cannot_be_used_is_named_with_its_reason(odd):
    reasons = dict(odd[1].skipped)
    assert reasons.keys() == {"one_frame.mp4", "no_frame.mp4", "sound.mp4", "text.mp4", "empty.mkv"}
    assert reasons["one_frame.mp4"] == "has 1 frame(s); a clip needs 5"
    assert "no video stream" in reasons["sound.mp4"]
    assert "cannot be read as a video" in reasons["text.mp4"]


def test_links_in_circles_are_followed_once(odd):
    folder, index = odd
    # every file once, although `loop` and `deep/back` lead back to the folder
    assert len(everything(index)) + len(index.skipped) == 13


def test_unreadable_folders_are_skipped(tmp_path, monkeypatch):
    from pathlib import Path

    encode(tmp_path / "src" / "a.mp4" if (tmp_path / "src").mkdir() is None else None, scene(0, 8))
    encode(tmp_path / "src" / "b.mp4", scene(1, 8))
    (tmp_path / "src" / "locked").mkdir()
    listing = Path.iterdir

    def iterdir(self):
        if self.name == "locked":
            raise PermissionError(13, "Permission denied", str(self))
        return listing(self)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    index = build([tmp_path / "src"], tmp_path / "out", how=QUIET)
    assert index.skipped == (("locked", "the folder cannot be read (Permission denied)"),)
    assert everything(index).keys() == {"a", "b"}


def test_lists_and_patterns(tmp_path):
    for i, name in enumerate(("a", "b", "c")):
        encode(tmp_path / f"{name}.mp4", scene(i, 8))
    Image.fromarray(scene(9, 1)[0]).save(tmp_path / "d.png")
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "list.txt").write_text("a.mp4\n\nmissing.mp4\nnotes.md\n*.png\n")
    index = build([tmp_path / "list.txt", str(tmp_path / "[bc].mp4")], tmp_path / "out", how=QUIET)
    assert everything(index).keys() == {"a", "b", "c", "d"}
    reasons = dict(index.skipped)
    assert reasons.keys() == {"missing.mp4", "notes.md"}
    assert (
        reasons["missing.mp4"].startswith("line 3 of list.txt: ")
        and "does not exist" in reasons["missing.mp4"]
    )
    assert "neither a video nor an image" in reasons["notes.md"]
    for source, message in (
        ("*.avi", "no file fits"),
        ("notes.md", "neither a video"),
        ("no.txt", "not exist"),
    ):
        with pytest.raises(UserError, match=message):
            build([str(tmp_path / source)], tmp_path / "other", how=QUIET)
    (tmp_path / "bad.txt").write_text("nothing.mp4\n")
    with pytest.raises(UserError, match="names no clip that is there"):
        build([str(tmp_path / "bad.txt")], tmp_path / "other", how=QUIET)
    assert not (tmp_path / "other").exists()


def test_a_video_that_changes_its_size_is_refused(tmp_path):
    """Two H.264 streams one after the other, as a broadcast recording may hold."""
    for i, size in enumerate(((72, 128), (64, 64))):
        encode(tmp_path / f"{i}.h264", scene(i, 8, *size))
    joined = (tmp_path / "0.h264").read_bytes() + (tmp_path / "1.h264").read_bytes()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "both.ts").write_bytes(joined)
    encode(tmp_path / "src" / "a.mp4", scene(2, 8))
    encode(tmp_path / "src" / "b.mp4", scene(3, 8))
    index = build([tmp_path / "src"], tmp_path / "out", how=QUIET)
    assert dict(index.skipped) == {"both.ts": "changes from 128x72 to 64x64 at frame 8"}


def damaged_copies(folder, originals, copies):
    folder.mkdir()
    for number in range(copies):
        original = originals[number % len(originals)]
        data = corrupted(original.read_bytes(), number)
        (folder / f"{number:03d}-{original.name}").write_bytes(data)


def check_damaged(folder, originals, out, copies):
    """Builds from damaged copies and whole files: all whole ones are in, every copy is in or has a reason,
    and what is in gives its frames."""
    index = build([folder, *originals], out, how=How(quiet=True, workers=1, silence=20.0))
    found = everything(index)
    named = {s.source for s in found.values()} | {name for name, _ in index.skipped}
    assert len(named) == copies + len(originals)
    assert {o.name for o in originals} <= {s.source for s in found.values()}
    assert all(reason for _, reason in index.skipped)
    reader = Reader(index)
    for sample in found.values():
        for start in {0, sample.frames // 2, sample.frames - 1}:
            assert reader.frames(sample, start, 1).shape == (1, sample.height, sample.width, 3)
    return index


def test_damaged_copies_neither_hang_nor_crash(tmp_path):
    kinds = (
        ("a.mp4", "libx264", {"g": "6"}),
        ("b.mkv", "mpeg4", {}),
        ("c.webm", "libvpx-vp9", {"cpu-used": "8"}),
    )
    originals = [
        encode(tmp_path / name, scene(i, 10), codec, options=options)
        for i, (name, codec, options) in enumerate(kinds)
    ]
    damaged_copies(tmp_path / "copies", originals, 20)
    index = check_damaged(tmp_path / "copies", originals, tmp_path / "out", 20)
    assert len(index.skipped) >= 5


@pytest.mark.slow
def test_two_hundred_damaged_copies_of_real_clips(tmp_path):
    from pathlib import Path

    footage = Path(__file__).parents[3] / "shared" / "data"
    if not footage.is_dir():
        pytest.skip("no real footage beside the repository")
    clips = sorted(p for p in footage.glob("*/*.mp4") if p.stat().st_size < 1 << 20)
    damaged_copies(tmp_path / "copies", clips, 200)
    check_damaged(tmp_path / "copies", clips, tmp_path / "out", 200)


def interfere(pool, what, after=0.2):
    """Sends a signal to the pool's first process once it is at work."""

    def act():
        while not pool._all or not pool._all[0].awake:
            time.sleep(0.01)
        time.sleep(after)
        os.kill(pool._all[0].process.pid, what)

    thread = threading.Thread(target=act)
    thread.start()
    return thread


@pytest.mark.parametrize(
    ("what", "reason"),
    [(signal.SIGSTOP, "gave no frame for 2 seconds"), (signal.SIGKILL, "crash (signal 9)")],
)
def test_a_process_that_hangs_or_dies_costs_one_file(tmp_path, what, reason):
    encode(tmp_path / "a.mp4", scene(0, 8))
    long = encode(tmp_path / "long.mkv", np.repeat(scene(1, 2), 2000, 0), "mpeg4", options={"b": "100k"})
    options = vars(Options())
    jobs = [
        (name, {"do": "scan", "path": str(path), "folder": str(tmp_path), "stem": "0", "options": options})
        for name, path in (("long", long), ("a", tmp_path / "a.mp4"))
    ]
    with workers.Pool(1, silence=2.0 if what == signal.SIGSTOP else 30.0) as pool:
        thread = interfere(pool, what)
        answers = dict(pool.run(iter(jobs)))
        thread.join()
    assert reason in answers["long"]["failed"]
    assert answers["a"]["result"]["members"][0]["frames"] == 8
