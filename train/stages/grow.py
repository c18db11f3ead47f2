"""A TC decoder grown from a TAEHV-style tiny decoder (taew2_1: 16 latent channels, widths 256/128/64/64)
without changing its function; the release seems to have begun in this way too.

TAEHV's decoder is ours without the 768 condition channels and the two deepening convolutions. Whatever is
wider or new here starts as in `fresh_decoder`, and what leads from it into what was there starts at zero: the
grown decoder gives 2x - 1 of TAEHV's x in [0,1], whatever LR shows, and the zeros learn from the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from flashvsr.base.cli import UserError
from flashvsr.config import TCDecoderConfig
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.weights.explain import listed, looks_like
from flashvsr.weights.names import FILES, SINGLE_KEY, STEMS, SUFFIXES
from flashvsr.weights.tensors import check_file, is_safetensors, read_metadata, read_tensors

STEM = "taew2_1"
# Both count their ReLUs and upsamplings, ours also the two inserted convolutions. TAEHV's layer: ours.
CONVS = {1: 1, 8: 10, 14: 16, 20: 22, 22: 26}
BLOCKS = {3: 5, 4: 6, 5: 7, 9: 11, 10: 12, 11: 13, 15: 17, 16: 18, 17: 19}
GROWS = {7: (9, 1), 13: (15, 2), 19: (21, 2)}  # and its frames
LEVELS = ("decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")


def taehv_file(init: Path) -> Path | None:
    """The tiny decoder's file: `init`, or `taew2_1` in it; None where `init` is a model.

    Raises UserError where a folder holds two decoders to start from.
    """
    if init.is_file():
        is_model = is_safetensors(init) and SINGLE_KEY in read_metadata(init)
        return None if is_model else init
    given = [init / (stem + suffix) for stem in (STEM, STEMS["tc_decoder"]) for suffix in SUFFIXES]
    found = [path for path in given if path.is_file()]
    if not any(path.stem == STEM for path in found):
        return None
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{init} holds {names} to start one TC decoder from; move one away")
    return found[0]


def holds_more(init: Path) -> bool:
    """Whether parts of a model lie beside a folder's tiny decoder."""
    return init.is_dir() and any(path.stem in STEMS.values() for path in init.iterdir())


def read_taehv(path: Path) -> dict[str, Tensor]:
    """The decoder's tensors of a TAEHV file by name, float32; an encoder beside them is left out. UserError,
    naming what is missing, extra or of another size, for any other file."""
    check_file(path)
    state = read_tensors([path], torch.float32, "cpu")
    if isinstance(state, Tensor):
        raise UserError(f"{path} holds one tensor instead of a TAEHV decoder's; it is another file")
    state = {name: t for name, t in state.items() if not name.startswith("encoder.")}
    if "decoder.3.weight" in state and "decoder.26.weight" in state:
        raise UserError(f"{path} is a TC decoder already: call it {FILES['tc_decoder']} and give its folder")
    try:
        channels = tuple(state[name].shape[0] for name in LEVELS)
        latent = state[LEVELS[0]].shape[1]
    except (KeyError, IndexError):
        channels, latent = (256, 128, 64, 64), 16
    expected = _shapes(TCDecoderConfig(channels, latent))
    missing, extra = expected.keys() - state.keys(), state.keys() - expected.keys()
    other = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if missing or extra or other:
        said = [looks_like(state, "TCDecoder")] if missing else []
        said += [f"missing: {listed(missing)}"] if missing else []
        said += [f"not TAEHV's: {listed(extra)}"] if extra else []
        said += [f"of another size: {listed(other)}"] if other else []
        raise UserError(f"{path} is no TAEHV decoder ({STEM}): {'; '.join(s for s in said if s)}")
    return state


@torch.no_grad()
def grown(state: Mapping[str, Tensor], fresh: TCDecoder, where: str) -> TCDecoder:
    """`fresh`, as `fresh_decoder` makes it, with a TAEHV decoder's function.

    state: of `read_taehv`; where: what to call it in a sentence. Raises UserError where `fresh` is narrower.
    """
    given = (*(state[name].shape[0] for name in LEVELS), state[LEVELS[0]].shape[1])
    taken = (*fresh.config.channels, fresh.config.latent_channels)
    if given[-1] != taken[-1] or any(old > new for old, new in zip(given, taken, strict=True)):
        old, new = ("/".join(map(str, widths[:-1])) for widths in (given, taken))
        raise UserError(
            f"{where} is {old} wide for {given[-1]} latent channels and this scale's TC decoder {new} for "
            f"{taken[-1]}: it grows and does not shrink; scale=wan1.3b has the release's widths"
        )
    own = fresh.state_dict()
    for theirs, ours, frames, halves in _layers():
        old, new = state[f"{theirs}.weight"], own[f"{ours}.weight"]
        rows = _places(old.shape[0], new.shape[0], frames)
        columns = _places(old.shape[1], new.shape[1], halves)
        if ours == "decoder.1":  # the condition comes first
            columns = columns + new.shape[1] - old.shape[1]
        new[rows] = 0
        new[rows[:, None], columns] = old
        if f"{theirs}.bias" in state:
            own[f"{ours}.bias"][rows] = state[f"{theirs}.bias"]
    return fresh


def _layers() -> Iterator[tuple[str, str, int, int]]:
    """TAEHV's and our name of every convolution, into how many frames its outputs and how many parts its
    inputs are divided."""
    for theirs, ours in CONVS.items():
        yield f"decoder.{theirs}", f"decoder.{ours}", 1, 1
    for theirs, ours in BLOCKS.items():
        for i in (0, 2, 4):  # the first looks at a frame and the one before it
            yield f"decoder.{theirs}.conv.{i}", f"decoder.{ours}.conv.{i}", 1, 2 if i == 0 else 1
    for theirs, (ours, frames) in GROWS.items():
        yield f"decoder.{theirs}.conv", f"decoder.{ours}.conv", frames, 1


def _places(old: int, new: int, parts: int) -> Tensor:
    """Where `old` channels in so many equal parts lie among `new`: at the beginning of each part."""
    return torch.cat([torch.arange(old // parts) + part * (new // parts) for part in range(parts)])


def _shapes(config: TCDecoderConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a TAEHV decoder of these widths."""
    with torch.device("meta"):
        own = TCDecoder(config).state_dict()
    shapes = {}
    for theirs, ours, _, _ in _layers():
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in own:
                shapes[f"{theirs}.{kind}"] = tuple(own[f"{ours}.{kind}"].shape)
    first = shapes[LEVELS[0]]
    return {**shapes, LEVELS[0]: (first[0], config.latent_channels, *first[2:])}
