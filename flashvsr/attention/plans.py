"""The three attention plans. A plan owns order, position and choice for one forward:

    tokens = plan.pack(grids)      per segment `B f h w C` -> one sequence `B T C`
    grids  = plan.unpack(tokens)   and back
    plan.rope                      cos, sin for every token, `T d/2`
    plan.spread(values)            per segment `B S ...` -> `B 1 ...` (one segment) or `B T ...`
    plan.attend(layer, q, k, v)    `B T heads d` -> `B T heads d`

`PackedDense` (stage 1, teacher, fake score), `SparseCausal` (stages 2 and 3, whole clip in parallel) and
`CachedStreaming` (inference, chunk by chunk) compute the same function where they overlap. A new pattern
is a new plan. The blocks a sparse plan chose are kept per layer in `plan.selections`, so activation
checkpointing recomputes the same attention; a layer's entry put there before the forward is used as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flashvsr.attention import backends
from flashvsr.attention.dense import dense_attention
from flashvsr.attention.layout import Block, check_grid, from_blocks, to_blocks
from flashvsr.attention.ring import Ring
from flashvsr.attention.selection import Selection, causal_chunks, pool, select
from flashvsr.models.rope import grid_rope

Grid = tuple[int, int, int]
CHUNK = 2  # latents in a chunk
FIRST_CHUNKS = 3  # chunks that see each other fully, and arrive together in streaming


class Plan(Protocol):
    rope: tuple[Tensor, Tensor]

    def pack(self, grids: Sequence[Tensor]) -> Tensor: ...
    def unpack(self, tokens: Tensor) -> list[Tensor]: ...
    def spread(self, values: Tensor) -> Tensor: ...
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def training_ratio(sparse_ratio: float | None, area: int, height: int, width: int) -> float | None:
    """The top-k ratio at an output size: sparse_ratio * A / (H * W), A the area of the student's training.

    For the release's area the product is rounded after each side, as its scripts do: at a sparse_ratio of 1.4
    or 1.9 `sparse_ratio * (768 * 1280)` ends one pair away at most sizes.
    """
    if sparse_ratio is None:
        return None
    scaled = sparse_ratio * 768 * 1280 if area == 768 * 1280 else sparse_ratio * area
    return scaled / (height * width)


class PackedDense:
    """Dense attention inside each segment; segments are clips or images, each with its own positions."""

    def __init__(self, grids: Sequence[Grid], head_dim: int, device: torch.device | str = "cpu"):
        self.grids = list(grids)
        self.sizes = [f * h * w for f, h, w in self.grids]
        ropes = [grid_rope(torch.arange(f), h, w, head_dim, device) for f, h, w in self.grids]
        self.rope = tuple(torch.cat([x.flatten(0, 2) for x in part]) for part in zip(*ropes, strict=True))

    def pack(self, grids: Sequence[Tensor]) -> Tensor:
        return torch.cat([g.flatten(1, 3) for g in grids], 1)

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        parts = tokens.split(self.sizes, 1)
        return [part.unflatten(1, grid) for part, grid in zip(parts, self.grids, strict=True)]

    def spread(self, values: Tensor) -> Tensor:
        if len(self.sizes) == 1:
            return values
        repeats = torch.tensor(self.sizes, device=values.device)
        return values.repeat_interleave(repeats, dim=1, output_size=sum(self.sizes))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(x.split(self.sizes, 1) for x in (q, k, v)), strict=True)
        return torch.cat([dense_attention(*part) for part in parts], 1)


class _Blocked:
    """What the two block-sparse plans share: one clip in block order."""

    def __init__(
        self,
        grid: Grid,
        first_latent: int,
        block: Block,
        head_dim: int,
        local: Tensor | None,
        device: torch.device | str,
    ):
        check_grid(grid, block)
        self.local = local
        self.allowed = None if local is None else int(local.sum())
        self.grid, self.block = grid, block
        self.block_tokens = block[0] * block[1] * block[2]
        self.per_chunk = (grid[1] // block[1]) * (grid[2] // block[2])
        self.chunk_tokens = self.per_chunk * self.block_tokens
        frames = torch.arange(first_latent, first_latent + grid[0])
        rope = grid_rope(frames, grid[1], grid[2], head_dim, device)
        self.rope = tuple(to_blocks(x[None], block)[0] for x in rope)

    def pack(self, grids: Sequence[Tensor]) -> Tensor:
        (grid,) = grids
        return to_blocks(grid, self.block)

    def unpack(self, tokens: Tensor) -> list[Tensor]:
        return [from_blocks(tokens, self.grid, self.block)]

    def spread(self, values: Tensor) -> Tensor:
        return values


class SparseCausal(_Blocked):
    """A whole clip in one masked forward: chunk-causal with a window, block-sparse by selection.

    window: chunks a chunk sees, itself included (None: all past ones); ratio: the top-k ratio at this size
    (None: every legal pair). Streaming with `kv_chunks` past chunks equals window = kv_chunks + 1.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        block: Block,
        head_dim: int,
        ratio: float | None,
        window: int | None = None,
        local: Tensor | None = None,
        backend: str = "auto",
        device: torch.device | str = "cpu",
    ):
        super().__init__(grid, 0, block, head_dim, local, device)
        self.ratio, self.backend = ratio, backend
        chunks = grid[0] // CHUNK
        seen = causal_chunks(chunks, chunks if window is None else window)
        self.visible = [row.nonzero().flatten().tolist() for row in seen]
        self.selections: dict[int, Selection] = {}

    @torch.no_grad()
    def _select(self, q: Tensor, k: Tensor) -> Selection:
        pooled = pool(k, self.block_tokens).unflatten(2, (-1, self.per_chunk))
        return select(
            pool(q, self.block_tokens),
            lambda chunks: pooled[:, :, chunks].flatten(2, 3),
            self.visible,
            [c * self.per_chunk for c in range(len(self.visible))],
            key_blocks=len(self.visible) * self.per_chunk,
            per_chunk=self.per_chunk,
            block_tokens=self.block_tokens,
            ratio=self.ratio,
            local=self.local,
            allowed=self.allowed,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if layer not in self.selections:
            self.selections[layer] = self._select(q, k)
        return backends.sparse_attention(q, k, v, self.selections[layer], backend=self.backend).transpose(
            1, 2
        )


class CachedStreaming(_Blocked):
    """One streaming call: the new latents attend to themselves and to the chunks the ring still holds.

    Borrows the ring: `attend` writes each layer's new keys and values, the stream advances it after the
    forward. `local` is the allowed pairs within a chunk's blocks (`local_window`).
    """

    def __init__(
        self,
        grid: Grid,
        first_latent: int,
        ring: Ring,
        *,
        block: Block,
        head_dim: int,
        ratio: float | None,
        local: Tensor | None = None,
        backend: str = "auto",
        device: torch.device | str = "cpu",
    ):
        super().__init__(grid, first_latent, block, head_dim, local, device)
        first = first_latent // CHUNK
        self.ring, self.ratio, self.backend = ring, ratio, backend
        self.chunks = list(range(first, first + grid[0] // CHUNK))
        self.selections: dict[int, Selection] = {}

    @torch.no_grad()
    def _select(self, layer: int, q: Tensor) -> Selection:
        ring, s = self.ring, self.per_chunk
        seen = [*ring.chunks, *self.chunks]
        cached = ring.pooled[layer]
        return select(
            pool(q, self.block_tokens),
            lambda chunks: torch.cat([cached[:, :, ring.blocks(c)] for c in chunks], 2),
            [seen] * len(self.chunks),
            {c: ring.slot(c) * s for c in seen},
            key_blocks=ring.slots * s,
            per_chunk=s,
            block_tokens=self.block_tokens,
            ratio=self.ratio,
            local=self.local,
            allowed=self.allowed,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ring = self.ring
        pooled = pool(k.transpose(1, 2), self.block_tokens)
        for i, chunk in enumerate(self.chunks):
            tokens, blocks = (slice(i * n, (i + 1) * n) for n in (self.chunk_tokens, self.per_chunk))
            ring.write(layer, chunk, k[:, tokens], v[:, tokens], pooled[:, :, blocks])
        q = q.transpose(1, 2)
        if layer not in self.selections:
            self.selections[layer] = self._select(layer, q)
        out = backends.sparse_attention(
            q, ring.keys[layer], ring.values[layer], self.selections[layer], backend=self.backend
        )
        return out.transpose(1, 2)
