"""IVF: the keys in the cells of the nearest k-means centroids."""

from __future__ import annotations

from rabatch.selectors.built import BuiltIndex, built
from rabatch.selectors.opening import Opening


def open_ivf(opening: Opening) -> BuiltIndex:
    """`search_list` is the number of cells probed; 0: a sixteenth of them."""
    from rabatch.index.baselines.ivf import IvfIndex

    return built(IvfIndex, opening, effort=opening.recipe.search_list)
