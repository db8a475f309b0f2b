"""Listing and compacting a store of a million indexes.

    python benchmarks/catalog.py [--quick]

The store lies on a local disk. Its manifests are files of the right names, so that listing them costs what it costs,
but all except a few are empty: their rows in the catalog are made up and written by the writer that compaction uses.
Those few are real manifests; some are committed, withdrawn and written anew after the catalog was made. Before
anything is timed, what the catalog yields is compared with what it must yield.

Each figure is of a command of its own: wall time from its start to its end, interpreter included, and the most memory
it had. Files come from the page cache. What a server adds is in benchmarks/catalog_s3.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rabatch.storage.catalog import Counts, Generation, entries
from rabatch.storage.compaction import publish, write_segments
from rabatch.storage.listing import Listed
from rabatch.storage.manifest import Geometry, Manifest, Part, document_key, fingerprint_of, utc_now
from rabatch.storage.store import IndexStore
from rabatch.storage.summaries import id_bytes, summarise, table_of

REAL = 40  # of these the first ten are withdrawn later, the next ten written anew, the last ten committed last
CHANGED = 10
# `ru_maxrss` would not do: it begins at the memory of the process that starts this one.
COMMAND = """
import sys
from rabatch.cli import main
code = main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
sys.exit(code)
"""
FIELDS = [{"model": {"weights": str(i)}, "build": i} for i in range(2)]


def manifest_of(document_id: str, fields: dict[str, Any]) -> Manifest:
    """A manifest of one layer and head, complete but for its parts."""
    fingerprint = fingerprint_of(fields)
    folder = f"parts/{fingerprint[:16]}/{document_key(document_id)}/{hashlib.md5(document_id.encode()).hexdigest()}"
    about: dict[str, Any] = {"bytes": 1000, "sha256": "0" * 64, "rows": 100}
    shape = {"n_layers": 1, "n_kv_heads": 1, "n_query_heads": 1, "head_dim": 2, "kv_dtype": "bfloat16"}
    static: dict[str, Any] = {"sink_tokens": 1, "window_tokens": 1, "index": "graph", "degree": 32}
    return Manifest(
        document_id=document_id,
        content_sha256=hashlib.sha256(document_id.encode()).hexdigest(),
        fingerprint=fingerprint,
        fingerprint_fields=fields,
        context_tokens=100,
        text_chars=400,
        created_at=utc_now(),
        geometry=Geometry(**shape, **static, sliding_windows=(0,)),
        parts=(
            Part(kind="tokens", path=f"{folder}/tokens-00000000.parquet", **about),
            Part(kind="layer", path=f"{folder}/layer-000.parquet", layer=0, head_start=0, head_stop=1, **about),
        ),
        metadata={"title": f"Title of {document_id}", "year": 2026},
        stats={"model": "some/model"},
    )


def document_id(number: int) -> str:
    return f"folder-{number % 97}/document-{number:07d}.txt"


def fill(store: IndexStore, n: int) -> None:
    """Files of `n` manifests; the first `REAL` less the last ten of those are real."""
    for fields in FIELDS:
        (Path(store.url) / "manifests" / fingerprint_of(fields)[:16]).mkdir(parents=True)
    prefixes = [f"{store.url}/manifests/{fingerprint_of(fields)[:16]}/" for fields in FIELDS]
    for number in range(n):
        name = document_id(number)
        if number < REAL - CHANGED:
            manifest = manifest_of(name, FIELDS[number % 2])
            store.folder.write(manifest.path, manifest.to_json().encode())
        else:
            content = hashlib.sha256(name.encode()).hexdigest()[:16]
            os.close(os.open(f"{prefixes[number % 2]}{document_key(name)}-{content}.json", os.O_CREAT | os.O_WRONLY))


def made_up(store: IndexStore, listing: Iterator[Listed], n: int) -> Iterator[pa.Table]:
    """The rows that a compaction would have made, had the files been manifests."""
    numbers = {document_key(document_id(number)): number for number in range(n)}
    templates = [summarise(manifest_of("x", fields), "") for fields in FIELDS]
    rows = []
    for file in listing:
        number = numbers[file.path.split("/")[-1].split("-")[0]]
        if number < REAL - CHANGED:
            (manifest,) = store.read_manifests([file.path])
            row = summarise(manifest, file.tag)
        else:
            name = document_id(number)
            attempt = (
                f"{file.path.replace('manifests', 'parts').split('-')[0]}/{hashlib.md5(name.encode()).hexdigest()}"
            )
            changed: dict[str, Any] = {"path": file.path, "tag": file.tag, "document_id": id_bytes(name)}
            changed |= {"content_sha256": hashlib.sha256(name.encode()).hexdigest(), "attempts": [attempt]}
            changed |= {"context_tokens": 1000 + number % 100_000, "stored_bytes": 10**6 + number}
            row = {**templates[number % 2], **changed, "metadata": json.dumps({"title": f"Title of {name}"})}
        rows.append(row)
        if len(rows) == 16_384:
            yield table_of(rows)
            rows = []
    yield table_of(rows)


def prepare(url: str, n: int) -> set[str]:
    """A store with a catalog that is a little out of date; the paths of the manifests it holds."""
    store = IndexStore(url, create=True)
    fill(store, n)
    publish(store, Generation(1, tuple(write_segments(store, made_up(store, store.folder.walk("manifests"), n)))))
    real = [manifest_of(document_id(number), FIELDS[number % 2]) for number in range(REAL - CHANGED)]
    for manifest in real[:CHANGED]:
        store.withdraw(manifest.path)
    for manifest in real[CHANGED : 2 * CHANGED]:
        renewed = dataclasses.replace(manifest, created_at="2031-01-01T00:00:00+00:00")
        store.folder.write(manifest.path, renewed.to_json().encode())
    for number in range(CHANGED):
        manifest = manifest_of(f"committed last {number}", FIELDS[0])
        store.folder.write(manifest.path, manifest.to_json().encode())
    return check(store, n)


def check(store: IndexStore, n: int) -> set[str]:
    counts, paths, renewed = Counts(), set(), 0
    for table in entries(store, columns=["created_at"], counts=counts):
        paths |= set(table["path"].to_pylist())
        renewed += sum(text.startswith("2031") for text in table["created_at"].to_pylist())
    there = {
        f"manifests/{folder.name}/{entry.name}"
        for folder in os.scandir(f"{store.url}/manifests")
        for entry in os.scandir(folder.path)
    }
    if paths != there or renewed != CHANGED or (counts.kept, counts.read) != (n - 2 * CHANGED, 2 * CHANGED):
        sys.exit(f"the list is not what the manifests say ({counts}, {renewed} renewed); nothing was timed")
    return paths


def command(*words: str) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds, MiB at most, and the last 200 characters of what a command printed."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as peak:
        process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], stdout=out, stderr=peak)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        peak.seek(0)
        printed = peak.read().decode()
        if process.returncode:
            sys.exit(f"rabatch {' '.join(words)}: exit code {process.returncode}: {printed}")
        out.seek(max(0, out.seek(0, 2) - 200))
        return seconds, usage.ru_utime + usage.ru_stime, int(printed.split()[-2]) / 1024, out.read().decode()


def measure(n: int, folder: str | None) -> dict[str, dict[str, float]]:
    """Figures of a new store."""
    with tempfile.TemporaryDirectory(dir=folder) as url:
        begun = time.perf_counter()
        paths = prepare(url, n)
        print(f"store of {n:,} made and checked in {time.perf_counter() - begun:.0f} s", file=sys.stderr)
        return timed(url, n, len(paths))


def timed(url: str, n: int, listed: int) -> dict[str, dict[str, float]]:
    """Figures of a store that `prepare` made; its catalog is brought up to date by it."""
    one = ("inspect", "--store", url, "--document", document_id(REAL - CHANGED - 1))
    found = {}
    for name, words, last in (
        ("inspect --document", one, "1 indexes"),
        ("inspect --document, again", one, "1 indexes"),
        ("inspect", ("inspect", "--store", url), f"{listed} indexes"),
        ("inspect --json", ("inspect", "--store", url, "--json"), '"damaged": []'),
        ("inspect --newer-than 1h --index none", (*one[:3], "--newer-than", "1h", "--index", "none"), "0 indexes"),
        ("compact", ("compact", "--store", url), f"{listed:,} indexes, {2 * CHANGED} manifests read"),
    ):
        seconds, cpu_s, mebibytes, printed = command(*words)
        if last not in printed:
            sys.exit(f"{name}: printed {printed!r}; nothing of it counts")
        about = {"seconds": round(seconds, 2), "cpu_seconds": round(cpu_s, 2), "peak_mib": round(mebibytes)}
        print(name, about, file=sys.stderr)
        found[name] = about
    size = sum(file.bytes for file in IndexStore(url).folder.files("catalog")) / 2  # two generations
    return {**found, "catalog": {"bytes_per_index": round(size / n, 1)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 indexes")
    parser.add_argument("--folder", help="where the store is made (the system's folder for temporary files)")
    arguments = parser.parse_args()
    sizes = (5_000, 20_000) if arguments.quick else (250_000, 1_000_000)
    report({n: measure(n, arguments.folder) for n in sizes})


def report(results: dict[int, dict[str, dict[str, float]]]) -> None:
    """Print the table and the JSON line; figures of a smaller and of a larger store."""
    small, large = results.values()
    print(f"{'':<38}" + "".join(f"{n:>27,} indexes" for n in results))
    for name in large:
        if name != "catalog":
            each = [r[name] for r in results.values()]
            cells = (f"{r['seconds']:>9.2f} s {r['cpu_seconds']:>7.2f} s CPU {r['peak_mib']:>5} MiB" for r in each)
            print(f"{name:<38}" + "".join(cells))
    print(f"catalog: {large['catalog']['bytes_per_index']} bytes per index")
    memory = large["compact"]["peak_mib"] / small["compact"]["peak_mib"]
    values = [
        ("inspect of one document, s", large["inspect --document, again"]["seconds"], 2),
        ("full list as text, s", large["inspect"]["seconds"], 20),
        ("full list as JSON, s", large["inspect --json"]["seconds"], 20),
        ("memory of a compaction, of that for a quarter of the indexes", round(memory, 2), 1.5),
    ]
    targets = [{"name": name, "value": v, "target": f"< {t}", "holds": v < t} for name, v, t in values]
    rows = [{"indexes": n, **result} for n, result in results.items()]
    print(json.dumps({"benchmark": "catalog", "rows": rows, "targets": targets}))


if __name__ == "__main__":
    main()
