"""Compares this code with golden tensor files: `python -m tests.golden FILE...`.

Prints, for every reference tensor, the largest absolute error beside its tolerance; exit code 1 when one is
above it. Settings come from the file's metadata, widths, layers and channels from the weights' shapes, so
files of other sizes and variants work unchanged. What a file lacks is not checked.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from flashvsr import flow
from flashvsr.attention.plans import SparseCausal
from flashvsr.attention.selection import causal_chunks, local_window
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import DiT, time_features
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.rope import cos_sin, grid_angles, rotate
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.streaming import color
from flashvsr.streaming.stream import Stream, StreamSettings
from flashvsr.weights import names
from tests.cut_golden import restore_vae

ACTIVATION, FRAMES, STATISTICS, SCHEDULE, WEIGHTS = 2e-5, 2e-4, 2e-5, 2e-7, 2e-6


@dataclass
class Row:
    name: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


class Golden:
    """One file: tensors, metadata with defaults, and the weights of a module behind a prefix."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with safe_open(path, "pt") as handle:
            self.meta = handle.metadata() or {}
            self.tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def get(self, name: str, default: float) -> float:
        return float(self.meta.get(name, default))


def compare(name: str, ours: Tensor, theirs: Tensor, tolerance: float, note: str = "") -> Row:
    if ours.shape != theirs.shape:
        return Row(name, float("inf"), tolerance, f"shape {tuple(ours.shape)} != {tuple(theirs.shape)}")
    if theirs.dtype == torch.bool:
        return Row(name, float((ours != theirs).sum()), tolerance, note or "differing entries")
    return Row(name, (ours.double() - theirs.double()).abs().max().item(), tolerance, note)


# ---- modules from weights -------------------------------------------------------------------------------


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def build_dit(golden: Golden) -> DiT:
    w = golden.under("dit.")
    dit = DiT(names.dit_config(shapes_of(w), int(golden.meta["heads"]), golden.get("eps", 1e-6)))
    dit.load_state_dict(w)
    dit.set_prompt(golden["context"])
    return dit.requires_grad_(False)


def build_projector(golden: Golden) -> LRProjector:
    w = golden.under("lr_proj.")
    mode = golden.meta.get("variant") or golden.meta.get("lr_variant") or "causal"
    projector = LRProjector(names.projector_config(shapes_of(w), mode))
    projector.load_state_dict(w)
    return projector.requires_grad_(False)


def build_tc_decoder(golden: Golden) -> TCDecoder:
    w = golden.under("tc_decoder.")
    decoder = TCDecoder(names.tc_decoder_config(shapes_of(w)))
    decoder.load_state_dict(w)
    return decoder.requires_grad_(False)


def build_vae(golden: Golden) -> WanVAE:
    w = golden.under("vae.")
    if golden.meta.get("cut") == "first frame":
        w = restore_vae(w, int(golden.meta["dim"]))
    vae = WanVAE(names.vae_config(shapes_of(w)))
    vae.load_state_dict(w)
    return vae.requires_grad_(False)


# ---- checks ---------------------------------------------------------------------------------------------


def check_misc(golden: Golden) -> Iterator[Row]:
    for name, value in golden.tensors.items():
        if m := re.fullmatch(r"flow\.sigmas_(\d+)_shift([\d.]+)", name):
            yield compare(name, flow.sampling_sigmas(int(m[1]), float(m[2])), value, SCHEDULE)
        elif m := re.fullmatch(r"flow\.weights_(\d+)_shift([\d.]+)", name):
            yield compare(name, flow.training_weights(int(m[1]), float(m[2])), value, WEIGHTS)
        elif m := re.fullmatch(r"causal_mask(_img)?\.seqlen(\d+)_local(\d+)_win(\d+)", name):
            mask = causal_chunks(int(m[2]), int(m[3]), image_last=bool(m[1]))
            per_chunk = int(m[4])
            yield compare(
                name, mask.repeat_interleave(per_chunk, 0).repeat_interleave(per_chunk, 1), value, 0
            )
        elif m := re.fullmatch(r"local_mask(_clamped)?\.h(\d+)_w(\d+)_range(\d+)", name):
            boundary = "preserved" if m[1] else "truncated"
            yield compare(name, local_window(int(m[2]), int(m[3]), int(m[4]), boundary), value, 0)
        elif m := re.fullmatch(r"(rope\d*)\.y_f(\d+)h(\d+)w(\d+)_heads(\d+)", name):
            f, h, w, heads = (int(m[i]) for i in range(2, 6))
            x = golden[f"{m[1]}.x"].unflatten(-1, (heads, -1))
            rope = cos_sin(grid_angles(torch.arange(f), h, w, x.shape[-1]).flatten(0, 2), "cpu")
            yield compare(name, rotate(x, rope).flatten(-2), value, ACTIVATION)
        elif m := re.fullmatch(r"time_embed\.y_dim(\d+)", name):
            yield compare(name, time_features(golden["time_embed.t"], int(m[1])), value, ACTIVATION)
        elif name in ("color.adain", "color.wavelet"):
            ours = color.correct(golden["color.hq"], golden["color.lq"], name.split(".")[1])
            yield compare(name, ours, value, ACTIVATION)


