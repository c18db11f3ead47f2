"""Models of random weights, in the state of a running stream: what the measurements run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.base.draws import generator
from flashvsr.config import PRESETS
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import random_prompt
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.streaming.stream import FIRST_LATENTS, STEP_LATENTS, TOKEN_PIXELS, Stream, seeded_noise
from flashvsr.streaming.stream import StreamSettings as Settings
from flashvsr.weights.folder import FlashVSR, ModelInfo

FIRST_FRAMES, STEP_FRAMES = 4 * FIRST_LATENTS + 1, 4 * STEP_LATENTS
PARTS = {"dit": DiT, "lr_projector": LRProjector, "tc_decoder": TCDecoder, "vae": WanVAE}
SIZES = {"tiny": (128, 128), "small": (256, 256), "wan1.3b": (768, 1408)}


@dataclass(frozen=True)
class Subject:
    """What is measured: a preset at an output size, on a device, in a dtype."""

    scale: str
    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.scale not in PRESETS:
            raise UserError(f"scale={self.scale!r} is unknown; there are {', '.join(PRESETS)}")
        block = PRESETS[self.scale].dit.block
        multiple = (TOKEN_PIXELS * block[1], TOKEN_PIXELS * block[2])
        if any(side < m or side % m for side, m in zip(self.size, multiple, strict=True)):
            raise UserError(
                f"size={self.size[0]}x{self.size[1]}: height and width must be multiples of "
                f"{multiple[0]}x{multiple[1]} at scale={self.scale}"
            )

    @property
    def config(self):
        return PRESETS[self.scale]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.size[0] // TOKEN_PIXELS, self.size[1] // TOKEN_PIXELS

    @property
    def area(self) -> int:
        """Pixels of the training size: the release's, or this one where it is smaller."""
        return min(768 * 1280, self.size[0] * self.size[1])

    def facts(self) -> dict[str, str]:
        return {"scale": self.scale, "size": f"{self.size[0]}x{self.size[1]}"}

    def model(self, *parts: str) -> FlashVSR:
        """The parts asked for, with torch's random initial weights, frozen; selection as in the release."""
        torch.manual_seed(0)
        made = {}
        for part in parts:
            with torch.device(self.device):
                module = PARTS[part](getattr(self.config, part))
            made[part] = module.to(self.dtype).requires_grad_(False).eval()
        prompt = random_prompt(self.config.dit, 0).to(self.device) if "dit" in parts else None
        info = ModelInfo("one-step", area=self.area)
        return FlashVSR(**made, prompt=prompt, config=self.config, info=info)

    def frames(self, count: int) -> Tensor:
        """LR frames at output size, `1 3 count H W` in [-1,1], float32."""
        shape = (1, 3, count, *self.size)
        return torch.rand(shape, generator=generator(0, "bench.frames")).mul_(2).sub_(1).to(self.device)

    def stream(self, model: FlashVSR, attention: str = "auto") -> Stream:
        """A stream after its first call: its ring holds all the past chunks it will ever hold."""
        settings = replace(Settings(area=model.info.area), attention=attention)
        stream = Stream(model.denoiser(), model.tc_decoder, settings, seeded_noise(0))
        with torch.no_grad():
            stream.denoise(self.frames(FIRST_FRAMES))
        return stream
