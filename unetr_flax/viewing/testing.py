"""A headless Chromium for the tests of pages, driven through its DevTools protocol."""

import base64
import contextlib
import io
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome")
# WebGL in software: test machines have no graphics card.
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--ignore-gpu-blocklist",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
# Chromium reads commands from descriptor 3 and writes answers to descriptor 4.
START = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(pipe), fcntl.F_DUPFD_CLOEXEC, 10) for pipe in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
TIMEOUT = 60  # seconds


def find_browser() -> str | None:
    """Finds Chromium: the program that the variable CHROMIUM names, or one on the path."""
    if named := os.environ.get("CHROMIUM"):
        return named
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab of a headless Chromium.

    Attributes:
      problems: errors and warnings of the console, exceptions, and failed or refused loads.
    """

    def __init__(self, commands: io.RawIOBase, inbox: queue.Queue):
        self.problems: list[str] = []
        self._commands = commands
        self._inbox = inbox
        self._number = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol and waits for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._inbox.get(timeout=TIMEOUT)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def open(self, path: Path, width: int, height: int) -> None:
        """Opens a file in a window of some size, in CSS pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.call("Page.navigate", url=path.absolute().as_uri())

    def run(self, script: str) -> Any:
        """Runs JavaScript in the page and returns its value; waits for promises."""
        result = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Waits until a JavaScript expression is true."""
        end = time.monotonic() + TIMEOUT
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never true: {condition}; {self.problems}"
            time.sleep(0.05)

    def picture(self) -> np.ndarray:
        """Takes a screenshot: [height, width, 3], floats from 0 to 1."""
        # Two frames later, what the page has asked for is drawn.
        self.run("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
        png = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return matplotlib.image.imread(io.BytesIO(png))[..., :3]

    def _note(self, event: dict[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning"):
            values = (str(a.get("value", a.get("description"))) for a in parameters["args"])
            self.problems.append(f"console: {' '.join(values)}")
        elif method == "Runtime.exceptionThrown":
            self.problems.append(f"exception: {parameters['exceptionDetails']}")
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"log: {parameters['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.problems.append(f"request: {url}")


@contextlib.contextmanager
def open_browser(program: str) -> Iterator[Browser]:
    """Starts Chromium with an empty profile, and kills it at the end."""
    to_browser, commands = os.pipe()
    answers, from_browser = os.pipe()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        open(commands, "wb", buffering=0) as writer,
        open(answers, "rb") as reader,
    ):
        process = subprocess.Popen(
            [
                *(sys.executable, "-c", START, str(to_browser), str(from_browser)),
                *(program, *OPTIONS, f"--user-data-dir={profile}"),
            ],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(to_browser)
        os.close(from_browser)
        inbox: queue.Queue = queue.Queue()
        listener = threading.Thread(target=_listen, args=(reader, inbox))
        listener.start()
        try:
            yield Browser(writer, inbox)
        finally:
            # The session is Chromium and all of its helpers.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            # The pipe ends with the last of its writers, and the thread with the pipe.
            listener.join()


def _listen(answers: io.BufferedReader, inbox: queue.Queue) -> None:
    """Puts messages, which end in a zero byte, into a queue."""
    buffer = b""
    while part := answers.read1(1 << 16):
        *messages, buffer = (buffer + part).split(b"\0")
        for message in messages:
            inbox.put(json.loads(message))
