"""The fixed prompt: one text embedding that goes with a model and never changes.

FlashVSR was trained with a single prompt, whose embedding travels in `posi_prompt.pth`. A model trained from
scratch has no text encoder and needs none: any fixed embedding will do, it is all the model ever sees.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.base.draws import generator
from flashvsr.base.files import load_torch
from flashvsr.config import DiTConfig


def random_prompt(config: DiTConfig, seed: int) -> Tensor:
    """A standard normal embedding `1 text_len text_dim`, float32, the same for the same seed."""
    shape = (1, config.text_len, config.text_dim)
    return torch.randn(shape, generator=generator(seed, "prompt"))


def check_prompt(prompt: object, text_dim: int, where: str) -> Tensor:
    """The embedding as float32 `1 L text_dim`; UserError, naming `where`, when it is something else."""
    if not isinstance(prompt, Tensor) or not prompt.is_floating_point():
        raise UserError(f"{where}: a prompt embedding is one tensor, not {type(prompt).__name__}")
    if prompt.ndim == 2:
        prompt = prompt[None]
    if prompt.ndim != 3 or prompt.shape[0] != 1 or prompt.shape[2] != text_dim:
        raise UserError(
            f"{where}: the prompt embedding has the shape {tuple(prompt.shape)} where this model takes "
            f"(1, length, {text_dim}); take the file that belongs to the model"
        )
    if not prompt.isfinite().all():
        raise UserError(f"{where}: the prompt embedding is not finite; take an undamaged file")
    return prompt.float()


def load_prompt(path: str | Path, text_dim: int | None = None) -> Tensor:
    """The embedding in a file like the release's `posi_prompt.pth`, float32 `1 L text_dim`.

    Raises UserError when the file is none, or of another `text_dim` than the model's.
    """
    prompt = load_torch(path)
    if text_dim is None and isinstance(prompt, Tensor) and prompt.ndim:
        text_dim = prompt.shape[-1]
    return check_prompt(prompt, text_dim, str(path))


def save_prompt(prompt: Tensor, path: str | Path) -> None:
    """Writes the embedding as the release does: one tensor. The caller makes the write atomic."""
    torch.save(prompt.detach().cpu().clone(), path)
