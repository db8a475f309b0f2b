"""docs/format.md is enough to read a store: its example is run, and it names every field."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from storage_samples import GEOMETRY, prepare

from rabatch.index.profile import GRID
from rabatch.storage.blocks import PROFILE_NUMBERS
from rabatch.storage.manifest import Geometry, Manifest, Part
from rabatch.storage.store import IndexStore

DOC = Path(__file__).parents[2] / "docs" / "format.md"


def test_the_example_reads_keys(tmp_path: Path) -> None:
    geometry = dataclasses.replace(
        GEOMETRY, n_layers=6, n_kv_heads=3, n_query_heads=3, sliding_windows=(0,) * 6, kv_dtype="bfloat16"
    )
    store = IndexStore(tmp_path, create=True)
    manifest, blocks = prepare(store, geometry=geometry, heads_per_part=2)
    store.commit(manifest)
    example = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert example is not None
    names = {"store": str(tmp_path), "name": manifest.path.removeprefix("manifests/")}
    exec(example.group(1), names)
    assert np.array_equal(names["keys"], blocks[5].keys[2].float().numpy())


@pytest.mark.parametrize("kind", [Manifest, Geometry, Part])
def test_every_field_is_described(kind: type) -> None:
    text = DOC.read_text()
    assert [f.name for f in dataclasses.fields(kind) if f"`{f.name}`" not in text] == []


def test_every_metadata_key_and_column_is_described(tmp_path: Path) -> None:
    store = IndexStore(tmp_path, create=True)
    manifest, _ = prepare(store)
    text = DOC.read_text()
    for part in manifest.parts:
        schema = pq.read_schema(tmp_path / part.path)
        for name in [*schema.names, *(key.decode() for key in schema.metadata)]:
            assert f"`{name}`" in text
        assert all(
            json.loads(value) is not None or key in (b"entries", b"profile") for key, value in schema.metadata.items()
        )


def test_the_profile_is_described() -> None:
    assert 1 + len(GRID) == PROFILE_NUMBERS
    counts = ", ".join(map(str, GRID[:-1])) + f" and {GRID[-1]}"
    text = DOC.read_text()
    assert counts in text
    assert f"array of {PROFILE_NUMBERS} numbers" in text
