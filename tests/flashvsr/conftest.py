"""A model whose every width is a handful: whole pipelines in milliseconds."""

from collections.abc import Callable

import pytest
import torch

from flashvsr.config import DiTConfig, ModelConfig, ProjectorConfig, TCDecoderConfig, VAEConfig
from flashvsr.models.dit import DiT
from flashvsr.models.lr_projector import LRProjector
from flashvsr.models.prompt import random_prompt
from flashvsr.models.tc_decoder import TCDecoder
from flashvsr.models.wan_vae import WanVAE
from flashvsr.weights.folder import FlashVSR, ModelInfo

MICRO = ModelConfig(
    dit=DiTConfig(dim=24, ffn=32, layers=2, heads=2, freq_dim=16, text_dim=8, text_len=4, block=(2, 1, 1)),
    lr_projector=ProjectorConfig(hidden1=8, hidden2=8, out_dim=24),
    vae=VAEConfig(dim=4),
    tc_decoder=TCDecoderConfig(channels=(8, 8, 8, 8)),
)


@pytest.fixture(scope="session")
def micro_config() -> ModelConfig:
    """Blocks of 2x1x1 tokens: 16 output pixels a side, so that small pictures have several."""
    return MICRO


@pytest.fixture(scope="session")
def micro_model() -> Callable[..., FlashVSR]:
    """`micro_model(kind, **info)`: a model with random weights, the same each time."""
    torch.manual_seed(0)
    c = MICRO
    modules = DiT(c.dit), LRProjector(c.lr_projector), TCDecoder(c.tc_decoder), WanVAE(c.vae)
    for module in modules:
        module.requires_grad_(False)
    prompt = random_prompt(c.dit, 0)

    def make(kind: str = "one-step", **info) -> FlashVSR:
        return FlashVSR(*modules, prompt, c, ModelInfo(kind, **{"area": 32 * 64, **info}))

    return make
