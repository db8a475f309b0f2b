"""Helpers that drive the engine without Ray: store one document, look at logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rabatch.attention.caches import TailCache
from rabatch.attention.context import QuestionAttention
from rabatch.attention.seam import attending
from rabatch.config import BuildConfig, Recipe
from rabatch.decode import OpenContext
from rabatch.fingerprint import index_fields
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
def tail_logits(context: OpenContext, tails: Sequence[list[int]], recipe: Recipe, steps: int = 1) -> Tensor:
    """Logits after each tail and `steps` - 1 greedily generated tokens, left-padded: [batch, steps, vocab]."""
    model = context.loaded.model
    n, longest = len(context.token_ids), max(map(len, tails))
    pads = [longest - len(tail) for tail in tails]
    device = context.loaded.config.device
    ids = torch.tensor([[0] * pad + tail for pad, tail in zip(pads, tails, strict=True)]).to(device)
    mask = torch.ones(len(tails), n + longest, dtype=torch.long, device=device)
    for row, pad in enumerate(pads):
        mask[row, n : n + pad] = 0
    cache = TailCache(len(context.layers), n)
    found = []
    with attending(QuestionAttention(context.layers, context_tokens=n, pads=pads, recipe=recipe)):
        for _ in range(steps):
            positions = (mask.cumsum(-1) - 1)[:, -ids.shape[1] :]
            logits = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits[:, -1]
            found.append(logits)
            ids = logits.argmax(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(tails), 1)], dim=1)
    return torch.stack(found, dim=1)
