"""A draw depends on its names and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashvsr.base.draws import Draw, generator, numpy_rng, seed_of


def test_seeds_are_the_same_everywhere_and_differ_by_every_key():
    # The seed must never change: resumed runs and cached latents rely on it.
    assert seed_of(3, "a", 7) == 1025015543932866249
    keys = [(1,), ("1",), (1, 2), (12,), ("1", "2"), (2, 1), ("a", "b"), ("ab",), ("a', 'b",)]
    seeds = [seed_of(*k) for k in keys]
    assert len(set(seeds)) == len(seeds) and all(0 <= s < 2**63 for s in seeds)
    assert seed_of(np.int64(3), "a", 7) == seed_of(3, "a", 7)
    with pytest.raises(TypeError):
        seed_of(1.5)


def test_a_row_depends_only_on_its_own_names():
    whole = Draw(5, 10, ["a", "b", "c", 7])
    part = Draw(5, 10, [7, "b"])
    part.uniform("other", shape=(100,))  # earlier draws must not matter
    for name, shape in (("noise", (2, 3, 17)), ("sigma", ())):
        x, y = whole.normal(name, shape), part.normal(name, shape)
        assert x.shape == (4, *shape) and x.dtype == torch.float32
        assert torch.equal(y[0], x[3]) and torch.equal(y[1], x[1])
        u, w = whole.uniform(name, -2, 3, shape), part.uniform(name, -2, 3, shape)
        assert torch.equal(w[0], u[3]) and torch.equal(w[1], u[1])
    assert torch.equal(whole.normal("noise", (5,)), Draw(5, 10, ["a", "b", "c", 7]).normal("noise", (5,)))


def test_every_name_changes_the_draw():
    base = Draw(5, 10, ["a"]).normal("noise", (50,))
    for other in (Draw(6, 10, ["a"]), Draw(5, 11, ["a"]), Draw(5, 10, ["b"])):
        assert not torch.equal(base, other.normal("noise", (50,)))
    assert not torch.equal(base, Draw(5, 10, ["a"]).normal("noise2", (50,)))
    # Seeds that agree in their low 32 bits are different draws too.
    assert not torch.equal(base, Draw(5 + 2**32, 10, ["a"]).normal("noise", (50,)))


def test_the_law_of_the_draws():
    draw = Draw(0, 0, range(4))
    x = draw.normal("x", (50_000,)).double()
    assert abs(x.mean()) < 0.01 and abs(x.std() - 1) < 0.01 and abs((x**4).mean() - 3) < 0.1
    assert torch.corrcoef(x).fill_diagonal_(0).abs().max() < 0.02
    u = draw.uniform("u", 2, 6, (50_000,)).double()
    assert u.min() >= 2 and u.max() <= 6 and abs(u.mean() - 4) < 0.02 and abs(u.var() - 16 / 12) < 0.02


def test_step_is_shared_whatever_the_samples():
    steps = [Draw(1, s, ["x"]).step("window") for s in range(500)]
    assert steps[3] == Draw(1, 3, ["other", "ids"]).step("window")
    assert min(steps) >= 0 and max(steps) < 1 and abs(np.mean(steps) - 0.5) < 0.05
    assert Draw(1, 3, ["x"]).step("window2") != steps[3]


def test_generators_repeat():
    assert torch.equal(torch.rand(4, generator=generator(1, "a")), torch.rand(4, generator=generator(1, "a")))
    assert numpy_rng(1, "a").random() == numpy_rng(1, "a").random() != numpy_rng(1, "b").random()
    assert Draw(1, 1, []).normal("x", (3,)).shape == (0, 3) == Draw(1, 1, []).uniform("x", shape=(3,)).shape
