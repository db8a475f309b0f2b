"""A whole prefill: transformers' own beside rabatch's, with the top-k that graphs are made of; seconds and memory.

    python benchmarks/prefill.py [--quick] [--device cpu|cuda] [--model NAME] [--lengths 8192,16384,32768] [--repeats 2]

Every way runs in a process of its own, so that its peak memory is its own; the ways alternate, and the least seconds
count. transformers: SDPA in one pass, and in chunks of 2,048 with its DynamicCache. rabatch: chunks of 2,048, without
sampling and with a quarter of the queries (k = 32). Before a length is timed, keys, values and last logits of all
ways are compared. Also: 64 documents of 200 tokens, one by one and packed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common.measures import machine, table
from torch import Tensor

from rabatch import prefill
from rabatch.config import BuildConfig, ModelConfig
from rabatch.demo.corpus import generate_document
from rabatch.loading import LoadedModel, load_model
from rabatch.models import local_path
from rabatch.prompts import EncodedContext

CHUNK = 2048
SHORT_DOCUMENTS, SHORT_TOKENS = 64, 200
WAYS = ("transformers, one pass", "transformers, chunks", "rabatch without top-k", "rabatch")


def contexts(loaded: LoadedModel, tokens: int, count: int = 1) -> list[EncodedContext]:
    """Generated documents, cut to exactly `tokens` tokens each."""
    made = []
    for seed in range(count):
        text = generate_document(document_id="d", tokens=tokens + 50, n_questions=1, seed=seed)[0]["text"]
        whole = loaded.template.encode_context(loaded.tokenizer, text)
        parts = (whole.token_ids[:tokens], whole.char_start[:tokens], whole.char_end[:tokens])
        made.append(EncodedContext(*parts))
    return made


def with_transformers(model: Any, ids: Tensor, chunk: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of every layer, and the last logits."""
    cache, logits = None, None
    for start in range(0, ids.shape[1], chunk):
        out = model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, logits = out.past_key_values, out.logits
    assert cache is not None
    assert logits is not None
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers], logits[0, -1]


def prefiller(way: str, loaded: LoadedModel) -> Callable[[list[EncodedContext]], Any]:
    """The function to be timed."""
    if way.startswith("rabatch"):
        index = "graph" if way == "rabatch" else "none"
        build = BuildConfig(index=index, prefill_chunk_tokens=CHUNK, kv_dtype=loaded.config.dtype)  # type: ignore[arg-type]
        return lambda given: prefill.run(loaded, given, build)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        local_path(loaded.config), dtype=getattr(torch, loaded.config.dtype), attn_implementation="sdpa"
    )
    model = model.to(loaded.config.device).eval()

    def call(given: list[EncodedContext]) -> Any:
        ids = torch.from_numpy(given[0].token_ids).long()[None].to(loaded.config.device)
        return with_transformers(model, ids, CHUNK if "chunks" in way else ids.shape[1])

    return call


