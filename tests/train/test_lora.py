"""Adapters: nothing changes at the start, merging equals the sum, names stay the plain model's."""

import pytest
import torch
from torch import nn

from flashvsr.base.cli import UserError
from train.lora import LoRALinear, adapter_state, inject, load_adapter, merge

TARGETS = ["blocks.*.attn.[qo]"]


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"attn": nn.ModuleDict({n: nn.Linear(12, 12) for n in "qko"}), "ffn": nn.Linear(12, 12)}
            )
            for _ in range(2)
        )
        self.head = nn.Linear(12, 5, bias=False)
        for param in self.parameters():
            param.data.normal_(generator=gen)

    def forward(self, x):
        for block in self.blocks:
            x = x + torch.tanh(block["ffn"](torch.tanh(sum(block["attn"][n](x) for n in "qko"))))
        return self.head(x)


def stirred(module):
    """B away from zero, as after training."""
    gen = torch.Generator().manual_seed(3)
    for layer in module.modules():
        if isinstance(layer, LoRALinear):
            layer.lora_B.weight.data.normal_(std=0.1, generator=gen)
    return module


X = torch.randn(7, 12, generator=torch.Generator().manual_seed(5))


def test_a_fresh_adapter_is_the_identity_and_keeps_the_names():
    plain, adapted = Toy(), Toy()
    names = inject(adapted, TARGETS, 4)
    assert names == [f"blocks.{i}.attn.{n}" for i in range(2) for n in "qo"]
    assert torch.equal(plain(X), adapted(X))
    own = {n for n in adapted.state_dict() if ".lora_" not in n}
    assert own == plain.state_dict().keys()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert {f"{n}.lora_A.weight" for n in names} <= trained
    assert not any(f"{n}.{part}" in trained for n in names for part in ("weight", "bias"))
    assert "blocks.0.attn.k.weight" in trained


def test_the_layer_follows_its_formula():
    toy = Toy()
    inject(toy, ["head"], 3, alpha=6)
    stirred(toy)
    layer = toy.head
    a, b, w = (t.double() for t in (layer.lora_A.weight, layer.lora_B.weight, layer.weight))
    expected = X.double() @ (w + 2.0 * b @ a).T
    torch.testing.assert_close(layer(X).double(), expected, rtol=0, atol=1e-5)
    bound = 1 / 12**0.5
    assert a.abs().max() <= bound and a.abs().max() > 0.8 * bound


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_merging_equals_the_adapted_model(alpha):
    toy = Toy()
    weight = toy.blocks[0]["attn"]["q"].weight
    inject(toy, TARGETS, 4, alpha)
    stirred(toy)
    layer = toy.blocks[0]["attn"]["q"]
    expected = (
        weight.detach() + (layer.alpha / 4) * layer.lora_B.weight.detach() @ layer.lora_A.weight.detach()
    )
    with torch.no_grad():
        before = toy.double()(X.double())
    toy.float()
    merge(toy)
    merged = toy.blocks[0]["attn"]["q"]
    assert type(merged) is nn.Linear and merged.weight is weight and merged.weight.requires_grad
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-6)
    assert toy.state_dict().keys() == Toy().state_dict().keys()
    with torch.no_grad():
        # One rounding of the merged weights to float32 is all that separates the two.
        assert (toy.double()(X.double()) - before).abs().max() / before.abs().max() < 1e-6


def test_adapter_travels_alone():
    source, target = Toy(), Toy()
    inject(source, TARGETS, 4, seed=1)
    inject(target, TARGETS, 4, seed=2)
    stirred(source)
    assert not torch.equal(source(X), target(X))
    load_adapter(target, {k: v.clone() for k, v in adapter_state(source).items()})
    assert torch.equal(source(X), target(X))
    again = Toy()
    inject(again, TARGETS, 4, seed=1)
    assert torch.equal(
        again.blocks[0]["attn"]["q"].lora_A.weight, source.blocks[0]["attn"]["q"].lora_A.weight
    )


def test_mistakes_are_named():
    toy = Toy()
    with pytest.raises(UserError, match="cross"):
        inject(toy, ["*.q", "*.cross.*"], 4)
    with pytest.raises(UserError, match="rank"):
        inject(toy, ["*.q"], 0)
    inject(toy, ["*.q"], 4)
    with pytest.raises(UserError, match="merge"):
        inject(toy, ["*.o"], 4)
    state = adapter_state(toy)
    with pytest.raises(UserError, match="misses 'blocks.0.attn.q.alpha'"):
        load_adapter(toy, {k: v for k, v in state.items() if k != "blocks.0.attn.q.alpha"})
    with pytest.raises(UserError, match="alpha"):
        load_adapter(toy, {**state, "blocks.0.attn.q.alpha": torch.tensor(9.0)})
    with pytest.raises(UserError, match="unknown 'extra'"):
        load_adapter(toy, {**state, "extra": torch.tensor(9.0)})
