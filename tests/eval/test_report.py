"""The page says every number of an evaluation, marks the best, shows the frames it names and stands alone."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from eval.report import write_report
from eval.report.numbers import verdict
from eval.report.pictures import Budget, side_by_side
from eval.results import interval
from eval.training_log import read_run, smooth
from flashvsr.base.page import Page
from tests.eval.made_up import CLIPS, HEIGHT, METHODS, METRICS, NUMBERS, WIDTH, make_up, picture


class PageReader(HTMLParser):
    """Rows of tables as (text, class), headings and other texts, images, and every address opened."""

    def __init__(self, html: str):
        super().__init__()
        self.rows, self.texts, self.images, self.addresses, self.open = [], [], [], [], []
        self.summaries: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in ("img", "meta"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", values.get("class") or ""])
        if tag == "img" and values.get("src"):
            self.images.append((values["alt"], values["src"]))
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset") and value]
        if tag in ("link", "iframe"):
            self.addresses.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1][0] += f"{data} " if "small" not in self.open else f"[{data}]"
        elif "summary" in self.open:
            self.summaries.append(data)
        elif data.strip():
            self.texts.append(data)

    def cells(self) -> list[list[str]]:
        return [[text.strip() for text, _ in row] for row in self.rows]


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    return make_up(tmp_path_factory.mktemp("frames"))


@pytest.fixture(scope="session")
def html(made, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("run"), made, quiet=True).read_text()


@pytest.fixture
def evaluation(made):
    return json.loads(json.dumps(made))


def write_log(folder, losses, expect):
    """metrics.jsonl with a validation before and after training, and config.yaml."""
    folder.mkdir(parents=True)
    lines = [
        {"step": 0, "kind": "val", "val/loss": losses[0], "val/psnr": 11.0, "bicubic/psnr": 26.0},
        *({"step": i + 1, "kind": "train", "loss/mse": v, "seconds": 30.0} for i, v in enumerate(losses)),
        {"step": len(losses), "kind": "val", "val/loss": losses[-1], "val/psnr": 17.5, "bicubic/psnr": 26.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.yaml").write_text(f"expect: {expect}\nsteps: 4\n")


def test_every_method_clip_and_metric_is_there_with_its_interval(html):
    page = PageReader(html)
    rows = page.cells()
    assert ["bicubic", "26.00 [25.00 to 27.00]", "0.4000 [0.3000 to 0.5000]", "7.500 [7.000 to 8.000]",
            "1.000 [1.000 to 1.000]", "0.0020", "0.002"] in rows  # fmt: skip
    assert ["ours", "6.500", "0.4000", "0.400"] in rows  # the set without GT has one metric, one clip
    assert [
        "theirs <b> [random weights]",
        "24.50",
        "0.2500",
        "6.000",
        "–",
        "–",
        "–",
    ] in rows  # a clip's own table
    for (dataset, clip), numbers in NUMBERS.items():
        assert f"{clip}, {CLIPS[dataset][clip]} frames" in page.summaries
        titles = [m["title"] for m in METRICS if m["key"] in numbers]
        head = next(row for row in rows if row[0] == clip)
        assert [h.split()[0] for h in head[1 : 1 + len(titles)]] == titles
    # One mark per method and clip in every dot plot, values in full.
    for key, title in (("psnr", "PSNR"), ("niqe", "NIQE")):
        values = [v for numbers in NUMBERS.values() for v in numbers.get(key, [])]
        for value in values:
            assert f": {value:.6g}</title>" in html, (title, value)
    text = " ".join(" ".join(page.texts).split())
    assert "tLP: change" in text and "LQ by preset realbasicvsr, seed 3" in text
    assert "edge of theirs <b>: the clip stands still" in text
    assert "Without a time, so not drawn: theirs <b>" in text


def test_the_best_is_marked_the_second_underlined_and_ties_share(html):
    rows = {row[0][0].split("[")[0].strip(): row for row in reversed(PageReader(html).rows)}
    marks = {name: [kind.replace("num", "").strip() for _, kind in rows[name][1:]] for name in METHODS}
    assert marks["bicubic"] == ["second", "second", "", "", "best", "best"]
    assert marks["ours"] == ["", "best", "best", "", "second", "second"]
    assert marks["theirs <b>"] == ["best", "best", "second", "", "", ""]  # edge has no better direction
    assert html.count("<u>26.00</u>") == 1


def test_published_numbers_stand_apart_and_are_never_ranked(html):
    page = PageReader(html)
    at = next(i for i, row in enumerate(page.cells()) if row[0] == "BasicVSR")
    assert page.cells()[at][1] == "31.4170" and {kind for _, kind in page.rows[at]} == {"", "num"}
    assert any("not comparable with ours" in text for text in page.texts)


def test_metrics_over_frames_are_drawn_where_they_lie(html):
    fold = html.split("<summary>alpha, 8 frames</summary>")[1].split("</details>")[0]
    charts = fold.split('<svg class="chart"')[1:]
    assert [re.search('aria-label="([^ "]+)', c)[1] for c in charts] == ["PSNR", "tLP"]
    lines = re.findall(r'points="([^"]+)"', charts[0])
    assert [len(line.split()) for line in lines] == [8, 8, 8]
    xs, ys = zip(*(map(float, p.split(",")) for p in lines[0].split()), strict=True)
    assert np.diff(xs) == pytest.approx([np.diff(xs)[0]] * 7, abs=0.11) and max(np.diff(ys)) < 0  # it rises
    temporal = re.findall(r'points="([^"]+)"', charts[1])
    assert [len(line.split()) for line in temporal] == [7, 7, 7]
    assert float(temporal[0].split(",")[0]) == pytest.approx(xs[1], abs=0.11)  # begins at the second frame


def test_quality_is_drawn_over_time_on_a_logarithmic_axis(html):
    assert html.count("seconds per frame</text>") == len(METRICS) + 1
    assert "<title>bicubic: 0.002, 26</title>" in html and "<title>ours: 0.4, 25</title>" in html


def test_pictures_are_the_frames_named_and_slices_their_rows(html):
    images = PageReader(html).images
    names = [name for name, _ in images]
    for frame in (1, 4, 6):
        for pane in ("LR", *METHODS, "HR"):
            of_beta = frame == 4  # of five frames: 0, 2, 4
            assert names.count(f"{pane}, frame {frame}") == (1 if pane == "HR" else 2) + of_beta
    by_name = {name: uri for name, uri in reversed(images)}
    assert np.array_equal(decoded(by_name["LR, frame 4"]), picture(0, 4)[::4, ::4])
    shown, real = decoded(by_name["ours, frame 6"]).astype(int), picture(2, 6).astype(int)
    assert np.abs(shown - real).mean() < 1 and np.abs(shown - picture(2, 4).astype(int)).mean() > 3
    slices = [(name, uri) for name, uri in images if "x-t slice: row 40, columns 0 to 95" in name]
    assert len([name for name, _ in slices if name.startswith("HR")]) == 2
    whole = next(uri for name, uri in slices if name.startswith("ours") and name.endswith("frames 0 to 7"))
    assert np.array_equal(decoded(whole), np.stack([picture(2, i)[40] for i in range(8)]))
    low = next(uri for name, uri in slices if name.startswith("LR") and name.endswith("frames 0 to 7"))
    assert np.array_equal(decoded(low), np.stack([picture(0, i)[40, ::4] for i in range(8)]))
    # What is seen first is a quarter of the frame around the busy place at row 32, column 48.
    zoom, x, y = (float(v) for v in re.search(r'data-view="([^"]+)"', html)[1].split())
    assert zoom == 4 and x * WIDTH <= 48 and (x + 1 / 4) * WIDTH >= 64
    assert y * HEIGHT == 32 and (y + 1 / 4) * HEIGHT == 48


def test_large_frames_show_a_window_and_the_page_keeps_its_budget(evaluation, monkeypatch, tmp_path):
    monkeypatch.setattr("eval.report.pictures._WINDOW", (32, 48))
    page = Page("p")
    side_by_side(page, evaluation, Budget(left=60_000), quiet=True)
    page.save(tmp_path / "p.html")
    text = (tmp_path / "p.html").read_text()
    first = PageReader(text)
    shapes = [decoded(uri).shape for name, uri in first.images if "frame 4" in name and "lab" not in name][:5]
    assert shapes == [(8, 12, 3), *[(32, 48, 3)] * 4]
    said = " ".join(first.texts)
    assert "The busiest 48x32 pixels" in said
    assert re.search(r"Left out, to keep the page small: (field, gamma; )?lab, beta\.", said)


def test_without_gt_lr_tells_where_to_look(evaluation, tmp_path):
    own = [s for s in evaluation["scores"] if s["dataset"] == "field"]
    noise = np.random.default_rng(0).integers(0, 256, (16, WIDTH, 3), np.uint8)
    (tmp_path / "noisy").mkdir()
    for i in range(8):  # an output that is busy at the top, where nothing is
        Image.fromarray(np.vstack([noise, picture(0, i)[16:]])).save(
            tmp_path / "noisy" / f"frame-{i:06d}.png"
        )
    own[-1]["output"] = str(tmp_path / "noisy")
    images = PageReader(write_report(tmp_path, evaluation, quiet=True).read_text()).images
    assert len([name for name, _ in images if name.startswith(f"{METHODS[-1]}, x-t slice: row 40,")]) == 3


def test_an_aligned_method_shows_what_all_have(evaluation, tmp_path):
    evaluation["scores"][1] |= {"frames": 6, "height": 60, "width": 92}  # of alpha, whose clip has 8 of 64x96
    page = PageReader(write_report(tmp_path, evaluation, quiet=True).read_text())
    shown = {name: decoded(uri).shape for name, uri in page.images[:15]}
    assert {name.split(", ")[1] for name in shown} == {"frame 1", "frame 3", "frame 4"}
    assert {shape for name, shape in shown.items() if name.startswith("LR")} == {(15, 23, 3)}
    assert {shape for name, shape in shown.items() if not name.startswith("LR")} == {(60, 92, 3)}
    assert any("frames 0 to 5" in name for name, _ in page.images)


def test_frames_that_are_gone_are_named_not_drawn(evaluation, tmp_path):
    copy = tmp_path / "alpha"
    shutil.copytree(evaluation["scores"][0]["output"], copy)
    evaluation["scores"][0]["output"] = str(copy)
    for file in copy.iterdir():
        file.unlink()
    page = PageReader(write_report(tmp_path, evaluation, quiet=True).read_text())
    assert re.search("Not shown, their frames cannot be read: lab, alpha: ", " ".join(page.texts))
    assert "bicubic, frame 4" in [name for name, _ in page.images]  # of the other set


def test_the_page_stands_alone_and_the_same_input_gives_the_same_bytes(html, made, tmp_path):
    assert all(a.startswith("data:image/") for a in PageReader(html).addresses)
    assert "url(" not in html and "@import" not in html and not re.search(r"https?://", html)
    assert write_report(tmp_path, made, quiet=True).read_text() == html


def test_the_training_behind_the_numbers_is_told(evaluation, tmp_path):
    write_log(tmp_path / "vae", [2.0, 1.0, 0.5, 0.5], expect=0.4)
    write_log(tmp_path / "stage1", [1.0, 1.0, 0.9], expect=0.75)
    page = PageReader(write_report(tmp_path, evaluation, quiet=True).read_text())
    assert ["VAE", "4", "2.0", "2", "0.5", "0.250", "0.4", "yes"] in page.cells()
    assert ["Stage 1: teacher", "3", "1.5", "1", "0.9", "0.900", "0.75", "no"] in page.cells()
    assert ["VAE", "11.00 → 17.50 (26.00)"] in page.cells()
    text = " ".join(" ".join(page.texts).split())
    assert "ours: ours ; decoder vae" in text
    assert "Stage 3: one-step student: no stage3/metrics.jsonl" in text


def test_a_run_without_training_says_so(html):
    assert "holds no training record" in " ".join(PageReader(html).texts)


def set_means(evaluation, method, **values):
    row = next(r for r in evaluation["means"] if r["method"] == method)
    row["values"] = {key: interval([value]) for key, value in values.items()}


def test_the_verdict_follows_the_numbers(evaluation, tmp_path):
    evaluation["datasets"] = evaluation["datasets"][:1]
    evaluation["means"] = [r for r in evaluation["means"] if r["dataset"] == "lab"][:2]
    set_means(evaluation, "bicubic", psnr=30.0, tlp=0.5, niqe=7.0, edge=1.0)
    set_means(evaluation, "ours", psnr=29.0, tlp=0.6, niqe=7.0, edge=1.0)
    assert verdict(evaluation, []) == ["None of these methods beats bicubic in PSNR, tLP or NIQE."]
    write_log(tmp_path / "vae", [2.0, 1.0, 0.5, 0.5], expect=0.4)
    write_log(tmp_path / "stage1", [1.0, 1.0, 0.9, 0.9], expect=0.75)
    logs, _ = read_run(tmp_path)
    assert verdict(evaluation, logs) == [
        "4 minutes of training from scratch do not beat bicubic in PSNR, tLP or NIQE: this page proves the "
        "road, not quality."
    ]
    with open(tmp_path / "vae" / "config.yaml", "a") as config:
        config.write("init: weights/tiny/vae\n")
    started = read_run(tmp_path)[0]
    assert [log.init for log in started] == ["weights/tiny/vae", None]
    assert verdict(evaluation, started)[0].startswith("4 minutes of training do not beat bicubic")
    set_means(evaluation, "ours", psnr=31.0, tlp=0.4, niqe=8.0, edge=9.0)
    assert verdict(evaluation, []) == [
        "None of these methods beats bicubic in NIQE.",
        "ours beats bicubic in PSNR and tLP, not in NIQE.",
    ]
    set_means(evaluation, "ours", psnr=31.0, tlp=0.4, niqe=6.0, edge=9.0)
    assert verdict(evaluation, []) == ["ours beats bicubic in PSNR, tLP and NIQE."]
    evaluation["methods"][0]["kind"] = "outputs"
    assert verdict(evaluation, []) == []


def test_the_verdict_names_the_set_where_there_are_several(evaluation):
    assert verdict(evaluation, []) == [
        "ours beats bicubic on lab in tLP and NIQE, not in PSNR.",
        "theirs <b> beats bicubic on lab in PSNR, tLP and NIQE.",
        "ours beats bicubic on field in NIQE.",
        "theirs <b> beats bicubic on field in NIQE.",
    ]


def test_a_damaged_or_partial_log_is_read_as_far_as_it_goes(tmp_path):
    write_log(tmp_path / "decoder", [1.0, 0.5], expect="nonsense")
    with open(tmp_path / "decoder" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "kind": "train", "loss/mse": 0.25}\n{"step": 3, "kin')
    (log,), missing = read_run(tmp_path)
    assert log.train[2]["loss/mse"] == 0.25 and log.steps == 2 and log.damaged == 1
    assert "TC decoder: 1 unreadable lines of decoder/metrics.jsonl" in missing
    assert "TC decoder: no `expect` in decoder/config.yaml" in missing


def test_curves_are_means_of_groups():
    steps, values = list(range(1, 161)), [float(i) for i in range(160)]
    assert smooth((steps, values)) == (list(range(4, 161, 4)), [1.5 + 4 * i for i in range(40)])
    assert smooth(([1, 2], [3.0, 4.0])) == ([1, 2], [3.0, 4.0])
