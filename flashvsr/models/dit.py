"""The Wan2.1 text-to-video transformer, as FlashVSR uses it.

The model knows no mask, cache, segment, order or time: the attention plan owns them. A forward takes a
list of segments (clips or images of one packed sequence), and the plan packs their token grids into one
sequence, gives rotary angles, spreads per-segment values over tokens and attends.

Modulation, time embedding and norms are computed in float32 whatever the weights' dtype. Tensor names and
shapes are those of Wan2.1-T2V-1.3B. Maths: golden/README "DiT block" (released code).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flashvsr.config import DiTConfig
from flashvsr.models.norm import TokenRMS, widen
from flashvsr.models.rope import rotate

if TYPE_CHECKING:
    from flashvsr.attention.plans import Plan

PATCH = 2


def time_features(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t * 10000^(-i/half). `...` -> `... width`, float32, computed in float64."""
    half = width // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=t.device) / half)
    angle = t.double()[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], -1).float()


def _linear_wide(layer: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        weight = widen(layer.weight)
        return F.linear(x.to(weight.dtype), weight, widen(layer.bias))


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(widen(x), x.shape[-1:], eps=eps)


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return (_layer_norm(x, eps) * (1 + scale) + shift).to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention; `norm_q`, `norm_k` act on the full width before heads are split."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = TokenRMS(dim, eps), TokenRMS(dim, eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


class PromptAttention(Attention):
    """Cross-attention to the fixed prompt, whose keys and values are computed once."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__(dim, heads, eps)
        self.register_buffer("prompt_k", None, persistent=False)
        self.register_buffer("prompt_v", None, persistent=False)

    def set_prompt(self, context: Tensor) -> None:
        """`context`: embedded prompt `1 L D`."""
        self.prompt_k = self.split(self.norm_k(self.k(context))).transpose(1, 2).detach()
        self.prompt_v = self.split(self.v(context)).transpose(1, 2).detach()

    def forward(self, x: Tensor) -> Tensor:
        assert self.prompt_k is not None, "set_prompt comes before the first forward"
        q = self.split(self.norm_q(self.q(x))).transpose(1, 2)
        k = self.prompt_k.to(q.dtype).expand(q.shape[0], -1, -1, -1)
        v = self.prompt_v.to(q.dtype).expand(q.shape[0], -1, -1, -1)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """`before` and `after` are everything around the attention itself: the parts worth compiling."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim, self.eps = config.dim, config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)
        self.self_attn = Attention(dim, config.heads, config.eps)
        self.cross_attn = PromptAttention(dim, config.heads, config.eps)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn), nn.GELU("tanh"), nn.Linear(config.ffn, dim))

    def before(self, x: Tensor, e: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens `B T D`, modulation `B (1|T) 6 D` -> q, k (rotated), v, each `B T heads d`."""
        shift, scale = (widen(self.modulation) + e)[..., :2, :].unbind(-2)
        a = self.self_attn
        y = _modulate(x, shift, scale, self.eps)
        q, k = a.split(a.norm_q(a.q(y))), a.split(a.norm_k(a.k(y)))
        return rotate(q, rope), rotate(k, rope), a.split(a.v(y))

    def after(self, x: Tensor, o: Tensor, e: Tensor) -> Tensor:
        """Adds attention output `B T heads d`, prompt attention and feed-forward."""
        gate, shift, scale, gate_ffn = (widen(self.modulation) + e)[..., 2:, :].unbind(-2)
        x = x + (gate * widen(self.self_attn.o(o.flatten(2)))).to(x.dtype)
        y = F.layer_norm(widen(x), x.shape[-1:], widen(self.norm3.weight), widen(self.norm3.bias), self.eps)
        x = x + self.cross_attn(y.to(x.dtype)).to(x.dtype)
        y = self.ffn(_modulate(x, shift, scale, self.eps))
        return x + (gate_ffn * widen(y)).to(x.dtype)

    def forward(self, x: Tensor, e: Tensor, plan: Plan, layer: int) -> Tensor:
        q, k, v = self.before(x, e, plan.rope)
        return self.after(x, plan.attend(layer, q, k, v), e)


@cache
def _compiled(part: str) -> Callable:
    """`Block.before` or `Block.after`, compiled as a function of the block: a copy runs its own weights."""
    return torch.compile(getattr(Block, part), dynamic=False)


class Head(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)
        self.head = nn.Linear(config.dim, config.in_channels * PATCH * PATCH)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """`e`: time embedding spread over tokens, `B (1|T) D`."""
        shift, scale = (widen(self.modulation) + e[..., None, :]).unbind(-2)
        return self.head(_modulate(x, shift, scale, self.eps))


class DiT(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, (1, PATCH, PATCH), stride=(1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, dim * 6))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)

    def compile_blocks(self) -> None:
        """Compiles what is around attention (norms, modulation, RoPE, feed-forward) once for all layers;
        attention, whose plan differs from layer to layer, stays outside. A second call changes nothing."""
        for block in self.blocks:
            block.before = MethodType(_compiled("before"), block)
            block.after = MethodType(_compiled("after"), block)

    @torch.no_grad()
    def set_prompt(self, prompt: Tensor) -> None:
        """Computes every block's prompt keys and values from the prompt embedding `1 L text_dim`."""
        weight = self.text_embedding[0].weight
        context = self.text_embedding(prompt.to(weight.device, weight.dtype))
        for block in self.blocks:
            block.cross_attn.set_prompt(context)

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """`B S` noise levels -> embedding `B S D` and modulation `B S 6 D`, float32."""
        t = time_features(1000 * sigma.double(), self.config.freq_dim)
        first, second = self.time_embedding[0], self.time_embedding[2]
        e = _linear_wide(second, F.silu(_linear_wide(first, t.to(first.weight.device))))
        e6 = _linear_wide(self.time_projection[1], F.silu(e))
        return e, e6.unflatten(-1, (6, -1))

    def patchify(self, latent: Tensor) -> Tensor:
        """`B 16 f h w` -> token grid `B f h/2 w/2 D`."""
        b, c, f, h, w = latent.shape
        x = latent.reshape(b, c, f, h // PATCH, PATCH, w // PATCH, PATCH)
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)
        return F.linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)

    def unpatchify(self, grid: Tensor) -> Tensor:
        """`B f h w (2 2 16)` -> `B 16 f 2h 2w`."""
        b, f, h, w, _ = grid.shape
        x = grid.reshape(b, f, h, w, PATCH, PATCH, -1).permute(0, 6, 1, 2, 4, 3, 5)
        return x.reshape(b, -1, f, h * PATCH, w * PATCH)

    def forward(
        self, segments: Sequence[Tensor], sigma: Tensor, plan: Plan, features: Sequence[Sequence[Tensor]]
    ) -> list[Tensor]:
        """Velocity of every segment.

        segments: noisy latents `B 16 f h w` each; sigma: `B S`, one level per segment; features: per fed
        layer, per segment, LR features `B f h/2 w/2 D`.
        """
        dtype = self.patch_embedding.weight.dtype
        x = plan.pack([self.patchify(s.to(dtype)) for s in segments])
        e, e6 = self.embed_time(sigma)
        e, e6 = plan.spread(e), plan.spread(e6)
        for layer, block in enumerate(self.blocks):
            if layer < len(features):
                x = x + plan.pack([f.to(x.dtype) for f in features[layer]])
            x = block(x, e6, plan, layer)
        return [self.unpatchify(grid) for grid in plan.unpack(self.head(x, e))]
