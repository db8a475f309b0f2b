"""The Parquet files of an index: one layer's keys, values and index for a range of KV heads, and the tokens.

A layer part has one row group per KV head and one row per token. Keys, values, neighbors and zones are
`fixed_size_binary`, so that a column of a row group is one block of memory in the layout the engine computes with.
Codes of keys and values, and packed neighbors, are null outside the index; what is encoded is null in other columns.
Sampled query vectors stand in the first rows of a column of their own, whatever tokens these are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage.blocks import DTYPE_NAMES, TORCH_DTYPES, LayerBlock, TokensBlock, bits, check_layer
from rabatch.storage.codecs import Coded, from_metadata
from rabatch.storage.columns import binary, binary_ids, binary_rows, bytes_of, ids_of, some_bytes_of, some_rows
from rabatch.storage.layout import PACKED, STATES, Layout
from rabatch.storage.limits import check_layer_bytes, check_tokens_bytes
from rabatch.storage.manifest import FORMAT_VERSION
from rabatch.storage.packed_ids import pack, unpack
from rabatch.storage.scan_codes import from_metadata as scan_from_metadata

__all__ = [
    "LayerBlock",
    "TokensBlock",
    "decode_layer",
    "decode_tokens",
    "encode_layer",
    "encode_tokens",
]

# No compression. Random-like bf16 keys and values, one core: none, lz4 and snappy keep 100% of the bytes, zstd 81%
# at a third of the writing and half of the reading speed. No dictionary and no statistics: neither helps on them.
_WRITER = {"compression": "none", "use_dictionary": False, "write_statistics": False}
# Positions follow each other: no bytes. The schema in Arrow's own form would hold the metadata a second time.
_LAYER_WRITER = {**_WRITER, "column_encoding": {"position": "DELTA_BINARY_PACKED"}, "store_schema": False}
_TOKENS = pa.schema(
    [
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token_id", pa.int32(), nullable=False),
        pa.field("char_start", pa.int64(), nullable=False),
        pa.field("char_end", pa.int64(), nullable=False),
    ]
)


def encode_layer(block: LayerBlock, *, fingerprint: str, document_key: str) -> pa.Buffer:
    """Parquet bytes of a layer block.

    Raises:
        StoreError: Shapes or dtypes of the block contradict each other, or a neighbor is out of range.
    """
    check_layer(block, StoreError, "block")
    layout = Layout.of(block)
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": "layer",
        "layer": block.layer,
        "head_start": block.head_start,
        "head_stop": block.head_stop,
        "dtype": DTYPE_NAMES[block.keys.dtype],
        "head_dim": block.head_dim,
        **layout.metadata(),
        "entries": None if block.entries is None else block.entries.tolist(),
        **({"code_width": 0} if block.scan is None else block.scan.metadata()),
        "n_zones": 0 if block.zones is None else int(block.zones.max(initial=-1)) + 1,
        # The shortest numbers that read back as the same float32.
        "profile": None if block.profile is None else [[float(str(x)) for x in shares] for shares in block.profile],
        **({} if block.key_codes is None else block.key_codes.metadata()),
        **({} if block.value_codes is None else block.value_codes.metadata()),
        "fingerprint": fingerprint,
        "document_key": document_key,
    }
    schema = layout.schema()
    positions = pa.array(np.asarray(block.positions, np.int32))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **_LAYER_WRITER) as writer:
        for head in range(block.n_heads):
            columns = {"position": positions, **_columns(block, layout, head)}
            table = pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
            writer.write_table(table, row_group_size=max(1, block.rows))
        writer.add_key_value_metadata(_to_text(metadata))
    return sink.getvalue()


def _columns(block: LayerBlock, layout: Layout, head: int) -> dict[str, pa.Array]:
    """The binary columns of one head; those of no width too."""
    rows, place = block.rows, {"rows": block.rows, "start": block.index_start}
    columns: dict[str, pa.Array] = {}
    for of, states, coded in zip(STATES, (block.keys, block.values), (block.key_codes, block.value_codes), strict=True):
        if coded is None:
            columns[of] = binary(bits(states[head]), layout.head_dim * layout.item_bytes)
            continue
        arrays = {of: bits(states[head]), f"{of}_code": coded.codes[head], f"{of}_group": coded.groups[head]}
        columns |= {name: some_rows(a, layout.held(name, rows)) for name, a in arrays.items() if a.shape[1]}
    if block.neighbors is not None and layout.degree:
        if layout.neighbor_width == PACKED:
            packed = pack(block.neighbors[head], block.index_rows)
            columns["neighbors"] = some_rows(packed, layout.held("neighbors", rows))
        else:
            columns["neighbors"] = binary_ids(block.neighbors[head], **place, width=layout.neighbor_width)
    if block.scan is not None and block.scan.code_width:
        columns["code"] = binary_rows(block.scan.codes[head], **place)
    if block.zones is not None:
        columns["zone"] = binary_ids(block.zones[head][:, None], **place, width=layout.zone_width)
    if block.key_mass is not None:
        mass = np.ascontiguousarray(block.key_mass[head], "<f4").view(np.uint8).reshape(-1, layout.mass_width)
        columns["mass"] = some_rows(mass, layout.held("mass", rows))
    if block.queries is not None:
        columns["query"] = some_rows(bits(block.queries[head]), layout.held("query", rows))
    return columns


def decode_layer(
    data: Any, *, name: str, expect: Mapping[str, object] | None = None, heads: range | None = None
) -> LayerBlock:
    """The block in Parquet bytes.

    Args:
        data: bytes, an Arrow buffer, or a binary file (then only the row groups of `heads` are read).
        name: The part's path, for messages.
        expect: Schema metadata that must have these values, such as layer, fingerprint and document_key.
        heads: Only these heads of the model; all by default.

    Raises:
        IntegrityError: Not a layer part, not the expected one, or its shapes contradict its metadata.
    """
    try:
        source = data if hasattr(data, "seek") else pa.BufferReader(data)
        size = source.seek(0, 2)
        source.seek(0)
        return _decode_layer(pq.ParquetFile(source), size, name, {"kind": "layer", **(expect or {})}, heads)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        raise _damaged(name, "content", type(error).__name__, str(error).split("\n")[0]) from error


def _decode_layer(
    file: pq.ParquetFile, size: int, name: str, expect: Mapping[str, object], heads: range | None
) -> LayerBlock:
    schema = file.schema_arrow
    meta = _from_text(schema.metadata or {}, name)
    _check_expected(meta, expect, name)

    def rule(holds: bool, where: str, value: object, fix: str) -> None:
        if not holds:
            raise _damaged(name, where, value, fix)

    for key in ("layer", "head_start", "head_stop"):
        rule(type(meta.get(key)) is int and 0 <= meta[key] < 2**31, key, meta.get(key), "must be a whole number >= 0")
    layout = Layout.read(meta, rule)
    stored = range(meta["head_start"], meta["head_stop"])
    heads = stored if heads is None else heads
    inside = len(heads) > 0 and heads.step == 1 and heads.start >= stored.start and heads.stop <= stored.stop
    rule(inside, "head_start", stored, f"does not hold heads {heads}")
    n_zones = _n_zones(meta, layout, name)
    wanted = layout.schema()
    rule(schema.equals(wanted), "columns", schema.names, f"must be {', '.join(map(str, wanted))}")
    groups = file.metadata.num_row_groups
    rule(groups == len(stored), "row groups", groups, f"must be one for each of {len(stored)} heads")
    rows = file.metadata.row_group(0).num_rows
    fits = layout.index_start + layout.index_rows <= rows
    rule(fits, "index_rows", layout.index_rows, f"must fit {rows} rows from {layout.index_start} on")
    rule((layout.n_queries or 0) <= rows, "n_queries", layout.n_queries, f"must fit {rows} rows")
    check_layer_bytes(file.metadata, layout.value_bytes, size, name)  # before memory is taken for it

    arrays, positions = _arrays(layout, len(heads), rows), None
    for i, head in enumerate(heads):
        group = file.read_row_group(head - stored.start)
        rule(group.num_rows == rows, f"row group {head - stored.start}", group.num_rows, f"must have {rows} rows")
        head_positions = group.column("position").to_numpy()
        if positions is None:
            positions = head_positions.astype(np.int32)
        same = np.array_equal(positions, head_positions)
        rule(same, f"row group {head - stored.start}", head, "has other positions than the first head")
        _fill(arrays, i, group, layout, rows)
        if layout.zone_width:
            of_rows = ids_of(group, "zone", rows, layout.zone_width)[:, 0]
            arrays["zone"][i] = of_rows[layout.indexed]
            outside = np.delete(of_rows, layout.indexed)
            sound = not (outside != -1).any() and -1 <= arrays["zone"][i].max(initial=-1) < max(n_zones, 1)
            rule(sound, "zone", head, f"must be below n_zones = {n_zones}, and none outside the index")
    assert positions is not None  # there is at least one head
    ours = slice(heads.start - stored.start, heads.stop - stored.start)
    entries = None
    if meta.get("entries") is not None:
        entries = np.asarray(meta["entries"], np.int32).reshape(len(stored), -1)[ours]
    scan = None
    if layout.scan_width:
        scan = scan_from_metadata(meta, arrays["code"], ours, n_heads=len(stored), head_dim=layout.head_dim)
    coded: dict[str, Coded | None] = {"key": None, "value": None}
    for of, codec in zip(STATES, layout.codecs, strict=True):
        if codec != "none":
            codes = arrays[f"{of}_code"], arrays[f"{of}_group"]
            coded[of] = from_metadata(meta, of, *codes, ours, n_heads=len(stored), head_dim=layout.head_dim)
    dtype = TORCH_DTYPES[meta["dtype"]]
    block = LayerBlock(
        layer=meta["layer"],
        head_start=heads.start,
        positions=positions,
        keys=_tensor(arrays["key"], dtype),
        values=_tensor(arrays["value"], dtype),
        neighbors=arrays["neighbors"] if layout.graph else None,
        entries=entries,
        scan=scan,
        zones=arrays["zone"] if layout.zone_width else None,
        profile=_profile_of(meta, stored, heads, name),
        key_mass=arrays["mass"].view("<f4")[..., 0] if layout.mass_width else None,
        queries=None if layout.n_queries is None else _tensor(arrays["query"], dtype),
        index_start=layout.index_start,
        key_codes=coded["key"],
        value_codes=coded["value"],
    )
    check_layer(block, IntegrityError, name)
    return block


def _tensor(array: NDArray[np.uint8], dtype: torch.dtype) -> torch.Tensor:
    """Bytes [n_heads, rows, width] as numbers."""
    if not array.size:  # torch has no view of nothing
        return torch.empty((*array.shape[:2], array.shape[2] // dtype.itemsize), dtype=dtype)
    return torch.from_numpy(array).view(dtype)


def _arrays(layout: Layout, n_heads: int, rows: int) -> dict[str, NDArray[Any]]:
    """Memory for what columns hold: numpy's, backed by huge pages as torch's is not, is filled four times as fast."""
    indexed = (n_heads, layout.index_rows)
    arrays: dict[str, NDArray[Any]] = {
        "neighbors": np.empty((*indexed, layout.degree), np.int32),
        "code": np.empty((*indexed, layout.scan_width), np.uint8),
        "zone": np.empty(indexed, np.int32),
        "mass": np.empty((*indexed, layout.mass_width), np.uint8),
        "query": np.empty((n_heads, layout.n_queries or 0, layout.head_dim * layout.item_bytes), np.uint8),
    }
    for of, codec in zip(STATES, layout.codecs, strict=True):
        for name in (of, f"{of}_code", f"{of}_group"):
            width, null = layout.columns().get(name, (0, True))
            n = int(layout.held(name, rows).sum()) if null else rows
            if codec != "none" or name == of:
                arrays[name] = np.empty((n_heads, n, width), np.uint8)
    return arrays


def _fill(arrays: dict[str, NDArray[Any]], i: int, group: pa.Table, layout: Layout, rows: int) -> None:
    """What a row group holds, but zones, into place `i`."""
    for name, (_, null) in layout.columns().items():
        if null:
            found = some_bytes_of(group, name, layout.held(name, rows))
            if name == "neighbors":
                unpack(found, layout.index_rows, arrays[name][i])
            else:
                arrays[name][i] = found
        elif name == "neighbors":
            arrays[name][i] = ids_of(group, name, rows, layout.neighbor_width)[layout.indexed]
        elif name == "code":
            arrays[name][i] = bytes_of(group, name, rows)[layout.indexed]
        elif name != "zone":
            arrays[name][i] = bytes_of(group, name, rows)


def _n_zones(meta: dict[str, Any], layout: Layout, name: str) -> int:
    """How many zones; 0 where the part has none, or is of a time before them."""
    n_zones, most = meta.get("n_zones", 0), layout.index_rows if layout.zone_width else 0
    if type(n_zones) is not int or not 0 <= n_zones <= most:
        raise _damaged(name, "n_zones", n_zones, f"must be in [0, {most}]")
    return n_zones


def _profile_of(meta: dict[str, Any], stored: range, heads: range, name: str) -> NDArray[np.float32] | None:
    """The profiles of `heads`; their values are checked with the block."""
    rows = meta.get("profile")
    if rows is None:
        return None
    sound = isinstance(rows, list) and len(rows) == len(stored) and all(isinstance(row, list) for row in rows)
    if not sound or any(type(x) not in (int, float) or not 0 <= x <= 1 for row in rows for x in row):
        raise _damaged(name, "profile", rows, f"must be a list of shares in [0, 1] for each of {len(stored)} heads")
    return np.asarray(rows, np.float32)[heads.start - stored.start : heads.stop - stored.start]


def encode_tokens(tokens: TokensBlock, *, fingerprint: str, document_key: str) -> pa.Buffer:
    """Parquet bytes of the tokens."""
    columns = (tokens.positions, tokens.token_ids, tokens.char_start, tokens.char_end)
    if len({column.shape for column in columns}) != 1 or tokens.positions.ndim != 1:
        raise StoreError("tokens", [column.shape for column in columns], "must be four arrays of one length")
    metadata = {"format_version": FORMAT_VERSION, "kind": "tokens"}
    metadata |= {"fingerprint": fingerprint, "document_key": document_key}
    schema = _TOKENS.with_metadata(_to_text(metadata))
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, **{**_WRITER, "compression": "zstd"})
    return sink.getvalue()


def decode_tokens(
    data: Any, *, name: str, expect: Mapping[str, object] | None = None, rows: int | None = None
) -> TokensBlock:
    """The tokens in Parquet bytes; `rows` of them unless None. Raises IntegrityError like `decode_layer`."""
    try:
        source = data if hasattr(data, "seek") else pa.BufferReader(data)
        size = source.seek(0, 2)
        source.seek(0)
        file = pq.ParquetFile(source)
        meta = _from_text(file.schema_arrow.metadata or {}, name)
        _check_expected(meta, {"kind": "tokens", **(expect or {})}, name)
        if not file.schema_arrow.equals(_TOKENS):
            raise _damaged(name, "columns", file.schema_arrow.names, f"must be {', '.join(map(str, _TOKENS))}")
        check_tokens_bytes(file.metadata, _TOKENS, size, rows, name)
        table = file.read()
        columns = [table.column(column).to_numpy() for column in _TOKENS.names]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, RuntimeError) as error:
        raise _damaged(name, "content", type(error).__name__, str(error).split("\n")[0]) from error
    return TokensBlock(positions=columns[0], token_ids=columns[1], char_start=columns[2], char_end=columns[3])


def _to_text(metadata: dict[str, object]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in metadata.items()}


def _from_text(metadata: Mapping[bytes, bytes], name: str) -> dict[str, Any]:
    own = {key.decode(): value for key, value in metadata.items() if not key.startswith(b"ARROW:")}
    return {key: json.loads(value) for key, value in own.items()}


def _check_expected(meta: dict[str, Any], expect: Mapping[str, object], name: str) -> None:
    for key, value in {"format_version": FORMAT_VERSION, **expect}.items():
        if meta.get(key) != value:
            raise _damaged(name, key, meta.get(key), f"must be {value!r}")


def _damaged(name: str, where: str, value: object, what: str) -> IntegrityError:
    return IntegrityError(f"{name}: {where}", value, f"{what}; the part is damaged or not its own, build again")
