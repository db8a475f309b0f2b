"""Decoding questions over one stored context: a step of transformers with its own cache beside rabatch's recipes.

    python benchmarks/decode.py [--quick] [--lengths 8192,32768] [--questions 1,16,64] [--steps 8] [--threads 2]

The demo model. A document is prefilled, indexed and stored once. transformers attends the same keys and values in its
DynamicCache, repeated for every question, as its `generate` does. All ways decode the same tokens; before anything is
timed, dense logits are compared with transformers' and the tokens that `graph` chooses with those of `dense`. Seconds
are the least of several steps. Peak memory of transformers is counted as what its cache holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
from common.measures import machine, table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from rabatch import prefill
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.demo.corpus import generate_document
from rabatch.executor import Executor
from rabatch.fingerprint import index_fields
from rabatch.generation import Generation
from rabatch.indexing import content_digest, make_manifest, store_unit
from rabatch.loading import LoadedModel, load_model
from rabatch.models import local_path
from rabatch.storage.manifest import Manifest, fingerprint_of
from rabatch.storage.store import IndexStore

RECIPES = ("dense", "graph")
WANTED = {(32768, 16): 25.0}


def store_document(loaded: LoadedModel, store: IndexStore, text: str, threads: int) -> tuple[Manifest, float, float]:
    """The index of a document, and the seconds of prefill and of graph construction."""
    build = BuildConfig()
    fields = index_fields(loaded.config, build)
    where = {"document_id": "d", "fingerprint": fingerprint_of(fields), "attempt": store.new_attempt()}
    began = time.perf_counter()
    units = [unit for _, unit in prefill.prefill_units(loaded, [prefill.encode(loaded, "d", text)], build)]
    prefilled = time.perf_counter()
    parts = [store_unit(store, unit, build, **where, threads=threads)[0] for unit in units]
    manifest = make_manifest(
        document_id="d",
        content_sha256=content_digest(text),
        text_chars=len(text),
        metadata={},
        fingerprint_fields=fields,
        fingerprint=where["fingerprint"],
        units_geometry=units[0]["geometry"],
        context_tokens=units[0]["context_tokens"],
        parts=parts,
        stats={},
    )
    return store.commit(manifest), prefilled - began, time.perf_counter() - prefilled


class Transformers:
    """The reference: the stored keys and values in a cache of transformers' own, a copy for every question."""

    def __init__(self, loaded: LoadedModel, context: OpenContext) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            local_path(loaded.config), dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.context = context

    def begin(self, tails: list[list[int]]) -> Tensor:
        """Enter the questions, left-padded; logits after each."""
        batch, n = len(tails), len(self.context.token_ids)
        self.cache = DynamicCache()
        for number, layer in enumerate(self.context.layers):
            keys, values = (t.float()[None].repeat(batch, 1, 1, 1) for t in (layer.keys, layer.values))
            self.cache.update(keys, values, number)
        longest = max(map(len, tails))
        ids = torch.tensor([[0] * (longest - len(tail)) + tail for tail in tails])
        self.mask = torch.ones(batch, n + longest, dtype=torch.long)
        for row, tail in enumerate(tails):
            self.mask[row, n : n + longest - len(tail)] = 0
        return self.step(ids)

    def step(self, ids: Tensor) -> Tensor:
        if ids.shape[1] + self.cache.get_seq_length() > self.mask.shape[1]:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), ids.shape[1])], dim=1)
        positions = (self.mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
        return self.model(
            ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]

    @property
    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


def steps_of(begin: Any, step: Any, follow: list[Tensor] | None, n: int) -> tuple[list[Tensor], list[float], float]:
    """Logits of the question pass and of `n` steps, seconds of the steps, seconds of the question pass.

    `follow` are logits whose best tokens are decoded, so that all ways decode the same; None: one's own.
    """
    began = time.perf_counter()
    logits = [begin()]
    asked = time.perf_counter() - began
    seconds = []
    for number in range(n):
        tokens = (follow or logits)[number].argmax(-1, keepdim=True)
        began = time.perf_counter()
        logits.append(step(tokens))
        seconds.append(time.perf_counter() - began)
    return logits, seconds, asked


def with_transformers(
    loaded: LoadedModel, context: OpenContext, tails: list[list[int]], n: int
) -> tuple[list[Tensor], dict[str, Any]]:
    """Its logits, and its seconds and bytes; its cache is gone when this returns."""
    reference = Transformers(loaded, context)
    logits, seconds, asked = steps_of(lambda: reference.begin(tails), reference.step, None, n)
    return logits, {"transformers": min(seconds), "transformers question": asked, "cache": reference.bytes}


def measure(loaded: LoadedModel, contexts: dict[str, OpenContext], tails: list[list[int]], n: int) -> dict[str, Any]:
    """Seconds per step of every way, over the same tokens."""
    expected, found = with_transformers(loaded, contexts["dense"], tails, n)
    for name, context in contexts.items():
        recipe = Recipe(method=name)  # type: ignore[arg-type]
        made = Generation(loaded, GenerationSettings(), context.token_ids)
        executor = Executor(context, recipe, made, slots=len(tails))
        ours, seconds, asked = steps_of(
            lambda e=executor: e.forward(0, tails, question=True),
            lambda t, e=executor: e.forward(0, t.tolist(), question=False),
            expected,
            n,
        )
        if name == "dense":
            for mine, theirs in zip(ours, expected, strict=True):
                torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)
        agree = statistics.mean(
            float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())
            for mine, theirs in zip(ours, expected, strict=True)
        )
        if agree < 0.9:
            raise AssertionError(f"{name} chooses transformers' token in {agree:.2f} of the steps: nothing to time")
        found |= {name: min(seconds), f"{name} question": asked, f"{name} agrees": agree}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2K tokens, 4 questions")
    parser.add_argument("--lengths", default="8192,32768")
    parser.add_argument("--questions", default="1,16,64")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths, counts = ([2048], [1, 4]) if args.quick else (
        [int(n) for n in args.lengths.split(",")], [int(n) for n in args.questions.split(",")]
    )  # fmt: skip
    loaded = load_model(ModelConfig(device="cpu"))
    rows: list[dict[str, Any]] = []
    once: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []
    for length in lengths:
        document, questions = generate_document(document_id="d", tokens=length, n_questions=max(counts), seed=7)
        tails = [loaded.template.encode_question(loaded.tokenizer, q["question"]) for q in questions]
        with tempfile.TemporaryDirectory(prefix="rabatch-bench-") as folder, torch.inference_mode():
            store = IndexStore(folder, create=True)
            manifest, prefill_s, graph_s = store_document(loaded, store, document["text"], args.threads)
            contexts, opened = {}, {}
            for name in RECIPES:
                began = time.perf_counter()
                contexts[name] = open_context(store, manifest, loaded, Recipe(method=name), threads=args.threads)  # type: ignore[arg-type]
                opened[name] = time.perf_counter() - began
            once.append(
                {
                    "tokens": length,
                    "prefill s": round(prefill_s, 2),
                    "graphs s": round(graph_s, 2),
                    "open s": round(opened["graph"], 3),
                    "prefill / open": round(prefill_s / opened["graph"], 1),
                }
            )
            for count in counts:
                found = measure(loaded, contexts, tails[:count], args.steps)
                best = min(RECIPES, key=lambda name: found[name])
                row = {
                    "tokens": length,
                    "questions": count,
                    **{f"{name} ms": round(1e3 * found[name], 1) for name in ("transformers", *RECIPES)},
                    **{f"{name} question ms": round(1e3 * found[f"{name} question"]) for name in RECIPES},
                    "graph agrees": round(found["graph agrees"], 3),
                    "transformers / graph": round(found["transformers"] / found["graph"], 1),
                    "dense / graph": round(found["dense"] / found["graph"], 2),
                    "transformers' cache MiB": round(found["cache"] / 2**20),
                }
                rows.append(row)
                if (length, count) in WANTED:
                    value, wanted = round(found["transformers"] / found[best], 1), WANTED[length, count]
                    name = f"transformers / {best}, {count} questions, {length} tokens"
                    targets.append({"name": name, "value": value, "target": wanted, "holds": value >= wanted})
                if count == 1 and length >= 16384:
                    value = row["dense / graph"]
                    name = f"dense / graph, one question, {length} tokens"
                    targets.append({"name": name, "value": value, "target": 1.0, "holds": value >= 1})
            value = once[-1]["prefill / open"]
            name = f"prefill / opening, {length} tokens"
            targets.append({"name": name, "value": value, "target": 10.0, "holds": value >= 10})
    print(f"{machine(args.threads)}, demo model, one decode step\n")
    print(table(rows, list(rows[0])))
    print()
    print(table(once, list(once[0])))
    print()
    print(table(targets, ["name", "value", "target", "holds"]))
    print(json.dumps({"benchmark": "decode", "rows": rows, "documents": once, "targets": targets}))


if __name__ == "__main__":
    main()
