"""Small random documents for the storage tests."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from rabatch.storage.blocks import PROFILE_NUMBERS
from rabatch.storage.manifest import Geometry, Manifest, fingerprint_of, utc_now
from rabatch.storage.parts import LayerBlock, TokensBlock
from rabatch.storage.scan_codes import ScanCodes
from rabatch.storage.store import IndexStore

FIELDS = {"format_version": 1, "model": "tiny", "dtype": "bfloat16", "scale": 0.25}
FINGERPRINT = fingerprint_of(FIELDS)
GEOMETRY = Geometry(
    n_layers=3,
    n_kv_heads=2,
    n_query_heads=4,
    head_dim=8,
    kv_dtype="bfloat16",
    sink_tokens=3,
    window_tokens=5,
    index="graph+scan",
    degree=4,
    sliding_windows=(0, 6, 0),
)
HOSTILE_IDS = [
    "../../etc/x",
    "/absolute",
    "s3://other/bucket",
    "con",
    "",
    "a\x00b\nc",
    ".",
    "文書 документ وثيقة दस्तावेज़ 📄"[:30] * 12,
    "x" * 5000,
]


def make_block(
    *,
    layer: int = 0,
    n_heads: int = 2,
    rows: int = 20,
    head_dim: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    degree: int | None = 4,
    index_start: int = 3,
    index_rows: int = 12,
    n_entries: int = 3,
    coded: bool | None = None,
    n_zones: int | None = 4,
    profiled: bool = True,
    massed: bool = False,
    n_queries: int | None = None,
    first_position: int = 0,
    seed: int = 0,
) -> LayerBlock:
    torch_random, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    keys, values = (torch.randn(n_heads, rows, head_dim, generator=torch_random).to(dtype) for _ in range(2))
    neighbors = entries = scan = zones = profile = mass = queries = None
    coded = degree is not None if coded is None else coded  # unless told, with a graph and only then
    if degree is not None:
        neighbors = random.integers(-1, max(index_rows, 0), (n_heads, index_rows, degree)).astype(np.int32)
        n_entries = n_entries if index_rows else 0
        entries = random.integers(0, max(index_rows, 1), (n_heads, n_entries)).astype(np.int32)
    if coded:
        scan = make_codes(random, n_heads, index_rows, head_dim)
    if degree is not None or coded:
        if n_zones is not None:
            zones = random.integers(0, max(min(n_zones, index_rows), 1), (n_heads, index_rows)).astype(np.int32)
        if profiled:
            profile = np.sort(random.random((n_heads, PROFILE_NUMBERS), np.float32), axis=1)
        if massed:
            mass = random.random((n_heads, index_rows), np.float32)
        if n_queries is not None:
            queries = torch.randn(n_heads, n_queries, head_dim, generator=torch_random).to(dtype)
    return LayerBlock(
        layer=layer,
        head_start=0,
        positions=np.arange(first_position, first_position + rows, dtype=np.int32),
        keys=keys,
        values=values,
        neighbors=neighbors,
        entries=entries,
        scan=scan,
        zones=zones,
        profile=profile,
        key_mass=mass,
        queries=queries,
        index_start=index_start if degree is not None or coded else 0,
    )


def make_codes(random: np.random.Generator, n_heads: int, index_rows: int, head_dim: int) -> ScanCodes:
    n_codes = -(-head_dim // 2)
    exceptions = np.full((n_heads, 3), -1, np.int32)
    for ids in exceptions[:, : min(3, index_rows)]:
        ids[:] = random.choice(index_rows, len(ids), replace=False)
    return ScanCodes(
        codes=random.integers(0, 256, (n_heads, index_rows, -(-n_codes // 2)), np.uint8),
        books=random.standard_normal((n_heads, n_codes, 16, 2), np.float32),
        exceptions=exceptions,
        to_query=random.standard_normal((n_heads, head_dim, head_dim), np.float32),
    )


def make_tokens(n: int) -> TokensBlock:
    ids = np.arange(n)
    return TokensBlock(
        positions=ids.astype(np.int32),
        token_ids=(ids * 7 % 101).astype(np.int32),
        char_start=ids * 2,
        char_end=ids * 2 + 2,
    )


def make_blocks(context_tokens: int = 20, geometry: Geometry = GEOMETRY, seed: int = 0) -> list[LayerBlock]:
    start = min(geometry.sink_tokens, context_tokens)
    index_rows = max(start, context_tokens - geometry.window_tokens) - start
    blocks = []
    for layer, sliding in enumerate(geometry.sliding_windows):
        rows = min(sliding, context_tokens) if sliding else context_tokens
        blocks.append(
            make_block(
                layer=layer,
                n_heads=geometry.n_kv_heads,
                rows=rows,
                head_dim=geometry.head_dim,
                dtype=getattr(torch, geometry.kv_dtype),
                degree=geometry.degree if geometry.holds("graph") and not sliding else None,
                coded=geometry.holds("scan") and not sliding,
                index_start=start,
                index_rows=index_rows,
                first_position=context_tokens - rows,
                seed=seed + layer,
            )
        )
    return blocks


def prepare(
    store: IndexStore,
    document_id: str = "doc",
    *,
    context_tokens: int = 20,
    geometry: Geometry = GEOMETRY,
    fields: dict | None = None,
    heads_per_part: int = 2,
    seed: int = 0,
) -> tuple[Manifest, list[LayerBlock]]:
    """Write a document's parts; the manifest is returned and not yet committed."""
    fields = fields or FIELDS
    where = {"document_id": document_id, "fingerprint": fingerprint_of(fields), "attempt": store.new_attempt()}
    blocks = make_blocks(context_tokens, geometry, seed)
    parts = [store.put_tokens(make_tokens(context_tokens), **where)]
    for block in blocks:
        for start in range(0, block.n_heads, heads_per_part):
            some = block.select(range(start, min(start + heads_per_part, block.n_heads)))
            parts.append(store.put_layer(some, **where))
    manifest = Manifest(
        document_id=document_id,
        content_sha256=hashlib.sha256(b"text").hexdigest(),
        fingerprint=where["fingerprint"],
        fingerprint_fields=fields,
        context_tokens=context_tokens,
        text_chars=2 * context_tokens,
        created_at=utc_now(),
        geometry=geometry,
        parts=tuple(parts),
        metadata={"title": "Größe", "year": 2024},
    )
    return manifest, blocks
