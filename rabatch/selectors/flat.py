"""Exact top-k: the recall ceiling of all others."""

from __future__ import annotations

from rabatch.index.flat import FlatIndex
from rabatch.selectors.opening import Opening


def open_flat(opening: Opening) -> FlatIndex:
    return FlatIndex(opening.keys.decode())
