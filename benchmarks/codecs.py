"""What codecs of keys and values cost and save: bytes per token, times of opening and decoding, answers lost.

    python benchmarks/codecs.py [--quick] [--parts bytes,times,quality] [--questions 512] [--threads 2]

Bytes: a layer part of keys of `rabatch.index.synthetic` and normal values, head_dim 128, in bfloat16, against keys and
values alone in bfloat16; whole files, with their metadata and static set (128 + 512 tokens, never encoded). Packed
links take the same bytes whatever they are, so past 8K tokens they are random. Quality: the demo model answers the same
questions over the same prefilled documents, whose stored index is encoded anew for every pair of codecs. A pair is
CODEC OF KEYS/CODEC OF VALUES.
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
from common.measures import best_seconds, machine, table
from decode import store_document

from rabatch.attention.coded import CodedRows
from rabatch.attention.context import QuestionAttention
from rabatch.attention.layer import ContextLayer
from rabatch.attention.seam import AttentionCall
from rabatch.config import Codec, GenerationSettings, GraphConfig, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.evaluation.scoring import exact_match
from rabatch.index.base import QuerySample
from rabatch.index.graph import build_layer
from rabatch.index.synthetic import attention_vectors
from rabatch.index.zones import partition
from rabatch.indexing import coded_block
from rabatch.loading import LoadedModel, load_model
from rabatch.selectors import open_indexes
from rabatch.storage.blocks import LayerBlock
from rabatch.storage.codecs import decode
from rabatch.storage.manifest import Manifest, fingerprint_of
from rabatch.storage.packed_ids import ascending
from rabatch.storage.parts import decode_layer, encode_layer
from rabatch.storage.store import IndexStore

Pair = tuple[Codec, Codec]
PAIRS: tuple[Pair, ...] = (
    ("none", "none"), ("int8", "int8"), ("int8", "kivi2"), ("int4", "int4"), ("kivi2", "kivi2")
)  # fmt: skip
TARGETS = {("int8", "int8"): 0.65, ("int8", "kivi2"): 0.45}
SINK, WINDOW, DIM, DEGREE, GROUP = 128, 512, 128, GraphConfig().degree, 4
NAMED = {"fingerprint": "f" * 64, "document_key": "d" * 32}
PER_DOCUMENT = 64
LOSS = 0.5


def made_block(tokens: int, n_heads: int, *, threads: int, linked: bool, zones: bool = False) -> LayerBlock:
    """A layer of synthetic keys and normal values with a graph, linked by its builder or at random."""
    random = np.random.default_rng(tokens)
    pairs = [attention_vectors(tokens, 256, head_dim=DIM, seed=head) for head in range(n_heads)]
    keys = np.stack([keys for _, keys in pairs])
    widths = np.exp(0.5 * random.standard_normal((n_heads, 1, DIM), np.float32))
    values = random.standard_normal(keys.shape, np.float32) * widths
    states = [torch.from_numpy(x).bfloat16() for x in (keys, values)]
    indexed = states[0][:, SINK : tokens - WINDOW].float().numpy()
    n = indexed.shape[1]
    if linked:
        scores = [queries @ head.T for (queries, _), head in zip(pairs, indexed, strict=True)]
        samples = [QuerySample(np.argsort(-s, axis=1)[:, :32].astype(np.int32)) for s in scores]
        graphs = build_layer(indexed, samples, config=GraphConfig(), threads=threads)
        neighbors = np.stack([graph.neighbors for graph in graphs])
        entries = np.stack([np.resize(graph.entries, 16) for graph in graphs])
    else:
        neighbors = random.integers(0, n, (n_heads, n, DEGREE), dtype=np.int32)
        entries = random.integers(0, n, (n_heads, 16), dtype=np.int32)
    return LayerBlock(
        layer=0,
        head_start=0,
        positions=np.arange(tokens, dtype=np.int32),
        keys=states[0],
        values=states[1],
        neighbors=ascending(neighbors),
        entries=entries,
        zones=partition(indexed, zone_tokens=64, threads=threads) if zones else None,
        index_start=SINK,
    )


def coded(block: LayerBlock, pair: Pair) -> LayerBlock:
    return coded_block(block, (block.index_start, block.index_start + block.index_rows), *pair)


def checked(block: LayerBlock) -> Any:
    """The bytes of a block, which is what they are read as."""
    data = encode_layer(block, **NAMED)
    if not decode_layer(data, name="part").equals(block):
        raise AssertionError("what was read is not what was written")
    return data


def measure_bytes(lengths: list[int], threads: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows, targets = [], []
    for tokens in lengths:
        block = made_block(tokens, 2, threads=threads, linked=tokens <= 8192)
        for pair in PAIRS:
            data = checked(coded(block, pair))
            per_token = data.size / tokens / block.n_heads
            ratio = per_token / (2 * DIM * 2)
            exact = {"key": block.keys, "value": block.values}
            errors = {}
            for of, held in (("key", coded(block, pair).key_codes), ("value", coded(block, pair).value_codes)):
                if held is not None:
                    x = exact[of][:, SINK : tokens - WINDOW].float().numpy()
                    spread = np.square(x - x.mean(axis=1, keepdims=True)).mean()
                    errors[of] = round(float(np.sqrt(np.square(decode(held) - x).mean() / spread)), 4)
            rows.append(
                {
                    "tokens": tokens,
                    "codecs": "/".join(pair),
                    "bytes per token": round(per_token, 1),
                    "of bf16 keys + values": round(ratio, 3),
                    "error of keys": errors.get("key", "-"),
                    "error of values": errors.get("value", "-"),
                }
            )
            if pair in TARGETS:
                name = f"bytes of {'/'.join(pair)} with graph, of bf16 keys + values, {tokens} tokens"
                most = TARGETS[pair]
                targets.append({"name": name, "value": round(ratio, 4), "target": most, "holds": ratio <= most})
    return rows, targets


def opened_layer(block: LayerBlock, recipe: Recipe, threads: int) -> ContextLayer:
    """As `rabatch.contexts` opens it."""
    from rabatch.storage.joining import decoded

    if block.key_codes is not None and block.key_codes.codec != "int8":
        block = decoded(block, ("key",))
    start, stop = block.index_start, block.index_start + block.index_rows
    key_codes, value_codes = (c and CodedRows.of(c, start, "cpu") for c in (block.key_codes, block.value_codes))
    layer = ContextLayer(
        keys=block.keys, values=block.values, first_position=0, index_start=start, index_stop=stop,
        budget=np.full(block.n_heads, recipe.top_k), zones=block.zones, key_codes=key_codes, value_codes=value_codes,
        indexes={} if recipe.method == "dense" else open_indexes(
            [recipe.method], recipe, block, np.arange(block.n_heads), start, stop, threads=threads
        ),
    )  # fmt: skip
    layer.prepare(recipe)
    return layer


def step(layer: ContextLayer, recipe: Recipe, questions: int) -> tuple[torch.Tensor, float]:
    """Output and seconds of one pass of some questions over a layer."""
    n_kv, n_rows, dim = layer.shape
    attention = QuestionAttention([layer], context_tokens=n_rows, slots=questions, recipe=recipe)
    queries = [attention_vectors(1024, questions * GROUP, head_dim=dim, seed=head)[0] for head in range(n_kv)]
    query = torch.from_numpy(np.stack(queries)).reshape(n_kv, questions, GROUP, dim).transpose(0, 1)
    own = torch.randn((questions, n_kv, 1, dim), generator=torch.Generator().manual_seed(0))
    call = AttentionCall(0, query.reshape(questions, n_kv * GROUP, 1, dim).contiguous(), own, own, dim**-0.5, None, 0)

    def run() -> torch.Tensor:
        for slot in range(questions):
            attention.clear(slot)
        attention.begin(0, [1] * questions, question=False)
        return attention.attend(call)

    return best_seconds(run, 9)


def measure_times(tokens: int, threads: int) -> list[dict[str, Any]]:
    block = made_block(tokens, 2, threads=threads, linked=True, zones=True)
    rows = []
    for pair in PAIRS:
        data = checked(coded(block, pair))
        with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
            file.write(memoryview(data))
            file.flush()

            def read() -> LayerBlock:
                with open(file.name, "rb") as source:
                    return decode_layer(source, name="part")

            held, seconds = best_seconds(read, 5)
        row = {
            "codecs": "/".join(pair),
            "MB": round(data.size / 1e6, 1),
            "open ms": round(1e3 * seconds, 1),
            "GB/s": round(data.size / 1e9 / seconds, 2),
        }
        for method, questions in (("graph", 1), ("graph", 16), ("dense", 1), ("dense", 16)):
            recipe = Recipe(method=method, budget="fixed")  # type: ignore[arg-type]
            layer = opened_layer(held, recipe, threads)
            out, seconds = step(layer, recipe, questions)
            whole = dict(zip(("keys", "values"), layer.whole(), strict=True))
            plain = dataclasses.replace(layer, **whole, key_codes=None, value_codes=None)
            expected, _ = step(plain, recipe, questions)
            if not torch.allclose(out, expected, atol=1e-3):
                raise AssertionError(f"{pair}, {method}: off by {float((out - expected).abs().max())}")
            row[f"{method}, {questions}: ms"] = round(1e3 * seconds, 2)
        rows.append(row)
    return rows


def encoded_anew(store: IndexStore, manifest: Manifest, pair: Pair) -> Manifest:
    """The same document under other codecs, as a build with them would have stored it."""
    fields = json.loads(json.dumps(manifest.fingerprint_fields))
    fields["build"] |= {"key_codec": pair[0], "value_codec": pair[1]}
    where = {"document_id": manifest.document_id, "fingerprint": fingerprint_of(fields), "attempt": store.new_attempt()}
    parts = [store.put_tokens(store.read_tokens(manifest), **where)]
    for number in range(manifest.geometry.n_layers):
        block = store.read_layer(manifest, number)
        coded_now = block if manifest.geometry.sliding_windows[number] else coded(block, pair)
        parts.append(store.put_layer(coded_now, **where))
    changed = {"fingerprint": where["fingerprint"], "fingerprint_fields": fields, "parts": tuple(parts)}
    return store.commit(dataclasses.replace(manifest, **changed))


def right(
    loaded: LoadedModel, store: IndexStore, manifest: Manifest, questions: list[dict[str, Any]], recipe: Recipe
) -> list[bool]:
    context = open_context(store, manifest, loaded, recipe, threads=torch.get_num_threads())
    rows = answer_batch(context, questions, recipe, GenerationSettings(max_new_tokens=32), slots=16)
    for row in rows:
        if row["status"] != "ok":
            raise AssertionError(f"question {row['question_id']} failed: {row['reason']}")
    return [exact_match(row["expected"], row["answer"]) for row in rows]


def measure_quality(
    tokens: int, n_questions: int, methods: list[str], threads: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    loaded = load_model(ModelConfig(device="cpu"))
    found: dict[tuple[Pair, str], list[bool]] = defaultdict(list)
    sizes: dict[Pair, list[float]] = defaultdict(list)
    for number in range(-(-n_questions // PER_DOCUMENT)):
        document, questions = generate_document(
            document_id=f"d{number}", tokens=tokens, n_questions=min(PER_DOCUMENT, n_questions), seed=2000 + number
        )
        with tempfile.TemporaryDirectory(prefix="rabatch-bench-") as folder, torch.inference_mode():
            store = IndexStore(folder, create=True)
            manifest, _, _ = store_document(loaded, store, document["text"], threads)
            shape = manifest.geometry
            raw = manifest.context_tokens * shape.n_layers * shape.n_kv_heads * 2 * shape.head_dim * 2
            for pair in PAIRS:
                of_pair = manifest if pair == ("none", "none") else encoded_anew(store, manifest, pair)
                sizes[pair].append(sum(part.bytes for part in of_pair.parts if part.kind == "layer") / raw)
                for method in methods:
                    recipe = Recipe(method=method)  # type: ignore[arg-type]
                    found[pair, method] += right(loaded, store, of_pair, questions, recipe)
        done = {f"{'/'.join(pair)} {m}": round(100 * float(np.mean(r)), 2) for (pair, m), r in found.items()}
        print(f"document {number}: {done}", flush=True)
    rows, targets = [], []
    for (pair, method), of_pair_answers in found.items():
        plain = found[("none", "none"), method]
        loss = 100 * (float(np.mean(plain)) - float(np.mean(of_pair_answers)))
        rows.append(
            {
                "codecs": "/".join(pair),
                "recipe": method,
                "questions": len(of_pair_answers),
                "right %": round(100 * float(np.mean(of_pair_answers)), 2),
                "points lost": round(loss, 2),
                "answers that changed": int(np.not_equal(plain, of_pair_answers).sum()),
                "stored, of bf16 keys + values": round(float(np.mean(sizes[pair])), 3),
            }
        )
        if pair != ("none", "none"):
            name = f"points lost, {'/'.join(pair)}, {method}, {tokens} tokens"
            targets.append({"name": name, "value": round(loss, 2), "target": LOSS, "holds": loss <= LOSS})
    return rows, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="bytes at 2K tokens, times at 4K, 16 questions")
    parser.add_argument("--parts", default="bytes,times,quality")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--methods", default="graph,dense", help="recipes that answer questions")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parts, made, targets = args.parts.split(","), {}, []
    if "bytes" in parts:
        made["bytes"], found = measure_bytes([2048] if args.quick else [8192, 32768, 131072], args.threads)
        targets += found
    if "times" in parts:
        made["times"] = measure_times(4096 if args.quick else 32768, args.threads)
    if "quality" in parts:
        n_questions, tokens = (16, 2048) if args.quick else (args.questions, 8192)
        made["quality"], found = measure_quality(tokens, n_questions, args.methods.split(","), args.threads)
        targets += found
    print(f"\n{machine(args.threads)}\n")
    for rows in (*made.values(), targets):
        if rows:
            print(table(rows, list(rows[0])))
            print()
    print(json.dumps({"benchmark": "codecs", **made, "targets": targets}))


if __name__ == "__main__":
    main()
