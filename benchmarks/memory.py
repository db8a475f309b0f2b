"""Answering under a memory budget: from all of a context in memory down to a layer at a time, and the next index ahead.

    python benchmarks/memory.py [--quick] [--tokens 16384] [--questions 32] [--threads 1] [--store-mb-s 200]

The demo model; the recipe `graph`. First, one document under budgets of some of its layers, with as many questions
decoded together as asked for and with as many as `OpenContext.slots` takes: seconds, and how many layers are read, from
a store that gives `--store-mb-s`. Then documents of half the length with an eighth of the questions through one answer
actor, from a store with a tenth of that, as over a network: each index read when its document's turn has come, and each
while the one before is decoded. Nothing is timed unless its answers are those of a context that is whole in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
from common.measures import machine, table
from decode import store_document

from rabatch import contexts
from rabatch.config import GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.jobs.answering import CALLS, AnswerActor, AnswerSettings
from rabatch.jobs.catalog import read_entries
from rabatch.loading import LoadedModel, load_model
from rabatch.memory import LayerPool, bytes_of
from rabatch.storage.answers import decode
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import IndexStore

RECIPE, GENERATION, SLOTS = Recipe(), GenerationSettings(max_new_tokens=24), 8
DOCUMENTS, REPEATS = 4, 3


@contextmanager
def counted() -> Iterator[list[int]]:
    """Grows with every layer that is read, by its number."""
    reads: list[int] = []
    read_layer = IndexStore.read_layer

    def counting(self: IndexStore, manifest: Manifest, layer: int, **options: Any) -> Any:
        reads.append(layer)
        return read_layer(self, manifest, layer, **options)

    with mock.patch.object(IndexStore, "read_layer", counting):
        yield reads


@contextmanager
def slow(mb_s: float) -> Iterator[None]:
    """Files come with so many megabytes a second."""
    read = Folder.read

    def reading(self: Folder, path: str) -> bytes:
        began = time.perf_counter()
        data = read(self, path)
        time.sleep(max(0.0, len(data) / mb_s / 1e6 - (time.perf_counter() - began)))
        return data

    with mock.patch.object(Folder, "read", reading):
        yield


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [f"{row['status']} {row['answer']}" for row in rows]


def under_budgets(
    loaded: LoadedModel, store: IndexStore, manifest: Manifest, questions: list[dict[str, Any]], mb_s: float
) -> list[dict[str, Any]]:
    """A row per budget and number of questions decoded together."""
    whole = open_context(store, manifest, loaded, RECIPE)
    sizes = [bytes_of(layer) for layer in whole.layers]
    part = max(part.bytes for part in manifest.parts)
    expected = texts(answer_batch(whole, questions, RECIPE, GENERATION, slots=SLOTS))
    rows = []
    for kept in (len(sizes), len(sizes) // 4, 0):
        room = kept if kept == len(sizes) else kept + 2
        for grows in (1, contexts.STREAMED_SLOTS):
            if kept == len(sizes) and grows > 1:
                continue
            best = float("inf")
            for _ in range(REPEATS):
                pool: LayerPool = LayerPool(int(1.01 * room * max(sizes)) + part)
                patched = mock.patch.object(contexts, "STREAMED_SLOTS", grows)
                with counted() as reads, slow(mb_s), patched:
                    began = time.perf_counter()
                    with open_context(store, manifest, loaded, RECIPE, pool=pool) as context:
                        found = texts(answer_batch(context, questions, RECIPE, GENERATION, slots=SLOTS))
                        together = min(context.slots(SLOTS), len(questions))
                    best = min(best, time.perf_counter() - began)
                if found != expected or pool.peak_bytes > pool.budget_bytes:
                    raise AssertionError(f"other answers, or {pool.peak_bytes} > {pool.budget_bytes} bytes")
            rows.append(
                {
                    "layers kept": f"{kept} of {len(sizes)}",
                    "budget MiB": round(pool.budget_bytes / 2**20),
                    "peak MiB": round(pool.peak_bytes / 2**20),
                    "together": together,
                    "layers read": len(reads),
                    "seconds": round(best, 2),
                }
            )
    return rows


def in_turn(
    store: IndexStore, documents: dict[str, tuple[Manifest, list[dict[str, Any]]]], mb_s: float, threads: int
) -> list[dict[str, Any]]:
    """Seconds of all documents through one actor, by how many calls it has at the same time."""
    settings = AnswerSettings(
        model=ModelConfig(device="cpu"),
        store_url=store.url,
        storage_options={},
        recipes=(RECIPE,),
        generation=GENERATION,
        answers_urls=(None,),
        threads=threads,
        slots=SLOTS,
        memory_bytes=1 << 40,
        sharing=1,
        sharing_card=1,
    )

    indexes = {stored.content_sha256: stored for stored in read_entries(store)}

    def ask(actor: AnswerActor, name: str) -> list[str]:
        manifest, questions = documents[name]
        asked = [{field: q[field] for field in ("question_id", "question", "expected")} for q in questions]
        keys = [question["question_id"] for question in asked]
        batches = json.dumps([{"name": name, "questions": asked, "keys": keys}])
        stored = json.dumps(indexes[manifest.content_sha256])
        made = list(actor(pa.Table.from_pylist([{"recipe": 0, "index": stored, "batches": batches}])))
        return [text for one in made for text in texts(decode(one.to_pylist()[0]["answers"], name=name).to_pylist())]

    rows, expected = [], None
    for calls in (1, CALLS):
        best = float("inf")
        for _ in range(REPEATS):
            actor = AnswerActor(settings)
            with slow(mb_s), ThreadPoolExecutor(calls) as pool:
                began = time.perf_counter()
                found = list(pool.map(lambda name, a=actor: ask(a, name), documents))
                best = min(best, time.perf_counter() - began)
            if found != (expected := expected or found):
                raise AssertionError("fetching ahead changed an answer")
        rows.append({"calls at a time": calls, "seconds": round(best, 2)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2K tokens, 16 questions: too short for the targets")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--store-mb-s", type=float, default=200)
    args = parser.parse_args()
    tokens, n_questions = (2048, 16) if args.quick else (args.tokens, args.questions)
    torch.set_num_threads(args.threads)
    loaded = load_model(ModelConfig(device="cpu"))
    documents = {}
    with tempfile.TemporaryDirectory(prefix="rabatch-bench-") as folder:
        store = IndexStore(folder, create=True)
        for number in range(DOCUMENTS):
            length = tokens if number == 0 else tokens // 2
            made, questions = generate_document(
                document_id=f"d{number}", tokens=length, n_questions=n_questions, seed=number
            )
            documents[f"d{number}"] = store_document(loaded, store, made["text"], args.threads)[0], questions
        budgets = under_budgets(loaded, store, *documents["d0"], args.store_mb_s)
        few = {name: (documents[name][0], documents[name][1][: n_questions // 8]) for name in list(documents)[1:]}
        ahead = in_turn(store, few, args.store_mb_s / 10, args.threads)
    slower = round(budgets[-1]["seconds"] / budgets[0]["seconds"], 2)
    grown = round(budgets[-2]["seconds"] / budgets[-1]["seconds"], 2)
    gain = round(ahead[0]["seconds"] / ahead[1]["seconds"], 2)
    targets = [
        {"name": "layer by layer / all in memory, seconds", "value": slower, "target": 3.0, "holds": slower <= 3},
        {"name": "layer by layer: as asked / more together", "value": grown, "target": 1.5, "holds": grown >= 1.5},
        {"name": "documents in turn / next one ahead", "value": gain, "target": 1.2, "holds": gain >= 1.2},
    ]
    print(f"{machine(args.threads)}, demo model, {tokens} tokens, {n_questions} questions, {args.store_mb_s:g} MB/s\n")
    print(table(budgets, list(budgets[0])))
    print()
    print(table(ahead, list(ahead[0])))
    print()
    print(table(targets, ["name", "value", "target", "holds"]))
    print(json.dumps({"benchmark": "memory", "budgets": budgets, "ahead": ahead, "targets": targets}))


if __name__ == "__main__":
    main()
