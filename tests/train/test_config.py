"""The command line of training: stages, composition, mistakes; what configs promise in words."""

import re
import shlex
from dataclasses import asdict
from itertools import takewhile

import pytest
import yaml

from flashvsr.base.cli import UserError
from flashvsr.config import PRESETS
from train.config import CONFIGS, STAGES, _known_keys, compose, from_dict, rewrite, to_yaml


@pytest.mark.parametrize(
    ("argument", "stages"),
    [
        ("1", ["teacher"]),
        ("1..3", ["teacher", "sparse_causal", "one_step"]),
        ("2..3", ["sparse_causal", "one_step"]),
        ("vae", ["vae"]),
        ("one_step", ["one_step"]),
    ],
)
def test_stage_argument(argument, stages):
    assert rewrite([f"stage={argument}", "seed=1"]) == (stages, ["seed=1"])


@pytest.mark.parametrize("argument", ["stage=4", "stage=3..1", "stage=vae..3", "stage=1..", "seed=1"])
def test_wrong_stage_argument(argument):
    with pytest.raises(UserError, match="stage"):
        rewrite([argument])


@pytest.mark.parametrize("scale", ["tiny", "small", "wan1.3b"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_every_scale_and_stage_composes_and_survives_yaml(scale, stage):
    config = compose(stage, [f"scale={scale}", "recipe=paper"])
    assert from_dict(yaml.safe_load(to_yaml(config))) == config


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stpes=3", "did you mean 'steps'"),
        ("optim.lrr=1", "did you mean 'optim.lr'"),
        ("data.shard=x", "did you mean 'data.shards'"),
        ("scale=huge", "tiny"),
        ("steps=many", "steps='many'"),
        ("resume=perhaps", "'auto'"),
        ("data.latents_per_clip=9", "must be even"),
        ("micro_batch_size=3", "multiple"),
        ("stage.sparse_ratios=1", "sparse_ratio"),
    ],
)
def test_mistakes_name_the_key(override, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        compose("sparse_causal", ["scale=small", override])
    assert "\n" not in str(error.value)


def test_the_command_line_beats_recipe_and_scale():
    config = compose("teacher", ["recipe=paper", "optim.lr=0.5", "steps=7"])
    assert config.optim.lr == 0.5 and config.steps == 7


def test_zero3_is_refused_where_roles_run_inside_each_other():
    assert compose("sparse_causal", ["parallel=zero3"]).parallel.kind == "zero3"
    with pytest.raises(UserError, match="parallel=zero3 cannot run stage 3.*fsdp2 or zero2"):
        compose("one_step", ["parallel=zero3"])


DENOISING = ("teacher", "sparse_causal", "one_step")
PAPER = [  # what the paper states: the stages it says it of, our key, the value
    (DENOISING, "optim.lr", 1e-5),
    (tuple(STAGES), "optim.weight_decay", 0.01),
    (tuple(STAGES), "optim.schedule", "constant"),
    (DENOISING, "global_batch_size", 32),
    (DENOISING, "data.latents_per_clip", 22),  # 89 LR frames
    (DENOISING, "data.height", 768),
    (DENOISING, "data.width", 1280),
    (DENOISING, "stage.lora_rank", 384),
    (tuple(STAGES), "degrade.preset", "realbasicvsr"),
    (("one_step",), "stage.loss.dmd", 1.0),
    (("one_step",), "stage.loss.mse", 1.0),
    (("one_step",), "stage.loss.lpips", 2.0),
    (("one_step",), "stage.pixel_latents", 2),
    (("decoder",), "data.latents_per_clip", 16),  # 61 frames
    (("decoder",), "stage.window", 16),
    (("decoder",), "data.height", 384),
    (("decoder",), "data.width", 384),
    (("decoder",), "stage.mse", 1.0),
    (("decoder",), "stage.lpips", 2.0),
    (("decoder",), "stage.vae_mse", 1.0),
    (("decoder",), "stage.vae_lpips", 2.0),
    (("decoder",), "stage.latents", "vae"),
]


def value_of(config, dotted):
    node = asdict(config)
    for part in dotted.split("."):
        node = node[part]
    return node


@pytest.mark.parametrize("scale", ["tiny", "wan1.3b"])
def test_the_papers_recipe_sets_what_the_paper_states(scale):
    configs = {stage: compose(stage, [f"scale={scale}", "recipe=paper"]) for stage in STAGES}
    for stages, key, stated in PAPER:
        for stage in stages:
            assert value_of(configs[stage], key) == stated, (stage, key)
    assert configs["teacher"].data.images > 0  # jointly with images
    assert PRESETS["wan1.3b"].dit.block == (2, 8, 8)
    frames = [
        4 * configs[stage].data.latents_per_clip + extra for stage, extra in (("teacher", 1), ("decoder", -3))
    ]
    assert frames == [89, 61]


def test_the_lora_recipe_keeps_the_releases_sparsity():
    config = compose("one_step", ["scale=wan1.3b", "recipe=lora-domain"])
    kept = config.stage.sparse_ratio * config.data.height * config.data.width / (768 * 1280)
    assert kept == 2.0 and config.stage.loss.dmd == 0 and config.stage.lora_rank == 64
    with pytest.raises(UserError, match="unknown key 'stage"):
        compose("teacher", ["scale=wan1.3b", "recipe=lora-domain"])


def header(path):
    return list(takewhile(lambda line: line.startswith("#"), path.read_text().splitlines()))


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_config_says_what_it_is_and_its_commands_compose(path):
    words = " ".join(header(path))
    assert words.startswith("# ") and all(len(line) <= 140 for line in header(path))
    if path.parent.name in ("scale", "stage", "recipe") and path.stem != "scale":
        assert re.search("[Ee]xpected", words) and re.search("[Hh]ardware", words) and "hours" in words
    compose_all(line.split("python -m train ")[1] for line in header(path) if "python -m train " in line)


def compose_all(commands):
    for command in commands:
        words = shlex.split(command.split("    ")[0])
        stages, overrides = rewrite([w for w in words if "=" in w and not w.startswith(("gpu=", "gpus="))])
        for stage in stages:
            compose(stage, overrides)


def test_the_commands_of_the_page_on_fine_tuning_compose():
    page = (CONFIGS.parent / "docs/finetuning.md").read_text()
    commands = re.findall(r"`(stage=[^`]+)`", page) + re.findall("python -m train (stage=.+)", page)
    several = [c for c in commands if c != "stage=1..3"]
    assert len(several) > 12
    compose_all(f"{c} scale=wan1.3b" if "scale=" not in c else c for c in several)


def test_the_table_of_decisions_names_keys_that_exist():
    table = (CONFIGS.parent / "docs/decisions.md").read_text()
    rows = [line.strip("|").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert all(len(row) == 4 for row in rows), [row for row in rows if len(row) != 4]
    known, named = _known_keys(), set()
    for row in rows:
        for key in re.findall(r"`([^`]+)`", row[2]):
            key = key.split("=")[0]
            named.add(key)
            assert key in known or (key.endswith(".*") and key[:-2] in known), key
    # options of the stages that answer an open question, and no others, are left out
    plain = {"name", "validation_steps", "loss"}
    for stage in ("teacher", "sparse_causal", "one_step", "decoder"):
        for key in asdict(compose(stage, ["scale=wan1.3b"]).stage):
            assert key in plain or f"stage.{key}" in named or f"stage.{key}.*" in named, f"{stage}: {key}"
