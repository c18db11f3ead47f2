"""Where numbers and pictures go beside metrics.jsonl: W&B, TensorBoard, trackio, each only when asked.

A tracker is an `id`, `log(step, numbers)`, `media(step, name, path)` of a .png or .mp4 file, and `close()`.
"""

from __future__ import annotations

import json
import platform
import secrets
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from flashvsr.base.cli import UserError
from train.config import Log

INIT_SECONDS = 30  # how long W&B may look for its server before the run goes on offline
FINISH_SECONDS = 300.0  # and send what is left at the end; `wandb sync` sends the rest


class Tracker(Protocol):
    id: str

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def media(self, step: int, name: str, path: Path) -> None: ...
    def close(self) -> None: ...


class Wandb:
    """A W&B run; a resumed one goes on under the id it had.

    Offline without a key, and when a key is there but no server answers (`wandb sync` sends it later).
    """

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any], run_id: str | None):
        try:
            import wandb
        except ImportError as error:
            raise UserError("log.wandb=true, but wandb is not installed: pip install wandb") from error
        self._wandb, self.id = wandb, run_id or secrets.token_hex(4)
        settings = wandb.Settings(
            init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS, console="off", silent=True
        )
        given = {
            "project": project, "name": name, "id": self.id, "config": dict(config),
            "dir": str(folder), "resume": "allow", "settings": settings,
        }  # fmt: skip
        if not wandb.login(prompt=False, verify=False):  # no key
            self._run = wandb.init(**given, mode="offline")
            return
        try:
            self._run = wandb.init(**given)
        except wandb.Error as error:
            reason = str(error).splitlines()[0]
            print(f"W&B cannot be reached ({reason}): logging offline, `wandb sync` later", file=sys.stderr)
            wandb.teardown()  # else the id counts as in use
            self._run = wandb.init(**given, mode="offline")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def media(self, step: int, name: str, path: Path) -> None:
        kind = self._wandb.Image if path.suffix == ".png" else self._wandb.Video
        self._run.log({name: kind(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class TensorBoard:
    """Event files in the stage's folder tensorboard/; pictures, but no videos."""

    def __init__(self, folder: Path, config: Mapping[str, Any], start: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UserError(
                "log.tensorboard=true, but tensorboard is not installed: pip install tensorboard"
            ) from error
        self.id = str(folder / "tensorboard")
        self._writer = SummaryWriter(self.id, purge_step=start + 1 if start else 0)
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def media(self, step: int, name: str, path: Path) -> None:
        if path.suffix == ".png":
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                self._writer.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A trackio run of the same name every time."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any], start: int):
        try:
            import trackio
        except ImportError as error:
            raise UserError("log.trackio=true, but trackio is not installed: pip install trackio") from error
        self._trackio, self.id = trackio, name
        trackio.init(project=project, name=name, config=dict(config), resume="allow" if start else "never")

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def media(self, step: int, name: str, path: Path) -> None:
        kind = self._trackio.Image if path.suffix == ".png" else self._trackio.Video
        self._trackio.log({name: kind(str(path))}, step=step)

    def close(self) -> None:
        self._trackio.finish()


def start_trackers(
    log: Log, folder: Path, name: str, config: Mapping[str, Any], start: int, wandb_id: str | None
) -> list[Tracker]:
    """Those that `log` asks for, told what is run (`config`); `start` is the step it goes on from.

    Raises:
        UserError: the package of one is not installed.
    """
    trackers: list[Tracker] = []
    if log.wandb:
        trackers.append(Wandb(folder, log.project, name, config, wandb_id))
    if log.tensorboard:
        trackers.append(TensorBoard(folder, config, start))
    if log.trackio:
        trackers.append(Trackio(log.project, name, config, start))
    return trackers


def versions() -> dict[str, str | None]:
    """Of what computes: Python, torch, CUDA, and the packages a run may use."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for package in ("flashvsr", "accelerate", "deepspeed", "triton", "lpips", "av", "wandb"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
