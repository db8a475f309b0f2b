"""A store on an S3 server that throttles, drops connections and loses answers, and writers and builders that die."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs
from fault_proxy import Fault, Proxy, Request, times
from storage_samples import GEOMETRY, prepare

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage import filesystem
from rabatch.storage.filesystem import ATTEMPTS, Folder
from rabatch.storage.garbage import collect
from rabatch.storage.store import IndexStore

TROUBLE: tuple[Fault, ...] = ("SlowDown", "drop", "cut")


@pytest.fixture
def proxy(s3_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    # The clients below have retries of their own, with waits of seconds; ours are what is to be seen.
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setattr(filesystem, "_FIRST_WAIT_S", 0.001)
    proxy = Proxy(s3_options["endpoint_url"])
    listening = proxy.start()
    yield proxy
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def options(proxy: Proxy, s3_options: dict[str, Any]) -> dict[str, Any]:
    return {**s3_options, "endpoint_url": proxy.url, "config_kwargs": {"retries": {"max_attempts": 0}}}


@pytest.fixture
def url(s3_url: tuple[str, dict[str, Any]]) -> str:
    return s3_url[0]


@pytest.mark.parametrize("fault", TROUBLE)
def test_trouble_that_passes_costs_nothing(
    proxy: Proxy, options: dict[str, Any], s3_options: dict[str, Any], url: str, fault: Fault
) -> None:
    folder, data = Folder(url, **options), bytes(range(256)) * 40
    Folder(url, **s3_options).write("a/b.bin", data)  # not through the proxy
    calls: list[tuple[str, Callable[[], Any], Any]] = [
        ("GET", lambda: folder.list(), {"a/b.bin": len(data)}),
        ("GET", lambda: folder.read("a/b.bin"), data),
        ("GET", lambda: folder.read("a/b.bin", max_bytes=len(data)), data),
        ("GET", lambda: b"".join(folder.pieces("a/b.bin", 100, 5000)), data[100:5000]),
    ]
    if fault != "cut":  # the answers to these have nothing that could break off
        calls += [
            ("HEAD", lambda: folder.size("a/b.bin"), len(data)),
            ("PUT", lambda: folder.write("a/b.bin", data), None),
            ("PUT", lambda: folder.create("m.json", data), True),
        ]
    for method, call, wanted in calls:
        proxy.requests.clear()
        proxy.fault = times(ATTEMPTS - 1, fault, method)
        assert call() == wanted
        assert len(proxy.seen(method)) == ATTEMPTS
    proxy.fault = lambda request: None
    assert folder.read("a/b.bin") == data


@pytest.mark.parametrize("fault", TROUBLE)
def test_trouble_that_stays_is_one_line(proxy: Proxy, options: dict[str, Any], url: str, fault: Fault) -> None:
    folder = Folder(url, **options)
    folder.write("a.bin", b"12345678")
    proxy.fault = times(10**6, fault)
    calls: list[Callable[[], Any]] = [lambda: folder.read("a.bin", max_bytes=8)]
    if fault != "cut":
        calls += [
            lambda: folder.write("b.bin", b"1"),
            lambda: folder.create("c.bin", b"1"),
            lambda: folder.size("a.bin"),
        ]
    for call in calls:
        proxy.requests.clear()
        with pytest.raises(StoreError, match=r"gave up after several attempts.*try again later") as caught:
            call()
        assert url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not isinstance(caught.value, IntegrityError)  # `verify --remove-damaged` must not withdraw it
        # A client sends again of itself what a connection that it had kept open did not answer.
        assert ATTEMPTS <= len(proxy.requests) <= (2 if fault == "drop" else 1) * ATTEMPTS


@pytest.mark.parametrize("fault", ["InvalidAccessKeyId", "SignatureDoesNotMatch"])
def test_wrong_credentials_are_one_line_at_once(proxy: Proxy, options: dict[str, Any], url: str, fault: Fault) -> None:
    options = {**options, "secret": "sesame-open"}
    folder = Folder(url, **options)
    proxy.fault = times(10**6, fault)
    for call in (
        lambda: folder.read("a.bin"),
        lambda: folder.write("a.bin", b"1"),
        lambda: folder.create("a.bin", b"1"),
        lambda: folder.size("a.bin"),
        lambda: folder.list(),
        lambda: IndexStore(url, create=True, storage_options=options),
    ):
        proxy.requests.clear()
        with pytest.raises(StoreError, match=r"access denied .*; check credentials and permissions") as caught:
            call()
        assert "\n" not in str(caught.value)
        assert url in str(caught.value)
        assert "sesame" not in str(caught.value)
        assert len(proxy.requests) == 1


def test_a_commit_whose_answer_is_lost_is_won_once(proxy: Proxy, options: dict[str, Any], url: str) -> None:
    store = IndexStore(url, create=True, storage_options=options)
    mine, theirs = prepare(store)[0], prepare(store, seed=5)[0]
    proxy.fault = times(1, "lose the answer", "PUT", "manifests/")
    assert store.commit(mine) == mine
    assert len(proxy.seen("PUT", "manifests/")) == 2
    assert store.commit(theirs) == mine
    assert list(store.manifests()) == [mine]


def test_a_whole_build_and_reading_through_trouble(
    proxy: Proxy, options: dict[str, Any], url: str, tmp_path: Path
) -> None:
    """Every third request fails, in turn by each fault."""
    count, lock = [0], threading.Lock()

    def every_third(request: Request) -> Fault | None:
        with lock:
            count[0] += 1
            return TROUBLE[count[0] // 3 % 3] if count[0] % 3 == 0 else None

    proxy.fault = every_third
    store = IndexStore(url, create=True, storage_options=options, cache=tmp_path)
    manifest, blocks = prepare(store)
    assert store.commit(manifest) == manifest
    assert list(store.manifests()) == [manifest]
    for layer, block in enumerate(blocks):
        for check in (True, False, "once"):
            assert store.read_layer(manifest, layer, check=check).equals(block)
    assert count[0] > 30


@pytest.fixture
def wide(url: str, s3_options: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Manifest and blocks of a document with parts larger than a footer is looked for in."""
    store = IndexStore(url, create=True, storage_options=s3_options)
    geometry = dataclasses.replace(GEOMETRY, n_kv_heads=4, n_query_heads=4, n_layers=1, sliding_windows=(0,))
    manifest, blocks = prepare(store, context_tokens=4000, geometry=geometry, heads_per_part=4)
    return store.commit(manifest), blocks


