"""RobustVamana of OOD-DiskANN (arXiv 2211.12850): Vamana over keys and sampled queries, stitched through these."""

from __future__ import annotations

import numpy as np

from rabatch.index.base import QuerySample
from rabatch.selectors.built import BuiltIndex, built
from rabatch.selectors.opening import Opening


def open_vamana(opening: Opening) -> BuiltIndex:
    from rabatch.index.baselines.vamana import VamanaIndex

    if opening.block.queries is None:
        raise opening.lacks("query vectors", "build with --query-vectors")
    queries = opening.of_heads(opening.block.queries.float().numpy())
    samples = [QuerySample(np.empty((len(of_head), 0), np.int32), of_head) for of_head in queries]
    return built(VamanaIndex, opening, effort=opening.candidates, samples=samples)
