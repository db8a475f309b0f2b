"""What streaming heads save: stored bytes, opening, and a decode step, with half of the heads streaming and with none.

    python benchmarks/streaming_heads.py [--quick] [--lengths 8192,32768] [--steps 8] [--threads 2] [--seed 0]

The demo model (4 layers of 2 KV heads of 64); which heads stream is drawn at random, so answers mean nothing. A
document is built and stored twice. Before anything is timed, rows and index of every head are compared with those of
the index in which none streams, to the bit, and a decode over them at full budget with a dense one. Both indexes are
opened and decode in turn, so that other work on the machine falls on both; seconds are the least of several.

Bytes per token and KV head are those of all layer parts, over tokens, layers and KV heads; keys and values in bfloat16
are 256 of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from typing import Any

import numpy as np
import torch
from common.measures import machine, table
from decode import store_document

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.demo.corpus import generate_document
from rabatch.executor import Executor
from rabatch.generation import Generation
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import bytes_of
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore

METHODS = ("dense", "graph", "scan")
QUESTIONS = (1, 16)
KINDS = ("none", "half")
OPENINGS = 3
FEWEST_BYTES = 0.3  # with int8 keys and 2-bit values
FASTER = 1.4


def check_stored(store: IndexStore, half: Manifest, none: Manifest) -> None:
    """Heads that do not stream are stored as without streaming heads; of the others, the rows of the static set."""
    for layer in range(none.geometry.n_layers):
        whole = store.read_layer(none, layer)
        for run, streaming in half.geometry.head_runs(layer):
            block, wanted = store.read_layer(half, layer, heads=run), whole.select(run)
            if not streaming and not block.equals(wanted):
                raise AssertionError(f"layer {layer}, heads {run} are not those of the other index: nothing to time")
            rows = np.delete(np.arange(whole.rows), slice(none.index_start, none.index_stop))
            if streaming and not torch.equal(block.keys, wanted.keys[:, rows]):
                raise AssertionError(f"layer {layer}, heads {run} hold other rows than the static set")


def executor_of(loaded: LoadedModel, context: OpenContext, recipe: Recipe, slots: int) -> Executor:
    return Executor(context, recipe, Generation(loaded, GenerationSettings(), context.token_ids), slots=slots)


@torch.inference_mode()
def check_logits(loaded: LoadedModel, store: IndexStore, manifest: Manifest, tail: list[int]) -> None:
    """A full budget equals dense attention over what is kept."""
    found = []
    for recipe in (Recipe(method="dense"), Recipe(method="flat", top_k=1 << 20)):
        context = open_context(store, manifest, loaded, recipe)
        found.append(executor_of(loaded, context, recipe, 1).forward(0, [tail], question=True))
    torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=1e-3)


def opening_s(store: IndexStore, manifest: Manifest, loaded: LoadedModel) -> float:
    """Seconds until a question can be asked, parts checked and not read by this store before."""
    fresh = IndexStore(store.url)
    began = time.perf_counter()
    open_context(fresh, manifest, loaded, Recipe(method="graph"))
    return time.perf_counter() - began


@torch.inference_mode()
def step_seconds(
    loaded: LoadedModel, contexts: dict[str, OpenContext], recipe: Recipe, tails: list[list[int]], steps: int
) -> dict[str, float]:
    """Of each context, the least seconds of a decode step of all questions; the contexts take turns."""
    executors = {kind: executor_of(loaded, context, recipe, len(tails)) for kind, context in contexts.items()}
    tokens = {kind: made.forward(0, tails, question=True).argmax(-1, True) for kind, made in executors.items()}
    least = dict.fromkeys(executors, math.inf)
    for _ in range(steps):
        for kind, made in executors.items():
            began = time.perf_counter()
            logits = made.forward(0, tokens[kind].tolist(), question=False)
            least[kind] = min(least[kind], time.perf_counter() - began)
            tokens[kind] = logits.argmax(-1, True)
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2K tokens")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of which heads stream")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = [2048] if args.quick else [int(length) for length in args.lengths.split(",")]
    loaded = load_model(ModelConfig(device="cpu", dtype="float32"))
    shape = loaded.geometry
    gates = np.random.default_rng(args.seed).random((shape.n_layers, shape.n_kv_heads))
    plain = BuildConfig()
    builds = {"none": plain, "half": dataclasses.replace(plain, head_pattern=gates, head_sparsity=0.5)}
    print(f"demo model, {machine(args.threads)}; heads that stream, by layer: ", end="")
    print(", ".join(str(list(builds["half"].streaming_heads(layer))) for layer in range(shape.n_layers)))
    sizes: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for length in lengths:
        document, asked = generate_document(document_id="d", tokens=length, n_questions=max(QUESTIONS), seed=7)
        tails = [loaded.template.encode_question(loaded.tokenizer, question["question"]) for question in asked]
        with tempfile.TemporaryDirectory() as folder:
            store = IndexStore(folder, create=True)
            made = {k: store_document(loaded, store, document["text"], args.threads, b)[0] for k, b in builds.items()}
            check_stored(store, made["half"], made["none"])
            check_logits(loaded, store, made["half"], tails[0])
            opened = dict.fromkeys(KINDS, math.inf)
            for _ in range(OPENINGS):
                opened = {kind: min(opened[kind], opening_s(store, made[kind], loaded)) for kind in KINDS}
            memory = {}
            for method in METHODS:
                recipe = Recipe(method=method)  # type: ignore[arg-type]
                contexts = {kind: open_context(store, made[kind], loaded, recipe) for kind in KINDS}
                memory |= {(method, kind): bytes_of(list(contexts[kind].layers)) for kind in KINDS}
                for count in QUESTIONS:
                    least = step_seconds(loaded, contexts, recipe, tails[:count], args.steps)
                    row = {"tokens": length, "recipe": method, "questions": count}
                    row |= {f"{kind} ms": round(1000 * least[kind], 2) for kind in KINDS}
                    steps.append(row | {"times faster": round(least["none"] / least["half"], 2)})
            for kind in KINDS:
                heads = shape.n_layers * shape.n_kv_heads * made[kind].context_tokens
                stored = sum(part.bytes for part in made[kind].parts if part.kind == "layer")
                row = {"tokens": length, "streaming": kind, "stored MB": round(made[kind].stored_bytes / 1e6, 2)}
                row |= {"bytes per token and head": round(stored / heads, 1)}
                row |= {"of bf16 keys + values": round(stored / heads / (4 * shape.head_dim), 3)}
                row |= {f"{method} MB in memory": round(memory[method, kind] / 1e6, 1) for method in METHODS}
                sizes.append(row | {"opening s": round(opened[kind], 3)})
    for rows in (sizes, steps):
        print(table(rows, list(rows[0])))
    targets = []
    for none, half in zip(sizes[::2], sizes[1::2], strict=True):
        share = half["of bf16 keys + values"]
        name = f"{half['tokens']} tokens, half streaming, of bf16 keys + values (asked with int8 keys, 2-bit values)"
        targets.append({"name": name, "value": share, "target": FEWEST_BYTES, "holds": share <= FEWEST_BYTES})
        saved = round(half["stored MB"] / none["stored MB"], 3)
        name = f"{half['tokens']} tokens, stored bytes of those with no head streaming"
        targets.append({"name": name, "value": saved, "target": 0.55, "holds": saved <= 0.55})
    for row in steps:
        name = f"{row['tokens']} tokens, {row['recipe']}, {row['questions']} questions, times faster"
        targets.append(
            {"name": name, "value": row["times faster"], "target": FASTER} | {"holds": row["times faster"] >= FASTER}
        )
    print(json.dumps({"benchmark": "streaming_heads", "sizes": sizes, "steps": steps, "targets": targets}))


if __name__ == "__main__":
    main()
