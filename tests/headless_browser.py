"""Drive a headless Chromium through its DevTools protocol, and serve a folder to it on this machine only."""

import base64
import contextlib
import functools
import itertools
import json
import shutil
import subprocess
import tempfile
import threading
import time
import urllib.request
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def served(folder):
    """Serve a folder as `python -m http.server` does; gives the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def opened():
    """Start Chromium with an empty profile; gives its `Tab`."""
    websocket = pytest.importorskip("websocket", reason="websocket-client is not installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [CHROMIUM, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = _wait(lambda: _first_line(Path(profile, "DevToolsActivePort")))
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
                pages = [each for each in json.load(answer) if each["type"] == "page"]
            socket = websocket.create_connection(pages[0]["webSocketDebuggerUrl"], timeout=120, suppress_origin=True)
            with contextlib.closing(socket):
                yield Tab(socket)
        finally:
            process.terminate()
            process.wait(30)


def _first_line(path):
    return path.read_text().split("\n")[0] if path.exists() else ""


def _wait(ready, seconds=60):
    """Return the first true value of `ready()`."""
    end = time.monotonic() + seconds
    while not (value := ready()):
        if time.monotonic() > end:
            raise TimeoutError(f"nothing after {seconds} seconds")
        time.sleep(0.1)
    return value


class Tab:
    """A page in the browser."""

    def __init__(self, socket):
        self._socket, self._numbers = socket, itertools.count(1)

    def send(self, method, **parameters):
        """Call a method of the protocol and return its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv())).get("id") != number:
            pass  # an event
        if "error" in message:
            raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def open(self, address):
        self.send("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, script):
        """Run JavaScript in the page, wait for its promise, and return its value."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"].get("exception", {}).get("description", "exception"))
        return answer["result"].get("value")

    def wait(self, condition):
        """Wait until a JavaScript expression is true, and return its value."""
        return _wait(lambda: self.run(condition))

    def press(self, key, code):
        """Press a key, such as ("Enter", 13)."""
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            options = {"key": key, "code": key, "windowsVirtualKeyCode": code, **text}
            self.send("Input.dispatchKeyEvent", type=kind, **options)

    def choose_file(self, selector, path):
        """Choose a file in an `<input type="file">`."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def look(self, path, width, height=None, dark=False):
        """Write a picture of the page, by default of all of it."""
        size = {"width": width, "height": height or 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        time.sleep(0.3)
        picture = self.send("Page.captureScreenshot", captureBeyondViewport=height is None)
        Path(path).write_bytes(base64.b64decode(picture["data"]))
