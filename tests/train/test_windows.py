"""The window law of stages 2 and 3."""

import pytest

from train.stages.windows import draw_window, ramped


@pytest.mark.parametrize(
    ("choice", "history", "expected"),
    [
        (0.0, 0.0, 3),  # w = 8, h = 2 -> 3
        (0.0, 1.0, 7),  # w = 8, h = floor(2 + 4) = 6 -> 7
        (0.35, 1.0, 6),  # w = 7, h = 5 -> 6
        (0.45, 1.0, 8),  # w = 9, h = 7 -> 8
        (0.9, 1.0, 10),  # w = 11, h = 9 -> 10
        (0.9, 0.5, 4),  # h = floor(2 + 7/4) = 3 -> 4, the window of inference
    ],
)
def test_at_paper_size(choice, history, expected):
    assert draw_window(11, choice, history, random_window=True, random_history=True) == expected


def test_switches_and_bounds():
    assert draw_window(11, 0.0, 0.3, random_window=False, random_history=False) == 11
    assert draw_window(11, 0.0, 0.3, random_window=True, random_history=False) == 8
    for chunks in (3, 5, 8, 11):
        for i in range(20):
            for j in range(20):
                window = draw_window(chunks, i / 20, j / 20, random_window=True, random_history=True)
                assert 3 <= window <= chunks


def test_full_window_has_its_half():
    full = sum(
        draw_window(11, i / 1000, 0, random_window=True, random_history=False) == 11 for i in range(1000)
    )
    assert full == 500


def test_sparsity_grows_linearly_and_then_stays():
    assert [ramped(step, 2.0, 6.0, 4) for step in range(6)] == [6.0, 5.0, 4.0, 3.0, 2.0, 2.0]
    assert ramped(-1, 2.0, 6.0, 4) == 2.0  # validation
    assert ramped(0, 2.0, None, 0) == 2.0 and ramped(5, None, None, 0) is None
