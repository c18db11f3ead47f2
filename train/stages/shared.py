"""What all stages share: models from folders, data and cached latents, engines, and the parts they leave."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flashvsr
from data.latents import cached
from data.loader import DataConfig, batches, open_dataset
from eval.metrics import Lpips
from flashvsr.attention.plans import PackedDense
from flashvsr.base.cli import UserError
from flashvsr.base.draws import Draw, seed_of
from flashvsr.base.resize import bicubic_8bit, to_signed
from flashvsr.config import PRESETS, ModelConfig
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import DiT
from flashvsr.models.prompt import random_prompt
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.folder import FlashVSR, ModelInfo, newest
from train.config import STAGES, TrainConfig
from train.ema import Ema
from train.launch import World
from train.lora import inject
from train.losses.pixel import lpips_frames
from train.optim import build_optimizer
from train.parallel.ddp import DdpEngine
from train.parallel.engine import Engine
from train.turns import Losses

Loss = Callable[["Inputs", Draw], Losses]
FROZEN = ("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.", "text_embedding.")  # the prompt stays exact
LR_FRAMES_OF_IMAGE = 5


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device, per segment: HR frames, LR at output size (both `B 3 F H W` in [-1,1]),
    latents `B 16 n h w`; and what a stage computes beforehand."""

    hr: list[Tensor]
    lr: list[Tensor]
    latents: list[Tensor]
    extra: Mapping[str, Any]

    @property
    def batch(self) -> int:
        return self.lr[0].shape[0]


