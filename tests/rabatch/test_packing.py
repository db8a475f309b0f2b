"""Contexts that share forward passes: what is stored of one depends on neighbours and chunk by rounding only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from rabatch import prefill
from rabatch.config import BuildConfig, ModelConfig
from rabatch.loading import LoadedModel, load_model
from rabatch.prefill import prefill_units
from rabatch.prompts import EncodedContext
from rabatch.units import Unit, unit_array, unit_tensor
from tests.rabatch.models import ARCHITECTURES, save_tiny_model

BUILD = BuildConfig(
    sink_tokens=4, window_tokens=24, query_top_k=6, query_share=0.4, prefill_chunk_tokens=4096, kv_dtype="float32"
)
TEXTS = [
    "The mill by the river is old. " * 12,
    "One.",
    "Her ledger says that the harbour was closed in winter, and nobody came. " * 5,
    "Ships carry salt, wool and copper to the north. " * 9,
]


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(device="cpu"))


def contexts_of(loaded: LoadedModel) -> list[EncodedContext]:
    return [prefill.encode(loaded, str(number), text) for number, text in enumerate(TEXTS)]


def stored(loaded: LoadedModel, contexts: list[EncodedContext], build: BuildConfig) -> list[list[Unit]]:
    units: list[list[Unit]] = [[] for _ in contexts]
    for number, unit in prefill_units(loaded, contexts, build):
        units[number].append(unit)
    return units


def assert_same(loaded: LoadedModel, one: list[Unit], other: list[Unit], build: BuildConfig) -> None:
    """Equal but for rounding; lists by the scores of what they name, as rounding may swap keys that score alike."""
    assert len(one) == len(other) == one[0]["n_units"]
    assert one[0]["token_id"] == other[0]["token_id"]
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert (mine["layer"], mine["head_start"], mine["head_stop"]) == (theirs["layer"], 0, mine["head_stop"])
        heads, dim = mine["head_stop"], loaded.geometry.head_dim
        keys, their_keys = (unit_tensor(u["keys"], "float32", heads, dim) for u in (mine, theirs))
        torch.testing.assert_close(keys, their_keys, atol=2e-4, rtol=1e-3)
        values, their_values = (unit_tensor(u["values"], "float32", heads, dim) for u in (mine, theirs))
        torch.testing.assert_close(values, their_values, atol=2e-4, rtol=1e-3)
        lists, their_lists = (
            unit_array(u["lists"], np.int32).reshape(heads, -1, build.query_top_k) for u in (mine, theirs)
        )
        queries, their_queries = (
            torch.from_numpy(unit_array(u["queries"], np.float32).copy()).view(heads, -1, dim) for u in (mine, theirs)
        )
        torch.testing.assert_close(queries, their_queries, atol=2e-4, rtol=1e-3)
        np.testing.assert_array_equal(lists < 0, their_lists < 0)
        if not lists.size:
            continue
        scores = queries @ keys[:, build.sink_tokens :].transpose(1, 2)
        n = queries.shape[1]
        found, their_found = (
            scores.gather(2, torch.from_numpy(ids[:, :n].copy()).clamp_min(0).long()) for ids in (lists, their_lists)
        )
        torch.testing.assert_close(found, their_found, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("chunk", [7, 100, 4096])
def test_neighbours_and_chunks_do_not_matter(demo: LoadedModel, chunk: int) -> None:
    contexts = contexts_of(demo)
    packed = stored(demo, contexts, dataclasses.replace(BUILD, prefill_chunk_tokens=chunk))
    for context, units in zip(contexts, packed, strict=True):
        (alone,) = stored(demo, [context], BUILD)
        assert_same(demo, alone, units, BUILD)


@pytest.mark.parametrize("name", ["gemma2", "mistral-sliding", "phi3", "qwen2-sliding", "qwen3"])
def test_every_kind_of_attention_packs(name: str, tmp_path: Path) -> None:
    """Soft caps, sliding windows, norms of queries: in chunks that cross borders, beside one pass each."""
    assert name in ARCHITECTURES
    loaded = load_model(ModelConfig(name=str(save_tiny_model(name, tmp_path / name)), device="cpu"))
    contexts = contexts_of(loaded)
    packed = stored(loaded, contexts, dataclasses.replace(BUILD, prefill_chunk_tokens=50))
    for context, units in zip(contexts, packed, strict=True):
        (alone,) = stored(loaded, [context], BUILD)
        assert_same(loaded, alone, units, BUILD)


def test_order_does_not_matter(demo: LoadedModel) -> None:
    contexts = contexts_of(demo)
    for one, other in zip(stored(demo, contexts, BUILD), reversed(stored(demo, contexts[::-1], BUILD)), strict=True):
        assert_same(demo, one, other, BUILD)


def test_seconds_are_shared_by_tokens(demo: LoadedModel) -> None:
    contexts = contexts_of(demo)
    units = stored(demo, contexts, BUILD)
    seconds = [unit[0]["prefill_s"] for unit in units]
    per_token = [s / len(context) for s, context in zip(seconds, contexts, strict=True)]
    np.testing.assert_allclose(per_token, per_token[0])
    assert per_token[0] > 0