def _spans(requests: list[Request]) -> list[tuple[int, int]]:
    bounds = [request.range.removeprefix("bytes=").split("-") for request in requests]
    return sorted((int(start), int(stop) + 1) for start, stop in bounds)


def test_only_the_wanted_row_groups_are_read_in_parallel(
    proxy: Proxy, options: dict[str, Any], url: str, wide: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, (block,) = wide
    store = IndexStore(url, storage_options=options)
    part = manifest.parts[1]
    assert store.read_layer(manifest, 0, heads=range(1, 2), check=False).equals(block.select(range(1, 2)))
    footer, group = _spans(proxy.seen("GET", part.path))[::-1]
    assert footer[1] == part.bytes
    assert group[1] - group[0] < 1.02 * part.bytes / 4
    assert group[0] > 0.98 * part.bytes / 4

    monkeypatch.setattr(filesystem, "PIECE_BYTES", 1 << 14)
    tail, together, meeting = footer[0], [], threading.Barrier(4, timeout=30)

    def wait_for_others(request: Request) -> Fault | None:
        if request.method == "GET" and _spans([request])[0][0] < tail and len(together) < 4:
            together.append(request)
            meeting.wait()  # breaks unless four are asked for at the same time
        return None

    proxy.requests.clear()
    proxy.fault = wait_for_others
    assert store.read_layer(manifest, 0, heads=range(2), check=False).equals(block.select(range(2)))
    assert len(together) == 4
    spans = _spans(proxy.seen("GET", part.path))
    assert all(stop - start <= 1 << 14 for start, stop in spans)
    assert max(stop for start, stop in spans if start < tail) < 0.51 * part.bytes


def test_a_dropped_piece_is_read_again_and_the_others_are_not(
    proxy: Proxy, options: dict[str, Any], url: str, wide: tuple[Any, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, (block,) = wide
    monkeypatch.setattr(filesystem, "PIECE_BYTES", 1 << 16)
    store = IndexStore(url, storage_options=options)
    proxy.fault = times(1, "cut", "GET", manifest.parts[1].path)
    assert store.read_layer(manifest, 0).equals(block)
    spans = _spans(proxy.seen("GET", manifest.parts[1].path))
    pieces = -(-manifest.parts[1].bytes // (1 << 16))
    assert pieces > 5
    assert (len(spans), len(set(spans))) == (pieces + 1, pieces)


LARGE = 11 * 2**20
SMALL_PIECES = (5 * 2**20, None, "overwrite")  # s3fs sends 50 MiB at once, of what has more than 100; S3 takes 5


def test_large_parts_are_written_in_several_requests(
    proxy: Proxy, options: dict[str, Any], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3fs.S3FileSystem._pipe_file, "__defaults__", SMALL_PIECES)
    folder, data = Folder(url, **options), np.random.default_rng(0).bytes(LARGE)
    proxy.fault = times(1, "SlowDown", "PUT", "partNumber=2")  # of three; it is all sent anew
    folder.write("parts/large.bin", memoryview(data))
    assert len(proxy.seen("PUT", "partNumber=")) == 6
    assert len(proxy.seen("DELETE", "uploadId=")) == 1  # what had been sent is not left to be paid for
    assert folder.list() == {"parts/large.bin": LARGE}
    assert b"".join(folder.pieces("parts/large.bin", 0, LARGE)) == data


_WRITER = """
import json, sys
import s3fs
from rabatch.storage.filesystem import Folder
s3fs.S3FileSystem._pipe_file.__defaults__ = (5 * 2**20, None, "overwrite")
Folder(sys.argv[1], **json.loads(sys.argv[2])).write("parts/large.bin", bytes(11 * 2**20))
"""


def test_a_writer_killed_between_the_requests_of_a_part_leaves_no_part(
    proxy: Proxy, options: dict[str, Any], url: str
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def hold_the_last(request: Request) -> Fault | None:
        if "partNumber=3" in request.path:
            reached.set()
            go_on.wait(60)
            return "drop"
        return None

    proxy.fault = hold_the_last
    process = subprocess.Popen([sys.executable, "-c", _WRITER, url, json.dumps(options)])
    assert reached.wait(60)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    go_on.set()
    folder = Folder(url, **options)
    assert folder.list() == {}
    assert not folder.exists("parts/large.bin")
    folder.write("parts/large.bin", b"by another")
    assert folder.read("parts/large.bin") == b"by another"


# One process imports what takes seconds, and forks the builders before anything of it has run.
_BUILDERS = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from storage_samples import prepare
from rabatch.storage.store import IndexStore
url, options, state = sys.argv[2], json.loads(sys.argv[3]), Path(sys.argv[4])

def build(me, dies):
    store = IndexStore(url, create=True, storage_options=options)
    put = store.put_layer

    def put_layer(block, **where):
        if dies and block.layer == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return put(block, **where)

    store.put_layer = put_layer
    manifest, _ = prepare(store, "shared", seed=me)
    while not (state / "go").exists():
        time.sleep(0.002)
    (state / f"said-{me}").write_text(store.commit(manifest).to_json())

def start(me, dies):
    child = os.fork()
    if child == 0:
        try:
            build(me, dies)
        except BaseException as error:
            sys.stderr.write(repr(error))
            os._exit(3)
        os._exit(0)
    return child

children = [start(me, me == 0) for me in range(3)]
(state / "ended").write_text(json.dumps(os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])))
(state / "ended").rename(state / "died")
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children[1:]))
"""


def test_builders_in_several_processes_one_of_whom_dies(url: str, s3_options: dict[str, Any], tmp_path: Path) -> None:
    """Two race for one document; a third dies between its parts. All agree on one index, and it is whole."""
    here = str(Path(__file__).parent)
    builders = subprocess.Popen(
        [sys.executable, "-c", _BUILDERS, here, url, json.dumps(s3_options), str(tmp_path)], start_new_session=True
    )
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "died").exists():
            assert builders.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert json.loads((tmp_path / "died").read_text()) == -signal.SIGKILL
        store = IndexStore(url, storage_options=s3_options)
        assert list(store.manifests()) == []
        assert collect(store, grace_s=0, dry_run=True).attempts
        (tmp_path / "go").touch()
        assert builders.wait(200) == 0
    finally:
        if builders.poll() is None:
            os.killpg(builders.pid, signal.SIGKILL)
    said = [(tmp_path / f"said-{me}").read_text() for me in (1, 2)]
    assert said[0] == said[1]
    (manifest,) = store.manifests()
    assert manifest.to_json() == said[0]
    for layer in range(3):
        store.read_layer(manifest, layer)
    store.read_tokens(manifest)
    assert len(collect(store, grace_s=0, dry_run=True).attempts) == 2  # of the dead one, and of the one that lost