class Stage:
    """A stage is its roles, `prepare`, and a list of turns; the loop knows no more than this."""

    needs_latents = True
    frozen_vae: WanVAE
    sizes: ModelConfig
    fixed_prompt: Tensor

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world, self.device = config, world, world.device
        self.roles: dict[str, Engine] = {}
        self.ema: Ema | None = None
        torch.manual_seed(seed_of(config.seed, "init", config.stage.name))
        self.build()
        self.main = next(iter(self.roles))
        if config.optim.ema:
            self.ema = Ema(self.roles[self.main].trained(), config.optim.ema)

    # ---- what a stage defines ---------------------------------------------------------------------------

    def build(self) -> None:
        """Loads the models and fills `roles`, the main one first."""
        raise AssertionError("a stage builds its roles")

    def prepare(self, micro: Mapping[str, Any], draw: Draw) -> Inputs:
        """A batch on the device, frozen features included; no gradient."""
        return self.inputs(micro)

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        """Which role learns from which loss at this step (0 is the first), in order."""
        raise AssertionError("a stage says who learns")

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        """The held-out loss, `B`: what `expect` in the scale speaks of."""
        raise AssertionError("a stage has a held-out loss")

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor | None:
        """SR frames of a held-out clip by the live model, uint8 `F H W 3`."""
        raise AssertionError("a stage shows what it makes")

    def model_info(self) -> ModelInfo:
        """What the stage leaves behind, for `flashvsr.json`."""
        raise AssertionError("a stage says what it makes")

    def parts(self) -> dict[str, Any]:
        """Arguments of `save_model`: config, info and the trained modules, adapters merged."""
        kept = self.merged(self.main)
        return {
            "config": self.sizes,
            "info": self.model_info(),
            "dit": kept.dit,
            "lr_projector": kept.lr_projector,
            "prompt": self.fixed_prompt,
            "vae": self.frozen_vae,
        }

    def live(self) -> FlashVSR:
        """The main role as it stands, as a model to upscale with."""
        denoiser = self.roles[self.main].module
        return FlashVSR(
            dit=denoiser.dit,
            lr_projector=denoiser.lr_projector,
            vae=self.frozen_vae,
            config=self.sizes,
            info=self.model_info(),
            source=relative(self.config.stage_dir),
        )

    # ---- models ------------------------------------------------------------------------------------------

    def find(self, part: str, kinds: Sequence[str] | None = None) -> FlashVSR:
        """The model that holds `part`: from `init`, else the newest complete stage of this run."""
        if self.config.init is not None:
            model = flashvsr.load(self.config.init)
            if getattr(model, part) is not None and (kinds is None or model.info.kind in kinds):
                return model
        return self.of_run(part, kinds)

    def of_run(self, part: str, kinds: Sequence[str] | None = None) -> FlashVSR:
        """The newest complete stage of this run that holds `part`; UserError names the stage to run first."""
        folder = newest(self.config.run_dir, part, kinds)
        if folder is None:
            first = {"vae": "vae", "tc_decoder": "decoder"}.get(part)
            first = first or {"teacher": "1", "sparse": "2", "one-step": "3"}[(kinds or ["teacher"])[0]]
            raise UserError(
                f"{STAGES[self.config.stage.name]} needs the {part} of stage {first}, which run "
                f"{str(self.config.run_dir)!r} does not have: run `python -m train stage={first} "
                f"run={self.config.run}` first, or give a model folder with init="
            )
        return flashvsr.load(folder)

    def vae(self) -> WanVAE:
        """The frozen VAE on the device."""
        return self.find("vae").vae.to(self.device).requires_grad_(False).eval()

    def model_config(self) -> ModelConfig:
        return PRESETS[self.config.scale.preset]

    def prompt(self, loaded: Tensor | None) -> Tensor:
        """The fixed prompt's embedding: from `prompt=`, else the start model's, else drawn (from scratch)."""
        if self.config.prompt is not None:
            from flashvsr.models.prompt import load_prompt

            return load_prompt(self.config.prompt)
        if loaded is not None:
            return loaded
        if self.config.init is not None:
            raise UserError(
                f"{self.config.init} has no posi_prompt.pth: give prompt=FILE (part of the FlashVSR release)"
            )
        return random_prompt(self.model_config().dit, self.config.seed)

    def frozen(self, denoiser: Denoiser) -> Denoiser:
        return denoiser.to(self.device).requires_grad_(False).eval()

    def engine(self, module: nn.Module, lr: float | None = None) -> Engine:
        """A trained role: fixes what must stay fixed, adds the adapter, wraps."""
        module.to(self.device).train()
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not any(part in name for part in FROZEN))
        dit = getattr(module, "dit", None)
        if isinstance(dit, DiT):
            dit.checkpointing = self.config.checkpointing
            if self.config.stage.lora_rank:
                dit.requires_grad_(False)
                inject(
                    dit, self.config.stage.lora_targets, self.config.stage.lora_rank, seed=self.config.seed
                )
        o = self.config.optim
        named = dict(module.named_parameters())
        optimizer = build_optimizer(named, o.lr if lr is None else lr, o.weight_decay, o.betas)
        if self.world.size > 1:
            return DdpEngine(module, optimizer, o.clip, self.world)
        return Engine(module, optimizer, o.clip)

    def merged(self, role: str) -> nn.Module:
        """A copy of a role's module to keep: EMA weights where they are kept, adapter merged, on the CPU."""
        import copy

        from train.lora import merge

        module = copy.deepcopy(self.roles[role].module).cpu()
        if self.ema is not None and role == self.main:
            own = dict(module.named_parameters())
            with torch.no_grad():
                for name, value in self.ema.shadow.items():
                    own[name].copy_(value)
        merge(module)
        return module.requires_grad_(False)

    def info(self, kind: str, **changes: Any) -> ModelInfo:
        d = self.config.data
        base = ModelInfo(
            kind=kind,
            projector_mode="causal",
            area=d.height * d.width,
            sparse_ratio=None,
            steps=1,
            window=None,
            provenance={
                "run": self.config.run,
                "stage": STAGES[self.config.stage.name],
                "steps": self.config.steps,
                "seed": self.config.seed,
                "global_batch_size": self.config.global_batch_size,
                "torch": torch.__version__,
            },
        )
        return replace(base, **changes)

    # ---- numbers -----------------------------------------------------------------------------------------

    def autocast(self) -> AbstractContextManager:
        if self.config.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    @cached_property
    def lpips(self) -> Lpips:
        """The perceptual loss and metric, frozen; which backbone weights it found is printed once."""
        lpips = Lpips(self.config.scale.lpips_net).to(self.device)
        if self.world.is_main and not self.config.log.quiet:
            print(lpips.description, flush=True)
        return lpips

    def lpips_loss(self, sr: Tensor, hr: Tensor) -> Tensor:
        """Per sample, `B`; one frame at a time where memory counts."""
        return lpips_frames(self.lpips, sr, hr, frame_by_frame=self.config.checkpointing)

    def dense_plan(self, latents: Sequence[Tensor], head_dim: int) -> PackedDense:
        grids = [(x.shape[2], x.shape[3] // 2, x.shape[4] // 2) for x in latents]
        return PackedDense(grids, head_dim, self.device)

    def noise(self, draw: Draw, name: str, like: Tensor) -> Tensor:
        return draw.normal(name, tuple(like.shape[1:])).to(self.device)

    # ---- data --------------------------------------------------------------------------------------------

    def data_config(self, split: str) -> DataConfig:
        """Clips of this stage; with cached latents the same for all stages, so that one cache serves them."""
        d = self.config.data
        packed = self.config.stage.name == "teacher" or self.caches
        slots = d.slots if split == "train" else d.val_slots
        return DataConfig(
            shards=d.shards,
            split=split,
            latents_per_clip=d.latents_per_clip,
            height=d.height,
            width=d.width,
            images=d.images if packed else 0,
            image_height=d.height,
            image_width=d.width,
            short_side=d.short_side,
            slots=slots,
            degradation=self.config.degrade.preset,
            workers=d.workers,
            flip=d.flip and split == "train",
        )

    @property
    def caches(self) -> bool:
        return self.config.data.latents == "auto" and self.config.data.slots is not None

    def clips(self, split: str) -> Any:
        """The split's clips, decoded, degraded and encoded once where the run has a fixed number of draws."""
        config = self.data_config(split)
        clips = open_dataset(config, self.config.seed)
        if not self.caches and split == "train":
            return clips
        key = json.dumps([asdict(config), self.config.seed], sort_keys=True, default=str)
        name = hashlib.sha256(key.encode()).hexdigest()[:8]
        quiet = self.config.log.quiet or not self.world.is_main
        clips = self.cache(clips, f"clips-{split}-{name}", None, name, quiet)
        if self.needs_latents:
            tag = self.vae_hash()
            clips = self.cache(clips, f"latents-{split}-{name}-{tag}", self.encode, f"{name}-{tag}", quiet)
        return clips

    def cache(self, clips: Any, folder: str, encode: Callable | None, tag: str, quiet: bool) -> Any:
        """Rank 0 writes what is missing, the others wait and read."""
        if not self.world.is_main:
            self.world.barrier()
        made = cached(clips, self.config.run_dir / folder, encode, tag=tag, quiet=quiet)
        if self.world.is_main:
            self.world.barrier()
        return made

    def vae_hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.frozen_vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        digest.update(
            str([self.frozen_vae.latents_mean.tolist(), self.frozen_vae.latents_std.tolist()]).encode()
        )
        return digest.hexdigest()[:8]

    @torch.no_grad()
    def encode(self, hr: Tensor) -> Tensor:
        """HR frames uint8 `C F H W` -> normalised latents `16 n h w`, float32 on the CPU."""
        with self.autocast():
            latent, _ = self.frozen_vae.encode(to_signed(hr)[None].to(self.device))
        return latent[0].float().cpu()

    def batches(self, clips: Any, start: int) -> Iterator[Mapping[str, Any]]:
        workers = 0 if self.caches else self.config.data.workers
        return batches(clips, start, self.config.micro_batch_size, self.world.rank, self.world.size, workers)

    @torch.no_grad()
    def inputs(self, micro: Mapping[str, Any], segments: int | None = None) -> Inputs:
        """Brings a batch to the device: LR to output size with 8-bit bicubic, latents read or encoded."""
        hr, lr, latents = [], [], []
        for segment in micro["segments"][:segments]:
            frames = segment["hr"]
            kept = (
                frames.shape[2] - 4 if frames.shape[2] > 1 else 1
            )  # the loader gives four look-ahead frames
            hr.append(to_signed(frames[:, :, :kept]).to(self.device))
            up = to_signed(bicubic_8bit(segment["lr"], tuple(frames.shape[-2:]))).to(self.device)
            lr.append(up.expand(-1, -1, LR_FRAMES_OF_IMAGE, -1, -1) if kept == 1 else up)
            if not self.needs_latents:
                continue
            if "latent" in segment:
                latents.append(segment["latent"].to(self.device))
            else:
                latents.append(torch.stack([self.encode(x) for x in frames[:, :, :kept]]).to(self.device))
        return Inputs(hr, lr, latents, {})


def relative(path: Path) -> str:
    """A path as a user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
