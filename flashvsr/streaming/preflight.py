"""How much memory a stream will take, before it takes any; and the tiles that fit.

The stream itself is run once without data (torch's fake tensors): every tensor has a size and no content, and
the bytes alive at once are counted. So the numbers follow the code and no formula can fall behind it. What
kernels take for themselves is added: attention's scratch and, on a CPU, what convolutions lay out anew.

Sizes are in bytes; heights and widths are the padded output's. Checked against measured peaks on a CPU in
tests/flashvsr/test_preflight.py; what a GPU's libraries add is not measured.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashvsr.attention.backends.gather import SCRATCH
from flashvsr.attention.plans import CachedStreaming
from flashvsr.attention.selection import pool
from flashvsr.base.cli import UserError
from flashvsr.base.heap import give_back
from flashvsr.config import ModelConfig
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.streaming.stream import FIRST_LATENTS, STEP_LATENTS, Stream, StreamSettings
from flashvsr.streaming.tiling import Tiles, candidates
from flashvsr.weights.folder import FlashVSR

GIB = 2**30
SHARE = 0.9  # of what is free: the rest is for what is not counted
FRAGMENTS = 1.15  # what an allocator holds beside what is asked of it; peaks measured on a CPU fit with it
FIRST_FRAMES, STEP_FRAMES = 4 * FIRST_LATENTS + 1, 4 * STEP_LATENTS
M = TypeVar("M", bound=nn.Module)
PARTS = ("dit", "lr_projector", "tc_decoder", "vae")


class _Alive(TorchDispatchMode):
    """Counts the bytes of the fake tensors that are alive, and the most there were at once."""

    def __init__(self, modules: Sequence[nn.Module], relayout: bool) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.relayout = relayout
        # views of weights take nothing
        weights = [t for m in modules for group in (m.parameters(), m.buffers()) for t in group]
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: t for t in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        extra = 0
        if self.relayout and func is torch.ops.aten.convolution.default:
            # the input and the result in the layout of the kernel: blocks of 16 channels
            extra = sum(t.nbytes * -(-t.shape[1] // 16) * 16 // t.shape[1] for t in (args[0], out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, FakeTensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now + extra)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size


class _Fused(TorchFunctionMode):
    """Attention as a fused kernel computes it: no scores in memory."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_empty(*q.shape[:-1], v.shape[-1])
        return func(*args, **(kwargs or {}))


