"""Which model is this? A folder or file is recognised by its names; nothing is read but small JSON.

Known: a model folder of ours, a run or a stage of ours, a single file of ours, a FlashVSR release (v1 or
v1.1), Wan2.1-T2V-1.3B, a diffusers Wan transformer (alone or in its pipeline).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashvsr.base.cli import UserError
from flashvsr.base.files import read_json, reading
from flashvsr.weights import diffusers
from flashvsr.weights.explain import foreign_folder
from flashvsr.weights.folder import Description, FileInfo, describe_run, described_from, gather, read_info
from flashvsr.weights.names import FILES, INFO_FILE, SINGLE_KEY, STEMS, SUFFIXES, WAN_DIT
from flashvsr.weights.tensors import is_safetensors, read_metadata

RUN_SIGNS = ("export", "config.yaml", "checkpoints", "metrics.jsonl")
STAGE_FOLDERS = ("vae", "stage1", "stage2", "stage3", "decoder")


@dataclass(frozen=True)
class PartFile:
    """A part's tensors: a file or shards, the prefix of their names, what our json says of the file."""

    paths: tuple[Path, ...]
    prefix: str = ""
    listed: FileInfo | None = None


@dataclass(frozen=True)
class Found:
    """A recognised model. `described`: what our json says, None for foreign folders; `widths`: what a foreign
    config.json says about the DiT (heads, layers, eps); `notes`: sentences for the user."""

    what: str
    parts: dict[str, PartFile]
    described: Description | None = None
    widths: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def recognise(path: Path) -> Found:
    """UserError, in one sentence, when `path` holds no model that is known here."""
    with reading(path):
        if not os.path.isdir(path):
            os.stat(path)  # says what is wrong with it
            return _single(path)
        return _folder(path, set(os.listdir(path)))


def _folder(path: Path, names: set[str]) -> Found:
    if INFO_FILE in names:
        return _ours(path)
    if _diffusers_config(path) is not None:
        return _diffusers(path, names)
    if any((path / stage / sign).exists() for stage in STAGE_FOLDERS for sign in RUN_SIGNS):
        return _run(path)
    if (path / "export" / INFO_FILE).is_file():
        return _ours(path / "export")
    found = _release(path, names)
    if found.parts:
        return found
    if names & {"config.yaml", "checkpoints", "metrics.jsonl"}:
        raise UserError(
            f"{path} is a stage that has not finished: its model will be in {path / 'export'}; the same "
            f"`python -m train` command goes on"
        )
    looks = foreign_folder(names)
    if not names:
        raise UserError(f"{path} is empty; give the folder of a model")
    if looks:
        raise UserError(f"{path} holds no model, it looks like {looks}")
    raise UserError(
        f"{path} holds no model: neither {INFO_FILE} nor any of {', '.join([*FILES.values(), WAN_DIT])}"
    )


# ---- ours -----------------------------------------------------------------------------------------------


def _ours(folder: Path) -> Found:
    described = read_info(folder)
    parts = {part: PartFile((folder / f.name,), listed=f) for part, f in described.files.items()}
    return Found("model folder", parts, described)


def _run(run_dir: Path) -> Found:
    sources = gather(run_dir)
    config, info = describe_run(run_dir, sources)
    listed = {part: read_info(folder).files[part] for part, folder in sources.items()}
    parts = {part: PartFile((folder / FILES[part],), listed=listed[part]) for part, folder in sources.items()}
    return Found("run", parts, Description(0, info, config, listed))


def _single(path: Path) -> Found:
    """A file of all parts, as `convert --to single` writes it: our description is in its metadata."""
    if not is_safetensors(path) or SINGLE_KEY not in (metadata := read_metadata(path)):
        raise UserError(
            f"{path} is a file that does not say what it is; give the folder of a model, with the release's "
            f"file names ({', '.join(FILES.values())})"
        )
    try:
        values = json.loads(metadata[SINGLE_KEY])
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: its description is not valid JSON ({error}); convert it again") from None
    described = described_from(values, f"{path}: its description")
    parts = {
        part: PartFile((path,), "prompt" if part == "prompt" else f"{part}.") for part in described.files
    }
    return Found("single file", parts, described)


# ---- others' --------------------------------------------------------------------------------------------


def _json_of(path: Path) -> dict[str, Any] | None:
    values = read_json(path) if path.is_file() else None
    return values if isinstance(values, dict) else None


