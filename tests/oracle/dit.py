"""The streaming DiT: K/V as lists of chunks, block selection, token-by-token masks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
CHUNK, SIDE = 2, 8  # latents in a chunk; tokens along a side of a block
BLOCK = CHUNK * SIDE * SIDE


@dataclass(frozen=True)
class Settings:
    """What a golden file's metadata says about the DiT."""

    heads: int
    eps: float = 1e-6
    timestep: float = 1000.0
    topk_ratio: float = 2.0
    kv_ratio: float = 3.0
    local_range: int | None = None


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def plain_norm(x: Tensor, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + eps)


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def time_features(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t * 10000^(-i/half), float64 `... width`."""
    half = width // 2
    angle = t.double()[..., None] * torch.tensor([10000.0 ** (-i / half) for i in range(half)]).double()
    return torch.cat([torch.cos(angle), torch.sin(angle)], -1)


def rotation(frames: list[int], rows: int, columns: int, d: int) -> Tensor:
    """One unit complex number per token (row-major) and pair of channels: complex128 `T d/2`."""
    space = 2 * (d // 6)

    def axis(positions: list[int], width: int) -> Tensor:
        table = [[p * 10000.0 ** (-2 * i / width) for i in range(width // 2)] for p in positions]
        angle = torch.tensor(table, dtype=torch.float64).reshape(len(positions), width // 2)
        return torch.polar(torch.ones_like(angle), angle)

    t = axis(frames, d - 2 * space)
    r, c = axis(list(range(rows)), space), axis(list(range(columns)), space)
    f = len(frames)
    parts = [
        t[:, None, None].expand(f, rows, columns, -1),
        r[None, :, None].expand(f, rows, columns, -1),
        c[None, None].expand(f, rows, columns, -1),
    ]
    return torch.cat(parts, -1).reshape(f * rows * columns, d // 2)


def rotate(x: Tensor, by: Tensor) -> Tensor:
    """`B T heads d`, adjacent pairs as complex numbers, rotated in float64."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * by[None, :, None]).reshape(x.shape).to(x.dtype)


def block_order(f: int, rows: int, columns: int) -> Tensor:
    """The row-major number of every token, blocks of 2x8x8 one after the other, time-major."""
    order = []
    for t in range(0, f, CHUNK):
        for r in range(0, rows, SIDE):
            for c in range(0, columns, SIDE):
                for i in range(CHUNK):
                    for j in range(SIDE):
                        first = ((t + i) * rows + r + j) * columns + c
                        order += range(first, first + SIDE)
    return torch.tensor(order)


def window(rows: int, columns: int, size: int | None) -> Tensor:
    """Allowed pairs of the blocks of one chunk, truncated at the border: boolean `s s`."""
    allowed = torch.ones(rows * columns, rows * columns, dtype=torch.bool)
    if size is None:
        return allowed
    low, high = -(size // 2), -(size // 2) + size - 1
    for a in range(rows * columns):
        for b in range(rows * columns):
            down, right = b // columns - a // columns, b % columns - a % columns
            allowed[a, b] = low <= down <= high and low <= right <= high
    return allowed


def choose(q: Tensor, k: Tensor, local: Tensor, ratio: float) -> tuple[Tensor, float]:
    """The pairs a query chunk keeps, and how near its threshold the nearest other pair lies (relative).

    q: pooled queries `B heads s d`, k: pooled keys of all visible chunks `B heads n*s d`, local `s s`.
    """
    b, heads, s, d = q.shape
    legal = torch.cat([local] * (k.shape[2] // s), 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(d)
    e = torch.where(legal, torch.exp(scores - scores.amax(-1, keepdim=True)), torch.zeros_like(scores))
    p = e / e.sum(-1, keepdim=True)
    pairs = s * k.shape[2]
    keep = max(1, min(int(s * s * ratio) - 1, pairs - 1))
    mask, nearest = torch.zeros_like(p, dtype=torch.bool), math.inf
    for i in range(b):
        for h in range(heads):
            falling = sorted(p[i, h].flatten().tolist(), reverse=True)
            threshold = falling[keep] if keep < pairs else -1.0
            mask[i, h] = p[i, h] > threshold
            if threshold > 0:
                others = [abs(x - threshold) / threshold for x in falling[:keep] + falling[keep + 1 :]]
                nearest = min([nearest, *others])
    return mask, nearest


class StreamingDiT:
    """Calls in order: the first of three chunks, then of one. `masks` and `nearest` are the last call's."""

    def __init__(self, weights: Weights, context: Tensor, settings: Settings):
        self.w, self.settings = weights, settings
        self.layers = 1 + max(int(n.split(".")[1]) for n in weights if n.startswith("blocks."))
        text = gelu_tanh(linear(weights, "text_embedding.0", context))
        self.context = linear(weights, "text_embedding.2", text)
        self.keys: list[list[Tensor]] = [[] for _ in range(self.layers)]  # per layer, chunks `B t D`
        self.values: list[list[Tensor]] = [[] for _ in range(self.layers)]
        self.next_latent = 0
        self.masks: list[Tensor] = []
        self.nearest = math.inf

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.settings.heads, -1)

    def call(self, latent: Tensor, features: list[Tensor]) -> Tensor:
        """Latents `B 16 f h w`, features (row-major tokens `B T D`) of the first layers -> velocity."""
        w, eps = self.w, self.settings.eps
        b, channels, f, height, width = latent.shape
        grid = f, height // 2, width // 2
        order = block_order(*grid)
        weight = w["patch_embedding.weight"]
        x = F.conv3d(latent, weight, w["patch_embedding.bias"], stride=(1, 2, 2))
        x = x.flatten(2).transpose(1, 2)[:, order]
        t = torch.full((b,), self.settings.timestep)
        e = time_features(t, w["time_embedding.0.weight"].shape[1]).to(x.dtype)
        e = linear(w, "time_embedding.2", silu(linear(w, "time_embedding.0", e)))
        e6 = linear(w, "time_projection.1", silu(e)).reshape(b, 6, -1)
        frames = list(range(self.next_latent, self.next_latent + f))
        by = rotation(frames, grid[1], grid[2], x.shape[-1] // self.settings.heads)[order]
        self.masks, self.nearest = [], math.inf
        for layer in range(self.layers):
            if layer < len(features):
                x = x + features[layer][:, order]
            x = self._block(layer, x, e6, by, grid)
        self.next_latent += f
        self._forget()
        shift, scale = ((w["head.modulation"] + e[:, None])[:, i : i + 1] for i in range(2))
        y = linear(w, "head.head", plain_norm(x, eps) * (1 + scale) + shift)
        y = y[:, torch.argsort(order)].reshape(b, *grid, 2, 2, channels)
        return y.permute(0, 6, 1, 2, 4, 3, 5).reshape(latent.shape)

    def _block(self, layer: int, x: Tensor, e6: Tensor, by: Tensor, grid: tuple[int, int, int]) -> Tensor:
        w, eps, at = self.w, self.settings.eps, f"blocks.{layer}"
        m = [(w[f"{at}.modulation"] + e6)[:, i : i + 1] for i in range(6)]
        y = plain_norm(x, eps) * (1 + m[1]) + m[0]
        q = rms(linear(w, f"{at}.self_attn.q", y), w[f"{at}.self_attn.norm_q.weight"], eps)
        k = rms(linear(w, f"{at}.self_attn.k", y), w[f"{at}.self_attn.norm_k.weight"], eps)
        q, k = rotate(self.heads(q), by), rotate(self.heads(k), by).flatten(2)
        o = self._attend(layer, q, k, linear(w, f"{at}.self_attn.v", y), grid)
        x = x + m[2] * linear(w, f"{at}.self_attn.o", o)
        y = plain_norm(x, eps) * w[f"{at}.norm3.weight"] + w[f"{at}.norm3.bias"]
        q = rms(linear(w, f"{at}.cross_attn.q", y), w[f"{at}.cross_attn.norm_q.weight"], eps)
        k = rms(linear(w, f"{at}.cross_attn.k", self.context), w[f"{at}.cross_attn.norm_k.weight"], eps)
        v = linear(w, f"{at}.cross_attn.v", self.context)
        o = self._softmax(self.heads(q), self.heads(k), self.heads(v), None)
        x = x + linear(w, f"{at}.cross_attn.o", o)
        y = plain_norm(x, eps) * (1 + m[4]) + m[3]
        return x + m[5] * linear(w, f"{at}.ffn.2", gelu_tanh(linear(w, f"{at}.ffn.0", y)))

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int]) -> Tensor:
        chunks = grid[0] // CHUNK
        self.keys[layer] += k.chunk(chunks, 1)
        self.values[layer] += v.chunk(chunks, 1)
        keys, values = torch.cat(self.keys[layer], 1), torch.cat(self.values[layer], 1)
        s = (grid[1] // SIDE) * (grid[2] // SIDE)
        local = window(grid[1] // SIDE, grid[2] // SIDE, self.settings.local_range)
        pooled_q, pooled_k = (
            self.heads(y.flatten(2).reshape(y.shape[0], -1, BLOCK, y.flatten(2).shape[-1]).mean(2))
            for y in (q, keys)
        )
        rows = []
        for c in range(chunks):
            mine = pooled_q[:, c * s : (c + 1) * s].transpose(1, 2)
            mask, nearest = choose(mine, pooled_k.transpose(1, 2), local, self.settings.topk_ratio)
            self.nearest = min(self.nearest, nearest)
            rows.append(mask)
        mask = torch.cat(rows, 2)
        self.masks.append(mask)
        tokens = mask.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)
        return self._softmax(q, self.heads(keys), self.heads(values), tokens)

    @staticmethod
    def _softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`B T heads d` each, mask `B heads T K`; a query without a key gives zeros. -> `B T D`."""
        out = torch.empty_like(q)
        for h in range(q.shape[2]):
            scores = q[:, :, h] @ k[:, :, h].transpose(1, 2) / math.sqrt(q.shape[-1])
            if mask is not None:
                scores = scores.masked_fill(~mask[:, h], -math.inf)
            p = torch.softmax(scores, -1)
            if mask is not None:
                p = torch.where(mask[:, h].any(-1, keepdim=True), p, torch.zeros_like(p))
            out[:, :, h] = p @ v[:, :, h]
        return out.flatten(2)

    def _forget(self) -> None:
        """After each call one oldest chunk goes where more than int(kv_ratio) are kept."""
        for kept in (*self.keys, *self.values):
            if len(kept) > int(self.settings.kv_ratio):
                del kept[0]
