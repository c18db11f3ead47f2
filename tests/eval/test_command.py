"""`python -m eval` from arguments to files and the last printed line; errors are one sentence."""

import json

import pytest

from eval.__main__ import main
from flashvsr.base.cli import UserError


def test_the_command_writes_everything_and_ends_with_the_page(test_folder, tmp_path, capsys):
    out = tmp_path / "runs" / "demo"
    main(["--method", "bicubic", "--data", str(test_folder), "--out", str(out), "--frames", "2", "--quiet"])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == str(out / "report.html")
    assert printed.err == ""
    assert sorted(p.name for p in out.iterdir()) == ["eval.json", "report.html", "results.csv", "results.md"]
    evaluation = json.loads((out / "eval.json").read_text())
    assert [(s["clip"], s["frames"]) for s in evaluation["scores"]] == [("alpha", 2), ("beta", 2)]
    if evaluation["protocol"]["lpips_name"] == "lpips-random":
        assert "no alex backbone weights: the metric is lpips-random" in printed.out


@pytest.mark.parametrize(
    "extra, words",
    [
        (["--method", "x=nearest"], "valid forms"),
        (["--method", "bicubic", "--method", "bicubic"], "two methods are named 'bicubic'"),
        (["--method", "bicubic", "--frames", "0"], "--frames must be at least 1"),
        (["--method", "bicubic", "--device", "abacus"], "--device 'abacus' cannot be used"),
        (["--method", "bicubic", "--lpips-weights", "nowhere.pth"], "nowhere.pth do not exist"),
    ],
)
def test_bad_arguments(test_folder, tmp_path, extra, words):
    with pytest.raises(UserError, match=words):
        main([*extra, "--data", str(test_folder), "--out", str(tmp_path / "run"), "--quiet"])
    assert not (tmp_path / "run").exists()


def test_prepare_command(test_folder, tmp_path, capsys):
    arguments = [
        "prepare",
        str(test_folder / "GT"),
        str(tmp_path / "set"),
        "--frames",
        "2",
        "--size",
        "64x96",
    ]
    for printed in (f"{tmp_path / 'set'}\n", f"{tmp_path / 'set'} (already there, same settings)\n"):
        main([*arguments, "--clips", "1", "--quiet"])
        assert capsys.readouterr().out == printed
    assert [p.name for p in (tmp_path / "set" / "LQ").iterdir()] == ["alpha"]
    with pytest.raises(UserError, match="--size '64' must be HEIGHTxWIDTH"):
        main(["prepare", str(test_folder / "GT"), str(tmp_path / "other"), "--size", "64"])
