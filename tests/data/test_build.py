"""`data build`: what lands in the shards, what is left out, and that it is all or nothing."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from data import __main__ as command
from data.build import build
from data.reader import Reader
from data.shards import read_index
from flashvsr.base.cli import UserError, run
from tests.data.conftest import CLIPS, moving, write_clip


def everything(index):
    return [s for samples in index.splits.values() for s in samples]


def tree(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_index_and_stock_webdataset_agree_with_the_sources(shards, footage):
    import webdataset

    index = read_index(shards)
    assert len(index.splits["train"]) == 3 and len(index.splits["val"]) == 1
    rows = {}
    for split in ("train", "val"):
        for row in webdataset.WebDataset(str(shards / f"{split}-000000.tar"), shardshuffle=False):
            rows[row["__key__"]] = row
    assert rows.keys() == CLIPS.keys()
    for sample in everything(index):
        original = (footage / sample.source).read_bytes()
        assert rows[sample.key]["mkv"] == original
        with open(shards / sample.shard, "rb") as file:
            file.seek(sample.offset)
            assert file.read(sample.size) == original
        frames, height, width = CLIPS[sample.key][1:]
        assert (sample.frames, sample.height, sample.width, sample.fps) == (frames, height, width, 25.0)
        facts = json.loads(rows[sample.key]["json"])
        assert facts["frames"] == frames and facts["sha256"] == hashlib.sha256(original).hexdigest()


def test_reader_gives_the_very_pixels(shards):
    index = read_index(shards)
    reader = Reader(index)
    for sample in everything(index):
        frames = moving(*CLIPS[sample.key])
        assert np.array_equal(reader.frames(sample), frames)
        assert np.array_equal(reader.frames(sample, 2, 3), frames[2:5])
        assert np.array_equal(reader.frames(sample, 1, 2, crop=(8, 4, 32, 40)), frames[1:3, 8:40, 4:44])
    assert reader.frames(sample, 0, 1, size=(32, 48)).shape == (1, 32, 48, 3)


def test_images_and_frame_folders(tmp_path):
    source = tmp_path / "src"
    frames = moving(5, 11, 32, 48)
    (source / "walk").mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(source / "walk" / f"frame-{i}.png")  # 10 comes after 9
    Image.fromarray(frames[0]).save(source / "still.one.png")
    Image.fromarray(frames[5]).save(source / "still two.png")
    index = build([source], tmp_path / "out", val=[source / "still two.png"], quiet=True)
    train = {s.key: s for s in index.splits["train"]}
    assert {k: s.kind for k, s in train.items()} == {"walk": "frames", "still_one": "image"}
    reader = Reader(index)
    assert np.array_equal(reader.frames(train["walk"]), frames)
    assert np.array_equal(reader.frames(train["walk"], 9, 2), frames[9:])
    assert np.array_equal(reader.frames(train["still_one"]), frames[:1])
    # given for training and for validation: held out
    assert [s.key for s in index.splits["val"]] == ["still_two"]
    assert index.skipped == (("still two.png", "has the same bytes as 'still two.png'"),)


def test_unreadable_files_are_left_out_named_and_counted(footage, tmp_path, capsys):
    source = tmp_path / "src"
    shutil.copytree(footage, source)
    (source / "broken.mp4").write_bytes(b"this is no video" * 100)
    (source / "empty.mp4").write_bytes(b"")
    (source / "notes.txt").write_text("not a clip")
    with pytest.raises(SystemExit) as end:
        run(command.main, ["build", str(source), "--out", str(tmp_path / "out"), "--quiet"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "skipped broken.mp4" in out and "skipped empty.mp4" in out and "2 skipped" in out
    assert out.strip().splitlines()[-1] == f"data: {tmp_path / 'out'}"
    assert {s.key for s in everything(read_index(tmp_path / "out"))} == CLIPS.keys()


def fails(argv, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run(command.main, argv)
    assert end.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ")
    return error[0]


def test_what_cannot_be_built_is_said_in_a_sentence_and_leaves_nothing(footage, tmp_path, capsys):
    out = str(tmp_path / "out")
    bad = tmp_path / "bad"
    bad.mkdir()
    assert "no video or image" in fails(["build", str(bad), "--out", out], capsys)
    (bad / "broken.mp4").write_bytes(b"nothing")
    message = fails(["build", str(bad), "--out", out, "--quiet"], capsys)
    assert "none of the 1 clips" in message and "broken.mp4" in message
    assert "does not exist" in fails(["build", str(tmp_path / "nowhere"), "--out", out], capsys)
    assert "give two or more" in fails(["build", str(footage / "ash.mkv"), "--out", out, "--quiet"], capsys)
    assert "drop them" in fails(["build", str(footage), "--seed", "3", "--out", out], capsys)
    assert "--val needs SRC" in fails(["build", "--val", str(footage), "--out", out], capsys)
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("precious")
    assert "thesis.txt" in fails(["build", str(footage), "--out", str(full)], capsys)
    assert (full / "thesis.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "full"]


def test_a_repeated_build_does_nothing_and_a_changed_one_replaces(footage, tmp_path):
    source, out = tmp_path / "src", tmp_path / "out"
    shutil.copytree(footage, source)
    build([source], out, quiet=True)
    first, stamp = tree(out), (out / "index.json").stat().st_mtime_ns
    build([source], out, quiet=True)
    assert (out / "index.json").stat().st_mtime_ns == stamp
    build([source], tmp_path / "other", quiet=True)
    assert tree(tmp_path / "other") == first
    write_clip(source / "oak.mkv", moving(9, 6, 64, 64))
    build([source], out, quiet=True)
    assert {s.key for s in everything(read_index(out))} == CLIPS.keys() | {"oak"}


def test_missing_and_damaged_data_name_the_remedy(shards, tmp_path):
    with pytest.raises(UserError, match="python -m data build"):
        read_index(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    sample = read_index(copy).splits["train"][0]
    with open(copy / sample.shard, "r+b") as file:
        file.seek(sample.offset + sample.size // 2)
        file.write(b"\0\1\2\3")
    with pytest.raises(UserError, match=f"'{sample.key}' in .* is damaged"):
        Reader(read_index(copy)).frames(sample)
    (copy / sample.shard).unlink()
    with pytest.raises(UserError, match="is missing.*python -m data build"):
        read_index(copy)
    (copy / "index.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="not a data index"):
        read_index(copy)
