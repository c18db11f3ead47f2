"""Stage 2: the chunk-causal, block-sparse student, from stage 1 (paper 3.2). Videos only, flow matching.

The projector becomes `causal`, on stage 1's weights; one noise level per clip; a random window per step.
Options: sparsity that grows over the first steps, and two more losses against the dense teacher: its
velocity, and its block-pooled attention maps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashvsr.attention.backends import describe
from flashvsr.attention.layout import Block
from flashvsr.attention.plans import CHUNK, SparseCausal, training_ratio
from flashvsr.base.draws import Draw
from flashvsr.flow import add_noise, shift_sigma
from flashvsr.streaming.clip import ClipUpscaler
from flashvsr.weights.folder import ModelInfo
from train.losses.attention_kl import Pooled, attention_kl, visible_blocks
from train.losses.flow_matching import flow_matching, per_sample
from train.stages.feed import Inputs
from train.stages.maps import Watched
from train.stages.shared import Loss, Stage
from train.stages.windows import draw_window, ramped
from train.turns import Losses
from train.validate import run_method

INFERENCE_WINDOW = 4  # three past chunks and the current one, as the release streams


def causal_plan(stage: Stage, latent: Tensor, window: int, ratio: float | None = None) -> SparseCausal:
    """The student's plan at the training size, where the top-k ratio is `ratio` (default: sparse_ratio)."""
    d, dit = stage.config.data, stage.sizes.dit
    ratio = stage.config.stage.sparse_ratio if ratio is None else ratio
    return SparseCausal(
        (latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2),
        block=dit.block,
        head_dim=dit.head_dim,
        ratio=training_ratio(ratio, d.height * d.width, d.height, d.width),
        window=window,
        backend=stage.config.stage.attention,
        device=stage.device,
    )


def attention_in_use(stage: Stage) -> dict[str, str]:
    """The backend behind `stage.attention`, in words; UserError where it cannot run."""
    dit = stage.sizes.dit
    dtype = torch.float32 if stage.config.precision == "fp32" else torch.bfloat16
    backend = stage.config.stage.attention
    return {"attention": describe(backend, stage.device, dtype, dit.head_dim, math.prod(dit.block))}


def step_window(stage: Stage, draw: Draw) -> int:
    """This step's window, the same on every rank."""
    s = stage.config.stage
    return draw_window(
        stage.config.data.latents_per_clip // CHUNK,
        draw.step("window"),
        draw.step("history"),
        random_window=s.random_window,
        random_history=s.random_history,
    )


class SparseCausalStudent(Stage):
    def build(self) -> None:
        self.frozen_vae = self.vae()
        start = self.find("dit", ["teacher", "sparse", "one-step"] if self.config.init else ["teacher"])
        self.sizes = replace(
            start.config,
            lr_projector=replace(start.config.lr_projector, mode="causal"),
            vae=self.frozen_vae.config,
        )
        self.fixed_prompt = self.prompt(start.prompt)
        denoiser = start.denoiser()
        denoiser.lr_projector.config = self.sizes.lr_projector
        self.in_use = attention_in_use(self)
        self.roles["student"] = self.engine(denoiser)
        loss = self.config.stage.loss
        wanted = loss.teacher or loss.attention_kl
        self.teacher = self.frozen(self.of_stage_1().denoiser()) if wanted else None

    def prepare(self, micro: Mapping[str, Any], draw: Draw) -> Inputs:
        return self.feed.inputs(micro, segments=1)

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        return [("student", self.flow_loss)]

    def _question(self, inputs: Inputs, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Noise, noisy latents and sigma: what student and teacher are asked about."""
        (x0,) = inputs.latents
        noise = self.noise(draw, "noise", x0)
        sigma = shift_sigma(draw.uniform("sigma")).to(self.device)
        return noise, add_noise(x0, noise, sigma), sigma[:, None]

    def flow_loss(self, inputs: Inputs, draw: Draw) -> Losses:
        s = self.config.stage
        noise, noisy, sigma = self._question(inputs, draw)
        ratio = ramped(draw.step_number, s.sparse_ratio, s.sparse_start, s.sparse_ramp)
        plan = causal_plan(self, noisy, step_window(self, draw), ratio)
        watched = Watched(plan, plan.block) if s.loss.attention_kl else plan
        with self.autocast():
            (v,) = self.roles["student"]([noisy], sigma, watched, lr=inputs.lr)
        maps = [x for layer in watched.layers() for x in layer] if s.loss.attention_kl else []
        losses = Losses.of([v, *maps])
        at, *maps = losses.at
        losses.add("flow", flow_matching([at], inputs.latents, [noise]), s.loss.flow)
        if self.teacher is not None:
            target, dense = self._ask_teacher(noisy, sigma, inputs, plan.block)
            if s.loss.teacher:
                losses.add("teacher", per_sample((at.float() - target.float()).square()), s.loss.teacher)
            if s.loss.attention_kl:
                seen = visible_blocks(plan.visible, plan.per_chunk, self.device)
                pairs = list(zip(maps[::2], maps[1::2], strict=True))
                losses.add("attention_kl", attention_kl(pairs, dense, seen), s.loss.attention_kl)
        return losses

    @torch.no_grad()
    def _ask_teacher(
        self, noisy: Tensor, sigma: Tensor, inputs: Inputs, block: Block
    ) -> tuple[Tensor, list[Pooled]]:
        """The dense teacher's velocity at the same point, and its pooled queries and keys per layer."""
        grid = (noisy.shape[2], noisy.shape[3] // 2, noisy.shape[4] // 2)
        plan = Watched(self.dense_plan([noisy], self.sizes.dit.head_dim), block, grid)
        with self.autocast():
            (v,) = self.teacher([noisy], sigma, plan, lr=inputs.lr)
        return v, plan.layers()

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        noise, noisy, sigma = self._question(inputs, draw)
        plan, student = causal_plan(self, noisy, INFERENCE_WINDOW), self.roles["student"].whole()
        with self.autocast():
            predicted = student([noisy], sigma, plan, lr=inputs.lr)
        return flow_matching(predicted, inputs.latents, [noise])

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor:
        return run_method(ClipUpscaler(self.live(), steps=self.config.stage.validation_steps), sample)

    def model_info(self) -> ModelInfo:
        s = self.config.stage
        return self.info(
            "sparse", sparse_ratio=s.sparse_ratio, steps=s.validation_steps, window=INFERENCE_WINDOW
        )
