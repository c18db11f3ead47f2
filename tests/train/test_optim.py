"""AdamW against its formula, decay groups by name, the schedule against closed values."""

import math

import pytest
import torch
from torch import nn

from train.optim import build_optimizer, lr_at, set_lr, squared_norm


def named(**shapes):
    gen = torch.Generator().manual_seed(0)
    return {
        name.replace("__", "."): nn.Parameter(torch.randn(s, generator=gen)) for name, s in shapes.items()
    }


def test_decay_is_for_matrices_only():
    params = named(
        proj__weight=(4, 3),
        proj__bias=(4,),
        norm__weight=(3,),
        blocks__0__modulation=(1, 6, 3),
        conv=(2, 2, 1, 1, 1),
    )
    optimizer = build_optimizer(params, 1e-3, 0.01, (0.9, 0.99))
    decayed = {
        name
        for name, p in params.items()
        for group in optimizer.param_groups
        if group["weight_decay"] and any(p is q for q in group["params"])
    }
    assert decayed == {"proj.weight", "conv"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    assert optimizer.defaults["fused"]


def test_frozen_parameters_are_left_out():
    params = named(a=(2, 2), b=(2, 2))
    params["a"].requires_grad_(False)
    (group,) = build_optimizer(params, 1e-3, 0.0, (0.9, 0.99)).param_groups
    assert len(group["params"]) == 1 and group["params"][0] is params["b"]


def test_three_steps_follow_the_formula():
    lr, decay, (b1, b2), eps = 1e-2, 0.1, (0.8, 0.95), 1e-8
    params = named(w=(3, 2))
    x = params["w"].detach().double()
    optimizer = build_optimizer(params, 1.0, decay, (b1, b2), eps)
    set_lr(optimizer, lr)
    m = v = torch.zeros_like(x)
    for step in range(1, 4):
        grad = torch.full((3, 2), 0.5 * step)
        params["w"].grad = grad
        optimizer.step()
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        x = x * (1 - lr * decay) - lr * (m / (1 - b1**step)) / ((v / (1 - b2**step)).sqrt() + eps)
    torch.testing.assert_close(params["w"].double(), x, rtol=0, atol=1e-6)


def test_schedule_values():
    rule = {"base": 2.0, "warmup": 4, "total": 12}
    assert [lr_at(s, **rule, schedule="constant") for s in (0, 1, 3, 4, 100)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    cosine = {**rule, "schedule": "cosine", "floor": 0.2}
    assert [lr_at(s, **cosine) for s in (0, 3)] == [0.5, 2.0]
    assert lr_at(4, **cosine) == 2.0
    assert lr_at(6, **cosine) == pytest.approx(0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert lr_at(8, **cosine) == pytest.approx(1.1)
    assert lr_at(12, **cosine) == pytest.approx(0.2)
    assert lr_at(50, **cosine) == pytest.approx(0.2)


def test_no_warmup_starts_at_base():
    assert lr_at(0, base=1e-4, warmup=0, total=10, schedule="cosine") == 1e-4


def test_the_gradient_norm_is_right_and_the_same_for_shards():
    gradients = [torch.randn(900, 1100), torch.randn(7), torch.zeros(0), torch.randn(3, 5, 1024)[:, 1:]]
    exact = sum(g.double().square().sum() for g in gradients)
    assert torch.allclose(squared_norm(gradients), exact, rtol=1e-7, atol=0)
    shards = [part for g in gradients for part in g.reshape(-1).tensor_split(3)]
    assert torch.allclose(squared_norm(shards), exact, rtol=1e-7, atol=0)
