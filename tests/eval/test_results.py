"""Means, intervals, ranks and tables say what went in."""

import json
import math

import numpy as np
import pytest

from eval.published import NAMES, published, published_table
from eval.results import interval, mean_of, ranks, read_evaluation, show, table, write_results
from eval.runner import Score
from flashvsr.base.cli import UserError


def score(method, clip, frames, psnr, seconds, **changes):
    fields = {
        "method": method,
        "dataset": "set",
        "clip": clip,
        "frames": frames,
        "height": 96,
        "width": 128,
        "align": "refuse",
        "note": "",
        "values": {"psnr": psnr},
        "per_frame": {"psnr": [psnr] * frames},
        "reasons": {},
        "seconds_per_frame": seconds,
        "first_output_seconds": seconds,
        "cached": False,
        "timed_on": None,
        "output": "nowhere",
    }
    return Score(**{**fields, **changes})


def test_means_count_clips_once_and_frames_for_time():
    scores = [
        score("ours", "a", 5, 24.0, 0.1),
        score("ours", "b", 11, 26.0, 0.3),
        score("x", "a", 5, 9.0, 9.0),
    ]
    mean = mean_of(scores, "ours", "set")
    assert (mean["values"]["psnr"]["mean"], mean["clips"], mean["frames"]) == (25.0, 2, 16)
    assert mean["seconds_per_frame"] == pytest.approx((5 * 0.1 + 11 * 0.3) / 16)
    undefined = mean_of([scores[0], score("ours", "b", 11, None, None)], "ours", "set")
    assert undefined["values"]["psnr"]["clips"] == 1 and undefined["seconds_per_frame"] is None


def test_the_interval_is_the_percentile_bootstrap():
    """Beside scipy-free resampling one by one, and the normal approximation for many clips."""
    values = list(np.random.default_rng(1).normal(30, 2, 40))
    found = interval(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    half = 1.96 * np.std(values) / math.sqrt(len(values))
    assert found["low"] == pytest.approx(np.mean(values) - half, abs=0.1)
    assert found["high"] == pytest.approx(np.mean(values) + half, abs=0.1)
    assert interval(values) == found  # seeded
    assert interval([1.0, 2.0])["low"] == 1.0 and interval([1.0, 2.0])["high"] == 2.0


def test_one_clip_and_infinite_values_have_no_interval():
    assert interval([3.0]) == {"mean": 3.0, "low": None, "high": None}
    assert interval([3.0, math.inf]) == {"mean": math.inf, "low": None, "high": None}
    assert interval([])["mean"] is None


def test_ranks_follow_the_direction_and_ties_share_a_place():
    assert ranks([1.0, 3.0, 2.0, 3.0, None], higher=True) == [None, 1, 2, 1, None]
    assert ranks([1.0, 3.0, 2.0], higher=False) == [1, None, 2]
    assert ranks([1.0, 3.0], higher=None) == [None, None]
    assert ranks([1.0, None], higher=True) == [None, None]


def test_numbers_as_tables_print_them():
    assert (show(None, 2), show(math.inf, 2), show(1.005, 4)) == ("–", "∞", "1.0050")


@pytest.fixture
def evaluation():
    scores = [score("a", "x", 5, 25.0, 0.1), score("b", "x", 5, 24.0, 0.2, cached=True)]
    scores += [score("a", "y", 5, math.inf, 0.1), score("b", "y", 5, 26.0, 0.2, cached=True)]
    return {
        "format": 2,
        "run": "made up",
        "protocol": {
            "frames": None,
            "border_crop": 0,
            "align": "refuse",
            "pixels": "8-bit",
            "time": "wall time",
            "intervals": "intervals",
            "device": "cpu",
            "dtype": "float32",
            "workers": 1,
        },
        "datasets": [
            {
                "name": "set",
                "layout": "LQ in LQ",
                "scale": 4,
                "lq_preset": None,
                "lq_seed": None,
                "has_gt": True,
                "clips": [
                    {"name": n, "frames": 5, "height": 96, "width": 128, "note": None} for n in ("x", "y")
                ],
            }
        ],
        "methods": [{"name": n, "spec": n, "in_use": {}} for n in "ab"],
        "metrics": [{"key": "psnr", "title": "PSNR", "higher": True, "digits": 2, "description": "dB"}],
        "means": [mean_of(scores, n, "set") for n in "ab"],
        "scores": [vars(s) for s in scores],
        "published": published("REDS4"),
    }


def test_tables_mark_best_second_and_old_times(evaluation):
    heads, rows = table(evaluation, "set")
    assert heads == ["PSNR ↑", "s/frame ↓", "first output, s ↓"]
    assert rows[0] == ("a", [("∞", 1), ("0.1000", 1), ("0.100", 1)])
    assert rows[1] == ("b", [("25.00 (24.00 to 26.00)", 2), ("0.2000*", 2), ("0.200*", 2)])
    assert table(evaluation, "set", "x")[1][0] == ("a", [("25.00", 1), ("0.1000", 1), ("0.100", 1)])


def test_files_hold_the_numbers_and_infinity_survives_json(evaluation, tmp_path):
    write_results(tmp_path, evaluation)
    assert json.loads((tmp_path / "eval.json").read_text())["means"][0]["values"]["psnr"]["mean"] == "inf"
    assert read_evaluation(tmp_path / "eval.json") == evaluation
    markdown = (tmp_path / "results.md").read_text()
    assert "| a | **∞** | **0.1000** |" in markdown
    assert "| b | <u>25.00 (24.00 to 26.00)</u> | <u>0.2000*</u> |" in markdown
    assert markdown.count("Scored: all frames, border crop 0; counts and sizes must agree; 8-bit.") == 1
    assert "other inputs" in markdown and "| BasicVSR | 31.4170 | 0.8909 |" in markdown
    rows = (tmp_path / "results.csv").read_text().splitlines()
    assert rows[0].startswith("dataset,method,clip,frames,psnr,seconds_per_frame") and len(rows) == 7
    assert rows[2].startswith("set,b,mean,10,25.0,0.2,0.2,True,24.0,26.0")


def test_an_older_format_is_refused(tmp_path):
    (tmp_path / "eval.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="no eval.json of format 2"):
        read_evaluation(tmp_path / "eval.json")


@pytest.mark.parametrize("dataset", NAMES)
def test_every_published_block_is_complete(dataset):
    for block in published(dataset):
        heads, rows = published_table(block)
        assert len(rows) >= 2 and all(len(cells) == len(heads) for _, cells in rows)
        assert "not comparable" in block["warning"]


def test_published_numbers_are_the_papers():
    """Spot checks: first and last of a row, read from the papers' tables."""
    flashvsr, seedvr2, dove = published("SPMCS")
    assert flashvsr["rows"][-1]["method"] == "FlashVSR-Tiny"
    assert flashvsr["rows"][-1]["values"]["musiq"] == 69.77
    assert seedvr2["rows"][0]["values"]["dists"] == 0.186
    assert dove["rows"][-1]["values"]["ewarp"] == 1.04
    with pytest.raises(UserError, match="no published numbers of 'Vid4'"):
        published("Vid4")
