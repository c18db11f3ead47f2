"""Reading ahead and writing behind change nothing but the time: order, errors, memory, figures."""

import threading
import time

import numpy as np
import pytest

from flashvsr.base.threads import ahead, behind
from flashvsr.streaming.pipeline import run, stacks


class Doubling:
    """Twice as large, one frame late: holds back as a streaming model does."""

    def __init__(self, fail_at: int | None = None):
        self.held = np.empty((0, 1, 1, 3), np.uint8)
        self.seen, self.fail_at = 0, fail_at

    def push(self, frames):
        self.seen += len(frames)
        if self.fail_at is not None and self.seen >= self.fail_at:
            raise ValueError("the method broke")
        frames = np.concatenate([self.held.reshape(-1, *frames.shape[1:]), frames])
        self.held = frames[-1:]
        return frames[:-1].repeat(2, 1).repeat(2, 2)

    def flush(self):
        return self.held.repeat(2, 1).repeat(2, 2)


def clip(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 3, 5, 3), dtype=np.uint8)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_every_frame_comes_out_once_and_in_order(count, overlap):
    frames, written = clip(count), []
    times = run(Doubling(), iter(frames), written.append, overlap=overlap)
    assert np.array_equal(np.concatenate(written), frames.repeat(2, 1).repeat(2, 2))
    assert times.frames == count == sum(n for _, n in times.pushes)
    assert len(times.pushes) == -(-count // 8) + 1
    assert all(len(out) for out in written)


def test_stacks_are_full_but_the_last():
    assert [len(s) for s in stacks(clip(19))] == [8, 8, 3]
    assert list(stacks([])) == []


def reads(until):
    yield from clip(until)
    raise OSError("the file ends here")


@pytest.mark.parametrize("overlap", [True, False])
def test_an_error_of_the_reader_comes_after_what_was_read(overlap):
    pushed = []

    class Watched(Doubling):
        def push(self, frames):
            pushed.append(frames)
            return super().push(frames)

    with pytest.raises(OSError, match="the file ends here"):
        run(Watched(), reads(until=20), lambda frames: None, overlap=overlap)
    assert np.array_equal(np.concatenate(pushed), clip(20))


@pytest.mark.parametrize("overlap", [True, False])
def test_errors_of_method_and_writer_end_all_three(overlap):
    before = threading.active_count()
    with pytest.raises(ValueError, match="the method broke"):
        run(Doubling(fail_at=16), iter(clip(400)), lambda frames: None, overlap=overlap)

    def full(frames):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run(Doubling(), iter(clip(400)), full, overlap=overlap)
    assert threading.active_count() == before


def test_the_reader_stays_a_bounded_distance_ahead():
    taken = 0

    def source():
        nonlocal taken
        for item in range(100):
            taken += 1
            yield item

    with ahead(source(), depth=2) as items:
        for item in items:
            time.sleep(0.002)
            # two wait in the queue, one is being handed over
            assert taken <= item + 1 + 3
    assert taken == 100


def test_a_slow_writer_holds_the_caller_back():
    done = []

    def sink(item):
        time.sleep(0.01)
        done.append(item)

    with behind(sink, depth=2) as write:
        for item in range(10):
            write(item)
            # one is being written, two wait, one was just given
            assert item - len(done) <= 3
    assert done == list(range(10))
    assert write.busy >= 0.1 and write.waited > 0


def test_a_block_left_by_an_error_drops_what_waits():
    done = []

    def slow(item):
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(KeyError), behind(slow, depth=50) as write:
        for item in range(50):
            write(item)
        raise KeyError
    assert len(done) < 50


def test_waiting_overlaps():
    """Three parts that only wait take as long as one of them, not as all."""

    def source():
        for frame in clip(8 * 12):
            time.sleep(0.0025)
            yield frame

    class Waits(Doubling):
        def push(self, frames):
            time.sleep(0.02)
            return super().push(frames)

    def seconds(overlap):
        return run(Waits(), source(), lambda frames: time.sleep(0.02), overlap=overlap).total

    assert seconds(True) < 0.7 * seconds(False)


def test_figures_add_up():
    def slow_write(frames):
        time.sleep(0.01)

    sequential = run(Doubling(), iter(clip(40)), slow_write, overlap=False)
    parts = sequential.read + sequential.model + sequential.write
    assert 0.06 <= sequential.write <= sequential.total
    assert parts <= sequential.total
    assert sequential.first <= sequential.total
