"""The app: its jobs are the command's, one at a time; its page works in a browser and calls nobody."""

import importlib.util
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flashvsr.__main__ import main
from flashvsr.app import sample
from flashvsr.app.desk import DEFAULTS, Cancelled, Desk, arguments
from flashvsr.base.cli import UserError
from flashvsr.base.video_io import read_frames
from flashvsr.weights.folder import save_model
from tests.data.footage import scene
from tests.flashvsr import browser
from tests.flashvsr.test_job import make, times

NO_GRADIO = "needs gradio: pip install -c constraints.txt -e '.[app]'"
ROOT = Path(__file__).parents[2]
FORM = dict(DEFAULTS)  # as a form has it in which nothing has been changed


@pytest.fixture(scope="module")
def model(micro_model, tmp_path_factory):
    m = micro_model()
    parts = {p: getattr(m, p) for p in ("dit", "lr_projector", "prompt", "tc_decoder")}
    return save_model(tmp_path_factory.mktemp("app") / "model", config=m.config, info=m.info, **parts)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make(tmp_path_factory.mktemp("clips") / "a clip.mp4", scene(1, 45, 24, 32), sound="aac")


@pytest.fixture
def desk(tmp_path):
    (tmp_path / "results").mkdir()
    return Desk(tmp_path / "results")


def quiet(*_):
    pass


def commanded(model, clip, out, *options):
    """The file that the command makes."""
    main(["upscale", str(clip), str(out), "--model", str(model), "--quiet", *options])
    return out.read_bytes()


# ---- the desk -------------------------------------------------------------------------------------------


def test_what_differs_from_the_command_becomes_its_options():
    assert arguments(FORM) == []
    changed = {"model": "m", "scale": 2.0, "seed": 7, "tile": " auto ", "local-range": "none", "crf": 0}
    assert arguments(FORM | changed | {"offload": True, "memory": "", "kv-chunks": None}) == [
        "--model=m", "--scale=2", "--seed=7", "--local-range=none", "--tile=auto", "--offload", "--crf=0",
    ]  # fmt: skip
    with pytest.raises(UserError, match="unknown setting 'output'"):
        arguments({"output": "x"})


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"decoder": "tc", "color-fix": "wavelet", "seed": 3, "tile": "auto", "crf": 23.0, "end": "0:01"},
        {"sparse-ratio": "none", "local-range": "none", "kv-chunks": 2, "tile": "16", "overlap": 8,
         "start": "5f", "no-audio": True},
    ],
)  # fmt: skip
def test_the_file_is_the_commands_byte_for_byte(desk, model, clip, tmp_path, monkeypatch, changed):
    """With the command that the page shows, run as it stands where the clip is."""
    told = []
    form = FORM | {"model": str(model), "scale": 2} | changed
    result = desk.run("me", str(clip), form, lambda *what: told.append(what))
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    os.link(clip, clip.name)
    assert main(shlex.split(result.command)[3:]) is None
    assert result.out.name == "a clip-upscaled.mp4" and (result.height, result.width) == (48, 64)
    assert Path(result.out.name).read_bytes() == result.out.read_bytes()
    frames = len(list(read_frames(result.out)))
    texts = [text for _, _, text in told]
    assert texts[0] == "opening the model" and "32x24 → 64x48, memory about" in texts[1]
    assert [done for done, total, text in told if "→" in text][-1] == frames
    assert any(re.search(r"of \d+ frames, \S+ a second, \d\d:\d\d left$", text) for text in texts)
    assert result.sentence.startswith(f"{frames} frames in ")


