"""Index, inspect, curate: what is chosen follows from the scores, and the commands do what they say."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data import __main__ as command
from data import curate as curating
from data.build import How, build
from data.curate import Limit, Segment, choose, divide, merged, unique
from data.reader import Reader
from data.shards import Sample, parse_index, read_index
from flashvsr.base.cli import UserError, run
from tests.data.footage import encode, scene

CRISP = {"crf": "10", "g": "24"}


def clip(key="a", frames=100, start=0, fps=25.0, kind="video", offset=512) -> Sample:
    return Sample(key, "train-000000.tar", offset, 9, kind, frames, fps, 72, 128, "0" * 64, key, (), start)


def bars(frames):
    out = frames.copy()
    out[:, :12] = 0
    out[:, -12:] = 0
    return out


def soft(frames):
    return np.stack([np.array(Image.fromarray(f).filter(ImageFilter.GaussianBlur(3))) for f in frames])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Clips with one fault each: two scenes, bars, a slide, a soft one, a smaller copy; plus two images."""
    folder, out = tmp_path_factory.mktemp("curate"), tmp_path_factory.mktemp("curated") / "data"
    good = scene(0, 30)
    encode(folder / "good.mp4", good, options=CRISP)
    encode(folder / "two.mp4", np.concatenate([scene(1, 14), scene(2, 16)]), options=CRISP)
    encode(folder / "bars.mp4", bars(scene(3, 20)), options=CRISP)
    encode(folder / "slide.mp4", np.repeat(scene(4, 1), 20, 0), options=CRISP)
    encode(folder / "soft.mp4", soft(scene(5, 20)), options=CRISP)
    small = np.stack([np.array(Image.fromarray(f).resize((112, 64), Image.Resampling.BICUBIC)) for f in good])
    encode(folder / "small_copy.mkv", small, "mpeg4", options={"qscale": "4"})
    Image.fromarray(scene(6, 1, 96, 96)[0]).save(folder / "photo.png")
    (folder / "val").mkdir()
    encode(folder / "val" / "held.mp4", scene(7, 20), options=CRISP)
    build([folder], out, val=[folder / "val"], how=How(quiet=True, workers=1))
    return out


