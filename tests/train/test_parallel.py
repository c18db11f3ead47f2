"""One process, DDP, FSDP2 and DeepSpeed: equal losses, gradient norms and weights; each resumes another."""

from functools import cache

import pytest

from tests.train import parallel_table as table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    table.prepare(folder)
    return folder


@cache
def fast(folder):
    """Numbers on one process and on two: one start of processes for all of them."""
    ones = dict.fromkeys((stage, way) for stage, _, _, way in table.FAST)
    resumes = [("teacher", *pair) for pair in table.RESUMES]
    ones = table.alone(folder, [*ones, ("teacher", "one, accumulation 1")])
    return ones, table.together(folder, table.FAST, resumes)


@cache
def slow(folder):
    ones = dict.fromkeys((stage, way) for stage, _, _, way in table.SLOW)
    return table.alone(folder, list(ones)), table.together(folder, table.SLOW)


def cases(ways, marks=()):
    return [pytest.param(s, way, one, id=f"{s}-{way}", marks=marks) for s, way, _, one in ways]


@pytest.mark.parametrize(("stage", "way", "against"), cases(table.FAST))
def test_two_processes_equal_one(folder, stage, way, against):
    """Losses, gradient norms per role and per term: to 1e-5."""
    ones, twos = fast(folder)
    assert table.largest(ones[f"{stage} {against}"], twos[f"{stage} {way}"]) < 1e-5


@pytest.mark.parametrize(("stage", "way", "against"), cases(table.SLOW, pytest.mark.slow))
def test_two_processes_equal_one_in_the_other_stages(folder, stage, way, against):
    ones, twos = slow(folder)
    assert table.largest(ones[f"{stage} {against}"], twos[f"{stage} {way}"]) < 1e-5


@pytest.mark.parametrize("way", ["fsdp2", "fsdp2+lora+selective+offload"])
def test_weights_and_ema_after_two_steps_equal_those_of_one_process(folder, way):
    ones, twos = fast(folder)
    one, two = ones["teacher one+lora" if "lora" in way else "teacher one"], twos[f"teacher {way}"]
    for part in ("weights", "ema"):
        assert one[part].keys() == two[part].keys()
        for name, value in one[part].items():
            assert two[part][name] == pytest.approx(value, rel=1e-4, abs=1e-9), (part, name)


def test_four_small_batches_equal_a_large_one(folder):
    ones, _ = fast(folder)
    assert table.largest(ones["teacher one"], ones["teacher one, accumulation 1"]) < 1e-5


@pytest.mark.parametrize(("first", "second"), table.RESUMES)
def test_one_kind_resumes_another(folder, first, second):
    """Weights and EMA after a step under each equal two steps under the first, up to the rounding of sums."""
    _, numbers = fast(folder)
    whole, resumed = numbers[f"teacher {first}"], numbers[f"teacher {first}->{second}"]
    for key, value in whole["records"][1].items():
        assert resumed["records"][0][key] == pytest.approx(value, rel=1e-5), key
    for part in ("weights", "ema"):
        assert resumed[part].keys() == whole[part].keys()
        for name, value in whole[part].items():
            assert resumed[part][name] == pytest.approx(value, rel=1e-5, abs=1e-12), (part, name)


def test_deepspeed_is_there():
    if not table.HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed: zero1, zero2 and zero3 were not tested")
