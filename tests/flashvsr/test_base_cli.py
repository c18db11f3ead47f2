"""Commands' errors, configs from mappings, progress."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from flashvsr.base import cli
from flashvsr.base.cli import Progress, UserError, build


@dataclass(frozen=True)
class Inner:
    width: int = 8
    block: tuple[int, int, int] = (2, 4, 4)


@dataclass(frozen=True)
class Outer:
    name: str
    rate: float = 1e-4
    kind: Literal["dense", "sparse"] = "dense"
    inner: Inner = Inner()
    spare: Inner | None = None
    short_side: int | None = None
    size: int | tuple[int, int] = 4
    on: bool = False
    betas: tuple[float, ...] = (0.9, 0.999)
    weights: dict[str, float] = field(default_factory=dict)
    many: tuple[Inner, ...] = ()

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ValueError(f"rate={self.rate} must be positive")


def test_build_makes_nested_frozen_dataclasses():
    made = build(
        Outer,
        {
            "name": "a",
            "rate": 1,
            "kind": "sparse",
            "inner": {"block": [2, 8, 8]},
            "spare": {"width": 3},
            "short_side": 5,
            "size": [3, 4],
            "betas": [0, 1, 0.5],
            "weights": {"mse": 1},
            "many": [{"width": 1}, {}],
        },
    )
    assert made == Outer(
        name="a",
        rate=1.0,
        kind="sparse",
        inner=Inner(block=(2, 8, 8)),
        spare=Inner(width=3),
        short_side=5,
        size=(3, 4),
        betas=(0.0, 1.0, 0.5),
        weights={"mse": 1.0},
        many=(Inner(1), Inner()),
    )
    assert isinstance(made.rate, float) and isinstance(made.weights["mse"], float)
    assert build(Outer, {"name": "b", "spare": None}).spare is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"name": "a", "inner": {"widht": 3}}, ["inner.widht", "'width'"]),
        ({"nam": "a"}, ["nam", "'name'"]),
        ({}, ["name", "str"]),
        ({"name": 3}, ["name=3", "str"]),
        ({"name": "a", "inner": {"width": True}}, ["inner.width=True", "int"]),
        ({"name": "a", "inner": {"width": 1.5}}, ["inner.width=1.5", "int"]),
        ({"name": "a", "on": 1}, ["on=1", "bool"]),
        ({"name": "a", "rate": True}, ["rate=True", "float"]),
        ({"name": "a", "rate": "1e-4"}, ["rate='1e-4'", "float"]),
        ({"name": "a", "kind": "sparce"}, ["kind='sparce'", "did you mean 'sparse'"]),
        ({"name": "a", "inner": {"block": [1, 2]}}, ["inner.block=[1, 2]", "3 entries"]),
        ({"name": "a", "inner": {"block": [1, 2, "x"]}}, ["inner.block[2]='x'", "int"]),
        ({"name": "a", "short_side": "x"}, ["short_side='x'", "int or null"]),
        ({"name": "a", "spare": {"with": 3}}, ["spare.with", "'width'"]),
        ({"name": "a", "inner": 3}, ["inner", "group"]),
        ({"name": "a", "weights": {"mse": "x"}}, ["weights.mse='x'", "float"]),
        ({"name": "a", "many": [{}, {"wdth": 1}]}, ["many[1].wdth", "'width'"]),
        ({"name": "a", "rate": -1}, ["rate=-1.0 must be positive"]),
    ],
)
def test_build_names_the_key_and_the_way_out(values, words):
    with pytest.raises(UserError) as caught:
        build(Outer, values)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def _exit_code(main, capsys):
    with pytest.raises(SystemExit) as left:
        cli.run(main, ["x"])
    return left.value.code, capsys.readouterr().err


def test_run_turns_user_errors_into_one_line_and_code_2(capsys):
    def missing(argv):
        Path("/nowhere/at/all").read_text()

    def wrong(argv):
        raise UserError(f"argument {argv[0]} is wrong")

    def stop(argv):
        raise KeyboardInterrupt

    assert _exit_code(wrong, capsys) == (2, "error: argument x is wrong\n")
    assert _exit_code(missing, capsys) == (2, "error: /nowhere/at/all: No such file or directory\n")
    code, err = _exit_code(stop, capsys)
    assert code == 130 and len(err.strip().splitlines()) == 1
    assert _exit_code(lambda argv: None, capsys) == (0, "")
    assert _exit_code(lambda argv: 1, capsys) == (1, "")


def test_run_leaves_a_bug_its_traceback():
    def bug(argv):
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        cli.run(bug, [])


def test_an_error_from_a_loader_worker_is_still_one_line(capsys):
    def worker(argv):
        raise UserError(
            "Caught UserError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\n"
            "flashvsr.base.cli.UserError: clip a.mp4: cannot be read\n"
        )

    assert _exit_code(worker, capsys) == (2, "error: clip a.mp4: cannot be read\n")


def test_a_closed_pipe_ends_quietly():
    code = "from flashvsr.base import cli\ncli.run(lambda a: [print('y' * 99) for _ in range(99999)] and 0)"
    command = f'{sys.executable} -c "{code.replace(chr(10), "; ")}" | head -n 1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout) == 100


def test_progress_without_a_terminal_is_a_few_lines(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(cli.time, "monotonic", lambda: clock[0])
    with Progress(100, "train", unit="step") as bar:
        for _ in range(100):
            clock[0] += 0.25
            bar.update(loss=0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == "train: 40/100 step, 4 step/s, 00:10 gone, 00:15 left, loss=0.5"
    assert lines[-1].startswith("train: 100/100 step, 4 step/s, 00:25 gone") and lines[-1].endswith("done")


def test_progress_quiet_says_nothing(capsys):
    with Progress(3, "x", quiet=True) as bar:
        bar.update(3)
    assert capsys.readouterr().err == "" and bar.done == 3
