"""Indexes as Arrow tables: what goes in comes out, and what is no index is refused."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from rabatch.errors import IntegrityError
from rabatch.index.arrow import from_table, to_table

DTYPES = ["int8", "uint8", "uint16", "int32", "int64", "float16", "float32", "float64", "bool", ">i4"]
SETTINGS = {"kind": "some", "n_heads": 2, "n_keys": 3, "dtype": "int8", "share": 0.5, "rerank": False}


def random_array(dtype, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 2 if dtype == "bool" else 100, shape).astype(dtype)


def example():
    columns = {"links": random_array("int32", (2, 3, 4)), "code": random_array("uint8", (2, 3))}
    entries = {"entries": random_array("int32", (2, 2)), "flag": np.array(True), "none": np.empty((0, 7), np.float32)}
    return to_table(SETTINGS, columns, entries), columns, entries


def assert_holds(table, settings, columns, small):
    found = from_table(table, settings["kind"])
    assert found[0] == settings
    for expected, read in ((columns, found[1]), (small, found[2])):
        assert read.keys() == expected.keys()
        for name, array in expected.items():
            assert read[name].dtype == array.dtype
            assert read[name].shape == array.shape
            np.testing.assert_array_equal(read[name], array)


def through_ipc(table, tmp_path):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_file(sink.getvalue()).read_all()


def through_parquet(table, tmp_path):
    pq.write_table(table, tmp_path / "index.parquet", row_group_size=4)
    return pq.read_table(tmp_path / "index.parquet")


def through_chunks(table, tmp_path):
    return pa.Table.from_batches(table.to_batches(max_chunksize=2), schema=table.schema)


def through_slice(table, tmp_path):
    backwards = table.take(np.arange(len(table))[::-1])
    return pa.concat_tables([backwards, table, backwards]).combine_chunks().slice(len(table), len(table))


def through_sliced_chunks(table, tmp_path):
    return pa.concat_tables([table.slice(0, 1), table.slice(1, 3), table.slice(4)])


WAYS = [through_ipc, through_parquet, through_chunks, through_slice, through_sliced_chunks]


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_round_trip(data):
    n_heads, n_keys = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    kind = st.sampled_from(DTYPES)
    names = st.lists(st.text(min_size=1, max_size=8), max_size=3, unique=True)
    columns = {
        name: data.draw(
            arrays(data.draw(kind), (n_heads, n_keys, *data.draw(st.sampled_from([(), (1,), (3,), (2, 3)]))))
        )
        for name in data.draw(names)
    }
    small = {
        name: data.draw(
            arrays(data.draw(kind), data.draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)))
        )
        for name in data.draw(names)
    }
    described = {**SETTINGS, "n_heads": n_heads, "n_keys": n_keys}
    assert_holds(to_table(described, columns, small), described, columns, small)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.removeprefix("through_"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_through(way, dtype, tmp_path):
    columns = {"a": random_array(dtype, (2, 3, 5)), "b": random_array("uint8", (2, 3, 2, 1))}
    small = {"c": random_array(dtype, (4, 2))}
    assert_holds(way(to_table(SETTINGS, columns, small), tmp_path), SETTINGS, columns, small)


@pytest.mark.parametrize("way", [through_ipc, through_parquet, through_slice], ids=lambda way: way.__name__)
def test_round_trip_without_keys(way, tmp_path):
    described = {**SETTINGS, "n_keys": 0}
    columns, small = {"a": np.empty((2, 0, 5), np.int32)}, {"c": np.arange(3)}
    assert_holds(way(to_table(described, columns, small), tmp_path), described, columns, small)


def test_arrays_of_any_memory_order():
    columns = {
        "a": np.asfortranarray(random_array("int32", (2, 3, 5))),
        "b": random_array("int32", (4, 6, 5))[::2, ::2],
    }
    small = {"c": random_array("int32", (4, 6)).T}
    assert_holds(to_table(SETTINGS, columns, small), SETTINGS, columns, small)


def test_a_row_per_key_and_nothing_copied():
    table, columns, _ = example()
    assert table.num_rows == 6
    assert table.column("links")[4].as_py() == columns["links"][1, 1].tobytes()
    read = from_table(table, "some")[1]["links"]
    assert np.shares_memory(read, columns["links"])
    assert not from_table(through_ipc(table, None), "some")[1]["links"].flags.writeable


def changed(table, name, value):
    metadata = dict(table.schema.metadata)
    if value is None:
        del metadata[name]
    else:
        metadata[name] = value
    return table.replace_schema_metadata(metadata)


def with_field(table, name, metadata=None, array=None):
    """The column's metadata, or the column, exchanged."""
    place = table.schema.get_field_index(name)
    field = table.schema.field(name)
    array = table.column(name) if array is None else array
    return table.set_column(place, field.with_type(array.type).with_metadata(metadata or field.metadata), array)


