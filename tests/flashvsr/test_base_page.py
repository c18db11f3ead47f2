"""The page holds what was put in, escaped, in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flashvsr.base.page import Page, busiest_crop


class _Seen(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.images, self.cells, self.sources = [], [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        if tag == "td":
            self.cells.append([values.get("class", ""), ""])
        self.sources += [values[k] for k in ("src", "href", "srcset") if k in values]
        if tag not in ("img", "meta", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells[-1][1] += data


def _saved(page: Page, tmp_path) -> tuple[str, _Seen]:
    page.save(tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    return html, _Seen(html)


def _decoded(uri: str) -> np.ndarray:
    head, data = uri.split(",", 1)
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_page_needs_nothing_else(tmp_path):
    page = Page("A & <b>")
    page.heading("Head <1>")
    page.text("One `code <x>` two.\n\nSecond & last.")
    page.figure(np.zeros((4, 4, 3), np.uint8), 'say "hi"')
    page.curves({"a": ([0, 1, 2], [3.0, 2.0, float("nan")]), "b": ([1], [2.0])}, "loss", log=True)
    html, seen = _saved(page, tmp_path)
    assert "<h1>A &amp; &lt;b&gt;</h1>" in html and "<h2>Head &lt;1&gt;</h2>" in html
    assert "<p>One <code>code &lt;x&gt;</code> two.</p><p>Second &amp; last.</p>" in html
    assert len(seen.sources) == 3 and all(s.startswith("data:") for s in seen.sources)
    assert not re.search(r"https?://", html)
    assert "@import" not in html and "<link" not in html


def test_the_table_marks_the_best(tmp_path):
    rows = [
        {"name": "bicubic", "psnr": 25.0, "lpips": 0.5, "n": 3},
        {"name": "ours", "psnr": 27.126, "lpips": 0.25},
        {"name": "theirs", "psnr": float("inf"), "lpips": 0.25, "n": None},
    ]
    page = Page("t")
    page.table(
        rows,
        [("name", "Method", None), ("psnr", "PSNR", ".2f"), ("lpips", "LPIPS", ".3f"), ("n", "N", "d")],
        best={"psnr": "max", "lpips": "min"},
    )
    _, seen = _saved(page, tmp_path)
    texts = [text for _, text in seen.cells]
    assert texts[:8] == ["bicubic", "25.00", "0.500", "3", "ours", "27.13", "0.250", "–"]
    assert [i for i, (kind, _) in enumerate(seen.cells) if "best" in kind] == [5, 6, 10]
    assert ["num" in kind for kind, _ in seen.cells[:4]] == [False, True, True, True]


def test_compare_shows_whole_pictures_and_the_same_place_enlarged(tmp_path):
    rng = np.random.default_rng(0)
    hr = rng.integers(0, 256, (64, 96, 3), np.uint8)
    lr = rng.integers(0, 256, (16, 24, 3), np.uint8)
    page = Page("c")
    page.compare([("LR", lr), ("HR <ref>", hr)], crop=(8, 16, 24, 32), caption="x")
    html, seen = _saved(page, tmp_path)
    pictures = [_decoded(i["src"]) for i in seen.images if i.get("src")]
    assert len(pictures) == 4
    for got, want in zip(pictures, (lr, lr[2:8, 4:12], hr, hr[8:32, 16:48]), strict=True):
        assert np.array_equal(got, want)
    assert [i["alt"] for i in seen.images[:4]] == ["LR", "LR", "HR <ref>", "HR <ref>"]
    assert html.count("top: 12.500%; left: 16.667%; height: 37.500%; width: 33.333%") == 2
    assert re.search(r"\.compare img \{[^}]*image-rendering: pixelated", html)


def test_the_busiest_place_is_found(tmp_path):
    image = np.full((80, 120, 3), 90, np.uint8)
    image[50:60, 30:45] = np.random.default_rng(0).integers(0, 256, (10, 15, 3))
    top, left, height, width = busiest_crop(image, 10, 15)
    assert abs(top - 50) <= 1 and abs(left - 30) <= 1 and (height, width) == (10, 15)
    assert busiest_crop(image, 80, 120) == (0, 0, 80, 120)
    page = Page("auto")
    page.compare([("a", image)])
    page.compare([("a", image)], crop=None)
    _, seen = _saved(page, tmp_path)
    assert [_decoded(i["src"]).shape[0] for i in seen.images if i.get("src")] == [80, 32, 80]


def test_histograms_count_every_value(tmp_path):
    page = Page("h")
    values = [1.0] * 6 + [5.0] * 3 + [10.0]
    page.histograms([("<a>", values, 4.0), ("flat", [0.0] * 5, 0.5), ("none", [], None)])
    page.save(tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    _Seen(html)
    assert "&lt;a&gt; (10)" in html and "flat (5)" in html and "none (0)" in html
    first = html.split("<svg")[1]
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)"><title>(\d+)', first)
    assert sum(int(n) for *_, n in bars) == 10
    heights = {int(n): float(h) for _, _, h, n in bars}
    assert heights[6] == 95 and heights[3] == pytest.approx(95 / 2, abs=0.1) and heights[0] == 0
    assert all(float(y) + float(h) == pytest.approx(100) for _, y, h, _ in bars)
    assert 'x1="100.0"' in first  # 4 lies a third of the way from 1 to 10
    assert html.count("<line") == 2


def test_a_gallery_holds_its_pictures(tmp_path):
    page = Page("g")
    page.gallery([("one\nsecond <line>", np.full((20, 30, 3), 200, np.uint8))])
    page.save(tmp_path / "p.html")
    html = (tmp_path / "p.html").read_text()
    image = next(i for i in _Seen(html).images if i["src"])
    picture = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
    assert picture.size == (30, 20) and abs(int(np.asarray(picture).mean()) - 200) <= 2
    assert "<div>one</div><div>second &lt;line&gt;</div>" in html


def test_wrong_pictures_are_refused():
    page = Page("w")
    with pytest.raises(ValueError, match="float32"):
        page.figure(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="does not lie inside"):
        page.compare([("a", np.zeros((8, 8, 3), np.uint8))], crop=(4, 4, 8, 8))
