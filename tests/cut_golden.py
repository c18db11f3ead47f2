"""Cuts golden tensor files down to what a repository can hold: `python -m tests.cut_golden FROM TO`.

Below 1 MB each. `misc` stays whole. Of the others the released file's weights are cut in width (fewer heads'
channels, fewer feature channels; scaled, so that fewer inputs give the same variance), its inputs in size,
and both are rounded to half precision, in which they are stored; the outputs are then computed anew by the
oracle in float64. The oracle is first checked against every full file used: the script refuses to cut where
it does not reproduce the released numbers, and refuses a cut that float32 could not follow (badly
conditioned, or a pair at the threshold of the selection).

`pipeline_v1_vae` stands for a file that is not among the full ones: DiT of the released pipeline file, v1
projector with two layers, VAE decoder, wavelet colours. In pipeline files `expand` in the metadata says that
each stored LR pixel stands for a square of that many output pixels.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from flashvsr.base.cli import UserError, run
from tests.oracle.files import Tensors, read, recompute, tolerance, worst_errors

HEADS = 2
# Per axis of a weight: `.` stays whole; a digit n: of each of n equal groups the first channels stay.
# H: groups are the heads, S: the heads of six vectors (shift, scale, gate twice); O: the first DiT channels.
AXES = {
    "dit": {
        r"patch_embedding\.\w+": "H....",
        r"(text|time)_embedding\.0\.\w+": "H.",
        r"(text|time)_embedding\.2\.\w+": "HH",
        r"time_projection\.1\.\w+": "SH",
        r"(blocks\.\d+|head)\.modulation": "..H",
        r"blocks\.\d+\.\w+_attn\.[qkvo]\.\w+": "HH",
        r"blocks\.\d+\.(\w+_attn\.norm_.|norm3)\.\w+": "H",
        r"blocks\.\d+\.ffn\.0\.\w+": "1H",
        r"blocks\.\d+\.ffn\.2\.\w+": "H1",
        r"head\.head\.\w+": ".H",
    },
    "lr_proj": {
        r"conv1\.\w+": "1....",
        r"conv2\.\w+": "11...",
        r"norm\d\.gamma": "1...",
        r"linear_layers\.\d+\.\w+": "O1",
    },
    "tc_decoder": {
        r"decoder\.1\.\w+": "1...",
        r"decoder\.(3|10|16|22|24)\.weight": "11..",
        r"decoder\.\d+\.conv\.0\.\w+": "12..",
        r"decoder\.\d+\.conv\.[24]\.\w+": "11..",
        r"decoder\.9\.conv\.weight": "11..",
        r"decoder\.(15|21)\.conv\.weight": "21..",
        r"decoder\.26\.\w+": ".1..",
    },
    "vae": {
        r".*gamma": "1...",
        r"conv[12]\.\w+": ".....",
        r"\w+\.conv1\.\w+": "1....",
        r"\w+\.head\.2\.\w+": ".1...",
        r".*\.(residual\.\d|shortcut)\.\w+": "11...",
        r".*\.(resample\.1|proj)\.\w+": "11..",
        r".*\.to_qkv\.\w+": "31..",
        r"encoder\..*\.time_conv\.\w+": "11...",
        r"decoder\..*\.time_conv\.\w+": "21...",
    },
}


def first_of(size: int, groups: int, share: float) -> Tensor:
    """Indices of the first channels of each group: `share` of them."""
    each = size // groups
    return torch.cat([g * each + torch.arange(round(each * share)) for g in range(groups)])


def cut(tensors: Tensors, part: str, share: float, out: int | None = None) -> Tensors:
    """The part's weights (names with its prefix) with `share` of their channels, in half precision."""
    kept = {}
    for name, weight in tensors.items():
        if not name.startswith(f"{part}."):
            continue
        inner = name.removeprefix(f"{part}.")
        rules = next(axes for pattern, axes in AXES[part].items() if re.fullmatch(pattern, inner))
        for axis, rule in zip(range(weight.ndim), rules, strict=False):
            if rule == "O":
                index = torch.arange(out or weight.shape[axis])
            elif rule == ".":
                continue
            else:
                groups = {"H": HEADS, "S": 6 * HEADS}.get(rule) or int(rule)
                index = first_of(weight.shape[axis], groups, share)
            if axis == 1:  # fewer inputs, the same variance
                weight = weight * (weight.shape[1] / len(index)) ** 0.5
            weight = weight.index_select(axis, index)
        kept[name] = weight.half()
    return kept


# ---- one function per file: weights, inputs, metadata, which outputs stay -------------------------------


Cut = tuple[Tensors, dict[str, str], str]


def cut_dit_stream(tensors: Tensors, meta: Mapping[str, str]) -> Cut:
    """A third of the channels, the left half of the picture (2x2 blocks), three calls, fewer past chunks."""
    share, rows, columns = 1 / 3, int(meta["tokens_h"]), int(meta["tokens_w"])
    keep = first_of(int(meta["dim"]), HEADS, share)
    kept = cut(tensors, "dit", share) | {"context": tensors["context"].half()}
    for c in range(3):
        tokens = tensors[f"chunk{c}.lr_tokens"].unflatten(1, (-1, rows, columns))[:, :, :16, :16, keep]
        kept[f"chunk{c}.lr_tokens"] = tokens.flatten(1, 3).half()
        kept[f"chunk{c}.x"] = tensors[f"chunk{c}.x"][..., :32, :32].half()
    said = {"heads": str(HEADS), "topk_ratio": "0.75", "kv_ratio": "2.5", "local_range": "2"}
    return kept, said, r"chunk\d\.mask.*|chunk2\.velocity|final_cache_k\.block1"


