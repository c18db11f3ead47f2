"""This code against the numbers of the released code: the cut files always, the full ones where they are;
and against the oracle on files of sizes and variants that nobody has seen."""

import unittest.mock
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flashvsr.attention import selection
from flashvsr.attention.selection import budget
from flashvsr.base.resize import to_uint8
from flashvsr.streaming.upscaler import StreamingUpscaler
from flashvsr.weights.folder import FlashVSR, ModelInfo
from tests.golden import Golden, check
from tests.golden.__main__ import main
from tests.oracle.files import read, recompute, tolerance, worst_errors
from tests.oracle.make import make, write

ROOT = Path(__file__).parents[2]
CUT = ROOT / "tests" / "data" / "golden"
FULL = ROOT.parent / "shared" / "golden"
NAMES = ("misc", "dit_stream", "lr_proj_v1", "lr_proj_v11", "tc_decoder", "wan_vae", "pipeline_v11_tiny")
BASELINES = ("basicvsr", "iconvsr")
CUT_NAMES = (*NAMES, "pipeline_v1_vae")


def full(name: str) -> Path:
    path = FULL / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    return path


def all_pass(path: Path):
    report = check(path)
    assert report.rows
    assert not [f"{r.name}: {r.error:.2e} > {r.tolerance:.0e} {r.note}" for r in report.failed]
    return report


# ---- the released numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CUT_NAMES)
def test_cut_files(name):
    report = all_pass(CUT / f"{name}.safetensors")
    assert not [note for note in report.notes if "unknown" in note]


def test_the_cut_files_are_all_here_and_small():
    sizes = {path.stem: path.stat().st_size for path in CUT.glob("*.safetensors")}
    assert sizes.keys() == set(CUT_NAMES)
    assert all(size < 10**6 for size in sizes.values()) and sum(sizes.values()) < 6e6


@pytest.mark.parametrize("name", (*NAMES, *BASELINES))
def test_full_files(name):
    all_pass(full(name))


# ---- the oracle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in (*NAMES, *BASELINES) if n != "misc"])
def test_the_oracle_reproduces_the_released_numbers(name):
    """In float32, at the released files' tolerances: what it computes elsewhere may be trusted."""
    tensors, meta = read(full(name))
    errors = worst_errors(recompute(tensors, meta, torch.float32)[0], tensors)
    assert errors
    assert not {n: e for n, e in errors.items() if e > tolerance(n)}


def test_the_oracle_and_what_reads_it_share_no_code():
    for path in (ROOT / "tests" / "oracle").glob("*.py"):
        if path.name != "__main__.py":
            code = path.read_text().split('"""', 2)[2]
            assert "flashvsr" not in code and "eval" not in code, path.name


UNSEEN = [
    ("dit_stream", dict()),
    ("dit_stream", dict(rows=8, columns=8, chunks=4, kv_ratio=1.0, topk_ratio=2.0)),  # one block per chunk
    ("dit_stream", dict(columns=40, kv_ratio=1.0, chunks=5, local_range=3, topk_ratio=0.4)),
    ("dit_stream", dict(rows=16, kv_ratio=2.9, chunks=4, local_range=2, heads=3, dim=42, layers=3)),
    ("dit_stream", dict(rows=24, columns=8, kv_ratio=5.0, chunks=12, topk_ratio=1.1, dim=24)),  # longer
    ("dit_stream", dict(topk_ratio=100.0, local_range=1)),  # nothing dropped that is legal
    ("dit_stream", dict(topk_ratio=0.01, local_range=4)),  # almost everything dropped: empty rows
    ("dit_stream", dict(first=2, kv_ratio=1.0, chunks=4)),
    ("dit_stream", dict(first=10, kv_ratio=3.0, chunks=3, topk_ratio=1.2)),  # four chunks stay
    ("dit_stream", dict(dim=256, heads=2, layers=1, chunks=2)),  # heads as wide as Wan's
    ("dit_stream", dict(lr_tokens=False, eps=1e-5, timestep=500.0, batch=2)),
    ("lr_proj", dict(variant="buffer", layer_num=3, frames=17)),
    ("lr_proj", dict(frames=5, batch=2, height=16, width=32)),
    ("tc_decoder", dict(latents=(1, 1, 3, 2), batch=2)),
    ("wan_vae", dict()),
    ("wan_vae", dict(frames=1, batch=2, height=24)),
    ("pipeline", dict(lr_variant="buffer", decoder="vae", color_fix="wavelet", layer_num=2, kv_ratio=2.0,
                      width=128, frames=17)),
    ("pipeline", dict(color_fix="none", frames=17, layer_num=2, local_range=2, topk_ratio=0.9)),
    ("pipeline", dict(frames=57, kv_ratio=1.0, width=128, heads=3, dim=36)),
    ("basicvsr", dict()),
    ("basicvsr", dict(num_feat=5, num_block=3, detail=6, frames=1, height=64, width=33, batch=2)),
    ("basicvsr", dict(frames=6, height=9, width=70, flow=(3, 5, 4, 2))),  # a side below 32: one coarse pixel
    ("iconvsr", dict()),
    ("iconvsr", dict(frames=11, height=4, width=37, groups=2, batch=2)),
    ("iconvsr", dict(frames=9, window=7, edvr_blocks=2, num_block=2, keyframe_stride=3)),
]  # fmt: skip


