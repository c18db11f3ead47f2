"""Makes what is missing, scores what is unscored, and collects the numbers: every method on every clip.

One unit is a method on a clip. Its frames are written losslessly, then read back and scored, so that what is
scored is what is kept; both are entries of `eval.cache`, and a unit whose entries exist costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from eval.cache import Output, clip_hash, digest
from eval.datasets import TestSet
from eval.methods import Method, fingerprint, finished, finished_outputs, open_method
from eval.units import Job, Unit, fitted
from eval.worker import Worker, run_units
from flashvsr.base.cli import Progress


@dataclass(frozen=True)
class Score:
    """One method on one clip: clip values (None where a metric is not defined) and values of its frames;
    the other fields are those of eval.json, see `eval.results`."""

    method: str
    dataset: str
    clip: str
    frames: int
    height: int
    width: int
    align: str
    note: str
    values: dict[str, float | None]
    per_frame: dict[str, list[float | None]]
    reasons: dict[str, str]
    seconds_per_frame: float | None
    first_output_seconds: float | None
    cached: bool
    timed_on: dict[str, Any] | None
    output: str


@dataclass(frozen=True)
class Outcome:
    """What an evaluation gives; `in_use` is what each method says of itself (decoder, precision...)."""

    scores: list[Score] = field(default_factory=list)
    in_use: dict[str, dict[str, Any]] = field(default_factory=dict)
    fingerprints: dict[str, dict[str, Any]] = field(default_factory=dict)
    made: int = 0  # units that were not complete before


def evaluate(
    methods: Sequence[Method],
    test_sets: Sequence[TestSet],
    job: Job,
    devices: Sequence[str] = ("cpu",),
    *,
    quiet: bool = False,
) -> Outcome:
    """Make and score what the cache does not have, one process per device, and collect everything.

    With one device the work is done in this process. Raises UserError when an output differs from its GT in
    frame count or size, naming the method and the clip; what was complete before that stays.
    """
    job.cache.sweep()
    inputs = hash_inputs(test_sets, quiet)
    prints = {m.name: fingerprint(m, devices[0], job.dtype) for m in methods if m.kind != "outputs"}
    units = [u for m in methods for s in test_sets for u in units_of(m, s, test_sets, inputs, prints, job)]
    before = [job.missing(unit) for unit in units]
    todo = [unit for unit, (output, keys) in zip(units, before, strict=True) if output is None or keys]
    to_make = [unit for unit, (output, _) in zip(units, before, strict=True) if output is None]
    try_out(to_make, devices[0], job.dtype)
    different = {unit.key: unit for unit in to_make}  # two sets may have the same LQ
    frames = sum(u.clip.frames for u in (*different.values(), *todo))
    with Progress(frames, "evaluate", unit="frame", quiet=quiet) as progress:
        if len(devices) == 1 or len(todo) < 2:
            worker = Worker(job, devices[0])
            for unit in todo:
                worker.run(unit, progress.update)
                progress.update(0, method=unit.method.name, clip=unit.clip.name)
        else:
            run_units(todo, job, devices[: len(todo)], progress)
    made = {id(unit) for unit in to_make}
    outcome = Outcome(fingerprints=prints, made=len(todo))
    for unit in units:
        score, in_use = collected(unit, job, cached=id(unit) not in made)
        outcome.scores.append(score)
        outcome.in_use.setdefault(unit.method.name, in_use)
    return outcome


def hash_inputs(test_sets: Sequence[TestSet], quiet: bool) -> dict[tuple[str, str], tuple[str, str | None]]:
    """Hashes of LQ and GT of every clip, by data set and clip."""
    clips = [(test_set.name, clip) for test_set in test_sets for clip in test_set.clips]
    hashes = {}
    with Progress(len(clips), "hash inputs", unit="clip", quiet=quiet) as progress:
        for name, clip in clips:
            hashes[name, clip.name] = clip_hash(clip.lq), clip.gt and clip_hash(clip.gt)
            progress.update()
    return hashes


def units_of(
    method: Method,
    test_set: TestSet,
    test_sets: Sequence[TestSet],
    inputs: dict[tuple[str, str], tuple[str, str | None]],
    prints: dict[str, dict[str, Any]],
    job: Job,
) -> Iterator[Unit]:
    """A method on the clips of one set; finished outputs are measured here, before anything runs."""
    places = {}
    if method.kind == "outputs":
        places = finished_outputs(method, test_set, several=len(test_sets) > 1)
    for clip in test_set.clips:
        unit = Unit(method, test_set, clip, inputs[test_set.name, clip.name])
        if places:
            path = places[clip.name]
            unit = replace(unit, made=Output(path, **finished(method, path, clip, job.align)))
            fitted(unit, unit.made, job.align)
        else:
            made = {"method": prints[method.name], "lq": unit.inputs[0], "frames": clip.frames}
            unit = replace(unit, key=digest(made | {"scale": test_set.scale}))
        yield unit


def try_out(units: Sequence[Unit], device: str, dtype: torch.dtype) -> None:
    """Open every method but the first and drop it again, so that a mistake in the last is found before the
    first has run."""
    methods = {(u.method.name, u.test_set.scale): u for u in units}
    for unit in list(methods.values())[1:]:
        open_method(unit.method, unit.test_set.scale, device, dtype)()


def collected(unit: Unit, job: Job, cached: bool) -> tuple[Score, dict[str, Any]]:
    """A complete unit's numbers from the cache, and what its method said was in use."""
    output, missing = job.missing(unit)
    assert output is not None and not missing
    fit, values, per_frame, reasons = fitted(unit, output, job.align), {}, {}, {}
    for key in job.wanted(unit.clip):
        found = job.cache.score(job.score_key(unit, output, key))
        values[key] = found["clip"]
        # A frame without a value is NaN in the cache.
        per_frame[key] = [None] * found["first"] + [v if v == v else None for v in found["per_frame"]]
        if found["reason"]:
            reasons[key] = found["reason"]
    score = Score(
        method=unit.method.name,
        dataset=unit.test_set.name,
        clip=unit.clip.name,
        frames=fit.frames,
        height=fit.height,
        width=fit.width,
        align=unit.clip.align,
        note=fit.note,
        values=values,
        per_frame=per_frame,
        reasons=reasons,
        seconds_per_frame=output.seconds_per_frame,
        first_output_seconds=output.first_output_seconds,
        cached=cached and unit.made is None,
        timed_on=output.timed_on,
        output=str(output.path),
    )
    return score, output.in_use or {}
