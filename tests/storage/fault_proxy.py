"""An HTTP proxy before an S3 server, that can be told to answer like a server or network in trouble."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["SlowDown", "InvalidAccessKeyId", "SignatureDoesNotMatch", "drop", "lose the answer", "cut"]
_STATUS = {"SlowDown": 503, "InvalidAccessKeyId": 403, "SignatureDoesNotMatch": 403}


@dataclass(frozen=True)
class Request:
    """What was asked: `path` with its query; `range` of a GET."""

    method: str
    path: str
    range: str


@dataclass
class Proxy:
    """
    Args:
        server: URL that requests are passed on to.
        fault: Of a request; None: pass it on. Called by several threads.
    """

    server: str
    fault: Callable[[Request], Fault | None] = lambda request: None
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    def start(self) -> ThreadingHTTPServer:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"http://127.0.0.1:{listening.server_address[1]}"
        return listening

    def seen(self, method: str, part: str = "") -> list[Request]:
        return [request for request in self.requests if request.method == method and part in request.path]


def times(count: int, fault: Fault, method: str = "", part: str = "") -> Callable[[Request], Fault | None]:
    """The fault for the first `count` requests of this method whose path holds `part`."""
    left, lock = [count], threading.Lock()

    def choose(request: Request) -> Fault | None:
        with lock:
            if left[0] and method in ("", request.method) and part in request.path:
                left[0] -= 1
                return fault
        return None

    return choose


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: Proxy

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, self.headers.get("Range", ""))
        self.owner.requests.append(request)
        fault = self.owner.fault(request)
        if fault in _STATUS:
            return self._refuse(_STATUS[fault], fault)
        if fault == "drop":
            return self._hang_up()
        where = urlsplit(self.owner.server)
        assert where.hostname is not None
        server = http.client.HTTPConnection(where.hostname, where.port, timeout=60)
        with contextlib.closing(server):
            server.request(self.command, self.path, body, dict(self.headers))
            answer = server.getresponse()
            content = answer.read()
            if fault == "lose the answer":
                return self._hang_up()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
            if fault == "cut":
                self._hang_up()
        return None

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>No.</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def _hang_up(self) -> None:
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()
