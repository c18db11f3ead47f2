"""Tensor files: safetensors or torch's own, told apart by their bytes; read mapped, executing nothing.

A mapped tensor is read from disk when it is first used and shared between processes; what is done to it in
memory changes no file.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.base.files import load_torch, reading
from flashvsr.weights.explain import foreign_content

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
POINTER = b"version https://git-lfs"
SPARE = 16 * 2**20  # bytes that must stay free beyond what is written


def check_file(path: Path) -> int:
    """The size of a file of weights in bytes; UserError when it cannot be one."""
    with reading(path), open(path, "rb") as handle:
        begin = handle.read(64)
    if begin.startswith(POINTER):
        raise UserError(f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in its repository")
    if begin.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path} is a web page, not weights: download the file itself, logged in if need be")
    return path.stat().st_size


def read_tensors(
    paths: Sequence[Path], dtype: torch.dtype | None, device: torch.device | str, prefix: str = ""
) -> dict[str, Tensor] | Tensor:
    """The tensors of one part, from one file or from shards, on `device`; a lone tensor as such.

    dtype: of floating tensors (None: as stored; a lone tensor keeps its own); prefix: only the names that
    begin with it, without it. UserError when a file is damaged or holds something else.
    """
    found: dict[str, Tensor] = {}
    for path in paths:
        content = _read_file(path, device, prefix)
        if isinstance(content, Tensor):
            return content.to(device)
        for name, tensor in content.items():
            if name in found:
                raise UserError(f"{path} repeats the tensor {name} of another shard; copy the shards again")
            if tensor.is_floating_point() and tensor.dtype not in DTYPES.values():
                raise UserError(
                    f"{path} holds {name} in {str(tensor.dtype).removeprefix('torch.')}; take a file in "
                    f"{', '.join(DTYPES)}"
                )
            # one by one, so that no second copy of a whole file is ever held
            found[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    return found


def _read_file(path: Path, device: torch.device | str, prefix: str) -> dict[str, Tensor] | Tensor:
    if is_safetensors(path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as handle:
                names = [name for name in handle.keys() if name.startswith(prefix)]  # noqa: SIM118
                return {name.removeprefix(prefix): handle.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    content = load_torch(path)
    if isinstance(content, Tensor):
        return content
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path} holds something else than named tensors: {foreign_content(content)}")
    return {name.removeprefix(prefix): t for name, t in content.items() if name.startswith(prefix)}


def is_safetensors(path: Path) -> bool:
    """By the first bytes, and by the name where they say nothing (an empty or damaged file)."""
    with reading(path), open(path, "rb") as handle:
        begin = handle.read(9)
    if begin[8:9] == b"{" and int.from_bytes(begin[:8], "little") < path.stat().st_size:
        return True  # the length of its header, then JSON; asked first, for a length may look like a pickle
    torchs = begin[:4] == b"PK\x03\x04" or begin[:1] == b"\x80"
    return path.suffix == ".safetensors" and not torchs


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; UserError when it is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from None


# ---- writing --------------------------------------------------------------------------------------------


def need_space(folder: Path, size: int) -> None:
    """UserError when the disk of `folder` (or of its first existing parent) has no room for `size` bytes."""
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < size + SPARE:
        raise UserError(
            f"{folder} needs {size / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left: free some or "
            f"choose another place"
        )


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes named tensors; UserError when the disk does not take them. The caller makes it atomic."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        path.touch()
        mode = path.stat().st_mode  # of the user's umask; safetensors makes files that only the owner reads
        save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, path, dict(metadata))
        path.chmod(mode)
    except (SafetensorError, OSError) as error:
        raise UserError(_not_written(path, error)) from None


def write_torch(path: Path, content: dict[str, Tensor] | Tensor) -> None:
    """Writes a torch file as the release's are; UserError when the disk does not take it."""
    try:
        torch.save(
            _own(content) if isinstance(content, Tensor) else {n: _own(t) for n, t in content.items()}, path
        )
    except (RuntimeError, OSError) as error:  # torch's writer says RuntimeError when the disk is full
        raise UserError(_not_written(path, error)) from None


def _not_written(path: Path, error: Exception) -> str:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
    return (
        f"{path} could not be written ({reason}): is the disk full? Nothing was replaced; free space, repeat"
    )


def _own(t: Tensor) -> Tensor:
    """Contiguous and alone in its memory: a view would drag the whole of it into a torch file."""
    t = t.detach().cpu().contiguous()
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()
