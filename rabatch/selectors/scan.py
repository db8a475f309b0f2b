"""A scan of 4-bit codes of all keys, the best scored exactly."""

from __future__ import annotations

from rabatch.index.scan import ScanIndex
from rabatch.selectors.opening import Opening


def open_scan(opening: Opening) -> ScanIndex:
    if opening.block.scan is None:
        raise opening.lacks("scan", "build with --index graph+scan")
    arrays = (opening.of_heads(array) for array in vars(opening.block.scan).values())
    efforts = [opening.candidates] * len(opening.heads)
    return ScanIndex.stored(opening.keys, *arrays, efforts=efforts, threads=opening.threads)