def cut_projector(tensors: Tensors, meta: Mapping[str, str]) -> Cut:
    kept = cut(tensors, "lr_proj", 1 / 8) | {"video": tensors["video"][:, :, :21, :32, 16:64].half()}
    return kept, {"variant": meta["variant"]}, ".*"


def cut_tc_decoder(tensors: Tensors, meta: Mapping[str, str]) -> Cut:
    kept = cut(tensors, "tc_decoder", 1 / 4)
    for c in range(3):
        kept[f"chunk{c}.latent_NTCHW"] = tensors[f"chunk{c}.latent_NTCHW"][..., :3, :4].half()
        kept[f"chunk{c}.cond_BCFHW"] = tensors[f"chunk{c}.cond_BCFHW"][..., :24, :32].half()
    return kept, {}, ".*"


def cut_vae(tensors: Tensors, meta: Mapping[str, str]) -> Cut:
    """Half of the width; three latents, so that every layer in time has met its start and its past."""
    kept = cut(tensors, "vae", 1 / 2) | {"video": tensors["video"][:, :, :9, :32, :40].half()}
    with torch.no_grad():
        kept["latent"] = recompute(kept, {})[0]["latent"].float()  # `decoded` is of what is stored
    return kept, {}, ".*"


def _pipeline(tensors: Tensors, frames: int, width: int) -> Tensors:
    lr = tensors["lq_uint8_CFHW"][:, :frames, ::8, :width:8]
    kept = cut(tensors, "dit", 1 / 3) | {"context": tensors["context"].half(), "lq_uint8_CFHW": lr}
    kept["noise"] = tensors["noise"][:, :, : (frames - 1) // 4, :, : width // 8].half()
    return kept | {"frames_index": torch.tensor([frames - 7])}


def cut_pipeline(tensors: Tensors, meta: Mapping[str, str]) -> Cut:
    kept = _pipeline(tensors, 33, 256) | cut(tensors, "lr_proj", 1 / 8, out=32)
    kept |= cut(tensors, "tc_decoder", 1 / 4)
    said = {"heads": str(HEADS), "topk_ratio": "1.25", "kv_ratio": "3.0", "local_range": "3", "expand": "8"}
    return kept, said | {"decoder": "tc", "lr_variant": "causal", "color_fix": "adain"}, ".*"


def cut_pipeline_v1(tensors: Tensors, meta: Mapping[str, str]) -> Cut:
    """`tensors` of three files: DiT and frames, v1 projector, VAE."""
    kept = _pipeline(tensors, 33, 128) | cut(tensors, "lr_proj", 1 / 6, out=32)
    kept |= {
        n: t for n, t in cut(tensors, "vae", 1 / 2).items() if n.startswith(("vae.decoder", "vae.conv2"))
    }
    said = {"heads": str(HEADS), "topk_ratio": "2.0", "kv_ratio": "2.0", "expand": "8"}
    return kept, said | {"decoder": "vae", "lr_variant": "buffer", "color_fix": "wavelet"}, ".*"


FILES = {
    "dit_stream": (("dit_stream",), cut_dit_stream),
    "lr_proj_v1": (("lr_proj_v1",), cut_projector),
    "lr_proj_v11": (("lr_proj_v11",), cut_projector),
    "tc_decoder": (("tc_decoder",), cut_tc_decoder),
    "wan_vae": (("wan_vae",), cut_vae),
    "pipeline_v11_tiny": (("pipeline_v11_tiny",), cut_pipeline),
    "pipeline_v1_vae": (("pipeline_v11_tiny", "lr_proj_v1", "wan_vae"), cut_pipeline_v1),
}


def verified(path: Path) -> tuple[Tensors, dict[str, str]]:
    """A full file that the oracle reproduces within the tolerances; UserError for another."""
    tensors, meta = read(path)
    errors = worst_errors(recompute(tensors, meta)[0], tensors)
    above = {name: error for name, error in errors.items() if error > tolerance(name)}
    if above or not errors:
        raise UserError(f"{path}: the oracle does not reproduce {above or 'anything in it'}; nothing was cut")
    return tensors, meta


def outputs_of(kept: Tensors, meta: Mapping[str, str], stays: str, name: str) -> Tensors:
    """The outputs of a cut file, as they are stored; UserError where float32 could not give them."""
    exact, nearest = recompute(kept, meta)
    coarse = worst_errors(recompute(kept, meta, torch.float32)[0], exact)
    above = {n: e for n, e in coarse.items() if e > 0.75 * tolerance(n)}
    if above or nearest < 1e-5:
        raise UserError(f"{name}: badly conditioned: float32 is off by {above}, nearest pair {nearest:.1e}")
    return {n: t if t.dtype == torch.bool else t.float() for n, t in exact.items() if re.fullmatch(stays, n)}


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        raise UserError(f"usage: python -m tests.cut_golden FROM TO, got {len(argv)} arguments")
    source, folder = Path(argv[0]), Path(argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    full = {n: verified(source / f"{n}.safetensors") for used, _ in FILES.values() for n in used}
    (folder / "misc.safetensors").write_bytes((source / "misc.safetensors").read_bytes())
    for name, (used, make) in FILES.items():
        tensors: Tensors = {}
        for other in used:  # the last one's weights win
            tensors |= full[other][0]
        kept, meta, stays = make(tensors, full[used[0]][1])
        kept |= {n: t for n, t in outputs_of(kept, meta, stays, name).items() if n != "latent"}
        whole = {n: t.contiguous() for n, t in kept.items()}
        save_file(whole, folder / f"{name}.safetensors", {"cut": "tests.cut_golden"} | meta)
    for path in sorted(folder.glob("*.safetensors")):
        print(f"{path.name:32s} {path.stat().st_size:8d} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
