"""`flashvsr.load`: a model folder of ours, a FlashVSR release, or Wan2.1-T2V-1.3B, recognised by its files.

Strict: every tensor in a file is used and every parameter is filled, or a sentence names what is not. Files
are read without executing anything (`weights_only`), and modules are built empty and take the file's tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from flashvsr.base.cli import UserError
from flashvsr.base.files import load_torch, sha256
from flashvsr.config import ModelConfig
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import check_prompt
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights import names
from flashvsr.weights.folder import Description, FileInfo, FlashVSR, ModelInfo, read_info
from flashvsr.weights.names import CALLED, FILES, INFO_FILE, WAN_DIT

VARIANTS = {"v1": "buffer", "v1.1": "causal"}  # the release's two projectors: same tensors, other function
POINTER = b"version https://git-lfs"


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    lr_projector: str = "auto",
    parts: Sequence[str] | None = None,
    verify: bool = False,
) -> FlashVSR:
    """Loads a model folder; parts that it lacks are None.

    path: a folder of ours (with `flashvsr.json`), a FlashVSR release, or Wan2.1-T2V-1.3B; dtype, device: of
    the weights (the prompt and the latent statistics stay float32); lr_projector: v1 or v1.1, for a release
    folder whose name does not say it; parts: only these (of dit, lr_projector, tc_decoder, vae, prompt);
    verify: also compare the files' SHA-256 with `flashvsr.json`. Raises UserError, never a traceback, on what
    is missing, damaged, of another model or of a newer format.
    """
    folder = Path(path)
    if lr_projector not in ("auto", *VARIANTS):
        raise UserError(f"lr_projector={lr_projector!r} is none of auto, {', '.join(VARIANTS)}")
    for part in parts or ():
        if part not in FILES:
            raise UserError(f"parts={part!r} is unknown; there are {', '.join(FILES)}")
    described = _describe(folder, lr_projector)
    wanted = {part: file for part, file in described.files.items() if parts is None or part in parts}
    for file in wanted.values():
        _check_file(folder / file.name, file, verify)
    states = {part: _read(folder / file.name, dtype, device) for part, file in wanted.items()}
    for part, state in states.items():
        if part != "prompt" and isinstance(state, Tensor):
            raise UserError(
                f"{folder / wanted[part].name} holds one tensor instead of named ones; it is another file"
            )
    config = described.config
    if (folder / INFO_FILE).is_file():
        info = described.info
    else:
        config, info = _from_shapes(folder, states, lr_projector)
    model = FlashVSR(config=config, info=info, source=str(folder))
    for part, state in states.items():
        where = str(folder / wanted[part].name)
        if part == "prompt":
            model.prompt = check_prompt(state, config.dit.text_dim, where)
        else:
            setattr(model, part, fill(_empty(part, config), state, where))
    if model.vae is not None:
        # not in the file: they were made on the meta device like everything else
        model.vae.latents_mean = torch.tensor(config.vae.mean, device=device)
        model.vae.latents_std = torch.tensor(config.vae.std, device=device)
    return model


# ---- which folder is this -------------------------------------------------------------------------------


def _describe(folder: Path, lr_projector: str) -> Description:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {what}; give the folder of a model")
    if (folder / INFO_FILE).is_file():
        if lr_projector != "auto":
            raise UserError(
                f"lr_projector={lr_projector!r} has no effect on {folder}, whose {INFO_FILE} says it"
            )
        return read_info(folder)
    present = {part: name for part, name in FILES.items() if (folder / name).is_file()}
    if (folder / WAN_DIT).is_file():
        if "dit" in present:
            raise UserError(f"{folder} holds two DiTs, {FILES['dit']} and {WAN_DIT}; move one away")
        present["dit"] = WAN_DIT
    if not present:
        raise UserError(
            f"{folder} holds no model: neither {INFO_FILE} nor any of {', '.join([*FILES.values(), WAN_DIT])}"
        )
    files = {part: FileInfo(name, (folder / name).stat().st_size, "") for part, name in present.items()}
    return Description(0, ModelInfo("parts"), ModelConfig(), files)


def _variant(folder: Path, lr_projector: str) -> str:
    """The projector's temporal mode in a release folder. Both releases have the same tensors."""
    if lr_projector == "auto":
        if "v1.1" not in folder.resolve().name.lower():
            raise UserError(
                f"{folder} does not say which FlashVSR release it is, and v1 and v1.1 look the same: "
                f"give lr_projector='v1' or 'v1.1'"
            )
        lr_projector = "v1.1"
    return VARIANTS[lr_projector]


