"""Damaged clips: replaced by the same others everywhere, named, counted; never a crash, never a hang."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from data import reader as reading
from data.build import build
from data.clips import Clips
from data.loader import DataConfig, batches, in_order, open_dataset
from data.reader import Damaged, Reader
from data.shards import read_index
from flashvsr.base.cli import UserError
from tests.data.conftest import moving, write_clip

pytestmark = pytest.mark.usefixtures("quick")
FOOTAGE = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Eight clips, and the same index over shards in which two clips have a changed byte."""
    folder = tmp_path_factory.mktemp("damage")
    for i in range(9):
        write_clip(folder / "src" / f"clip{i}.mkv", moving(i, 12, 48, 48)) if i else (folder / "src").mkdir()
    build([folder / "src"], folder / "good", quiet=True)
    index = read_index(folder / "good")
    (folder / "bad").mkdir()
    for file in (folder / "good").iterdir():
        (folder / "bad" / file.name).write_bytes(file.read_bytes())
    bad = [s for s in index.splits["train"]][2:4]
    for sample in bad:
        flip(folder / "bad" / sample.shard, sample.offset + sample.size // 2)
    return folder, {s.key for s in bad}


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x55]))


def config(folder, **change):
    return replace(
        DataConfig(shards=str(folder), latents_per_clip=2, height=32, width=32, flip=False), **change
    )


def equal(a, b):
    return all(torch.equal(x[k], y[k]) for x, y in zip(a["segments"], b["segments"], strict=True) for k in x)


def test_a_damaged_clip_is_replaced_named_and_counted(corpus, capsys):
    folder, bad = corpus
    whole, hurt = (open_dataset(config(folder / name), 4) for name in ("good", "bad"))
    clips = len(whole.videos)
    for batch, counter in zip(islice(batches(hurt, 0, 1, 0, 1, 0), 2 * clips), range(2 * clips), strict=True):
        expected, got = whole.sample(counter), hurt.sample(counter)
        assert equal({"segments": [{k: v[0] for k, v in s.items()} for s in batch["segments"]]}, got)
        assert batch["damaged"] == got["damaged"] and not expected["damaged"]
        assert equal(expected, got) == (not got["damaged"])
    # Once per epoch each of the two is somebody's turn; a substitute may be the other.
    named = [open_dataset(config(folder / "bad"), 4).sample(c)["damaged"] for c in range(clips)]
    assert sum(bool(names) for names in named) == len(bad)
    assert {key for names in named for name in names for key in bad if f"'{key}'" in name} == bad
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    assert len(lines) == 2 and all("another clip stands in its place" in line for line in lines)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (1, 2)])
def test_substitutes_are_the_same_for_any_ranks_workers_and_after_resuming(corpus, world, workers):
    folder, _ = corpus
    expected = [open_dataset(config(folder / "bad"), 4).sample(c) for c in range(12)]
    assert any(sample["damaged"] for sample in expected)
    for start in (0, 5):
        streams = [
            batches(open_dataset(config(folder / "bad"), 4), start, 1, r, world, workers)
            for r in range(world)
        ]
        for counter in range(start, 12):
            batch = next(streams[(counter - start) % world])
            assert batch["counters"].tolist() == [counter]
            assert batch["damaged"] == expected[counter]["damaged"]
            assert torch.equal(batch["segments"][0]["hr"][0], expected[counter]["segments"][0]["hr"])
            assert torch.equal(batch["segments"][0]["lr"][0], expected[counter]["segments"][0]["lr"])


def test_when_everything_is_damaged_it_says_so(corpus, tmp_path):
    folder, _ = corpus
    index = read_index(folder / "good")
    for shard in {s.shard for rows in index.splits.values() for s in rows}:
        tar = bytearray((folder / "good" / shard).read_bytes())
        (tmp_path / shard).write_bytes(tar[::-1])  # as large, but another tar
    (tmp_path / "index.json").write_bytes((folder / "good" / "index.json").read_bytes())
    clips = open_dataset(config(tmp_path), 0)
    with pytest.raises(
        UserError, match=r"all \d clips tried in .* damaged .*index of other shards\?"
    ) as error:
        clips.sample(0)
    assert "\n" not in str(error.value)


def test_a_shard_cut_short_is_said_before_training(corpus, tmp_path):
    folder, _ = corpus
    for file in (folder / "good").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / read_index(folder / "good").splits["train"][0].shard
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match=f"{shard.name}' has 5000 bytes, its index speaks of .*copy"):
        open_dataset(config(tmp_path), 0)
    # cut while training: those clips are damaged, the rest go on
    (tmp_path / shard.name).write_bytes((folder / "good" / shard.name).read_bytes())
    clips = open_dataset(config(tmp_path), 0)
    shard.write_bytes(shard.read_bytes()[: clips.videos[3].offset])
    samples = [clips.sample(c) for c in range(len(clips.videos))]
    assert sum(bool(s["damaged"]) for s in samples) == len(clips.videos) - 3


