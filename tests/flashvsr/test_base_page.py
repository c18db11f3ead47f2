"""The page holds what was put in, escaped, in one file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from flashvsr.base import charts
from flashvsr.base.page import Page, busiest_crop, embed


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
        if "td" in self.open:
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
    assert len(seen.sources) == 1 and all(s.startswith("data:") for s in seen.sources)
    assert not re.search(r"https?://", html)
    assert "@import" not in html and "<link" not in html


def test_the_table_marks_the_best(tmp_path):
    rows = [
        {"name": "bicubic", "psnr": 25.0, "lpips": 0.5, "n": 3},
        {"name": "ours", "psnr": 27.126, "lpips": 0.25, "span": "27 to <28>"},
        {"name": "theirs", "psnr": float("inf"), "lpips": 0.25, "n": None},
    ]
    page = Page("t")
    page.table(
        rows,
        [("name", "Method", None), ("psnr", "PSNR", ".2f"), ("lpips", "LPIPS", ".3f"), ("n", "N", "d")],
        ranks={"psnr": [None, 2, 1], "lpips": [None, 1, 1]},
        under={"psnr": "span"},
    )
    html, seen = _saved(page, tmp_path)
    assert '<td class="num second"><u>27.13</u><small>27 to &lt;28&gt;</small></td>' in html
    texts = [text for _, text in seen.cells]
    assert texts[:8] == ["bicubic", "25.00", "0.500", "3", "ours", "27.1327 to <28>", "0.250", "–"]
    assert texts[9] == "∞"
    assert [i for i, (kind, _) in enumerate(seen.cells) if "best" in kind] == [6, 9, 10]
    assert [i for i, (kind, _) in enumerate(seen.cells) if "second" in kind] == [5]
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


def _viewer(tmp_path) -> tuple[str, np.ndarray]:
    """A page with a viewer of two frames in three panes, and the reference's first frame."""
    hr = np.random.default_rng(0).integers(0, 256, (2, 60, 80, 3), np.uint8)
    page = Page("v")
    choices = [
        (f"frame {i}", {"LR": embed(hr[i, ::4, ::4]), "a <b>": embed(hr[i], 90), "HR": embed(hr[i])})
        for i in (0, 1)
    ]
    page.viewer(choices, crop=(15, 40, 15, 20))
    html, seen = _saved(page, tmp_path)
    assert len([i for i in seen.images if i.get("src")]) == 6
    return html, hr[0]


def test_a_viewer_opens_at_its_crop_with_every_picture_inside(tmp_path):
    html, hr = _viewer(tmp_path)
    seen = _Seen(html)
    assert [i["alt"] for i in seen.images[:6]] == [
        f"{name}, frame {i}" for name in ("LR", "a <b>", "HR") for i in (0, 1)
    ]
    assert ["off" in i.get("class", "") for i in seen.images[:6]] == [False, True] * 3
    assert np.array_equal(_decoded(seen.images[4]["src"]), hr)
    assert np.array_equal(_decoded(seen.images[0]["src"]), hr[::4, ::4])
    assert "--ratio: 80 / 60; --z: 4.0000; --x: 50.000%; --y: 25.000%" in html
    with pytest.raises(ValueError, match="same pictures"):
        Page("v").viewer([("1", {"a": embed(hr)}), ("2", {"b": embed(hr)})])


