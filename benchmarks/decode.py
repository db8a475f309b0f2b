"""Decoding questions over one stored context: a step of transformers with its own cache beside rabatch's recipes.

    python benchmarks/decode.py [--quick] [--model demo|random] [--lengths 8192,32768,131072] [--questions 1,16,64]
        [--steps 8] [--threads 2] [--cache FOLDER] [--peer PYTHON]

The demo model, or one of random weights with 8 KV heads of 128. A document is prefilled, indexed and stored once.
transformers attends the same keys and values in its DynamicCache, repeated for every question, as its `generate` does.
All ways decode the same tokens; before anything is timed, dense logits are compared with transformers' and the tokens
that `graph` and `scan` choose with those of `dense`. Seconds are the least of several steps. Memory is what the caches
hold: transformers' for its questions, rabatch's layers with everything made of them. Past its 40,960 positions the demo
model is stretched: its attention costs the same, its answers mean nothing.

`--peer` is a Python with llama-cpp-python and gguf (`pip install llama-cpp-python gguf`): llama.cpp then decodes the
same questions over the same tokens, with float16 weights and keys, fused attention and plain, of which the faster
counts. Its tokens must be those of `dense`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common.measures import machine, table
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from rabatch import prefill
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import OpenContext, open_context
from rabatch.costs import chosen
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.executor import Executor
from rabatch.fingerprint import index_fields
from rabatch.generation import Generation
from rabatch.indexing import content_digest, make_manifest, store_unit
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import bytes_of
from rabatch.models import local_path
from rabatch.storage.manifest import Manifest, fingerprint_of
from rabatch.storage.store import IndexStore

SPARSE = ("graph", "scan")
RECIPES = ("dense", *SPARSE)  # dense first: where transformers' cache does not fit, its tokens are what all decode
MOST_BYTES = 12 << 30  # of its cache; it takes twice that for a moment
TRAINED = 40_960  # positions of the demo model
MADE = 64  # questions of a document, however many are asked: a document that is kept must stay the same
HERE = Path(__file__).parent
WANTED = {(32768, 16): 25.0, (131072, 16): 50.0}  # times the tokens per second of transformers
AHEAD = {(16384, 1): 1.0, (32768, 1): 1.0, (65536, 16): 1.0, (131072, 1): 4.0, (131072, 16): 4.0}  # dense / sparse
OF_PEER = {(32768, 1): 1.0, (32768, 16): 4.0}  # llama.cpp / ours


def store_document(
    loaded: LoadedModel, store: IndexStore, text: str, threads: int, build: BuildConfig | None = None
) -> tuple[Manifest, float, float]:
    """The index of a document, and the seconds of prefill and of graph construction."""
    build = build or BuildConfig()
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


def checkpoint(kind: str, folder: Path) -> Path:
    """A model folder with room for 256K positions: the demo's weights, or random ones with 8 KV heads of 128."""
    demo, made = local_path(ModelConfig(device="cpu")), folder / kind
    if (made / "config.json").exists():
        return made
    shutil.copytree(demo, made)
    config = json.loads((made / "config.json").read_text()) | {"max_position_embeddings": 1 << 18}
    if kind == "random":
        config |= {
            "hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 16,
            "num_key_value_heads": 8, "head_dim": 128,
        }  # fmt: skip
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(made)
    else:
        (made / "config.json").write_text(json.dumps(config))
    return made


