"""LR Proj-In: low-resolution video (already at output size) -> features added to the DiT's tokens.

16x16 pixel-unshuffle, two 3-D convolutions that each halve time, one linear layer per fed DiT block.
Frame 0 is repeated to four frames, so 4n+1 frames give n+1 groups; the first group is warm-up and emits
nothing. Feature i then reads frames up to 4i+4: four frames ahead of the frames latent i decodes to.

Three temporal forms over the same weights (DESIGN section 5; `causal` and `buffer` are the release's v1.1
and v1, checked in golden/):

    causal  two replicated frames in front of each convolution; streams; feature i sees 4i-5 ... 4i+4
    clip    one in front, one behind; whole clips only; feature i sees 4i-2 ... 4i+7
    buffer  every group of four alone, its own last two frames in front

Each 3-D convolution is the sum of its four temporal taps as 2-D convolutions over frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr.base.cli import UserError
from flashvsr.config import ProjectorConfig
from flashvsr.models.norm import ChannelRMS

Memory = tuple[Tensor, Tensor]
PIXELS = 16


def halve_time(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """A (4,3,3) convolution of stride (2,1,1), replicating at the spatial border, no padding in time.

    `B T C h w` -> `B (T-4)//2+1 C' h w`.
    """
    t_out = (x.shape[1] - 4) // 2 + 1
    padded = F.pad(x.flatten(0, 1), (1, 1, 1, 1), mode="replicate").unflatten(0, x.shape[:2])
    out = None
    for tap in range(4):
        frames = padded[:, tap : tap + 2 * t_out - 1 : 2]
        y = F.conv2d(frames.flatten(0, 1), conv.weight[:, :, tap], conv.bias if tap == 0 else None)
        out = y if out is None else out + y
    return out.unflatten(0, (x.shape[0], t_out))


class LRProjector(nn.Module):
    def __init__(self, config: ProjectorConfig):
        super().__init__()
        self.config = config
        pixels = 3 * PIXELS * PIXELS
        self.conv1 = nn.Conv3d(pixels, config.hidden1, (4, 3, 3), stride=(2, 1, 1))
        self.norm1 = ChannelRMS(config.hidden1)
        self.conv2 = nn.Conv3d(config.hidden1, config.hidden2, (4, 3, 3), stride=(2, 1, 1))
        self.norm2 = ChannelRMS(config.hidden2)
        self.linear_layers = nn.ModuleList(
            nn.Linear(config.hidden2, config.out_dim) for _ in range(config.layer_num)
        )

    def forward(
        self, video: Tensor, memory: Memory | None = None, mode: str | None = None
    ) -> tuple[list[Tensor], Memory | None]:
        """`B 3 F H W` in [-1,1] -> per fed layer features `B n H/16 W/16 D`, and memory.

        `memory=None` starts a clip and takes 4n+1 frames; later calls take 4n. `mode` overrides the
        config's for this call (the weights are the same). Raises UserError on sizes or on streaming
        with `clip`.
        """
        mode = mode or self.config.mode
        start = memory is None
        if (video.shape[2] - start) % 4 or video.shape[-1] % PIXELS or video.shape[-2] % PIXELS:
            raise UserError(
                f"the LR projector takes 4n+1 frames (4n after the first call) and sides in multiples of "
                f"{PIXELS}, got {tuple(video.shape[2:])}"
            )
        if mode == "clip" and not start:
            raise UserError("projector mode clip looks ahead and cannot stream: use causal")
        x = video.transpose(1, 2)
        if start:
            x = torch.cat([x[:, :1].expand(-1, 3, -1, -1, -1), x], 1)
        x = F.pixel_unshuffle(x, PIXELS)
        y, memory = self._groups(x, memory, mode)
        if start:
            y = y[:, 1:]
        tokens = y.permute(0, 1, 3, 4, 2)
        return [linear(tokens) for linear in self.linear_layers], memory

    def _groups(self, x: Tensor, memory: Memory | None, mode: str) -> tuple[Tensor, Memory | None]:
        """`B 4g 768 h w` -> `B g C2 h w`: every form is a choice of the frames around each convolution."""
        if mode == "buffer":
            shape = x.shape[:2]
            x = x.unflatten(1, (-1, 4)).flatten(0, 1)
            y = self._activate(self.conv1, self.norm1, torch.cat([x[:, 2:], x], 1))
            y = self._activate(self.conv2, self.norm2, torch.cat([y, y], 1))
            # nothing is carried from group to group, but a memory says that the clip has started
            return y.flatten(0, 1).unflatten(0, (shape[0], shape[1] // 4)), (x[:0], y[:0])
        if mode == "clip":
            y = self._activate(self.conv1, self.norm1, torch.cat([x[:, :1], x, x[:, -1:]], 1))
            return self._activate(self.conv2, self.norm2, torch.cat([y[:, :1], y, y[:, -1:]], 1)), None
        past1 = x[:, :1].expand(-1, 2, -1, -1, -1) if memory is None else memory[0].to(x.dtype)
        y = self._activate(self.conv1, self.norm1, torch.cat([past1, x], 1))
        past2 = y[:, :1].expand(-1, 2, -1, -1, -1) if memory is None else memory[1].to(y.dtype)
        z = self._activate(self.conv2, self.norm2, torch.cat([past2, y], 1))
        return z, (x[:, -2:], y[:, -2:])

    @staticmethod
    def _activate(conv: nn.Conv3d, norm: ChannelRMS, x: Tensor) -> Tensor:
        return F.silu(norm(halve_time(conv, x)))
