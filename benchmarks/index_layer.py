"""One layer of one decode step: index search and sparse attention beside dense attention over the same context.

    python benchmarks/index_layer.py [--quick] [--threads 2] [--keys 131072] [--cache DIR]

8 KV heads, 32 query heads, head_dim 128. Both share the context between the questions of a batch: dense attention
reads keys and values once for all of them (torch SDPA, the query heads of a group as rows, bfloat16 and float32).
Prints the time of both per batch size, and the size from which dense attention wins: what a planner has to know.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.heads import TOP_K, Head, synthetic_heads
from common.measures import best_seconds, machine, table
from torch import Tensor

from rabatch.attention.merge import dense_partial
from rabatch.attention.sets import Found, StaticSet
from rabatch.attention.step import attend_compiled
from rabatch.index.auto import AutoIndex
from rabatch.index.mass import recovered_mass

KV_HEADS, GROUP, HEAD_DIM, STATIC = 8, 4, 128, 640
BATCHES = (1, 2, 4, 8, 16, 32, 64)


class Layer:
    """Keys, values, index and queries of one layer; the first `STATIC` rows of the values are the static set's."""

    def __init__(self, heads: list[Head], threads: int) -> None:
        picked = [heads[number % len(heads)] for number in range(KV_HEADS)]
        self.keys = np.stack([head.keys for head in picked])
        rng = np.random.default_rng(0)
        noise = rng.standard_normal((KV_HEADS, STATIC, HEAD_DIM), dtype=np.float32)
        static_keys = torch.from_numpy(self.keys.mean(axis=1, keepdims=True) + noise)
        context = torch.cat([static_keys, torch.from_numpy(self.keys)], dim=1)
        self.dense_keys = {torch.bfloat16: context.bfloat16(), torch.float32: context}
        values = torch.from_numpy(rng.standard_normal(context.shape, dtype=np.float32))
        self.dense_values = {torch.bfloat16: values.bfloat16(), torch.float32: values}
        self.static_set = context[:, :STATIC].clone(), values[:, :STATIC].clone()  # in float32, as the engine keeps it
        self.static = StaticSet(*self.static_set, torch.arange(STATIC))
        self.queries = np.stack([head.queries for head in picked])
        samples = [head.sample for head in picked]
        self.index = AutoIndex.build(self.keys, samples, threads=threads, exact="bfloat16")  # as the context is held
        self.scaling = HEAD_DIM**-0.5

    def rows(self, batch: int) -> np.ndarray:
        """Queries [KV_HEADS, batch x GROUP, HEAD_DIM]."""
        return np.ascontiguousarray(self.queries[:, : batch * GROUP])

    def sparse(self, rows: np.ndarray) -> Tensor:
        """What a decode step does: the static set exactly, the top-k through the index, in one pass."""
        values = self.dense_values[torch.bfloat16]
        found = self.index.search(rows, k=TOP_K)
        ids, scores = torch.from_numpy(found.ids).long(), torch.from_numpy(found.scores)
        batch = rows.shape[1] // GROUP
        nothing = torch.empty(batch, KV_HEADS, 0, HEAD_DIM)
        return attend_compiled(
            torch.from_numpy(rows).view(KV_HEADS, batch, GROUP, 1, HEAD_DIM),
            self.static,
            lambda: Found(scores, torch.where(ids >= 0, ids + STATIC, ids)),
            values,
            (nothing, nothing),
            torch.zeros(batch, dtype=torch.int64),
            torch.full((batch, 1), -1),
            torch.ones(batch, dtype=torch.int64),
            scaling=self.scaling,
            softcap=None,
            goal=1.0,
            mass=np.zeros((batch, values.shape[1]), np.float32),
        ).out

    def dense(self, rows: np.ndarray, dtype: torch.dtype) -> Tensor:
        """All keys, by torch's own kernel."""
        return torch.nn.functional.scaled_dot_product_attention(
            torch.from_numpy(rows).to(dtype)[None], self.dense_keys[dtype][None], self.dense_values[dtype][None]
        )[0]

    def mass(self, rows: np.ndarray) -> float:
        """Share of the ideal top-k mass that the index finds; refuses to go on where a result is wrong."""
        found = self.index.search(rows, k=TOP_K)
        exact = torch.from_numpy(rows) @ torch.from_numpy(self.keys).transpose(1, 2)
        worth = torch.gather(exact, 2, torch.from_numpy(found.ids).long()).numpy()
        lengths = np.linalg.norm(rows, axis=2)[:, :, None] * np.linalg.norm(self.keys, axis=2).max()
        if (np.abs(found.scores - worth) / lengths).max() > 2**-8:
            raise AssertionError("a score is not q . k to the precision of bfloat16")
        ideal = exact.topk(TOP_K, dim=2)[0].numpy()
        share = float(recovered_mass(found.scores, ideal, scaling=self.scaling).mean())
        if share < 0.95:
            raise AssertionError(f"the index finds {share:.3f} of the mass: nothing to be proud of, nothing to time")
        # With every key retrieved, sparse attention is dense attention.
        static = dense_partial(
            torch.from_numpy(rows[:, :4]),
            self.dense_keys[torch.float32], self.dense_values[torch.float32], scaling=self.scaling,
        )  # fmt: skip
        torch.testing.assert_close(static.out, self.dense(rows[:, :4], torch.float32), rtol=1e-3, atol=1e-4)
        return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="16K keys")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keys", type=int, default=131072)
    parser.add_argument("--cache", type=Path, help="folder for exact top-k, which take minutes")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    n_keys = 16384 if arguments.quick else arguments.keys
    layer = Layer(list(synthetic_heads(n_keys, 256, cache=arguments.cache)), arguments.threads)
    share = layer.mass(layer.rows(8))
    rows: list[dict[str, Any]] = []
    for batch in BATCHES:
        queries = layer.rows(batch)
        repeats = 10 if batch <= 4 else 3
        _, sparse = best_seconds(lambda q=queries: layer.sparse(q), repeats)
        _, search = best_seconds(lambda q=queries: layer.index.search(q, k=TOP_K), repeats)
        _, half = best_seconds(lambda q=queries: layer.dense(q, torch.bfloat16), repeats)
        _, full = best_seconds(lambda q=queries: layer.dense(q, torch.float32), repeats)
        rows.append(
            {
                "questions": batch,
                "index and attention ms": round(1e3 * sparse, 2),
                "of it search ms": round(1e3 * search, 2),
                "dense bfloat16 ms": round(1e3 * half, 2),
                "dense float32 ms": round(1e3 * full, 2),
                "dense bfloat16 / index": round(half / sparse, 2),
                "best dense / index": round(min(half, full) / sparse, 2),
            }
        )
    crossover = next((row["questions"] for row in rows if row["best dense / index"] < 1), None)
    first = rows[0]["dense bfloat16 / index"]
    targets = [
        {"name": "dense bfloat16 / index, one question", "value": first, "target": 8, "holds": first >= 8},
        {
            "name": "share of the ideal top-100 mass found",
            "value": round(share, 4),
            "target": 0.98,
            "holds": share >= 0.98,
        },
    ]
    print(f"{machine(arguments.threads)}; {KV_HEADS} KV heads, {KV_HEADS * GROUP} query heads, {n_keys} keys\n")
    print(f"index: {', '.join(f'{choice.kind} {choice.effort}' for choice in layer.index.choices)}\n")
    print(table(rows, list(rows[0])))
    print(f"\ndense attention wins from {crossover or f'more than {BATCHES[-1]}'} questions on\n")
    print(table(targets, ["name", "value", "target", "holds"]))
    print(json.dumps({"benchmark": "index_layer", "rows": rows, "dense_wins_from": crossover, "targets": targets}))


if __name__ == "__main__":
    main()
