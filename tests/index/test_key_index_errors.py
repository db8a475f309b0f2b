"""Bad input to any key index: a typed error that names what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
from index_kinds import (
    KINDS,
    all_kinds,
    assert_equal,
    check_result,
    make_layer,
    stored,
)

from rabatch.errors import ConfigError, KeysError, RabatchError
from rabatch.index.base import QuerySample
from rabatch.index.flat import FlatIndex
from rabatch.index.scan import ScanIndex

pytestmark = pytest.mark.usefixtures("small_scans")


@all_kinds
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_keys_that_are_not_finite_are_named(kind, value):
    layer = make_layer()
    bad = layer.keys.copy()
    bad[1, 5, 3] = value
    with pytest.raises(KeysError, match="KV head 1, key 5"):
        kind.build(bad, layer.samples)
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(KeysError, match="KV head 1, key 5"):
        index.insert(bad)
    assert index.n_keys == 60
    assert_equal(index.search(layer.queries, k=5), kind.build(layer.keys, layer.samples).search(layer.queries, k=5))


@all_kinds
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda keys: keys[0], id="two-dimensions"),
        pytest.param(lambda keys: keys.astype(np.float64), id="float64"),
        pytest.param(lambda keys: keys[:, :, :0], id="no-channels"),
    ],
)
def test_wrong_keys_are_refused(kind, change):
    layer = make_layer()
    with pytest.raises(KeysError):
        kind.build(change(layer.keys), layer.samples)
    with pytest.raises(KeysError):
        kind.build(layer.keys, layer.samples).insert(change(layer.keys))


@all_kinds
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda keys: keys[:1], id="heads"),
        pytest.param(lambda keys: keys[:, :, :-2].copy(), id="head_dim"),
    ],
)
def test_inserting_keys_of_another_shape_is_refused(kind, change):
    layer = make_layer()
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(KeysError):
        index.insert(change(layer.keys))
    assert index.n_keys == 60
    check_result(index.search(layer.queries, k=5), layer.keys, layer.queries, 5, np.inf)


@all_kinds
@pytest.mark.parametrize("n_keys", [0, 60])
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda queries: queries[:, :, :-1], id="head_dim"),
        pytest.param(lambda queries: queries[:1], id="heads"),
        pytest.param(lambda queries: queries[0], id="two-dimensions"),
        pytest.param(lambda queries: queries.astype(np.float64), id="float64"),
    ],
)
def test_wrong_queries_are_refused(kind, change, n_keys):
    layer = make_layer(n_keys=n_keys)
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(KeysError, match="queries"):
        index.search(change(layer.queries), k=3)


@all_kinds
def test_no_key_wanted_is_refused(kind):
    layer = make_layer()
    with pytest.raises(ConfigError) as error:
        kind.build(layer.keys, layer.samples).search(layer.queries, k=0)
    assert error.value.field == "k"


@all_kinds
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1)], ids=str)
def test_beta_of_another_shape_is_refused(kind, shape):
    layer = make_layer()
    index = kind.build(layer.keys, layer.samples)
    with pytest.raises(RabatchError, match="beta"):
        index.search(layer.queries, k=20, effort=2, beta=np.ones(shape, np.float32))


@pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.type is not FlatIndex], ids=list(KINDS)[1:])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda s: s[:1], "one per KV head", id="a-head-missing"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk + 60, s[1].queries)], "KV head 1", id="id-too-high"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk - 99, s[1].queries)], "KV head 1", id="id-too-low"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk.astype(np.int64), s[1].queries)], "KV head 1", id="int64"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk, s[1].queries[:, :-1])], "KV head 1", id="head_dim"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk[:-1], s[1].queries)], "KV head 1", id="more-vectors"),
        pytest.param(lambda s: [s[0], QuerySample(s[1].topk, s[1].queries * np.nan)], "KV head 1", id="nan"),
    ],
)
def test_wrong_samples_are_refused(kind, change, message):
    layer = make_layer()
    with pytest.raises(KeysError, match=message):
        kind.build(layer.keys, change(layer.samples))


@all_kinds
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda keys: keys[:, :-1], id="a-key-missing"),
        pytest.param(lambda keys: np.concatenate([keys, keys], axis=1), id="twice-the-keys"),
        pytest.param(lambda keys: keys[:1], id="a-head-missing"),
    ],
)
def test_loading_with_other_keys_is_refused(kind, change):
    layer = make_layer()
    table = stored(kind.build(layer.keys, layer.samples).to_arrow())
    with pytest.raises(RabatchError):
        kind.type.from_arrow(table, np.ascontiguousarray(change(layer.keys)))


@all_kinds
def test_the_table_of_another_kind_is_refused(kind):
    layer = make_layer()
    table = stored(kind.build(layer.keys, layer.samples).to_arrow())
    for other in {k.type for k in KINDS.values()} - {kind.type}:
        with pytest.raises(RabatchError, match=f"open it as {kind.type.kind}"):
            other.from_arrow(table, layer.keys)


def test_the_codes_of_scans_are_used_here():
    """Without the codes every test of a scan above would be one of the flat index."""
    layer = make_layer(n_keys=80, n_queries=40, dim=16)
    index = ScanIndex.build(layer.keys, layer.samples)
    found, exact = index.search(layer.queries, k=4, effort=4), FlatIndex(layer.keys).search(layer.queries, k=4)
    assert (found.ids != exact.ids).any()