def _attend(plan: CachedStreaming, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`CachedStreaming.attend` with a backend that only takes its memory."""
    pooled = pool(k.transpose(1, 2), plan.block_tokens)
    for i, chunk in enumerate(plan.chunks):
        tokens, blocks = (slice(i * n, (i + 1) * n) for n in (plan.chunk_tokens, plan.per_chunk))
        plan.ring.write(layer, chunk, k[:, tokens], v[:, tokens], pooled[:, :, blocks])
    q = q.transpose(1, 2)
    plan.selections[layer] = plan._select(layer, q)
    scratch = torch.empty(SCRATCH, dtype=torch.uint8, device=q.device)
    out = torch.empty_like(q)
    del scratch
    return out.transpose(1, 2)


class _Dry(Stream):
    """A stream of fake tensors."""

    def plan(self, latents: int, height: int, width: int) -> CachedStreaming:
        plan = super().plan(latents, height, width)
        plan.local = plan.allowed = None  # counting allowed pairs would need data
        plan.attend = MethodType(_attend, plan)
        return plan

    def _begin(self, rows: int, columns: int) -> None:
        super()._begin(rows, columns)
        self.local = None


def _nbytes(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return sum(t.nbytes for group in (module.parameters(), module.buffers()) for t in group)


def _cast(module: M, dtype: torch.dtype) -> M:
    """`module.to(dtype)`, which fake tensors refuse."""
    for each in module.modules():
        for name, value in each.named_parameters(recurse=False):
            setattr(each, name, nn.Parameter(value.to(dtype), requires_grad=False))
        for name, value in each.named_buffers(recurse=False):
            setattr(each, name, value.to(dtype))
    return module


@dataclass(frozen=True)
class Part:
    """One tile on the device: what it keeps between steps, and the most a step takes beyond that."""

    state: int
    working: int
    beside: int = 0  # more, where the decoder works beside the next call's DiT


@lru_cache(64)
def one_tile(
    config: ModelConfig,
    dtype: torch.dtype,
    size: tuple[int, int],
    settings: StreamSettings,
    decoder: str,
    device: str,
) -> Part:
    """Runs the first call and one more of a tile of `size` without data, with two layers for all of them:
    what every layer adds is its keys and values."""
    layers = min(config.dit.layers, 2)
    shallow = replace(config.dit, layers=layers)
    with FakeTensorMode(), torch.no_grad():
        dit, projector = _cast(DiT(shallow), dtype), _cast(LRProjector(config.lr_projector), dtype)
        last = _cast(TCDecoder(config.tc_decoder) if decoder == "tc" else WanVAE(config.vae), dtype)
        dit.set_prompt(torch.empty(1, config.dit.text_len, config.dit.text_dim))
        stream = _Dry(Denoiser(dit, projector), last, settings, lambda i, shape: torch.empty(shape))
        halves = [0, 0]  # the most alive up to the latents, and after them
        with _Fused(), _Alive((dit, projector, last), device == "cpu") as alive:
            for frames in (FIRST_FRAMES, STEP_FRAMES):
                lr = torch.empty(1, 3, frames, *size)
                latent = stream.denoise(lr)
                halves[0], alive.peak = max(halves[0], alive.peak), alive.now
                stream.finish(latent, lr)
                halves[1], alive.peak = max(halves[1], alive.peak), alive.now
                del lr, latent
                gc.collect()  # what only circles hold would else count as kept
        ring = stream.ring.keys.nbytes + stream.ring.values.nbytes + stream.ring.pooled.nbytes
    others = ring // layers * (config.dit.layers - layers)
    working, beside = (int(FRAGMENTS * (half(halves) - alive.now)) for half in (max, min))
    return Part(alive.now + others, working, beside)


def _part(
    model: FlashVSR, size: tuple[int, int], settings: StreamSettings, decoder: str, device: str
) -> Part:
    weight = model.dit.patch_embedding.weight
    # what changes no size: one run serves all
    settings = replace(settings, attention="auto", local_range=None, boundary="truncated")
    return one_tile(model.config, weight.dtype, size, settings, decoder, device)


@dataclass(frozen=True)
class Estimate:
    """Bytes by part; `device` and `host` are the sums. On a CPU both are the same memory: `device`."""

    weights: int
    state: int  # of all tiles: keys, values and the memories of projector and decoder
    working: int  # the most that one step takes
    canvas: int  # of tiles: the whole picture's LR and SR frames
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.state + self.working + self.canvas

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"device": self.device}

    def __str__(self) -> str:
        parts = (
            ("weights", self.weights),
            ("state", self.state),
            ("one step", self.working),
            ("canvas", self.canvas),
        )
        return f"{self.device / GIB:.2f} GiB (" + ", ".join(f"{n} {b / GIB:.2f}" for n, b in parts if b) + ")"


def estimate(
    model: FlashVSR,
    tiles: Tiles,
    settings: StreamSettings,
    decoder: str,
    *,
    device: str = "cpu",
    offload: bool = False,
    pipelined: bool = False,
    part: Part | None = None,
) -> Estimate:
    """What streaming a picture cut into `tiles` takes on the device and in the host's memory.

    host: the results that wait there to be written, and what is offloaded; not the process itself. part: of
    one tile, where it is known.
    """
    part = part or _part(model, tiles.size, settings, decoder, device)
    count = len(tiles.places)
    held = {name: _nbytes(getattr(model, name)) for name in PARTS}
    weights, state, host = sum(held.values()), count * part.state, 0
    pixels = 3 * tiles.canvas[0] * tiles.canvas[1]
    results = 3 * FIRST_FRAMES * pixels  # of a call, and two that wait for the writer
    if offload:
        turns = {
            name: held[name] for name in ("dit", "lr_projector", {"tc": "tc_decoder"}.get(decoder, decoder))
        }
        host = weights + state
        weights, state = max(turns.values()), part.state
    canvas = 0
    if count > 1 or offload:
        # uint8 LR frames, the four that wait included, float32 SR frames, one frame's correction
        canvas = pixels * (2 * FIRST_FRAMES + 4 * (FIRST_FRAMES - 4) + 5 * 4)
    working = part.working + (part.beside if pipelined else 0)
    return Estimate(weights, state, working, canvas, host + results)


def free_bytes(device: torch.device) -> int | None:
    """What this process may still take of the device's memory, beside what it holds; None if unknown."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    give_back()
    line = next(x for x in info.read_text().splitlines() if x.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def budget(model: FlashVSR, device: torch.device, memory: float | Literal["auto"]) -> int | None:
    """The bytes that model and stream may take together: `memory` in GiB, or 0.9 of what is free.

    Weights are there already and count as free. None where nothing is known.
    """
    if memory != "auto":
        return int(memory * GIB)
    free = free_bytes(device)
    if free is None:
        return None
    held = sum(_nbytes(getattr(model, n)) for n in PARTS if getattr(model, n) is not None)
    return held + int(SHARE * free)


@dataclass(frozen=True)
class Preflight:
    """What is asked of one stream: the model with its settings, on a device, within `limit` bytes."""

    model: FlashVSR
    settings: StreamSettings
    decoder: str
    device: torch.device
    limit: int | None
    offload: bool = False

    def estimate(self, tiles: Tiles, **changed: Any) -> Estimate:
        """`estimate` of this; `changed`: settings, decoder, offload, pipelined instead of its own."""
        what = {"settings": self.settings, "decoder": self.decoder, "offload": self.offload} | changed
        return estimate(self.model, tiles, device=self.device.type, **what)

    def fits(self, tiles: Tiles, **changed: Any) -> bool:
        return self.limit is None or self.estimate(tiles, **changed).device <= self.limit

    def choose(
        self, canvas: tuple[int, int], overlap: int, multiple: tuple[int, int], below: int | None = None
    ) -> Tiles | None:
        """The tiles that compute the fewest pixels among those that fit; None when none do.

        overlap in output pixels; below: only tiles of fewer pixels than that.
        """
        guess = self._by_area(canvas, multiple)
        for tiles in candidates(canvas, overlap, multiple):
            if below is not None and tiles.area >= below:
                continue
            if self.limit is None:
                return tiles
            likely = estimate(
                self.model, tiles, self.settings, self.decoder, offload=self.offload, part=guess(tiles.area)
            )
            if likely.device <= self.limit and self.fits(tiles):
                return tiles
        return None

    def _by_area(self, canvas: tuple[int, int], multiple: tuple[int, int]) -> Callable[[int], Part]:
        """One tile's memory by its pixels, on the line through the smallest tile and the canvas: quick, and
        right to a few percent, as nearly all of it grows with pixels."""

        @lru_cache(2)
        def at(size: tuple[int, int]) -> Part:
            return _part(self.model, size, self.settings, self.decoder, self.device.type)

        def guess(area: int) -> Part:
            small, large = at(multiple), at(canvas)
            first, last = multiple[0] * multiple[1], canvas[0] * canvas[1]
            share = (area - first) / max(last - first, 1)
            return Part(
                round(small.state + share * (large.state - small.state)),
                round(small.working + share * (large.working - small.working)),
            )

        return guess

    def check(self, tiles: Tiles, overlap: int, multiple: tuple[int, int]) -> None:
        """UserError, with settings that would fit, when these tiles need more than there is."""
        if self.fits(tiles):
            return
        needed = self.estimate(tiles)
        raise UserError(
            f"{tiles.canvas[0]}x{tiles.canvas[1]} with tiles={tiles} needs about {needed} of the device's "
            f"memory, and {self.limit / GIB:.2f} GiB may be used; {self.proposal(tiles, overlap, multiple)}"
        )

    def proposal(self, tiles: Tiles, overlap: int, multiple: tuple[int, int]) -> str:
        """What to change, in words."""
        ways = []
        if self.choose(tiles.canvas, overlap, multiple) is not None:
            ways.append("tile=auto (--tile auto)")
        if self.settings.kv_chunks > 2 and self.fits(tiles, settings=replace(self.settings, kv_chunks=2)):
            ways.append("kv_chunks=2")
        if self.decoder == "vae" and self.model.tc_decoder is not None and self.fits(tiles, decoder="tc"):
            ways.append("decoder=tc")
        if not self.offload and self.device.type == "cuda" and self.fits(tiles, offload=True):
            ways.append("offload=True (--offload)")
        if ways:
            return "what would fit: " + ", or ".join(ways)
        return "no tiles fit: take a smaller scale, a smaller model or more memory"
