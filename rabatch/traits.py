"""What the engine has to know of a recipe's method beside what its selector does: a table, one line per method.

`rabatch.selectors` has the other table, of what chooses keys; docs/methods.md says what each method does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Method = Literal[
    "dense", "streaming", "flat", "graph", "scan", "auto",
    "ivf", "hnsw", "vamana", "quest", "snapkv", "pyramidkv", "h2o", "infinigen",
]  # fmt: skip
METHODS: tuple[Method, ...] = get_args(Method)
COMPARED: tuple[Method, ...] = METHODS[METHODS.index("ivf") :]
"""Methods of others, to be compared with. Their budget is fixed, or falls over the layers if that is asked for."""

Column = Literal["graph", "codes", "zones", "mass", "queries"]


@dataclass(frozen=True, kw_only=True)
class Traits:
    """Traits of a method.

    Args:
        reads: What it reads of an index beside keys and values. With zones it can estimate what is not retrieved.
        build: Fields of `BuildConfig` without which an index does not serve it.
        dense_layers: First layers in which every key is attended, as published; and `least_dense_layers`, without which
            it cannot be.
        observes_questions: Keys are chosen by the attention of the question's own tokens, which is exact then.
        falling_budget: The budget always falls over the layers.
        page_keys: Keys are taken in pages of so many.
        candidates_per_key: Of a search, for each key that is wanted.
        enough_up_to: Keys of an index up to which these are enough; past them they grow with its root. None: always.
    """

    reads: frozenset[Column] = frozenset()
    build: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: int = 0
    least_dense_layers: int = 0
    observes_questions: bool = False
    falling_budget: bool = False
    page_keys: int = 1
    candidates_per_key: int = 2
    enough_up_to: int | None = None


_SCANNED_KEYS = 1 << 15
"""Up to so many keys four candidates per key that is wanted find .97 and more of the mass (docs/decode.md)."""

TRAITS: Mapping[Method, Traits] = {
    "dense": Traits(),
    "streaming": Traits(),
    "flat": Traits(reads=frozenset({"zones"})),
    "graph": Traits(reads=frozenset({"graph", "zones"})),
    "scan": Traits(reads=frozenset({"codes", "zones"}), candidates_per_key=4, enough_up_to=_SCANNED_KEYS),
    "auto": Traits(reads=frozenset({"graph", "codes", "zones"})),
    "ivf": Traits(),
    "hnsw": Traits(),
    "vamana": Traits(reads=frozenset({"queries"}), build={"query_vectors": True}),
    "quest": Traits(dense_layers=2, page_keys=16),
    "snapkv": Traits(observes_questions=True),
    "pyramidkv": Traits(observes_questions=True, falling_budget=True),
    "h2o": Traits(reads=frozenset({"mass"}), build={"key_mass": True}),
    "infinigen": Traits(dense_layers=1, least_dense_layers=1),
}
