"""Stage 2: the chunk-causal, block-sparse student, from stage 1 (paper 3.2). Videos only, flow matching.

The projector becomes `causal`, on stage 1's weights; one noise level per clip; a random window per step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashvsr.attention.backends import describe
from flashvsr.attention.plans import CHUNK, SparseCausal, training_ratio
from flashvsr.base.draws import Draw
from flashvsr.flow import add_noise, shift_sigma
from flashvsr.streaming.clip import ClipUpscaler
from flashvsr.weights.folder import ModelInfo
from train.losses.flow_matching import flow_matching
from train.stages.feed import Inputs
from train.stages.shared import Loss, Stage
from train.stages.windows import draw_window
from train.turns import Losses
from train.validate import run_method

INFERENCE_WINDOW = 4  # three past chunks and the current one, as the release streams


def causal_plan(stage: Stage, latent: Tensor, window: int) -> SparseCausal:
    """The student's plan at the training size, where the top-k ratio is `sparse_ratio` itself."""
    d, dit = stage.config.data, stage.sizes.dit
    return SparseCausal(
        (latent.shape[2], latent.shape[3] // 2, latent.shape[4] // 2),
        block=dit.block,
        head_dim=dit.head_dim,
        ratio=training_ratio(stage.config.stage.sparse_ratio, d.height * d.width, d.height, d.width),
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

    def prepare(self, micro: Mapping[str, Any], draw: Draw) -> Inputs:
        return self.feed.inputs(micro, segments=1)

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        return [("student", self.flow_loss)]

    def _predict(self, run: Any, inputs: Inputs, draw: Draw, window: int) -> tuple[list[Tensor], Tensor]:
        (x0,) = inputs.latents
        noise = self.noise(draw, "noise", x0)
        sigma = shift_sigma(draw.uniform("sigma")).to(self.device)
        with self.autocast():
            plan = causal_plan(self, x0, window)
            return run([add_noise(x0, noise, sigma)], sigma[:, None], plan, lr=inputs.lr), noise

    def flow_loss(self, inputs: Inputs, draw: Draw) -> Losses:
        predicted, noise = self._predict(self.roles["student"], inputs, draw, step_window(self, draw))
        losses = Losses.of(predicted)
        losses.add("flow", flow_matching(losses.at, inputs.latents, [noise]))
        return losses

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        predicted, noise = self._predict(self.roles["student"].whole(), inputs, draw, INFERENCE_WINDOW)
        return flow_matching(predicted, inputs.latents, [noise])

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor:
        return run_method(ClipUpscaler(self.live(), steps=self.config.stage.validation_steps), sample)

    def model_info(self) -> ModelInfo:
        s = self.config.stage
        return self.info(
            "sparse", sparse_ratio=s.sparse_ratio, steps=s.validation_steps, window=INFERENCE_WINDOW
        )
