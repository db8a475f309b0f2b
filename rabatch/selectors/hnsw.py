"""HNSW: a graph of near keys on several levels, which knows nothing of queries."""

from __future__ import annotations

from rabatch.selectors.built import BuiltIndex, built
from rabatch.selectors.opening import Opening


def open_hnsw(opening: Opening) -> BuiltIndex:
    from rabatch.index.baselines.hnsw import HnswIndex

    return built(HnswIndex, opening, effort=opening.candidates)