def test_another_kind_is_named():
    with pytest.raises(IntegrityError, match="open it as some"):
        from_table(example()[0], "other")


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda t: t.replace_schema_metadata(None), id="no-metadata"),
        pytest.param(lambda t: changed(t, b"rabatch.index", None), id="no-settings"),
        pytest.param(lambda t: changed(t, b"rabatch.index", b"{"), id="settings-no-json"),
        pytest.param(lambda t: changed(t, b"rabatch.index", b"\xff\xfe"), id="settings-no-text"),
        pytest.param(lambda t: changed(t, b"rabatch.index", b"[1]"), id="settings-a-list"),
        pytest.param(lambda t: changed(t, b"rabatch.index", b'{"kind": "some"}'), id="settings-incomplete"),
        pytest.param(
            lambda t: changed(t, b"rabatch.index", json.dumps({**SETTINGS, "n_keys": -3, "n_heads": -2}).encode()),
            id="negative-sizes",
        ),
        pytest.param(
            lambda t: changed(t, b"rabatch.index", json.dumps({**SETTINGS, "n_keys": float("inf")}).encode()),
            id="infinite-size",
        ),
        pytest.param(lambda t: t.slice(1), id="row-missing"),
        pytest.param(lambda t: pa.concat_tables([t, t]), id="rows-too-many"),
        pytest.param(lambda t: t.slice(0, 0), id="no-rows"),
        pytest.param(lambda t: with_field(t, "links", {b"dtype": b"|O", b"shape": b"[2]"}), id="object-column"),
        pytest.param(lambda t: with_field(t, "links", {b"dtype": b"<i8", b"shape": b"[4]"}), id="wider-dtype"),
        pytest.param(lambda t: with_field(t, "links", {b"dtype": b"<i4", b"shape": b"[5]"}), id="wider-shape"),
        pytest.param(lambda t: with_field(t, "links", {b"dtype": b"<i4", b"shape": b"[-2, -2]"}), id="negative-shape"),
        pytest.param(lambda t: with_field(t, "links", {b"dtype": b"no", b"shape": b"[4]"}), id="no-dtype"),
        pytest.param(lambda t: with_field(t, "links", {b"dtype": b"<i4", b"shape": b"x"}), id="no-shape"),
        pytest.param(lambda t: with_field(t, "links", {b"shape": b"[4]"}), id="dtype-missing"),
        pytest.param(lambda t: with_field(t, "links", array=pa.array([b"x" * 16] * 6)), id="variable-width"),
        pytest.param(lambda t: with_field(t, "links", array=pa.array(range(6))), id="integers"),
        pytest.param(lambda t: with_field(t, "links", array=pa.array([None] * 6, pa.binary(16))), id="nulls"),
        pytest.param(lambda t: changed(t, b"rabatch.array.entries", b""), id="array-empty"),
        pytest.param(lambda t: changed(t, b"rabatch.array.entries", b"PK\x03\x04 and more"), id="array-a-zip-file"),
        pytest.param(lambda t: changed(t, b"rabatch.array.entries", b"\x80\x04N."), id="array-a-pickle"),
        pytest.param(
            lambda t: changed(t, b"rabatch.array.entries", t.schema.metadata[b"rabatch.array.entries"][:-1]),
            id="array-cut",
        ),
    ],
)
def test_damaged_tables_are_refused(damage):
    with pytest.raises(IntegrityError):
        from_table(damage(example()[0]), "some")


def test_objects_are_never_written():
    with pytest.raises((ValueError, pa.ArrowException)):
        to_table(SETTINGS, {}, {"a": np.array([{}], object)})


def test_objects_are_never_read(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], object), allow_pickle=True)
    table = changed(example()[0], b"rabatch.array.entries", (tmp_path / "objects.npy").read_bytes())
    with pytest.raises(IntegrityError):
        from_table(table, "some")
