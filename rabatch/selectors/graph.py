"""RetrievalAttention: the attention-aware graph that the build made of keys and sampled queries."""

from __future__ import annotations

from rabatch.index.graph import GraphIndex
from rabatch.selectors.opening import Opening


def open_graph(opening: Opening) -> GraphIndex:
    block = opening.block
    if block.neighbors is None or block.entries is None:
        raise opening.lacks("graph", "build with --index graph+scan")
    links = (opening.of_heads(array) for array in (block.neighbors, block.entries))
    return GraphIndex(opening.keys, *links, search_list=opening.candidates, threads=opening.threads)