def test_the_input_is_shown_frame_by_frame_beside_its_result(desk, model, tmp_path):
    """What a browser cannot read, at a variable rate, and a cut of it."""
    clip = scene(2, 12, 24, 32)
    source = make(tmp_path / "in.mkv", clip, pts=[0, 1, 5, 6, 7, 9, 20, 21, 22, 23, 30, 31], codec="ffv1")
    result = desk.run("me", str(source), FORM | {"model": str(model), "scale": 2, "start": "2f"}, quiet)
    shown = np.stack(list(read_frames(result.before)))
    assert shown.shape == (10, 24, 32, 3) and np.abs(shown.astype(int) - clip[2:]).mean() < 4

    assert [float(t) for t in times(result.before)] == pytest.approx([float(t) for t in times(result.out)])


def test_a_stopped_job_ends_at_the_next_frames_and_leaves_nothing(desk, model, clip):
    done = []

    def tell(frames, total, text):
        done.append(frames)
        if frames:
            assert desk.stop("me") and not desk.stop("another")

    form = FORM | {"model": str(model), "scale": 2}
    with pytest.raises(Cancelled):
        desk.run("me", str(clip), form, tell)
    assert done[-1] == 21 and list(desk.folder.iterdir()) == [] and not desk.stop("me")
    first = desk.run("me", str(clip), form, quiet)
    second = desk.run("me", str(clip), form, quiet)
    assert not first.out.exists() and second.out.exists()  # one result is kept
    desk.leave("me")
    assert list(desk.folder.iterdir()) == []


def test_one_job_at_a_time_and_a_waiting_one_can_be_stopped(desk, model, clip):
    form, log, ends = FORM | {"model": str(model), "scale": 2}, [], []

    def go(name):
        try:
            desk.run(name, str(clip), form, lambda *_: log.append(name))
        except Cancelled:
            ends.append(name)

    users = [threading.Thread(target=go, args=(name,)) for name in "abc"]
    with desk._device:
        for user in users:
            user.start()
        until = time.monotonic() + 20
        while len(desk._running) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        desk.stop("c")
        users[2].join(20)
        assert ends == ["c"] and log == []
    for user in users[:2]:
        user.join()
    turns = [name for k, name in enumerate(log) if k == 0 or log[k - 1] != name]
    assert sorted(turns) == ["a", "b"] and ends == ["c"]


def test_mistakes_are_one_sentence_and_leave_nothing(desk, model, clip, micro_model, tmp_path):
    teacher = micro_model("teacher")
    parts = {p: getattr(teacher, p) for p in ("dit", "lr_projector", "prompt", "tc_decoder")}
    save_model(tmp_path / "teacher", config=teacher.config, info=teacher.info, **parts)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    for source, changed, said in (
        (clip, {"memory": "0.001"}, "GiB may be used; "),
        (clip, {"memory": "0.001", "tile": "auto"}, "GiB may be used; "),
        (clip, {"model": str(tmp_path / "teacher")}, "of kind 'teacher', which takes whole clips"),
        (clip, {"model": str(tmp_path / "nothing")}, "nothing"),
        (clip, {"start": "soon"}, "--start: 'soon' is no time"),
        (clip, {"start": "9"}, "--start lies behind its end"),
        (clip, {"tile": "small"}, "--tile: invalid auto or int value: 'small'"),
        (clip, {"scale": 0.5}, "scale=0.5 must be at least 1"),
        (tmp_path / "broken.mp4", {}, "broken.mp4 cannot be read"),
    ):
        with pytest.raises(UserError, match=re.escape(said)) as error:
            desk.run("me", str(source), FORM | {"model": str(model), "scale": 2} | changed, quiet)
        assert "\n" not in str(error.value)
    assert list(desk.folder.iterdir()) == []


def test_a_clip_is_described_before_anything_runs(desk, model, clip, tmp_path):
    text, first = desk.describe(str(clip), FORM | {"model": str(model)})
    assert text == "a clip.mp4: 32x24, 45 frames at 25 a second" and first.shape == (24, 32, 3)
    drawn = sample.write(tmp_path / "sample.mp4")
    got = np.stack(list(read_frames(drawn)))
    want = np.stack([sample.frame(k) for k in range(sample.FRAMES)])
    assert got.shape == want.shape and np.abs(got.astype(int) - want).mean() < 4
    assert (want[1:] != want[:-1]).any((1, 2, 3)).all()  # it moves


