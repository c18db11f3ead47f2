"""How many operations a sample of each stage is, useful and executed, from `flashvsr.flops`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from flashvsr import flops
from flashvsr.attention.plans import CHUNK
from flashvsr.config import ModelConfig
from train.config import TrainConfig
from train.stages.windows import draw_window

Grid = tuple[int, int, int]  # latents, rows, columns of tokens
Operations = tuple[float, float]  # useful, executed


def total(parts: Sequence[Operations]) -> Operations:
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def times(work: Operations, factor: float) -> Operations:
    return work[0] * factor, work[1] * factor


def once(work: flops.Work) -> Operations:
    """A forward without gradient: all of it useful."""
    return work.forward, work.forward


def mean_pairs(config: TrainConfig, sizes: ModelConfig, grid: Grid) -> int:
    """Visible pairs of the sparse plan, mean over the windows that are drawn."""
    s, chunks, draws = config.stage, grid[0] // CHUNK, 20
    windows = [
        draw_window(
            chunks, (a + 0.5) / draws, (b + 0.5) / draws,
            random_window=s.random_window, random_history=s.random_history,
        )
        for a in range(draws) for b in range(draws)
    ]  # fmt: skip
    pairs = {
        w: flops.clip_pairs(sizes.dit, grid, ratio=s.sparse_ratio, window=w) for w in sorted(set(windows))
    }
    return sum(pairs[w] for w in windows) // len(windows)


def dit(sizes: ModelConfig, grids: Sequence[Grid], pairs: int) -> flops.Work:
    tokens = sum(math.prod(grid) for grid in grids)
    return flops.dit(sizes.dit, tokens=tokens, pairs=pairs, segments=len(grids))


def projector(sizes: ModelConfig, grids: Sequence[Grid]) -> list[flops.Work]:
    return [
        flops.projector(sizes.lr_projector, frames=4 * f + 1, height=16 * h, width=16 * w)
        for f, h, w in grids
    ]


def trained(config: TrainConfig, sizes: ModelConfig, grids: Sequence[Grid], pairs: int) -> Operations:
    """Forward and backward of a DiT with its projector."""
    own = dit_training(config, dit(sizes, grids, pairs))
    return total([own, *[work.training() for work in projector(sizes, grids)]])


def dit_training(config: TrainConfig, work: flops.Work) -> Operations:
    """Forward and backward of a DiT; `selective` does not compute attention again."""
    useful, executed = work.training(weights=not config.stage.lora_rank, recompute=config.recomputes)
    return useful, executed - (work.parts["attention"] if config.checkpointing == "selective" else 0)


def lpips(module: nn.Module, height: int, width: int) -> Operations:
    """Of one pair of frames, forward and the backward to one of them; counted by torch on fake tensors."""
    frame = torch.zeros(1, 3, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(frame, frame)
    forward = counter.get_total_flops()
    return 1.5 * forward, 1.5 * forward


def grids(config: TrainConfig) -> list[Grid]:
    """Token grids of a sample's segments."""
    d = config.data
    rows, columns = d.height // 16, d.width // 16
    images = d.images if config.stage.name == "teacher" else 0
    return [(d.latents_per_clip, rows, columns), *[(1, rows, columns)] * images]


def sample(config: TrainConfig, sizes: ModelConfig, grids: Sequence[Grid], pair: Operations) -> Operations:
    """Useful and executed operations of one sample, mean over steps; `pair`: `lpips` of one frame."""
    parts = turns(config, sizes, grids, pair)
    rarely = config.stage.name == "one_step" and "fake" in parts
    often = {"student": 1 / config.stage.student_every} if rarely else {}
    return total([times(work, often.get(name, 1)) for name, work in parts.items()])