def worker(way: str, model: ModelConfig, tokens: int, threads: int, repeats: int, connection: Any) -> None:
    """Answers each request with (seconds, peak bytes, memory before): runs in a process of its own."""
    torch.set_num_threads(threads)
    loaded = load_model(model)
    given = contexts(loaded, tokens)
    call = prefiller(way, loaded)
    cuda = loaded.config.device != "cpu"
    with torch.inference_mode():
        call(contexts(loaded, 300))  # compiles, and fills the caches of allocators
        before = torch.cuda.memory_allocated() if cuda else resident()
        for _ in range(repeats):
            connection.recv()
            began = time.perf_counter()
            result = call(given)
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
            connection.send((seconds, peak - before))
            del result


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check(model: ModelConfig, tokens: int) -> None:
    """Refuse to time what is wrong: stored keys and values, and the logits, are transformers' own."""
    loaded = load_model(model)
    given = contexts(loaded, tokens)
    half = loaded.config.dtype != "float32"
    tolerance = {"atol": 0.5, "rtol": 0.1} if half else {"atol": 2e-3, "rtol": 1e-3}
    with torch.inference_mode():
        states, _ = prefiller("transformers, one pass", loaded)(given)
        cache, capture = prefiller("rabatch", loaded)(given)
        for layer, (keys, values) in enumerate(states):
            mine = cache.states(layer)
            torch.testing.assert_close(mine[0].cpu(), keys.cpu(), **tolerance)
            torch.testing.assert_close(mine[1].cpu(), values.cpu(), **tolerance)
        keys = cache.states(0)[0].float().cpu()
        lists, queries = capture.contexts[0].of_heads(0, 0, 1)
        build = BuildConfig()
        positions = capture.contexts[0].positions
        known = capture.contexts[0].has_vector(loaded.geometry.n_query_heads // loaded.geometry.n_kv_heads)
        for row in range(0, int(known.sum()), 97):  # the first query head's
            high = int(positions[known][row]) - build.window_tokens + 1
            scores = keys[0, build.sink_tokens : high] @ queries[0, row].float().cpu()
            best = scores.topk(min(build.query_top_k, len(scores))).values
            found = lists[0, row][lists[0, row] >= 0].long()
            torch.testing.assert_close(scores[found], best, atol=0.1 if half else 1e-3, rtol=1e-2 if half else 1e-4)


def measure(model: ModelConfig, tokens: int, threads: int, repeats: int) -> dict[str, tuple[float, int]]:
    """Least seconds and peak bytes of each way; they take turns."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, int]]] = {way: [] for way in WAYS}
    running = []
    for way in WAYS:
        here, there = context.Pipe()
        process = context.Process(target=worker, args=(way, model, tokens, threads, repeats, there), daemon=True)
        process.start()
        running.append((way, here, process))
    for _ in range(repeats):
        for way, here, _process in running:
            here.send(None)
            found[way].append(here.recv())
    for _, _, process in running:
        process.join()
    return {way: (min(s for s, _ in of_way), max(b for _, b in of_way)) for way, of_way in found.items()}


def packed(model: ModelConfig) -> tuple[float, float]:
    """Seconds of many short documents: one by one, and packed into chunks."""
    loaded = load_model(model)
    given = contexts(loaded, SHORT_TOKENS, SHORT_DOCUMENTS)
    build = BuildConfig(prefill_chunk_tokens=CHUNK)
    per_pack = CHUNK // SHORT_TOKENS
    ways = {
        "alone": lambda: [prefill.run(loaded, [one], build) for one in given],
        "packed": lambda: [prefill.run(loaded, given[i : i + per_pack], build) for i in range(0, len(given), per_pack)],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(4):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return min(seconds["alone"]), min(seconds["packed"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2K tokens only")
    parser.add_argument("--model", default="demo", help="hub name or path")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", default="8192,16384,32768", help="tokens, separated by commas")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = ModelConfig(name=args.model, device=args.device)
    rows: list[dict[str, Any]] = []
    targets = []
    for tokens in [2048] if args.quick else [int(n) for n in args.lengths.split(",")]:
        check(model, tokens)
        found = measure(model, tokens, args.threads, args.repeats)
        one_pass, chunked = found[WAYS[0]], found[WAYS[1]]
        for way, (seconds, peak) in found.items():
            rows.append(
                {
                    "tokens": tokens,
                    "way": way,
                    "s": round(seconds, 2),
                    "tokens/s": round(tokens / seconds),
                    "peak MiB": round(peak / 2**20),
                    "s / one pass": round(seconds / one_pass[0], 3),
                    "peak / chunks": round(peak / chunked[1], 3),
                }
            )
        ratio, memory = rows[-1]["s / one pass"], rows[-1]["peak / chunks"]
        name = f"{tokens} tokens: with top-k / transformers"
        targets.append({"name": f"{name}, one pass, s", "value": ratio, "target": 1.25, "holds": ratio <= 1.25})
        targets.append({"name": f"{name}, chunks, peak", "value": memory, "target": 1.5, "holds": memory <= 1.5})
    alone, together = packed(model)
    print(f"{machine(args.threads)}, {args.model} on {args.device}\n")
    print(table(rows, list(rows[0])))
    print(f"\n{SHORT_DOCUMENTS} documents of {SHORT_TOKENS} tokens: {alone:.2f} s one by one, {together:.2f} s packed "
          f"({np.round(alone / together, 2)}x)\n")  # fmt: skip
    print(table(targets, ["name", "value", "target", "holds"]))
    short = {"alone s": round(alone, 3), "packed s": round(together, 3)}
    print(json.dumps({"benchmark": "prefill", "rows": rows, "short documents": short, "targets": targets}))


if __name__ == "__main__":
    main()
