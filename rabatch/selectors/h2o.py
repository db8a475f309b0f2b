"""H2O (arXiv 2306.14048): per KV head the keys that the context's own queries attended most."""

from __future__ import annotations

import numpy as np

from rabatch.selectors.listed import ListedKeys
from rabatch.selectors.opening import Opening


def open_h2o(opening: Opening) -> ListedKeys:
    """All keys in the order of their accumulated mass; of equal mass the earlier one first."""
    mass = opening.block.key_mass
    if mass is None:
        raise opening.lacks("attention mass of its keys", "build with --key-mass")
    order = np.argsort(-opening.of_heads(mass), axis=1, kind="stable").astype(np.int32)
    return ListedKeys(opening.keys, order[:, : opening.recipe.top_k * 2], threads=opening.threads)
