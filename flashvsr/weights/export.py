"""Gathers a run's finished parts into one folder in the release's layout, and proves that it is the run's.

Files are copied as the stages wrote them; a stage merged its adapter when it ended. Before the folder appears
it is loaded back, and a small output of every module is compared with the run's own.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flashvsr.base.cli import Progress, UserError
from flashvsr.base.draws import generator
from flashvsr.base.files import atomic_dir
from flashvsr.streaming.stream import Stream, StreamSettings, seeded_noise
from flashvsr.weights.folder import FlashVSR, describe_run, gather, write_info
from flashvsr.weights.load import load
from flashvsr.weights.names import FILES, INFO_FILE
from flashvsr.weights.tensors import need_space


@dataclass(frozen=True)
class Exported:
    """One part of an export: its file, the stage folder it came from, its bytes, and the largest difference
    between an output of the exported module and of the run's."""

    part: str
    name: str
    source: Path
    size: int
    difference: float


def export(run_dir: str | Path, out: str | Path, quiet: bool = True) -> list[Exported]:
    """Writes the export of a run to `out`, replacing an earlier export; the parts, in the release's order.

    Raises UserError when the run has nothing finished, `out` holds something else, or the export differs.
    """
    run_dir, out = Path(run_dir), Path(out)
    found = gather(run_dir)
    if out.is_dir() and any(out.iterdir()) and not (out / INFO_FILE).is_file():
        raise UserError(f"{out} is not empty and no model folder; choose another --out")
    config, info = describe_run(run_dir, found)
    need_space(out, sum((source / FILES[part]).stat().st_size for part, source in found.items()))
    with atomic_dir(out, replace=True) as folder, Progress(len(found), "copy", "part", quiet) as progress:
        for part, source in found.items():
            _copy(source / FILES[part], folder / FILES[part])
            progress.update()
        write_info(folder, config, info, {part: FILES[part] for part in found})
        return [
            Exported(part, FILES[part], source, (folder / FILES[part]).stat().st_size, difference)
            for (part, source), difference in zip(found.items(), _differences(folder, found), strict=True)
        ]


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise UserError(
            f"{target.name} could not be copied from {source} ({error.strerror}); nothing was replaced"
        ) from None


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