_DRIVE = """<script>{
const viewer = document.querySelector(".viewer"), said = [];
const panes = [...viewer.querySelectorAll(".pane")], figures = [...viewer.querySelectorAll("figure")];
const press = key => viewer.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
const say = what => {
  const visible = img => getComputedStyle(img).visibility === "visible";
  const shown = panes.map(p => [...p.children].findIndex(visible));
  const transforms = [...viewer.querySelectorAll("img")].map(img => {
    const m = new DOMMatrix(getComputedStyle(img).transform), w = img.clientWidth || 1;
    return [m.a, m.e / w].map(v => v.toFixed(2)).join(" ");
  });
  const open = figures.filter(f => f.clientWidth > 0).length;
  said.push({ what, shown, open, places: [...new Set(transforms)] });
};
const send = (type, pane, u, v, deltaY, pointerId = 1, pointerType = "mouse") => {
  const box = pane.getBoundingClientRect(), Event = type === "wheel" ? WheelEvent : PointerEvent;
  const place = { clientX: box.left + u * box.width, clientY: box.top + v * box.height };
  const more = { deltaY, cancelable: true, pointerId, pointerType };
  pane.dispatchEvent(new Event(type, { ...place, ...more }));
};
HTMLElement.prototype.setPointerCapture = () => {};  // there is no real pointer
const pinch = () => {
  const [first, second] = [1, 2].map(id => (type, u) => send(type, panes[0], u, 0.5, 0, id, "touch"));
  first("pointerdown", 0.4); second("pointerdown", 0.6); second("pointermove", 0.8);
  first("pointerup", 0.4); second("pointerup", 0.8);
};
const twice = -300 * Math.log(2);
say("start"); press("0"); say("whole"); press("."); say("next frame"); press("."); say("round");
send("wheel", panes[1], 1, 1, twice); say("wheel, not active");
viewer.focus(); send("wheel", panes[1], 1, 1, twice); say("wheel at the corner");
send("pointerdown", panes[2], 0.5, 0.5); send("pointermove", panes[2], 0.7, 0.5);
send("pointerup", panes[2], 0.7, 0.5); send("pointermove", panes[2], 0.9, 0.5); say("dragged");
press("0"); viewer.blur(); pinch(); say("pinched, not active"); viewer.focus(); pinch(); say("pinched");
press("2"); say("alone"); press("Escape"); press("d"); say("detail");
document.body.innerHTML = "<pre>" + JSON.stringify(said) + "</pre>";
}</script>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium, a real browser")
def test_one_pan_and_zoom_drives_all_panes_in_a_browser(tmp_path):
    html, _ = _viewer(tmp_path)
    (tmp_path / "driven.html").write_text(html.replace("</body>", f"{_DRIVE}</body>"), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path}/browser", "--window-size=1000,800", "--virtual-time-budget=2000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{tmp_path}/driven.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = {s.pop("what"): s for s in json.loads(re.search(r"<pre>(.*)</pre>", done.stdout)[1])}
    assert all(len(s["places"]) == 1 or s["open"] == 1 for s in said.values()), said
    places = {what: s["places"][0] for what, s in said.items()}
    assert places["start"] == places["detail"] == "4.00 -2.00"  # four times, half of the picture to the left
    assert places["whole"] == places["wheel, not active"] == "1.00 0.00"
    assert places["wheel at the corner"] == "2.00 -1.00"  # the corner stays where it was
    assert places["dragged"] == "2.00 -0.80"
    # The fingers part to twice their distance; what was in their middle, at 0.5, is so again, at 0.6.
    assert places["pinched"] == "2.00 -0.40" and places["pinched, not active"] == "1.00 0.00"
    assert said["start"]["shown"] == [0, 0, 0] and said["next frame"]["shown"] == [1, 1, 1]
    assert said["round"]["shown"] == [0, 0, 0]
    assert (said["alone"]["open"], said["detail"]["open"]) == (1, 3)


def test_ticks_are_round_and_inside():
    assert [t for _, t in charts.Axis(0.0, 1.0).ticks()] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [v for v, _ in charts.Axis(0.0, 1.0).ticks()] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert [t for _, t in charts.Axis(24.1, 33.9).ticks()] == ["26", "28", "30", "32"]
    assert [t for _, t in charts.Axis(0.0008, 0.4, True).ticks()] == [
        "0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1", "0.2",
    ]  # fmt: skip
    axis = charts.axis_of([3.0, float("inf"), 5.0])
    assert 2.5 < axis.low < 3 and 5 < axis.high < 5.5 and charts.axis_of([]).ticks()
    assert charts.axis_of([7.0]).place(7.0) == pytest.approx(0.5)


def test_charts_put_values_where_their_axes_say():
    def places(svg):
        return [(float(x), float(y)) for x, y in re.findall(r"translate\(([-\d.]+) ([-\d.]+)\)", svg)]

    svg = charts.lines({"a": ([0, 1, 2, 3], [1.0, 2.0, float("inf"), 3.0]), "<b>": ([0], [1.0])}, "x", "y")
    (line,) = re.findall(r'polyline points="([^"]+)"', svg)
    assert len(line.split()) == 2 and "&lt;b&gt;" in svg  # the infinite value leaves a gap
    last, alone = [p for p in places(svg) if p[0] > 20]
    assert last[0] > alone[0] and last[1] < alone[1]  # 3 is right of 0; 3.0 is above 1.0
    assert line.split()[0] == f"{alone[0]},{alone[1]}"

    svg = charts.dots({"one": [1.0, 2.0], "two": [None, 1.0]}, ["a", "b"], "V")
    (a, b, c) = places(svg)
    assert a[0] == c[0] < b[0] and a[1] == b[1] < c[1]
    assert [re.search(r"s\d", part)[0] for part in svg.split("<path")[1:]] == ["s0", "s1", "s1"]

    svg = charts.dots({"one": [1.0, 10.0, 100.0, float("inf")]}, ["a", "b", "c", "d"], "V", log=True)
    a, b, c, d = (x for x, _ in places(svg))
    assert b - a == pytest.approx(c - b, abs=0.2) and c < d <= charts.WIDTH

    spots = [
        charts.Spot("a", 0.01, 1.0),
        None,
        charts.Spot("b", 0.1, 2.0, 1.5, 2.5),
        charts.Spot("c", 1.0, 2.0),
    ]
    svg = charts.scatter(spots, "s", "V")
    a, b, c = [p for p in places(svg) if p[0] > 20]
    assert b[0] - a[0] == pytest.approx(c[0] - b[0], abs=0.2)  # decades are equally far apart
    assert 'class="s1"' not in svg and svg.count("<line x1") == 1


def test_the_same_parts_give_the_same_bytes(tmp_path):
    files = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        _viewer(tmp_path / name)
        page = Page("c")
        page.curves({"a": ([0, 1], [3.0, 2.0])}, "loss")
        page.save(tmp_path / name / "curves.html")
        files.append([p.read_bytes() for p in sorted((tmp_path / name).iterdir())])
    assert files[0] == files[1]


def test_wrong_pictures_are_refused():
    page = Page("w")
    with pytest.raises(ValueError, match="float32"):
        page.figure(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match="does not lie inside"):
        page.compare([("a", np.zeros((8, 8, 3), np.uint8))], crop=(4, 4, 8, 8))
