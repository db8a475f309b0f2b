"""RobustVamana of OOD-DiskANN. Without stored queries to stitch through it is Vamana of DiskANN."""

from __future__ import annotations

from rabatch.selectors.built import BuiltIndex, built
from rabatch.selectors.opening import Opening


def open_vamana(opening: Opening) -> BuiltIndex:
    from rabatch.index.baselines.vamana import VamanaIndex

    return built(VamanaIndex, opening, effort=opening.candidates)
