"""A headless Chromium to drive pages with: the DevTools protocol over a pair of pipes."""

import base64
import contextlib
import fcntl
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--autoplay-policy=no-user-gesture-required", "--remote-debugging-pipe",
)  # fmt: skip

# Chromium reads commands from descriptor 3 and answers on 4.
START = """
import os, sys
os.dup2(int(sys.argv[1]), 3), os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def found() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. `events` holds all that the browser told, as (method, parameters)."""

    def __init__(self, send: Any, replies: Any) -> None:
        self._send, self._replies, self._numbers = send, replies, itertools.count(1)
        self._answers: dict[int, queue.Queue] = {}
        self.session: str | None = None
        self.events: list[tuple[str, dict]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        rest = b""
        while data := os.read(self._replies, 1 << 16):  # empty when the browser has ended
            *messages, rest = (rest + data).split(b"\0")
            for text in messages:
                message = json.loads(text)
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                else:
                    self.events.append((message["method"], message.get("params", {})))
        os.close(self._replies)

    def call(self, method: str, **parameters: Any) -> dict:
        """A command of the protocol and its result; RuntimeError when the browser refuses."""
        number, answer = next(self._numbers), queue.Queue()
        self._answers[number] = answer
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        reply = answer.get(timeout=300)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        reply = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(str(reply["exceptionDetails"]))
        return reply["result"].get("value")

    def wait(self, script: str, seconds: float = 300) -> Any:
        """Waits until an expression is true, and gives its value."""
        until = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < until, f"not within {seconds} s: {script}"
            time.sleep(0.1)
        return value

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def upload(self, selector: str, *files: Path) -> None:
        """Gives files to an <input type=file>."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Presses the mouse at one place, moves it, and lets it go at another."""
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    @property
    def requested(self) -> set[str]:
        """The addresses that the page has asked for."""
        return {p["request"]["url"] for method, p in self.events if method == "Network.requestWillBeSent"}


@contextlib.contextmanager
def browser(folder: Path, width: int = 1280, height: int = 800) -> Iterator[Page]:
    """A fresh Chromium with one page; `folder` takes its profile and what it downloads."""
    to_read, send = os.pipe()
    replies, to_write = os.pipe()
    command = [found(), *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--window-size={width},{height}"]
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (to_read, to_write)]  # not 3 or 4 themselves
    process = subprocess.Popen(
        [sys.executable, "-c", START, *map(str, ends), *command, "about:blank"],
        pass_fds=ends, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for end in (to_read, to_write, *ends):
        os.close(end)
    page = Page(send, replies)
    try:
        target = next(t for t in page.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        page.session = page.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "DOM", "Log"):
            page.call(f"{domain}.enable")
        page.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(folder))
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(send)
