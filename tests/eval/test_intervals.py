"""What chunking costs, measured: seams, PSNR, latency, and the command that prints them."""

import json

import numpy as np
import pytest

from eval.baselines import intervals
from eval.metrics.psnr import psnr_per_frame
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import VideoWriter
from tests.eval.test_chunked import Chunked, clip, pushed, tiny


def test_seams_stand_on_both_sides_of_an_edge():
    assert intervals.seams(10, 4).nonzero()[0].tolist() == [3, 4, 7, 8]
    assert intervals.seams(3, 1).all() and not intervals.seams(9, None).any()
    assert not intervals.seams(5, 5).any() and intervals.seams(6, 5).nonzero()[0].tolist() == [4, 5]


def test_rows_hold_what_a_direct_comparison_gives():
    network, lr = tiny("basicvsr"), clip(9)
    hr = np.random.default_rng(1).integers(0, 256, (9, 36, 40, 3), dtype=np.uint8)
    rows = intervals.measure(
        network, lr, hr, [(4, 0, False), (4, 2, True), (1, 0, False)], fps=10.0, repeats=2
    )
    whole, four, carried, one = rows
    assert (whole["interval"], whole["max_difference"], whole["psnr_change"]["inside"]) == (None, 0, 0)
    assert whole["first_frames"] == 9 and whole["difference"]["seams"] is None
    out = [pushed(Chunked(network, interval=i), lr, None) for i in (None, 4)]
    off = np.abs(out[1].astype(int) - out[0]).mean((1, 2, 3))
    assert four["difference"]["seams"] == pytest.approx(off[[3, 4, 7, 8]].mean())
    assert four["difference"]["inside"] == pytest.approx(off[[0, 1, 2, 5, 6]].mean())
    change = (psnr_per_frame(out[1], hr) - psnr_per_frame(out[0], hr)).numpy()
    assert four["psnr_change"]["seams"] == pytest.approx(change[[3, 4, 7, 8]].mean())
    assert carried["difference"]["seams"] < four["difference"]["seams"] < one["difference"]["seams"]
    assert [row["first_frames"] for row in rows] == [9, 4, 6, 1]
    assert [row["delay_frames"] for row in rows] == [8, 3, 5, 0]
    for row in rows:
        waited = row["delay_frames"] / 10 + row["chunk_seconds"]
        assert row["delay_seconds"] == pytest.approx(waited) and row["steady_ms"] > 0
    lines = intervals.table(rows).splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| whole |") and "–" in lines[2]


def test_the_command(tmp_path, capsys, monkeypatch):
    for name, frames in (("lr", clip(6, 8, 8)), ("hr", clip(6, 32, 32))):
        with VideoWriter(tmp_path / name, 25, *frames.shape[1:3]) as writer:
            writer.write(frames)
    monkeypatch.setattr(intervals, "load_network", lambda *args, **kwargs: tiny("basicvsr"))
    said = [str(tmp_path / "lr"), "--hr", str(tmp_path / "hr"), "--weights", "random", "--intervals", "2-3"]
    intervals.main([*said, "--overlap", "1", "--carry", "--quiet", "--out", str(tmp_path / "t.json")])
    printed = capsys.readouterr().out
    assert "weights random weights" in printed and printed.count("\n") == 2 + 7 + 1
    page = json.loads((tmp_path / "t.json").read_text())
    plain = [(None, 0, False), (2, 0, False), (3, 0, False)]
    more = [(2, 1, False), (3, 1, False), (2, 1, True), (3, 1, True)]
    assert [(r["interval"], r["overlap"], r["carry"]) for r in page["rows"]] == plain + more
    assert page["fps"] == 25 and page["size"] == "8x8" and page["machine"]["cpu"]
    with pytest.raises(UserError, match=r"--hr .*lr has 6 frames of 8x8, to this LR belong 6 of 32x32"):
        intervals.main([str(tmp_path / "lr"), "--hr", str(tmp_path / "lr"), "--weights", "random"])


@pytest.mark.parametrize("text", ["", "0", "5-2", "a-b", "1,,2", "1-2-3", "-3"])
def test_intervals_that_are_none(text):
    with pytest.raises(UserError, match="must be like 1-15 or 1,5,15"):
        intervals.parse_intervals(text)


def test_no_weights():
    with pytest.raises(UserError, match="basicvsr needs weights=FILE"):
        intervals.main(["nowhere"])
