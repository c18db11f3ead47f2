"""The streaming DiT and the whole pipeline against their golden tensors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flashvsr.attention.plans import FIRST_CHUNKS, CachedStreaming, SparseCausal
from flashvsr.base.cli import UserError
from flashvsr.models.denoiser import Denoiser
from flashvsr.models.dit import DiT
from flashvsr.streaming.stream import Stream, StreamSettings
from tests.golden.file import ACTIVATION, FRAMES, STATISTICS, Golden, Row
from tests.watched import TIE, Difference, Key, Watched

COLORS = {"adain": "adain", "wavelet": "wavelet", "none": "none", "true": "adain", "false": "none"}
TRIALS = 16  # other ways to break ties that a pipeline whose frames are off may try


class GoldenStream(Stream):
    """A stream with the file's own top-k ratio (already per size) and count of kept chunks, that compares its
    masks with the given ones."""

    def __init__(self, golden: Golden, dit: DiT, noise: Tensor, first_chunks: int):
        local = golden.meta.get("local_range", "none").lower()
        settings = StreamSettings(
            local_range=None if local in ("none", "0", "-1") else int(golden.setting("local_range")),
            color_fix=golden.word("color_fix", COLORS, "adain") if "lq_uint8_CFHW" in golden else "adain",
        )
        super().__init__(Denoiser(dit, None), None, settings, lambda i, shape: noise[0, :, i])
        self.ratio = golden.setting("topk_ratio", 2.0)
        # one oldest chunk goes after a call, no more: the first call's chunks less one stay at least
        self.kept = max(int(golden.setting("kv_ratio", 3.0)), first_chunks - 1)
        self.given: Mapping[Key, Tensor] = {}
        self.plans: list[Watched] = []

    def _begin(self, rows: int, columns: int) -> None:
        super()._begin(rows, columns)
        self.ring.kv_chunks = self.kept
        self.ring.slots = max(self.kept + 1, FIRST_CHUNKS)

    def plan(self, latents: int, height: int, width: int) -> Watched:
        plan: CachedStreaming = super().plan(latents, height, width)
        plan.ratio = self.ratio
        self.plans.append(Watched(plan, self.given))
        return self.plans[-1]


# ---- DiT ------------------------------------------------------------------------------------------------


def check_dit_stream(golden: Golden) -> Iterator[Row]:
    dit = golden.dit()
    chunks = 1 + max(int(m[1]) for n in golden.tensors if (m := re.fullmatch(r"chunk(\d+)\.x", n)))
    xs = [golden[f"chunk{c}.x"] for c in range(chunks)]
    features = [_features(golden, c, xs[c]) for c in range(chunks)]
    stream = GoldenStream(golden, dit, xs[0], xs[0].shape[2] // 2)
    sigma = torch.full((xs[0].shape[0], 1), golden.setting("timestep", 1000) / 1000)
    for c, x in enumerate(xs):
        given, wrong_shape = _given_masks(golden, c, x, stream)
        yield from wrong_shape
        stream.given = given
        watched = stream.plan(x.shape[2], x.shape[-2] * 8, x.shape[-1] * 8)
        (v,) = dit([x], sigma, watched, features[c])
        for layer in sorted({layer for layer, _ in given}):
            difference = sum((watched.differences[layer, k] for k in watched.chunks), Difference())
            yield mask_row(f"chunk{c}.mask.block{layer}", difference)
        if f"chunk{c}.velocity" in golden:
            yield golden.compare(f"chunk{c}.velocity", v, ACTIVATION)
        stream.ring.advance(watched.chunks)
        stream.next_latent += x.shape[2]
    yield from _check_cache(golden, stream)
    yield from _check_parallel(golden, dit, stream, xs, features, sigma)


def mask_row(name: str, difference: Difference) -> Row:
    note = f"{difference.ties} pairs within {TIE:.0e} of the threshold" if difference.ties else ""
    if difference.wrong:
        note = f"pairs differ, up to {difference.worst:.1e} from the threshold; {note}".rstrip("; ")
    return Row(name, float(difference.wrong), 0, note, difference.ties)


def _features(golden: Golden, c: int, x: Tensor) -> list[list[Tensor]]:
    """The LR tokens of a chunk as token grids, none where the file has none."""
    if f"chunk{c}.lr_tokens" not in golden:
        return []
    grid = (x.shape[2], x.shape[-2] // 2, x.shape[-1] // 2)
    return [[golden[f"chunk{c}.lr_tokens"].unflatten(1, grid)]]


def _given_masks(
    golden: Golden, c: int, x: Tensor, stream: GoldenStream
) -> tuple[dict[Key, Tensor], list[Row]]:
    """The file's masks of one call per (layer, chunk), and a failing row for each of an impossible shape."""
    config, new = stream.denoiser.dit.config, x.shape[2] // 2
    s = (x.shape[-2] // 2 // config.block[1]) * (x.shape[-1] // 2 // config.block[2])
    cached = stream.ring.chunks if stream.ring else []
    shape = (x.shape[0], config.heads, new * s, (len(cached) + new) * s)
    given, wrong = {}, []
    for layer in range(config.layers):
        name = f"chunk{c}.mask.block{layer}"
        if name not in golden:
            continue
        mask = golden[name].bool()
        if tuple(mask.shape[-2:]) != shape[-2:] or mask.numel() != torch.Size(shape).numel():
            wrong.append(Row(name, float("inf"), 0, f"shape {shape[1:]} != {tuple(mask.shape)}"))
            continue
        first = stream.next_latent // 2
        given |= {(layer, first + i): m for i, m in enumerate(mask.reshape(shape).split(s, 2))}
    return given, wrong


def _check_cache(golden: Golden, stream: GoldenStream) -> Iterator[Row]:
    ring = stream.ring
    for kind, cache in (("k", ring.keys), ("v", ring.values)):
        for layer in range(ring.layers):
            name = f"final_cache_{kind}.block{layer}"
            if name not in golden:
                continue
            n = ring.chunk_tokens
            slots = [cache[layer][:, :, ring.slot(c) * n : (ring.slot(c) + 1) * n] for c in ring.chunks]
            ours = torch.cat(slots, 2).transpose(1, 2).flatten(2)
            block = ring.chunk_tokens // ring.per_chunk
            yield golden.compare(name, ours.reshape(-1, block, ours.shape[-1]), ACTIVATION)


def _check_parallel(
    golden: Golden,
    dit: DiT,
    stream: GoldenStream,
    xs: list[Tensor],
    features: list[list[list[Tensor]]],
    sigma: Tensor,
) -> Iterator[Row]:
    """The whole clip in one masked forward must give the streamed velocities and masks."""
    if xs[0].shape[2] != 2 * FIRST_CHUNKS or any(x.shape[2] != 2 for x in xs[1:]):
        return  # training's pattern has three chunks that see each other, then one at a time
    x = torch.cat(xs, 2)
    if len({bool(f) for f in features}) > 1:
        return
    layers = [[torch.cat([f[0][0] for f in features], 1)]] if features[0] else []
    plan = SparseCausal(
        (x.shape[2], x.shape[-2] // 2, x.shape[-1] // 2),
        block=dit.config.block,
        head_dim=dit.config.head_dim,
        ratio=stream.ratio,
        window=stream.kept + 1,
        local=stream.local,
    )
    streamed = {key: mask for watched in stream.plans for key, mask in watched.used.items()}
    watched = Watched(plan, streamed)
    (v,) = dit([x], sigma, watched, layers)
    yield mask_row("one forward: masks", watched.total)
    at = 0
    for c, part in enumerate(xs):
        own = v[:, :, at : at + part.shape[2]]
        at += part.shape[2]
        if (name := f"chunk{c}.velocity") in golden:
            yield golden.compare(f"one forward: {name}", own, ACTIVATION, golden[name])


# ---- pipeline -------------------------------------------------------------------------------------------


def check_pipeline(golden: Golden) -> Iterator[Row]:
    """Projector, DiT, decoder and colours on the file's frames and noise, all of it streaming.

    The file holds no masks: where frames are off and the choice of blocks met ties, other ways to break them
    are tried one by one, and kept when the frames come nearer.
    """
    decoder = golden.meta.get("decoder") or ("tc" if _has(golden, "tc_decoder.") else "vae")
    if decoder not in ("tc", "vae"):
        raise UserError(f"{golden.path}: decoder={decoder!r} is unknown; there are tc, vae")
    modules = golden.dit(), golden.projector(), golden.tc_decoder() if decoder == "tc" else golden.vae()
    frames, stream = _frames(golden, modules, {})
    rows = list(_compare_frames(golden, frames))
    near = [(key, c) for w in stream.plans for key, c in w.choices.items() if c.margin <= TIE]
    if all(row.passed for row in rows) or not near:
        yield from rows
        return
    flipped: dict[Key, Tensor] = {}
    for key, choice in near[:TRIALS]:
        for mask in choice.alternatives():
            frames, _ = _frames(golden, modules, flipped | {key: mask})
            other = list(_compare_frames(golden, frames))
            if max(r.error / r.tolerance for r in other) < max(r.error / r.tolerance for r in rows):
                rows, flipped = other, flipped | {key: mask}
    yield Row("ties of the selection", 0, 0, f"{len(flipped)} of {len(near)} broken the other way", len(near))
    yield from rows


def _has(golden: Golden, prefix: str) -> bool:
    return any(name.startswith(prefix) for name in golden.tensors)


def _frames(golden: Golden, modules: tuple, given: Mapping[Key, Tensor]) -> tuple[Tensor, GoldenStream]:
    """All output frames, `C F H W`, and the stream they came from."""
    dit, projector, decoder = modules
    lr = golden["lq_uint8_CFHW"]
    if "expand" in golden.meta:  # of the cut files: every pixel stands for a square
        side = int(golden.setting("expand"))
        lr = lr.repeat_interleave(side, 2).repeat_interleave(side, 3)
    lr = lr[None].float() / 127.5 - 1
    stream = GoldenStream(golden, dit, golden["noise"], min(FIRST_CHUNKS, (lr.shape[2] - 1) // 8))
    stream.given = given
    stream.denoiser, stream.decoder = Denoiser(dit, projector), decoder
    return stream.run(lr)[0], stream


def _compare_frames(golden: Golden, frames: Tensor) -> Iterator[Row]:
    if "frames_CFHW" in golden:
        index = golden["frames_index"].long() if "frames_index" in golden else slice(None)
        yield golden.compare("frames_CFHW", frames[:, index], FRAMES)
    if "frame_mean" in golden:
        yield golden.compare("frame_mean", frames.mean((0, 2, 3)), STATISTICS)
    if "frame_std" in golden:
        yield golden.compare("frame_std", frames.transpose(0, 1).flatten(1).std(1), STATISTICS)
