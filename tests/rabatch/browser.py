"""A headless Chromium, driven by the WebDriver protocol of its own chromedriver."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
MISSING = "needs chromium and chromedriver on the PATH (Debian: apt-get install chromium chromium-driver)"
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def found() -> tuple[str, str] | None:
    """Paths of a browser and its driver."""
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


class Browser:
    """One window.

    Args:
        url: Of the driver's session.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    def open(self, address: str, *, width: int, height: int, dark: bool = False) -> None:
        self._post("window/rect", {"width": width, "height": height})
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])
        self._post("url", {"url": address})

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript function body."""
        return self._post("execute/sync", {"script": script, "args": []})

    def devtools(self, command: str, **params: Any) -> Any:
        return self._post("goog/cdp/execute", {"cmd": command, "params": params})

    def screenshot(self) -> bytes:
        """All of the page as PNG."""
        size = self.devtools("Page.getLayoutMetrics")["cssContentSize"]
        made = self.devtools("Page.captureScreenshot", captureBeyondViewport=True, clip={**size, "scale": 1})
        return base64.b64decode(made["data"])

    def console(self) -> list[dict[str, Any]]:
        """What was written to the console since it was last asked."""
        return list(self._post("se/log", {"type": "browser"}))

    def requests(self) -> list[str]:
        """URLs of all requests since this was last asked."""
        events = [json.loads(entry["message"])["message"] for entry in self._post("se/log", {"type": "performance"})]
        return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        return _call(f"{self._url}/{path}", body)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty profile, ended with the block."""
    paths = found()
    assert paths is not None, MISSING
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="rabatch-browser-", ignore_cleanup_errors=True) as profile:
        driver = subprocess.Popen([paths[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            _wait_for(base, driver)
            options = {"binary": paths[0], "args": [*_FLAGS, f"--user-data-dir={profile}"]}
            wanted = {
                "browserName": "chrome",
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
            session = _call(f"{base}/session", {"capabilities": {"alwaysMatch": wanted}})
            url = f"{base}/session/{session['sessionId']}"
            try:
                yield Browser(url)
            finally:
                _call(url, None, method="DELETE")
        finally:
            driver.terminate()
            driver.wait(timeout=20)


def _wait_for(base: str, driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and driver.poll() is None:
        try:
            if _call(f"{base}/status", None, method="GET")["ready"]:
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("chromedriver did not start")


def _call(url: str, body: dict[str, Any] | None, *, method: str = "POST") -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers={"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=90) as response:
            return json.load(response)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()[:2000]) from error


def looks(path: Path, script: str) -> Iterator[tuple[Any, bool]]:
    """What `script` returns of the page at `path`, wide and light, then narrow and dark, and whether it was dark.

    Of every page: nothing else is loaded, nothing is said on the console, no script is in it, and it is no wider than
    the window. Pictures are left beside it.
    """
    with browser() as window:
        window.open("about:blank", width=1280, height=900)
        window.requests()
        for width, dark in ((1280, False), (360, True)):
            window.open(path.as_uri(), width=width, height=900, dark=dark)
            assert window.requests() == [path.as_uri()]
            assert window.console() == []
            found = window.evaluate(script)
            (path.parent / f"{width}.png").write_bytes(window.screenshot())
            assert found["scripts"] == 0
            assert found["page"] <= found["window"], "the page must not be wider than the window"
            yield found, dark
