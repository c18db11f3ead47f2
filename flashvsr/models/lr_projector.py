"""LR Proj-In: low-resolution video (already at output size) -> features added to the DiT's tokens.

16x16 pixel-unshuffle, two 3-D convolutions that each halve time, one linear layer per fed DiT block.
Frame 0 is repeated to four frames, so 4n+1 frames give n+1 groups; the first group is warm-up and emits
nothing. Feature i then reads frames up to 4i+4: four frames ahead of the frames latent i decodes to.

Three temporal forms over the same weights (DESIGN section 5; `causal` and `buffer` are the release's v1.1
and v1, checked in golden/):

    causal  two replicated frames in front of each convolution; streams; feature i sees 4i-5 ... 4i+4
    clip    one in front, one behind; whole clips only; feature i sees 4i-2 ... 4i+7
    buffer  every group of four alone, its own last two frames in front
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

    `B T C h w` -> `B (T-4)//2+1 C' h w`. On a CPU the sum of its temporal taps, on a GPU matrix products.
    """
    padded = F.pad(x.flatten(0, 1), (1, 1, 1, 1), mode="replicate").unflatten(0, x.shape[:2])
    return (by_products if x.device.type == "cuda" else by_taps)(padded, conv.weight, conv.bias)


def by_taps(padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The convolution of `B T C h+2 w+2` as the sum of four 2-D convolutions over frames."""
    t_out = (padded.shape[1] - 4) // 2 + 1
    out = None
    for tap in range(4):
        frames = padded[:, tap : tap + 2 * t_out - 1 : 2]
        y = F.conv2d(frames.flatten(0, 1), weight[:, :, tap], bias if tap == 0 else None)
        out = y if out is None else out + y
    return out.unflatten(0, (padded.shape[0], t_out))


def by_products(padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The same as one matrix product per frame that comes out: cuDNN's kernels for so many channels reach a
    small part of what its matrix products do on Hopper (`bench projector` prints all ways)."""
    device = padded.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        padded, weight, bias = (x.to(dtype) for x in (padded, weight, bias))
    with torch.autocast(device, enabled=False):
        return _Products.apply(padded, weight, bias)


class _Products(torch.autograd.Function):
    """Unfolded frames are 36 times the input: they exist for one frame at a time, and the backward pass
    unfolds again instead of keeping them."""

    @staticmethod
    def forward(ctx, padded: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        batch, frames, _, height, width = padded.shape
        out = padded.new_empty(batch, (frames - 4) // 2 + 1, weight.shape[0], height - 2, width - 2)
        flat = weight.flatten(1)
        for b, t in _places(out):
            torch.addmm(bias[:, None], flat, _unfold(padded[b], t), out=out[b, t].flatten(1))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        padded, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        dx = torch.zeros_like(padded) if need_x else None
        dw = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            if need_w
            else None
        )
        channels, height, width = padded.shape[2:]
        for b, t in _places(gradient):
            g = gradient[b, t].flatten(1)
            if need_w:
                dw += (g @ _unfold(padded[b], t).T).view_as(dw)
            if need_x:
                columns = (weight.flatten(1).T @ g)[None]
                four = F.fold(columns, (height, width), 3)[0].unflatten(0, (channels, 4))
                dx[b, 2 * t : 2 * t + 4] += four.transpose(0, 1)
        db = gradient.sum((0, 1, 3, 4)) if need_b else None
        return dx, None if dw is None else dw.to(weight.dtype), db


def _places(out: Tensor) -> list[tuple[int, int]]:
    return [(b, t) for b in range(out.shape[0]) for t in range(out.shape[1])]


def _unfold(padded: Tensor, t: int) -> Tensor:
    """What frame t of the result is made of: `T C h+2 w+2` -> `(C 4 3 3) (h w)`, the weight's order."""
    return F.unfold(padded[2 * t : 2 * t + 4].transpose(0, 1).flatten(0, 1)[None], 3)[0]


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
