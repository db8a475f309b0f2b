"""Indexes that earlier versions wrote are read to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rabatch.storage.manifest import FORMAT_VERSION
from rabatch.storage.store import IndexStore
from rabatch.storage.verify import verify
from tests.data.make_format import digests

DATA = Path(__file__).parents[1] / "data"
VERSIONS = sorted(folder.name for folder in DATA.glob("format_v*"))


def test_this_version_has_a_committed_index() -> None:
    assert f"format_v{FORMAT_VERSION}" in VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_it_is_read_to_the_bit(version: str) -> None:
    store = IndexStore(DATA / version / "store")
    expected = json.loads((DATA / version / "expected.json").read_text())
    found = {manifest.document_id: digests(store, manifest) for manifest in store.manifests()}
    assert found == expected
    assert verify(store) == []
