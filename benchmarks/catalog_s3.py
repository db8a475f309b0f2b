"""Listing a store of a million indexes on S3.

    python benchmarks/catalog_s3.py [--quick] [--server own|moto] [--entries N]

`own`: a small server of our own on this machine, which makes up the pages of the listing and serves the catalog from
files; so a million take no longer to prepare than their catalog. `moto`: a whole S3 server, whose manifests are objects
and whose catalog is written through it; it takes longer over a page the more objects it has, so it is for some ten
thousands. Either way the figures are those of the client (requests, parsing, joining), with a server beside it that
costs CPU too and answers at once; a real server adds its latency, of which up to 16 requests are under way together.
What the list holds is compared with what it must hold, and the requests with the number that follows from N.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
from catalog import FIELDS, command, document_id, manifest_of
from moto_server import BUCKET, Server, moto_server

from rabatch.storage import listing
from rabatch.storage.catalog import Generation
from rabatch.storage.compaction import publish, write_segments
from rabatch.storage.manifest import Manifest, fingerprint_of
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import id_bytes, summarise, table_of

SIZE = 5000
PAGE = 1000
ENTRY = (
    "<Contents><Key>{}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{}&quot;</ETag>"
    f"<Size>{SIZE}</Size><StorageClass>STANDARD</StorageClass></Contents>"
)
FOLDER = f"manifests/{fingerprint_of(FIELDS[0])[:16]}"


def etag(name: str) -> str:
    return name[:32][::-1]


def key_of(number: int) -> str:
    """Name of a manifest: digests of id and text."""
    name = document_id(number).encode()
    return f"{hashlib.sha256(name).hexdigest()[:32]}-{hashlib.sha256(name).hexdigest()[:16]}.json"


class Pages(BaseHTTPRequestHandler):
    """As much of S3 as reading takes: objects, and ListObjectsV2 in pages."""

    protocol_version = "HTTP/1.1"
    root: Path
    names: list[str]
    counts: dict[str, int]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if "list-type" in query:
            self.counts["list"] = self.counts.get("list", 0) + 1
            return self.answer(self.page(query).encode())
        self.counts["get"] = self.counts.get("get", 0) + 1
        path = self.root / unquote(url.path).removeprefix("/bucket/store/")
        return self.answer(path.read_bytes() if path.is_file() else None)

    def page(self, query: dict[str, str]) -> str:
        prefix, at = query["prefix"].removeprefix("store/"), int(query.get("continuation-token", "0"))
        found, more = "", ""
        if query.get("delimiter"):
            names = sorted(p.name for p in (self.root / prefix).iterdir()) if (self.root / prefix).is_dir() else []
            found = "".join(f"<CommonPrefixes><Prefix>store/{prefix}{n}/</Prefix></CommonPrefixes>" for n in names)
        elif prefix.startswith(FOLDER):
            start = prefix.removeprefix(FOLDER + "/")
            at = at or bisect.bisect_left(self.names, start)
            stop = bisect.bisect_left(self.names, start + "~")
            names = self.names[at : min(stop, at + PAGE)]
            found = "".join(ENTRY.format(f"store/{FOLDER}/{name}", etag(name)) for name in names)
            if at + PAGE < stop:
                more = f"<NextContinuationToken>{at + PAGE}</NextContinuationToken>"
        else:
            files = sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
            found = "".join(ENTRY.format(f"store/{f}", "0" * 32) for f in files if f.startswith(prefix))
        truncated = "true" if more else "false"
        head = f"<Name>bucket</Name><IsTruncated>{truncated}</IsTruncated>{more}"
        return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{head}{found}</ListBucketResult>'

    def answer(self, body: bytes | None) -> None:
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Length", str(len(body or b"")))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")


def serve(root: str, n: int, counts: Any, ports: Any) -> None:
    names = sorted(key_of(number) for number in range(n))
    handler = type("Handler", (Pages,), {"root": Path(root), "names": names, "counts": counts})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    ports.put(server.server_port)
    server.serve_forever()


def fill_moto(n: int, backend: Any) -> None:
    """Manifests of their right names, which only the first is one of."""
    for number in range(n):
        data = real_manifest().to_json() if number == 0 else key_of(number)
        backend.put_object(BUCKET, f"store/{FOLDER}/{key_of(number)}", data.encode())


def real_manifest() -> Manifest:
    return dataclasses.replace(manifest_of(document_id(0), FIELDS[0]), created_at="2026-01-01T00:00:00+00:00")


def tag_on_moto(number: int) -> str:
    data = (real_manifest().to_json() if number == 0 else key_of(number)).encode()
    return f'{len(data)}-"{hashlib.md5(data).hexdigest()}"'


def rows(n: int, moto: bool) -> Iterator[pa.Table]:
    """The catalog of all `n`, made up but for the first."""
    template = summarise(real_manifest(), "")
    some = []
    for name, number in sorted((key_of(number), number) for number in range(n)):
        about: dict[str, Any] = {"path": f"{FOLDER}/{name}", "document_id": id_bytes(document_id(number))}
        some.append({**template, **about, "tag": tag_on_moto(number) if moto else f'{SIZE}-"{etag(name)}"'})
        if len(some) == 16_384:
            yield table_of(some)
            some = []
    if some:
        yield table_of(some)


def pages(count: int) -> int:
    return max(1, -(-count // PAGE))


def listing_requests(n: int) -> int:
    """Of a full list: of the catalog's folder and the fingerprints', of how full a piece is, and of the pieces."""
    names = sorted(key_of(number).split("-")[0] for number in range(n))

    def below(prefix: str) -> int:
        return bisect.bisect_left(names, prefix + "~") - bisect.bisect_left(names, prefix)

    digits = 0
    while digits < listing._MAX_DIGITS and below("0" * digits + "00") * 256 > listing._SHARD_FILES:
        digits += 1
    probes = sum(pages(below("0" * tried + "00")) for tried in range(digits + 1))
    pieces = ("".join(prefix) for prefix in itertools.product("0123456789abcdef", repeat=digits))
    return 2 + probes + sum(pages(below(piece)) for piece in pieces)


@contextlib.contextmanager
def own_server(n: int) -> Iterator[Server]:
    """The catalog and one manifest in files, and a server that makes up the rest."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
        store = IndexStore(folder, create=True)
        publish(store, Generation(1, tuple(write_segments(store, rows(n, moto=False)))))
        store.folder.write(real_manifest().path, real_manifest().to_json().encode())
        counts, ports = manager.dict(), multiprocessing.Queue()
        process = multiprocessing.Process(target=partial(serve, folder, n, counts, ports), daemon=True)
        process.start()
        url = f"http://127.0.0.1:{ports.get()}"

        def taken() -> dict[str, int]:
            found = dict(counts)
            counts.clear()
            return found

        yield Server({"key": "k", "secret": "s", "endpoint_url": url}, taken)
        process.terminate()