def peer(python: str, folder: Path, request: dict[str, Any]) -> dict[str, Any]:
    """What benchmarks/llama_peer.py finds, with plain and with fused attention, by number of questions."""
    found: dict[str, Any] = {}
    for flash in (False, True):
        file = folder / "request.json"
        state = str(folder / f"peer-{len(request['token_ids'])}-{flash}.state")
        file.write_text(json.dumps({**request, "flash": flash, "state": state}))
        done = subprocess.run(
            [python, str(HERE / "llama_peer.py"), str(file)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"--peer {python}: {done.stderr.strip().splitlines()[-1]}")
        for run in json.loads(done.stdout.splitlines()[-1])["runs"]:
            mine = {"seconds": min(run["step_seconds"]), "tokens": run["tokens"]}
            found[run["questions"]] = min(mine, found.get(run["questions"], mine), key=lambda r: r["seconds"])
    return found


def per_second(context: OpenContext, questions: list[dict[str, Any]], recipe: Recipe, slots: int) -> float:
    """Questions answered per second, from text to text."""
    began = time.perf_counter()
    rows = answer_batch(context, questions, recipe, GenerationSettings(max_new_tokens=24), slots=slots)
    if any(row["status"] != "ok" for row in rows):
        raise AssertionError(next(row["reason"] for row in rows if row["reason"]))
    return len(rows) / (time.perf_counter() - began)


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
    """Seconds per step of every way, over the same tokens; transformers for at most 16 questions, where they fit."""
    expected, found = None, {"transformers": float("nan"), "cache": 0}
    needed = len(tails) * 2 * sum(layer.keys.numel() for layer in contexts["dense"].layers) * 4
    if len(tails) <= 16 and needed < MOST_BYTES:
        expected, found = with_transformers(loaded, contexts["dense"], tails, n)
    for name, context in contexts.items():
        made = Generation(loaded, GenerationSettings(), context.token_ids)
        executor = Executor(context, recipe_of(name), made, slots=len(tails))
        ours, seconds, asked = steps_of(
            lambda e=executor: e.forward(0, tails, question=True),
            lambda t, e=executor: e.forward(0, t.tolist(), question=False),
            expected,
            n,
        )
        if name == "dense" and found["cache"]:
            for mine, theirs in zip(ours, expected, strict=True):  # type: ignore[arg-type]
                torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=1e-3)
        expected = expected or ours
        same = torch.stack([a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, expected, strict=True)])
        # Past its training the model's logits are nearly equal.
        agree = check_tokens(name, same, 0.9 if len(context.token_ids) <= TRAINED else 0.75)
        found |= {name: min(seconds), f"{name} question": asked, f"{name} agrees": agree}
    found["chosen"] = expected
    return found


def check_tokens(name: str, same: Tensor, least: float) -> float:
    """The share of tokens that are the reference's. Refuses too few; one of the nine of a question is let pass."""
    agree = float(same.float().mean())
    if agree < least and int((~same).sum()) > 1:
        raise AssertionError(f"{name} chooses the reference's token in {agree:.2f} of the steps: nothing to time")
    return agree


def recipe_of(method: str) -> Recipe:
    return Recipe(method=method)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4K tokens, 4 questions")
    parser.add_argument("--model", choices=("demo", "random"), default="demo")
    parser.add_argument("--lengths", default="8192,32768,131072")
    parser.add_argument("--questions", default="1,16,64")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, help="folder that keeps models and indexes; the longest take minutes")
    parser.add_argument("--peer", metavar="PYTHON", help="an interpreter with llama-cpp-python and gguf")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lengths, counts = ([4096], [1, 4]) if args.quick else (
        [int(n) for n in args.lengths.split(",")], [int(n) for n in args.questions.split(",")]
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="rabatch-bench-") as made:
        run(args, args.cache or Path(made), lengths, counts)


