"""The command line of training: stages, composition, mistakes."""

import pytest
import yaml

from flashvsr.base.cli import UserError
from train.config import STAGES, compose, from_dict, rewrite, to_yaml


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
    assert config.global_batch_size == 32 and config.optim.lr == 1e-5
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