def turns(
    config: TrainConfig, sizes: ModelConfig, grids: Sequence[Grid], pair: Operations
) -> dict[str, Operations]:
    """The same of one sample by turn: "prepare", then each role that learns. Windows that are drawn (of
    attention, of decoded latents) count with their means."""
    d, s = config.data, config.stage
    if s.name == "vae":
        return {"vae": _vae(config, sizes, pair)}
    size = {"height": d.height, "width": d.width}
    encodes: list[Operations] = []
    if d.latents == "off" or d.slots is None:
        encodes = [once(flops.vae_encode(sizes.vae, frames=4 * f - 3, **size)) for f, _, _ in grids]
    parts = {"prepare": total(encodes)}
    if s.name == "decoder":
        return parts | {"decoder": _decoder(config, sizes, pair)}
    if s.name == "teacher":
        dense = flops.dense_pairs([math.prod(grid) for grid in grids])
        return parts | {"teacher": trained(config, sizes, grids, dense)}
    pairs = mean_pairs(config, sizes, grids[0])
    learning = trained(config, sizes, grids, pairs)
    if s.name == "sparse_causal":
        return parts | {"student": learning}
    return _one_step(config, sizes, grids, pairs, learning, pair, encodes)


def _vae(config: TrainConfig, sizes: ModelConfig, pair: Operations) -> Operations:
    s = config.stage
    frames = 4 * s.latents - 3
    both = [
        flops.vae_encode(sizes.vae, frames=frames, height=s.crop, width=s.crop).training(
            recompute=config.recomputes
        ),
        flops.vae_decode(sizes.vae, latents=s.latents, height=s.crop, width=s.crop).training(
            inputs=True, recompute=config.recomputes
        ),
    ]
    return total([*both, _perceptual(config, pair, frames)])


def _decoder(config: TrainConfig, sizes: ModelConfig, pair: Operations) -> Operations:
    d, s = config.data, config.stage
    size = {"height": d.height, "width": d.width}
    decoder = flops.tc_decoder(sizes.tc_decoder, latents=s.window, **size)
    before = (d.latents_per_clip - s.window) / 2  # latents that only fill the memory, mean
    parts = [decoder.training(), times(once(decoder), before / s.window)]
    losses = 1
    if s.vae_mse or s.vae_lpips:
        losses = 2
        vae = flops.vae_decode(sizes.vae, latents=s.window, start=False, **size)
        parts.append(times(once(vae), (before + s.window) / s.window))
    parts.append(times(_perceptual(config, pair, 4 * s.window), losses))
    return total(parts)


def _one_step(
    config: TrainConfig,
    sizes: ModelConfig,
    grids: Sequence[Grid],
    pairs: int,
    learning: Operations,
    pair: Operations,
    encodes: Sequence[Operations],
) -> dict[str, Operations]:
    d, s = config.data, config.stage
    dense = dit(sizes, grids, flops.dense_pairs([math.prod(grid) for grid in grids]))
    feeding = [once(work) for work in projector(sizes, grids)]
    vae = flops.vae_decode(sizes.vae, latents=s.pixel_latents, start=False, height=d.height, width=d.width)
    before = (d.latents_per_clip - s.pixel_latents) / 2
    student = [
        learning,
        vae.training(weights=False, inputs=True, recompute=config.recomputes),
        times(once(vae), before / s.pixel_latents),
        _perceptual(config, pair, 4 * s.pixel_latents),
    ]
    if not s.loss.dmd:
        return {"prepare": total(encodes), "student": total(student)}
    student += [once(dense), once(dense)]  # teacher and fake score at the same point
    fake = [
        *feeding,  # the student's own features
        once(dit(sizes, grids, pairs)),
        dit_training(config, dense),
    ]
    prepare = total([*encodes, *feeding])  # the teacher's features
    return {"prepare": prepare, "fake": total(fake), "student": total(student)}


def _perceptual(config: TrainConfig, pair: Operations, frames: int) -> Operations:
    useful, executed = times(pair, frames)
    return useful, executed * (5 / 3 if config.recomputes else 1)
