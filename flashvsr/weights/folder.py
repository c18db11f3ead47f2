"""A model is a folder: the release's file names and `flashvsr.json`, which says what it is.

A stage of training leaves such a folder, the next one starts from it, `flashvsr.load` reads it. It may lack
parts; what needs a missing one names the stage that makes it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from flashvsr.base.cli import UserError, build
from flashvsr.base.files import atomic_dir, read_json, reading, sha256, write_json
from flashvsr.config import ModelConfig
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import check_prompt
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights import diffusers
from flashvsr.weights.names import CALLED, FILES, INFO_FILE, MADE_BY
from flashvsr.weights.tensors import need_space, write_safetensors, write_torch

FORMAT_VERSION = 1
# Old format -> what changed after it, and the change. The last key is FORMAT_VERSION - 1.
MIGRATIONS: dict[int, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {}

Layout = Literal["release", "diffusers"]
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


@functools.cache
def say(sentence: str) -> None:
    """Tells the user once, on stderr, whatever asks again."""
    print(sentence, file=sys.stderr, flush=True)


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
    layout: Layout = "release",
) -> Path:
    """Writes the given parts (modules or state dicts) and `flashvsr.json`; returns the folder.

    layout: the release's file names, or the DiT in `transformer/` as diffusers stores it and the rest, for
    which diffusers has no place, beside that under the release's names. Atomic: a folder that was there stays
    until the new one is complete. The projector's mode comes from `info`, the latent statistics from a VAE
    module's buffers (from `config` beside a state dict).
    """
    config, given = gathered(config, info, dit, lr_projector, tc_decoder, vae, prompt, str(folder))
    need_space(Path(folder), stored_bytes(given))
    files = {part: FILES[part] for part in given}
    if layout == "diffusers" and dit is not None:
        files["dit"] = f"{diffusers.FOLDER}/{diffusers.FILE}"
        given["dit"] = diffusers.renamed(given["dit"], back=True)
    with atomic_dir(folder, replace=True) as aside:
        if layout == "diffusers":
            (aside / diffusers.FOLDER).mkdir()
            write_json(aside / diffusers.FOLDER / "config.json", diffusers.config_json(config.dit))
        for part, content in given.items():
            if part == "dit":
                write_safetensors(aside / files[part], content, {"format": "pt"})
            else:
                write_torch(aside / files[part], content)
        write_info(aside, config, info, files)
    return Path(folder)


def gathered(
    config: ModelConfig,
    info: ModelInfo,
    dit: State | None,
    lr_projector: State | None,
    tc_decoder: State | None,
    vae: State | None,
    prompt: Tensor | None,
    where: str,
) -> tuple[ModelConfig, dict[str, Any]]:
    """What is stored of these parts: the config with the projector's mode and a VAE module's latent
    statistics, and the tensors of each part that is given. UserError when there is none."""
    config = replace(config, lr_projector=replace(config.lr_projector, mode=info.projector_mode))
    if isinstance(vae, WanVAE):
        # float32's shortest decimals: the same values when read back, and readable
        mean, std = (
            tuple(float(str(x)) for x in b.float().cpu().numpy()) for b in (vae.latents_mean, vae.latents_std)
        )
        config = replace(config, vae=replace(config.vae, mean=mean, std=std))
    parts = {"dit": dit, "lr_projector": lr_projector, "tc_decoder": tc_decoder, "vae": vae}
    given: dict[str, Any] = {part: plain(state) for part, state in parts.items() if state is not None}
    if prompt is not None:
        # as it comes: the release's is bfloat16
        given["prompt"] = check_prompt(prompt, config.dit.text_dim, where).to(prompt.dtype)
    if not given:
        raise UserError(f"{where}: there is no part to save")
    return config, given


def plain(state: State) -> Mapping[str, Tensor]:
    """The named tensors of a module or of a state dict."""
    return state.state_dict() if isinstance(state, nn.Module) else state


def stored_bytes(parts: Mapping[str, Mapping[str, Tensor] | Tensor]) -> int:
    """What these take on disk, without headers."""
    tensors = [[c] if isinstance(c, Tensor) else c.values() for c in parts.values()]
    return sum(t.nbytes for group in tensors for t in group)


def write_info(folder: Path, config: ModelConfig, info: ModelInfo, files: Mapping[str, str]) -> None:
    """Writes `flashvsr.json` beside the files (part -> name), with their sizes and hashes."""
    listed = {
        part: {"name": name, "size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for part, name in files.items()
    }
    write_json(folder / INFO_FILE, description(config, info, listed))


def description(config: ModelConfig, info: ModelInfo, files: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `flashvsr.json`."""
    return {"format": FORMAT_VERSION, "info": asdict(info), "config": asdict(config), "files": dict(files)}


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
    with reading(path):
        return described_from(read_json(path), str(path))


def described_from(values: Any, where: str) -> Description:
    """A description from its JSON value, migrated to today's format; UserError, naming `where`, otherwise."""
    version = values.get("format") if isinstance(values, dict) else None
    if type(version) is not int:
        raise UserError(f"{where} does not say its format version; it is not a model description of ours")
    if version > FORMAT_VERSION:
        raise UserError(
            f"{where} has format {version}, this flashvsr knows {FORMAT_VERSION}: install a newer flashvsr"
        )
    while version < FORMAT_VERSION:
        if version not in MIGRATIONS:
            raise UserError(f"{where} has format {version}, which never was; export the model again")
        changed, migrate = MIGRATIONS[version]
        say(f"{where} has format {version} and is read as format {version + 1}: {changed}")
        version += 1
        values = {**migrate(values), "format": version}
    described = build(Description, values, where)
    unknown = set(described.files) - set(FILES)
    if unknown:
        raise UserError(f"{where} names unknown parts {', '.join(sorted(unknown))}; write the model again")
    for file in described.files.values():
        if file.name.startswith("/") or ".." in Path(file.name).parts:
            raise UserError(f"{where} names {file.name!r}, a file outside its folder; write the model again")
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


def describe_run(run_dir: Path, found: Mapping[str, Path]) -> tuple[ModelConfig, ModelInfo]:
    """Of the parts that `gather` found: each module's widths from the stage that made it; what the model is,
    from the DiT's."""
    described = {part: read_info(folder) for part, folder in found.items()}
    modules = {part: d for part, d in described.items() if part != "prompt"}
    config = replace(ModelConfig(), **{part: getattr(d.config, part) for part, d in modules.items()})
    info = described["dit"].info if "dit" in described else ModelInfo("parts")
    sources = {
        part: {
            "from": str(folder.relative_to(run_dir)),
            "sha256": described[part].files[part].sha256,
            **described[part].info.provenance,
        }
        for part, folder in found.items()
    }
    return config, replace(info, provenance={"run": run_dir.resolve().name, "parts": sources})