@pytest.mark.parametrize("kind,settings", UNSEEN, ids=lambda x: x if isinstance(x, str) else f"{len(x)}")
def test_unseen_sizes_and_variants(tmp_path, kind, settings):
    tensors, meta = make(kind, seed=7, **settings)
    write(tmp_path / "unseen.safetensors", tensors, meta)
    all_pass(tmp_path / "unseen.safetensors")


# ---- the runner -----------------------------------------------------------------------------------------


def changed(tmp_path: Path, name: str, change) -> Path:
    """A cut file with its tensors and metadata changed by `change(tensors, meta)`."""
    tensors, meta = read(CUT / f"{name}.safetensors")
    change(tensors, meta)
    path = tmp_path / "changed.safetensors"
    save_file({n: t.contiguous() for n, t in tensors.items()}, path, meta)
    return path


def test_the_runner_sees_a_wrong_number(tmp_path, capsys):
    mask = "local_mask.h4_w4_range3"

    def change(tensors, meta):
        tensors["color.adain"] += 1e-4
        tensors[mask].view(-1)[5] ^= True

    path = changed(tmp_path, "misc", change)
    assert {row.name for row in check(path).failed} == {"color.adain", mask}
    assert main([str(path)]) == 1
    assert "2 FAIL" in capsys.readouterr().out


@pytest.mark.parametrize("tie", [False, True])
def test_a_flipped_pair_fails_far_from_the_threshold_and_is_a_tie_at_it(tmp_path, tie):
    """The file's velocities belong to its masks; a pair flipped there fails nothing after it."""
    tensors, meta = make("dit_stream", seed=1, chunks=2, columns=24)
    if tie:
        _make_all_pairs_alike(tensors)

    def edit(call, layer, mask):
        if (call, layer) == (0, 0):
            mask = mask.clone()
            mask[:, 0, 1, 2] ^= True
        return mask

    outputs, _ = recompute(tensors, meta, edit=edit)
    tensors |= {n: t if t.dtype == torch.bool else t.float() for n, t in outputs.items()}
    write(tmp_path / "flipped.safetensors", tensors, meta)
    report = check(tmp_path / "flipped.safetensors")
    verdicts = {row.name: row.verdict for row in report.rows if row.verdict != "ok"}
    assert verdicts.pop("chunk0.mask.block0") == ("tie" if tie else "FAIL")
    # the parallel forward chooses like the streamed one: it differs in the same pair
    assert verdicts == {"one forward: masks": "tie" if tie else "FAIL"}
    assert main([str(tmp_path / "flipped.safetensors")]) == (0 if tie else 1)


def test_one_pair_too_many_is_no_tie(tmp_path):
    """The pair at the threshold itself, kept by a k that is one too large."""
    path = CUT / "dit_stream.safetensors"
    with unittest.mock.patch.object(selection, "budget", lambda s, n, ratio: budget(s, n, ratio) + 1):
        rows = check(path).failed
    assert {f"chunk{c}.mask.block{layer}" for c in range(3) for layer in range(2)} < {r.name for r in rows}
    assert not any(row.ties for row in rows)


def _make_all_pairs_alike(tensors) -> None:
    """Keys and queries of the first block are zero: every P is 1/n, and all pairs are ties."""
    for part in ("weight", "bias"):
        tensors[f"dit.blocks.0.self_attn.k.{part}"] *= 0


def test_a_pipeline_whose_ties_fell_the_other_way(tmp_path):
    """Without masks in the file, the other ways to break a tie are tried."""
    from tests.golden.stream import _frames

    tensors, meta = make("pipeline", seed=3, layers=1, frames=17, width=256, local_range=3)
    _make_all_pairs_alike(tensors)
    path = tmp_path / "pipeline.safetensors"
    write(path, tensors, meta)
    golden = Golden(path)
    with torch.no_grad():
        _, stream = _frames(golden, (golden.dit(), golden.projector(), golden.tc_decoder()), {})
    other = stream.plans[0].choices[0, 1].alternatives()[2]
    assert not torch.equal(other, stream.plans[0].choices[0, 1].mask)

    def edit(call, layer, mask):
        s = other.shape[2]
        return torch.cat([mask[:, :, :s], other, mask[:, :, 2 * s :]], 2)

    outputs, _ = recompute(tensors, meta, edit=edit)
    write(path, tensors | {n: t.float() for n, t in outputs.items()}, meta)
    report = all_pass(path)
    assert [row.name for row in report.rows if row.ties] == ["ties of the selection"]


