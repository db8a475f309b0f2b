"""Helpers that drive the engine without Ray: store one document, look at logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rabatch.config import BuildConfig, GenerationSettings, Recipe
from rabatch.contexts import OpenContext
from rabatch.executor import Executor
from rabatch.fingerprint import index_fields
from rabatch.generation import Generation
from rabatch.indexing import content_digest, make_manifest, store_unit
from rabatch.loading import LoadedModel
from rabatch.prefill import encode, prefill_units
from rabatch.storage.manifest import Manifest, fingerprint_of
from rabatch.storage.store import IndexStore


def store_document(
    loaded: LoadedModel, store: IndexStore, text: str, build: BuildConfig, document_id: str = "d"
) -> Manifest:
    """What the jobs do for one document, in this process."""
    fields = index_fields(loaded.config, build)
    fingerprint = fingerprint_of(fields)
    attempt = store.new_attempt()
    units = [unit for _, unit in prefill_units(loaded, [encode(loaded, document_id, text)], build)]
    parts = [
        store_unit(store, unit, build, document_id=document_id, fingerprint=fingerprint, attempt=attempt)[0]
        for unit in units
    ]
    return store.commit(
        make_manifest(
            document_id=document_id,
            content_sha256=content_digest(text),
            text_chars=len(text),
            metadata={},
            fingerprint_fields=fields,
            fingerprint=fingerprint,
            units_geometry=units[0]["geometry"],
            context_tokens=units[0]["context_tokens"],
            parts=parts,
            stats={},
        )
    )


def new_store(folder: Path) -> IndexStore:
    return IndexStore(str(folder / "store"), create=True)


@torch.inference_mode()
def tail_logits(
    context: OpenContext,
    tails: Sequence[list[int]],
    recipe: Recipe,
    steps: int = 1,
    then: Callable[[Executor], None] = lambda executor: None,
) -> Tensor:
    """Logits after each tail and `steps` - 1 greedily generated tokens, [batch, steps, vocab]; `then` looks on."""
    generation = Generation(context.loaded, GenerationSettings(max_new_tokens=steps), context.token_ids)
    executor = Executor(context, recipe, generation, slots=len(tails))
    found = [executor.forward(0, tails, question=True)]
    for _ in range(steps - 1):
        found.append(executor.forward(0, found[-1].argmax(-1, keepdim=True).tolist(), question=False))
    then(executor)
    return torch.stack(found, dim=1)
