"""One chunk of a prefill, at the level of kernels: attention alone, with fused top-k, and the exact KNN apart from it.

    python benchmarks/prefill_topk.py [--quick] [--device cpu|cuda] [--threads 2] [--lengths 8192,32768,131072]

On a CPU: the last 2,048 tokens of each length, at the demo model's shape (6 query heads, 2 KV heads, head_dim 64,
float32) and at 8/2 heads of 128; on CUDA: whole prefills of 32/8 heads, head_dim 128, bfloat16. A quarter of the
queries is sampled, k = 32, without the 128 first and 512 last keys. `dense` is the fastest attention that torch
offers for the same rows: of its kernels, each in the form it likes best (see `dense_kernels`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from common.measures import machine, table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rabatch.index.topk import Attended, Sample, attention_topk, topk

K, SHARE, SINK, WINDOW = 32, 4, 128, 512
CPU_ROWS = 2048
SHAPES = {"cpu": ((6, 2, 64, torch.float32), (8, 2, 128, torch.float32)), "cuda": ((32, 8, 128, torch.bfloat16),)}
LENGTHS = {"cpu": (8192, 32768, 131072), "cuda": (8192, 32768, 131072)}
LIMITS = {"cpu": 1.25, "cuda": 1.15}


class Chunk:
    """The last `n_rows` queries of `n_keys` tokens: what one call of a prefill gets."""

    def __init__(self, heads: int, kv_heads: int, dim: int, dtype: torch.dtype, n_rows: int, n_keys: int, device: str):
        make = torch.Generator().manual_seed(0)
        self.queries, self.keys, self.values = (
            torch.randn(h, n, dim, generator=make).to(device, dtype)
            for h, n in ((heads, n_rows), (kv_heads, n_keys), (kv_heads, n_keys))
        )
        self.scaling = dim**-0.5
        self.at = n_keys - n_rows
        self.rows = torch.arange(0, n_rows, SHARE)
        positions = self.at + self.rows
        self.sample = Sample(self.rows, torch.full_like(self.rows, SINK), positions - WINDOW + 1, K)

    @property
    def flops(self) -> float:
        """Of attention: two products with every visible key."""
        heads, n_rows, dim = self.queries.shape
        return 4.0 * heads * dim * n_rows * (self.at + (n_rows + 1) / 2)

    def plain(self) -> Attended:
        return attention_topk(self.queries, self.keys, self.values, scaling=self.scaling)

    def fused(self) -> Attended:
        return attention_topk(self.queries, self.keys, self.values, scaling=self.scaling, sample=self.sample)

    def knn(self) -> tuple[Tensor, Tensor]:
        picked = self.queries.index_select(1, self.rows.to(self.queries.device))
        positions = (self.at + self.rows - WINDOW).to(self.queries.device)
        n_keys = self.keys.shape[1]
        return topk(picked, self.keys, positions, k=K, scaling=self.scaling, key_range=(SINK, n_keys))


def dense_kernels(chunk: Chunk) -> dict[str, Callable[[], Tensor]]:
    """torch's kernels for these rows. Keys are repeated beforehand where a kernel cannot share them."""
    heads, _, _ = chunk.queries.shape
    group = heads // chunk.keys.shape[0]
    query = chunk.queries[None]
    keys, values = (t.repeat_interleave(group, 0)[None] for t in (chunk.keys, chunk.values))
    if query.device.type == "cpu":
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        if chunk.at == 0:
            return {"flash, causal": lambda: kernel(query, keys, values, 0.0, True, scale=chunk.scaling)[0]}

        def two_parts() -> Tensor:  # what came before is seen by all, the chunk itself is causal
            before = kernel(query, keys[:, :, : chunk.at], values[:, :, : chunk.at], scale=chunk.scaling)
            own = kernel(query, keys[:, :, chunk.at :], values[:, :, chunk.at :], 0.0, True, scale=chunk.scaling)
            lse = torch.logaddexp(before[1], own[1])
            parts = (p[0] * (p[1] - lse).exp()[..., None] for p in (before, own))
            return sum(parts)  # type: ignore[return-value]

        return {"flash, in two parts": two_parts}  # with a mask it takes up to twice as long
    kernels: dict[str, Callable[[], Tensor]] = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):

        def call(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=chunk.scaling)

        try:
            call()
        except RuntimeError as error:
            print(f"{backend.name} does not run here: {str(error).splitlines()[0][:80]}")
        else:
            kernels[backend.name.lower()] = call
    return kernels


