"""What a run is: the dataclasses of its configuration, and how the command line becomes them.

Hydra composes YAML only; `flashvsr.base.cli.build` makes frozen dataclasses of the result once. Hydra takes
neither `stage=1` nor `stage=1..3`, so both are rewritten first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flashvsr.base.cli import UserError, build
from flashvsr.config import PRESETS

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
STAGES = {
    "vae": "vae",
    "teacher": "stage1",
    "sparse_causal": "stage2",
    "one_step": "stage3",
    "decoder": "decoder",
}
NUMBERS = {"1": "teacher", "2": "sparse_causal", "3": "one_step"}


@dataclass(frozen=True)
class VaeStage:
    name: Literal["vae"]
    crop: int  # output pixels of the square training crop
    latents: int  # of a clip
    mse: float
    lpips: float
    kl: float


@dataclass(frozen=True)
class TeacherStage:
    name: Literal["teacher"]
    projector_mode: Literal["clip", "causal"]
    lora_rank: int  # 0 trains all weights
    lora_targets: tuple[str, ...]
    validation_steps: int  # of the sampler


@dataclass(frozen=True)
class SparseCausalLoss:
    flow: float
    teacher: float
    attention_kl: float


@dataclass(frozen=True)
class SparseCausalStage:
    name: Literal["sparse_causal"]
    sparse_ratio: float | None
    sparse_ramp: int
    sparse_start: float | None
    loss: SparseCausalLoss
    attention: str  # backend of block-sparse attention
    random_window: bool
    random_history: bool
    lora_rank: int
    lora_targets: tuple[str, ...]
    validation_steps: int

    def check_ramp(self) -> None:
        if None in (self.sparse_start, self.sparse_ratio):
            raise UserError("stage.sparse_ramp goes from stage.sparse_start to stage.sparse_ratio: set both")


@dataclass(frozen=True)
class OneStepLoss:
    dmd: float
    mse: float
    lpips: float
    first_frame: float  # weight of a clip's frame 0 beside the others


@dataclass(frozen=True)
class OneStepStage:
    name: Literal["one_step"]
    sparse_ratio: float | None
    attention: str  # backend of block-sparse attention
    random_window: bool
    random_history: bool
    student_every: int
    dmd_range: tuple[float, float]  # of u before the shift
    loss: OneStepLoss
    fake_lr: float
    fake_projector: Literal["shared", "own"]
    regression_steps: int
    pixel_latents: int  # decoded with gradient
    lora_rank: int
    lora_targets: tuple[str, ...]


@dataclass(frozen=True)
class DecoderStage:
    name: Literal["decoder"]
    mse: float
    lpips: float
    vae_mse: float
    vae_lpips: float
    difference: float
    latents: Literal["vae", "student"]
    window: int  # latents decoded with gradient


Stage = VaeStage | TeacherStage | SparseCausalStage | OneStepStage | DecoderStage
_STAGE_CLASSES: dict[str, type] = {
    "vae": VaeStage,
    "teacher": TeacherStage,
    "sparse_causal": SparseCausalStage,
    "one_step": OneStepStage,
    "decoder": DecoderStage,
}


@dataclass(frozen=True)
class Data:
    shards: str
    latents_per_clip: int
    height: int
    width: int
    images: int  # stage 1: packed beside each video
    short_side: int | None
    slots: int | None
    val_slots: int  # held-out clips of the loss
    val_pictures: int  # of them, how many are upscaled, scored and shown
    variants: int  # degradations of each slot, taken in turn by epochs
    strides: tuple[int, ...]  # of source frames: one is drawn per clip
    latents: Literal["auto", "off"]  # auto: encode once, write runs/NAME/latents-<hash>/ (needs slots)
    workers: int
    flip: bool
    cache_dir: str | None  # of remote shards
    cache_gb: float


@dataclass(frozen=True)
class Optim:
    lr: float
    weight_decay: float
    betas: tuple[float, float]
    warmup: int
    schedule: Literal["constant", "cosine"]
    clip: float
    ema: float  # decay; 0 keeps none


@dataclass(frozen=True)
class Parallel:
    kind: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
    processes: int | None
    first_timeout: float  # minutes
    timeout: float


@dataclass(frozen=True)
class Log:
    every: int
    wandb: bool
    tensorboard: bool
    trackio: bool
    project: str
    peak: Literal["auto", "measure"] | float
    profile: int
    quiet: bool


@dataclass(frozen=True)
class Degrade:
    preset: str


@dataclass(frozen=True)
class Scale:
    preset: str
    lpips_net: Literal["alex", "vgg"]
    train: dict[str, Any]  # sizes per stage, where the keys below read them


@dataclass(frozen=True)
class TrainConfig:
    """One stage of one run. Every key is documented where it stands: configs/train.yaml."""

    stage: Stage
    scale: Scale
    data: Data
    degrade: Degrade
    parallel: Parallel
    log: Log
    optim: Optim
    run: str
    runs_dir: str
    seed: int
    steps: int
    global_batch_size: int
    micro_batch_size: int
    save_every: int
    validate_every: int
    keep_last: int
    keep_every: int  # 0: none
    async_save: bool
    resume: Literal["auto", "never", "force"]
    init: str | None
    teacher: str | None
    prompt: str | None
    device: str
    precision: Literal["fp32", "bf16"]
    checkpointing: Literal["none", "full", "selective"]
    offload: bool
    compile: bool
    expect: float

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.run

    @property
    def stage_dir(self) -> Path:
        return self.run_dir / STAGES[self.stage.name]

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again: the VAE's by layer and LPIPS' by frame in either mode."""
        return self.checkpointing != "none"

    def check(self) -> None:
        """What the types cannot say. Raises UserError."""
        self._check_engine()
        if self.scale.preset not in PRESETS:
            raise UserError(f"scale.preset={self.scale.preset!r} is unknown; there are {', '.join(PRESETS)}")
        if self.global_batch_size % self.micro_batch_size:
            raise UserError(
                f"global_batch_size={self.global_batch_size} is not a multiple of "
                f"micro_batch_size={self.micro_batch_size}; change one of them"
            )
        for key in ("steps", "save_every", "validate_every", "micro_batch_size", "keep_last"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} must be at least 1")
        if self.keep_every % self.save_every:
            raise UserError(
                f"keep_every={self.keep_every} is no multiple of save_every={self.save_every}, so some "
                "of these would never be written; change one of them (keep_every=0 keeps the newest only)"
            )
        if not 0 <= self.log.profile <= self.steps:
            raise UserError(f"log.profile={self.log.profile} is no step of 1 to steps={self.steps} (0: none)")
        if self.log.every < 1 or (not isinstance(self.log.peak, str) and self.log.peak <= 0):
            raise UserError("log.every must be at least 1 step, log.peak above 0 TFLOP/s")
        if min(self.parallel.first_timeout, self.parallel.timeout) <= 0:
            raise UserError("parallel.first_timeout and parallel.timeout are minutes above 0")
        if self.stage.name == "decoder" and self.stage.difference and self.stage.window < 2:
            raise UserError("stage.difference compares frames: give stage.window of at least 2 latents")
        if self.stage.name == "sparse_causal" and self.stage.sparse_ramp:
            self.stage.check_ramp()
        if self.data.latents_per_clip % 2:
            raise UserError(
                f"data.latents_per_clip={self.data.latents_per_clip} must be even: a chunk is 2 latents"
            )

    def _check_engine(self) -> None:
        if self.parallel.kind == "zero3" and self.stage.name == "one_step":
            raise UserError(
                "parallel=zero3 cannot run stage 3, whose roles run inside each other's turn: "
                "use fsdp2 or zero2"
            )
        if self.stage.name in ("vae", "decoder"):
            for key in ("offload", "compile"):
                if getattr(self, key):
                    raise UserError(
                        f"{key}=true acts on the DiT's blocks, and stage={self.stage.name} has none"
                    )
        if self.offload and self.checkpointing == "none":
            raise UserError(
                "offload=true moves what checkpointing keeps: add checkpointing=full or selective"
            )
        if self.compile and self.parallel.kind == "zero3":
            raise UserError(
                "compile=true cannot run under parallel=zero3, which gathers every layer's weights inside "
                "what would be compiled: use fsdp2"
            )