def test_reading_in_circles_ends(corpus, monkeypatch):
    folder, _ = corpus
    index = read_index(folder / "good")
    monkeypatch.setattr(reading, "AT_LEAST", 1 << 20)

    def circles(file, *_, **__):
        while True:
            file.seek(0)
            file.read(4096)
            yield from ()

    monkeypatch.setattr(reading, "read_frames", circles)
    with pytest.raises(Damaged, match="again and again"):
        Reader(index).frames(index.splits["train"][0])


def assaulted(data: bytes, rng) -> bytes:
    """One of several kinds of damage."""
    data = bytearray(data)
    kind = int(rng.integers(5))
    at = int(rng.integers(len(data)))
    if kind == 0:
        return bytes(data[:at])
    if kind == 1:
        for place in rng.integers(0, len(data), 20):
            data[place] ^= int(rng.integers(1, 256))
    elif kind == 2:
        data[at : at + 500] = bytes(len(data[at : at + 500]))
    elif kind == 3:
        data[:64] = rng.integers(0, 256, 64, np.uint8).tobytes()
    else:
        del data[at : at + 300]
    return bytes(data)


def survives(sources: list[Path], folder: Path, copies: int) -> int:
    """Reads clips that were damaged before anything was hashed; returns how many cannot be decoded."""
    rng, rows = np.random.default_rng(0), []
    index = read_index(build(sources, folder / "built", quiet=True).folder)
    good = [s for rows in index.splits.values() for s in rows]
    folder.joinpath("hurt").mkdir()
    with tarfile.open(folder / "hurt" / "train-000000.tar", "w") as tar:
        for i in range(copies):
            sample = good[i % len(good)]
            with open(folder / "built" / sample.shard, "rb") as file:
                file.seek(sample.offset)
                data = assaulted(file.read(sample.size), rng)
            info = tarfile.TarInfo(f"c{i}.mp4")
            info.size = len(data)
            rows.append((replace(sample, key=f"c{i}", shard="train-000000.tar", size=len(data),
                                 sha256=hashlib.sha256(data).hexdigest()), info.name))  # fmt: skip
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(folder / "hurt" / "train-000000.tar") as tar:
        places = {m.name: m.offset_data for m in tar}
    hurt = tuple(replace(sample, offset=places[name]) for sample, name in rows)
    reader = Reader(replace(index, folder=folder / "hurt", splits={"train": hurt}))
    replaced = 0
    for sample in hurt:
        begin = time.monotonic()
        try:
            reader.frames(sample, 0, min(9, sample.frames), crop=(0, 0, 32, 32))
        except Damaged as error:
            assert f"'{sample.key}'" in str(error) and "\n" not in str(error)
            replaced += 1
        assert time.monotonic() - begin < 20
    return replaced


def test_randomly_damaged_clips_neither_hang_nor_crash(footage, tmp_path):
    assert survives([footage], tmp_path, 24) >= 6


@pytest.mark.slow
@pytest.mark.skipif(not FOOTAGE.is_dir(), reason="no real footage in ../shared/data")
def test_two_hundred_damaged_copies_of_real_clips(tmp_path):
    sources = [FOOTAGE / "train" / f"{n}.mp4" for n in ("bigbuckbunny", "cogvideo0", "fastgen02", "dover_hy")]
    assert survives(sources, tmp_path, 200) >= 40


def test_a_killed_worker_ends_in_one_sentence(corpus):
    """In a process of its own: torch keeps state about workers that died."""
    folder, _ = corpus
    code = f"""
import os, signal, sys
from data.loader import DataConfig, batches, open_dataset
from flashvsr.base.cli import run
def main(argv):
    config = DataConfig(shards={str(folder / "good")!r}, latents_per_clip=2, height=32, width=32)
    stream = batches(open_dataset(config, 0), 0, 1, 0, 1, 1)
    for _ in range(3):
        next(stream)
    import multiprocessing
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)  # a scheduler signals every process of a job: the run decides
    for _ in range(4):
        next(stream)
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(9):
        next(stream)
run(main, [])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100,
        cwd=Path(__file__).resolve().parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 2 and line.startswith("error: DataLoader worker") and "data.workers" in line


def test_a_damaged_picture_among_the_images(tmp_path):
    from PIL import Image

    (tmp_path / "src").mkdir()
    write_clip(tmp_path / "src" / "v.mkv", moving(1, 12, 48, 48))
    for i in range(4):
        Image.fromarray(moving(i + 5, 1, 48, 48)[0]).save(tmp_path / "src" / f"still-{'abcd'[i]}.png")
    write_clip(tmp_path / "held.mkv", moving(9, 12, 48, 48))
    index = build([tmp_path / "src"], tmp_path / "out", val=[tmp_path / "held.mkv"], quiet=True)
    still = next(s for s in index.splits["train"] if s.kind == "image")
    flip(tmp_path / "out" / still.shard, still.offset + 5)
    clips = Clips(config(tmp_path / "out", images=2), Reader(index), 0)
    reasons = [reason for c in range(2) for reason in clips.sample(c)["damaged"]]
    assert len(reasons) == 1 and f"'{still.key}'" in reasons[0]  # four images, two per sample: each once
    assert list(in_order(clips, [[0]], 0))[0][0]["segments"][2]["hr"].shape == (3, 1, 32, 32)
