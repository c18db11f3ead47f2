"""What a forward keeps for its backward pass, counted on fake tensors: the real modules run without memory.

Counted are unique storages handed to `saved_tensors_hooks`, parameters excluded; copies of weights in bf16
that autocast makes and keeps are included. Attention is taken as fused (q, k, v, output, log-sum-exp), as
every backend but `reference` and masked `dense` keeps it. Buffers inside an operation are not seen.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashvsr.attention.plans import PackedDense, SparseCausal
from flashvsr.config import DiTConfig, ModelConfig
from flashvsr.models import lr_projector
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import Block, DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from train.config import TrainConfig
from train.losses.pixel import PIECE, lpips_frames, mse
from train.parallel import activations
from train.parallel.apply import ready_to_train

Grid = tuple[int, int, int]  # latents, rows, columns of tokens


class Saved:
    """Bytes that the forward passes inside `with` keep; of `known`, tensors or modules, none count."""

    def __init__(self, *known: nn.Module | Tensor | None):
        modules = [one for one in known if isinstance(one, nn.Module)]
        tensors = [one for one in known if isinstance(one, Tensor)]
        tensors += [p for module in modules for p in module.parameters()]
        self.own = {t.untyped_storage()._cdata for t in tensors}
        self.storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.own:
            self.storages[storage._cdata] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())

    def __enter__(self) -> Saved:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.hooks.__exit__(*error)


class Peak(TorchDispatchMode):
    """The most bytes alive at once of tensors made inside `with`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, address: int, size: int) -> None:
        self.alive.discard(address)
        self.now -= size


class _Fused(SparseCausal):
    """Stages 2 and 3 as memory sees them: a fused attention keeps the same whatever it selects."""

    def __init__(self, grid: Grid, dit: DiTConfig):
        # which chunks see which is no question of memory, and fake tensors have no answer
        super(SparseCausal, self).__init__(grid, 0, dit.block, dit.head_dim, None, "cpu")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@contextmanager
def _counting_host() -> Iterator[list[int]]:
    """Bytes of each tensor that `offload` sends to host memory inside `with`; none is sent."""
    sent: list[int] = []
    real = activations.to_host

    def count(storage: torch.UntypedStorage) -> Tensor:
        sent.append(storage.nbytes())
        return torch.empty(0)

    activations.to_host = count
    try:
        yield sent
    finally:
        activations.to_host = real


@contextmanager
def on_fake_gpu(gpu: bool = True) -> Iterator[None]:
    """Fake tensors; with `gpu` the projector takes the form that it takes there."""
    taps = lr_projector.by_taps
    lr_projector.by_taps = lr_projector.by_products if gpu else taps
    try:
        with FakeTensorMode():
            yield
    finally:
        lr_projector.by_taps = taps


def make_denoiser(config: TrainConfig, sizes: ModelConfig, *, projector: bool, mode: str) -> Denoiser:
    """A trained role as the stage makes it."""
    dit = DiT(sizes.dit)
    dit.set_prompt(torch.zeros(1, sizes.dit.text_len, sizes.dit.text_dim))
    feeds = LRProjector(replace(sizes.lr_projector, mode=mode)) if projector else None
    return ready_to_train(Denoiser(dit, feeds), config)


def autocast(config: TrainConfig) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext()


def denoiser(
    config: TrainConfig, sizes: ModelConfig, module: Denoiser, grids: Sequence[Grid], *, sparse: bool
) -> tuple[int, int]:
    """Bytes one forward of `module` on micro_batch_size packs of `grids` keeps: on the GPU, on the host."""
    batch, dit = config.micro_batch_size, sizes.dit
    latents = [torch.zeros(batch, dit.in_channels, f, 2 * h, 2 * w) for f, h, w in grids]
    plan = _plan(dit, grids, sparse)
    fed: dict[str, Any] = {}
    if module.lr_projector is not None:
        fed["lr"] = [torch.zeros(batch, 3, 4 * f + 1, 16 * h, 16 * w) for f, h, w in grids]
    else:
        # the features are the step's, not the forward's: counted with the inputs
        features = [torch.zeros(batch, f, h, w, dit.dim) for f, h, w in grids]
        fed["features"] = [features] * sizes.lr_projector.layer_num
    with Saved(module) as saved, _counting_host() as sent, autocast(config):
        module(latents, torch.zeros(batch, len(grids)), plan, **fed)
    return saved.bytes, sum(sent)


def _plan(dit: DiTConfig, grids: Sequence[Grid], sparse: bool) -> PackedDense | _Fused:
    return _Fused(*grids, dit) if sparse else PackedDense(grids, dit.head_dim)


