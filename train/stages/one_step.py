"""Stage 3: the one-step student (paper 3.2, Eq. 2).

student  stage 2's weights, chunk-causal and block-sparse; input pure noise at sigma 1 and LR, nothing of HR:
         z = noise - v. Losses: DMD, and MSE + 2 LPIPS on the frames of two latents.
teacher  stage 1, frozen, dense over the same latents, its own features of the same LR.
fake     starts as the teacher, same attention and features; flow matching on the student's z, every step.

Options: a projector of the fake's own, more weight on a clip's first frame, and steps of plain regression to
the latents of HR before the distillation begins.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashvsr.base.draws import Draw
from flashvsr.flow import add_noise, denoised, shift_sigma
from flashvsr.models.denoiser import Denoiser
from flashvsr.streaming.upscaler import StreamingUpscaler
from flashvsr.weights.folder import ModelInfo
from train.losses.dmd import dmd, dmd_direction
from train.losses.flow_matching import flow_matching
from train.losses.pixel import frame_weights, mse, window_frames
from train.panel import look
from train.stages.feed import Inputs
from train.stages.shared import Loss, Stage
from train.stages.sparse_causal import INFERENCE_WINDOW, attention_in_use, causal_plan, step_window
from train.turns import Losses
from train.validate import run_method

APART_EVERY = 5  # turns of the student


class OneStep(Stage):
    def build(self) -> None:
        self.frozen_vae = self.vae()
        self.encodes = self.config.stage.regression_steps > 0
        self.frozen_vae.checkpointing = self.config.recomputes
        start = self.find("dit", ["sparse", "one-step"] if self.config.init else ["sparse"])
        mode = replace(start.config.lr_projector, mode="causal")
        self.sizes = replace(start.config, lr_projector=mode, vae=self.frozen_vae.config)
        self.fixed_prompt = self.prompt(start.prompt)
        self.in_use = attention_in_use(self)
        student = start.denoiser()
        student.lr_projector.config = mode  # v1's weights learn to be read causally, as they are exported
        self.roles["student"] = self.engine(student)
        self.teacher = None
        if self.config.stage.loss.dmd:
            self.teacher = self.frozen(self.of_stage_1("; without a teacher set stage.loss.dmd=0").denoiser())
            own = self.config.stage.fake_projector == "own"
            projector = copy.deepcopy(self.teacher.lr_projector) if own else None
            fake = Denoiser(copy.deepcopy(self.teacher.dit), projector)
            self.roles["fake"] = self.engine(fake, lr=self.config.stage.fake_lr)

    def prepare(self, micro: Mapping[str, Any], draw: Draw) -> Inputs:
        inputs = self.feed.inputs(micro, segments=1)
        if self.teacher is None:
            return inputs
        with torch.no_grad(), self.autocast():
            return replace(inputs, extra={"features": self.teacher.features(inputs.lr)})

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        learns = (step + 1) % self.config.stage.student_every == 0 or self.teacher is None
        fake = [] if self.teacher is None else [("fake", self.fake_loss)]
        return [*fake, ("student", self.student_loss)] if learns else fake

    def apart(self, step: int) -> bool:
        """MSE and LPIPS taken apart cost a second pass through the VAE's decoder: in the student's first turn
        and every fifth after it."""
        every = 1 if self.teacher is None else self.config.stage.student_every
        return (step + 1) // every % APART_EVERY == 1

    def features_of(self, role: str, inputs: Inputs) -> dict[str, Any]:
        """What the teacher or the fake score is told of LR: the teacher's features, or LR for a projector of
        its own."""
        own = role == "fake" and self.config.stage.fake_projector == "own"
        return {"lr": inputs.lr} if own else {"features": inputs.extra["features"]}

    def student(self, run: Any, inputs: Inputs, draw: Draw, window: int) -> Tensor:
        """z = noise - v at sigma 1, `B 16 n h w`: from noise and LR alone."""
        _, _, frames, height, width = inputs.lr[0].shape
        shape = (self.sizes.dit.in_channels, (frames - 1) // 4, height // 8, width // 8)
        noise = draw.normal("student.noise", shape).to(self.device)
        with self.autocast():
            plan = causal_plan(self, noise, window)
            (v,) = run([noise], torch.ones(inputs.batch, 1, device=self.device), plan, lr=inputs.lr)
        return noise - v.float()

    def fake_loss(self, inputs: Inputs, draw: Draw) -> Losses:
        """Flow matching of the fake score on the student's output, which gets no gradient from it."""
        with torch.no_grad():
            z = self.student(self.roles["student"], inputs, draw, step_window(self, draw))
        noise = self.noise(draw, "fake.noise", z)
        sigma = shift_sigma(draw.uniform("fake.sigma")).to(self.device)
        plan = self.dense_plan([z], self.sizes.dit.head_dim)
        with self.autocast():
            predicted = self.roles["fake"](
                [add_noise(z, noise, sigma)], sigma[:, None], plan, **self.features_of("fake", inputs)
            )
        losses = Losses.of(predicted)
        losses.add("fake", flow_matching(losses.at, [z], [noise]))
        return losses

    def student_loss(self, inputs: Inputs, draw: Draw) -> Losses:
        z = self.student(self.roles["student"], inputs, draw, step_window(self, draw))
        losses, weights = Losses.of([z]), self.config.stage.loss
        (at,) = losses.at
        if draw.step_number < self.config.stage.regression_steps:
            losses.add("regression", mse(at, inputs.latents[0]))
            return losses
        if self.teacher is not None:
            losses.add("dmd", dmd(at, self.direction(at.detach(), inputs, draw)), weights.dmd)
        if weights.mse or weights.lpips:
            self._add_pixels(losses, at, inputs, draw)
        return losses

    def _add_pixels(self, losses: Losses, z: Tensor, inputs: Inputs, draw: Draw) -> None:
        """MSE and LPIPS on the frames of a random window of latents."""
        weights, count = self.config.stage.loss, self.config.stage.pixel_latents
        first = int(draw.step("pixel.window") * (z.shape[2] - count + 1))
        sr, hr = self.vae_frames(z, first, count), inputs.hr[0][:, :, window_frames(first, count)]
        frames = frame_weights(first, sr.shape[2], weights.first_frame, self.device)
        losses.add("mse", mse(sr, hr, frames), weights.mse)
        if weights.lpips:
            losses.add("lpips", self.lpips_loss(sr, hr, frames), weights.lpips)

    @torch.no_grad()
    def direction(self, z: Tensor, inputs: Inputs, draw: Draw) -> Tensor:
        """Where DMD pushes away from: both scores at one shared noisy point."""
        low, high = self.config.stage.dmd_range
        sigma = shift_sigma(draw.uniform("dmd.sigma", low, high)).to(self.device)
        point = add_noise(z, self.noise(draw, "dmd.noise", z), sigma)
        estimates = []
        for role, module in (("teacher", self.teacher), ("fake", self.roles["fake"])):
            plan = self.dense_plan([z], self.sizes.dit.head_dim)
            with self.autocast():
                (v,) = module([point], sigma[:, None], plan, **self.features_of(role, inputs))
            estimates.append(denoised(point, v.float(), sigma))
        return dmd_direction(z, *estimates)

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        """MSE + 2 LPIPS over the whole decoded clip: what one step from noise is worth."""
        z = self.student(self.roles["student"].whole(), inputs, draw, INFERENCE_WINDOW)
        sr = self.vae_frames(z, 0, z.shape[2])
        weights = self.config.stage.loss
        return self.pixel_error(sr, inputs.hr[0], weights.mse, weights.lpips)

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor:
        return run_method(StreamingUpscaler(self.live(), decoder="vae"), sample)

    def panel(self, inputs: Inputs, draw: Draw) -> tuple[dict[str, float], dict[str, Tensor]]:
        return look(self, inputs, draw)

    def model_info(self) -> ModelInfo:
        s = self.config.stage
        return self.info("one-step", sparse_ratio=s.sparse_ratio, steps=1, window=INFERENCE_WINDOW)
