"""Trackers: real W&B offline and real TensorBoard are read back; a missing package is one sentence."""

import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from flashvsr.base.cli import UserError
from train.config import Log
from train.trackers import start_trackers

PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def log(**chosen):
    off = {"wandb": False, "tensorboard": False, "trackio": False}
    return Log(every=1, project="p", peak="auto", profile=0, quiet=True, **(off | chosen))


def start(folder, step=0, wandb_id=None, **chosen):
    (tracker,) = start_trackers(log(**chosen), folder, "run-stage1", {"seed": 3}, step, wandb_id)
    return tracker


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(PICTURE).save(path)
    return path


def test_none_is_started_unasked(tmp_path):
    assert start_trackers(log(), tmp_path, "n", {}, 0, None) == []


@pytest.mark.parametrize("package", ["wandb", "tensorboard", "trackio"])
def test_asking_for_a_missing_package_is_one_sentence(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"log.{package}=true, but .* pip install {package}"):
        start(tmp_path, **{package: True})


def entries(data):
    """Of a W&B file: a header of 7 bytes, then LevelDB's log format (blocks of 32 KiB; checksum, length,
    and whether an entry is whole (1) or in parts (2 first, 3, 4 last))."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield parts
            parts = b""


def records(folder):
    """Every history row of every offline run under `folder`, in order, with its run's id."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # waits until its service has written all
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
        for entry in entries(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(entry)
            if record.HasField("history"):
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
                rows.append((path.stem.removeprefix("run-"), row))
    return rows


def test_wandb_without_a_key_is_offline_and_goes_on_under_its_id(tmp_path, monkeypatch, picture):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    first = start(tmp_path, wandb=True)
    first.log(1, {"stage1/loss/flow": 2.5})
    first.media(1, "stage1/picture", picture)
    first.close()
    time.sleep(1.1)  # W&B names an offline folder by the second
    second = start(tmp_path, step=1, wandb_id=first.id, wandb=True)
    second.log(2, {"stage1/loss/flow": 1.5})
    second.close()
    assert second.id == first.id
    rows = records(tmp_path)
    assert [name for name, _ in rows] == [first.id] * 2
    assert [(row["_step"], row["stage1/loss/flow"]) for _, row in rows] == [("1", "2.5"), ("2", "1.5")]
    assert rows[0][1]["stage1/picture/_type"] == '"image-file"'


def test_wandb_with_a_key_but_no_server_goes_on_offline(tmp_path, monkeypatch, capsys):
    class CommError(Exception):
        pass

    given = []

    def init(**arguments):
        given.append(arguments)
        if "mode" not in arguments:
            raise CommError("no such host\nwhile retrying")
        return SimpleNamespace(log=lambda *a, **k: None, finish=lambda: None)

    fake = SimpleNamespace(
        init=init, Error=CommError, Settings=lambda **s: s, login=lambda **k: True,
        teardown=lambda: given.append("teardown"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", fake)
    start(tmp_path, wandb=True, wandb_id="abc")
    online, teardown, offline = given
    assert teardown == "teardown"  # the real one refuses the id otherwise
    assert online["id"] == offline["id"] == "abc" and online["resume"] == "allow"
    assert online["config"] == {"seed": 3} and offline == online | {"mode": "offline"}
    assert capsys.readouterr().err == (
        "W&B cannot be reached (no such host): logging offline, `wandb sync` later\n"
    )


@pytest.mark.slow
def test_the_real_wandb_with_a_key_but_no_server_goes_on_offline(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    import wandb

    wandb.teardown()  # an earlier test's settings are read once
    monkeypatch.setattr("train.trackers.INIT_SECONDS", 3)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    tracker = start(tmp_path, wandb=True)
    tracker.log(1, {"loss": 2.5})
    tracker.close()
    assert "W&B cannot be reached" in capsys.readouterr().err
    assert [row["loss"] for _, row in records(tmp_path)] == ["2.5"]


def test_tensorboard_holds_numbers_and_pictures_and_forgets_what_was_given_up(tmp_path, picture):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = start(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        first.log(step, {"loss/flow": float(step)})
    first.media(2, "picture", picture)
    first.media(2, "video", tmp_path / "no-such.mp4")  # TensorBoard gets no videos
    first.close()
    second = start(tmp_path, step=2, tensorboard=True)
    second.log(3, {"loss/flow": 30.0})
    second.close()
    read = EventAccumulator(second.id)
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss/flow")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    (shown,) = read.Images("picture")
    assert (shown.step, shown.height, shown.width) == (2, 4, 6)
    assert b'"seed": 3' in read.Tensors("config/text_summary")[-1].tensor_proto.string_val[0]


def test_trackio_gets_the_same(tmp_path, monkeypatch, picture):
    calls = []
    fake = SimpleNamespace(
        init=lambda **given: calls.append(given),
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append("finish"),
        Image=lambda path: ("image", path),
        Video=lambda path: ("video", path),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    tracker = start(tmp_path, step=5, trackio=True)
    tracker.log(6, {"loss": 1.0})
    tracker.media(6, "picture", picture)
    tracker.media(6, "clip", tmp_path / "a.mp4")
    tracker.close()
    assert tracker.id == "run-stage1"
    assert calls == [
        {"project": "p", "name": "run-stage1", "config": {"seed": 3}, "resume": "allow"},
        (6, {"loss": 1.0}),
        (6, {"picture": ("image", str(picture))}),
        (6, {"clip": ("video", str(tmp_path / "a.mp4"))}),
        "finish",
    ]
