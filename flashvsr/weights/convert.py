"""Between the layouts of a model: the release's folder, diffusers' folder, one safetensors file of all parts.

Tensors pass bit for bit unless another dtype is asked for, and `flashvsr.json` (or the file's metadata) keeps
what the model is, so that going and coming back gives the same model.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.base.files import atomic
from flashvsr.models.prompt import load_prompt
from flashvsr.weights.folder import FlashVSR, description, gathered, plain, save_model, say, stored_bytes
from flashvsr.weights.load import load
from flashvsr.weights.names import FILES, INFO_FILE, SINGLE_KEY
from flashvsr.weights.tensors import need_space, write_safetensors

Target = Literal["release", "diffusers", "single"]


def convert(
    source: str | Path,
    out: str | Path,
    to: Target,
    *,
    dtype: torch.dtype | None = None,
    lr_projector: str = "auto",
    prompt: str | Path | None = None,
    force: bool = False,
    note: Callable[[str], None] = say,
) -> FlashVSR:
    """Writes the model at `source` (anything that `load` takes) to `out` in another layout; returns what was
    written, read back.

    dtype: of all floating tensors (None: as stored; for a single file bfloat16); prompt: a file like
    `posi_prompt.pth` to take the place of the model's; force: replace a model that is at `out`. What was
    written is read again and compared tensor by tensor. Raises UserError, and leaves `out` as it was, when
    that cannot be done.
    """
    source, out = Path(source), Path(out)
    _check_target(source, out, to, force)
    if dtype is None and to == "single":
        dtype = torch.bfloat16
    model = load(source, dtype=dtype, lr_projector=lr_projector, note=note)
    if to == "diffusers" and model.dit is None:
        raise UserError(f"{source} has no DiT, which is all that diffusers' layout is for; take --to release")
    if prompt is not None:
        model.prompt = load_prompt(prompt, model.config.dit.text_dim)
    parts = {part: getattr(model, part) for part in FILES}
    if dtype is not None and model.prompt is not None:
        parts["prompt"] = model.prompt.to(dtype)
    if to == "single":
        _save_single(out, model, parts)
    else:
        save_model(out, config=model.config, info=model.info, layout=to, **parts)
    written = load(out, dtype=None, note=note)
    for part, state in parts.items():
        if state is not None and not _same(state, getattr(written, part)):
            raise UserError(
                f"{out}: the {part} read back differs from what was written; check the disk, repeat"
            )
    return written


def _check_target(source: Path, out: Path, to: Target, force: bool) -> None:
    if out.exists() and source.exists() and out.resolve() == source.resolve():
        raise UserError(f"{out} is the model itself; give another place to write to")
    if to == "single":
        if out.suffix != ".safetensors":
            raise UserError(f"{out} is to be one safetensors file; give a name that ends in .safetensors")
        if out.is_dir():
            raise UserError(f"{out} is a folder where a file is to be written; give another name")
        if out.exists() and not force:
            raise UserError(f"{out} already exists; --force replaces it")
    elif out.is_file():
        raise UserError(f"{out} is a file where a folder is to be written; give another name")
    elif out.is_dir() and any(out.iterdir()):
        if not (out / INFO_FILE).is_file():
            raise UserError(f"{out} is not empty and no model folder; choose another place")
        if not force:
            raise UserError(f"{out} already holds a model; --force replaces it")


def _save_single(out: Path, model: FlashVSR, parts: dict[str, object]) -> None:
    """All parts in one file, names behind `dit.`, `lr_projector.`, ...; our json is its metadata."""
    config, given = gathered(model.config, model.info, **parts, where=str(out))
    need_space(out.parent, stored_bytes(given))
    tensors: dict[str, Tensor] = {}
    files = {}
    for part, content in given.items():
        named = {"": content} if isinstance(content, Tensor) else {f".{n}": t for n, t in content.items()}
        tensors.update({part + name: tensor for name, tensor in named.items()})
        files[part] = {"name": part, "size": stored_bytes({part: content}), "sha256": ""}
    said = json.dumps(description(config, model.info, files), ensure_ascii=False)
    with atomic(out) as aside:
        write_safetensors(aside, tensors, {SINGLE_KEY: said})  # one key: their order is not fixed


def _same(a: object, b: object) -> bool:
    """Whether two modules (or two tensors) hold the same bits."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())
    first, second = plain(a), plain(b)
    return first.keys() == second.keys() and all(_same(t, second[name]) for name, t in first.items())
