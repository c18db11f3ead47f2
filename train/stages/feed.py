"""From shards to tensors on the device: clips, their cached pixels and latents, batches, inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from data.latents import cache_key, cached
from data.loader import DataConfig, batches, open_dataset
from flashvsr.base.resize import bicubic_8bit, to_signed
from flashvsr.models.wan_vae import WanVAE
from train.config import TrainConfig
from train.launch import World

LOOK_AHEAD = 4  # HR frames the loader gives beyond those of the latents
LR_FRAMES_OF_IMAGE = 5  # an image is one latent: its LR stands still for five frames


@dataclass(frozen=True)
class Inputs:
    """One micro-batch on the device, per segment: HR frames, LR at output size (both `B 3 F H W` in [-1,1]),
    latents `B 16 n h w`; and what a stage computes beforehand."""

    hr: list[Tensor]
    lr: list[Tensor]
    latents: list[Tensor]
    extra: Mapping[str, Any]

    @property
    def batch(self) -> int:
        return self.lr[0].shape[0]


def encode_clip(vae: WanVAE, video: Tensor) -> Tensor:
    """`B 3 4n-3 H W` in [-1,1] -> normalised latents `B 16 n h w`, two at a time: at once, a clip of the
    paper's size would take 168 GiB."""
    pieces, memory = [], None
    for start, stop in pairwise([0, *range(5, video.shape[2], 8), video.shape[2]]):
        latent, memory = vae.encode(video[:, :, start:stop], memory)
        pieces.append(latent)
    return torch.cat(pieces, 2)


class Feed:
    """A stage's data. Without a `vae` there are no latents."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        vae: WanVAE | None,
        autocast: Callable[[], AbstractContextManager],
    ):
        self.config, self.world, self.vae, self.autocast = config, world, vae, autocast

    @property
    def caches(self) -> bool:
        """Whether the run has a fixed number of draws, made once."""
        return self.config.data.latents == "auto" and self.config.data.slots is not None

    def data_config(self, split: str) -> DataConfig:
        """Clips of this stage; where they are cached the same for all stages: one cache serves them."""
        d = self.config.data
        packed = self.config.stage.name == "teacher" or self.caches
        return DataConfig(
            shards=d.shards,
            split=split,
            latents_per_clip=d.latents_per_clip,
            height=d.height,
            width=d.width,
            images=d.images if packed else 0,
            short_side=d.short_side,
            slots=d.slots if split == "train" else d.val_slots,
            variants=d.variants if split == "train" else 1,
            strides=d.strides,
            degradation=self.config.degrade.preset,
            workers=d.workers,
            flip=d.flip and split == "train",
            cache_dir=d.cache_dir,
            cache_gb=d.cache_gb,
        )

    def clips(self, split: str) -> Any:
        """The split's clips with `sample(counter)`: decoded, degraded and encoded once where they repeat."""
        clips = open_dataset(self.data_config(split), self.config.seed)
        if not self.caches and split == "train":
            return clips
        name = cache_key(clips, "")[:8]
        clips = self._cached(clips, f"clips-{split}-{name}", None, "pixels")
        if self.vae is None:
            return clips
        vae = self._vae_hash()
        return self._cached(clips, f"latents-{split}-{name}-{vae}", self.encode, vae)

    def _cached(self, clips: Any, folder: str, encode: Callable | None, tag: str) -> Any:
        """Every rank makes its share of what is missing: pixels, or latents to pixels already cached."""
        quiet = self.config.log.quiet or not self.world.is_main
        share = self.world.rank, self.world.size
        path, pixels = self.config.run_dir / folder, encode is None
        made = cached(clips, path, encode, tag, quiet=quiet, pixels=pixels, share=share)
        self.world.barrier()
        return made

    def _vae_hash(self) -> str:
        digest = hashlib.sha256(str([self.vae.latents_mean.tolist(), self.vae.latents_std.tolist()]).encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:8]

    @torch.no_grad()
    def encode(self, hr: Tensor) -> Tensor:
        """HR frames uint8 `C F H W` -> normalised latents `16 n h w`, float32 on the CPU."""
        with self.autocast():
            latent = encode_clip(self.vae, to_signed(hr)[None].to(self.world.device))
        return latent[0].float().cpu()

    def batches(self, clips: Any, start: int) -> Iterator[Mapping[str, Any]]:
        """This rank's micro-batches from sample counter `start` on."""
        workers = 0 if self.caches else self.config.data.workers
        size = self.config.micro_batch_size
        return batches(clips, start, size, self.world.rank, self.world.size, workers)

    @torch.no_grad()
    def inputs(self, micro: Mapping[str, Any], segments: int | None = None) -> Inputs:
        """Brings a batch to the device: LR to output size with 8-bit bicubic, latents read or encoded."""
        device = self.world.device
        hr, lr, latents = [], [], []
        for segment in micro["segments"][:segments]:
            frames = segment["hr"]
            is_image = frames.shape[2] == 1
            frames = frames if is_image else frames[:, :, :-LOOK_AHEAD]
            hr.append(to_signed(frames).to(device))
            up = to_signed(bicubic_8bit(segment["lr"], tuple(frames.shape[-2:]))).to(device)
            lr.append(up.expand(-1, -1, LR_FRAMES_OF_IMAGE, -1, -1) if is_image else up)
            if "latent" in segment:
                latents.append(segment["latent"].to(device))
            elif self.vae is not None:
                latents.append(torch.stack([self.encode(clip) for clip in frames]).to(device))
        return Inputs(hr, lr, latents, {})
