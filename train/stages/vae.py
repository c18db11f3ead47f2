"""A Wan-shaped VAE of our own, where no Wan weights are at hand: MSE + LPIPS + a small KL on random crops.

At the end its latent statistics are measured on training clips; they travel with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flashvsr.base.draws import Draw
from flashvsr.base.resize import to_signed, to_uint8
from flashvsr.config import VAEConfig
from flashvsr.models.wan_vae import CausalConv3d, FrameAttention, ResidualBlock, WanVAE
from flashvsr.weights.folder import ModelInfo
from train.losses.flow_matching import per_sample
from train.losses.pixel import mse
from train.stages.feed import Inputs
from train.stages.shared import Loss, Stage
from train.turns import Losses

STATISTICS_CLIPS = 4


@torch.no_grad()
def fresh_vae(config: VAEConfig) -> WanVAE:
    """A VAE from scratch. Convolutions keep the variance, without biases, and begin with the newest frame
    alone; residual branches start at zero and the posterior starts narrow. With torch's defaults biases
    drown the image and noise the latents for hundreds of steps."""
    vae = WanVAE(config)
    for name, parameter in vae.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias"):
            parameter.zero_()
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.weight.shape[2:] == (3, 3, 3):
            newest = module.weight[:, :, 2] * 3**0.5
            module.weight.zero_()
            module.weight[:, :, 2] = newest
        elif isinstance(module, ResidualBlock):
            module.residual["6"].weight.zero_()
        elif isinstance(module, FrameAttention):
            module.proj.weight.zero_()
    vae.conv1.weight[config.z_dim :] = 0
    vae.conv1.bias[config.z_dim :] = -6
    return vae


class Vae(Stage):
    def build(self) -> None:
        vae = self.find("vae").vae if self.config.init else fresh_vae(self.model_config().vae)
        vae.checkpointing = self.config.recomputes
        self.sizes = replace(self.model_config(), vae=vae.config)
        self.roles["vae"] = self.engine(vae)

    def prepare(self, micro: Mapping[str, Any], draw: Draw) -> Inputs:
        """A random crop in space and time of every video of the batch, frames `B 3 4n-3 crop crop`."""
        hr = micro["segments"][0]["hr"]
        frames, side = 4 * self.config.stage.latents - 3, self.config.stage.crop
        corner = draw.uniform("crop", shape=(3,))
        room = torch.tensor([hr.shape[2] - frames, hr.shape[3] - side, hr.shape[4] - side])
        crops = []
        for clip, (t, y, x) in zip(hr, (corner * (room + 1)).int().tolist(), strict=True):
            crops.append(clip[:, t : t + frames, y : y + side, x : x + side])
        return Inputs([to_signed(torch.stack(crops)).to(self.device)], [], [], {})

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        return [("vae", self.reconstruction_loss)]

    def reconstruction_loss(self, inputs: Inputs, draw: Draw) -> Losses:
        (video,) = inputs.hr
        batch, _, frames, height, width = video.shape
        shape = (self.sizes.vae.z_dim, (frames + 3) // 4, height // 8, width // 8)
        with self.autocast():
            outputs = self.roles["vae"](video, draw.normal("posterior", shape).to(self.device))
        losses, s = Losses.of(outputs), self.config.stage
        decoded, mean, logvar = losses.at
        losses.add("mse", mse(decoded, video), s.mse)
        if s.lpips:
            losses.add("lpips", self.lpips_loss(decoded, video), s.lpips)
        losses.add("kl", 0.5 * per_sample(mean.square() + logvar.exp() - 1 - logvar), s.kl)
        return losses

    def reconstructed(self, video: Tensor) -> Tensor:
        vae = self.roles["vae"].whole()
        with self.autocast():
            mean, _, _ = vae.posterior(video)
            return vae.decode(vae.normalise(mean))[0]

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        """MSE + weighted LPIPS of the reconstruction from the posterior mean, whole frames."""
        sr, s = self.reconstructed(inputs.hr[0]), self.config.stage
        return self.pixel_error(sr, inputs.hr[0], s.mse, s.lpips)

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor:
        hr = sample["segments"][0]["hr"]
        video = to_signed(hr[None, :, : hr.shape[1] - 4]).to(self.device)
        return to_uint8(self.reconstructed(video))[0].permute(1, 2, 3, 0).cpu()

    def model_info(self) -> ModelInfo:
        return self.info("vae")

    def parts(self) -> dict[str, Any]:
        vae = self.merged("vae")
        vae.checkpointing = False
        if self.config.init is None:
            vae.set_statistics(*self._statistics(vae))
        return {"config": self.sizes, "info": self.model_info(), "vae": vae}

    @torch.no_grad()
    def _statistics(self, vae: WanVAE) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per latent channel over the first training clips."""
        clips = self.feed.clips("train")
        values = []
        for counter in range(STATISTICS_CLIPS):
            hr = clips.sample(counter)["segments"][0]["hr"]
            mean, _, _ = vae.posterior(to_signed(hr[None, :, : hr.shape[1] - 4]))
            values.append(mean.transpose(0, 1).flatten(1))
        std, mean = torch.std_mean(torch.cat(values, 1).double(), 1)
        return mean.float(), std.float()