def rewrite(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits off the stages: `["stage=1..3", "seed=1"]` -> (["teacher", ...], ["seed=1"])."""
    stages, rest = ["teacher"], []
    given = [a for a in argv if a.startswith("stage=")]
    if not given:
        raise UserError("say which stage to train: stage=vae, 1, 2, 3, 1..3 or decoder")
    for arg in argv:
        if arg.startswith("stage="):
            stages = _stages(arg.removeprefix("stage="))
        else:
            rest.append(arg)
    return stages, rest


def _stages(text: str) -> list[str]:
    first, dots, last = text.partition("..")
    names = [NUMBERS.get(part, part) for part in ((first, last) if dots else (first,))]
    for given, name in zip((first, last), names, strict=False):
        if name not in STAGES or (dots and name not in NUMBERS.values()):
            raise UserError(
                f"stage={text}: {given!r} is no stage; there are vae, 1, 2, 3, ranges like 1..3, decoder"
            )
    if not dots:
        return names
    order = list(NUMBERS.values())
    chosen = order[order.index(names[0]) : order.index(names[1]) + 1]
    if not chosen:
        raise UserError(f"stage={text} is empty: write the lower number first")
    return chosen


def compose(stage: str, overrides: Sequence[str]) -> TrainConfig:
    """The configuration of one stage. Raises UserError for an unknown key, group or value."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            composed = hydra_compose("train", [f"stage={stage}", *overrides])
        values = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_sentence(error, overrides)) from None
    return from_dict(values)