def one_block(config: TrainConfig, sizes: ModelConfig, grids: Sequence[Grid], *, sparse: bool) -> int:
    """Bytes that what is computed again at once keeps: a block, or the larger of its halves; and with
    `offload` what comes back for it."""
    dit = replace(sizes.dit, layers=1)
    module = make_denoiser(config, replace(sizes, dit=dit), projector=False, mode="causal").dit
    block, plan = module.blocks[0], _plan(dit, grids, sparse)
    batch, tokens = config.micro_batch_size, sum(math.prod(grid) for grid in grids)
    x = torch.zeros(batch, tokens, dit.dim, dtype=torch.bfloat16 if config.precision == "bf16" else None)
    e = plan.spread(torch.zeros(batch, len(grids), 6, dit.dim))
    x.requires_grad_(), e.requires_grad_()
    with autocast(config):
        if config.checkpointing == "full":
            with Saved(module, x, e) as saved:
                Block.forward(block, x, e, plan, 0)
            return saved.bytes + config.offload * x.nbytes
        with Saved(module, x, e) as before:
            q, k, v = block.before(x, e, plan.rope)
        with Saved(module, q, k, v) as kept:
            o = plan.attend(0, q, k, v)
        with Saved(module, x, e, o) as after:
            block.after(x, o, e)
    returned = x.nbytes + max(q.nbytes + k.nbytes + v.nbytes + kept.bytes, o.nbytes)
    return max(before.bytes, after.bytes) + config.offload * returned


def make_lpips(config: TrainConfig) -> nn.Module:
    from eval.metrics import Lpips

    lpips = Lpips(config.scale.lpips_net, weights="random")
    for (
        module
    ) in lpips.modules():  # its trunk comes from the meta device, which fake tensors on the CPU refuse
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.zeros(p.shape), requires_grad=False))
        for name, b in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros(b.shape))
    return lpips


def vae_pixels(
    config: TrainConfig, vae: WanVAE, lpips: nn.Module | None, count: int, size: tuple[int, int]
) -> int:
    """Bytes kept between `count` latents with gradient and the pixel losses of their VAE frames."""
    vae.requires_grad_(False).checkpointing = config.recomputes
    z = torch.zeros(config.micro_batch_size, vae.config.z_dim, count + PIECE, size[0] // 8, size[1] // 8)
    with Saved(vae, lpips) as saved, autocast(config):
        with torch.no_grad():
            _, memory = vae.decode(z[:, :, :PIECE])
        sr, _ = vae.decode(z[:, :, PIECE:].clone().requires_grad_(), memory)
        _pixel_losses(config, lpips, sr)
    return saved.bytes


def tc_pixels(
    config: TrainConfig, decoder: TCDecoder, lpips: nn.Module | None, count: int, size: tuple[int, int]
) -> int:
    """Bytes kept by the trained decoder and both its losses over a window at the start of a clip."""
    batch = config.micro_batch_size
    z = torch.zeros(batch, decoder.config.latent_channels, count, size[0] // 8, size[1] // 8)
    with Saved(decoder, lpips) as saved, autocast(config):
        sr, _ = decoder(z, torch.zeros(batch, 3, 4 * count - 3, *size))
        for _ in range(1 + bool(config.stage.vae_mse or config.stage.vae_lpips)):
            _pixel_losses(config, lpips, sr)
    return saved.bytes


def vae_autoencoder(config: TrainConfig, vae: WanVAE, lpips: nn.Module | None) -> int:
    """Bytes kept by a step of stage vae on its crop."""
    s, batch = config.stage, config.micro_batch_size
    vae.checkpointing = config.recomputes
    video = torch.zeros(batch, 3, 4 * s.latents - 3, s.crop, s.crop)
    with Saved(vae, lpips) as saved, autocast(config):
        noise = torch.zeros(batch, vae.config.z_dim, s.latents, s.crop // 8, s.crop // 8)
        _pixel_losses(config, lpips, vae(video, noise)[0])
    return saved.bytes


def _pixel_losses(config: TrainConfig, lpips: nn.Module | None, sr: Tensor) -> None:
    """Computed one after the other, all kept until each goes back to the frames."""
    frames = sr.detach().requires_grad_()
    mse(frames, torch.zeros_like(frames))
    if lpips is not None:
        lpips_frames(lpips, frames, torch.zeros_like(frames), frame_by_frame=config.recomputes)


@torch.no_grad()
def forward_peak(run: Callable[[], Any]) -> int:
    """The most bytes alive at once while `run` computes without gradient."""
    with Peak() as peak:
        run()
    return peak.most
