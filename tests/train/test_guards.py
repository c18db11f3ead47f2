"""Guard rails: what is a spike, when a warning comes and when it is kept back, how a run ends."""

import random
from types import SimpleNamespace

import pytest

from flashvsr.base.cli import UserError
from train import guards
from train.guards import Guards, spike, stop_broken


def record(**changes):
    calm = {"loss/flow": 1.0, "data_seconds": 0.01, "seconds": 1.0, "data_damaged": 0, "samples": 4}
    return calm | changes


def test_a_spike_is_measured_in_robust_standard_deviations():
    before = [1.0, 2.0, 3.0, 4.0, 100.0] * 4  # median 3, deviations 2 1 0 1 97: median 1
    assert spike(before, 33.0) == pytest.approx(30 / 1.4826)
    assert spike(before, 5.9) == 0.0  # below twice the median
    assert spike(before[:19], 1e9) == 0.0  # too few to know


def test_losses_as_they_are_raise_no_alarm_and_a_tenfold_one_does():
    drawn, watch = random.Random(0), Guards(2)
    for step in range(1, 501):  # falling, with the scatter that random noise levels give
        loss = (1 + 5 / step) * drawn.lognormvariate(0, 0.4)
        marks, warnings = watch.look(step, record(**{"loss/flow": loss}))
        assert not marks and not warnings, (step, loss)
    marks, warnings = watch.look(501, record(**{"loss/flow": 12.0}))
    assert marks.keys() == {"spike/flow"} and marks["spike/flow"] > guards.SPIKE
    assert warnings[0].startswith("loss spike at step 501: flow 12, far above the last 100 steps")


def test_every_spike_is_recorded_but_said_once_in_a_while():
    watch, said, marked = Guards(2), [], []
    for step in range(1, 301):
        marks, warnings = watch.look(step, record(**{"loss/flow": 50.0 if step in (120, 130, 230) else 1.0}))
        said += [step] * len(warnings)
        marked += [step] * len(marks)
    assert marked == [120, 130, 230] and said == [120, 230]


def test_a_resumed_run_judges_as_one_that_never_stopped():
    history = [record(**{"loss/flow": 1 + 0.01 * (step % 7)}) for step in range(1, 61)]
    whole, resumed = Guards(2), Guards(2)
    for step, old in enumerate(history, 1):
        whole.look(step, old)
    for step, old in enumerate(history, 1):
        resumed.look(step, old)
    last = record(**{"loss/flow": 9.0})
    assert resumed.look(61, last) == whole.look(61, last) and whole.look(62, last)[0]


def test_starvation_is_told_with_what_to_do_about_it():
    watch, said = Guards(3), []
    for step in range(1, 31):
        _, warnings = watch.look(step, record(data_seconds=0.5))
        said += [(step, warning) for warning in warnings]
    ((step, words),) = said
    assert step == guards.STARVED_STEPS + 1  # the first step does not count
    assert words.startswith("starving: 50% of the last 20 steps") and "data.workers (now 3)" in words
    calm = Guards(3)
    assert not any(calm.look(step, record(data_seconds=0.29))[1] for step in range(1, 100))


def test_many_damaged_clips_are_told_and_a_single_one_is_not():
    watch = Guards(2)
    assert not any(watch.look(step, record(data_damaged=int(step == 5)))[1] for step in range(1, 50))
    (warning,) = watch.look(50, record(data_damaged=2))[1]
    assert warning.startswith("3 of the last 200 clips were damaged")


def test_a_broken_step_names_samples_and_the_last_checkpoint(tmp_path):
    world = SimpleNamespace(size=1, is_main=True)
    micros = [{"ids": ["a", "b"]}, {"ids": ["c"]}]
    with pytest.raises(
        UserError, match=r"loss/flow .* at step 7 \(samples a, b, c\); there is no checkpoint"
    ):
        stop_broken("loss/flow of role teacher", 7, micros, world, tmp_path)


def test_a_broken_step_names_the_samples_of_all_ranks_and_ends_them_all(tmp_path, monkeypatch, capsys):
    def gather(into, own):
        into[:] = [own, ["on rank 1"]]

    monkeypatch.setattr(guards.dist, "all_gather_object", gather)
    monkeypatch.setattr(guards.checkpoint, "latest", lambda folder: folder / "step-000040")
    for is_main in (True, False):
        met = []
        world = SimpleNamespace(size=2, is_main=is_main, barrier=lambda met=met: met.append(True))
        with pytest.raises(SystemExit) as ended:
            stop_broken("the gradient of role fake", 41, [{"ids": ["x"]}], world, tmp_path)
        assert ended.value.code == 2 and met
        said = capsys.readouterr().err
        assert ("samples x, on rank 1); the last good checkpoint is" in said) == is_main
        assert ("step-000040" in said) == is_main
