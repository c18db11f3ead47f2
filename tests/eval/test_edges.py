"""A seam that is put between chunks is found there."""

import pytest

from eval import edges
from flashvsr.base.cli import UserError


def test_a_seam_shows_at_its_place():
    seam = [1.0 + 0.5 * (t % 8 == 4) for t in range(36)]
    latents = [1.0 + 0.2 * (t % 4 == 0) for t in range(20)]
    assert edges.profile([seam]) == [1, 1, 1, 1, 1.5, 1, 1, 1]
    both = edges.profile([seam, latents])
    # place 0: 5 values of the first clip, 3 of the second; place 4: 4 of 1.5 and 2 of 1.2
    assert both[0] == pytest.approx((5 * 1 + 3 * 1.2) / 8)
    assert both[4] == pytest.approx((4 * 1.5 + 2 * 1.2) / 6)
    assert edges.profile([[None, 2.0]])[1] == 2


def test_an_evaluation_without_the_metric_is_refused():
    with pytest.raises(UserError, match="--metrics chunk_edge"):
        edges.changes({"metrics": [{"key": "psnr"}], "methods": [], "scores": []})


def test_the_change_into_a_frame_stands_at_the_frame_before():
    score = {"method": "ours", "per_frame": {"chunk_edge": [None, 0.5, 2.0]}}
    evaluation = {"metrics": [{"key": "chunk_edge"}], "methods": [{"name": "ours"}], "scores": [score]}
    assert edges.changes(evaluation) == {"ours": [[0.5, 2.0]]}
