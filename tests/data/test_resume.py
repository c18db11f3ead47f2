"""A build that is killed, or runs out of disk, goes on where it was and ends with the same bytes."""

import errno
import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import build as module
from data import remux
from data.build import How, build
from data.reader import Reader
from data.scan import Options
from data.workers import Pool, full_disk
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import read_frames
from tests.data.footage import encode, scene

SMALL = How(options=Options(member_mb=1, min_frames=2), shard_mb=1, workers=1, quiet=True)


def tree(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def heavy(tmp_path_factory):
    """Four videos that fill several shards of a megabyte, one so large that it is cut into pieces."""
    folder = tmp_path_factory.mktemp("heavy")
    rng = np.random.default_rng(0)
    for i, frames in enumerate((6, 6, 24, 6)):
        noise = rng.integers(0, 256, (frames, 180, 256, 3), np.uint8)
        encode(folder / f"{i}.mp4", noise, options={"g": "6", "qp": "12", "preset": "ultrafast"})
    (folder / "broken.mp4").write_bytes(b"nothing" * 100)
    return folder


@pytest.fixture(scope="module")
def whole(heavy, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "data"
    build([heavy], out, how=SMALL)
    return out


def test_large_videos_are_cut_at_keyframes_with_every_frame_as_it_was(whole, heavy):
    from data.shards import read_index

    index = read_index(whole)
    samples = [s for rows in index.splits.values() for s in rows]
    pieces = sorted((s for s in samples if s.source == "2.mp4"), key=lambda s: s.key)
    assert len(pieces) > 1 and all(s.size < 2 << 20 for s in pieces)
    reader = Reader(index)
    joined = np.concatenate([reader.frames(s) for s in pieces])
    assert np.array_equal(joined, np.stack(list(read_frames(heavy / "2.mp4"))))
    assert len({s.shard for s in samples}) > 2
    held = {s.source for s in index.splits["val"]}
    assert not held & {s.source for s in index.splits["train"]}  # no piece of a held-out video is trained on


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b_frames.mp4", "libx264", {"bf": "2", "qp": "10"}),
        ("b_frames.mkv", "libx264", {"bf": "2", "qp": "10"}),
        (
            "open_groups.mp4",
            "libx265",
            {"x265-params": "keyint=5:open-gop=1:qp=10:log-level=none:pools=none"},
        ),
        ("all_keys.mkv", "ffv1", {}),
    ],
)
def test_pieces_of_other_codecs_and_containers_give_every_frame(tmp_path, name, codec, options):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 90, (24, 64, 96, 3)) + rng.integers(0, 160, (24, 1, 1, 3))
    source = encode(tmp_path / name, noise.astype(np.uint8), codec, options={"g": "5", **options})
    pieces = remux.split(source, tmp_path, "piece", source.stat().st_size // 3, lambda: None)
    assert len(pieces) >= 3
    joined = []
    for first, file in pieces:
        assert first == len(joined)
        joined += list(read_frames(file))
    assert np.array_equal(np.stack(joined), np.stack(list(read_frames(source))))
    again = remux.split(source, tmp_path, "again", source.stat().st_size // 3, lambda: None)
    assert [file.read_bytes() for _, file in again] == [file.read_bytes() for _, file in pieces]


def test_killed_while_reading(heavy, whole, tmp_path, monkeypatch):
    out = tmp_path / "data"
    command = [sys.executable, "-m", "data", "build", str(heavy), "--out", str(out), "--workers", "1"]
    command += ["--member-mb", "1", "--shard-mb", "1", "--min-frames", "2", "--quiet"]
    journal = out / ".building" / "scan.jsonl"
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists()
    done = journal.read_text().count("\n")
    journal.write_text(journal.read_text() + '{"id": "torn')  # as if killed within a line
    asked = []
    run = Pool.run
    monkeypatch.setattr(Pool, "run", lambda self, jobs: run(self, (asked.append(j[0]) or j for j in jobs)))
    build([heavy], out, how=SMALL)
    assert len(asked) == 5 - done
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("at", [1, 2])
def test_killed_while_writing_shards(heavy, whole, tmp_path, monkeypatch, at):
    out, write, written = tmp_path / "data", module.write_shard, []

    def stop(path, members):
        if len(written) == at:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, members)

    monkeypatch.setattr(module, "write_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        build([heavy], out, how=SMALL)
    first = list(written)
    monkeypatch.setattr(
        module, "write_shard", lambda path, members: (written.append(path.name), write(path, members))
    )
    build([heavy], out, how=SMALL)
    assert len(written) == len(set(written)) and len(first) == at  # no shard is written twice
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("at", [0, 2])
def test_killed_while_moving_into_place(heavy, whole, tmp_path, monkeypatch, at):
    """Also over an older build: until the index is there, nobody reads old shards by a new index."""
    out, replace, moved = tmp_path / "data", module.os.replace, []
    build([heavy / "0.mp4", heavy / "1.mp4"], out, how=SMALL)

    def stop(source, target):
        if Path(target).parent == out:
            if len(moved) == at:
                raise KeyboardInterrupt
            moved.append(target)
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        build([heavy], out, how=SMALL)
    assert not (out / "index.json").exists()
    monkeypatch.setattr(module.os, "replace", replace)
    build([heavy], out, how=SMALL)
    assert tree(out) == tree(whole)


def test_a_full_disk_is_a_sentence_and_the_work_stays(heavy, whole, tmp_path, monkeypatch):
    out, write, written = tmp_path / "data", module.write_shard, []

    def full(path, members):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path.name)
        write(path, members)

    monkeypatch.setattr(module, "write_shard", full)
    with pytest.raises(UserError, match="no space left on the disk of .* run the same command again"):
        build([heavy], out, how=SMALL)
    assert (out / ".building" / written[0]).exists()
    monkeypatch.setattr(module, "write_shard", write)
    build([heavy], out, how=SMALL)
    assert tree(out) == tree(whole)


def test_a_full_disk_in_a_worker_stops_the_build_and_skips_no_file(heavy, tmp_path, monkeypatch):
    def run(self, jobs):
        next(iter(jobs))
        raise UserError("writing failed") from OSError(errno.ENOSPC, "No space left on device")
        yield

    monkeypatch.setattr(Pool, "run", run)
    with pytest.raises(UserError, match="no space left"):
        build([heavy], tmp_path / "data", how=SMALL)
    assert (tmp_path / "data" / ".building").exists()
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise UserError("writing libx264 failed") from error
    except UserError as error:
        assert full_disk(error)
    assert not full_disk(UserError("x")) and not full_disk(OSError(errno.EACCES, "no"))


def test_two_builds_at_once_and_other_options(heavy, whole, tmp_path):
    import fcntl

    out = tmp_path / "data"
    (out / ".building").mkdir(parents=True)
    with open(out / ".building" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build is writing"):
            build([heavy], out, how=SMALL)
    (out / ".building" / "request").write_text("of another call")
    (out / ".building" / "train-000000.tar").write_bytes(b"of another call")
    build([heavy], out, how=SMALL)  # what another call left is not used
    assert tree(out) == tree(whole)
    stamp = (out / "index.json").stat().st_mtime_ns
    build([heavy], out, how=SMALL)
    assert (out / "index.json").stat().st_mtime_ns == stamp
    build([heavy], out, how=How(options=Options(), workers=1, quiet=True))
    assert tree(out) != tree(whole)


def test_reencoded_clips_are_members_of_their_own(tmp_path):
    frames = np.concatenate([scene(0, 12), scene(1, 15)])
    for name in ("a", "b"):
        encode(tmp_path / f"{name}.mkv", frames if name == "a" else scene(2, 9), "ffv1", "bgr0")
    how = How(options=Options(codec="libx264", crf=5.0), workers=1, quiet=True)
    index = build([tmp_path / "a.mkv"], tmp_path / "out", val=[tmp_path / "b.mkv"], how=how)
    clips = index.splits["train"]
    assert [(s.key, s.start, s.frames) for s in clips] == [("a-0000", 0, 12), ("a-0001", 0, 15)]
    reader = Reader(index)
    for clip, original in zip(clips, (frames[:12], frames[12:]), strict=True):
        assert np.abs(reader.frames(clip).astype(int) - original).mean() < 2
    other = build([tmp_path / "a.mkv"], tmp_path / "again", val=[tmp_path / "b.mkv"], how=how)
    assert other.splits == index.splits and tree(tmp_path / "out") == tree(tmp_path / "again")
