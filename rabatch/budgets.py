"""How many keys each KV head of a layer retrieves per query head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rabatch.config import Recipe
from rabatch.errors import FingerprintError
from rabatch.index.profile import GRID

_HELPS = 0.05
"""Of the mass outside the static set, what `top_k` keys have to hold for a search to be worth it."""
_PYRAMID = 20
"""The last layer's part of the mean budget is one of so many (PyramidKV, arXiv 2406.02069, beta)."""


def head_budget(
    recipe: Recipe,
    profile: NDArray[np.float32] | None,
    *,
    n_kv_heads: int,
    n_keys: int,
    layer: int,
    full_layers: list[int],
) -> NDArray[np.int64]:
    """Keys retrieved per query head, int64 [n_kv_heads]. A `top_k` of all keys is all of them, whatever the budget.

    ``profile`` goes by how the mass of the context's own late queries was spread when the index was built: the fewest
    keys that hold `Recipe.mass` of what the best `top_k` hold beside the static set. Of a head so diffuse that they
    hold less than a twentieth of what the static set leaves, none: there no top-k helps, and zones estimate it.
    ``auto`` is ``profile`` where there is one, and else ``fixed``. ``pyramid`` falls linearly over the layers, from
    almost 2 x top_k to top_k / 20, `top_k` being its mean (PyramidKV). Methods that are compared with have `fixed` or
    `pyramid` alone (`Recipe.budget_in_use`).

    Args:
        profile: [n_kv_heads, 1 + len(GRID)]: see `index.profile.mass_profile`.
        n_keys: Keys of the index.
        full_layers: Numbers of the layers with full attention, ascending; `layer` is one of them.

    Raises:
        FingerprintError: The recipe needs a profile and the index has none.
    """
    budget = np.full(n_kv_heads, recipe.top_k, np.int64)
    if recipe.top_k >= n_keys:
        return budget
    kind = recipe.budget_in_use
    if kind == "pyramid" and len(full_layers) > 1:
        least = max(recipe.top_k / _PYRAMID, 1)
        depth = full_layers.index(layer) / (len(full_layers) - 1)
        budget[:] = round((2 * recipe.top_k - least) * (1 - depth) + least * depth)
    if kind == "profile" or (kind == "auto" and profile is not None):
        if profile is None:
            fix = "the index holds no profile of its heads; build it again, or choose --budget fixed"
            raise FingerprintError("budget", kind, fix)
        for head, held in enumerate(profile):
            budget[head] = _of_profile(held, recipe.top_k, recipe.mass)
    page = recipe.traits.page_keys
    return -(-budget // page) * page


def _of_profile(held: NDArray[np.float32], top_k: int, mass: float) -> int:
    numbers = np.array([0, *GRID])
    static, best = float(held[0]), float(np.interp(top_k, numbers, held))
    if best - static < _HELPS * (1 - static):
        return 0
    wanted = static + mass * (best - static)
    enough = numbers[1:][held[1:] >= wanted]
    return min(int(enough[0]) if len(enough) else top_k, top_k)
