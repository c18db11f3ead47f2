"""Validation: ranks share clips without changing a number, and what was judged lies there to be judged."""

from types import SimpleNamespace

import pytest
import torch

from train.validate import gathered, shares


@pytest.mark.parametrize(("count", "size"), [(1, 1), (4, 2), (5, 2), (1, 3), (3, 8)])
def test_every_rank_makes_as_many_calls_and_every_clip_has_one_owner(count, size):
    all_shares = [list(shares(count, SimpleNamespace(rank=rank, size=size))) for rank in range(size)]
    assert len({len(share) for share in all_shares}) == 1
    assert sorted(i for share in all_shares for i, own in share if own) == list(range(count))
    assert {i for share in all_shares for i, _ in share} <= set(range(count))


def test_means_over_ranks_are_those_of_one_process_to_the_last_bit():
    values = torch.rand(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    rows = {i: {"a": value, "b": None} for i, value in enumerate(values)}
    one = SimpleNamespace(rank=0, size=1, all_reduce_sum=lambda table: table)
    alone = gathered(rows, ["a", "b"], 5, one)
    tables = []
    for rank in range(2):
        world = SimpleNamespace(rank=rank, size=2, all_reduce_sum=lambda t: tables.append(t.clone()) or t)
        gathered({i: rows[i] for i, own in shares(5, world) if own}, ["a", "b"], 5, world)
    two = SimpleNamespace(rank=0, size=2, all_reduce_sum=lambda table: tables[0] + tables[1])
    assert gathered({}, ["a", "b"], 5, two) == alone
    assert alone.keys() == {"a"} and alone["a"] == pytest.approx(sum(values) / 5)
