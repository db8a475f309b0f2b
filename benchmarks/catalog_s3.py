"""Listing a store of a million indexes on S3.

    python benchmarks/catalog_s3.py [--quick]

The server is a small one of our own on this machine: it makes up the pages of the listing and serves the catalog from
files. So the figures are those of the client (requests, parsing, joining), with a server beside it that costs some CPU
too and answers at once; a real server adds its latency, of which up to 16 requests are under way together. What the
list holds is compared with what it must hold.
"""

from __future__ import annotations

import argparse
import bisect
import hashlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
from catalog import FIELDS, command, document_id, manifest_of

from rabatch.storage.catalog import Generation
from rabatch.storage.compaction import publish, write_segments
from rabatch.storage.manifest import fingerprint_of
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


class Server(BaseHTTPRequestHandler):
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
    handler = type("Handler", (Server,), {"root": Path(root), "names": names, "counts": counts})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    ports.put(server.server_port)
    server.serve_forever()


def rows(n: int) -> Iterator[pa.Table]:
    """The catalog of all `n`, made up but for the first."""
    template = summarise(manifest_of(document_id(0), FIELDS[0]), "")
    some = []
    for name, number in sorted((key_of(number), number) for number in range(n)):
        about: dict[str, Any] = {"path": f"{FOLDER}/{name}", "document_id": id_bytes(document_id(number))}
        some.append({**template, **about, "tag": f'{SIZE}-"{etag(name)}"'})
        if len(some) == 16_384:
            yield table_of(some)
            some = []
    if some:
        yield table_of(some)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 indexes")
    n = 20_000 if parser.parse_args().quick else 1_000_000
    results = []
    with tempfile.TemporaryDirectory() as folder, multiprocessing.Manager() as manager:
        store = IndexStore(folder, create=True)
        publish(store, Generation(1, tuple(write_segments(store, rows(n)))))
        manifest = manifest_of(document_id(0), FIELDS[0])
        store.folder.write(manifest.path, manifest.to_json().encode())
        counts, ports = manager.dict(), multiprocessing.Queue()
        server = multiprocessing.Process(target=partial(serve, folder, n, counts, ports), daemon=True)
        server.start()
        options = {"key": "k", "secret": "s", "endpoint_url": f"http://127.0.0.1:{ports.get()}"}
        base = ("inspect", "--store", "s3://bucket/store", "--storage-options", json.dumps(options))
        for name, more, last in (
            ("inspect --document", ("--document", document_id(0)), "1 indexes"),
            ("inspect", (), f"{n} indexes"),
            ("inspect --json", ("--json",), '"damaged": []'),
        ):
            counts.clear()
            seconds, cpu_s, mebibytes, printed = command(*base, *more)
            if last not in printed or counts.get("get", 0) > 100:
                sys.exit(f"{name}: {dict(counts)}, printed {printed!r}; nothing of it counts")
            results.append(
                {
                    **{"case": name, "indexes": n, "seconds": round(seconds, 2), "cpu_seconds": round(cpu_s, 2)},
                    **{"peak_mib": round(mebibytes), "list_requests": counts["list"], "other": counts.get("get", 0)},
                }
            )
            time.sleep(0.1)
        server.terminate()
    for result in results:
        print("  ".join(f"{key} {value}" for key, value in result.items()))
    values = [(r["case"], r["seconds"], 2 if "document" in r["case"] else 20) for r in results]
    targets = [{"name": f"{name}, s", "value": v, "target": f"< {t}", "holds": v < t} for name, v, t in values]
    print(json.dumps({"benchmark": "catalog_s3", "rows": results, "targets": targets}))


if __name__ == "__main__":
    main()
