"""The study's commands are what `train` takes, runs share what lies before them, the table says what ran."""

import json

import pytest

from eval import study
from eval.results import write_results
from flashvsr.base.cli import UserError
from tests.eval.made_up import make_up
from train.config import compose


@pytest.mark.parametrize("scale", ["tiny", "small"])
def test_every_training_is_a_command_of_train(scale, tmp_path):
    for training in study.TRAININGS:
        command = training.command(scale, tmp_path / "data", tmp_path)
        stage, *overrides = command[3:]
        names = {"1": "teacher", "2": "sparse_causal", "3": "one_step"}
        number = stage.removeprefix("stage=")
        config = compose(names.get(number, number), overrides)
        assert config.run_dir == tmp_path / training.run
        assert config.seed == training.seed


def test_every_row_has_a_training_and_every_training_comes_after_what_it_needs():
    seen = set()
    for training in study.TRAININGS:
        assert set(training.after) <= seen
        seen.add(training.name)
    at_hand = {name: {name, *training.after} for name, training in ((t.name, t) for t in study.TRAININGS)}
    for row in study.ROWS:
        own = [names for name, names in at_hand.items() if name.partition("/")[0] == row.run]
        assert row.run is None or any(name.endswith(f"/{row.stage}") for names in own for name in names)


def test_a_run_finds_the_stages_and_clips_of_the_one_before(tmp_path):
    for folder in ("base/vae", "base/stage1", "base/decoder", "base/clips-train-1", "pixels-1/clips-train-2"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "base/stage1/metrics.jsonl").write_text("one")
    for name in ("both-0", "both-0-own-latents"):
        training = next(t for t in study.TRAININGS if t.run == name)
        study.link(training, tmp_path)
        if name == "both-0":
            (tmp_path / name / "stage3").mkdir()
    run = tmp_path / "both-0-own-latents"
    assert {p.name for p in run.iterdir()} == {
        "vae", "stage1", "stage3", "clips-train-1", "clips-train-2"}  # fmt: skip
    assert (tmp_path / "both-0/decoder").resolve() == tmp_path / "base/decoder"
    assert (run / "stage1/metrics.jsonl").read_text() == "one"
    assert (run / "stage3").resolve() == tmp_path / "both-0/stage3"
    study.link(training, tmp_path)  # once more changes nothing
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert (moved / "both-0-own-latents/stage1/metrics.jsonl").read_text() == "one"


def test_the_table_counts_the_road_behind_a_row(tmp_path, monkeypatch):
    evaluation = make_up(tmp_path / "frames")
    write_results(tmp_path / "eval", evaluation)
    for stage, steps, seconds in (("vae", 5, 60.0), ("stage1", 3, 30.0), ("stage2", 2, 90.0)):
        folder = tmp_path / "base" / stage
        folder.mkdir(parents=True)
        lines = [{"step": i + 1, "kind": "train", "seconds": seconds} for i in range(steps)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = (
        study.Row("bicubic", None, "", "bicubic"),
        study.Row("ours", "base", "1", "steps=4"),
        study.Row("both-0", "both-0", "3", "decoder=vae"),
    )
    monkeypatch.setattr(study, "ROWS", rows)
    study.write_table(tmp_path)
    lines = (tmp_path / "results.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert cells[0][:4] == ["bicubic", "", "", ""]
    assert cells[0][4].startswith("26.00")
    assert cells[1][:4] == ["ours", "0", "3", "6.5"]  # 5 x 60 s and 3 x 30 s; stage 2 is not behind it
    assert cells[2][:4] == ["both-0", "", "", ""]
    assert not any(cells[2][4:])


def test_unknown_runs_are_refused(tmp_path):
    asked = ["--videos", "x", "--val", "y", "--out", str(tmp_path), "--only", "base/1,bath-0/3"]
    with pytest.raises(UserError, match="bath-0/3.*both-0/3"):
        study.main(asked)
