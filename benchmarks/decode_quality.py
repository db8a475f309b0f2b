"""What answering through an index costs in quality: accuracy, evidence, mass, the error of the output, long answers.

    python benchmarks/decode_quality.py [--quick] [--lengths 8192,16384,32768] [--questions 512] [--threads 2]

The demo model on generated documents of each length. Every recipe answers the same questions. Evidence counts over the
questions answered rightly: how often the best span holds a whole sentence of the planted fact. The error is that of a
layer's attention output against dense attention, for the same queries, with and without the estimate by zones; both
attend the same keys. For long answers, text is decoded as if it were generated, and what the index of the context and
the private one of the answer find together is compared with the exact best 100 of all older keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from common.measures import machine, table
from decode import store_document
from torch import Tensor

from rabatch.attention.context import QuestionAttention
from rabatch.attention.seam import AttentionCall
from rabatch.config import GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.evaluation.scoring import exact_match
from rabatch.executor import Executor
from rabatch.generation import Generation
from rabatch.loading import LoadedModel, load_model
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore

RECIPES = {
    "dense": Recipe(method="dense"),
    "graph": Recipe(method="graph"),
    "scan": Recipe(method="scan"),
    "graph, fixed budget, no estimate": Recipe(method="graph", budget="fixed", estimate=False),
    "graph, mass 0.9": Recipe(method="graph", budget="mass", mass=0.9),
    "graph, pyramid": Recipe(method="graph", budget="pyramid"),
    "auto": Recipe(method="auto", question_attention="auto"),
}
ONCE = ("graph, mass 0.9", "graph, pyramid")
"""Measured at the first length only."""
PER_DOCUMENT = 64
LONG = 4096


def answered(
    loaded: LoadedModel, store: IndexStore, manifest: Manifest, questions: list[dict[str, Any]], recipe: Recipe
) -> list[dict[str, Any]]:
    """Rows of one document, with whether the answer is right and the best span holds a sentence of the fact."""
    context = open_context(store, manifest, loaded, recipe, threads=torch.get_num_threads())
    rows = answer_batch(context, questions, recipe, GenerationSettings(max_new_tokens=32), slots=16)
    for row, question in zip(rows, questions, strict=True):
        if row["status"] != "ok":
            raise AssertionError(f"question {row['question_id']} failed: {row['reason']}")
        row["right"] = exact_match(row["expected"], row["answer"])
        top = row["evidence"][0] if row["evidence"] else {"start": 0, "end": 0}
        row["shown"] = any(top["start"] <= start and stop <= top["end"] for start, stop in question["fact_spans"])
    return rows


class _Errors:
    """Attends sparsely and dense at once, and goes on with dense: the relative error of each layer's output."""

    def __init__(self, context: OpenContext, recipes: dict[str, Recipe], slots: int) -> None:
        def attention(recipe: Recipe) -> QuestionAttention:
            return QuestionAttention(
                context.layers, context_tokens=len(context.token_ids), slots=slots, recipe=recipe, device="cpu"
            )

        self.dense = attention(Recipe(method="dense"))
        self.others = {name: attention(recipe) for name, recipe in recipes.items()}
        self.errors: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.tails, self.selection = self.dense.tails, self.dense.selection

    def begin(self, *args: Any, **options: Any) -> Tensor:
        for other in self.others.values():
            other.begin(*args, **options)
        return self.dense.begin(*args, **options)

    def finish(self) -> None:
        for attention in (self.dense, *self.others.values()):
            attention.finish()

    def attend(self, call: AttentionCall) -> Tensor:
        out = self.dense.attend(call)
        for name, other in self.others.items():
            difference = (other.attend(call) - out)[:, -1].norm(dim=-1) / out[:, -1].norm(dim=-1)
            self.errors[name, call.layer].append(float(difference.mean()))
        return out


def output_errors(loaded: LoadedModel, context: OpenContext, tails: list[list[int]]) -> dict[tuple[str, int], float]:
    """By recipe and layer, over questions and 6 generated tokens."""
    recipes = {"estimated": Recipe(budget="fixed"), "left out": Recipe(budget="fixed", estimate=False)}
    bare = [dataclasses.replace(layer, zones=None) for layer in context.layers]
    executor = Executor(
        context, recipes["estimated"], Generation(loaded, GenerationSettings(), context.token_ids), slots=len(tails)
    )
    both = _Errors(context, recipes, len(tails))
    both.others["left out"].layers = bare
    executor.attention = both  # type: ignore[assignment]
    logits = executor.forward(0, tails, question=True)
    for _ in range(6):
        logits = executor.forward(0, logits.argmax(-1, keepdim=True).tolist(), question=False)
    return {key: float(np.mean(errors[1:])) for key, errors in both.errors.items()}


