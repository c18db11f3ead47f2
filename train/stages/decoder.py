"""The tiny conditional decoder (paper 3.4, Eq. 3): MSE + 2 LPIPS, to HR and to the VAE decoder's output.

Learns on VAE latents of HR, or on those that the student makes of LR, which are what it decodes in use. Each
step decodes a random window of latents with gradient; earlier ones fill the memory of both decoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flashvsr
from flashvsr.attention.plans import SparseCausal, training_ratio
from flashvsr.base.cli import UserError
from flashvsr.base.draws import Draw
from flashvsr.base.resize import to_uint8
from flashvsr.config import TCDecoderConfig
from flashvsr.models.tc_decoder import GROUP, PIXELS, MemBlock, TCDecoder
from flashvsr.weights.folder import FlashVSR, ModelInfo
from train.losses.pixel import decode_window, difference, mse, window_frames
from train.stages.feed import Inputs
from train.stages.grow import grown, holds_more, read_taehv, taehv_file
from train.stages.shared import LOADED, Loss, Stage
from train.turns import Losses
from train.validate import VALIDATION_STEP

COLOURS = 3
# Doubling by nearest neighbour and a 3x3 convolution cannot tell the halves of a pixel apart: of what it
# knows of a pixel, one channel can be taken as it is and another by its second difference. The two mixtures
# of six half pixels, its own and two on either side, that come closest to all halves of a 1/f signal (least
# squares; symmetric, so three numbers each).
AS_IT_IS, SECOND_DIFFERENCE = (-0.25, 0.255, 0.495), (-0.187, 0.261, 0.036)


@torch.no_grad()
def fresh_decoder(config: TCDecoderConfig) -> TCDecoder:
    """A TC decoder from scratch: shows LR, a little soft, and learns the rest.

    The first channels carry LR: mixtures of its means over 4x4 pixels at first (above), then pixels of a
    quarter of the size, enlarged linearly. They are positive, so that ReLU lets them pass: LR + 1, and beside
    them one channel of ones, by which the zeros beyond the border count as grey. Memory blocks and the two
    deepening convolutions start as the identity (the release grew its decoder in the same way; otherwise nine
    blocks without norm explode). All other channels are random and reach the picture through weights that
    start at zero. A decoder too narrow to carry LR starts grey.
    """
    module = TCDecoder(config)
    layers = module.decoder
    for layer in layers.values():
        if isinstance(layer, MemBlock):
            torch.nn.init.zeros_(layer.conv["4"].weight)
            torch.nn.init.zeros_(layer.conv["4"].bias)
    for name in ("3", "24"):
        torch.nn.init.dirac_(layers[name].weight)
    picture = layers["26"]
    picture.weight.zero_()
    picture.bias.fill_(0.5)
    signals = GROUP * COLOURS
    needed = (4 * signals, signals, signals // 2, COLOURS)  # and a channel of ones
    if any(width <= carried for width, carried in zip(config.channels, needed, strict=True)):
        return module

    here, linear, second = torch.tensor([[0, 1, 0], [0.25, 0.5, 0.25], [1, -2, 1]])
    # vertically and horizontally: as it is, or the second difference
    halves = [(y, x) for y in (0, 1) for x in (0, 1)]
    taps = [_of_pixels(AS_IT_IS), _of_pixels(SECOND_DIFFERENCE)]
    mixtures = [torch.einsum("rb,cd->rcbd", taps[y], taps[x]).flatten(0, 1) for y, x in halves]
    kernels = [torch.outer((here, second)[y], (here, second)[x]) for y, x in halves]
    first = layers["1"]
    first.weight[: 4 * signals + 1] = 0
    first.bias[: 4 * signals + 1] = 1
    for i in range(signals):  # (colour, frame)
        for k in range(4):
            first.weight[4 * i + k, i * PIXELS**2 : (i + 1) * PIXELS**2] = mixtures[k]
    _share_out(layers["9"].conv, 1, 4 * signals)
    _enlarge(layers["10"], {(i, 4 * i + k): kernels[k] for i in range(signals) for k in range(4)})
    for grow, out in (("15", "16"), ("21", "22")):
        _share_out(layers[grow].conv, 2, signals)
        signals //= 2
        _enlarge(layers[out], {(i, i): torch.outer(linear, linear) for i in range(signals)})
    for colour in range(COLOURS):
        picture.weight[colour, colour, 1, 1] = 0.5  # frames are 2x - 1
    picture.bias.zero_()
    return module


def _of_pixels(taps: tuple[float, ...]) -> Tensor:
    """Weights of six half pixels -> of 8 rows in each of 3 pixels."""
    halves = torch.tensor([*taps, *reversed(taps)]).reshape(3, 2)
    return halves.repeat_interleave(4, 1).T / 4


def _share_out(grow: nn.Conv2d, frames: int, signals: int) -> None:
    """Signals (colour, frame, ...) and the ones after them -> each frame its own, and ones."""
    weight, kept = grow.weight.unflatten(0, (frames, -1)), signals // frames
    source = torch.arange(signals).unflatten(0, (COLOURS, frames, -1)).transpose(0, 1).flatten(1)
    weight[:, : kept + 1] = 0
    for frame in range(frames):
        weight[frame, torch.arange(kept), source[frame]] = 1
        weight[frame, kept, signals] = 1


def _enlarge(conv: nn.Conv2d, kernels: dict[tuple[int, int], Tensor]) -> None:
    """Each (signal out, signal in) its kernel; ones, after the signals on both sides, stay ones, and signals
    stay signal + 1 where zeros beyond the border meant a signal of 0."""
    ones_out, ones_in = (max(pair[side] for pair in kernels) + 1 for side in (0, 1))
    here = F.pad(torch.ones(1, 1), (1, 1, 1, 1))
    conv.weight[: ones_out + 1] = 0
    conv.weight[: ones_out + 1, ones_in] = here
    for (out, source), kernel in kernels.items():
        conv.weight[out, source] = kernel
        conv.weight[out, ones_in] -= kernel


class Decoder(Stage):
    def build(self) -> None:
        self.taehv = None if self.config.init is None else taehv_file(Path(self.config.init))
        self.frozen_vae = self.vae()
        decoder = self._start()
        self.sizes = replace(self.model_config(), vae=self.frozen_vae.config, tc_decoder=decoder.config)
        self.roles["decoder"] = self.engine(decoder)
        self.student = None
        if self.config.stage.latents == "student":
            self.encodes = False
            self.student = self.find("dit", ["one-step"])
            self.student.dit.to(self.device).eval()
            self.student.lr_projector.to(self.device).eval()

    def _start(self) -> TCDecoder:
        """The decoder to train: grown from TAEHV's, or the start model's, or a fresh one."""
        config, init = self.model_config().tc_decoder, self.config.init
        if self.taehv is not None:
            self.in_use["start"] = f"grown from {self.taehv.name}, its function unchanged"
            return grown(read_taehv(self.taehv), fresh_decoder(config), str(self.taehv))
        decoder = None if init is None else flashvsr.load(init, parts=LOADED["tc_decoder"]).tc_decoder
        self.in_use["start"] = "from scratch" if decoder is None else "the TC decoder of init"
        return fresh_decoder(config) if decoder is None else decoder

    def find(self, part: str, kinds: Sequence[str] | None = None) -> FlashVSR:
        """As in every stage, but `init` may be a TAEHV decoder alone, which holds nothing else."""
        if self.taehv is None or holds_more(Path(self.config.init)):
            return super().find(part, kinds)
        try:
            return self.of_run(part, kinds)
        except UserError as error:
            raise UserError(f"{error} in which {self.taehv.name} lies beside it") from None

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
        if s.lpips:
            losses.add("lpips", self.lpips_loss(sr, hr), s.lpips)
        if s.difference:
            losses.add("difference", difference(sr, hr), s.difference)
        if s.vae_mse or s.vae_lpips:
            with torch.no_grad():
                vae = self.vae_frames(inputs.latents[0], first, count)
            losses.add("vae_mse", mse(sr, vae), s.vae_mse)
            if s.vae_lpips:
                losses.add("vae_lpips", self.lpips_loss(sr, vae), s.vae_lpips)
        return losses

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        """MSE + weighted LPIPS to HR over the whole clip."""
        sr, s = self._whole(inputs), self.config.stage
        return self.pixel_error(sr, inputs.hr[0], s.mse, s.lpips)

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
