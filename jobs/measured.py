"""Rates of earlier runs: from the manifests of a store, which tell how long each document took, and from answers."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rabatch.forecast import Decoding, Rates
from rabatch.storage.filesystem import Folder
from rabatch.storage.manifest import Manifest
from rabatch.storage.store import MARKER, IndexStore

_DOCUMENTS = 500
"""Manifests that are read at most: rates need no more."""


def of_builds(manifests: Iterable[Manifest], *, config_sha256: str, decoding: Decoding, chunk_tokens: int) -> Rates:
    """Rates of building, from documents of the same model config; the device of the newest of them counts.

    Args:
        chunk_tokens: Of the builds; what it changes is far below what is measured.
    """
    mine = [
        manifest
        for manifest in itertools.islice(manifests, _DOCUMENTS)
        if manifest.fingerprint_fields.get("model", {}).get("config") == config_sha256 and _timed(manifest)
    ]
    if not mine:
        return Rates()
    device = max(mine, key=lambda manifest: manifest.created_at).stats.get("device")
    mine = [manifest for manifest in mine if manifest.stats.get("device") == device]
    told = f"measured: {len(mine)} documents built on {device}"
    flops = sum(decoding.work.prefill_flops(manifest.context_tokens, chunk_tokens=chunk_tokens) for manifest in mine)
    index: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for manifest in mine:
        if manifest.geometry.index != "none":
            index[manifest.geometry.index].append((_indexed_keys(manifest), manifest.stats["graph_s"]))
    rates = {kind: rate for kind, found in index.items() if (rate := _rate(found)) is not None}
    write = _rate([(manifest.stored_bytes, manifest.stats["write_s"]) for manifest in mine])
    return Rates(
        prefill_flops_per_s=_rate([(flops, sum(manifest.stats["prefill_s"] for manifest in mine))]),
        index_keys_per_s=rates,
        write_bytes_per_s=write,
        sources={"prefill_flops_per_s": told, "index_keys_per_s": told, "write_bytes_per_s": told},
    )


def of_answers(rows: Iterable[dict[str, Any]], decoding: Decoding, known: Rates) -> Rates:
    """`known`, with what earlier answers tell of decoding.

    Args:
        rows: Of answers of the same model; columns of `rabatch.records.ANSWERS`.
    """
    timed = [
        row
        for row in rows
        if row["status"] == "ok" and row["seconds"] and row["answer_tokens"] and row["context_tokens"]
    ]
    if not timed:
        return known
    together = decoding.questions_per_batch
    spent = sum(row["seconds"] for row in timed)
    bandwidth, sources = known.decode_bytes_per_s, dict(known.sources)
    if bandwidth is None:
        bandwidth = (
            sum(
                row["answer_tokens"] * decoding.token_bytes(row["recipe"], row["context_tokens"], together)
                for row in timed
            )
            / spent
        )
        sources["decode_bytes_per_s"] = f"measured: {len(timed)} answers"
    rates = dataclasses.replace(known, decode_bytes_per_s=bandwidth, sources=sources)
    took: dict[str, float] = defaultdict(float)
    modelled: dict[str, float] = defaultdict(float)
    for row in timed:
        seconds = decoding.token_seconds(row["recipe"], row["context_tokens"], together, rates)
        assert seconds is not None  # the bandwidth is known
        took[row["recipe"]] += row["seconds"]
        modelled[row["recipe"]] += row["answer_tokens"] * seconds
    return dataclasses.replace(rates, measured_over_modelled={name: took[name] / modelled[name] for name in took})


def _timed(manifest: Manifest) -> bool:
    return all(isinstance(manifest.stats.get(name), int | float) for name in ("prefill_s", "graph_s", "write_s"))


def _indexed_keys(manifest: Manifest) -> int:
    shape = manifest.geometry
    full = [layer for layer, window in enumerate(shape.sliding_windows) if not window]
    heads = sum(len(shape.heads(layer, streaming=False)) for layer in full)
    return heads * (manifest.index_stop - manifest.index_start)


def _rate(amounts: Sequence[tuple[float, float]]) -> float | None:
    """Amount per second over all; None where no time was taken."""
    seconds = sum(spent for _, spent in amounts)
    return sum(amount for amount, _ in amounts) / seconds if seconds > 0 else None


def stored_manifests(url: str, storage_options: dict[str, Any]) -> Iterable[Manifest]:
    """Of a store; none where there is no store yet."""
    if not Folder(url, **storage_options).exists(MARKER):
        return ()
    return IndexStore(url, storage_options=storage_options).manifests(on_error=lambda path, error: None)
