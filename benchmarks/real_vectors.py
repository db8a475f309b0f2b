"""Real query and key vectors of the demo model, for benchmarks of key indexes.

    python benchmarks/real_vectors.py [--quick] [--tokens 8192] [--questions 32] [--seed 0] [--cache DIR]

A generated document is prefilled and asked as the engine does it, with dense attention, while what the attention sees
is recorded. Prints, per layer and KV head, how much of the softmax mass of held-out queries the ideal top 100 hold
together with the static set and the tail, and checks what was recorded against brute force.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.index.base import QuerySample

LONGEST = 40640  # tokens of a document: 40960 positions, less 256 for a question, BOS, the generator's overshoot
TOP_K = 100
ROUNDED = 2.0**-8  # tolerance where keys are rounded to bfloat16: 2^-9 of |q||k| for each of two scores compared


@dataclass(frozen=True)
class LayerVectors:
    """What one layer of a document holds and is asked for. Vectors are as the attention sees them, rotated.

    Attributes:
        keys: [n_kv_heads, n_keys, head_dim], float32: the range of the key index alone, rounded to bfloat16 as stored.
        samples: One per KV head: lists [n_sampled, list_length] and vectors [n_sampled, head_dim] of the sampled
            prefill queries, all query heads of the group, ordered by (prefill chunk, query head, position).
        positions: [n_sampled], int64: where in the context each sampled query stands, the same for every KV head.
        decode_queries: [n_kv_heads, n_decode, head_dim], float32, held out: the last token of each question and all
            tokens generated, ordered by (step, question, query head of the group).
        static_lse, dense_lse: [n_kv_heads, n_decode], float32: log-sum-exp of the logits of the decode queries over
            static set and tail; over all context keys and tail.
        scaling: Factor on q.k.
    """

    layer: int
    keys: np.ndarray
    samples: list[QuerySample]
    positions: np.ndarray
    decode_queries: np.ndarray
    static_lse: np.ndarray
    dense_lse: np.ndarray
    scaling: float


def demo_vectors(
    context_tokens: int, *, questions: int = 32, seed: int = 0, cache: Path | None = None, list_length: int = 32
) -> list[LayerVectors]:
    """Vectors per layer of a document of `context_tokens` (at most `LONGEST`) to + 64 tokens; `cache` is a folder."""
    path = cache and cache / f"demo-t{context_tokens}-q{questions}-s{seed}-k{list_length}.npz"
    if path and path.exists():
        with np.load(path) as file:
            arrays = dict(file)
    else:
        arrays = _record(context_tokens, questions, seed, list_length)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **arrays)  # type: ignore[arg-type]
    layers = []
    for layer in range(sum(name.endswith(".keys") for name in arrays)):
        of_layer = {name.split(".")[1]: array for name, array in arrays.items() if name.startswith(f"{layer}.")}
        lists, queries = of_layer.pop("topk"), of_layer.pop("queries")
        samples = [QuerySample(*sample) for sample in zip(lists, queries, strict=True)]
        layers.append(LayerVectors(layer=layer, samples=samples, scaling=float(of_layer.pop("scaling")), **of_layer))
    return layers


class _Recorder:
    """Attends in place of a session of the engine and keeps what it sees, by layer and name, once per forward pass."""

    session: Any = None

    def __init__(self) -> None:
        self.seen: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def over(self, session: Any) -> _Recorder:
        self.session = session
        return self

    def inside(self, module: ModuleType) -> AbstractContextManager[Any]:
        """Every attention that `module` (prefill or executor) gives its model is recorded."""
        attending = module.attending
        return mock.patch.object(module, "attending", lambda session: attending(self.over(session)))


class _PrefillRecorder(_Recorder):
    """The keys before they are rounded to the stored dtype; lists and vectors are in the session's sample."""

    def attend(self, call: Any) -> Tensor:
        self.seen[call.layer, "keys"] = [call.key[0]]  # in the end, all keys
        return self.session.attend(call)

    def arrays(self, layer: int) -> dict[str, np.ndarray]:
        """Lists, vectors and positions, without the queries that see no key of the index."""
        sample = self.session.contexts[0]
        lists, vectors = sample.of_heads(layer, 0, len(self.seen[layer, "keys"][0]))
        assert lists.shape[1] == vectors.shape[1], "every sampled query's vector is kept"
        topk, queries = lists.numpy(), vectors.float().numpy()
        positions = sample.positions.repeat(topk.shape[1] // len(sample.positions)).numpy()
        kept = topk[0, :, 0] >= 0
        assert ((topk[:, :, 0] >= 0) == kept).all()
        return {"topk": topk[:, kept], "queries": queries[:, kept], "positions": positions[kept]}


class _DecodeRecorder(_Recorder):
    """The answering queries of a `QuestionAttention`: of every step the last token, which is never padding."""

    def attend(self, call: Any) -> Tensor:
        out: Tensor = self.session.attend(call)
        tails = self.session.tails
        of_batch, last = torch.arange(len(tails.counts)), tails.counts - 1
        keys, values = tails.of(call.layer)
        layer = self.session.layers[call.layer]
        queries = (
            call.query[of_batch, :, last].unflatten(1, (call.key.shape[1], -1)).transpose(0, 1)
        )  # [kv, b, group, dim]
        tail = torch.einsum("hbgd,bhtd->hbgt", queries, keys) * call.scaling
        visible = torch.arange(keys.shape[2]) <= tails.places[of_batch, last][:, None]
        tail = tail.masked_fill(~visible[None, :, None], -torch.inf)
        context = torch.einsum("hbgd,hnd->hbgn", queries, layer.keys.float()) * call.scaling
        scores = torch.cat([context, tail], dim=-1)
        # Recorded vectors must give the very output that the model went on with.
        weights = scores.softmax(dim=-1).split([context.shape[-1], tail.shape[-1]], dim=-1)
        again = torch.einsum("hbgn,hnd->bhgd", weights[0], layer.values.float())
        again += torch.einsum("hbgt,bhtd->bhgd", weights[1], values)
        torch.testing.assert_close(again.flatten(1, 2), out[of_batch, last], rtol=1e-3, atol=1e-4)
        static = torch.cat([context[..., layer.static.positions], tail], dim=-1)
        self.seen[call.layer, "decode_queries"].append(queries.flatten(1, 2).float())
        self.seen[call.layer, "static_lse"].append(static.logsumexp(-1).flatten(1))
        self.seen[call.layer, "dense_lse"].append(scores.logsumexp(-1).flatten(1))
        self.seen[call.layer, "scaling"] = [torch.tensor(call.scaling)]
        return out


def _record(tokens: int, n_questions: int, seed: int, list_length: int) -> dict[str, np.ndarray]:
    # Imported here: reading a cached result needs neither transformers nor the model.
    from rabatch import IndexStore, contexts, decode, executor, fingerprint, indexing, loading, prefill
    from rabatch.demo.corpus import generate_document
    from rabatch.evaluation.scoring import exact_match
    from rabatch.storage.manifest import fingerprint_of

    loaded = loading.load_model(ModelConfig(device="cpu"))
    build = BuildConfig(query_top_k=list_length, sample_vectors=tokens * 1000)  # of every sampled query
    document, questions = generate_document(document_id="bench", tokens=tokens, n_questions=n_questions, seed=seed)
    prefilled, decoded = _PrefillRecorder(), _DecodeRecorder()
    with prefilled.inside(prefill):
        encoded = prefill.encode(loaded, "bench", text := document["text"])
        units = [unit for _, unit in prefill.prefill_units(loaded, [encoded], build)]
    # Dense attention reads no graph, so none is built; the lists were captured above.
    bare, recipe = replace(build, index="none"), Recipe(method="dense")
    geometry = json.dumps({**json.loads(units[0]["geometry"]), "index": "none", "degree": 0})
    fields = fingerprint.index_fields(loaded.config, bare)
    with tempfile.TemporaryDirectory(prefix="rabatch-vectors-") as folder, torch.inference_mode():
        store = IndexStore(folder, create=True)
        where: dict[str, Any] = {"document_id": "bench", "fingerprint": fingerprint_of(fields)}
        bare_units = [{**unit, "geometry": geometry} for unit in units]
        parts = [indexing.store_unit(store, unit, bare, **where, attempt="a")[0] for unit in bare_units]
        about: dict[str, Any] = {"text_chars": len(text), "content_sha256": indexing.content_digest(text)}
        about |= {"context_tokens": units[0]["context_tokens"], "units_geometry": geometry, "parts": parts}
        manifest = indexing.make_manifest(**where, **about, fingerprint_fields=fields, metadata={}, stats={})
        context = contexts.open_context(store, store.commit(manifest), loaded, recipe)
        with decoded.inside(executor):
            rows = decode.answer_batch(context, questions, recipe, GenerationSettings())
    assert all(row["status"] == "ok" for row in rows), [row["reason"] for row in rows]
    right = sum(exact_match(row["expected"], row["answer"]) for row in rows)
    print(f"{manifest.context_tokens} context tokens; {right} of {len(rows)} answers right", file=sys.stderr)
    arrays: dict[str, np.ndarray] = {}
    for number, layer in enumerate(context.layers):
        indexed = slice(layer.index_start, layer.index_stop)
        made = prefilled.arrays(number)
        for head, keys in enumerate(prefilled.seen[number, "keys"][0][:, indexed].float().numpy()):
            check_lists(keys, QuerySample(made["topk"][head], made["queries"][head]), made["positions"])
        for name in ("decode_queries", "static_lse", "dense_lse"):
            made[name] = torch.cat(decoded.seen[number, name], dim=1).numpy()
        made["scaling"] = decoded.seen[number, "scaling"][0].numpy()
        made["keys"] = layer.keys[:, indexed].float().contiguous().numpy()
        arrays |= {f"{number}.{name}": array for name, array in made.items()}
    return arrays


def check_lists(keys: np.ndarray, sample: QuerySample, positions: np.ndarray, tolerance: float = 1e-5) -> None:
    """A few lists are the brute-force top-k of those `keys` [n_keys, head_dim] that lie a window before their query.

    Compared by score at every rank, so that ties may stand in any order; `tolerance` is in units of |q| max|k|.
    """
    assert sample.queries is not None
    build = BuildConfig()
    for row in np.linspace(0, len(positions) - 1, 16).astype(int):
        # Key j of the index stands at position sink + j, and is visible up to `window` tokens before the query.
        n_visible = min(int(positions[row]) - build.window_tokens - build.sink_tokens + 1, len(keys))
        scores = keys[:n_visible] @ sample.queries[row]
        ids = sample.topk[row][: min(sample.topk.shape[1], n_visible)]
        assert len({*ids} & {*range(n_visible)}) == len(ids)
        assert (sample.topk[row][len(ids) :] == -1).all()
        scale = np.linalg.norm(sample.queries[row]) * np.linalg.norm(keys, axis=1).max()
        np.testing.assert_allclose(scores[ids], np.sort(scores)[::-1][: len(ids)], rtol=0, atol=tolerance * scale)


def shares(vectors: LayerVectors, head: int) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the softmax mass of decode queries, [n_decode]: of static set and tail; with the ideal top-k too."""
    scores = torch.from_numpy(vectors.decode_queries[head] @ vectors.keys[head].T) * vectors.scaling
    static, dense = torch.from_numpy(vectors.static_lse[head]), torch.from_numpy(vectors.dense_lse[head])
    torch.testing.assert_close(torch.logaddexp(static, scores.logsumexp(-1)), dense, rtol=1e-4, atol=1e-4)
    best = scores.topk(min(TOP_K, scores.shape[1]), dim=-1).values.logsumexp(-1)
    return (static - dense).exp().numpy(), (torch.logaddexp(static, best) - dense).exp().numpy()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help=f"of the document, at most {LONGEST}")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=None, help="folder that keeps the vectors")
    parser.add_argument("--quick", action="store_true", help="2048 tokens, 8 questions")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.questions = 2048, 8
    torch.set_num_threads(1)
    layers = demo_vectors(args.tokens, questions=args.questions, seed=args.seed, cache=args.cache)
    print(f"share of the softmax mass of decode queries: static set and tail; with the ideal top {TOP_K} too")
    print("layer head   keys  sampled  decode   static     p10      top     p10")
    for vectors in layers:
        for head, sample in enumerate(vectors.samples):
            check_lists(vectors.keys[head], sample, vectors.positions, tolerance=ROUNDED)
            n_keys, n_decode = vectors.keys.shape[1], vectors.decode_queries.shape[1]
            print(f"{vectors.layer:>5}{head:>5}{n_keys:>7}{len(sample.topk):>9}{n_decode:>8}", end="")
            print(*(f"{share.mean():>9.4f}{np.quantile(share, 0.1):>8.4f}" for share in shares(vectors, head)), sep="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
