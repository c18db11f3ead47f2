"""`flashvsr.load`: any model that `recognise` knows, as modules in memory.

Strict: every tensor in a file is used and every parameter is filled, or a sentence names what is not. Files
are read without executing anything, mapped where their format allows; modules are built empty and take the
files' tensors. One exception: tensors that a release's `TCDecoder.ckpt` has beyond the decoder are named and
left out, because the release itself loads that file non-strictly; what it lacks is an error here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flashvsr.base.cli import UserError
from flashvsr.base.files import sha256
from flashvsr.config import DiTConfig, ModelConfig
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import check_prompt
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights import diffusers, names
from flashvsr.weights.explain import listed, looks_like
from flashvsr.weights.folder import FlashVSR, ModelInfo, say
from flashvsr.weights.names import CALLED, FILES, INFO_FILE
from flashvsr.weights.recognise import Found, PartFile, recognise
from flashvsr.weights.tensors import check_file, read_tensors

VARIANTS = {"v1": "buffer", "v1.1": "causal"}  # the release's two projectors: same tensors, other function
MODULES = {"dit": DiT, "lr_projector": LRProjector, "tc_decoder": TCDecoder, "vae": WanVAE}
State = dict[str, Tensor]


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    lr_projector: str = "auto",
    parts: Sequence[str] | None = None,
    verify: bool = False,
    note: Callable[[str], None] = say,
) -> FlashVSR:
    """Loads a model; parts that it lacks are None.

    path: a model folder of ours (an export), a run (its newest complete parts) or one of its stages, a single
    file of ours, a FlashVSR release, Wan2.1-T2V-1.3B, or a diffusers Wan transformer; dtype, device: of the
    weights (None: as stored; the latent statistics, and with a dtype the prompt, are float32); lr_projector:
    v1 or v1.1, for a release folder whose name does not say it; parts: only these (of dit, lr_projector,
    tc_decoder, vae, prompt); verify: also compare the files' SHA-256 with `flashvsr.json`; note: is told what
    was assumed and what was left out (default: a line on stderr). Raises UserError, never a traceback, on
    what is missing, damaged, of another model or of a newer format.
    """
    source = Path(path)
    if lr_projector not in ("auto", *VARIANTS):
        raise UserError(f"lr_projector={lr_projector!r} is none of auto, {', '.join(VARIANTS)}")
    for part in parts or ():
        if part not in FILES:
            raise UserError(f"parts={part!r} is unknown; there are {', '.join(FILES)}")
    found = recognise(source)
    if found.described is not None and lr_projector != "auto":
        raise UserError(f"lr_projector={lr_projector!r} has no effect on {source}, whose {INFO_FILE} says it")
    for sentence in found.notes:
        note(sentence)
    wanted = {part: file for part, file in found.parts.items() if parts is None or part in parts}
    for file in wanted.values():
        _check(file, verify)
    states = {part: _read(part, file, dtype, device) for part, file in wanted.items()}
    if found.described is not None:
        config, info = found.described.config, found.described.info
    else:
        config, info = _identity(source, found, states, lr_projector, note)
    model = FlashVSR(config=config, info=info, source=str(source))
    for part, state in states.items():
        where = _where(found.parts[part])
        if part == "prompt":
            model.prompt = _prompt(
                state, config, "dit" in states or found.described is not None, where, dtype
            )
            continue
        if part == "tc_decoder" and found.described is None:
            state = _without_extras(state, config, where, note)
        setattr(model, part, fill(_empty(part, config), state, where))
    if model.vae is not None:
        # not in the file: they were made on the meta device like everything else
        model.vae.latents_mean = torch.tensor(config.vae.mean, device=device)
        model.vae.latents_std = torch.tensor(config.vae.std, device=device)
    return model


def _where(file: PartFile) -> str:
    return str(file.paths[0]) if len(file.paths) == 1 else f"{file.paths[0]} and its {len(file.paths)} shards"


def _check(file: PartFile, verify: bool) -> None:
    for path in file.paths:
        if file.listed is not None and not path.is_file() and not path.is_symlink():
            raise UserError(f"{path} is missing, though {INFO_FILE} lists it; copy the whole folder again")
        size = check_file(path)
        if file.listed is None:
            continue
        if size != file.listed.size:
            raise UserError(f"{path} has {size} bytes instead of {file.listed.size}; copy it again")
        if verify and sha256(path) != file.listed.sha256:
            raise UserError(f"{path} is not the file that {INFO_FILE} describes (its SHA-256 differs)")


def _read(part: str, file: PartFile, dtype: torch.dtype | None, device: torch.device | str) -> State | Tensor:
    state = read_tensors(file.paths, dtype, device, file.prefix)
    if part == "prompt":
        return state
    if isinstance(state, Tensor):
        raise UserError(f"{_where(file)} holds one tensor instead of named ones; it is another file")
    return diffusers.renamed(state) if part == "dit" and diffusers.is_diffusers(state) else state


def _prompt(
    state: State | Tensor, config: ModelConfig, width_known: bool, where: str, dtype: torch.dtype | None
) -> Tensor:
    if isinstance(state, Mapping) and len(state) == 1:
        (state,) = state.values()
    width = config.dit.text_dim
    if not width_known and isinstance(state, Tensor) and state.ndim:
        width = state.shape[-1]
    checked = check_prompt(state, width, where)
    return checked.to(state.dtype) if dtype is None else checked


# ---- what a folder without json is ----------------------------------------------------------------------


def _identity(
    path: Path,
    found: Found,
    states: Mapping[str, State | Tensor],
    lr_projector: str,
    note: Callable[[str], None],
) -> tuple[ModelConfig, ModelInfo]:
    """Widths from shapes, the rest from names. A file without the tensors that tell its widths gets the
    release's, and `fill` then names everything that does not fit."""
    release = None
    if "lr_projector" in states:
        release = _variant(path, lr_projector, note)
    elif lr_projector != "auto":
        raise UserError(f"lr_projector={lr_projector!r} has no effect: {path} has no LR projector loaded")
    derive: dict[str, Callable] = {
        "dit": lambda shapes: names.dit_config(
            shapes, **{k: v for k, v in found.widths.items() if k != "layers"}
        ),
        "lr_projector": lambda shapes: names.projector_config(shapes, VARIANTS[release]),
        "vae": names.vae_config,
        "tc_decoder": names.tc_decoder_config,
    }
    made = {}
    for part, widths in derive.items():
        if part in states:
            try:
                made[part] = widths({name: tuple(t.shape) for name, t in states[part].items()})
            except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
                if isinstance(error, UserError):
                    raise UserError(f"{_where(found.parts[part])}: {error}") from None
    config = ModelConfig(**made)
    if release is not None and "lr_projector" not in made:
        config = replace(config, lr_projector=replace(config.lr_projector, mode=VARIANTS[release]))
    if "dit" in made:
        _check_dit(config.dit, found, states["dit"])
    _check_fit(path, made)
    is_release = found.what == "FlashVSR release" and "dit" in found.parts
    called = f"FlashVSR {release}" if is_release and release else found.what
    mode = config.lr_projector.mode
    return config, ModelInfo("one-step" if is_release else "parts", mode, provenance={"release": called})


