"""Columns of a part that only some builds keep: masses and query vectors."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from storage_samples import make_block

from rabatch.errors import IntegrityError
from rabatch.storage.blocks import bits
from rabatch.storage.parts import LayerBlock, decode_layer, encode_layer

NAMED = {"fingerprint": "f" * 64, "document_key": "d" * 32}


def test_mass_takes_four_bytes_per_key_of_the_index_and_nothing_where_it_is_not_kept() -> None:
    block, without = make_block(massed=True), make_block()
    stored, plain = (pq.ParquetFile(pa.BufferReader(encode_layer(b, **NAMED))) for b in (block, without))
    assert "mass" not in plain.schema_arrow.names
    assert b"mass_width" not in plain.schema_arrow.metadata
    assert json.loads(stored.schema_arrow.metadata[b"mass_width"]) == 4
    assert block.key_mass is not None
    column = stored.read_row_group(1).column("mass").to_pylist()
    assert column == [None] * 3 + [value.tobytes() for value in block.key_mass[1]] + [None] * 5
    back = decode_layer(encode_layer(block, **NAMED), name="part", heads=range(1, 2))
    assert back.key_mass is not None
    assert (back.key_mass.tolist(), back.key_mass.dtype) == ([block.key_mass[1].tolist()], np.float32)


def test_queries_stand_in_the_first_rows_and_nowhere_if_they_are_not_kept() -> None:
    block, without = make_block(n_queries=5), make_block()
    stored, plain = (pq.ParquetFile(pa.BufferReader(encode_layer(b, **NAMED))) for b in (block, without))
    assert "query" not in plain.schema_arrow.names
    assert b"n_queries" not in plain.schema_arrow.metadata
    assert block.queries is not None
    column = stored.read_row_group(1).column("query").to_pylist()
    assert column == [row.tobytes() for row in bits(block.queries[1])] + [None] * 15
    back = decode_layer(encode_layer(block, **NAMED), name="part", heads=range(1, 2))
    assert back.equals(block.select(range(1, 2)))
    for other in (block.queries.flip(1), None):
        assert not LayerBlock(**{**vars(block), "queries": other}).equals(block)
        assert not block.equals(LayerBlock(**{**vars(block), "queries": other}))


@pytest.mark.parametrize(
    ("field", "value"),
    [("mass_width", value) for value in (0, 2, 8, True, None, "4")]
    + [("n_queries", value) for value in (4, 6, 21, -1, True, None, "5")],
)
def test_lying_metadata_is_refused(field: str, value: object) -> None:
    file = pq.ParquetFile(pa.BufferReader(encode_layer(make_block(massed=True, n_queries=5), **NAMED)))
    metadata = {**file.schema_arrow.metadata, field.encode(): json.dumps(value).encode()}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, file.schema_arrow.with_metadata(metadata), use_dictionary=False) as writer:
        for i in range(2):
            writer.write_table(file.read_row_group(i).replace_schema_metadata(metadata))
    with pytest.raises(IntegrityError, match="the-part"):
        decode_layer(sink.getvalue(), name="the-part", expect=NAMED)