def test_what_is_missing_or_unknown_is_said(tmp_path, capsys):
    def change(tensors, meta):
        for name in ("chunk1.velocity", "chunk2.velocity", "final_cache_k.block1", "chunk1.mask.block0"):
            tensors.pop(name, None)
        tensors["dit.img_emb.weight"] = torch.zeros(3)
        tensors["hello"] = torch.zeros(3)

    report = all_pass(changed(tmp_path, "dit_stream", change))
    assert report.notes == ["not used, unknown here: dit.img_emb.weight, hello"]

    def halve(tensors, meta):
        for name in [n for n in tensors if n.startswith(("vae.encoder", "vae.conv1"))]:
            del tensors[name]

    assert "no weights of the encoder" in all_pass(changed(tmp_path, "wan_vae", halve)).notes[0]


def test_defaults_of_missing_metadata(tmp_path):
    """eps 1e-6, timestep 1000, ratio 2, three chunks kept, no window."""
    tensors, meta = make("dit_stream", seed=4, topk_ratio=2.0, chunks=5)
    write(tmp_path / "bare.safetensors", tensors, {"heads": meta["heads"]})
    all_pass(tmp_path / "bare.safetensors")


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _foreign(path):
    save_file({"a": torch.zeros(2)}, path)


def _no_outputs(path):
    tensors, meta = read(path)
    gone = ("latent", "decoded")
    save_file({n: t for n, t in tensors.items() if n not in gone}, path, meta)


@pytest.mark.parametrize(
    "name,spoil,sentence",
    [
        ("tc_decoder", _truncate, "cannot be read as a safetensors file"),
        ("tc_decoder", lambda path: path.write_text("hello"), "cannot be read as a safetensors file"),
        ("tc_decoder", lambda path: path.unlink(), "cannot be read"),
        ("tc_decoder", _foreign, "is not a golden file this code knows (it holds a)"),
        ("wan_vae", _no_outputs, "holds no output to compare with"),
    ],
)
def test_a_file_that_cannot_be_compared(tmp_path, capsys, name, spoil, sentence):
    """One sentence, exit code 2, and the other files are compared all the same."""
    path = changed(tmp_path, name, lambda tensors, meta: None)
    spoil(path)
    assert main([str(path), str(CUT / "lr_proj_v1.safetensors")]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and sentence in printed.err
    assert "4 compared, 4 ok" in printed.out


@pytest.mark.parametrize(
    "name,change,sentence",
    [
        ("dit_stream", lambda t, m: m.pop("heads"), "does not say 'heads'"),
        ("dit_stream", lambda t, m: m.update(heads="5"), "dim=32 does not split into heads=5"),
        ("dit_stream", lambda t, m: m.update(topk_ratio="much"), "topk_ratio='much' is no number"),
        ("dit_stream", lambda t, m: t.pop("dit.head.head.weight"), "missing ['head.head.weight']"),
        ("dit_stream", lambda t, m: t.pop("chunk1.x"), "lacks the tensor 'chunk1.x'"),
        ("lr_proj_v1", lambda t, m: m.update(variant="v2"), "variant='v2' is unknown"),
        ("pipeline_v11_tiny", lambda t, m: m.update(decoder="mp4"), "decoder='mp4' is unknown"),
    ],
)
def test_files_that_do_not_say_enough(tmp_path, capsys, name, change, sentence):
    assert main([str(changed(tmp_path, name, change))]) == 2
    assert sentence in capsys.readouterr().err


def test_a_baseline_with_names_of_no_use(tmp_path, capsys):
    """BasicVSR's names are all known here: another is no note, the file holds another network."""
    tensors, meta = make("basicvsr", frames=2, height=8, width=8)
    tensors["model.cleaning.weight"] = torch.zeros(1)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "b.safetensors", meta)
    assert main([str(tmp_path / "b.safetensors")]) == 2
    assert "does not fit BasicVSR by BasicSR's names: it holds the unknown cleaning.weight" in (
        capsys.readouterr().err
    )


def test_the_upscaler_gives_the_released_frames():
    """From uint8 to uint8: the pipeline file's LR frames through `StreamingUpscaler`, pushed unevenly."""
    given = Golden(full("pipeline_v11_tiny"))
    lr = given["lq_uint8_CFHW"].permute(1, 2, 3, 0)
    model = FlashVSR(
        dit=given.dit(),
        lr_projector=given.projector(),
        tc_decoder=given.tc_decoder(),
        info=ModelInfo("one-step", area=lr.shape[1] * lr.shape[2]),
    )
    upscaler = StreamingUpscaler(
        model,
        scale=1,
        sparse_ratio=given.setting("topk_ratio"),
        kv_chunks=int(given.setting("kv_ratio")),
        local_range=int(given.setting("local_range")),
        noise={
            i: given["noise"][0, :, min(i, 9)] for i in range(12)
        },  # flush asks for more than the file has
    )
    out = np.concatenate([upscaler.push(lr[:7]), upscaler.push(lr[7:38]), upscaler.push(lr[38:])])
    assert len(out) == 37 and len(upscaler.flush()) == 4
    ours = torch.from_numpy(out)[given["frames_index"]].int()
    theirs = to_uint8(given["frames_CFHW"]).permute(1, 2, 3, 0).int()
    assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 1e-3
