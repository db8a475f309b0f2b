"""Read a stored index with pyarrow alone: what any tool that knows Parquet and JSON can see.

    python examples/query_store.py STORE [DOCUMENT_ID]

STORE is a path or URL that `rabatch build` wrote. Prints the committed documents, then one layer part of one of them:
its columns, and for each KV head the most linked keys of the graph. The format is described in docs/format.md.
"""

import json
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ITEM_TYPES = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}  # numpy has no bfloat16: read its bits


def column(table: pa.Table, name: str, item_type: str) -> np.ndarray:
    """The rows of a fixed-size binary column that are not null, [rows, items]: one block of memory in Arrow too, so
    nothing is parsed."""
    array = table.column(name).drop_null().combine_chunks()
    width = array.type.byte_width
    raw = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    return raw.reshape(len(array), -1).view(item_type)


def links_of(table: pa.Table, notes: dict) -> np.ndarray:
    """The links that there are, counted from the first row of the index."""
    degree, n = notes["degree"], notes["index_rows"]
    if notes["neighbor_width"]:
        links = column(table, "neighbors", "<u2" if notes["neighbor_width"] == 2 else "<i4")[notes["index_start"] :][:n]
        return links[(links >= 0) & (links < n)]  # all bits set means no link
    low = max(((n + 1) // degree).bit_length() - 1, 0)  # packed: low bits of each, then the rest of each in unary
    bits = np.unpackbits(column(table, "neighbors", "u1"), axis=1, bitorder="little")
    lows = bits[:, : degree * low].reshape(-1, degree, low) @ (1 << np.arange(low))
    links = ((np.nonzero(bits[:, degree * low :])[1].reshape(-1, degree) - np.arange(degree)) << low) + lows
    return links[links < n]  # n means no link


def as_float32(values: np.ndarray) -> np.ndarray:
    """A bfloat16 is the upper half of a float32."""
    return (values.astype(np.uint32) << 16).view(np.float32) if values.dtype == np.uint16 else values.astype(np.float32)


def main(store: str, document_id: str | None = None) -> int:
    filesystem, root = fsspec.core.url_to_fs(store)

    # 1. Manifests are the catalog. A part that no manifest names does not exist for a reader.
    manifests = [json.loads(filesystem.cat_file(path)) for path in filesystem.find(f"{root}/manifests")]
    for manifest in manifests:
        n_bytes = sum(part["bytes"] for part in manifest["parts"])
        print(f"{manifest['document_id']}: {manifest['context_tokens']} tokens, {n_bytes} bytes")
    chosen = [m for m in manifests if document_id in (None, m["document_id"])]
    if not chosen:
        print(f"{store} holds no document {document_id!r}" if document_id else f"{store} holds no document")
        return 1

    # 2. A layer part is a Parquet file with one row per token and one row group per KV head.
    part = next(part for part in chosen[0]["parts"] if part["kind"] == "layer")
    with filesystem.open(f"{root}/{part['path']}", "rb") as handle:
        file = pq.ParquetFile(handle)
        notes = {key.decode(): json.loads(value) for key, value in file.schema_arrow.metadata.items()}
        print(f"\n{part['path']}: layer {notes['layer']}, columns {', '.join(file.schema_arrow.names)}")
        for row_group, head in enumerate(range(notes["head_start"], notes["head_stop"])):
            table = file.read_row_group(row_group)
            keys = as_float32(column(table, "key", ITEM_TYPES[notes["dtype"]]))
            print(f"head {head}: keys {keys.shape}, mean norm {np.linalg.norm(keys, axis=1).mean():.3f}")
            if notes["graph"]:
                # 3. Links count from the first row of the index.
                counts = np.bincount(links_of(table, notes), minlength=notes["index_rows"])
                best = np.argsort(-counts, kind="stable")[:3]
                positions = table.column("position").to_numpy()[notes["index_start"] + best]
                print(f"  most linked positions {positions.tolist()} with {counts[best].tolist()} links")
    return 0


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