def _diffusers_config(path: Path) -> Path | None:
    """The `config.json` of a diffusers Wan transformer, here or in `transformer/`, if there is one."""
    for folder in (path, path / diffusers.FOLDER):
        values = _json_of(folder / "config.json")
        name = (values or {}).get("_class_name")
        if name == diffusers.CLASS:
            return folder / "config.json"
        if folder == path and name == "AutoencoderKLWan":
            raise UserError(
                f"{path} is the VAE in diffusers' layout, whose names are not read here; take the original "
                f"Wan2.1_VAE.pth"
            )
    if (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is a diffusers pipeline without a {diffusers.CLASS} in transformer/; take Wan's"
        )
    return None


def _diffusers(path: Path, names: set[str]) -> Found:
    config = _diffusers_config(path)
    assert config is not None
    widths = diffusers.read_config(_json_of(config) or {}, str(config))
    dit = _candidates(config.parent, set(os.listdir(config.parent)), STEMS["wan"], "DiT")
    if not dit:
        raise UserError(f"{config.parent} has a config.json and no weights beside it; download it again")
    found = _release(path, names) if config.parent != path else Found("", {})
    if "dit" in found.parts:
        raise UserError(f"{path} holds two DiTs, its own and one in {config.parent}; move one away")
    notes = list(found.notes)
    if (config.parent.parent / "vae").is_dir() and "vae" not in found.parts:
        notes.append(f"{path}: its vae/ is in diffusers' layout and is not read; Wan2.1_VAE.pth would be")
    if (config.parent.parent / "text_encoder").is_dir():
        notes.append(f"{path}: its text_encoder/ is not loaded, `python -m flashvsr prompt` uses it")
    parts = {"dit": PartFile(dit), **found.parts}
    return Found("diffusers Wan transformer", parts, None, widths, tuple(notes))


def _release(path: Path, names: set[str]) -> Found:
    """A FlashVSR release or Wan2.1-T2V-1.3B: the known file names, with any suffix of weights."""
    parts: dict[str, PartFile] = {}
    for part in FILES:
        files = _candidates(path, names, STEMS[part], part)
        if files:
            parts[part] = PartFile(files)
    wan = _candidates(path, names, STEMS["wan"], "DiT")
    if wan and "dit" in parts:
        raise UserError(
            f"{path} holds two DiTs, {parts['dit'].paths[0].name} and {wan[0].name}; move one away"
        )
    if wan:
        parts["dit"] = PartFile(wan)
    encoders = sorted(n for n in names if n.startswith("models_t5") or n.startswith("models_clip"))
    notes = tuple(
        f"{path}: {name} is not loaded: the prompt is fixed (`python -m flashvsr prompt` encodes another)"
        for name in encoders
    )
    values = _json_of(path / "config.json") or {}
    widths = {}
    if values.get("_class_name") == "WanModel":
        kind = values.get("model_type", "t2v")
        if kind != "t2v":
            raise UserError(
                f"{path} is Wan's {kind} model; FlashVSR starts from text-to-video, Wan2.1-T2V-1.3B"
            )
        known = {"heads": "num_heads", "layers": "num_layers", "eps": "eps"}
        widths = {ours: values[theirs] for ours, theirs in known.items() if theirs in values}
    what = "Wan2.1-T2V-1.3B" if wan else "FlashVSR release" if "dit" in parts else "parts"
    return Found(what, parts, None, widths, notes)


def _candidates(folder: Path, names: set[str], stem: str, called: str) -> tuple[Path, ...]:
    """The file `stem` with a suffix of weights, or all its shards; empty when there is neither."""
    whole = [stem + suffix for suffix in SUFFIXES if stem + suffix in names]
    shard = re.compile(re.escape(stem) + r"-(\d{5})-of-(\d{5})(\.\w+)")
    shards = {n: m for n in sorted(names) if (m := shard.fullmatch(n)) and m[3] in SUFFIXES}
    if len(whole) > 1 or (whole and shards):
        given = whole + list(shards)[:1]
        raise UserError(f"{folder} holds {' and '.join(given)} for one {called}; move one away")
    if not shards:
        return tuple(folder / name for name in whole)
    total = max(int(m[2]) for m in shards.values())
    absent = sorted(set(range(1, total + 1)) - {int(m[1]) for m in shards.values()})
    if absent:
        numbers = ", ".join(str(n) for n in absent)
        raise UserError(f"{folder} lacks shard {numbers} of {total} of {stem}; download it again")
    return tuple(folder / name for name in shards)
