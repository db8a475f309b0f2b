"""Write and read throughput of the stored format on a local disk, one process; and 200 damaged files, all refused.

    python benchmarks/storage.py [--quick]

What was read is compared with what was written before anything is timed. Reads come from the page cache, so the
figures are those of the code, not of a disk or network; writes are flushed to the disk. GB = 10^9 bytes of keys, values
and graph. `gb_s` is by the clock. `gb_cpu_s` is by the seconds that all threads of the process were on a core: what a
target per core is about, whatever else the machine does; waiting for the disk is not in it. Targets are of the first
case, what a build stores by default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rabatch.errors import StoreError
from rabatch.storage.manifest import Geometry, Manifest, fingerprint_of, utc_now
from rabatch.storage.parts import LayerBlock, TokensBlock, decode_layer, encode_layer
from rabatch.storage.store import IndexStore

DOCUMENT = "benchmark"


def make_block(tokens: int, n_heads: int, head_dim: int, dtype: torch.dtype, degree: int) -> LayerBlock:
    """[n_heads, tokens, head_dim] of the kind a model makes: normal around a mean of each channel."""
    torch_random, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    mean = 2 * torch.randn(n_heads, 1, head_dim, generator=torch_random)
    keys = torch.randn(n_heads, tokens, head_dim, generator=torch_random) + mean
    values = torch.randn(n_heads, tokens, head_dim, generator=torch_random)
    return LayerBlock(
        layer=0,
        head_start=0,
        positions=np.arange(tokens, dtype=np.int32),
        keys=keys.to(dtype),
        values=values.to(dtype),
        neighbors=random.integers(0, tokens - 1, (n_heads, tokens - 1, degree), dtype=np.int32) if degree else None,
        entries=random.integers(0, tokens - 1, (n_heads, 16), dtype=np.int32) if degree else None,
    )


def commit(store: IndexStore, block: LayerBlock, document: str = DOCUMENT) -> Manifest:
    """A one-layer document that consists of the block, a part per head if it is not the benchmark's own."""
    n_heads, tokens, head_dim = block.keys.shape
    fields = {"benchmark": "storage"}
    where = {"document_id": document, "fingerprint": fingerprint_of(fields), "attempt": store.new_attempt()}
    blocks = [block] if document == DOCUMENT else list(block.split(1))
    ids = np.arange(tokens)
    narrow = ids.astype(np.int32)
    empty = TokensBlock(positions=narrow, token_ids=narrow, char_start=ids, char_end=ids + 1)
    geometry = Geometry(
        n_layers=1,
        n_kv_heads=n_heads,
        n_query_heads=n_heads,
        head_dim=head_dim,
        kv_dtype=str(block.keys.dtype).removeprefix("torch."),
        sink_tokens=0,
        window_tokens=1,
        index="none" if block.neighbors is None else "graph",
        degree=0 if block.neighbors is None else int(block.neighbors.shape[2]),
        sliding_windows=(0,),
    )
    return store.commit(
        Manifest(
            document_id=document,
            content_sha256=hashlib.sha256(where["attempt"].encode()).hexdigest(),
            fingerprint=where["fingerprint"],
            fingerprint_fields=fields,
            context_tokens=tokens,
            text_chars=tokens,
            created_at=utc_now(),
            geometry=geometry,
            parts=(store.put_tokens(empty, **where), *(store.put_layer(some, **where) for some in blocks)),
        )
    )


