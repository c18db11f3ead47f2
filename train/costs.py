"""What one stage costs on one GPU: its models' state by item, what a step keeps, its operations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from flashvsr.base.cli import UserError
from flashvsr.config import PRESETS, ModelConfig
from train import footprint, work
from train.config import TrainConfig
from train.losses.pixel import fill
from train.parallel.fsdp2 import UNITS
from train.stages.feed import LR_FRAMES_OF_IMAGE, encode_clip

PREFIX = "VAE decode of the longest prefix, peak"
DEEPSPEED_BUCKET = 5 * 10**8  # elements, its default


@dataclass
class Costs:
    """Everything a stage costs on one GPU, bytes and operations."""

    parameters: dict[str, tuple[int, int, bool]] = field(default_factory=dict)  # all, trained, frozen model
    state: dict[str, dict[str, int]] = field(default_factory=dict)  # per model: item -> bytes
    inputs: int = 0
    turns: dict[str, dict[str, int]] = field(default_factory=dict)  # per turn: what its forward keeps, then
    # what comes and goes beside it
    frozen: dict[str, int] = field(default_factory=dict)  # peaks of forwards without gradient
    offloaded: int = 0  # of them, in host memory instead
    save_device: int = 0
    save_host: int = 0
    tokens: int = 0  # of a sample
    useful: float = 0.0  # operations of a sample, mean over steps
    executed: float = 0.0

    @property
    def held(self) -> int:
        """State that stays: all but gradients and communication."""
        gone = ("gradients", "communication")
        return sum(v for items in self.state.values() for k, v in items.items() if k not in gone)

    @property
    def peak(self) -> int:
        """The most of all moments: a turn with all its gradients, a frozen forward, a save."""
        passing = max(map(most, self.turns.values()))
        gradients = max(i.get("gradients", 0) + i.get("communication", 0) for i in self.state.values())
        return self.held + max(
            self.inputs + max(passing + gradients, max(self.frozen.values(), default=0)), self.save_device
        )


def most(items: Mapping[str, int]) -> int:
    """Of a turn: its first item lasts, the others follow each other."""
    first, *others = items.values()
    return first + max(others, default=0)


def role_state(module: nn.Module, kind: str, gpus: int, ema: bool) -> dict[str, int]:
    """Bytes per GPU of a trained role; the first rank's, whose slices are the largest."""
    params = list(module.parameters())
    trained = [p for p in params if p.requires_grad]

    def whole(some: Sequence[nn.Parameter]) -> int:
        return sum(4 * p.numel() for p in some)

    def sliced(some: Sequence[nn.Parameter]) -> int:
        if kind == "fsdp2":  # along the first axis
            return sum(4 * math.ceil(p.shape[0] / gpus) * (p.numel() // p.shape[0]) for p in some)
        return sum(4 * math.ceil(p.numel() / gpus) for p in some)

    sharded = kind in ("fsdp2", "zero3")
    buffers = sum(b.nbytes for b in module.buffers())
    items = {"weights": (sliced(params) if sharded else whole(params)) + buffers}
    items["gradients"] = whole(trained) if kind in ("ddp", "zero1") else sliced(trained)
    moments = whole(trained) if kind == "ddp" else sliced(trained)
    items["optimiser"] = 2 * moments + 4 * len(trained)  # and one count of steps each
    if kind.startswith("zero"):
        items["optimiser"] += sliced(trained)  # its own float32 copy of the slice
    if ema:
        items["EMA"] = sliced(trained) if sharded else whole(trained)
    items["communication"] = _communication(module, kind, gpus, whole(trained))
    return items


def _communication(module: nn.Module, kind: str, gpus: int, trained: int) -> int:
    if kind.startswith("zero"):
        return 4 * DEEPSPEED_BUCKET
    if gpus == 1:
        return 0
    if kind == "ddp":
        return trained  # the buckets that are summed over ranks are copies
    units = [m for m in module.modules() if isinstance(m, UNITS)]
    sizes = [sum(4 * p.numel() for p in unit.parameters()) for unit in units]
    rest = sum(4 * p.numel() for p in module.parameters()) - sum(sizes)
    return rest + 2 * max(sizes, default=0)  # one unit in use, the next on its way


def save_spike(config: TrainConfig, modules: Mapping[str, nn.Module]) -> tuple[int, int]:
    """Bytes of the whole state that a save puts into the main rank's host memory; and, where it is sliced, of
    the largest tensor, which every GPU holds whole meanwhile."""
    host = device = 0
    kind = config.parallel.kind
    for i, module in enumerate(modules.values()):
        state = [t.nbytes for t in module.state_dict().values()]
        trained = [4 * p.numel() for p in module.parameters() if p.requires_grad]
        ema = sum(trained) if i == 0 and config.optim.ema else 0
        host += sum(state) + 2 * sum(trained) + ema
        if kind != "ddp":
            device = max(device, *(state if kind in ("fsdp2", "zero3") else trained))
    return host, device


# ---- one stage ---------------------------------------------------------------------------------------------


def estimate(config: TrainConfig, gpus: int) -> Costs:
    """Costs of the configured stage on each of `gpus` GPUs. UserError: a batch that does not split."""
    per_round = config.micro_batch_size * gpus
    if config.global_batch_size % per_round:
        raise UserError(
            f"global_batch_size={config.global_batch_size} is not a multiple of micro_batch_size="
            f"{config.micro_batch_size} x gpus={gpus}; change one of them"
        )
    sizes, costs = PRESETS[config.scale.preset], Costs()
    with footprint.on_fake_gpu():
        modules, frozen = _models(config, sizes)
        kind = config.parallel.kind
        for i, (role, module) in enumerate(modules.items()):
            count = sum(p.numel() for p in module.parameters())
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            costs.parameters[role] = count, trained, False
            costs.state[role] = role_state(module, kind, gpus, ema=i == 0 and config.optim.ema > 0)
        for name, module in frozen.items():
            count = sum(p.numel() for p in module.parameters())
            costs.parameters[name] = count, 0, True
            tensors = [*module.parameters(), *module.buffers()]
            costs.state[name] = {"weights": sum(t.nbytes for t in tensors)}
        _activations(config, sizes, modules, frozen, costs)
        side = (
            (config.stage.crop,) * 2
            if config.stage.name == "vae"
            else (config.data.height, config.data.width)
        )
        pair = work.lpips(frozen["lpips"], *side) if "lpips" in frozen else (0, 0)
        costs.save_host, costs.save_device = save_spike(config, modules)
    costs.inputs *= config.global_batch_size // per_round  # a step's micro-batches wait together
    grids = work.grids(config)
    costs.tokens = 0 if config.stage.name in ("vae", "decoder") else sum(map(math.prod, grids))
    costs.useful, costs.executed = work.sample(config, sizes, grids, pair)
    return costs


def _perceptual(config: TrainConfig) -> bool:
    """Whether LPIPS is among the losses."""
    s = config.stage
    if s.name == "one_step":
        return s.loss.lpips > 0
    return (s.name == "vae" and s.lpips > 0) or (s.name == "decoder" and max(s.lpips, s.vae_lpips) > 0)


def _models(config: TrainConfig, sizes: ModelConfig) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Trained roles, the main one first, and frozen models, as the stage's `build` makes them."""
    s = config.stage
    frozen = {"lpips": footprint.make_lpips(config)} if _perceptual(config) else {}
    if s.name == "vae":
        return {"vae": footprint.ready_to_train(footprint.WanVAE(sizes.vae), config)}, frozen
    vae = {"frozen vae": footprint.WanVAE(sizes.vae).requires_grad_(False)}
    if s.name == "decoder":
        decoder = footprint.ready_to_train(footprint.TCDecoder(sizes.tc_decoder), config)
        return {"decoder": decoder}, vae | frozen
    mode = s.projector_mode if s.name == "teacher" else "causal"
    student = footprint.make_denoiser(config, sizes, projector=True, mode=mode)
    if s.name != "one_step":
        return {"teacher" if s.name == "teacher" else "student": student}, vae
    if not s.loss.dmd:
        return {"student": student}, vae | frozen
    plain = replace(config, stage=replace(s, lora_rank=0))
    teacher = footprint.make_denoiser(plain, sizes, projector=True, mode="clip").requires_grad_(False)
    fake = footprint.make_denoiser(config, sizes, projector=False, mode="causal")
    return {"student": student, "fake": fake}, {"frozen teacher": teacher} | vae | frozen


def _activations(
    config: TrainConfig,
    sizes: ModelConfig,
    modules: Mapping[str, nn.Module],
    frozen: Mapping[str, nn.Module],
    costs: Costs,
) -> None:
    d, s, batch, grids = config.data, config.stage, config.micro_batch_size, work.grids(config)
    size, latents = (d.height, d.width), d.latents_per_clip
    if s.name == "vae":
        side = 4 * s.latents - 3, s.crop, s.crop
        costs.inputs = 4 * batch * 3 * math.prod(side)
        kept = footprint.vae_autoencoder(config, modules["vae"], frozen.get("lpips"))
        costs.turns["vae"] = {"VAE, LPIPS (approx.)": kept}
        return
    tokens = [math.prod(grid) for grid in grids]
    frames = [4 * f - 3 + (4 * f + 1 if f > 1 else LR_FRAMES_OF_IMAGE) for f, _, _ in grids]  # HR and LR
    costs.inputs = 4 * batch * (3 * sum(frames) * d.height * d.width + 64 * sum(tokens))
    vae = frozen["frozen vae"]

    def encode() -> None:  # clips are encoded one by one
        with footprint.autocast(config):
            encode_clip(vae, torch.zeros(1, 3, 4 * latents - 3, *size))

    if d.latents == "off" or d.slots is None:
        costs.frozen["VAE encode"] = footprint.forward_peak(encode)

    def prefix(count: int) -> None:
        z = torch.zeros(batch, vae.config.z_dim, latents, size[0] // 8, size[1] // 8)
        with footprint.autocast(config):
            fill(lambda start, stop, memory: vae.decode(z[:, :, start:stop], memory), latents - count)

    if s.name == "decoder":
        kept = footprint.tc_pixels(config, modules["decoder"], frozen.get("lpips"), s.window, size)
        costs.turns["decoder"] = {"TC decoder and LPIPS": kept}
        if s.vae_mse or s.vae_lpips:
            costs.turns["decoder"][PREFIX] = footprint.forward_peak(lambda: prefix(0))
        return
    sparse = s.name != "teacher"
    block = (
        {"one block again": footprint.one_block(config, sizes, grids, sparse=sparse)}
        if config.recomputes
        else {}
    )
    for role, module in modules.items():
        kept, sent = footprint.denoiser(config, sizes, module, grids, sparse=sparse and role != "fake")
        costs.turns[role] = {"DiT and projector" if role != "fake" else "DiT": kept, **block}
        costs.offloaded = max(costs.offloaded, sent)
    if s.name == "one_step":
        kept = footprint.vae_pixels(config, vae, frozen.get("lpips"), s.pixel_latents, size)
        costs.turns["student"]["VAE decoder, LPIPS"] = kept
        costs.turns["student"][PREFIX] = footprint.forward_peak(lambda: prefix(s.pixel_latents))
        if s.loss.dmd:
            wide = 2 if config.precision == "bf16" else 4
            costs.inputs += batch * wide * sum(tokens) * sizes.dit.dim * sizes.lr_projector.layer_num
