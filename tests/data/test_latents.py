"""Cached latents: the pixels of the uncached clips bit for bit, each slot encoded once."""

import json
from dataclasses import replace

import av
import pytest
import torch

from data import latents
from data.clips import Clips
from data.latents import cache_key, cached
from data.loader import DataConfig, batches, open_dataset
from flashvsr.base.cli import UserError


@pytest.fixture
def clips(shards):
    config = DataConfig(
        shards=str(shards),
        latents_per_clip=3,
        height=32,
        width=32,
        images=1,
        image_height=64,
        image_width=32,
        slots=3,
    )
    return open_dataset(config, 5)


class Encoder:
    """Stands for a VAE: latents `16 n H/8 W/8` that say which frames went in."""

    def __init__(self):
        self.calls = 0

    def __call__(self, hr):
        self.calls += 1
        assert hr.dtype == torch.uint8
        pooled = hr.float().mean(0)[::4, ::8, ::8]
        return pooled.expand(16, *pooled.shape) / 255


def assert_same(made, plain):
    assert made["id"] == plain["id"] and made["counter"] == plain["counter"]
    for a, b in zip(made["segments"], plain["segments"], strict=True):
        assert torch.equal(a["hr"], b["hr"]) and torch.equal(a["lr"], b["lr"])
        used = b["hr"][:, :9] if b["hr"].shape[1] > 1 else b["hr"]  # 4n-3 of 4n+1 frames
        assert torch.equal(a["latent"], Encoder()(used)) and a["latent"].dtype == torch.float32


@pytest.mark.parametrize("pixels", [True, False])
def test_cached_samples_equal_the_uncached_with_latents(clips, tmp_path, pixels):
    encode = Encoder()
    made = cached(clips, tmp_path / "latents", encode, "vae-1", quiet=True, pixels=pixels)
    assert encode.calls == 6  # three slots of a video and an image
    for counter in range(5):
        assert_same(made.sample(counter), clips.sample(counter))
    assert made.sample(0)["segments"][0]["latent"].shape == (16, 3, 4, 4)
    batch = next(batches(made, 0, 2, 0, 1, 0))
    assert batch["segments"][1]["latent"].shape == (2, 16, 1, 8, 4)
    assert made.identity() == clips.identity() and made.config is clips.config


def test_pixels_alone_can_be_kept_for_a_stage_without_latents(clips, tmp_path):
    made = cached(clips, tmp_path, None, "pixels", quiet=True)
    for a, b in zip(made.sample(1)["segments"], clips.sample(1)["segments"], strict=True):
        assert a.keys() == {"hr", "lr"} and torch.equal(a["hr"], b["hr"]) and torch.equal(a["lr"], b["lr"])


def test_an_interrupted_cache_goes_on(clips, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "FILE_BYTES", 1)  # a file for every slot

    class Interrupted(Encoder):
        def __call__(self, hr):
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().__call__(hr)

    with pytest.raises(KeyboardInterrupt):
        cached(clips, tmp_path, Interrupted(), "vae-1", quiet=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "slots-000000.safetensors"]
    rest = Encoder()
    made = cached(clips, tmp_path, rest, "vae-1", quiet=True)
    assert rest.calls == 4
    assert_same(made.sample(2), clips.sample(2))
    again = Encoder()
    cached(clips, tmp_path, again, "vae-1", quiet=True)
    assert again.calls == 0


def test_latents_of_something_else_are_refused(clips, tmp_path):
    cached(clips, tmp_path, Encoder(), "vae-1", quiet=True)
    with pytest.raises(UserError, match="tag='vae-1', not 'vae-2'.*delete"):
        cached(clips, tmp_path, Encoder(), "vae-2", quiet=True)
    other = open_dataset(replace(clips.config, height=64), 5)
    with pytest.raises(UserError, match="height=32, not 64"):
        cached(other, tmp_path, Encoder(), "vae-1", quiet=True)
    assert len({cache_key(clips, "vae-1"), cache_key(clips, "vae-2"), cache_key(other, "vae-1")}) == 3
    endless = open_dataset(replace(clips.config, slots=None), 5)
    with pytest.raises(UserError, match="set data.slots"):
        cached(endless, tmp_path / "new", Encoder(), "vae-1", quiet=True)
    assert not (tmp_path / "new").exists()


def test_a_damaged_slot_is_named(clips, tmp_path):
    made = cached(clips, tmp_path, Encoder(), "vae-1", quiet=True)
    for file in tmp_path.glob("slots-*"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="slots-00000.*delete it"):
        made.sample(0)


def test_slots_share_files_and_ranks_share_the_work(clips, tmp_path):
    assert latents._slots_per_file(clips, True, True) == latents.FILE_BYTES // (
        3 * (13 * 32 * 32 + 64 * 32) * (1 + 1 / 16) + 64 * (3 * 16 + 32)
    )
    whole = cached(clips, tmp_path / "one", Encoder(), "v", quiet=True)
    assert [p.name for p in (tmp_path / "one").glob("slots-*")] == ["slots-000000.safetensors"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latents, "FILE_BYTES", 100_000)  # two slots of 54,080 bytes do not fit
        encoders = [Encoder(), Encoder()]
        for rank in (0, 1):
            parts = cached(clips, tmp_path / "two", encoders[rank], "v", quiet=True, share=(rank, 2))
    assert [e.calls for e in encoders] == [4, 2]  # files 0 and 2, file 1; a video and an image each
    for counter in range(3):
        assert_same(parts.sample(counter), whole.sample(counter))


def test_variants_are_other_degradations_of_the_same_hr_in_turn_by_epochs(clips, tmp_path):
    clips = Clips(replace(clips.config, variants=2), clips.source, 5)
    plain = Clips(replace(clips.config, variants=1), clips.source, 5)
    encode = Encoder()
    pixels = cached(clips, tmp_path / "pixels", None, "pixels", quiet=True)
    made = cached(pixels, tmp_path / "latents", encode, "v", quiet=True, pixels=False)
    assert encode.calls == 6  # once per slot, not per variant
    by_id = {plain.sample(c)["id"]: plain.sample(c)["segments"] for c in range(3)}
    for counter in range(12):
        sample, direct = made.sample(counter), clips.sample(counter)
        assert_same(sample, direct)
        epoch = counter // 3
        for mine, first in zip(sample["segments"], by_id[sample["id"]], strict=True):
            assert torch.equal(mine["hr"], first["hr"])
            assert torch.equal(mine["lr"], first["lr"]) == (epoch % 2 == 0)
    with pytest.raises(UserError, match="variants=2 needs slots"):
        replace(clips.config, slots=None)


def test_another_decoder_may_read_a_cache_but_not_go_on_with_it(clips, tmp_path, monkeypatch):
    made = cached(clips, tmp_path, Encoder(), "vae-1", quiet=True)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["tag"] == "vae-1" and manifest["config"]["degradation"] == "realbasicvsr"
    assert manifest["decoder"]["av"] == av.__version__ and "libavcodec" in manifest["decoder"]
    monkeypatch.setattr(latents, "_decoder", lambda: {"av": "99"})
    assert_same(cached(clips, tmp_path, Encoder(), "vae-1", quiet=True).sample(1), made.sample(1))
    next(tmp_path.glob("slots-*")).unlink()
    with pytest.raises(UserError, match="decoder=.*99.*delete"):
        cached(clips, tmp_path, Encoder(), "vae-1", quiet=True)
