"""Stage 1: the joint image-video teacher. Dense attention inside each segment, flow matching (paper 3.2).

A sample is one pack: a video and k images. Every segment has its own noise level, positions and share of the
loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.base.draws import Draw
from flashvsr.flow import add_noise, shift_sigma
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.streaming.clip import ClipUpscaler
from flashvsr.weights.folder import ModelInfo
from train.losses.flow_matching import flow_matching
from train.stages.feed import Inputs
from train.stages.shared import LOADED, Loss, Stage
from train.turns import Losses
from train.validate import run_method


def fresh_denoiser(config, mode: str) -> Denoiser:
    """A DiT and projector from scratch. The velocity head starts at zero: the first loss is E|v|^2."""
    dit, projector = DiT(config.dit), LRProjector(replace(config.lr_projector, mode=mode))
    torch.nn.init.zeros_(dit.head.head.weight)
    torch.nn.init.zeros_(dit.head.head.bias)
    return Denoiser(dit, projector)


class Teacher(Stage):
    def build(self) -> None:
        mode = self.config.stage.projector_mode
        self.frozen_vae = self.vae()
        start = None
        if self.config.init is not None:
            import flashvsr

            loaded = flashvsr.load(self.config.init, parts=LOADED["dit"])
            start = loaded if loaded.dit is not None else None
        if start is None:
            if self.config.stage.lora_rank:  # the fresh head is zero and would stay so: nothing would learn
                raise UserError(
                    f"stage.lora_rank={self.config.stage.lora_rank} adapts a trained DiT: give its folder "
                    "with init=, or train from scratch with stage.lora_rank=0"
                )
            self.sizes, prompt = self.model_config(), self.prompt(None)
            denoiser = fresh_denoiser(self.sizes, mode)
        else:
            self.sizes, prompt = start.config, self.prompt(start.prompt)
            projector = start.lr_projector or LRProjector(replace(self.sizes.lr_projector, mode=mode))
            denoiser = Denoiser(start.dit, projector)
        projector = replace(self.sizes.lr_projector, mode=mode)
        denoiser.lr_projector.config = projector
        self.sizes = replace(self.sizes, lr_projector=projector, vae=self.frozen_vae.config)
        self.fixed_prompt = prompt
        denoiser.dit.set_prompt(prompt)
        self.roles["teacher"] = self.engine(denoiser)

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        return [("teacher", self.flow_loss)]

    def _predict(self, run: Any, inputs: Inputs, draw: Draw) -> tuple[list[Tensor], list[Tensor]]:
        """Velocities and the noise they were asked about, per segment."""
        noise, noisy, sigmas = [], [], []
        for i, x0 in enumerate(inputs.latents):
            noise.append(self.noise(draw, f"noise.{i}", x0))
            sigmas.append(shift_sigma(draw.uniform(f"sigma.{i}")).to(self.device))
            noisy.append(add_noise(x0, noise[-1], sigmas[-1]))
        plan = self.dense_plan(noisy, self.sizes.dit.head_dim)
        with self.autocast():
            return run(noisy, torch.stack(sigmas, 1), plan, lr=inputs.lr), noise

    def flow_loss(self, inputs: Inputs, draw: Draw) -> Losses:
        predicted, noise = self._predict(self.roles["teacher"], inputs, draw)
        losses = Losses.of(predicted)
        losses.add("flow", flow_matching(losses.at, inputs.latents, noise))
        return losses

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        predicted, noise = self._predict(self.roles["teacher"].whole(), inputs, draw)
        return flow_matching(predicted, inputs.latents, noise)

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor:
        return run_method(ClipUpscaler(self.live(), steps=self.config.stage.validation_steps), sample)

    def model_info(self) -> ModelInfo:
        mode = self.config.stage.projector_mode
        return self.info("teacher", projector_mode=mode, steps=self.config.stage.validation_steps)
