"""The Parquet files of an index: one layer's keys, values and graph for a range of KV heads, and the tokens.

A layer part has one row group per KV head and one row per token. Keys, values and neighbors are
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
from rabatch.storage.manifest import FORMAT_VERSION

__all__ = [
    "LayerBlock",
    "TokensBlock",
    "decode_layer",
    "decode_tokens",
    "encode_layer",
    "encode_tokens",
    "layer_schema",
]

_NARROW_ROWS = 65534  # up to here neighbors are uint16; 0xFFFF means none
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
    width = 2 if block.index_rows <= _NARROW_ROWS else 4
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
        "fingerprint": fingerprint,
        "document_key": document_key,
    }
    schema = layer_schema(key_bytes, degree * width if degree else 0).with_metadata(_to_text(metadata))
    positions = pa.array(np.asarray(block.positions, np.int32))
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, **_WRITER) as writer:
        for head in range(block.n_heads):
            columns = [positions, *(_binary(bits(kv[head]), key_bytes) for kv in (block.keys, block.values))]
            if block.neighbors is not None and degree:
                ids = np.full((block.rows, degree), -1, np.int32)
                ids[block.index_start : block.index_start + block.index_rows] = block.neighbors[head]
                # -1 becomes 0xFFFF when cut to 16 bits.
                columns.append(_binary(ids.astype("<u2") if width == 2 else ids, degree * width))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=max(1, block.rows))
    return sink.getvalue()


def layer_schema(key_bytes: int, neighbor_bytes: int) -> pa.Schema:
    """Columns of a layer part; `neighbors` only where there are any."""
    fields = [
        pa.field("position", pa.int32(), nullable=False),
        pa.field("key", pa.binary(key_bytes), nullable=False),
        pa.field("value", pa.binary(key_bytes), nullable=False),
    ]
    if neighbor_bytes:
        fields.append(pa.field("neighbors", pa.binary(neighbor_bytes), nullable=False))
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
    wanted = layer_schema(head_dim * dtype.itemsize, degree * width if graph else 0)
    if not schema.equals(wanted):
        raise _damaged(name, "columns", schema.names, f"must be {', '.join(map(str, wanted))}")
    if file.metadata.num_row_groups != len(stored):
        raise _damaged(name, "row groups", file.metadata.num_row_groups, f"must be one for each of {len(stored)} heads")
    rows = file.metadata.row_group(0).num_rows
    start, index_rows = meta["index_start"], meta["index_rows"]
    if start + index_rows > rows or (index_rows and not graph):
        raise _damaged(name, "index_rows", index_rows, f"must fit {rows} rows from {start} on")
    if rows * head_dim * dtype.itemsize * 2 * len(stored) > size:  # before memory is taken for it
        raise _damaged(name, "rows", rows, f"do not fit into {size} bytes")

    # numpy's memory is backed by huge pages, torch's is not: filling it is four times as fast.
    keys, values = (np.empty((len(heads), rows, head_dim * dtype.itemsize), np.uint8) for _ in range(2))
    neighbors = np.empty((len(heads), index_rows, degree), np.int32) if graph else None
    positions: NDArray[np.int32] | None = None
    for i, head in enumerate(heads):
        group = file.read_row_group(head - stored.start)
        if group.num_rows != rows:
            raise _damaged(name, f"row group {head - stored.start}", group.num_rows, f"must have {rows} rows")
        keys[i] = _bytes_of(group, "key", rows)
        values[i] = _bytes_of(group, "value", rows)
        head_positions = group.column("position").to_numpy()
        if positions is None:
            positions = head_positions.astype(np.int32)
        elif not np.array_equal(positions, head_positions):
            raise _damaged(name, f"row group {head - stored.start}", head, "has other positions than the first head")
        if neighbors is not None and degree:
            ids = _bytes_of(group, "neighbors", rows).view("<u2" if width == 2 else "<i4")
            ids = ids[start : start + index_rows]
            neighbors[i] = ids
            if width == 2:
                neighbors[i][ids == 0xFFFF] = -1
    assert positions is not None  # there is at least one head
    entries = None
    if meta.get("entries") is not None:
        entries = np.asarray(meta["entries"], np.int32).reshape(len(stored), -1)
        entries = entries[heads.start - stored.start : heads.stop - stored.start]
    block = LayerBlock(
        layer=meta["layer"],
        head_start=heads.start,
        positions=positions,
        keys=torch.from_numpy(keys).view(dtype),
        values=torch.from_numpy(values).view(dtype),
        neighbors=neighbors,
        entries=entries,
        index_start=start,
    )
    check_layer(block, IntegrityError, name)
    return block


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


def decode_tokens(data: Any, *, name: str, expect: Mapping[str, object] | None = None) -> TokensBlock:
    """The tokens in Parquet bytes. Raises IntegrityError like `decode_layer`."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        meta = _from_text(file.schema_arrow.metadata or {}, name)
        _check_expected(meta, {"kind": "tokens", **(expect or {})}, name)
        if not file.schema_arrow.equals(_TOKENS):
            raise _damaged(name, "columns", file.schema_arrow.names, f"must be {', '.join(map(str, _TOKENS))}")
        table = file.read()
        columns = [table.column(column).to_numpy() for column in _TOKENS.names]
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise _damaged(name, "content", type(error).__name__, str(error).split("\n")[0]) from error
    return TokensBlock(positions=columns[0], token_ids=columns[1], char_start=columns[2], char_end=columns[3])


def _binary(array: NDArray[Any], width: int) -> pa.Array:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return pa.Array.from_buffers(pa.binary(width), flat.size // width, [None, pa.py_buffer(flat)])


def _bytes_of(table: pa.Table, column: str, rows: int) -> NDArray[np.uint8]:
    """A column's memory as [rows, width] bytes; no copy if it is one chunk, as Arrow returns a row group."""
    chunked = table.column(column)
    array = chunked.chunk(0) if chunked.num_chunks == 1 else pa.concat_arrays(chunked.chunks)
    width = array.type.byte_width
    if rows == 0 or array.null_count:
        return np.empty((0, width), np.uint8)
    return np.frombuffer(array.buffers()[1], np.uint8, rows * width, array.offset * width).reshape(rows, width)


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
