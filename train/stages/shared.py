"""What all stages share: models from folders, engines, and the parts they leave."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flashvsr
from eval.metrics import Lpips
from flashvsr.attention.plans import PackedDense
from flashvsr.base.cli import UserError
from flashvsr.base.draws import Draw, seed_of
from flashvsr.config import PRESETS, ModelConfig
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.prompt import random_prompt
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.folder import FlashVSR, ModelInfo, newest
from train.config import STAGES, TrainConfig
from train.ema import Ema
from train.launch import World
from train.losses.pixel import decode_window, lpips_frames, mse
from train.optim import build_optimizer
from train.parallel import make_engine
from train.parallel.apply import compile_blocks, ready_to_train
from train.parallel.engine import Engine
from train.stages.feed import Feed, Inputs
from train.turns import Losses

Loss = Callable[[Inputs, Draw], Losses]
LOADED = {  # what is read from a model folder to start from a part of it
    "dit": ("dit", "lr_projector", "prompt"),
    "vae": ("vae",),
    "tc_decoder": ("tc_decoder",),
}


class Stage:
    """A stage is its roles, `prepare`, and a list of turns; the loop knows no more than this."""

    frozen_vae: WanVAE | None = None  # stage vae trains its own and needs no latents
    encodes = True  # HR to latents, where there is a VAE
    sizes: ModelConfig
    fixed_prompt: Tensor

    def __init__(self, config: TrainConfig, world: World):
        self.config, self.world, self.device = config, world, world.device
        self.roles: dict[str, Engine] = {}
        self.in_use: dict[str, str] = {}  # what was chosen, printed once and kept in flashvsr.json
        self.ema: Ema | None = None
        torch.manual_seed(seed_of(config.seed, "init", config.stage.name))
        self.build()
        self.main = next(iter(self.roles))
        self.feed = Feed(config, world, self.frozen_vae if self.encodes else None, self.autocast)
        if config.optim.ema:
            self.ema = Ema(self.roles[self.main].trained(), config.optim.ema)

    # ---- what a stage defines ---------------------------------------------------------------------------

    def build(self) -> None:
        """Loads the models and fills `roles`, the main one first."""
        raise AssertionError("a stage builds its roles")

    def prepare(self, micro: Mapping[str, Any], draw: Draw) -> Inputs:
        """A batch on the device, frozen features included; no gradient."""
        return self.feed.inputs(micro)

    def turns(self, step: int) -> list[tuple[str, Loss]]:
        """Which role learns from which loss at this step (0 is the first), in order."""
        raise AssertionError("a stage says who learns")

    def apart(self, step: int) -> bool:
        """Whether at this step every term's gradient is taken by itself, for its norm."""
        return True

    def held_out(self, inputs: Inputs, draw: Draw) -> Tensor:
        """The held-out loss, `B`: what `expect` in the scale speaks of."""
        raise AssertionError("a stage has a held-out loss")

    def upscaled(self, sample: Mapping[str, Any]) -> Tensor | None:
        """SR frames of a held-out clip by the live model, uint8 `F H W 3`."""
        raise AssertionError("a stage shows what it makes")

    def panel(self, inputs: Inputs, draw: Draw) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Numbers and pictures (uint8 `H W 3`) of a held-out clip that tell how training goes; all ranks call
        it."""
        return {}, {}

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
        denoiser = self.roles[self.main].whole()
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
            model = flashvsr.load(self.config.init, parts=LOADED[part])
            if getattr(model, part) is not None and (kinds is None or model.info.kind in kinds):
                return model
            if getattr(model, part) is not None and model.info.kind != "parts":
                raise UserError(
                    f"init={self.config.init} is a {model.info.kind} model, and "
                    f"{STAGES[self.config.stage.name]} starts from {' or '.join(kinds)}"
                )
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
        return flashvsr.load(folder, parts=LOADED[part])

    def of_stage_1(self, advice: str = "") -> FlashVSR:
        """The teacher: from `teacher=`, else stage 1 of this run; `advice` ends the error without one."""
        if self.config.teacher is None:
            try:
                return self.of_run("dit", ["teacher"])
            except UserError as error:
                raise UserError(f"{error}{advice}") from None
        model = flashvsr.load(self.config.teacher, parts=LOADED["dit"])
        if model.info.kind != "teacher":
            raise UserError(f"teacher={self.config.teacher} is a {model.info.kind} model, not one of stage 1")
        return model

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
        compile_blocks(denoiser, self.config)
        return denoiser.to(self.device).requires_grad_(False).eval()

    def engine(self, module: nn.Module, lr: float | None = None) -> Engine:
        """A trained role: made ready, then wrapped."""
        ready_to_train(module.to(self.device), self.config)
        o = self.config.optim
        rate = o.lr if lr is None else lr
        optimizer = partial(build_optimizer, lr=rate, weight_decay=o.weight_decay, betas=o.betas)
        return make_engine(self.config.parallel.kind, module, optimizer, o.clip, self.world)

    def merged(self, role: str) -> nn.Module:
        """A copy of a role's module to keep: EMA weights where they are kept, adapter merged, on the CPU."""
        import copy

        from train.lora import merge

        module = copy.deepcopy(self.roles[role].whole()).cpu()
        if self.ema is not None and role == self.main:
            own = dict(module.named_parameters())
            with torch.no_grad():
                for name, value in self.roles[role].gather(self.ema.shadow).items():
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
                **self.in_use,
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

    def lpips_loss(self, sr: Tensor, hr: Tensor, weights: Tensor | None = None) -> Tensor:
        """Per sample, `B`; one frame at a time where memory counts; `weights` of the frames."""
        return lpips_frames(self.lpips, sr, hr, weights, frame_by_frame=self.config.recomputes)

    def pixel_error(self, sr: Tensor, hr: Tensor, of_mse: float, of_lpips: float) -> Tensor:
        """Held-out error of frames, weighted as in training, `B`."""
        error = of_mse * mse(sr, hr)
        return error + of_lpips * self.lpips_loss(sr, hr) if of_lpips else error

    def vae_frames(self, z: Tensor, first: int, count: int) -> Tensor:
        """VAE frames of `count` latents of `z` from `first`; earlier ones only fill the decoder's memory."""

        def decode(start: int, stop: int, memory: Any) -> tuple[Tensor, Any]:
            with self.autocast():
                return self.frozen_vae.decode(z[:, :, start:stop], memory)

        return decode_window(decode, first, count)

    def dense_plan(self, latents: Sequence[Tensor], head_dim: int) -> PackedDense:
        grids = [(x.shape[2], x.shape[3] // 2, x.shape[4] // 2) for x in latents]
        return PackedDense(grids, head_dim, self.device)

    def noise(self, draw: Draw, name: str, like: Tensor) -> Tensor:
        return draw.normal(name, tuple(like.shape[1:])).to(self.device)


def relative(path: Path) -> str:
    """A path as a user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