def _variant(path: Path, given: str, note: Callable[[str], None]) -> str:
    """v1 or v1.1: their projectors have the same tensors and are different functions."""
    folder = path.absolute()
    candidates = [folder.name, folder.resolve().name, *(p.name for p in folder.parents[:2])]
    # a folder above speaks only as the cache of huggingface_hub names it
    own = {names.release_in(n) for n in candidates[:2]} | {
        names.release_in(n) for n in candidates[2:] if n.startswith("models--")
    }
    said = sorted(own - {None})
    if given != "auto":
        other = f", though its name says {said[0]}" if said and said != [given] else ""
        note(f"{path}: LR projector {given} ({VARIANTS[given]}), as given{other}")
        return given
    if len(said) != 1:
        raise UserError(
            f"{path} does not say which FlashVSR release it is, and v1 and v1.1 look the same: "
            f"give lr_projector='v1' or 'v1.1' (--lr-projector on the command line)"
        )
    note(f"{path}: LR projector {said[0]} ({VARIANTS[said[0]]}), by the folder's name")
    return said[0]


def _check_dit(config: DiTConfig, found: Found, state: State) -> None:
    """UserError when a DiT is a larger Wan, or has lost blocks."""
    where = _where(found.parts["dit"])
    looks = looks_like(state, "DiT")
    if looks is not None:
        raise UserError(f"{where}: {looks}")
    layers = found.widths.get(
        "layers", DiTConfig().layers if config.dim == DiTConfig().dim else config.layers
    )
    if config.layers != layers:
        raise UserError(
            f"{where} holds {config.layers} blocks of {layers}: it is a part of the model; copy it again"
        )


def _check_fit(path: Path, made: Mapping[str, object]) -> None:
    """UserError when parts of one folder cannot work together."""
    dit, projector, vae, decoder = (made.get(p) for p in ("dit", "lr_projector", "vae", "tc_decoder"))
    pairs = []
    if dit and projector:
        pairs.append(("LR projector", "gives", projector.out_dim, "DiT", "is wide", dit.dim))
    if dit and vae:
        pairs.append(("VAE", "has latent channels", vae.z_dim, "DiT", "takes", dit.in_channels))
    if dit and decoder:
        pairs.append(
            ("TC decoder", "takes latent channels", decoder.latent_channels, "DiT", "gives", dit.in_channels)
        )
    for a, does, x, b, has, y in pairs:
        if x != y:
            raise UserError(f"{path}: the {a} {does} {x}, the {b} {has} {y}: they belong to different models")


# ---- modules --------------------------------------------------------------------------------------------


def _empty(part: str, config: ModelConfig) -> nn.Module:
    with torch.device("meta"):
        return MODULES[part](getattr(config, part))


def _without_extras(state: State, config: ModelConfig, where: str, note: Callable[[str], None]) -> State:
    expected = _empty("tc_decoder", config).state_dict().keys()
    extra = state.keys() - expected
    if not extra or expected - state.keys():
        return state  # what is missing is for `fill` to say, together with the extras
    note(f"{where}: left out, for the {CALLED['tc_decoder']} has no such tensors: {listed(extra)}")
    return {name: t for name, t in state.items() if name in expected}


def fill(module: nn.Module, state: Mapping[str, Tensor], where: str) -> nn.Module:
    """Gives `module` (on any device, also meta) the tensors of `state`; UserError names what does not fit."""
    expected = module.state_dict()
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & state.keys())
        if state[name].shape != expected[name].shape
    ]
    if missing or extra or other:
        kind = type(module).__name__
        said = [looks_like(state, kind)]
        said += [f"missing: {listed(missing)}"] if missing else []
        said += [f"not ours: {listed(extra)}"] if extra else []
        said += [f"of another size: {listed(other)}"] if other else []
        raise UserError(f"{where} does not fit this {kind}: {'; '.join(s for s in said if s)}")
    module.load_state_dict(state, assign=True)
    return module