# ---- the command ----------------------------------------------------------------------------------------


def test_without_gradio_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install .*'\.?\[app\]'"):
        main(["app", "--model", str(model)])


def test_wrong_folders_are_refused_before_the_page(model, tmp_path):
    if importlib.util.find_spec("gradio") is None:
        pytest.skip(NO_GRADIO)
    for arguments_, said in (
        (["--model", str(tmp_path / "none")], "none does not exist"),
        (["--model", str(model), "--samples", str(tmp_path / "none")], "is no folder"),
        (["--model", str(model), "--samples", str(tmp_path)], "holds no video"),
    ):
        with pytest.raises(UserError, match=said):
            main(["app", *arguments_])


# ---- the page -------------------------------------------------------------------------------------------

# Notes every attempt to reach another machine, also by name, and when jobs begin and end.
WATCHED = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        place = arguments[1] if event == "socket.connect" else arguments[0]
        host = place[0] if isinstance(place, tuple) else place
        if host not in ("127.0.0.1", "localhost", "::1", None, ""):
            print("CALLS", event, place, flush=True)
sys.addaudithook(watch)
from flashvsr.app.desk import Desk
work = Desk._upscale
def noted(*given):
    print("BEGINS", flush=True)
    try:
        return work(*given)
    finally:
        print("ENDS", flush=True)
