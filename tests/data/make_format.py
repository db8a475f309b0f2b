"""Writes the committed index of a format version, once; every later version must read it.

python tests/data/make_format.py    # refuses to replace a folder that is there
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from storage_samples import GEOMETRY, prepare

from rabatch.storage.manifest import FORMAT_VERSION, Manifest
from rabatch.storage.store import IndexStore

HERE = Path(__file__).parent


def digest(array: Any) -> str:
    """SHA-256 of an array's numbers, or of a tensor's bits."""
    if isinstance(array, torch.Tensor):
        array = array.contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def digests(store: IndexStore, manifest: Manifest) -> dict[str, Any]:
    """What is read of a document, by layer and name."""
    tokens = store.read_tokens(manifest)
    found: dict[str, Any] = {"tokens": {name: digest(array) for name, array in vars(tokens).items()}}
    for layer in range(manifest.geometry.n_layers):
        block = store.read_layer(manifest, layer)
        arrays = {name: value for name, value in vars(block).items() if hasattr(value, "shape")}
        if block.scan is not None:
            arrays |= {f"scan.{name}": value for name, value in vars(block.scan).items()}
        found[f"layer {layer}"] = {name: digest(array) for name, array in arrays.items()} | {
            "index_start": block.index_start
        }
    return found


def main() -> None:
    folder = HERE / f"format_v{FORMAT_VERSION}"
    if folder.exists():
        sys.exit(f"{folder} is there; a committed index is never changed")
    store = IndexStore(folder / "store", create=True)
    expected = {}
    plain = {**vars(GEOMETRY), "index": "none", "degree": 0, "kv_dtype": "float32", "sliding_windows": (0, 0, 0)}
    for name, geometry, tokens in (("indexed", GEOMETRY, 40), ("plain", type(GEOMETRY)(**plain), 9)):
        manifest, _ = prepare(store, name, context_tokens=tokens, geometry=geometry, heads_per_part=1)
        expected[name] = digests(store, store.commit(manifest))
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main()
