"""What a run folder tells about its training: `metrics.jsonl` and `config.yaml` of every stage."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGES = {
    "vae": "VAE",
    "stage1": "Stage 1: teacher",
    "stage2": "Stage 2: sparse causal student",
    "stage3": "Stage 3: one-step student",
    "decoder": "TC decoder",
}

Series = tuple[list[int], list[float]]


@dataclass(frozen=True)
class StageLog:
    """The records of one stage by step; `damaged` counts lines that were no JSON object with a step."""

    title: str
    train: dict[int, dict[str, Any]]
    val: dict[int, dict[str, Any]]
    expect: float | None  # the held-out loss must fall to this fraction of its start
    init: str | None  # the folder whose weights it started from
    damaged: int

    @property
    def steps(self) -> int:
        """Steps done."""
        return max([*self.train, *self.val], default=0)

    @property
    def minutes(self) -> float | None:
        """Time spent in training steps, without validation; None when it was not recorded."""
        seconds = [record["seconds"] for record in self.train.values() if "seconds" in record]
        return sum(seconds) / 60 if seconds else None

    def first(self, key: str) -> float | None:
        """The value of `key` at the first validation that has it."""
        return next((r[key] for _, r in sorted(self.val.items()) if key in r), None)

    def last(self, key: str) -> float | None:
        """The value of `key` at the last validation that has it."""
        return next((r[key] for _, r in sorted(self.val.items(), reverse=True) if key in r), None)

    def curves(self) -> dict[str, Series]:
        """Every training term, averaged over a fortieth of the steps at a time, and the held-out loss."""
        terms = sorted({key for record in self.train.values() for key in record if key.startswith("loss/")})
        curves = {term.removeprefix("loss/"): smooth(series(self.train, term)) for term in terms}
        held_out = series(self.val, "val/loss")
        return {"held-out": held_out, **curves} if held_out[0] else curves


def series(records: dict[int, dict[str, Any]], key: str) -> Series:
    """Steps and values of the records that have `key`."""
    points = [(step, record[key]) for step, record in sorted(records.items()) if key in record]
    return [step for step, _ in points], [value for _, value in points]


def smooth(points: Series) -> Series:
    """Means over consecutive groups of a fortieth of the points each, at the last step of the group."""
    steps, values = points
    size = max(1, len(steps) // 40)
    ends = range(size, len(steps) + 1, size)
    return [steps[end - 1] for end in ends], [sum(values[end - size : end]) / size for end in ends]


def read_run(run: Path) -> tuple[list[StageLog], list[str]]:
    """Logs of the stages found under a run folder, and a sentence for everything that is missing."""
    logs, missing = [], []
    for name, title in STAGES.items():
        if not (run / name / "metrics.jsonl").is_file():
            missing.append(f"{title}: no {name}/metrics.jsonl")
            continue
        log = _read_stage(run / name, title)
        logs.append(log)
        if log.damaged:
            missing.append(f"{title}: {log.damaged} unreadable lines of {name}/metrics.jsonl")
        if log.expect is None:
            missing.append(f"{title}: no `expect` in {name}/config.yaml")
        if log.first("val/loss") is None:
            missing.append(f"{title}: no held-out loss in {name}/metrics.jsonl")
    return logs, missing


def _read_stage(folder: Path, title: str) -> StageLog:
    records: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "val": {}}
    damaged = 0
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            # A resumed run may have written a step twice: what came last counts.
            records[record["kind"]][int(record["step"])] = record
        except (ValueError, TypeError, KeyError):
            damaged += 1
    config = _read_config(folder / "config.yaml")
    expect = config.get("expect")
    expect = float(expect) if isinstance(expect, int | float) else None
    return StageLog(title, records["train"], records["val"], expect, config.get("init"), damaged)


def _read_config(path: Path) -> dict[str, Any]:
    """What a stage was run with; empty where that cannot be read."""
    try:
        import yaml
    except ImportError:
        return {}
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}
