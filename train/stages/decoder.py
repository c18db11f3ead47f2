"""The tiny conditional decoder (paper 3.4, Eq. 3): MSE + 2 LPIPS, to HR and to the VAE decoder's output.

Learns on VAE latents of HR, or on those that the student makes of LR, which are what it decodes in use. Each
step decodes a random window of latents with gradient; earlier ones fill the memory of both decoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import flashvsr
from flashvsr.attention.plans import SparseCausal, training_ratio
from flashvsr.base.draws import Draw
from flashvsr.base.resize import to_uint8
from flashvsr.config import TCDecoderConfig
from flashvsr.models.tc_decoder import MemBlock, TCDecoder
from flashvsr.weights.folder import ModelInfo
from train.losses.pixel import decode_window, difference, mse, window_frames
from train.stages.feed import Inputs
from train.stages.shared import LOADED, Loss, Stage
from train.turns import Losses
from train.validate import VALIDATION_STEP


@torch.no_grad()
def fresh_decoder(config: TCDecoderConfig) -> TCDecoder:
    """A TC decoder from scratch: grey at first. Memory blocks and the two deepening convolutions start as the
    identity (the release grew its decoder in the same way); otherwise nine blocks without norm explode."""
    module = TCDecoder(config)
    for layer in module.decoder.values():
        if isinstance(layer, MemBlock):
            torch.nn.init.zeros_(layer.conv["4"].weight)
            torch.nn.init.zeros_(layer.conv["4"].bias)
    for name in ("3", "24"):
        torch.nn.init.dirac_(module.decoder[name].weight)
    module.decoder["26"].weight.mul_(0.1)
    module.decoder["26"].bias.fill_(0.5)
    return module


class Decoder(Stage):
    def build(self) -> None:
        self.frozen_vae = self.vae()
        self.sizes = replace(self.model_config(), vae=self.frozen_vae.config)
        decoder = None
        if self.config.init is not None:
            start = flashvsr.load(self.config.init, parts=LOADED["tc_decoder"])
            decoder = start.tc_decoder
            self.sizes = start.config if decoder is not None else self.sizes
        self.roles["decoder"] = self.engine(decoder or fresh_decoder(self.sizes.tc_decoder))
        self.student = None
        if self.config.stage.latents == "student":
            self.encodes = False
            self.student = self.find("dit", ["one-step"])
            self.student.dit.to(self.device).eval()
            self.student.lr_projector.to(self.device).eval()

    def prepare(self, micro: Mapping[str, Any], draw: Draw) -> Inputs:
        inputs = self.feed.inputs(micro, segments=1)
        return inputs if self.student is None else replace(inputs, latents=[self.made(inputs.lr[0], draw)])

    @torch.no_grad()
    def made(self, lr: Tensor, draw: Draw) -> Tensor:
        """The student's latents `B 16 n h w` of LR `B 3 4n+1 H W`: the whole clip at once, which equals
        streaming."""
        model, dit = self.student, self.student.config.dit
        (height, width), n = lr.shape[-2:], (lr.shape[2] - 1) // 4
        noise = draw.normal("student.noise", (dit.in_channels, n, height // 8, width // 8)).to(self.device)
        plan = SparseCausal(
            (n, height // 16, width // 16),
            block=dit.block,
            head_dim=dit.head_dim,
            ratio=training_ratio(model.info.sparse_ratio, model.info.area, height, width),
            window=model.info.window,
            device=self.device,
        )
        with self.autocast():
            (v,) = model.denoiser()([noise], torch.ones(len(lr), 1, device=self.device), plan, lr=[lr])
        return noise - v.float()

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        return [("decoder", self.pixel_loss)]

    def decoded(self, run: Any, inputs: Inputs, first: int, count: int) -> Tensor:
        """TC decoder frames of a window; it never sees the four look-ahead LR frames."""
        z, lr = inputs.latents[0], inputs.lr[0]

        def decode(start: int, stop: int, memory: Any) -> tuple[Tensor, Any]:
            with self.autocast():
                return run(z[:, :, start:stop], lr[:, :, window_frames(start, stop - start)], memory)

        return decode_window(decode, first, count)

    def pixel_loss(self, inputs: Inputs, draw: Draw) -> Losses:
        s, count = self.config.stage, self.config.stage.window
        first = int(draw.step("window") * (inputs.latents[0].shape[2] - count + 1))
        losses = Losses.of([self.decoded(self.roles["decoder"], inputs, first, count)])
        (sr,) = losses.at
        hr = inputs.hr[0][:, :, window_frames(first, count)]
        losses.add("mse", mse(sr, hr), s.mse)
        losses.add("lpips", self.lpips_loss(sr, hr), s.lpips)
        if s.difference:
            losses.add("difference", difference(sr, hr), s.difference)
        if s.vae_mse or s.vae_lpips:
            with torch.no_grad():
                vae = self.vae_frames(inputs.latents[0], first, count)
            losses.add("vae_mse", mse(sr, vae), s.vae_mse)
            losses.add("vae_lpips", self.lpips_loss(sr, vae), s.vae_lpips)
        return losses

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        """MSE + weighted LPIPS to HR over the whole clip."""
        sr, s = self._whole(inputs), self.config.stage
        return s.mse * mse(sr, inputs.hr[0]) + s.lpips * self.lpips_loss(sr, inputs.hr[0])

    def _whole(self, inputs: Inputs) -> Tensor:
        return self.decoded(self.roles["decoder"].whole(), inputs, 0, inputs.latents[0].shape[2])

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor:
        segment = {name: tensor[None] for name, tensor in sample["segments"][0].items()}
        draw = Draw(self.config.seed, VALIDATION_STEP, [0])
        frames = self._whole(self.prepare({"segments": [segment]}, draw))
        return to_uint8(frames)[0].permute(1, 2, 3, 0).cpu()

    def model_info(self) -> ModelInfo:
        return self.info("decoder")

    def parts(self) -> dict[str, Any]:
        return {"config": self.sizes, "info": self.model_info(), "tc_decoder": self.merged("decoder")}
