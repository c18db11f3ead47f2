"""Gathers a run's finished parts into one folder in the release's layout, and proves that it is the run's.

Files are copied as the stages wrote them. Before the folder appears it is loaded back, and a small output of
every module is compared with the run's own.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.base.draws import generator
from flashvsr.base.files import atomic_dir
from flashvsr.config import ModelConfig
from flashvsr.streaming.stream import Stream, StreamSettings, seeded_noise
from flashvsr.weights.folder import FlashVSR, ModelInfo, gather, read_info, write_info
from flashvsr.weights.load import load
from flashvsr.weights.names import FILES, INFO_FILE


@dataclass(frozen=True)
class Exported:
    """One part of an export: its file, the stage folder it came from, its bytes, and the largest difference
    between an output of the exported module and of the run's."""

    part: str
    name: str
    source: Path
    size: int
    difference: float


def export(run_dir: str | Path, out: str | Path) -> list[Exported]:
    """Writes the export of a run to `out`, replacing an earlier export; the parts, in the release's order.

    Raises UserError when the run has nothing finished, `out` holds something else, or the export differs.
    """
    run_dir, out = Path(run_dir), Path(out)
    found = gather(run_dir)
    if out.is_dir() and any(out.iterdir()) and not (out / INFO_FILE).is_file():
        raise UserError(f"{out} is not empty and no model folder; choose another --out")
    config, info = _describe(run_dir, found)
    with atomic_dir(out, replace=True) as folder:
        for part, source in found.items():
            shutil.copyfile(source / FILES[part], folder / FILES[part])
        write_info(folder, config, info, list(found))
        return [
            Exported(part, FILES[part], source, (folder / FILES[part]).stat().st_size, difference)
            for (part, source), difference in zip(found.items(), _differences(folder, found), strict=True)
        ]


def _describe(run_dir: Path, found: dict[str, Path]) -> tuple[ModelConfig, ModelInfo]:
    """Each module's widths from the stage that made it; what the model is, from the DiT's."""
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


def _differences(folder: Path, found: dict[str, Path]) -> list[float]:
    """Per part: loads it from the run and from the export (hashes checked), and compares an output."""
    together = tuple(part for part in ("dit", "lr_projector", "prompt") if part in found)
    measured: dict[tuple[str, ...], float] = {}  # DiT, projector and prompt work together: one output
    for part, source in found.items():
        needed = together if part in together else (part,)
        if needed not in measured:
            ours, theirs = (small_output(load(f, parts=needed, verify=True)) for f in (folder, source))
            measured[needed] = (ours - theirs).abs().max().item()
            if measured[needed] != 0:
                raise UserError(
                    f"the exported {part} differs from {source} by {measured[needed]:.2e}; export again"
                )
    return [measured[together if part in together else (part,)] for part in found]


@torch.no_grad()
def small_output(model: FlashVSR) -> Tensor:
    """What a model of one module (or DiT, projector and prompt) computes on a small fixed input, float32.

    DiT, projector and prompt run as the one-step model does, on one chunk of one block, whatever the model's
    kind; a DiT without them gives its time embedding.
    """

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator(0, "export", *shape))

    if model.vae is not None:
        latent, _ = model.vae.encode(noise(1, 3, 5, 16, 16).clamp(-1, 1))
        return model.vae.decode(latent)[0]
    if model.tc_decoder is not None:
        channels = model.config.tc_decoder.latent_channels
        return model.tc_decoder(noise(1, channels, 2, 4, 4), noise(1, 3, 5, 32, 32))[0]
    if model.dit is None:
        return model.prompt
    if model.lr_projector is None or model.prompt is None:
        return model.dit.embed_time(torch.tensor([[0.5]]))[1]
    block = model.config.dit.block
    lr = noise(1, 3, 9, 16 * block[1], 16 * block[2]).clamp(-1, 1)
    return Stream(model.denoiser(), None, StreamSettings(), seeded_noise(0)).denoise(lr)
