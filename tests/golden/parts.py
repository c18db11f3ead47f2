"""Schedules, masks, colours, projector, TC decoder, VAE and baselines against their golden tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from flashvsr import flow
from flashvsr.attention.selection import causal_chunks, local_window
from flashvsr.models.dit import time_features
from flashvsr.models.rope import grid_rope, rotate
from flashvsr.streaming import color
from tests.golden.file import ACTIVATION, BASELINE, SCHEDULE, WEIGHTS, Golden, Row

MISC = ("flow.", "rope", "color.", "causal_mask", "local_mask", "time_embed")


def check_misc(golden: Golden) -> Iterator[Row]:
    for name in sorted(golden.tensors):
        if m := re.fullmatch(r"flow\.sigmas_(\d+)_shift([\d.]+)", name):
            yield golden.compare(name, flow.sampling_sigmas(int(m[1]), float(m[2])), SCHEDULE)
        elif m := re.fullmatch(r"flow\.weights_(\d+)_shift([\d.]+)", name):
            yield golden.compare(name, flow.training_weights(int(m[1]), float(m[2])), WEIGHTS)
        elif m := re.fullmatch(r"causal_mask(_img)?\.seqlen(\d+)_local(\d+)_win(\d+)", name):
            mask, blocks = causal_chunks(int(m[2]), int(m[3]), image_last=bool(m[1])), int(m[4])
            yield golden.compare(name, mask.repeat_interleave(blocks, 0).repeat_interleave(blocks, 1), 0)
        elif m := re.fullmatch(r"local_mask(_clamped)?\.h(\d+)_w(\d+)_range(\d+)", name):
            boundary = "preserved" if m[1] else "truncated"
            yield golden.compare(name, local_window(int(m[2]), int(m[3]), int(m[4]), boundary), 0)
        elif m := re.fullmatch(r"(rope\w*)\.y_f(\d+)h(\d+)w(\d+)_heads(\d+)", name):
            f, h, w, heads = (int(m[i]) for i in range(2, 6))
            x = golden[f"{m[1]}.x"].unflatten(-1, (heads, -1))
            rope = tuple(y.flatten(0, 2) for y in grid_rope(torch.arange(f), h, w, x.shape[-1], "cpu"))
            yield golden.compare(name, rotate(x, rope).flatten(-2), ACTIVATION)
        elif m := re.fullmatch(r"time_embed\.y_dim(\d+)", name):
            yield golden.compare(name, time_features(golden["time_embed.t"], int(m[1])), ACTIVATION)
        elif name in ("color.adain", "color.wavelet"):
            ours = color.correct(golden["color.hq"], golden["color.lq"], name.split(".")[1])
            yield golden.compare(name, ours, ACTIVATION)


def check_projector(golden: Golden) -> Iterator[Row]:
    """Whole, and one group of frames after the other."""
    projector, video = golden.projector(), golden["video"]
    whole, _ = projector(video)
    pieces, memory = [], None
    for start in range(1, video.shape[2], 4):
        piece = video[:, :, 0 if start == 1 else start : start + 4]
        y, memory = projector(piece, memory)
        pieces.append(y)
    for layer in range(projector.config.layer_num):
        streamed = torch.cat([piece[layer] for piece in pieces], 1)
        for kind, ours in (("full", whole[layer]), ("stream", streamed)):
            if (name := f"{kind}.layer{layer}") in golden:
                yield golden.compare(name, ours.flatten(1, 3), ACTIVATION)


def check_tc_decoder(golden: Golden) -> Iterator[Row]:
    """Chunk after chunk with memory, and the whole clip in one call."""
    decoder, memory, chunks = golden.tc_decoder(), None, []
    while (name := f"chunk{len(chunks)}.latent_NTCHW") in golden:
        c = len(chunks)
        latent, cond = golden[name].transpose(1, 2), golden[f"chunk{c}.cond_BCFHW"]
        frames, memory = decoder(latent, cond, memory)
        if (name := f"chunk{c}.rgb_NTCHW") in golden:
            yield golden.compare(name, ((frames + 1) / 2).transpose(1, 2), ACTIVATION)
        chunks.append((latent, cond))
    frames, _ = decoder(*(torch.cat(parts, 2) for parts in zip(*chunks, strict=True)))
    at = 0
    for c, (_, cond) in enumerate(chunks):
        own = frames[:, :, at : at + cond.shape[2]]
        at += cond.shape[2]
        if (name := f"chunk{c}.rgb_NTCHW") in golden:
            row = golden.compare(name, ((own + 1) / 2).transpose(1, 2), ACTIVATION)
            yield Row(f"{name} (one call)", row.error, row.tolerance, row.note)


def check_vae(golden: Golden) -> Iterator[Row]:
    vae = golden.vae()
    if "video" in golden and "latent" in golden:
        if "vae.encoder.conv1.weight" in golden:
            yield golden.compare("latent", vae.encode(golden["video"])[0], ACTIVATION)
        else:
            golden.notes.append("no weights of the encoder: latent is only read")
    if "decoded" in golden:
        if "vae.decoder.conv1.weight" not in golden:
            golden.notes.append("no weights of the decoder: decoded is not compared")
            return
        latent = golden["latent"] if "latent" in golden else vae.encode(golden["video"])[0]
        yield golden.compare("decoded", vae.decode(latent)[0], ACTIVATION)
        memory, pieces = None, []
        for i in range(latent.shape[2]):
            frames, memory = vae.decode(latent[:, :, i : i + 1], memory)
            pieces.append(frames)
        ours = torch.cat(pieces, 2)
        yield golden.compare("decoded latent by latent", ours, ACTIVATION, golden["decoded"])


def check_baseline(golden: Golden) -> Iterator[Row]:
    """BasicVSR or IconVSR, told by the weights: the whole clip, and one chunk with all else as context."""
    kind = "iconvsr" if any(n.startswith("model.edvr.") for n in golden.tensors) else "basicvsr"
    network, frames = golden.baseline(kind), golden["input_BNCHW"]
    said = golden.meta.get("model", kind).lower()
    if said != kind:
        golden.notes.append(f"the metadata says model={said}, the weights are {kind}'s")
    if "output_BNCHW" not in golden:
        return
    whole, _ = network(frames)
    yield golden.compare("output_BNCHW", whole, BASELINE)
    behind = frames.shape[1] // 3
    ahead = frames.shape[1] - 1 - behind
    middle, _ = network(frames, behind=behind, ahead=ahead)
    theirs = golden["output_BNCHW"][:, behind : behind + 1]
    yield golden.compare(f"output_BNCHW: frame {behind} amid context", middle, BASELINE, theirs)
