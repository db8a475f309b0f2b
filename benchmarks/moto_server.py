"""moto's S3 server in a process of its own, which says what it was asked. Imported by other benchmarks."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import queue
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

BUCKET = "bucket"
_LINE = re.compile(r'"(GET|PUT|POST|HEAD|DELETE) (\S*) HTTP')


@dataclass
class Server:
    """
    Args:
        options: Of fsspec, to reach it.
        requests: What was asked since the last call, by kind.
    """

    options: dict[str, Any]
    requests: Callable[[], dict[str, int]]


@contextlib.contextmanager
def moto_server(fill: Callable[[Any], None] | None = None) -> Iterator[Server]:
    """A server with `BUCKET`; `fill` puts objects into moto's backend, in the server's process."""
    context = multiprocessing.get_context("spawn")
    ports, asked = context.Queue(), context.Queue()
    process = context.Process(target=_serve, args=(ports, asked, fill), daemon=True)
    process.start()

    def requests() -> dict[str, int]:
        found: Counter[str] = Counter()
        with contextlib.suppress(queue.Empty):
            while True:
                found[_kind(*asked.get(timeout=2))] += 1  # the log comes a little later than the answer
        return dict(sorted(found.items()))

    yield Server({"key": "key", "secret": "secret", "endpoint_url": f"http://127.0.0.1:{ports.get()}"}, requests)
    process.terminate()
    process.join()


def _serve(ports: Any, asked: Any, fill: Callable[[Any], None] | None) -> None:
    from moto.s3.models import s3_backends
    from moto.server import ThreadedMotoServer

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if match := _LINE.search(record.getMessage()):
                asked.put(match.groups())

    logger = logging.getLogger("werkzeug")
    logger.setLevel(logging.INFO)
    logger.addHandler(Count())
    logger.propagate = False
    backend = s3_backends["123456789012"]["aws"]
    backend.create_bucket(BUCKET, "us-east-1")
    if fill is not None:
        fill(backend)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    ports.put(server.get_host_and_port()[1])
    time.sleep(24 * 3600)


def _kind(method: str, path: str) -> str:
    if method == "GET":
        return "list" if "list-type=2" in path else "get"
    return "multipart" if "uploadId=" in path or "uploads" in path else method.lower()
