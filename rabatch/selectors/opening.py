"""What opening a key index of a stored layer takes, and what is said where the layer lacks something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rabatch.config import Recipe
from rabatch.errors import FingerprintError
from rabatch.index.base import Searchable
from rabatch.index.codes import KeyCodes
from rabatch.storage.blocks import LayerBlock


@dataclass(frozen=True)
class Opening:
    """A key index to open.

    Args:
        recipe: Its method is that of the index.
        heads: Numbers of the KV heads within the block, ascending.
        keys: Of these heads and the rows of the index.
        threads: Of the index.
    """

    recipe: Recipe
    block: LayerBlock
    heads: NDArray[np.int64]
    keys: KeyCodes
    threads: int

    @property
    def candidates(self) -> int:
        """Of a search."""
        return self.recipe.candidates(self.keys.shape[1])

    def of_heads(self, array: NDArray) -> NDArray:
        """The part of an array of the block's heads that is of `heads`."""
        return array if len(self.heads) == len(array) else array[self.heads]

    def lacks(self, what: str, fix: str) -> FingerprintError:
        """The layer holds no such thing."""
        return FingerprintError("recipe", self.recipe.method, f"layer {self.block.layer} holds no {what}; {fix}")


Opener = Callable[[Opening], Searchable]


class OverKeys:
    """A key index made of the stored keys when it is opened.

    Args:
        keys: Of all KV heads of a layer.
        threads: Of a search.
    """

    def __init__(self, keys: KeyCodes, *, threads: int = 1) -> None:
        self.keys, self.threads = keys, threads

    @property
    def n_keys(self) -> int:
        """Keys per KV head."""
        return self.keys.shape[1]
