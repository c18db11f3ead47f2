"""The average against its recursion in float64, and its state."""

import pytest
import torch

from flashvsr.base.cli import UserError
from train.ema import UPDATES, Ema


def test_follows_the_recursion():
    values = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    live = {"w": values[0].float()}
    ema = Ema(live, 0.7)
    expected = live["w"].double()
    for step, value in enumerate(values[1:].float()):
        live["w"].copy_(value)
        ema.update(live)
        d = min(0.7, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * value.double()
    torch.testing.assert_close(ema.shadow["w"].double(), expected, rtol=0, atol=1e-6)
    assert ema.decay_at(0) == 0.1 and ema.decay_at(1000) == 0.7


def test_bfloat16_weights_have_float32_shadows():
    ema = Ema({"w": torch.ones(2, dtype=torch.bfloat16)}, 0.999)
    ema.update({"w": torch.full((2,), 2.0, dtype=torch.bfloat16)})
    assert ema.shadow["w"].dtype == torch.float32
    torch.testing.assert_close(ema.shadow["w"], torch.full((2,), 1.9))


def test_state_round_trip_continues_bit_for_bit():
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(2))
    whole, first = Ema({"w": rows[0]}, 0.9), Ema({"w": rows[0]}, 0.9)
    for row in rows[1:4]:
        first.update({"w": row})
    second = Ema({"w": torch.zeros(4)}, 0.9)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for row in rows[4:]:
        second.update({"w": row})
    for row in rows[1:]:
        whole.update({"w": row})
    assert torch.equal(whole.shadow["w"], second.shadow["w"]) and second.updates == 7


def test_wrong_states_are_refused():
    ema = Ema({"w": torch.zeros(4)}, 0.9)
    good = ema.state_dict()
    for bad in ({UPDATES: good[UPDATES]}, {**good, "more": torch.zeros(1)}, {**good, "w": torch.zeros(3)}):
        with pytest.raises(UserError, match=r"'(w|more)'"):
            ema.load_state_dict(bad)
    with pytest.raises(UserError, match="1.5"):
        Ema({}, 1.5)
