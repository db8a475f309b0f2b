"""The Parquet files of an index: one layer's keys, values and index for a range of KV heads, and the tokens.

A layer part has one row group per KV head and one row per token. Keys, values, neighbors and zones are
`fixed_size_binary`, so that a column of a row group is one block of memory in the layout the engine computes with.
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
from rabatch.storage.columns import binary, binary_ids, binary_rows, bytes_of, id_width, ids_of
from rabatch.storage.limits import check_layer_bytes, check_tokens_bytes
from rabatch.storage.manifest import FORMAT_VERSION
from rabatch.storage.scan_codes import from_metadata

__all__ = [
    "LayerBlock",
    "TokensBlock",
    "decode_layer",
    "decode_tokens",
    "encode_layer",
    "encode_tokens",
    "layer_schema",
]

# No compression. Random-like bf16 keys and values, one core: none, lz4 and snappy keep 100% of the bytes, zstd 81%
# at a third of the writing and half of the reading speed. No dictionary and no statistics: neither helps on them.
_WRITER = {"compression": "none", "use_dictionary": False, "write_statistics": False}
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
    degree = 0 if block.neighbors is None else int(block.neighbors.shape[2])
    width = id_width(block.index_rows)
    n_zones = 0 if block.zones is None else int(block.zones.max(initial=-1)) + 1
    zone_width = 0 if block.zones is None else id_width(n_zones)
    key_bytes = int(block.keys.shape[2]) * block.keys.element_size()
    metadata = {
        "format_version": FORMAT_VERSION,
        "kind": "layer",
        "layer": block.layer,
        "head_start": block.head_start,
        "head_stop": block.head_stop,
        "dtype": DTYPE_NAMES[block.keys.dtype],
        "head_dim": int(block.keys.shape[2]),
        "graph": block.neighbors is not None,
        "degree": degree,
        "neighbor_width": width,
        "index_start": block.index_start,
        "index_rows": block.index_rows,
        "entries": None if block.entries is None else block.entries.tolist(),
        **({"code_width": 0} if block.scan is None else block.scan.metadata()),
        "zone_width": zone_width,
        "n_zones": n_zones,
        # The shortest numbers that read back as the same float32.
        "profile": None if block.profile is None else [[float(str(x)) for x in shares] for shares in block.profile],
        "fingerprint": fingerprint,
        "document_key": document_key,
    }
    code_width = 0 if block.scan is None else block.scan.code_width
    schema = layer_schema(key_bytes, degree * width, code_width, zone_width).with_metadata(_to_text(metadata))
    positions = pa.array(np.asarray(block.positions, np.int32))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **_WRITER) as writer:
        for head in range(block.n_heads):
            columns = [positions, *(binary(bits(kv[head]), key_bytes) for kv in (block.keys, block.values))]
            if block.neighbors is not None and degree:
                columns.append(binary_ids(block.neighbors[head], rows=block.rows, start=block.index_start, width=width))
            if block.scan is not None:
                columns.append(binary_rows(block.scan.codes[head], rows=block.rows, start=block.index_start))
            if block.zones is not None:
                ids = block.zones[head][:, None]
                columns.append(binary_ids(ids, rows=block.rows, start=block.index_start, width=zone_width))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=max(1, block.rows))
    return sink.getvalue()


def layer_schema(key_bytes: int, neighbor_bytes: int, code_width: int = 0, zone_width: int = 0) -> pa.Schema:
    """Columns of a layer part; `neighbors`, `code` and `zone` only where there are any."""
    fields = [
        pa.field("position", pa.int32(), nullable=False),
        pa.field("key", pa.binary(key_bytes), nullable=False),
        pa.field("value", pa.binary(key_bytes), nullable=False),
    ]
    if neighbor_bytes:
        fields.append(pa.field("neighbors", pa.binary(neighbor_bytes), nullable=False))
    if code_width:
        fields.append(pa.field("code", pa.binary(code_width), nullable=False))
    if zone_width:
        fields.append(pa.field("zone", pa.binary(zone_width), nullable=False))
    return pa.schema(fields)


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
    sizes = ("layer", "head_start", "head_stop", "head_dim", "degree", "neighbor_width", "index_start", "index_rows")
    for key in sizes:
        if type(meta.get(key)) is not int or not 0 <= meta[key] < 2**31:
            raise _damaged(name, key, meta.get(key), "must be a whole number >= 0")
    if meta.get("dtype") not in TORCH_DTYPES:
        raise _damaged(name, "dtype", meta.get("dtype"), f"must be one of {', '.join(TORCH_DTYPES)}")
    if meta["neighbor_width"] not in (2, 4):
        raise _damaged(name, "neighbor_width", meta["neighbor_width"], "must be 2 or 4")
    dtype, graph = TORCH_DTYPES[meta["dtype"]], meta.get("graph") is True
    head_dim, degree, width = meta["head_dim"], meta["degree"], meta["neighbor_width"]
    stored = range(meta["head_start"], meta["head_stop"])
    heads = stored if heads is None else heads
    if len(heads) == 0 or heads.step != 1 or heads.start < stored.start or heads.stop > stored.stop:
        raise _damaged(name, "head_start", stored, f"does not hold heads {heads}")
    zone_width, n_zones = _zone_sizes(meta, name)
    code_width = meta.get("code_width", 0)
    if type(code_width) is not int or code_width not in (0, -(-head_dim // 4)):
        raise _damaged(name, "code_width", code_width, f"must be 0, or of head_dim {head_dim}: {-(-head_dim // 4)}")
    wanted = layer_schema(head_dim * dtype.itemsize, degree * width if graph else 0, code_width, zone_width)
    if not schema.equals(wanted):
        raise _damaged(name, "columns", schema.names, f"must be {', '.join(map(str, wanted))}")
    if file.metadata.num_row_groups != len(stored):
        raise _damaged(name, "row groups", file.metadata.num_row_groups, f"must be one for each of {len(stored)} heads")
    rows = file.metadata.row_group(0).num_rows
    start, index_rows = meta["index_start"], meta["index_rows"]
    if start + index_rows > rows or (index_rows and not graph and not code_width):
        raise _damaged(name, "index_rows", index_rows, f"must fit {rows} rows from {start} on")
    check_layer_bytes(file.metadata, schema, size, name)  # before memory is taken for it

    # numpy's memory is backed by huge pages, torch's is not: filling it is four times as fast.
    keys, values = (np.empty((len(heads), rows, head_dim * dtype.itemsize), np.uint8) for _ in range(2))
    neighbors = np.empty((len(heads), index_rows, degree), np.int32) if graph else None
    codes = np.empty((len(heads), index_rows, code_width), np.uint8)
    zones = np.empty((len(heads), index_rows), np.int32) if zone_width else None
    positions: NDArray[np.int32] | None = None
    for i, head in enumerate(heads):
        group = file.read_row_group(head - stored.start)
        if group.num_rows != rows:
            raise _damaged(name, f"row group {head - stored.start}", group.num_rows, f"must have {rows} rows")
        keys[i] = bytes_of(group, "key", rows)
        values[i] = bytes_of(group, "value", rows)
        head_positions = group.column("position").to_numpy()
        if positions is None:
            positions = head_positions.astype(np.int32)
        elif not np.array_equal(positions, head_positions):
            raise _damaged(name, f"row group {head - stored.start}", head, "has other positions than the first head")
        if neighbors is not None and degree:
            neighbors[i] = ids_of(group, "neighbors", rows, width)[start : start + index_rows]
        if code_width:
            codes[i] = bytes_of(group, "code", rows)[start : start + index_rows]
        if zones is not None:
            of_rows = ids_of(group, "zone", rows, zone_width)[:, 0]
            zones[i] = of_rows[start : start + index_rows]
            outside = np.delete(of_rows, slice(start, start + index_rows))
            if (outside != -1).any() or not -1 <= zones[i].max(initial=-1) < max(n_zones, 1):
                raise _damaged(name, "zone", head, f"must be below n_zones = {n_zones}, and none outside the index")
    assert positions is not None  # there is at least one head
    entries = None
    if meta.get("entries") is not None:
        entries = np.asarray(meta["entries"], np.int32).reshape(len(stored), -1)
        entries = entries[heads.start - stored.start : heads.stop - stored.start]
    scan = None
    if code_width:
        ours = slice(heads.start - stored.start, heads.stop - stored.start)
        scan = from_metadata(meta, codes, ours, n_heads=len(stored), head_dim=head_dim)
    block = LayerBlock(
        layer=meta["layer"],
        head_start=heads.start,
        positions=positions,
        keys=torch.from_numpy(keys).view(dtype),
        values=torch.from_numpy(values).view(dtype),
        neighbors=neighbors,
        entries=entries,
        scan=scan,
        zones=zones,
        profile=_profile_of(meta, stored, heads, name),
        index_start=start,
    )
    check_layer(block, IntegrityError, name)
    return block


def _zone_sizes(meta: dict[str, Any], name: str) -> tuple[int, int]:
    """`zone_width` and `n_zones`; 0 where the part has no zones, or is of a time before them."""
    width, n_zones = meta.get("zone_width", 0), meta.get("n_zones", 0)
    if type(width) is not int or width not in (0, 2, 4):
        raise _damaged(name, "zone_width", width, "must be 0, 2 or 4")
    if type(n_zones) is not int or not 0 <= n_zones <= (meta["index_rows"] if width else 0):
        raise _damaged(name, "n_zones", n_zones, f"must be in [0, {meta['index_rows'] if width else 0}]")
    return width, n_zones


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