def _sentence(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message as one line, with the nearest key where a key is unknown."""
    text = " ".join(str(error).split())
    cause = " ".join(str(error.__cause__ or "").split())
    if "not in struct" in text + cause or "Could not override" in text:
        import difflib

        known = sorted(_known_keys())
        for override in overrides:
            key = override.split("=")[0].lstrip("+~")
            if key not in known:
                close = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else "see configs/train.yaml for the keys"
                return f"unknown key {key!r}; {hint}"
    return text


def _known_keys() -> set[str]:
    """All dotted keys of a composed configuration, and the groups."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import DictConfig, OmegaConf

    keys: set[str] = {"recipe"}

    def walk(node: Any, prefix: str) -> None:
        for key in node:
            keys.add(f"{prefix}{key}")
            if not OmegaConf.is_missing(node, key) and isinstance(node._get_node(key), DictConfig):
                walk(node._get_node(key), f"{prefix}{key}.")

    for stage in STAGES:
        with initialize_config_dir(str(CONFIGS), version_base=None):
            walk(hydra_compose("train", [f"stage={stage}"]), "")
    return keys


def from_dict(values: Mapping[str, Any]) -> TrainConfig:
    """From a resolved mapping (`config.yaml` of a run folder)."""
    values = dict(values)
    stage = values.pop("stage")
    if not isinstance(stage, Mapping) or stage.get("name") not in _STAGE_CLASSES:
        raise UserError(f"stage={stage!r} is no stage configuration; there are {', '.join(_STAGE_CLASSES)}")
    values["stage"] = build(_STAGE_CLASSES[stage["name"]], stage, "stage")
    config = build(TrainConfig, values)
    config.check()
    return config


def to_yaml(config: TrainConfig) -> str:
    """The resolved configuration as text, readable by `from_dict`."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config))))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return os.fspath(value) if isinstance(value, Path) else value