@contextlib.contextmanager
def filled_moto(n: int) -> Iterator[Server]:
    with moto_server(partial(fill_moto, n)) as server:
        store = IndexStore(f"s3://{BUCKET}/store", create=True, storage_options=server.options)
        publish(store, Generation(1, tuple(write_segments(store, rows(n, moto=True)))))
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 indexes")
    parser.add_argument("--server", choices=("own", "moto"), default="own")
    parser.add_argument("--entries", type=int, metavar="N", help="1,000,000 on our own server, 50,000 on moto's")
    arguments = parser.parse_args()
    moto = arguments.server == "moto"
    n = arguments.entries or (20_000 if arguments.quick else 50_000 if moto else 1_000_000)
    wanted, results = listing_requests(n), []
    with filled_moto(n) if moto else own_server(n) as server:
        base = ("inspect", "--store", f"s3://{BUCKET}/store", "--storage-options", json.dumps(server.options))
        for name, more, last in (
            ("inspect --document", ("--document", document_id(0)), "1 indexes"),
            ("inspect", (), f"{n} indexes"),
            ("inspect --json", ("--json",), '"damaged": []'),
        ):
            server.requests()
            seconds, cpu_s, mebibytes, printed = command(*base, *more)
            asked = server.requests()
            lists, others = asked.pop("list"), sum(asked.values())
            if last not in printed or others > 100 or (name != "inspect --document" and lists != wanted):
                sys.exit(f"{name}: {lists} lists of {wanted}, {asked}, printed {printed!r}; nothing of it counts")
            about = {"server": arguments.server, "case": name, "indexes": n, "seconds": round(seconds, 2)}
            about |= {"cpu_seconds": round(cpu_s, 2), "peak_mib": round(mebibytes)}
            results.append({**about, "list_requests": lists, "other_requests": others})
    for result in results:
        print("  ".join(f"{key} {value}" for key, value in result.items()))
    million = listing_requests(1_000_000)
    print(f"requests for a full list of 1,000,000: {million} listings, and the catalog's files")
    values = [(r["case"], r["seconds"], 2 if "document" in r["case"] else 20) for r in results]
    targets = [{"name": f"{name}, s", "value": v, "target": f"< {t}", "holds": v < t} for name, v, t in values]
    print(json.dumps({"benchmark": "catalog_s3", "rows": results, "of_a_million": million, "targets": targets}))


if __name__ == "__main__":
    main()