def run(args: argparse.Namespace, folder: Path, lengths: list[int], counts: list[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = checkpoint(args.model, folder)
    loaded = load_model(ModelConfig(name=str(model), device="cpu", dtype="float32"))
    rows: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    targets: list[dict[str, Any]] = []

    def wanted(name: str, value: float, target: float, *, most: bool = False) -> None:
        holds = value <= target if most else value >= target
        targets.append({"name": name, "value": value, "target": target, "at most": most, "holds": holds})

    for length in lengths:
        document, questions = generate_document(document_id="d", tokens=length, n_questions=max(MADE, *counts), seed=7)
        tails = [loaded.template.encode_question(loaded.tokenizer, q["question"]) for q in questions]
        store = IndexStore(str(folder / f"{args.model}-{length}"), create=True)
        with torch.inference_mode():
            stored = next(iter(store.manifests()), None)
            prefill_s = graph_s = float("nan")  # an earlier run took them
            if stored is None:
                stored, prefill_s, graph_s = store_document(loaded, store, document["text"], args.threads)
            contexts, opened = {}, {}
            for name in RECIPES:
                began = time.perf_counter()
                contexts[name] = open_context(store, stored, loaded, recipe_of(name), threads=args.threads)
                opened[name] = time.perf_counter() - began
            memory = {name: bytes_of(list(context.layers)) for name, context in contexts.items()}
            with open_context(store, stored, loaded, Recipe(method="auto"), threads=args.threads) as either:
                best_of = {n: chosen(either, Recipe(method="auto"), questions=n).method for n in counts}
            documents.append(
                {
                    "tokens": length,
                    "prefill s": round(prefill_s, 2),
                    "graphs s": round(graph_s, 2),
                    **{f"open {name} s": round(opened[name], 3) for name in RECIPES},
                    "prefill / open": round(prefill_s / max(opened.values()), 1),
                    **{f"{name} MiB": round(memory[name] / 2**20) for name in RECIPES},
                    "stored MiB": round(sum(part.bytes for part in stored.parts) / 2**20),
                }
            )
            for count in counts:
                found = measure(loaded, contexts, tails[:count], args.steps)
                best = min(RECIPES, key=lambda name: found[name])
                rows.append(
                    {
                        "tokens": length,
                        "questions": count,
                        **{f"{name} ms": round(1e3 * found[name], 1) for name in ("transformers", *RECIPES)},
                        **{f"{name} question ms": round(1e3 * found[f"{name} question"]) for name in RECIPES},
                        **{f"{name} agrees": round(found[f"{name} agrees"], 3) for name in SPARSE},
                        "transformers / best": round(found["transformers"] / found[best], 1),
                        "dense / sparse": round(found["dense"] / min(found[name] for name in SPARSE), 2),
                        "auto": best_of[count],
                        "cache / graph": round(found["cache"] / memory["graph"], 1),
                    }
                )
                row = rows[-1]
                if (length, count) in WANTED:
                    what = f"transformers / {best}, {count} questions, {length} tokens"
                    wanted(what, row["transformers / best"], WANTED[length, count])
                    wanted(
                        f"transformers' memory / {best}'s, {length} tokens", round(found["cache"] / memory[best], 1), 8
                    )
                if (length, count) in AHEAD:
                    what = f"dense / sparse, {count} questions, {length} tokens"
                    wanted(what, row["dense / sparse"], AHEAD[length, count])
            if args.peer and length <= 32768:
                for count, of_peer in with_peer(args, folder, model, contexts["dense"], tails, counts, found).items():
                    row = next(r for r in rows if (r["tokens"], r["questions"]) == (length, count))
                    row["llama.cpp ms"] = round(1e3 * of_peer, 1)
                    row["llama.cpp / best"] = round(1e3 * of_peer / min(row[f"{name} ms"] for name in RECIPES), 2)
                    if (length, count) in OF_PEER:
                        what = f"llama.cpp / best, {count} questions, {length} tokens"
                        wanted(what, row["llama.cpp / best"], OF_PEER[length, count])
            if max(counts) >= 64 and length <= 32768:
                for name in RECIPES:
                    alone = per_second(contexts[name], questions[:8], recipe_of(name), 1)
                    together = per_second(contexts[name], questions[:64], recipe_of(name), 64)
                    wanted(f"{name}: questions per second, 64 / 1, {length} tokens", round(together / alone, 2), 8)
            if prefill_s == prefill_s:
                wanted(f"prefill / opening, {length} tokens", documents[-1]["prefill / open"], 10)
        print(table(rows[-len(counts) :], list(rows[-1])), flush=True)
    for name in SPARSE:
        steps = {row["tokens"]: row[f"{name} ms"] for row in rows if row["questions"] == 1}
        if {8192, 131072} <= set(steps):
            wanted(f"{name}, one question: 128K / 8K", round(steps[131072] / steps[8192], 2), 1.25, most=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "-") for name in columns} for row in rows]
    print(f"\n{machine(args.threads)}, {args.model} model, one decode step\n")
    for part in (rows, documents, targets):
        print(table(part, list(part[0])))
        print()
    found = {"benchmark": "decode", "rows": rows, "documents": documents, "targets": targets}
    print(json.dumps(found).replace("NaN", "null"))


def with_peer(
    args: argparse.Namespace,
    folder: Path,
    model: Path,
    context: OpenContext,
    tails: list[list[int]],
    counts: list[int],
    found: dict[str, Any],
) -> dict[int, float]:
    """Seconds of llama.cpp's step by number of questions; refuses other tokens than the reference's."""
    numbers = [n for n in counts if n <= 16]
    request = {
        "checkpoint": str(model), "gguf": str(folder / f"{args.model}.gguf"), "weights": "f16",
        "token_ids": context.token_ids.tolist(), "questions": tails[: max(numbers)], "steps": args.steps,
        "threads": args.threads, "counts": numbers,
    }  # fmt: skip
    seconds = {}
    for n, run_of in peer(args.peer, folder, request).items():
        ours = torch.stack([logits.argmax(-1)[:n] for logits in found["chosen"]], dim=1)
        check_tokens("llama.cpp", ours == torch.tensor(run_of["tokens"]), 0.9)
        seconds[n] = run_of["seconds"]
    return seconds


if __name__ == "__main__":
    main()