def ok(argv, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run(command.main, [str(a) for a in argv])
    output = capsys.readouterr()
    assert end.value.code == 0, output.err
    return output.out


def fails(argv, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        run(command.main, [str(a) for a in argv])
    assert end.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_curate_removes_what_has_a_fault_and_says_so(corpus, tmp_path, capsys, monkeypatch):
    out = tmp_path / "chosen.json"
    arguments = ["curate", corpus, "--out", out, "--min-sharpness", "0.1", "--quiet", "--workers", "1"]
    said = ok(arguments, capsys)
    for line in (
        "bars above 0.01: 1 of",
        "change below 0.5: 1 of",
        "sharpness below 0.1: 1 of",
        "duplicate: 1 of",
    ):
        assert line in said
    assert said.strip().splitlines()[-1] == f"data: {out}"
    chosen = read_index(out)
    assert {s.key for s in chosen.splits["train"]} == {"good", "two@0", "two@14", "photo"}
    assert [s.key for s in chosen.splits["val"]] == ["held"]
    page = (tmp_path / "chosen.html").read_text()
    assert "like good@0+30 (train)" in page and page.count("<img") > 8 and "http" not in page.split("svg")[0]
    # the chosen index reads the same shards
    assert Reader(chosen).frames(chosen.splits["train"][0]).shape == (30, 72, 128, 3)
    # scores are there: another limit computes nothing
    monkeypatch.setattr(curating.workers, "Pool", NoPool)
    ok([*arguments, "--duplicate-bits", "-1", "--max-bars", "1"], capsys)
    keys = {s.key for s in read_index(out).splits["train"]}
    assert keys == {"good", "two@0", "two@14", "photo", "small_copy", "bars"}


class NoPool:
    """A pool that must get no work."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, jobs):
        assert list(jobs) == []
        return iter(())


def test_scores_computed_elsewhere_are_joined(corpus, tmp_path, capsys):
    table = tmp_path / "musiq.jsonl"
    rows = [{"id": "good", "musiq": 70}, {"id": "two@14", "musiq": 20.5}, {"id": "two@0+14", "musiq": 65}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "c.json"
    arguments = ["curate", corpus, "--out", out, "--scores", table, "--quiet"]
    said = ok([*arguments, "--min", "musiq=60"], capsys)
    assert "musiq below 60: 1 of" in said
    assert {"good", "two@0"} <= {s.key for s in read_index(out).splits["train"]}
    assert "two@14" not in {s.key for s in read_index(out).splits["train"]}
    assert "no clip has a score 'laion'" in fails([*arguments, "--min", "laion=5"], capsys)
    assert "give NAME=VALUE" in fails([*arguments, "--max", "musiq"], capsys)
    assert "nothing is left of train" in fails([*arguments, "--min-short-side", "9999"], capsys)
    table.write_text("[1]\n")
    assert "line 1 of" in fails([*arguments, "--min", "musiq=60"], capsys)
    table.write_text('{"id": "unknown", "musiq": 1}\n')
    assert "no id in" in fails([*arguments, "--min", "musiq=60"], capsys)


def test_segments_of_eight_seconds():
    assert divide(clip(frames=199)) == [(0, 199)]
    assert divide(clip(frames=400)) == [(0, 200), (200, 200)]
    assert divide(clip(frames=480, start=50)) == [(50, 200), (250, 280)]  # a short rest belongs to the last
    assert divide(clip(frames=520)) == [(0, 200), (200, 200), (400, 120)]
    assert divide(clip(frames=1, kind="image")) == [(0, 1)]


def segment(number, hashes=("0" * 16,), split="train", of=None, **scores):
    of = of or clip(f"c{number}", offset=number * 1000)
    return Segment(of, split, number * 200, 200, {"hashes": list(hashes), **scores})


def test_limits_take_the_first_that_fails_and_pass_what_has_no_value():
    found = [
        segment(i, (f"{i * 0x1111:016x}",), x=x, y=y)
        for i, (x, y) in enumerate([(1, 9), (5, 9), (5, 1), (None, 1)])
    ]
    limits = [Limit("x", 2, True), Limit("y", 3, False)]
    kept, removed, _ = choose(found, limits, -1)
    assert kept == found[2:] and removed["x below 2"] == found[:1] and removed["y above 3"] == found[1:2]


def test_neighbours_that_pass_become_one_clip():
    whole = clip("k", frames=1000)
    parts = [segment(i, of=whole) for i in range(5)]
    assert merged(parts) == {"train": (whole,)}
    splits = merged([parts[0], parts[1], parts[3]])
    assert [(s.key, s.start, s.frames) for s in splits["train"]] == [("k", 0, 400), ("k@600", 600, 200)]
    part = clip("k@1000", frames=400, start=1000)
    later = [Segment(part, "train", start, 200, {}) for start in (1000, 1200)]
    assert merged(later)["train"] == (part,)
    assert [s.key for s in merged(later[1:])["train"]] == ["k@1200"]


def test_duplicates_are_those_a_full_comparison_finds():
    rng = np.random.default_rng(0)
    bases = [int(x) for x in rng.integers(0, 1 << 62, 30)]
    found = []
    for number in range(300):
        value = bases[number % 30]
        for bit in rng.choice(64, int(rng.integers(0, 9)), replace=False):
            value ^= 1 << int(bit)
        found.append(segment(number, (f"{value:016x}",)))
    for bits in (0, 3, 6):
        kept, gone, twins = unique(found, bits)
        slow = []
        for s in found:
            own = int(s.scores["hashes"][0], 16)
            if all((own ^ int(k.scores["hashes"][0], 16)).bit_count() > bits for k in slow):
                slow.append(s)
        assert kept == slow and len(kept) + len(gone) == 300 and twins.keys() == {s.name for s in gone}
    # never the same source; of a held-out clip the training copy goes
    one = clip("one")
    assert len(unique([segment(0, of=one), segment(1, of=one)], 6)[0]) == 2
    kept, gone, _ = unique([segment(0), segment(1, split="val")], 6)
    assert [s.split for s in kept] == ["val"] and [s.split for s in gone] == ["train"]


def test_index_is_made_again_from_the_tars(corpus, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(corpus, copy)
    (copy / "index.json").unlink()
    ok(["index", copy, "--quiet", "--workers", "1"], capsys)
    assert read_index(copy).splits == read_index(corpus).splits
    shard = copy / "train-000000.tar"
    sample = read_index(copy).splits["train"][0]
    data = bytearray(shard.read_bytes())
    data[sample.offset + sample.size // 2] ^= 255
    shard.write_bytes(data)
    assert "is damaged: its hash is not that of its JSON" in ok(["index", copy, "--quiet"], capsys)
    assert sample.key not in {s.key for s in read_index(copy).splits["train"]}
    shard.write_bytes(data[: sample.offset + sample.size // 2])
    assert "cut short" in fails(["index", copy, "--quiet"], capsys)
    shard.write_bytes(b"no tar at all" * 100)
    assert "is no whole tar" in fails(["index", copy, "--quiet"], capsys)
    assert "no .tar in" in fails(["index", tmp_path, "--quiet"], capsys)


def test_index_of_tars_made_elsewhere(tmp_path, capsys):
    """By webdataset's own writer: videos with any JSON, an image, numbered frames, a text, a broken file."""
    from webdataset import TarWriter

    folder = tmp_path / "theirs"
    folder.mkdir()
    frames = np.concatenate([scene(0, 12), scene(1, 15)])
    video = encode(tmp_path / "v.mp4", frames, options=CRISP).read_bytes()
    still = tmp_path / "s.png"
    Image.fromarray(frames[0]).save(still)
    with TarWriter(str(folder / "part-0.tar"), encoder=False) as writer:
        writer.write({"__key__": "film/one", "mp4": video, "json": b'{"caption": "a film"}'})
        writer.write({"__key__": "two", "png": still.read_bytes(), "txt": b"a still"})
        writer.write({"__key__": "three", **{f"{i:03d}.png": still.read_bytes() for i in range(6)}})
        writer.write({"__key__": "four", "mp4": b"no video" * 50})
        writer.write({"__key__": "five", "txt": b"only words"})
    said = ok(["index", folder, "--quiet", "--workers", "1"], capsys)
    assert "skipped part-0.tar:four: " in said
    index = read_index(folder)
    found = {s.key: s for rows in index.splits.values() for s in rows}
    lengths = {key: (s.kind, s.start, s.frames) for key, s in found.items()}
    assert lengths == {
        "film/one@0": ("video", 0, 12), "film/one@12": ("video", 12, 15), "two": ("image", 0, 1),
        "three": ("frames", 0, 6),
    }  # fmt: skip
    assert all(index.splits.values())
    reader = Reader(index)
    assert np.array_equal(reader.frames(found["three"], 2, 2), np.repeat(frames[:1], 2, 0))
    assert np.abs(reader.frames(found["film/one@12"]).astype(int) - frames[12:]).mean() < 3


def test_inspect_shows_clips_and_distributions(corpus, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert ok(["inspect", corpus, "--out", out, "--clips", "3", "--quiet"], capsys) == f"page: {out}\n"
    page = out.read_text()
    assert page.count("data:image/jpeg") == 4 and "train: 3 of 8 clips" in page and "val: 1 of 1" in page
    assert "frames per second" in page and 'src="http' not in page
    assert "at least 1" in fails(["inspect", corpus, "--clips", "0"], capsys)


def test_a_damaged_index_is_a_sentence(corpus):
    raw = json.loads((corpus / "index.json").read_text())
    for damage in (
        lambda r: r.pop("members"), lambda r: r["splits"]["train"].append(["x", 999, 0, 1]),
        lambda r: r["members"][0].update(size="12"), lambda r: r["members"][0].update(colour="red"),
    ):  # fmt: skip
        copy = json.loads(json.dumps(raw))
        damage(copy)
        with pytest.raises(UserError, match="damaged|must be a number"):
            parse_index(copy, corpus, "index.json")
    assert parse_index(raw, corpus, "index.json") == read_index(corpus)
