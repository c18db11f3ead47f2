"""The files of an evaluation say the numbers that went in, and the page stands alone."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from eval.datasets import open_test_set
from eval.methods import Method
from eval.report import verdict, write_report
from eval.results import collect, mean_score, write_results
from eval.runner import Outcome, Panel, Score
from eval.training_log import read_run, smooth

SCORES = [
    Score("bicubic", "alpha", 5, 25.0, 0.81, 0.30, 0.001),
    Score("bicubic", "beta", 11, 27.5, 0.79, 0.20, 0.002),
    Score("ours", "alpha", 5, 24.0, 0.85, 0.35, 0.1),
    Score("ours", "beta", 11, 26.0, 0.75, 0.25, 0.3),
]
METHODS = [
    Method("bicubic", "bicubic", "bicubic", None, {}),
    Method("ours", "runs/x/export,decoder=vae", "model", None, {"decoder": "vae"}),
]
IN_USE = {"bicubic": {}, "ours": {"decoder": "vae", "attention": "gather"}}


class NamedLpips:
    """What `collect` needs to know of an Lpips."""

    name, description = "lpips-random", "LPIPS-random (alex, trunk drawn with seed 0, heads v0.1)"


class PageReader(HTMLParser):
    """Texts of headings and paragraphs, rows of tables, and every address a browser would open."""

    def __init__(self, html: str):
        super().__init__()
        self.rows, self.texts, self.addresses, self.open = [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.open = tag
        if tag == "tr":
            self.rows.append([])
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset") and value]
        if tag in ("link", "iframe"):
            self.addresses.append(tag)

    def handle_data(self, data):
        if self.open in ("td", "th") and data.strip():
            self.rows[-1].append(data)
        elif data.strip():
            self.texts.append(data)


@pytest.fixture
def evaluation(test_folder):
    test_set = open_test_set(test_folder)
    return collect(
        "demo", test_set, METHODS, Outcome(SCORES, in_use=IN_USE), NamedLpips(), "cpu", torch.float32
    )


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


def panel():
    pictures = {
        name: np.random.default_rng(i).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        for i, name in enumerate(["LR", "bicubic", "ours", "HR"])
    }
    return Panel("alpha", 2, pictures)


def test_means_count_clips_once_and_frames_for_time():
    mean = mean_score("ours", SCORES)
    assert (mean.psnr, mean.frames) == (25.0, 16)
    assert mean.ssim == pytest.approx(0.80) and mean.lpips == pytest.approx(0.30)
    assert mean.seconds_per_frame == pytest.approx((5 * 0.1 + 11 * 0.3) / 16)


def test_json_csv_and_markdown_hold_the_same_numbers(evaluation, tmp_path):
    write_results(tmp_path, evaluation)
    stored = json.loads((tmp_path / "eval.json").read_text())
    assert [Score(**row) for row in stored["scores"]] == SCORES
    protocol = stored["protocol"]
    assert (protocol["colour_space"], protocol["scale"], protocol["lpips_name"]) == ("RGB", 4, "lpips-random")
    assert protocol["clips"][1] == {"name": "beta", "frames": 11, "height": 96, "width": 128}
    assert stored["methods"][1]["in_use"] == IN_USE["ours"]
    assert stored["machine"]["torch"] == torch.__version__

    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["psnr"]) for row in rows] == [26.25, 25.0, 25.0, 27.5, 24.0, 26.0]
    assert rows[2]["lpips-random"] == "0.3" and rows[0]["clip"] == "mean"
    markdown = (tmp_path / "results.md").read_text()
    assert "| bicubic | **26.25** | **0.8000** | **0.2500** | **0.0017** |" in markdown
    assert "| ours | beta | 26.00 | 0.7500 | 0.2500 | 0.3000 |" in markdown


def test_infinite_psnr_stays_readable(evaluation, tmp_path):
    evaluation["means"][0]["psnr"] = float("inf")
    write_results(tmp_path, evaluation)
    assert json.loads((tmp_path / "eval.json").read_text())["means"][0]["psnr"] == "inf"
    assert "| bicubic | **∞** |" in (tmp_path / "results.md").read_text()


def test_the_page_says_the_numbers_and_opens_nothing_else(evaluation, tmp_path):
    write_log(tmp_path / "vae", [2.0, 1.0, 0.5, 0.5], expect=0.4)
    write_log(tmp_path / "stage1", [1.0, 1.0, 0.9], expect=0.75)
    path = write_report(tmp_path, evaluation, [panel()])
    page = PageReader(path.read_text())
    assert path == tmp_path / "report.html"
    assert all(a.startswith("data:image/") for a in page.addresses)
    assert "url(" not in path.read_text()

    assert ["bicubic", "26.25", "0.8000", "0.2500", "0.0017"] in page.rows
    assert ["ours", "24.00", "0.8500", "0.3500", "0.1000"] in page.rows
    assert ["VAE", "4", "2.0", "2", "0.5", "0.250", "0.4", "yes"] in page.rows
    assert ["Stage 1: teacher", "3", "1.5", "1", "0.9", "0.900", "0.75", "no"] in page.rows
    assert ["VAE", "11.00 → 17.50 (26.00)"] in page.rows
    text = " ".join(" ".join(page.texts).split())
    assert (
        "2 clips (alpha, beta), 5 to 11 frames each, 128x96, x4; LQ as found (no prepare.json); RGB" in text
    )
    assert "4 minutes of training from scratch do not beat bicubic in PSNR, SSIM or lpips-random" in text
    assert "ours: runs/x/export,decoder=vae ; decoder vae; attention gather" in text
    assert "Stage 3: one-step student: no stage3/metrics.jsonl" in text
    assert len([a for a in page.addresses if "png" in a]) == 2 * 4 and re.search(r"alpha, frame 2", text)


def test_an_empty_run_folder_gives_a_page_that_says_so(evaluation, tmp_path):
    text = " ".join(PageReader(write_report(tmp_path, evaluation, []).read_text()).texts)
    assert "holds no training record" in text and "No pictures were kept" in text
    assert "None of these methods beats bicubic in PSNR, SSIM or lpips-random." in text


def test_the_verdict_follows_the_numbers(evaluation):
    evaluation["means"][1].update(psnr=30.0, ssim=0.7, lpips=0.1)
    assert verdict(evaluation, []) == [
        "None of these methods beats bicubic in SSIM.",
        "ours beats bicubic in PSNR and lpips-random, not in SSIM.",
    ]
    evaluation["means"][1].update(ssim=0.9)
    assert verdict(evaluation, []) == ["ours beats bicubic in PSNR, SSIM and lpips-random."]
    evaluation["methods"][0]["kind"] = "outputs"
    assert verdict(evaluation, []) == []


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