Desk._upscale = noted
from flashvsr.__main__ import main
from flashvsr.base.cli import run
run(main)
"""


@contextmanager
def serving(model, clip, folder, tracebacks=0):
    """The app in a process of its own; afterwards it has called nobody and left nothing."""
    if importlib.util.find_spec("gradio") is None:
        pytest.skip(NO_GRADIO)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "tmp").mkdir()
    command = [sys.executable, "-c", WATCHED, "app", "--model", str(model), "--samples", str(clip.parent)]
    log = folder / "log.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--port", str(port)], cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env=os.environ | {"TMPDIR": str(folder / "tmp")},
        )  # fmt: skip
    try:
        until = time.monotonic() + 120
        while "serving" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
        said = log.read_text()
        assert "CALLS" not in said and said.count("Traceback") == tracebacks, said
        assert list((folder / "tmp").glob("flashvsr-app-*")) == []
    finally:
        process.kill()


@pytest.mark.slow
def test_two_users_take_turns_and_each_gets_the_right_file(model, clip, tmp_path):
    with serving(model, clip, tmp_path, tracebacks=1) as address:  # gradio's own, for the wrong choice
        from gradio_client import Client, handle_file
        from gradio_client.utils import Status

        users = [Client(address, verbose=False, analytics_enabled=False) for _ in range(2)]
        jobs, seeds, seen = [], (1, 2), []
        for user, seed in zip(users, seeds, strict=True):
            form = FORM | {"model": str(model), "scale": 2, "seed": seed, "tile": "auto"}
            values = ["" if v is None else str(v) if k == "local-range" else v for k, v in form.items()]
            jobs.append(user.submit(handle_file(str(clip)), *values, api_name="/upscale"))
        while not all(job.done() for job in jobs):
            seen.append(tuple(job.status().code for job in jobs))
            time.sleep(0.01)
        # not by what the clients see: they hear of an end later than of the next beginning
        assert re.findall("BEGINS|ENDS", (tmp_path / "log.txt").read_text()) == ["BEGINS", "ENDS"] * 2
        at_work = (Status.PROCESSING, Status.PROGRESS, Status.ITERATING)
        assert any(Status.IN_QUEUE in pair and set(pair) & set(at_work) for pair in seen), set(seen)
        for job, seed in zip(jobs, seeds, strict=True):
            page, said = job.result()
            url = re.search(r'after="([^"]+)"', page)[1]
            with urllib.request.urlopen(address + url) as file:
                got = file.read()
            want = commanded(model, clip, tmp_path / f"{seed}.mp4", "--scale", "2", "--seed", str(seed))
            assert got == want and said.startswith("45 frames in ")
        with pytest.raises(Exception, match="not in the list of choices"):  # only the models it was given
            users[0].predict(handle_file(str(clip)), str(tmp_path), *values[1:], api_name="/upscale")


BUTTON = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() === 'Upscale')"
COMPARE = "document.querySelector('video-compare')"


@pytest.mark.slow
def test_in_a_browser_upload_run_slide_download(model, clip, tmp_path):
    if browser.found() is None:
        pytest.skip(f"needs a Chromium: none of {', '.join(browser.NAMES)} is installed")
    with serving(model, clip, tmp_path) as address, browser.browser(tmp_path / "browser") as page:
        page.open(address)
        page.wait(f"!!{BUTTON} && !!document.querySelector('input[type=file]')")
        page.run(f"{BUTTON}.click()")
        page.wait("document.body.innerText.includes('no clip: choose a file or a sample')")
        page.upload("input[type=file]", clip)
        page.wait("!!document.querySelector('#view img.first')")
        assert "a clip.mp4: 32x24, 45 frames" in page.run("document.querySelector('#said').innerText")
        page.run(f"{BUTTON}.click()")
        page.wait(f"!!{COMPARE} && {COMPARE}.after.readyState > 2 && {COMPARE}.before.readyState > 2")
        assert page.run(f"[{COMPARE}.after.videoWidth, {COMPARE}.before.videoWidth]") == [128, 32]

        # Both play, at the same time of the clip.
        apart = f"Math.abs({COMPARE}.after.currentTime - {COMPARE}.before.currentTime)"
        page.wait(f"!{COMPARE}.before.paused && {COMPARE}.after.currentTime > 0.2 && {apart} < 0.1")
        page.run(f"{COMPARE}.after.pause(), {COMPARE}.after.currentTime = 1")
        page.wait(f"!{COMPARE}.after.seeking && {COMPARE}.before.currentTime === 1")

        # The divider follows the mouse, and what is left of it is the input.
        box = page.run(f"{COMPARE}.shadowRoot.querySelector('.stage').getBoundingClientRect().toJSON()")
        middle = box["y"] + box["height"] / 2
        for share in (0.25, 0.9, 0.6):
            page.drag((box["x"] + box["width"] / 2, middle), (box["x"] + share * box["width"], middle))
            cut = float(page.run(f"{COMPARE}.style.getPropertyValue('--cut')").removesuffix("%"))
            assert cut == pytest.approx(100 * share, abs=1)
            assert divider(page.screenshot(), box) == pytest.approx(share, abs=0.02)

        page.run(f"{COMPARE}.shadowRoot.querySelector('.save').click()")
        saved = tmp_path / "browser" / "a clip-upscaled.mp4"
        until = time.monotonic() + 120
        while not saved.exists():
            assert time.monotonic() < until
            time.sleep(0.05)
        assert saved.read_bytes() == commanded(model, clip, tmp_path / "want.mp4", "--tile", "auto")

        foreign = [u for u in page.requested if not u.startswith((address, "data:", "blob:"))]
        assert foreign == [], foreign
        faults = [p for method, p in page.events if method == "Runtime.exceptionThrown"]
        assert faults == [], json.dumps(faults)[:2000]


def divider(png, box):
    """Where the white line stands, as a share of the stage's width: the brightest column."""
    from PIL import Image

    seen = np.asarray(Image.open(io.BytesIO(png)).convert("L")).astype(int)
    top, left = round(box["y"]), round(box["x"])
    rows = slice(top + round(0.7 * box["height"]), top + round(0.95 * box["height"]))
    stage = seen[rows, left + 4 : left + round(box["width"]) - 4]
    return (stage.min(0).argmax() + 4.5) / box["width"]
