"""Files of the golden form: every output computed from the weights, inputs and metadata in them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tests.oracle import dit, parts, recurrent, vae

Tensors = dict[str, Tensor]
Meta = Mapping[str, str]
KINDS = ("dit_stream", "lr_proj", "tc_decoder", "wan_vae", "pipeline", "basicvsr", "iconvsr")


def read(path: str | Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as handle:
        return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def kind_of(tensors: Tensors) -> str | None:
    marks = {
        "lq_uint8_CFHW": "pipeline",
        "chunk0.x": "dit_stream",
        "chunk0.latent_NTCHW": "tc_decoder",
        "lr_proj.conv1.weight": "lr_proj",
        "vae.conv2.weight": "wan_vae",
        "model.edvr.conv_first.weight": "iconvsr",
        "model.fusion.weight": "basicvsr",
    }
    return next((kind for name, kind in marks.items() if name in tensors), None)


def worst_errors(ours: Tensors, theirs: Tensors) -> dict[str, float]:
    """The largest absolute error of every tensor that both hold; of masks the count of differing entries."""
    errors = {}
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        assert a.shape == b.shape, (name, a.shape, b.shape)
        wrong = (a != b).sum() if b.dtype == torch.bool else (a.double() - b.double()).abs().max()
        errors[name] = wrong.item()
    return errors


def tolerance(name: str) -> float:
    """Of the golden tensors' page, by the name of the output."""
    return 0 if ".mask." in name else {"frames_CFHW": 2e-4, "output_BNCHW": 1e-4}.get(name, 2e-5)


def under(tensors: Tensors, prefix: str, dtype: torch.dtype) -> Tensors:
    return {n.removeprefix(prefix): t.to(dtype) for n, t in tensors.items() if n.startswith(prefix)}


def dit_settings(meta: Meta) -> dit.Settings:
    local = meta.get("local_range")
    return dit.Settings(
        heads=int(meta["heads"]),
        eps=float(meta.get("eps", 1e-6)),
        timestep=float(meta.get("timestep", 1000)),
        topk_ratio=float(meta["topk_ratio"]),
        kv_ratio=float(meta["kv_ratio"]),
        local_range=None if local is None else int(local),
    )


def recompute(
    tensors: Tensors, meta: Meta, dtype: torch.dtype = torch.float64, edit: dit.Edit | None = None
) -> tuple[Tensors, float]:
    """All outputs that a file of this kind can hold, and how near its threshold the nearest pair of the
    selection came (relative; infinite without selection). `edit` changes masks of the DiT before use."""
    kind = kind_of(tensors)
    assert kind is not None, sorted(tensors)[:3]
    with torch.no_grad():
        if kind in ("dit_stream", "pipeline"):
            settings, context = dit_settings(meta), tensors["context"].to(dtype)
            stream = dit.StreamingDiT(under(tensors, "dit.", dtype), context, settings, edit)
            return (_dit_stream if kind == "dit_stream" else _pipeline)(tensors, meta, dtype, stream)
        make = {"lr_proj": _projector, "tc_decoder": _tc_decoder, "wan_vae": _vae}.get(kind, _baseline)
        return make(tensors, meta, dtype), math.inf


def _dit_stream(
    tensors: Tensors, meta: Meta, dtype: torch.dtype, stream: dit.StreamingDiT
) -> tuple[Tensors, float]:
    out, nearest = {}, math.inf
    chunks = sorted(int(m[1]) for n in tensors if (m := re.fullmatch(r"chunk(\d+)\.x", n)))
    for c in chunks:
        features = tensors.get(f"chunk{c}.lr_tokens")
        x = tensors[f"chunk{c}.x"].to(dtype)
        out[f"chunk{c}.velocity"] = stream.call(x, [] if features is None else [features.to(dtype)])
        nearest = min(nearest, stream.nearest)
        for layer, mask in enumerate(stream.masks):
            out[f"chunk{c}.mask.block{layer}"] = mask[0] if len(mask) == 1 else mask
    for layer in range(stream.layers):
        for kind, cache in (("k", stream.keys), ("v", stream.values)):
            kept = torch.cat(cache[layer], 1)
            out[f"final_cache_{kind}.block{layer}"] = kept.reshape(-1, dit.BLOCK, kept.shape[-1])
    return out, nearest