def _from_shapes(
    folder: Path, states: Mapping[str, dict[str, Tensor] | Tensor], lr_projector: str
) -> tuple[ModelConfig, ModelInfo]:
    """Widths and identity of a folder without json."""
    made: dict[str, object] = {}
    for part, state in states.items():
        if part == "prompt":
            continue
        shapes = {name: tuple(t.shape) for name, t in state.items()}
        try:
            if part == "dit":
                made[part] = names.dit_config(shapes)
            elif part == "lr_projector":
                made[part] = names.projector_config(shapes, _variant(folder, lr_projector))
            elif part == "vae":
                made[part] = names.vae_config(shapes)
            else:
                made[part] = names.tc_decoder_config(shapes)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"{folder}: the {CALLED[part]}'s file has no fitting tensor {error}; it is another model's"
            ) from None
    if "lr_projector" not in made and lr_projector != "auto":
        raise UserError(f"lr_projector={lr_projector!r} has no effect: {folder} has no LR projector loaded")
    config = ModelConfig(**made)
    release = (folder / FILES["dit"]).is_file()
    info = ModelInfo(
        kind="one-step" if release else "parts",
        projector_mode=config.lr_projector.mode,
        provenance={"release": "FlashVSR" if release else "Wan2.1 or parts"},
    )
    return config, info


# ---- files ----------------------------------------------------------------------------------------------


def _check_file(path: Path, file: FileInfo, verify: bool) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing, though {INFO_FILE} lists it; copy the whole folder again")
    size = path.stat().st_size
    with open(path, "rb") as handle:
        if handle.read(len(POINTER)) == POINTER:
            raise UserError(
                f"{path} is a git-lfs pointer, not the file: run `git lfs pull` in its repository"
            )
    if size != file.size:
        raise UserError(f"{path} has {size} bytes instead of {file.size}; copy it again")
    if verify and file.sha256 and sha256(path) != file.sha256:
        raise UserError(f"{path} is not the file that {INFO_FILE} describes (its SHA-256 differs)")


def _read(path: Path, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor] | Tensor:
    """The tensors of a safetensors or torch file, floating ones in `dtype`. A lone tensor keeps its own."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as handle:
                keys = handle.keys()
                return {key: _cast(handle.get_tensor(key), dtype) for key in keys}
        except SafetensorError as error:
            raise UserError(f"{path} is not a whole safetensors file ({error}); copy it again") from None
    content = load_torch(path)
    if isinstance(content, Tensor):
        return content.to(device)
    if not isinstance(content, Mapping) or not all(isinstance(t, Tensor) for t in content.values()):
        raise UserError(f"{path} holds something else than named tensors; give the release's file")
    return {name: _cast(tensor, dtype).to(device) for name, tensor in content.items()}


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


# ---- modules --------------------------------------------------------------------------------------------


def _empty(part: str, config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        if part == "dit":
            return DiT(config.dit)
        if part == "lr_projector":
            return LRProjector(config.lr_projector)
        if part == "vae":
            return WanVAE(config.vae)
        return TCDecoder(config.tc_decoder)


def fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """Gives `module` (on any device, also meta) the tensors of `state`; UserError names what does not fit."""
    expected = module.state_dict()
    problems = [
        (f"missing: {', '.join(_some(expected.keys() - state.keys()))}", expected.keys() - state.keys()),
        (f"not ours: {', '.join(_some(state.keys() - expected.keys()))}", state.keys() - expected.keys()),
    ]
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    ]
    problems.append((f"of another size: {', '.join(_some(other))}", other))
    found = [sentence for sentence, names_ in problems if names_]
    if found:
        raise UserError(f"{where} does not fit this {type(module).__name__}: {'; '.join(found)}")
    module.load_state_dict(state, assign=True)
    return module


def _some(items: Sequence[str] | set[str], most: int = 6) -> list[str]:
    ordered = sorted(items)
    more = [f"and {len(ordered) - most} more"] if len(ordered) > most else []
    return [*ordered[:most], *more]
