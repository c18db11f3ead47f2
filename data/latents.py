"""Samples with their latents, encoded once.

One safetensors file per slot holds the latents and, unless told otherwise, the pixels they belong to; a
manifest says what they were made from. Reading gives exactly what the uncached clips give, plus the latents.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch

from data.clips import Clips
from data.loader import in_order
from data.sampler import shuffled
from flashvsr.base.cli import Progress, UserError
from flashvsr.base.files import atomic, read_json, write_json

MANIFEST = "manifest.json"
Encode = Callable[[torch.Tensor], torch.Tensor]


def cache_key(clips: Clips, tag: str) -> str:
    """Twelve hex digits of all that cached latents depend on: fit for a folder's name."""
    text = json.dumps([tag, clips.identity()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class CachedClips:
    """Like `Clips`, with `segment["latent"]` float32 `16 n h/8 w/8` in every segment."""

    def __init__(self, clips: Clips, folder: Path) -> None:
        self.clips, self.folder = clips, folder
        self.config, self.seed = clips.config, clips.seed

    def identity(self) -> dict:
        return self.clips.identity()

    def sample(self, counter: int) -> dict:
        """See `Clips.sample`; raises UserError naming a slot's file that is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        slot = shuffled(counter, self.config.slots, self.seed, "slots")
        file = _file(self.folder, slot)
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read '{file}' ({error}): delete it, the next run encodes it again"
            ) from error
        if "hr.0" in tensors:
            segments = [{} for _ in range(1 + self.config.images)]
            for name, tensor in tensors.items():
                kind, _, number = name.partition(".")
                segments[int(number)][kind] = tensor
            return {"id": f"{self.config.split}-{slot}", "counter": counter, "segments": segments}
        sample = self.clips.sample(counter)
        for i, segment in enumerate(sample["segments"]):
            segment["latent"] = tensors[f"latent.{i}"]
        return sample


def _file(folder: Path, slot: int) -> Path:
    return folder / f"slot-{slot:06d}.safetensors"


def cached(
    clips: Clips,
    folder: str | Path,
    encode: Encode | None,
    tag: str,
    quiet: bool = False,
    pixels: bool = True,
) -> CachedClips:
    """Encodes every slot of `clips` that `folder` does not hold yet and returns the clips with latents.

    `encode` takes hr uint8 `3 F H W` (F = 4n-3 of the video's 4n+1 frames; 1 of an image) and returns latents
    `16 n H/8 W/8`; `tag` names it (a hash of its weights). With None the pixels alone are stored, so that
    clips are decoded and degraded once. `pixels=False` stores latents alone: a tenth of the disk, but every
    read decodes and degrades again. Stopping at any moment is safe: slots are written whole or not at all
    and the next call goes on. Raises UserError when `clips` has no slots or `folder` holds latents made from
    something else.
    """
    from safetensors.torch import save_file

    folder, slots = Path(folder), clips.config.slots
    if slots is None:
        raise UserError("latents can be cached only for a finite set of samples: set data.slots")
    manifest = {"format": "flashvsr-latents", "version": 1, "tag": tag, "pixels": pixels, **clips.identity()}
    if (folder / MANIFEST).exists():
        _compare(read_json(folder / MANIFEST), manifest, folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MANIFEST, manifest)
    counters = {shuffled(c, slots, clips.seed, "slots"): c for c in range(slots)}
    missing = [slot for slot in range(slots) if not _file(folder, slot).exists()]
    if not missing:
        return CachedClips(clips, folder)
    label = "pixels" if encode is None else "latents"
    with Progress(len(missing), label, unit="clip", quiet=quiet) as progress:
        samples = in_order(clips, [[counters[slot]] for slot in missing], clips.config.workers)
        for slot, (sample,) in zip(missing, samples, strict=True):
            tensors = {}
            for i, segment in enumerate(sample["segments"]):
                hr = segment["hr"]
                used = hr[:, : max(1, hr.shape[1] - 4)]  # the last four HR frames are look-ahead only
                if encode is not None:
                    tensors[f"latent.{i}"] = encode(used).detach().to("cpu", torch.float32).contiguous()
                if pixels:
                    tensors |= {f"hr.{i}": hr, f"lr.{i}": segment["lr"]}
            with atomic(_file(folder, slot)) as part:
                save_file(tensors, part)
            progress.update()
    return CachedClips(clips, folder)


def _compare(found: dict, wanted: dict, folder: Path) -> None:
    wanted = json.loads(json.dumps(wanted))  # what was written has lists where the config has tuples
    flat = [{**made, **made.get("config", {})} for made in (found, wanted)]
    for key in sorted(flat[1].keys() - {"config"}):
        old, new = (made.get(key) for made in flat)
        if old != new:
            shown = "another corpus" if key == "corpus" else f"{key}={old!r}, not {new!r}"
            raise UserError(
                f"the latents in '{folder}' were made with {shown}: delete that folder to encode again"
            )
