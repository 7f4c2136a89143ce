"""Headless Chromium over its debugging pipe (Chrome DevTools Protocol): real clicks and keys, nothing to install besides the browser.

https://chromedevtools.github.io/devtools-protocol/ ; the pipe is `--remote-debugging-pipe`: JSON messages, each ended by a zero byte,
on descriptors 3 and 4.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--no-proxy-server",
    "--host-resolver-rules=MAP *.test 127.0.0.1, MAP rebound.example 127.0.0.1", "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT_S = 20.0


class Page:
    """One tab."""

    def __init__(self, browser: Chromium, session: str) -> None:
        self._browser = browser
        self._session = session
        self.dialogs: list[str] = []
        self.console: list[str] = []
        self.requested: list[str] = []
        self._loaded = False
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._browser.call(method, parameters, self._session)

    def event(self, method: str, parameters: dict[str, Any]) -> None:
        match method:
            case "Page.loadEventFired":
                self._loaded = True
            case "Page.javascriptDialogOpening":
                self.dialogs.append(parameters["message"])
                self._browser.post("Page.handleJavaScriptDialog", {"accept": True}, self._session)
            case "Log.entryAdded":
                self.console.append(parameters["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requested.append(parameters["request"]["url"])

    def size(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )

    def go(self, url: str) -> None:
        with self.loading():
            self.call("Page.navigate", url=url)

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """What is done in the block loads another page; it is there when the block ends."""
        self._loaded = False
        yield
        until = time.monotonic() + TIMEOUT_S
        while not self._loaded:
            self._browser.read(until)

    def evaluate(self, expression: str) -> Any:
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    @property
    def text(self) -> str:
        return str(self.evaluate("document.body.innerText"))

    @property
    def url(self) -> str:
        return str(self.evaluate("location.href"))

    def click(self, selector: str) -> None:
        """Where a person would: the middle of what is shown."""
        at = self.evaluate(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            " e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
            " const x = r.x + r.width / 2, y = r.y + r.height / 2;"
            " return e.contains(document.elementFromPoint(x, y)) ? [x, y] : null })()"
        )
        if at is None:
            raise AssertionError(f"nothing to click at {selector}")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=at[0], y=at[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else "",
            )  # fmt: skip

    def screenshot(self, path: Path) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))


class Chromium:
    def __init__(self) -> None:
        self._profile = tempfile.mkdtemp(prefix="sidecar-chromium-")
        ours_in, its_out = os.pipe()
        its_in, ours_out = os.pipe()
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec chromium "$@" 3<&{its_in} 4>&{its_out}', "chromium", *FLAGS,
             f"--user-data-dir={self._profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(its_in, its_out),
        )  # fmt: skip
        os.close(its_in)
        os.close(its_out)
        self._in, self._out = ours_in, ours_out
        self._buffer = b""
        self._numbers = itertools.count(1)
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}

    def page(self) -> Page:
        """A tab of its own: with cookies of its own."""
        context = self.call("Target.createBrowserContext", {})["browserContextId"]
        target = self.call("Target.createTarget", {"url": "about:blank", "browserContextId": context})[
            "targetId"
        ]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._pages[session] = page = Page(self, session)
        return page

    def post(self, method: str, parameters: dict[str, Any], session: str = "") -> int:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        return number

    def call(self, method: str, parameters: dict[str, Any], session: str = "") -> dict[str, Any]:
        number = self.post(method, parameters, session)
        until = time.monotonic() + TIMEOUT_S
        while number not in self._answers:
            self.read(until)
        answer = self._answers.pop(number)
        if "error" in answer:
            raise AssertionError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def read(self, until: float) -> None:
        ready, _, _ = select.select([self._in], [], [], max(0.0, until - time.monotonic()))
        data = os.read(self._in, 1 << 20) if ready else b""
        if not data:
            raise TimeoutError("the browser does not answer")
        self._buffer += data
        while b"\0" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(line)
            if "id" in message:
                self._answers[message["id"]] = message
            elif page := self._pages.get(message.get("sessionId", "")):
                page.event(message["method"], message.get("params", {}))

    def close(self) -> None:
        with contextlib.suppress(OSError, AssertionError, TimeoutError):
            self.call("Browser.close", {})
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._profile, ignore_errors=True)
