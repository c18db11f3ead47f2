"""A module made ready to train, in the only right order: freeze, LoRA, activation memory, compile; then the
engine shards or copies it (`make_engine`).

LoRA first: what is compiled and sharded must be there. Recomputation before sharding: it then runs inside the
hooks that gather a block's weights. Compiled are the parts of a block around attention (`Block.before`,
`Block.after`), as plain functions of the block: one piece of code for all layers, roles and copies.
"""

from __future__ import annotations

from torch import nn

from flashvsr.models.denoiser import Denoiser
from train.config import TrainConfig
from train.lora import inject
from train.parallel.activations import recompute

FROZEN = ("cross_attn.k.", "cross_attn.v.", "cross_attn.norm_k.", "text_embedding.")  # the prompt stays exact

# Variants of one function that stay compiled: with and without gradient, adapter or not, sharded or not, and
# the token counts of training and validation. torch's own 8 are fewer than stage 3 with validation has.
VARIANTS = 32


def ready_to_train(module: nn.Module, config: TrainConfig) -> nn.Module:
    """In place: what must stay fixed is fixed, the adapter is in, blocks keep and compile what is asked."""
    module.train()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(part in name for part in FROZEN))
    if isinstance(module, Denoiser):
        dit, stage = module.dit, config.stage
        if stage.lora_rank:
            dit.requires_grad_(False)
            inject(dit, stage.lora_targets, stage.lora_rank, seed=config.seed)
        recompute(dit, config.checkpointing, offload=config.offload)
        compile_blocks(module, config)
    return module


def compile_blocks(module: Denoiser, config: TrainConfig) -> None:
    """Compiles the blocks of a role, trained or frozen, where `compile` asks for it."""
    if not config.compile:
        return
    import torch._dynamo as dynamo

    dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, VARIANTS)
    dynamo.config.optimize_ddp = False  # it would cut every block at DDP's buckets
    module.dit.compile_blocks()
