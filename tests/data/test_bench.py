"""`data bench` and `data presets`: they run, and their rows hold what they promise."""

import json
import math
from pathlib import Path

import pytest

from data import bench
from data.degradation import PRESETS, stats
from flashvsr.base.cli import UserError


def test_rows_are_positive_rates_and_the_whole_is_the_sum_of_its_parts(tmp_path):
    pytest.importorskip("cv2")
    text = bench.run(None, "64x64", 3, 1, "realbasicvsr", str(tmp_path / "bench.json"))
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert {"decode H.264", "sharpen", "codec", "all but codec", "whole realbasicvsr"} <= set(rows)
    parts = ("sharpen", "blur", "resize", "noise", "jpeg", "codec", "to_lr")
    for key in ("frames_per_second", "plain_frames_per_second"):
        total = sum(1 / rows[part][key] for part in parts)
        assert math.isclose(1 / rows["whole realbasicvsr"][key], total, rel_tol=1e-6)
    assert len(text.splitlines()) == len(rows) + 1 and found["machine"]["cores"] >= 1


def test_bench_refuses_what_cannot_be_measured():
    with pytest.raises(UserError, match="--size '64'"):
        bench.run(None, "64", 3, 1, "realbasicvsr", None)
    with pytest.raises(UserError, match="smaller than --size 4000x4000"):
        bench.run(None, "4000x4000", 3, 1, "realbasicvsr", None)
    with pytest.raises(UserError, match="--draws 0"):
        bench.run(None, "64x64", 3, 0, "realbasicvsr", None)


def test_measured_operators_agree_with_their_formulas():
    lines = list(stats.operators())
    assert len(lines) >= 12
    for what, found, wanted in lines:
        assert math.isclose(found, wanted, rel_tol=0.02), what


def test_every_preset_is_listed_with_its_steps_and_has_a_config():
    for name in PRESETS:
        assert name in stats.listing()
        text = Path(f"configs/degrade/{name}.yaml").read_text()
        assert text.startswith("# ") and f"preset: {name}\n" in text
    assert stats.table("dove").splitlines()[0].startswith("dove")


def test_the_sheet_shows_every_preset(tmp_path):
    from tests.data.conftest import moving, write_clip

    pytest.importorskip("jinja2")
    write_clip(tmp_path / "clip.mkv", moving(0, 3, 64, 64))
    stats.sheet(str(tmp_path / "clip.mkv"), str(tmp_path / "sheet.html"), frames=2, rows=1)
    html = (tmp_path / "sheet.html").read_text()
    assert all(f"<h2>{name}</h2>" in html for name in PRESETS) and html.count("<img") >= 4 * len(PRESETS)
