"""Held-out clips, judged by the functions of `eval` and through the methods that serve inference.

Every validation uses the same clips and the same draws, so that two values of one run compare. Ranks share
the clips, with as many calls on each (some do one again), and every number is the same for any of them.

What was judged lies losslessly in samples/, as a test set with its outputs: GT/, LQ/ and SR/ (of the last
validation), so that `python -m eval --method sr=samples/SR --data samples` gives the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval.metrics import metrics_for
from flashvsr.base.draws import Draw
from flashvsr.base.files import atomic
from flashvsr.base.resize import bicubic_8bit
from flashvsr.base.video_io import VideoWriter, read_frames
from train.launch import World

if TYPE_CHECKING:
    from train.stages.feed import Inputs
    from train.stages.shared import Stage

VALIDATION_STEP = -1  # the step of all validation draws
METRICS = ("psnr", "ssim", "lpips", "tdiff", "chunk_edge_ratio")
TITLE = 14  # pixels above a picture of the panel
FPS = 10  # of the videos: slow enough to see what flickers
SHOWN = (480, 640)  # at most so much of the middle of a frame stands in a video, at its own resolution


def run_method(method: Any, sample: Mapping[str, Any]) -> Tensor:
    """LR frames of a sample through a method with push and flush -> uint8 `F H W 3`, as many as HR has."""
    frames = sample["segments"][0]["lr"].permute(1, 2, 3, 0).numpy()
    parts = [method.push(frames), method.flush()]
    sr = torch.from_numpy(np.concatenate([np.asarray(p) for p in parts]))
    return sr[: len(frames) - 4]


def shares(count: int, world: World) -> Iterator[tuple[int, bool]]:
    """This rank's items of `count`, as many as every other rank's; False for those that another one owns."""
    for first in range(0, count, world.size):
        index = first + world.rank
        yield index % count, index < count


def gathered(
    rows: Mapping[int, Mapping[str, float | None]], names: Sequence[str], count: int, world: World
) -> dict[str, float]:
    """Means over `count` items of the numbers of which each rank has its own rows; without those that are
    not defined (None). All ranks call it."""
    table = torch.zeros(count, len(names), dtype=torch.float64)
    for index, row in rows.items():
        values = [math.nan if row[name] is None else row[name] for name in names]
        table[index] = torch.tensor(values, dtype=torch.float64)
    means = world.all_reduce_sum(table).nanmean(0).tolist()  # one rank fills each row: nothing is rounded
    return {name: value for name, value in zip(names, means, strict=True) if not math.isnan(value)}


class Validation:
    """The held-out clips of a stage, loaded once."""

    def __init__(self, stage: Stage):
        self.stage, self.folder = stage, stage.config.stage_dir / "samples"
        d = stage.config.data
        self.count, self.shown = d.val_slots, min(d.val_pictures, d.val_slots)
        clips = stage.feed.clips("val")
        self.samples = {
            i: clips.sample(i)
            for count in (self.count, self.shown)
            for i, _ in shares(count, stage.world)
        }  # fmt: skip
        self.suite = metrics_for(
            METRICS if self.shown else (), device=stage.device, lpips=stage.lpips if self.shown else None
        )
        self.names = [metric.key for metric in self.suite.metrics]
        self.bicubic = self._bicubic()

    @torch.no_grad()
    def __call__(self, step: int) -> tuple[dict[str, float], dict[str, Path]]:
        """val/loss, val/psnr, ... of the live model, bicubic's beside them; pictures and videos by name."""
        stage, world = self.stage, self.stage.world
        modes = {name: engine.module.training for name, engine in stage.roles.items()}
        for engine in stage.roles.values():
            engine.module.eval()
        losses, scores = {}, {}
        for i, own in shares(self.count, world):
            loss = self._loss(i)
            if own:
                losses[i] = {"loss": loss}
        for i, own in shares(self.shown, world):
            sr = stage.upscaled(self.samples[i])
            if own:
                scores[i] = self._scores(i, sr)
                write_frames(self.folder / "SR" / _name(i), sr)
                self._video(self.folder / _media(step, i), i, sr)
        looked, panel = stage.panel(*self._inputs(min(self.samples)))  # of the first clip, on the main rank
        for name, engine in stage.roles.items():
            engine.module.train(modes[name])
        record = gathered(losses, ["loss"], self.count, world)
        record |= gathered(scores, self.names, self.shown, world)
        record = {f"val/{name}": value for name, value in record.items()} | self.bicubic | looked
        world.barrier()  # the frames of all ranks are there
        if not world.is_main:
            return record, {}
        return record, (self._picture(step) if self.shown else {}) | self._draw(step, panel)

    def _loss(self, index: int) -> float:
        return self.stage.held_out(*self._inputs(index)).item()

    def _inputs(self, index: int) -> tuple[Inputs, Draw]:
        """A whole held-out clip: prepared as in training, but never cropped; and its draws."""
        stage, sample = self.stage, self.samples[index]
        draw = Draw(stage.config.seed, VALIDATION_STEP, [index])
        micro = {"segments": [{k: v[None] for k, v in s.items()} for s in sample["segments"]]}
        if stage.frozen_vae is None:
            return stage.feed.inputs(micro, segments=1), draw
        return stage.prepare(micro, draw), draw

    def _hr(self, index: int) -> Tensor:
        hr = self.samples[index]["segments"][0]["hr"].permute(1, 2, 3, 0)
        return hr[: hr.shape[0] - 4]

    def _lr(self, index: int) -> Tensor:
        lr = self.samples[index]["segments"][0]["lr"].permute(1, 2, 3, 0)
        return lr[: lr.shape[0] - 4]

    def _scores(self, index: int, sr: Tensor) -> dict[str, float | None]:
        clip = self.suite.start()
        clip.push(sr, self._hr(index))
        return {name: values.clip for name, values in clip.finish().items()}

    def _bicubic(self) -> dict[str, float]:
        """Scores of bicubic enlargement; writes the clips that are shown."""
        scores = {}
        for i, own in shares(self.shown, self.stage.world):
            if own:
                lr, hr = self._lr(i), self._hr(i)
                up = bicubic_8bit(lr.movedim(-1, 1), tuple(hr.shape[1:3])).movedim(1, -1)
                scores[i] = self._scores(i, up)
                write_frames(self.folder / "GT" / _name(i), hr)
                write_frames(self.folder / "LQ" / _name(i), lr)
        means = gathered(scores, self.names, self.shown, self.stage.world)
        return {f"bicubic/{name}": value for name, value in means.items()}

    def _video(self, path: Path, index: int, sr: Tensor) -> None:
        """LR (enlarged) | SR | HR, the middle of the frames."""
        hr, lr = self._hr(index), self._lr(index)
        top, left = (max((side - most) // 2, 0) for side, most in zip(hr.shape[1:3], SHOWN, strict=True))
        parts = [x[:, top : top + SHOWN[0], left : left + SHOWN[1]] for x in (enlarged(lr, hr), sr.cpu(), hr)]
        frames = torch.cat(parts, 2).numpy()
        with VideoWriter(path, FPS, *frames.shape[1:3], crf=18) as video:
            video.write(frames)

    def _picture(self, step: int) -> dict[str, Path]:
        """LR (enlarged) | SR | HR of every shown clip's middle frame as samples/step-NNNNNN.png; that and the
        videos, by name."""
        from PIL import Image

        rows, media = [], {}
        for i in range(self.shown):
            lr, sr, hr = (self._middle(side, i) for side in ("LQ", "SR", "GT"))
            rows.append(torch.cat([enlarged(lr, hr), sr, hr], 2)[0])
            media[f"video/{_name(i)}"] = self.folder / _media(step, i)
        path = self.folder / f"step-{step:06d}.png"
        with atomic(path) as part:
            Image.fromarray(torch.cat(rows).numpy()).save(part, format="PNG")
        return {"picture": path, **media}

    def _draw(self, step: int, panel: Mapping[str, Tensor]) -> dict[str, Path]:
        """The stage's panel as samples/panel-NNNNNN.png, if it has one."""
        if not panel:
            return {}
        path = self.folder / f"panel-{step:06d}.png"
        draw_panel(path, panel)
        return {"panel": path}

    def _middle(self, side: str, index: int) -> Tensor:
        """The middle frame of a clip that some rank wrote, `1 H W 3`."""
        frames = 4 * self.stage.config.data.latents_per_clip - 3
        (frame,) = read_frames(self.folder / side / _name(index), start=frames // 2, count=1)
        return torch.from_numpy(frame)[None]


def enlarged(lr: Tensor, hr: Tensor) -> Tensor:
    """LR frames at HR's size, pixel by pixel, `F H W 3`."""
    scale = hr.shape[1] // lr.shape[1]
    return lr.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def write_frames(folder: Path, frames: Tensor) -> None:
    """uint8 `F H W 3` as PNG files; an older clip in its place goes."""
    with VideoWriter(f"{folder}/", FPS, *frames.shape[1:3]) as writer:
        writer.write(frames.cpu().numpy())


def _name(index: int) -> str:
    return f"clip-{index}"


def _media(step: int, index: int) -> str:
    return f"step-{step:06d}-{_name(index)}.mp4"


def draw_panel(path: Path, pictures: Mapping[str, Tensor]) -> None:
    """The pictures beside each other under their names, as a PNG."""
    from PIL import Image, ImageDraw

    height, width = next(iter(pictures.values())).shape[:2]
    sheet = Image.new("RGB", (width * len(pictures), height + TITLE), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (name, picture) in enumerate(pictures.items()):
        pen.text((i * width + 3, 1), name, fill="black")
        sheet.paste(Image.fromarray(picture.cpu().numpy()), (i * width, TITLE))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part:
        sheet.save(part, format="PNG")
