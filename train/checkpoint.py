"""Checkpoints: complete or absent, hashed, and strict about every item on the way back.

    FOLDER/step-000040/
        student.safetensors  student.optimizer.safetensors  student.ema.safetensors   one file per part
        state.json       what is not a tensor: stage, sample counter, resolved config, ...
        manifest.json    format version, size and SHA-256 of every other file; written last

A checkpoint is written beside its place and renamed, and renamed before it is removed, so a reader sees all
of it or nothing. Optimiser state is whole and keyed by parameter name, so that any world size can read it.
Which one is the newest its step says: no time of a file counts.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic_dir, read_json, sha256, write_json
from flashvsr.weights.tensors import write_safetensors

FORMAT = 2  # 2: state.json holds sample counter, W&B id and corpus
MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})")

# What AdamW keeps per parameter; "step" is there from the start, the moments from the first gradient on.
MOMENTS = ("exp_avg", "exp_avg_sq")


def save(
    folder: Path,
    step: int,
    parts: Iterable[tuple[str, Mapping[str, Tensor]]],
    meta: Mapping[str, Any],
    keep_last: int,
    keep_every: int = 0,
) -> Path:
    """Writes `folder`/step-NNNNNN and removes what it replaces; returns its path.

    `parts` (name, tensors) may be made one by one as they are written. After success the newest `keep_last`
    checkpoints up to this step stay, and of the older ones those whose step is a multiple of `keep_every` (0:
    none). A later one belongs to a future that was given up by resuming from an earlier step; it is removed
    too, or it would be resumed from next. `meta` must hold "stage" and be JSON; only the main rank calls
    this, with whole tensors.

    Raises:
        UserError: the disk is full or the folder cannot be written; what was there stays as it was.
    """
    assert "stage" in meta and keep_last >= 1, (meta.keys(), keep_last)
    path = folder / f"step-{step:06d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(folder)
        names = []
        with atomic_dir(path, replace=True) as aside:
            for part, tensors in parts:
                write_safetensors(aside / f"{part}.safetensors", tensors, {})
                names.append(part)
            write_json(aside / STATE, {**meta, "step": step})
            files = {
                f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)} for f in sorted(aside.iterdir())
            }
            write_json(aside / MANIFEST, {"format": FORMAT, "parts": names, "files": files})
        for other, place in _steps(folder):
            if other > step:
                _remove(place)
        _remove_older(folder, step, keep_last, keep_every)
    except OSError as error:
        raise UserError(
            f"the checkpoint {path} could not be written ({error.strerror or error}): make room or make the "
            "folder writable, then the same command goes on from the checkpoint before it"
        ) from error
    return path


def tidy(folder: Path, step: int, keep_last: int, keep_every: int = 0) -> None:
    """Ends what a save of `step` began that was killed behind its last file: removes unfinished folders, and
    the checkpoints before it that it would have removed. Later ones stay until the next save. Safe while
    other ranks look for the newest.

    Raises:
        UserError: something cannot be removed.
    """
    try:
        _remove_unfinished(folder)
        _remove_older(folder, step, keep_last, keep_every)
    except OSError as error:
        raise UserError(
            f"old checkpoints in {folder} could not be removed ({error.strerror or error}): make the folder "
            "writable, then the same command goes on"
        ) from error


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of `folder`, or None; a torn one is skipped with a sentence."""
    for _, path in reversed(_steps(folder)):
        if (torn := _torn(path)) is None:
            return path
        print(f"skipping the incomplete checkpoint {path}: {torn}", file=sys.stderr)
    return None


class Restored:
    """A verified checkpoint being taken apart: every part and every item of the state must be taken, and
    `finish` called after the last.
    """

    def __init__(self, path: Path, state: dict[str, Any], parts: list[str], map_location: str) -> None:
        self.path, self.step, self.stage = path, int(state["step"]), state["stage"]
        self._state = {key: value for key, value in state.items() if key not in ("step", "stage")}
        self._left, self._map_location = list(parts), map_location

    def state(self, key: str) -> Any:
        """One item of what `save` was given as `meta`; UserError when it is not there (or was taken)."""
        if key not in self._state:
            raise UserError(f"{self.path / STATE} says nothing of {key!r}: it was made by another version")
        return self._state.pop(key)

    def take(self, part: str) -> dict[str, Tensor]:
        """The tensors of one part by name; UserError when it is not there (or was taken already)."""
        if part not in self._left:
            there = ", ".join(self._left) or "nothing"
            raise UserError(
                f"{self.path} has no part {part!r} left, only {there}: it was made by another setting"
            )
        self._left.remove(part)
        return load_file(self.path / f"{part}.safetensors", device=self._map_location)

    def finish(self) -> None:
        """UserError when something was saved that nobody took."""
        if left := [*self._left, *self._state]:
            raise UserError(
                f"{self.path} holds {', '.join(left)}, which this run does not use: "
                "resume with the setting it was made by, or give another run=NAME"
            )


