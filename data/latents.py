"""Samples made once: their pixels, all degraded variants of them, and the latents that belong to them.

A cache is a folder of safetensors files, each of some slots, and a manifest that says what they were made
from. Reading gives exactly what the uncached clips give, plus the latents.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from data.loader import in_order
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.files import atomic, read_json, write_json

MANIFEST = "manifest.json"
FILE_BYTES = (
    64 << 20
)  # slots share a file up to this; what is being written when a run is killed is made again
Encode = Callable[[torch.Tensor], torch.Tensor]


def cache_key(clips: Any, tag: str) -> str:
    """Twelve hex digits of all that cached samples depend on: fit for a folder's name."""
    text = json.dumps([tag, clips.identity()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class CachedClips:
    """Like `Clips`, with `segment["latent"]` float32 `16 n h/8 w/8` in every segment if latents were made."""

    def __init__(self, clips: Any, folder: Path, per_file: int) -> None:
        self.clips, self.folder, self.per_file = clips, folder, per_file
        self.config, self.seed = clips.config, clips.seed

    def identity(self) -> dict:
        return self.clips.identity()

    def place(self, counter: int) -> tuple[int, int]:
        return self.clips.place(counter)

    def sample(self, counter: int) -> dict[str, Any]:
        """See `Clips.sample`; raises UserError naming a file that is missing or damaged."""
        slot, variant = self.place(counter)
        with self._file(slot) as file:
            names = _names(file, slot)
            if f"{slot}/0/hr" not in names:  # latents alone
                sample = self.clips.sample(counter)
                for i, segment in enumerate(sample["segments"]):
                    segment["latent"] = file.get_tensor(f"{slot}/{i}/latent")
                return sample
            segments = self._segments(file, names, f"lr.{variant}")
        for segment in segments:
            segment["lr"] = segment.pop(f"lr.{variant}")
        name = f"{self.config.split}-{slot}"
        return {"id": name, "counter": counter, "segments": segments, "damaged": []}

    def pack(self, slot: int) -> dict[str, Any]:
        """See `Clips.pack`; of a cache with pixels."""
        with self._file(slot) as file:
            names = _names(file, slot)
            return {"segments": self._segments(file, names, "lr."), "damaged": []}

    def _segments(self, file: Any, names: list[str], lr: str) -> list[dict[str, torch.Tensor]]:
        segments: list[dict] = [{} for _ in range(1 + self.config.images)]
        for name in names:
            _, number, kind = name.split("/")
            if kind.startswith(lr) or not kind.startswith("lr."):
                segments[int(number)][kind] = file.get_tensor(name)
        return segments

    def _file(self, slot: int) -> Any:
        from safetensors import SafetensorError, safe_open

        path = _path(self.folder, slot // self.per_file)
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read '{path}' ({error}): delete it, the next run makes it again"
            ) from error


def _names(file: Any, slot: int) -> list[str]:
    return [name for name in list(file.keys()) if name.startswith(f"{slot}/")]


class _Packs:
    """Slots instead of samples, for `in_order`."""

    def __init__(self, clips: Any) -> None:
        self.sample = clips.pack


def _path(folder: Path, number: int) -> Path:
    return folder / f"slots-{number:06d}.safetensors"


def cached(
    clips: Any,
    folder: str | Path,
    encode: Encode | None,
    tag: str,
    quiet: bool = False,
    pixels: bool = True,
    share: tuple[int, int] = (0, 1),
) -> CachedClips:
    """Makes what `folder` does not hold yet of every slot of `clips`, returns the clips read from there.

    `clips` are `Clips` or, to add latents to cached pixels, `CachedClips`. `encode` takes hr uint8 `3 F H W`
    (F = 4n-3 of the video's 4n+1 frames; 1 of an image) and returns latents `16 n H/8 W/8`; `tag` names it (a
    hash of its weights). With None the pixels alone are stored: HR once, LR in every variant.
    `pixels=False` stores latents alone. `share` = (rank, world): this process makes only its part of the
    files, and all of them must be done before the first sample is read. Stopping at any moment is safe:
    files are written whole or not at all and the next call goes on. Raises UserError when `clips` has no
    slots or `folder` holds what was made from something else.
    """
    from safetensors.torch import save_file

    folder, slots = Path(folder), clips.config.slots
    if slots is None:
        raise UserError("samples can be cached only when they are finitely many: set data.slots")
    wanted = {"format": "flashvsr-latents", "version": 2, "tag": tag, "pixels": pixels, **clips.identity()}
    found = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else None
    if found is not None:
        _compare(found, wanted, folder)
    per_file = found["slots_per_file"] if found else _slots_per_file(clips, encode is not None, pixels)
    numbers = range(-(-slots // per_file))
    missing = [n for n in list(numbers)[share[0] :: share[1]] if not _path(folder, n).exists()]
    made = CachedClips(clips, folder, per_file)
    if missing:
        decoder = _decoder()
        if found is None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / MANIFEST, {**wanted, "slots_per_file": per_file, "decoder": decoder})
        else:
            _compare({"decoder": found["decoder"]}, {"decoder": decoder}, folder)
    groups = [range(n * per_file, min((n + 1) * per_file, slots)) for n in missing]
    packs = in_order(_Packs(clips), [[slot] for group in groups for slot in group], clips.config.workers)
    label = "pixels" if encode is None else "latents"
    with Progress(sum(map(len, groups)), label, unit="slot", quiet=quiet or not missing) as progress:
        for number, group in zip(missing, groups, strict=True):
            tensors = {}
            for slot in group:
                (pack,) = next(packs)
                tensors |= dict(_tensors(slot, pack["segments"], encode, pixels))
                progress.update()
            with atomic(_path(folder, number)) as part:
                save_file(tensors, part)
    return made


def _tensors(
    slot: int, segments: list[dict], encode: Encode | None, pixels: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    for i, segment in enumerate(segments):
        hr = segment["hr"]
        if encode is not None:
            used = hr[:, : max(1, hr.shape[1] - 4)]  # the last four HR frames are look-ahead only
            yield f"{slot}/{i}/latent", encode(used).detach().to("cpu", torch.float32).contiguous()
        if pixels:
            yield from ((f"{slot}/{i}/{kind}", tensor) for kind, tensor in segment.items())


def _slots_per_file(clips: Any, latents: bool, pixels: bool) -> int:
    c, size = clips.config, 0
    sides = [(c.frames, c.latents_per_clip, *c.video_size)] + [(1, 1, *c.image_size)] * c.images
    for frames, n, height, width in sides:
        if pixels:
            size += 3 * frames * height * width * (1 + c.variants / c.scale**2)
        if latents:
            size += 4 * 16 * n * (height // 8) * (width // 8)
    return max(1, int(FILE_BYTES // size))


def _decoder() -> dict[str, str]:
    """What decides the pixels of a compressed clip, besides its bytes."""
    import av

    names = ("libavcodec", "libswscale")
    return {"av": av.__version__, **{n: ".".join(map(str, av.library_versions[n])) for n in names}}


def _compare(found: dict, wanted: dict, folder: Path) -> None:
    wanted = json.loads(json.dumps(wanted))  # what was written has lists where the config has tuples
    flat = [{**made, **made.get("config", {})} for made in (found, wanted)]
    for key in sorted(flat[1].keys() - {"config"}):
        old, new = (made.get(key) for made in flat)
        if old != new:
            shown = "another corpus" if key == "corpus" else f"{key}={old!r}, not {new!r}"
            raise UserError(
                f"the latents in '{folder}' were made with {shown}: delete that folder to make them again"
            )
