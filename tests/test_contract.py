"""The check of real clips sees what it is for."""

from tests.contract import compared, side_by_side
from tests.data.footage import scene
from tests.flashvsr.test_job import Nearest, go, make

TAGS = {"colorspace": 6, "color_range": 1, "color_primaries": 6, "color_trc": 6}


def test_what_differs_is_named(tmp_path, capsys):
    pts = [k + (k > 7) for k in range(20)]
    source = make(tmp_path / "in.mp4", scene(1, 20, 16, 24), pts=pts, sound="aac", context=TAGS)
    go(source, tmp_path / "out.mp4", Nearest(), end="12f")
    row = compared(source, tmp_path / "out.mp4", 12, 2)
    assert row["differs"] == "nothing" and row["sound packets"] > 1 and row["tags"] == "6 1 6 6"
    assert compared(source, tmp_path / "out.mp4", 11, 2)["differs"].startswith("frames, times")
    assert compared(source, tmp_path / "out.mp4", 12, 3)["differs"] == "size"
    assert "size: (48, 72) became (32, 48)" in capsys.readouterr().err
    go(source, tmp_path / "silent.mp4", Nearest(), end="12f", audio=False)
    assert compared(source, tmp_path / "silent.mp4", 12, 2)["differs"] == "sound"
    other = make(tmp_path / "other.mp4", scene(1, 20, 16, 24), pts=pts, sound="aac")
    assert compared(other, tmp_path / "out.mp4", 12, 2)["differs"] == "tags"
    names = [name for name, _ in side_by_side(source, tmp_path / "out.mp4", 12)]
    assert names == ["frame 0", "frame 6", "frame 11"]