def stream_of(golden: Golden, dit: DiT, noise: Tensor) -> Stream:
    """A stream whose top-k ratio is the file's own (already per size)."""
    local_range = int(golden.get("local_range", 0)) or None
    settings = StreamSettings(
        sparse_ratio=golden.get("topk_ratio", 2.0),
        area=1,
        kv_chunks=max(2, int(golden.get("kv_ratio", 3.0))),
        local_range=local_range,
        color_fix=golden.meta.get("color_fix", "adain"),
    )
    return Stream(Denoiser(dit, None), None, settings, lambda i, shape: noise[0, :, i])


def check_dit_stream(golden: Golden) -> Iterator[Row]:
    dit = build_dit(golden)
    stream = stream_of(golden, dit, golden["chunk0.x"])
    chunks = 1 + max(int(m[1]) for k in golden.tensors if (m := re.match(r"chunk(\d+)\.x$", k)))
    sigma = torch.full((1, 1), golden.get("timestep", 1000) / 1000)
    for c in range(chunks):
        x = golden[f"chunk{c}.x"]
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        # the ratio in the file is per size already: the area of the plan cancels
        stream.settings = replace(stream.settings, area=rows * columns * 256)
        plan = stream.plan(x.shape[2], rows * 16, columns * 16)
        features = golden[f"chunk{c}.lr_tokens"].unflatten(1, (x.shape[2], rows, columns))
        (v,) = dit([x], sigma, plan, [[features]])
        seen = [*stream.ring.chunks, *plan.chunks]
        for layer in range(dit.config.layers):
            name = f"chunk{c}.mask.block{layer}"
            if name in golden:
                mask = plan.selections[layer].mask()[0]
                ordered = torch.cat([mask[..., stream.ring.blocks(k)] for k in seen], -1)
                yield compare(name, ordered, golden[name], 0)
        if f"chunk{c}.velocity" in golden:
            yield compare(f"chunk{c}.velocity", v, golden[f"chunk{c}.velocity"], ACTIVATION)
        stream.ring.advance(plan.chunks)
        stream.next_latent += x.shape[2]
    yield from _check_cache(golden, stream)
    if all(f"chunk{c}.velocity" in golden for c in range(chunks)):
        yield from _check_parallel(golden, dit, stream, chunks, sigma)


def _check_cache(golden: Golden, stream: Stream) -> Iterator[Row]:
    ring = stream.ring
    for kind, cache in (("k", ring.keys), ("v", ring.values)):
        for layer in range(ring.layers):
            name = f"final_cache_{kind}.block{layer}"
            if name in golden:
                slots = [cache[layer][:, :, ring.slot(c) * ring.chunk_tokens :][:, :, : ring.chunk_tokens]
                         for c in ring.chunks]  # fmt: skip
                ours = torch.cat(slots, 2).transpose(1, 2).flatten(2)[0]
                yield compare(name, ours.unflatten(0, (golden[name].shape[0], -1)), golden[name], ACTIVATION)


def _check_parallel(golden: Golden, dit: DiT, stream: Stream, chunks: int, sigma: Tensor) -> Iterator[Row]:
    """The whole clip in one masked forward must give the streamed velocities."""
    x = torch.cat([golden[f"chunk{c}.x"] for c in range(chunks)], 2)
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    tokens = torch.cat([golden[f"chunk{c}.lr_tokens"] for c in range(chunks)], 1)
    plan = SparseCausal(
        (x.shape[2], rows, columns),
        block=dit.config.block,
        head_dim=dit.config.head_dim,
        ratio=golden.get("topk_ratio", 2.0),
        window=stream.settings.kv_chunks + 1,
        local=stream.local,
    )
    (v,) = dit([x], sigma, plan, [[tokens.unflatten(1, (x.shape[2], rows, columns))]])
    theirs = torch.cat([golden[f"chunk{c}.velocity"] for c in range(chunks)], 2)
    yield compare("parallel forward vs streamed velocity", v, theirs, ACTIVATION)


