"""A model is a folder: the release's file names and `flashvsr.json`, which says what it is.

A stage of training leaves such a folder, the next one starts from it, `flashvsr.load` reads it. It may lack
parts; what needs a missing one names the stage that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flashvsr.base.cli import UserError, build
from flashvsr.base.files import atomic_dir, read_json, sha256, write_json
from flashvsr.config import ModelConfig
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import check_prompt, save_prompt
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.names import CALLED, FILES, INFO_FILE, MADE_BY

FORMAT_VERSION = 1

Kind = Literal["teacher", "sparse", "one-step", "vae", "decoder", "parts"]
# Where in a run to look for a part: its own stage, then those that carry along what they started from.
DENOISING = ("stage3", "stage2", "stage1")
STAGES = {
    "dit": DENOISING,
    "lr_projector": DENOISING,
    "prompt": DENOISING,
    "vae": ("vae", *DENOISING, "decoder"),
    "tc_decoder": ("decoder", *DENOISING),
}
State = nn.Module | Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelInfo:
    """What a model is, beyond its widths.

    kind: teacher (whole clips, dense), sparse (whole clips, chunk-causal), one-step (streams), vae, decoder,
    or parts of several; projector_mode: temporal form of LR Proj-In; area: output pixels (H x W) it was
    trained at, where the top-k ratio equals `sparse_ratio` (None: no selection); steps: sampler steps it was
    made for; window: chunks a chunk sees in a whole-clip forward (None: all past ones); provenance: run,
    stage, step, seed, command, versions.
    """

    kind: Kind
    projector_mode: str = "causal"
    area: int = 768 * 1280
    sparse_ratio: float | None = 2.0
    steps: int = 1
    window: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


@dataclass
class FlashVSR:
    """A model in memory; parts may be None. `prompt` is the prompt embedding, float `1 L text_dim`."""

    dit: DiT | None = None
    lr_projector: LRProjector | None = None
    tc_decoder: TCDecoder | None = None
    vae: WanVAE | None = None
    prompt: Tensor | None = None
    config: ModelConfig = field(default_factory=ModelConfig)
    info: ModelInfo = field(default_factory=lambda: ModelInfo("parts"))
    source: str = "this model"  # for sentences: the folder it came from

    def require(self, *parts: str) -> None:
        """UserError naming the first missing part and the command that makes it."""
        for part in parts:
            if getattr(self, part) is None:
                run = self.info.provenance.get("run", "NAME")
                raise UserError(
                    f"{self.source} has no {CALLED[part]} ({FILES[part]}); "
                    f"`python -m train {MADE_BY[part]} run={run}` makes it"
                )

    def denoiser(self) -> Denoiser:
        """The DiT with its projector, its prompt set. A live module whose prompt is set needs no `prompt`."""
        self.require("dit", "lr_projector")
        if self.prompt is not None:
            self.dit.set_prompt(self.prompt)
        elif self.dit.blocks[0].cross_attn.prompt_k is None:
            self.require("prompt")
        return Denoiser(self.dit, self.lr_projector)


def save_model(
    folder: str | Path,
    *,
    config: ModelConfig,
    info: ModelInfo,
    dit: State | None = None,
    lr_projector: State | None = None,
    tc_decoder: State | None = None,
    vae: State | None = None,
    prompt: Tensor | None = None,
) -> Path:
    """Writes the given parts (modules or state dicts) and `flashvsr.json`; returns the folder.

    Atomic: a folder that was there stays until the new one is complete. The projector's mode comes from
    `info`, the latent statistics from a VAE module's buffers (from `config` beside a state dict).
    """
    config = replace(config, lr_projector=replace(config.lr_projector, mode=info.projector_mode))
    if isinstance(vae, WanVAE):
        # float32's shortest decimals: the same values when read back, and readable
        mean, std = (
            tuple(float(str(x)) for x in b.float().cpu().numpy()) for b in (vae.latents_mean, vae.latents_std)
        )
        config = replace(config, vae=replace(config.vae, mean=mean, std=std))
    parts = {"dit": dit, "lr_projector": lr_projector, "tc_decoder": tc_decoder, "vae": vae}
    given = {part: _plain(state) for part, state in parts.items() if state is not None}
    if not given and prompt is None:
        raise UserError(f"{folder}: there is no part to save")
    with atomic_dir(folder, replace=True) as part_folder:
        for part, state in given.items():
            if part == "dit":
                from safetensors.torch import save_file

                save_file(state, part_folder / FILES[part], metadata={"format": "pt"})
            else:
                torch.save(state, part_folder / FILES[part])
        if prompt is not None:
            checked = check_prompt(prompt, config.dit.text_dim, str(folder))
            save_prompt(checked, part_folder / FILES["prompt"])
        present = [*given, *(["prompt"] if prompt is not None else [])]
        write_info(part_folder, config, info, present)
    return Path(folder)


def _plain(state: State) -> dict[str, Tensor]:
    tensors = state.state_dict() if isinstance(state, nn.Module) else state
    return {name: _own(t.detach().cpu()) for name, t in tensors.items()}


def _own(t: Tensor) -> Tensor:
    """Contiguous and alone in its memory: a view would drag the whole of it into the file."""
    t = t.contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


def write_info(folder: Path, config: ModelConfig, info: ModelInfo, parts: Sequence[str]) -> None:
    """Writes `flashvsr.json` beside the files of `parts`, with their sizes and hashes."""
    files = {
        part: {
            "name": FILES[part],
            "size": (folder / FILES[part]).stat().st_size,
            "sha256": sha256(folder / FILES[part]),
        }
        for part in parts
    }
    write_json(
        folder / INFO_FILE,
        {"format": FORMAT_VERSION, "info": asdict(info), "config": asdict(config), "files": files},
    )


@dataclass(frozen=True)
class FileInfo:
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """`flashvsr.json` as read: what the folder holds."""

    format: int
    info: ModelInfo
    config: ModelConfig
    files: dict[str, FileInfo]


def read_info(folder: str | Path) -> Description:
    """Reads `flashvsr.json`; UserError when it is missing, damaged or of a newer format."""
    path = Path(folder) / INFO_FILE
    values = read_json(path)
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise UserError(f"{path} does not say its format version; it is not a model description of ours")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, this flashvsr knows {FORMAT_VERSION}: install a newer flashvsr"
        )
    described = build(Description, values, str(path))
    unknown = set(described.files) - set(FILES)
    if unknown:
        raise UserError(f"{path} names unknown parts {', '.join(sorted(unknown))}; write the model again")
    return described


def newest(run_dir: str | Path, part: str, kinds: Sequence[str] | None = None) -> Path | None:
    """The furthest stage's finished folder in a run that has `part` (of one of `kinds`), or None.

    DiT, projector and prompt come from stage 3, else 2, else 1; the VAE and the TC decoder from their own
    stage, else from one that started with them.
    """
    for stage in STAGES[part]:
        folder = Path(run_dir) / stage / "export"
        if not (folder / INFO_FILE).is_file():
            continue
        described = read_info(folder)
        if part in described.files and (kinds is None or described.info.kind in kinds):
            return folder
    return None


def gather(run_dir: str | Path) -> dict[str, Path]:
    """For each part a run has, the stage folder to export it from.

    DiT, projector and prompt belong together and come from one stage. UserError when the run has nothing.
    """
    if not Path(run_dir).is_dir():
        raise UserError(f"{run_dir} is not a folder; give a run as `python -m train` leaves it (runs/NAME)")
    found: dict[str, Path] = {}
    denoiser = newest(run_dir, "dit")
    for part in FILES:
        together = part in ("dit", "lr_projector", "prompt")
        folder = denoiser if together else newest(run_dir, part)
        if folder is not None and part in read_info(folder).files:
            found[part] = folder
    if not found:
        raise UserError(f"{run_dir} has no finished stage; `python -m train stage=vae run=...` starts one")
    return found
