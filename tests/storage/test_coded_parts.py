"""Parts whose keys and values are encoded: save equals load, and nothing that contradicts itself is read."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storage_samples import FIELDS, FINGERPRINT, GEOMETRY, make_block, make_tokens, prepare

from rabatch.errors import IntegrityError, StoreError
from rabatch.indexing import coded_block
from rabatch.storage.blocks import LayerBlock
from rabatch.storage.codecs import decode
from rabatch.storage.manifest import Manifest, utc_now
from rabatch.storage.packed_ids import ascending
from rabatch.storage.parts import decode_layer, encode_layer
from rabatch.storage.store import IndexStore

NAMED = {"fingerprint": "f" * 64, "document_key": "d" * 32}
CODECS = ["none", "int8", "int4", "kivi2"]


def coded(block: LayerBlock, keys: str, values: str) -> LayerBlock:
    return coded_block(block, (block.index_start, block.index_start + block.index_rows), keys, values)


def sample(keys: str = "kivi2", values: str = "int4", **options: object) -> LayerBlock:
    block = make_block(**{"rows": 90, "index_rows": 80, "degree": 4, **options})
    return coded(dataclasses.replace(block, neighbors=ascending(block.neighbors)), keys, values)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    keys=st.sampled_from(CODECS),
    values=st.sampled_from(CODECS),
    rows=st.integers(1, 100),
    start=st.integers(0, 10),
    head_dim=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    degree=st.none() | st.integers(1, 9),
    sort=st.booleans(),
    seed=st.integers(0, 2**31),
    data=st.data(),
)
def test_save_equals_load(
    keys: str, values: str, rows: int, start: int, head_dim: int, dtype: torch.dtype, degree: int | None, sort: bool,
    seed: int, data: st.DataObject,
) -> None:  # fmt: skip
    start = min(start, rows)
    index_rows = data.draw(st.integers(0, rows - start))
    block = make_block(
        n_heads=3, rows=rows, head_dim=head_dim, dtype=dtype, degree=degree, coded=data.draw(st.booleans()),
        index_start=start, index_rows=index_rows, seed=seed,
    )  # fmt: skip
    if block.neighbors is not None and sort:
        block = dataclasses.replace(block, neighbors=ascending(block.neighbors))
    block = coded_block(block, (start, start + block.index_rows), keys, values)
    assert block.codecs == ((keys, values) if block.index_rows else ("none", "none"))
    stored = encode_layer(block, **NAMED)
    back = decode_layer(stored, name="part", expect=NAMED)
    assert back.equals(block)
    assert back.rows == rows
    assert decode_layer(stored, name="part", heads=range(1, 3)).equals(block.select(range(1, 3)))


def test_codes_without_an_index_are_stored() -> None:
    """Of the recipes that need none, dense and flat: what is encoded is what an index would hold."""
    block = make_block(degree=None, profiled=False, rows=50)
    block = coded_block(block, (3, 45), "int8", "kivi2")
    back = decode_layer(encode_layer(dataclasses.replace(block, index_start=3), **NAMED), name="part")
    assert (back.index_rows, back.index_start, back.rows) == (42, 3, 50)
    assert back.key_codes is not None
    assert back.key_codes.equals(block.key_codes)


def test_what_is_encoded_takes_no_other_bytes() -> None:
    plain = make_block(rows=4000, index_rows=3900, head_dim=64, n_heads=1, degree=8)
    plain = dataclasses.replace(plain, neighbors=ascending(plain.neighbors), scan=None)
    sizes = {pair: encode_layer(coded(plain, *pair), **NAMED).size for pair in (("none", "none"), ("int8", "kivi2"))}
    saved = 3900 * (64 * 2 - 64) + 3900 * (64 * 2 - (16 + 2 + 1))
    assert abs(sizes["none", "none"] - sizes["int8", "kivi2"] - saved) < 6000


def test_positions_take_next_to_nothing() -> None:
    block = make_block(rows=4000, index_rows=3900, head_dim=4, n_heads=1, degree=None, coded=False, profiled=False)
    block = dataclasses.replace(block, index_start=0)
    stored = encode_layer(block, **NAMED)
    assert stored.size < 4000 * 2 * 4 * 2 + 3000
    assert decode_layer(stored, name="p").equals(block)
    encodings = pq.ParquetFile(pa.BufferReader(stored)).metadata.row_group(0).column(0).encodings
    assert "DELTA_BINARY_PACKED" in encodings


def test_the_columns_are_those_of_the_format() -> None:
    block = sample("kivi2", "int4")
    file = pq.ParquetFile(pa.BufferReader(encode_layer(block, **NAMED)))
    group = file.read_row_group(1)
    lists = {name: group.column(name).to_pylist() for name in group.column_names}
    held = {name: [i for i, value in enumerate(values) if value is not None] for name, values in lists.items()}
    outside, inside = [0, 1, 2, *range(83, 90)], list(range(3, 83))
    assert held["key"] == held["value"] == outside
    assert held["key_code"] == held["value_code"] == held["neighbors"] == inside
    assert held["key_group"] == [3, 35, 67]
    assert group.column("key_code")[5].as_py() == block.key_codes.codes[1, 2].tobytes()
    assert group.column("key_group")[35].as_py() == block.key_codes.groups[1, 1].tobytes()
    assert json.loads(file.schema_arrow.metadata[b"neighbor_width"]) == 0


def _rewritten(block: LayerBlock, change: dict, table_change: object = None) -> pa.Buffer:
    """A part with other metadata or columns, as a hostile or careless writer would make it."""
    file = pq.ParquetFile(pa.BufferReader(encode_layer(block, **NAMED)))
    metadata = {**file.schema_arrow.metadata, **{k.encode(): json.dumps(v).encode() for k, v in change.items()}}
    sink, schema = pa.BufferOutputStream(), file.schema_arrow.with_metadata(metadata)
    with pq.ParquetWriter(sink, schema, use_dictionary=False, compression="none") as writer:
        for i in range(file.num_row_groups):
            table = file.read_row_group(i)
            table = table if table_change is None else table_change(i, table)
            writer.write_table(table.replace_schema_metadata(metadata), row_group_size=table.num_rows)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key_codec", "int8"),
        ("key_codec", "none"),
        ("key_codec", "zip"),
        ("key_codec", None),
        ("key_codec", ["int8"]),
        ("value_codec", "kivi2"),
        ("value_codec", 4),
        ("key_scale", None),
        ("key_scale", "AAAA"),
        ("value_center", "%%%"),
        ("value_scale", "AADAfwAAwH8=" * 4),
        ("value_center", [1.0]),
        ("index_rows", 79),
        ("index_rows", 81),
        ("index_rows", 0),
        ("index_start", 4),
        ("neighbor_width", 2),
        ("neighbor_width", 1),
        ("degree", 3),
        ("head_dim", 16),
    ],
)
def test_lying_metadata_is_refused(field: str, value: object) -> None:
    with pytest.raises(IntegrityError, match="the-part"):
        decode_layer(_rewritten(sample(), {field: value}), name="the-part", expect=NAMED)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 0.0, -1.0, 1e30])
def test_scales_that_are_none_are_refused(number: float) -> None:
    block = sample()
    block.key_codes.scale[1, 3] = number
    with pytest.raises(StoreError, match="key_scale"):
        encode_layer(block, **NAMED)
    scale = base64.b64encode(block.key_codes.scale.astype("<f4").tobytes()).decode()
    with pytest.raises(IntegrityError, match="key_scale"):
        decode_layer(_rewritten(sample(), {"key_scale": scale}), name="p")


@pytest.mark.parametrize("column", ["key", "key_code", "key_group", "value", "value_code", "neighbors"])
@pytest.mark.parametrize("row", [0, 3, 35, 36, 82, 89])
def test_values_in_other_rows_are_refused(column: str, row: int) -> None:
    """A null where something must be, or something where nothing may be."""

    def change(i: int, table: pa.Table) -> pa.Table:
        at, field = table.schema.get_field_index(column), table.schema.field(column)
        values = table.column(column).to_pylist()
        values[row] = b"\1" * field.type.byte_width if values[row] is None else None
        return table if i == 0 else table.set_column(at, field, pa.array(values, field.type))

    with pytest.raises(IntegrityError, match=column):
        decode_layer(_rewritten(sample(), {}, change), name="p")


def test_damaged_packed_neighbors_are_refused() -> None:
    def change(i: int, table: pa.Table) -> pa.Table:
        at, field = table.schema.get_field_index("neighbors"), table.schema.field("neighbors")
        values = table.column("neighbors").to_pylist()
        values[7] = b"\0" * field.type.byte_width
        return table.set_column(at, field, pa.array(values, field.type))

    with pytest.raises(IntegrityError, match="neighbors of row 4"):
        decode_layer(_rewritten(sample(), {}, change), name="p")


def test_rows_that_do_not_fit_are_refused_unread() -> None:
    """Nulls take no bytes: a part of nothing but nulls must not become arrays."""
    block = sample("kivi2", "kivi2", rows=60_000, index_rows=59_990, n_heads=1, head_dim=64)
    file = pq.ParquetFile(pa.BufferReader(encode_layer(block, **NAMED)))
    columns = [
        pa.nulls(60_000, f.type) if f.nullable else file.read_row_group(0).column(f.name) for f in file.schema_arrow
    ]
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, file.schema_arrow, use_dictionary=False, compression="none") as writer:
        writer.write_table(pa.Table.from_arrays(columns, schema=file.schema_arrow), row_group_size=60_000)
    with pytest.raises(IntegrityError, match="do not fit"):
        decode_layer(sink.getvalue(), name="p")


def test_changed_bytes_never_crash_the_decoder() -> None:
    stored = bytearray(encode_layer(sample(n_heads=1), **NAMED))
    for at in range(0, len(stored), 37):
        stored[at] ^= 0x5A
        try:
            decode_layer(bytes(stored), name="p")
        except IntegrityError as error:
            assert "p: " in str(error)  # noqa: PT017 - either outcome is right
        stored[at] ^= 0x5A


def stored_manifest(store: IndexStore, pairs: list[tuple[str, str]]) -> tuple[Manifest, list[LayerBlock]]:
    """A document of one layer with a part per head, each with its codecs."""
    n = len(pairs)
    geometry = dataclasses.replace(GEOMETRY, n_layers=1, n_kv_heads=n, n_query_heads=n, sliding_windows=(0,))
    where = {"document_id": "doc", "fingerprint": FINGERPRINT, "attempt": store.new_attempt()}
    whole = make_block(n_heads=len(pairs), rows=60, index_rows=52)
    blocks = [coded(whole.select(range(i, i + 1)), *pair) for i, pair in enumerate(pairs)]
    parts = [store.put_tokens(make_tokens(60), **where), *(store.put_layer(block, **where) for block in blocks)]
    manifest = Manifest(
        document_id="doc", content_sha256=hashlib.sha256(b"text").hexdigest(), fingerprint=FINGERPRINT,
        fingerprint_fields=FIELDS, context_tokens=60, text_chars=120, created_at=utc_now(), geometry=geometry,
        parts=tuple(parts),
    )  # fmt: skip
    return manifest, blocks


def test_a_manifest_says_how_parts_are_encoded(tmp_path: Path) -> None:
    store = IndexStore(tmp_path, create=True)
    manifest, blocks = stored_manifest(store, [("int8", "kivi2"), ("int8", "kivi2")])
    store.commit(manifest)
    again = next(store.manifests())
    assert again == manifest
    assert again.codecs == "int8/kivi2"
    layer = store.read_layer(manifest, 0)
    assert layer.codecs == ("int8", "kivi2")
    assert all(layer.select(range(i, i + 1)).equals(block) for i, block in enumerate(blocks))
    values = json.loads(manifest.to_json())
    assert values["parts"][1]["key_codec"] == "int8"
    assert "key_codec" not in values["parts"][0]


def test_manifests_without_codecs_are_written_as_before(tmp_path: Path) -> None:
    manifest, _ = prepare(IndexStore(tmp_path, create=True))
    assert "codec" not in manifest.to_json()
    assert manifest.codecs == "none"


def test_heads_of_a_layer_may_differ(tmp_path: Path) -> None:
    """They are joined as numbers of the dtype."""
    store = IndexStore(tmp_path, create=True)
    manifest, blocks = stored_manifest(store, [("none", "none"), ("int8", "int4"), ("kivi2", "none")])
    store.commit(manifest)
    assert manifest.codecs == "int8/int4, kivi2/none"
    layer = store.read_layer(manifest, 0)
    assert layer.codecs == ("none", "none")
    assert torch.equal(layer.keys[0], blocks[0].keys[0])
    expected = torch.from_numpy(decode(blocks[1].value_codes)).bfloat16()[0]
    assert torch.equal(layer.values[1, 3:55], expected)
    assert torch.equal(layer.values[1, :3], blocks[1].values[0, :3])
    assert torch.equal(layer.keys[1, 55:], blocks[1].keys[0, 3:])
    assert store.read_layer(manifest, 0, heads=range(1, 2)).equals(blocks[1])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"key_codec": "zip"}, r"parts\[1\].key_codec"),
        ({"key_codec": "none"}, "bytes"),
        ({"value_codec": "none"}, "bytes"),
        ({"bytes": 500}, "bytes"),
    ],
)
def test_manifests_that_lie_about_codecs_are_refused(tmp_path: Path, change: dict, field: str) -> None:
    store = IndexStore(tmp_path, create=True)
    manifest, _ = stored_manifest(store, [("int8", "kivi2")])
    parts = (manifest.parts[0], dataclasses.replace(manifest.parts[1], **change))
    wrong = dataclasses.replace(manifest, parts=parts, geometry=dataclasses.replace(manifest.geometry, head_dim=8))
    if field == "bytes" and "codec" in next(iter(change)):  # of a few rows, the rest of a part is larger than its keys
        wrong = dataclasses.replace(wrong, parts=(parts[0], dataclasses.replace(parts[1], bytes=52 * 10 + 8 * 32)))
    with pytest.raises(IntegrityError, match=field):
        wrong.check()


def test_a_part_of_another_codec_than_listed_is_refused(tmp_path: Path) -> None:
    store = IndexStore(tmp_path, create=True)
    manifest, _ = stored_manifest(store, [("int8", "kivi2")])
    other = dataclasses.replace(manifest.parts[1], value_codec="int4")
    with pytest.raises(IntegrityError, match="codec"):
        store.read_layer(dataclasses.replace(manifest, parts=(manifest.parts[0], other)), 0)