def check_projector(golden: Golden) -> Iterator[Row]:
    projector = build_projector(golden)
    video = golden["video"]
    whole, _ = projector(video)
    parts, memory, at = [], None, 0
    while at < video.shape[2]:
        step = 4 if at else 5
        y, memory = projector(video[:, :, at : at + step], memory)
        parts.append(y)
        at += step
    for layer in range(projector.config.layer_num):
        streamed = torch.cat([p[layer] for p in parts], 1)
        for kind, ours in (("full", whole[layer]), ("stream", streamed)):
            name = f"{kind}.layer{layer}"
            if name in golden:
                yield compare(name, ours.flatten(1, 3), golden[name], ACTIVATION)


def check_tc_decoder(golden: Golden) -> Iterator[Row]:
    decoder = build_tc_decoder(golden)
    memory, chunks = None, []
    while (name := f"chunk{len(chunks)}.latent_NTCHW") in golden:
        c = len(chunks)
        latent, cond = golden[name].transpose(1, 2), golden[f"chunk{c}.cond_BCFHW"]
        frames, memory = decoder(latent, cond, memory)
        rgb = ((frames + 1) / 2).transpose(1, 2)
        theirs = golden.tensors.get(f"chunk{c}.rgb_NTCHW")
        if theirs is not None:
            yield compare(f"chunk{c}.rgb", rgb, theirs, ACTIVATION)
        chunks.append((latent, cond, rgb if theirs is None else theirs))
    latent, cond = (torch.cat([chunk[i] for chunk in chunks], 2) for i in (0, 1))
    frames, _ = decoder(latent, cond)
    theirs = torch.cat([chunk[2] for chunk in chunks], 1)
    yield compare("whole clip in one call", ((frames + 1) / 2).transpose(1, 2), theirs, ACTIVATION)


def check_vae(golden: Golden) -> Iterator[Row]:
    vae = build_vae(golden)
    if "video" in golden and "latent" in golden:
        latent, _ = vae.encode(golden["video"])
        yield compare("latent", latent, golden["latent"], ACTIVATION)
    if "decoded" in golden:
        latent = golden["latent"]
        decoded, _ = vae.decode(latent)
        yield compare("decoded", decoded, golden["decoded"], ACTIVATION)
        memory, parts = None, []
        for i in range(latent.shape[2]):
            frames, memory = vae.decode(latent[:, :, i : i + 1], memory)
            parts.append(frames)
        yield compare("decoded latent by latent", torch.cat(parts, 2), golden["decoded"], ACTIVATION)


def check_pipeline(golden: Golden) -> Iterator[Row]:
    dit, noise = build_dit(golden), golden["noise"]
    stream = stream_of(golden, dit, noise)
    lr = golden["lq_uint8_CFHW"][None].float() / 127.5 - 1
    height, width = lr.shape[-2:]
    stream.settings = replace(stream.settings, area=height * width)
    stream.denoiser = Denoiser(dit, build_projector(golden))
    stream.decoder = build_vae(golden) if golden.meta.get("decoder") == "vae" else build_tc_decoder(golden)
    starts = [0, *range(25, lr.shape[2], 8)]
    frames = torch.cat([stream.step(lr[:, :, a : 25 if a == 0 else a + 8]) for a in starts], 2)[0]
    if "frames_CFHW" in golden:
        yield compare("frames", frames[:, golden["frames_index"]], golden["frames_CFHW"], FRAMES)
    if "frame_mean" in golden:
        yield compare("frame_mean", frames.mean((0, 2, 3)), golden["frame_mean"], STATISTICS)
    if "frame_std" in golden:
        yield compare("frame_std", frames.transpose(0, 1).flatten(1).std(1), golden["frame_std"], STATISTICS)


def checker(golden: Golden) -> Callable[[Golden], Iterator[Row]]:
    """The check for a file, told by the tensors in it."""
    present = golden.tensors
    if "lq_uint8_CFHW" in present:
        return check_pipeline
    if "chunk0.x" in present:
        return check_dit_stream
    if "chunk0.latent_NTCHW" in present:
        return check_tc_decoder
    if any(n.startswith("lr_proj.") for n in present):
        return check_projector
    if any(n.startswith("vae.") for n in present):
        return check_vae
    if any(
        n.startswith(("flow.", "rope", "color.", "causal_mask", "local_mask", "time_embed")) for n in present
    ):
        return check_misc
    raise SystemExit(f"{golden.path}: not a golden file this code knows (tensors: {sorted(present)[:4]} ...)")


@torch.no_grad()
def check(path: str | Path) -> list[Row]:
    golden = Golden(path)
    return list(checker(golden)(golden))


def main(paths: list[str]) -> int:
    failed = 0
    for path in paths:
        print(f"{Path(path).name}  {json.dumps(Golden(path).meta)}")
        for row in check(path):
            failed += not row.passed
            verdict = "ok" if row.passed else "FAILED"
            print(f"  {row.name:42s} {row.error:9.2e} <= {row.tolerance:7.0e}  {verdict} {row.note}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