def best_s(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Seconds of the fastest of several calls, after one that does not count: by the clock, and of the cores."""
    call()
    clock, core = [], []
    for _ in range(repeats):
        start, on_core = time.perf_counter(), time.process_time()
        call()
        clock.append(time.perf_counter() - start)
        core.append(time.process_time() - on_core)
    return min(clock), min(core)


def measure(url: str, name: str, block: LayerBlock, repeats: int) -> dict[str, Any]:
    store = IndexStore(url, create=True)
    manifest = commit(store, block)
    remote = IndexStore(f"memory://{uuid.uuid4().hex}", create=True, cache=Path(url) / "cache")
    remote_manifest = commit(remote, block)
    if not remote.read_layer(remote_manifest, 0, check="once").equals(block):
        sys.exit(f"{name}: what the cache gave is not what was written; nothing was timed")
    for stored in remote_manifest.parts:  # only the cache has them now, and memory has room
        remote.folder.delete(stored.path)
    for check in (True, False, "once"):
        if not store.read_layer(manifest, 0, check=check).equals(block):
            sys.exit(f"{name}: what was read is not what was written; nothing was timed")
    part = manifest.parts[1]
    named = {"fingerprint": manifest.fingerprint, "document_key": "0" * 32}
    data = encode_layer(block, **named)
    raw = 2 * block.keys.numel() * block.keys.element_size()
    raw += 0 if block.neighbors is None else block.neighbors.size * (2 if block.index_rows <= 65534 else 4)

    def put() -> None:
        attempt = store.new_attempt()
        new = store.put_layer(block, document_id=DOCUMENT, fingerprint=manifest.fingerprint, attempt=attempt)
        store.folder.delete(new.path)

    def put_without_digest() -> None:
        path = f"parts/{uuid.uuid4().hex}.parquet"
        store.folder.write(path, memoryview(encode_layer(block, **named)))
        store.folder.delete(path)

    one, gb = range(0, 1), raw / 1e9
    calls: dict[str, Callable[[], Any]] = {
        "encode": lambda: encode_layer(block, **named),
        "write_without_digest": put_without_digest,
        "write": put,
        "decode": lambda: decode_layer(data, name="part"),
        "sha256": lambda: hashlib.sha256(data).digest(),
        "read_checked": lambda: store.read_layer(manifest, 0),
        "read_once_checked": lambda: store.read_layer(manifest, 0, check="once"),
        "read_cached": lambda: remote.read_layer(remote_manifest, 0, check="once"),
        "read_unchecked": lambda: store.read_layer(manifest, 0, check=False),
    }
    rates = {}
    for what, call in calls.items():
        clock_s, core_s = best_s(call, repeats)
        rates |= {f"{what}_gb_s": round(gb / clock_s, 2), f"{what}_gb_cpu_s": round(gb / core_s, 2)}
    one_s, _ = best_s(lambda: store.read_layer(manifest, 0, heads=one, check=False), repeats)
    return {
        "case": name,
        "raw_mb": round(raw / 1e6, 1),
        "bytes_per_token_and_head": round(part.bytes / block.rows / block.n_heads, 1),
        "overhead_percent": round(100 * (part.bytes / raw - 1), 2),
        **rates,
        "one_head_unchecked_ms": round(1e3 * one_s, 2),
    }


def damage(data: bytes, other: bytes, choose: random.Random) -> tuple[str, bytes | None]:
    """One kind of damage, by chance, and what it leaves of a file; None: nothing."""
    at, kind = choose.randrange(len(data)), choose.choice(("bit", "bytes", "truncation", "growth", "swap", "deletion"))
    if kind == "bit":
        return kind, data[:at] + bytes([data[at] ^ 1 << choose.randrange(8)]) + data[at + 1 :]
    if kind == "bytes":
        noise = choose.randbytes(choose.randrange(1, 4096))
        return kind, data[:at] + noise[: len(data) - at] + data[at + len(noise) :]
    left = {"truncation": data[:at], "growth": data + choose.randbytes(at + 1), "swap": other, "deletion": None}
    return kind, left[kind]


def refused(url: str, count: int) -> dict[str, Any]:
    """Damage parts and manifests of two documents one after another, and open what they belong to."""
    store, choose = IndexStore(url, create=True), random.Random(0)
    blocks = {name: make_block(1024, 4, 64, torch.bfloat16, 16) for name in ("a", "b")}
    manifests = {name: commit(store, block, name) for name, block in blocks.items()}
    files = [(name, path) for name, m in manifests.items() for path in (m.path, *(part.path for part in m.parts))]
    served, named, kinds = 0, 0, dict.fromkeys(("bit", "bytes", "truncation", "growth", "swap", "deletion"), 0)
    tried = 0
    while tried < count:
        name, path = choose.choice(files)
        data = store.folder.read(path)
        others = [p for _, p in files if p != path and p.split("/")[0] == path.split("/")[0]]
        kind, left = damage(data, store.folder.read(choose.choice(others)), choose)
        if left == data:
            continue
        tried += 1
        kinds[kind] += 1
        store.folder.delete(path) if left is None else store.folder.write(path, left)
        try:
            found = store.find(name)
            if found:  # none: the manifest is gone, and with it the document
                store.read_tokens(found[0], check="once")
                store.read_layer(found[0], 0, check="once")
                served += 1
            else:
                named += path == manifests[name].path and left is None
        except StoreError as error:
            named += path in str(error)
        store.folder.write(path, data)
    for name, block in blocks.items():
        if not store.read_layer(store.find(name)[0], 0).equals(block):
            sys.exit("a sound document is not served any more")
    return {"damaged": tried, "refused_by_name": named, "served": served, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small layer, two repeats")
    parser.add_argument("--threads", type=int, default=1, help="of Arrow and torch (default 1)")
    args = parser.parse_args()
    import pyarrow as pa

    pa.set_cpu_count(args.threads)
    torch.set_num_threads(args.threads)
    tokens, repeats = (8192, 2) if args.quick else (65536, 5)
    cases = [
        ("bfloat16, graph of degree 32", torch.bfloat16, 128, 32),
        ("bfloat16, no graph", torch.bfloat16, 128, 0),
        ("float32, graph of degree 32", torch.float32, 128, 32),
        ("bfloat16, head_dim 64, degree 32", torch.bfloat16, 64, 32),
    ]
    rows = []
    with tempfile.TemporaryDirectory() as url:
        for name, dtype, head_dim, degree in cases:
            rows.append(measure(f"{url}/times", name, make_block(tokens, 8, head_dim, dtype, degree), repeats))
        harm = refused(f"{url}/damage", 200)
    print(f"8 KV heads x {tokens} tokens; {args.threads} thread(s); GB/s unless said otherwise")
    width = max(len(row["case"]) for row in rows)
    for key in rows[0]:
        if key != "case":
            print(f"  {key}")
            for row in rows:
                print(f"    {row['case']:<{width}}  {row[key]:>8}")
    print(f"  damage: {harm}")
    wanted = [
        ("opening, digest known, GB/s per core", rows[0]["read_once_checked_gb_cpu_s"], 1.5),
        ("opening for the first time, digest taken, GB/s per core", rows[0]["read_checked_gb_cpu_s"], 1.5),
        ("writing without checksum, GB/s per core", rows[0]["write_without_digest_gb_cpu_s"], 0.5),
        ("writing with checksum, GB/s per core", rows[0]["write_gb_cpu_s"], 0.35),
        ("of 200 random corruptions, refused by name", harm["refused_by_name"], 200),
        ("of 200 random corruptions, not served", 200 - harm["served"], 200),
    ]
    targets = [
        {"name": name, "value": value, "target": least, "holds": value >= least} for name, value, least in wanted
    ]
    for target in targets:
        print(
            f"  {'holds' if target['holds'] else 'MISSED':<7}{target['name']}: {target['value']} ({target['target']})"
        )
    print(json.dumps({"benchmark": "storage", "rows": rows, "damage": harm, "targets": targets}))


if __name__ == "__main__":
    main()