def _projector(tensors: Tensors, meta: Meta, dtype: torch.dtype) -> Tensors:
    projector = parts.Projector(under(tensors, "lr_proj.", dtype), meta["variant"])
    layers = projector.clip(tensors["video"].to(dtype))
    return {f"{how}.layer{i}": y for i, y in enumerate(layers) for how in ("full", "stream")}


def _tc_decoder(tensors: Tensors, meta: Meta, dtype: torch.dtype) -> Tensors:
    decoder, out, c = parts.TCDecoder(under(tensors, "tc_decoder.", dtype)), {}, 0
    while f"chunk{c}.latent_NTCHW" in tensors:
        latent = tensors[f"chunk{c}.latent_NTCHW"].to(dtype).transpose(1, 2)
        rgb = decoder.call(latent, tensors[f"chunk{c}.cond_BCFHW"].to(dtype))
        out[f"chunk{c}.rgb_NTCHW"] = rgb.transpose(1, 2)
        c += 1
    return out


def _vae(tensors: Tensors, meta: Meta, dtype: torch.dtype) -> Tensors:
    model, out = vae.VAE(under(tensors, "vae.", dtype)), {}
    if "video" in tensors:
        out["latent"] = model.encode(tensors["video"].to(dtype))
    latent = tensors["latent"].to(dtype) if "latent" in tensors else out["latent"]
    out["decoded"] = model.decode(latent)
    return out


def _baseline(tensors: Tensors, meta: Meta, dtype: torch.dtype) -> Tensors:
    weights, frames = under(tensors, "model.", dtype), tensors["input_BNCHW"].to(dtype)
    if kind_of(tensors) == "basicvsr":
        return {"output_BNCHW": recurrent.basicvsr(weights, frames)}
    return {"output_BNCHW": recurrent.iconvsr(weights, frames, int(meta.get("keyframe_stride", 5)))}


def _pipeline(
    tensors: Tensors, meta: Meta, dtype: torch.dtype, stream: dit.StreamingDiT
) -> tuple[Tensors, float]:
    """Projector, DiT, decoder, colours: all frames, `frames` being the chosen ones `C F H W`."""
    side = int(meta.get("expand", 1))  # of the cut files: every pixel stands for a square
    lr = tensors["lq_uint8_CFHW"].repeat_interleave(side, 2).repeat_interleave(side, 3)
    lr = lr[None].to(dtype) / 127.5 - 1
    noise = tensors["noise"].to(dtype)
    height, width, n = lr.shape[-2] // 16, lr.shape[-1] // 16, (lr.shape[2] - 1) // 4
    variant = meta.get("lr_variant", "causal")
    layers = parts.Projector(under(tensors, "lr_proj.", dtype), variant).clip(lr)
    layers = [y.reshape(1, n, height * width, -1) for y in layers]
    latents, nearest, at = [], math.inf, 0
    while at < n:
        stop = min(n, at + (6 if at == 0 else 2))
        piece = noise[:, :, at:stop]
        velocity = stream.call(piece, [y[:, at:stop].flatten(1, 2) for y in layers])
        latents.append(piece - velocity)
        nearest = min(nearest, stream.nearest)
        at = stop
    latent, reference = torch.cat(latents, 2), lr[:, :, :-4]
    if meta.get("decoder", "tc") == "vae":
        sr = vae.VAE(under(tensors, "vae.", dtype)).decode(latent).clamp(-1, 1)
    else:
        sr = 2 * parts.TCDecoder(under(tensors, "tc_decoder.", dtype)).call(latent, reference) - 1
    frames = parts.correct(sr, reference, meta.get("color_fix", "adain"))[0]
    flat = frames.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    std = torch.sqrt(((flat - mean[:, None]) ** 2).sum(1) / (flat.shape[1] - 1))
    index = tensors.get("frames_index", torch.arange(frames.shape[1]))
    return {"frames_CFHW": frames[:, index.long()], "frame_mean": mean, "frame_std": std}, nearest
