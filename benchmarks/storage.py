"""Write and read throughput of the stored format on a local disk, one process.

    python benchmarks/storage.py [--quick]

What was read is compared with what was written before anything is timed. Reads come from the page cache, so the
figures are those of the code, not of a disk or network. GB = 10^9 bytes of keys, values and graph.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

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


def commit(store: IndexStore, block: LayerBlock) -> Manifest:
    """A one-layer document that consists of the block."""
    n_heads, tokens, head_dim = block.keys.shape
    fields = {"benchmark": "storage"}
    where = {"document_id": DOCUMENT, "fingerprint": fingerprint_of(fields), "attempt": store.new_attempt()}
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
            document_id=DOCUMENT,
            content_sha256=hashlib.sha256(where["attempt"].encode()).hexdigest(),
            fingerprint=where["fingerprint"],
            fingerprint_fields=fields,
            context_tokens=tokens,
            text_chars=tokens,
            created_at=utc_now(),
            geometry=geometry,
            parts=(store.put_tokens(empty, **where), store.put_layer(block, **where)),
        )
    )


def best_s(call: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(url: str, name: str, block: LayerBlock, repeats: int) -> dict[str, Any]:
    store = IndexStore(url, create=True)
    manifest = commit(store, block)
    for check in (True, False):
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

    gb = raw / 1e9
    one = range(0, 1)
    return {
        "case": name,
        "raw_mb": round(raw / 1e6, 1),
        "bytes_per_token_and_head": round(part.bytes / block.rows / block.n_heads, 1),
        "overhead_percent": round(100 * (part.bytes / raw - 1), 2),
        "encode_gb_s": round(gb / best_s(lambda: encode_layer(block, **named), repeats), 2),
        "write_gb_s": round(gb / best_s(put, repeats), 2),
        "decode_gb_s": round(gb / best_s(lambda: decode_layer(data, name="part"), repeats), 2),
        "read_checked_gb_s": round(gb / best_s(lambda: store.read_layer(manifest, 0), repeats), 2),
        "read_unchecked_gb_s": round(gb / best_s(lambda: store.read_layer(manifest, 0, check=False), repeats), 2),
        "one_head_unchecked_ms": round(
            1e3 * best_s(lambda: store.read_layer(manifest, 0, heads=one, check=False), repeats), 2
        ),
    }


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
            rows.append(measure(url, name, make_block(tokens, 8, head_dim, dtype, degree), repeats))
    print(f"8 KV heads x {tokens} tokens; {args.threads} thread(s); GB/s unless said otherwise")
    width = max(len(row["case"]) for row in rows)
    for key in rows[0]:
        if key != "case":
            print(f"  {key}")
            for row in rows:
                print(f"    {row['case']:<{width}}  {row[key]:>8}")
    print(json.dumps({"benchmark": "storage", "rows": rows, "targets": []}))


if __name__ == "__main__":
    main()
