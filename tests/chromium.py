"""A headless Chromium, steered through its debugging port: pages as a person would see them."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import subprocess
import time

import numpy as np
import pytest
from PIL import Image

FLAGS = ["--headless=new", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1", "--no-first-run"]
FLAGS += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage", "--mute-audio"]


@contextlib.contextmanager
def open_page(address, folder, width=640, height=480, patience_s=60):
    """Yield a ``Page``; skips the test where there is no Chromium, or no websockets to talk to it."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("Chromium is not installed: pages are not looked at")
    client = pytest.importorskip("websockets.sync.client")
    command = [program, *FLAGS, "--remote-debugging-port=0", f"--user-data-dir={folder}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        note, deadline = folder / "DevToolsActivePort", time.monotonic() + patience_s
        while not (note.is_file() and len(note.read_text().splitlines()) == 2):
            assert time.monotonic() < deadline and browser.poll() is None, "Chromium does not start"
            time.sleep(0.1)
        port, path = note.read_text().splitlines()
        with client.connect(f"ws://127.0.0.1:{port}{path}", max_size=None, proxy=None) as socket:
            page = Page(socket, patience_s)
            page.open(address, width, height)
            yield page
    finally:
        browser.terminate()
        browser.wait(20)


class Page:
    def __init__(self, socket, patience_s):
        self.socket, self.patience_s, self.number, self.session, self.problems = socket, patience_s, 0, None, []

    def call(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(request | ({"sessionId": self.session} if self.session else {})))
        while True:
            answer = json.loads(self.socket.recv(timeout=self.patience_s))
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(answer["params"]["exceptionDetails"])
            if answer.get("method") == "Network.requestWillBeSent":
                self.problems.append(answer["params"]["request"]["url"][:100])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def open(self, address, width, height):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.enable")
        self.call("Runtime.enable")
        self.call("Page.navigate", url=address)

    def evaluate(self, expression):
        """The value of a JavaScript expression."""
        options = {"expression": expression, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **options)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, expression):
        deadline = time.monotonic() + self.patience_s
        while not self.evaluate(expression):
            assert time.monotonic() < deadline, f"{expression} never came true"
            time.sleep(0.1)

    def screenshot(self):
        """[height, width, 3] uint8."""
        picture = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))