def long_recall(loaded: LoadedModel, context: OpenContext, recipe: Recipe, text: list[int]) -> dict[str, Any]:
    """Recall@100 over all keys that the last 64 of many generated tokens retrieve from."""
    executor = Executor(context, recipe, Generation(loaded, GenerationSettings(), context.token_ids), slots=1)
    attention, recalls = executor.attention, defaultdict(list)
    original = attention.overlays.join

    def join(layer: int, slots: slice, rows: Tensor, found: Any, **options: Any) -> Any:
        joined = original(layer, slots, rows, found, **options)
        if len(recalls[layer]) < 64 and len(text) - executor_step[0] <= 64:
            held, begin = context.layers[layer], int(attention.overlays.begins[0])
            own = attention.tails.keys(layer, 0, slice(0, begin))
            stored = held.keys[:, held.index_start : held.index_stop].float()
            scores = rows @ torch.cat([stored, own.float()], 1).transpose(1, 2)  # type: ignore[union-attr]
            best = scores.topk(100, dim=-1).indices
            n = stored.shape[1]
            best = torch.where(best < n, best + held.index_start, best - n + held.keys.shape[1])
            hits = (joined.ids[..., :, None] == best[..., None, :]).any(-2).float().mean(-1)
            recalls[layer].append(hits.mean(-1).numpy())
        return joined

    attention.overlays.join = join  # type: ignore[method-assign]
    executor_step = [0]
    executor.forward(0, [text[:8]], question=True)
    for number, token in enumerate(text[8:], start=8):
        executor_step[0] = number
        executor.forward(0, [[token]], question=False)
    by_head = {
        (layer, head): float(np.mean([r[head] for r in found]))
        for layer, found in recalls.items()
        for head in range(len(found[0]))
    }
    return {
        "tokens": len(text),
        "in the overlay": int(attention.overlays.begins[0]),
        "recall@100": round(float(np.mean(list(by_head.values()))), 4),
        "worst head": round(min(by_head.values()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2K tokens, 16 questions, a long answer of 1,600 tokens")
    parser.add_argument("--lengths", default="8192,16384,32768")
    parser.add_argument("--questions", type=int, default=512, help="of each length")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths = [2048] if args.quick else [int(n) for n in args.lengths.split(",")]
    n_questions, long = (16, 1600) if args.quick else (args.questions, LONG)
    loaded = load_model(ModelConfig(device="cpu"))
    rows, errors, targets = [], [], []
    long_answers = []
    for length in lengths:
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for number in range(-(-n_questions // PER_DOCUMENT)):
            document, questions = generate_document(
                document_id=f"d{number}", tokens=length, n_questions=min(PER_DOCUMENT, n_questions), seed=1000 + number
            )
            with tempfile.TemporaryDirectory(prefix="rabatch-bench-") as folder, torch.inference_mode():
                store = IndexStore(folder, create=True)
                manifest, _, _ = store_document(loaded, store, document["text"], args.threads)
                for name, recipe in RECIPES.items():
                    if name in ONCE and length != lengths[0]:
                        continue
                    found[name] += answered(loaded, store, manifest, questions, recipe)
                if number == 0:
                    wide = Recipe(budget="fixed", search_list=200)
                    context = open_context(store, manifest, loaded, wide, threads=args.threads)
                    tails = [loaded.template.encode_question(loaded.tokenizer, q["question"]) for q in questions[:8]]
                    layers = output_errors(loaded, context, tails)
                    errors += [
                        {
                            "tokens": length,
                            "layer": layer,
                            **{name: round(layers[name, layer], 4) for name in ("left out", "estimated")},
                        }
                        for layer in range(loaded.geometry.n_layers)
                    ]
                    if length == lengths[0]:
                        other, _ = generate_document(document_id="x", tokens=long + 512, n_questions=4, seed=5)
                        text = loaded.tokenizer.encode(other["text"], add_special_tokens=False)[:long]
                        long_answers.append({"context": length, **long_recall(loaded, context, wide, text)})
        dense = np.mean([row["right"] for row in found["dense"]])
        for name, of_recipe in found.items():
            right = [row for row in of_recipe if row["right"]]
            accuracy, shown = (
                float(np.mean([row["right"] for row in of_recipe])),
                np.mean([row["shown"] for row in right]),
            )
            known = [row["mass_share"] for row in of_recipe if row["mass_share"] is not None]
            row = {
                "tokens": length,
                "recipe": name,
                "questions": len(of_recipe),
                "right %": round(100 * accuracy, 2),
                "evidence %": round(100 * float(shown), 1),
                "attended %": round(100 * float(np.mean([row["attended_share"] for row in of_recipe])), 2),
                "mass": round(float(np.mean(known)), 3) if known else "-",
                "answered by": ", ".join(sorted({row["recipe"] for row in of_recipe})),
            }
            rows.append(row)
            if name in ("graph", "scan", "auto"):
                value = round(100 * (float(dense) - accuracy), 2)
                what = f"dense - {name}, points, {length} tokens"
                targets.append({"name": what, "value": value, "target": 0.5, "holds": value <= 0.5})
            if name in ("graph", "scan", "dense"):
                what = f"evidence of {name}, %, {length} tokens"
                targets.append(
                    {"name": what, "value": row["evidence %"], "target": 90.0, "holds": row["evidence %"] >= 90}
                )
        print(table(rows, list(rows[0])), flush=True)
    for one in long_answers:
        what = f"recall@100 after {one['tokens']} generated tokens"
        targets.append({"name": what, "value": one["recall@100"], "target": 0.93, "holds": one["recall@100"] >= 0.93})
    print(f"\n{machine(args.threads)}, demo model\n")
    for part in (rows, errors, long_answers, targets):
        print(table(part, list(part[0])))
        print()
    print(
        json.dumps(
            {"benchmark": "decode_quality", "rows": rows, "errors": errors, "long": long_answers, "targets": targets}
        )
    )


if __name__ == "__main__":
    main()
