"""`python -m eval` from arguments to files and the last printed line; errors are one sentence."""

import csv
import json

import pytest

from eval.__main__ import main
from eval.outputs import Outputs
from eval.results import read_evaluation
from flashvsr.base.cli import UserError

FEW = ["--metrics", "psnr,ssim,lpips", "--lpips-weights", "random", "--quiet"]


def test_the_command_writes_everything_and_ends_with_the_page(test_folder, tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    lq_only = f"wild={test_folder / 'LQ'}"
    data = ["--data", f"lab={test_folder}", "--data", lq_only]
    command = ["--method", "bicubic", *data, "--out", str(out), "--frames", "2", *FEW]
    main([*command, "--published", "REDS4"])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[-1] == str(out / "report.html") and printed.err == ""
    assert "no alex backbone weights: the metric is lpips-random, comparable only with itself" in lines
    assert "wild has no GT: psnr, ssim, lpips-random left out, nothing measured" in lines
    names = ["cache", "eval.json", "report.html", "results.csv", "results.md"]
    assert sorted(p.name for p in out.iterdir()) == names

    evaluation = read_evaluation(out / "eval.json")
    assert [(s["dataset"], s["clip"], s["frames"]) for s in evaluation["scores"]] == [
        ("lab", "alpha", 2),
        ("lab", "beta", 2),
        ("wild", "alpha", 2),
        ("wild", "beta", 2),
    ]
    assert [d["has_gt"] for d in evaluation["datasets"]] == [True, False]
    outputs = Outputs(evaluation)
    (frame,) = outputs.read("bicubic", "lab", "beta", start=1)
    assert frame.shape == next(outputs.gt("lab", "beta")).shape == (96, 128, 3)
    assert len(list(outputs.lq("lab", "beta"))) == 2
    with pytest.raises(UserError, match="wild has no GT of clip 'alpha'"):
        outputs.gt("wild", "alpha")

    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["clip"] for row in rows] == ["mean", "mean", "alpha", "beta", "alpha", "beta"]
    assert float(rows[2]["psnr"]) == evaluation["scores"][0]["values"]["psnr"]
    assert rows[1]["psnr"] == ""
    markdown = (out / "results.md").read_text()
    for words in ("border crop 0", "LPIPS-random (alex", "first 2 frames", "REDS4 as published: BasicVSR"):
        assert words in markdown

    before = json.loads((out / "eval.json").read_text())
    main(command)
    after = json.loads((out / "eval.json").read_text())
    assert [s["values"] for s in after["scores"]] == [s["values"] for s in before["scores"]]
    assert all(s["cached"] for s in after["scores"])
    assert "Times marked * were taken" in capsys.readouterr().out


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--method", "x=nearest"], "valid forms"),
        (["--method", "bicubic", "--method", "bicubic"], "two methods are named 'bicubic'"),
        (["--method", "bicubic", "--frames", "0"], "--frames must be at least 1"),
        (["--method", "bicubic", "--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--method", "bicubic", "--workers", "0"], "--workers must be at least 1"),
        (["--method", "bicubic", "--lpips-weights", "nowhere.pth"], "nowhere.pth do not exist"),
        (["--method", "bicubic", "--metrics", "psnr,beauty"], "unknown metric 'beauty'"),
    ],
)
def test_bad_arguments(test_folder, tmp_path, extra, words):
    with pytest.raises(UserError, match=words):
        main([*extra, "--data", str(test_folder), "--out", str(tmp_path / "run"), "--quiet"])
    assert not (tmp_path / "run").exists()


def test_two_sets_of_one_name_are_refused(test_folder, tmp_path):
    data = ["--data", str(test_folder), "--data", str(test_folder)]
    with pytest.raises(UserError, match="two data sets are named 'set.*give each its own NAME=DIR"):
        main(["--method", "bicubic", *data, "--out", str(tmp_path / "run"), "--quiet"])


def test_prepare_command(test_folder, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = ["prepare", str(test_folder / "GT"), str(out), "--frames", "2", "--size", "64x96"]
    for printed in (f"{out}\n", f"{out} (already there, same settings)\n"):
        main([*arguments, "--clips", "1", "--quiet"])
        assert capsys.readouterr().out == printed
    assert [p.name for p in (out / "LQ").iterdir()] == ["alpha"]
    assert main(["prepare", "--check", str(out), "--quiet"]) == 0
    assert "this machine makes the same" in capsys.readouterr().out
    (out / "LQ" / "alpha" / "frame-000000.png").unlink()
    assert main(["prepare", "--check", str(out), "--quiet"]) == 1
    with pytest.raises(UserError, match="SRC OUT or --check DIR, not both"):
        main(["prepare", str(out), "--check", str(out)])
    with pytest.raises(UserError, match="needs SRC and OUT"):
        main(["prepare", str(out)])
    with pytest.raises(UserError, match="--size '64' must be HEIGHTxWIDTH"):
        main(["prepare", str(test_folder / "GT"), str(tmp_path / "other"), "--size", "64"])
