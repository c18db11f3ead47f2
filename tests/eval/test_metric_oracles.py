"""Every metric agrees with an implementation that is not ours: the rows of `metric_table`."""

import pytest

from tests.eval.metric_table import ROWS


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.metric} - {row.oracle}")
def test_agrees_with(row):
    assert row.difference() <= row.tolerance
