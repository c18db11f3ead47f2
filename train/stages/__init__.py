"""The five stages: what each prepares, which losses its roles take turns on, and what it leaves behind."""

from __future__ import annotations

from train.config import TrainConfig
from train.launch import World
from train.stages.shared import Stage


def make_stage(config: TrainConfig, world: World) -> Stage:
    """The stage that `config.stage.name` names, with its models loaded and its engines built."""
    return stage_class(config.stage.name)(config, world)


def stage_class(name: str) -> type[Stage]:
    from train.stages.decoder import Decoder
    from train.stages.one_step import OneStep
    from train.stages.sparse_causal import SparseCausalStudent
    from train.stages.teacher import Teacher
    from train.stages.vae import Vae

    return {
        "vae": Vae,
        "teacher": Teacher,
        "sparse_causal": SparseCausalStudent,
        "one_step": OneStep,
        "decoder": Decoder,
    }[name]