def check(chunk: Chunk, dense: Tensor) -> None:
    """Refuse to time what is wrong: outputs against torch's, top-k against the separate exact KNN, by score."""
    found = chunk.fused()
    half = chunk.queries.dtype != torch.float32
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if half else {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(found.out.float(), dense[0].float(), **tolerance)
    if not torch.equal(found.out, chunk.plain().out):
        raise AssertionError("keeping the top-k changes attention")
    ids, scores = chunk.knn()
    torch.testing.assert_close(found.scores, scores, atol=1e-3 if half else 1e-4, rtol=1e-3 if half else 1e-4)
    agree = (found.ids.sort(-1).values == ids.sort(-1).values).all(-1).float().mean()
    if agree < (0.9 if half else 0.999):  # rounding of scores that lie closer than it
        raise AssertionError(f"only {agree:.3f} of the top-{K} sets are the exact ones")


def timed(function: Callable[[], Any], device: str) -> float:
    began = time.perf_counter()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="8K keys only")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="", help="numbers of keys, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = [int(n) for n in args.lengths.split(",")] if args.lengths else list(LENGTHS[args.device])
    rows = []
    for shape in SHAPES[args.device]:
        for n_keys in [8192] if args.quick else lengths:
            n_rows = n_keys if args.device == "cuda" else min(CPU_ROWS, n_keys)
            rows.append(measure(Chunk(*shape, n_rows, n_keys, args.device), shape, n_keys, args.device))
            print(rows[-1], file=sys.stderr)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{machine(args.threads)}, {device}\n")
    print(table(rows, list(rows[0])))
    limit = LIMITS[args.device]
    targets = [
        {
            "name": f"fused / dense, {row['keys']} keys, {row['heads']} heads",
            "value": row["fused / dense"],
            "target": limit,
            "holds": row["fused / dense"] <= limit,
        }
        for row in rows
        if args.device == "cpu" or row["keys"] in (32768, 131072)
    ]
    print()
    print(table(targets, ["name", "value", "target", "holds"]))
    print(json.dumps({"benchmark": "prefill_topk", "device": device, "rows": rows, "targets": targets}))


def measure(chunk: Chunk, shape: tuple[Any, ...], n_keys: int, device: str) -> dict[str, Any]:
    """One row of the table. The ways alternate, so that a machine that slows down slows all of them."""
    kernels = dense_kernels(chunk)
    check(chunk, next(iter(kernels.values()))())
    ways: dict[str, Callable[[], Any]] = {**kernels, "attention": chunk.plain, "fused": chunk.fused, "knn": chunk.knn}
    seconds = dict.fromkeys(ways, math.inf)
    for _ in range(4):  # the first is the warm-up; being slower, it does not count
        for name, way in ways.items():
            seconds[name] = min(seconds[name], timed(way, device))
    fastest = min(kernels, key=lambda name: seconds[name])
    dense = seconds[fastest]
    heads, kv_heads, dim, dtype = shape
    return {
        "keys": n_keys,
        "heads": f"{heads}/{kv_heads} x {dim}",
        "dtype": str(dtype).removeprefix("torch."),
        "fastest dense": fastest,
        "dense ms": round(1e3 * dense, 1),
        "attention ms": round(1e3 * seconds["attention"], 1),
        "fused ms": round(1e3 * seconds["fused"], 1),
        "KNN ms": round(1e3 * seconds["knn"], 1),
        "attention TFLOP/s": round(chunk.flops / seconds["attention"] / 1e12, 3),
        "attention / dense": round(seconds["attention"] / dense, 3),
        "fused / dense": round(seconds["fused"] / dense, 3),
        "(dense + KNN) / dense": round(1 + seconds["knn"] / dense, 3),
    }


if __name__ == "__main__":
    main()