def load(path: Path, map_location: str = "cpu", *, stage: str | None = None) -> Restored:
    """Opens a checkpoint after checking every byte of it against its manifest.

    Raises:
        UserError: not a checkpoint, another format version, another stage than `stage`, or a damaged file.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path} has checkpoint format {manifest.get('format')!r}, this version reads {FORMAT}: "
            "use the version that wrote it"
        )
    if torn := _torn(path):
        raise UserError(f"{path} is incomplete ({torn}): {_BEFORE}")
    for name, entry in manifest["files"].items():
        if sha256(path / name) != entry["sha256"]:
            raise UserError(f"{path / name} does not match its hash, it is damaged: {_BEFORE}")
    state = read_json(path / STATE)
    if stage is not None and state["stage"] != stage:
        raise UserError(f"{path} is a checkpoint of stage {state['stage']!r}, not of {stage!r}: {_BEFORE}")
    return Restored(path, state, manifest["parts"], map_location)


_BEFORE = "delete this folder to go on from the checkpoint before it"


def optimizer_tensors(optimizer: AdamW, named_params: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """AdamW's whole state as `<parameter>/step`, `<parameter>/exp_avg`, `<parameter>/exp_avg_sq`.

    A parameter that has had no gradient yet has only its step, 0. Learning rate, betas and weight decay are
    the config's, not the state's.
    """
    tensors: dict[str, Tensor] = {}
    for name, param in _optimized(optimizer, named_params).items():
        state = optimizer.state.get(param, {})
        tensors[f"{name}/step"] = torch.as_tensor(state.get("step", 0.0), dtype=torch.float32).detach()
        tensors.update({f"{name}/{key}": state[key].detach() for key in MOMENTS if key in state})
    return tensors


@torch.no_grad()
def load_optimizer(
    optimizer: AdamW, named_params: Mapping[str, Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Restores what `optimizer_tensors` gave, bit for bit, onto the parameters' devices and memory layouts.

    Raises:
        UserError: a tensor too many, too few or of another shape; nothing is changed then.
    """
    params = _optimized(optimizer, named_params)
    states: dict[Parameter, dict[str, Tensor]] = {}
    left = dict(tensors)
    for name, param in params.items():
        steps = left.pop(f"{name}/step", None)
        if steps is None:
            raise UserError(f"the saved optimiser has no state of {name!r}: it trained other parameters")
        if steps.item() == 0:
            continue
        # The fused kernels want the count on the parameter's device, the others on the CPU.
        state = {"step": steps.to(param.device if optimizer.defaults["fused"] else "cpu", copy=True)}
        for key in MOMENTS:
            moment = left.pop(f"{name}/{key}", None)
            if moment is None or moment.shape != param.shape:
                shape = "absent" if moment is None else str(tuple(moment.shape))
                raise UserError(f"the saved optimiser's {name}/{key} is {shape}, not {tuple(param.shape)}")
            state[key] = torch.empty_like(param, dtype=moment.dtype).copy_(moment)
        states[param] = state
    if left:
        raise UserError(
            f"the saved optimiser has {next(iter(left))!r}, which is not trained here ({len(left)} too many)"
        )
    optimizer.state.clear()
    optimizer.state.update(states)


def _optimized(optimizer: AdamW, named_params: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """The parameters the optimiser steps, by name, in the order of `named_params`."""
    stepped = {p for group in optimizer.param_groups for p in group["params"]}
    params = {name: p for name, p in named_params.items() if p in stepped}
    assert len(params) == len(stepped), "an optimised parameter has no name, or two"
    return params


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoint folders by step, complete or not, oldest first."""
    if not folder.is_dir():
        return []
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def _torn(path: Path) -> str | None:
    """What is wrong with a checkpoint as far as names and sizes tell, or None."""
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} is missing"
    try:
        files = read_json(path / MANIFEST)["files"]
    except (UserError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, entry in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != entry["bytes"]:
            return f"{name} has {(path / name).stat().st_size} bytes instead of {entry['bytes']}"
    return None


def _remove(path: Path) -> None:
    """Removes a checkpoint in one step as far as readers see."""
    aside = path.with_name(f".{path.name}.old.part")
    path.rename(aside)
    shutil.rmtree(aside)


def _remove_older(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Of the checkpoints up to `step` the newest `keep_last` stay, and the multiples of `keep_every`."""
    older = [(s, path) for s, path in reversed(_steps(folder)) if s <= step]
    for other, place in older[keep_last:]:
        if not keep_every or other % keep_every:
            _remove(place)


def _remove_unfinished(folder: Path) -> None:
    """Removes what killed saves left; there is one writer per run directory (`train.lock`)."""
    for path in folder.glob(".step-*.part"):
        shutil.rmtree(path)
