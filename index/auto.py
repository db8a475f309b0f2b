"""Per KV head the cheapest index that recovers the wanted softmax mass: graph, scan or flat.

Concentrated heads favour the graph, diffuse ones the scan, short contexts neither. Which it is shows on queries: some
of the sampled ones are kept out of the build and asked of both, and what they find is compared with what an exact
search finds. Costs are counted, not clocked, so that the same arguments give the same index.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rabatch.config import GraphConfig
from rabatch.errors import ConfigError, IntegrityError
from rabatch.index.arrow import from_table, to_table
from rabatch.index.base import (
    KeyIndex,
    QuerySample,
    SearchResult,
    apply_beta,
    check_keys,
    check_queries,
    check_samples,
    check_saved_keys,
    empty_result,
)
from rabatch.index.codes import Dtype
from rabatch.index.flat import FlatIndex
from rabatch.index.graph import GraphIndex
from rabatch.index.mass import recovered_mass
from rabatch.index.scan import EXCEPTIONS, ScanIndex

_log = logging.getLogger(__name__)

_KINDS: dict[str, type[KeyIndex]] = {"graph": GraphIndex, "scan": ScanIndex, "flat": FlatIndex}
# Efforts tried, in multiples of the k that is built for, cheapest first.
_EFFORTS: dict[str, tuple[float, ...]] = {
    "graph": (1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0),
    "scan": (2.5, 3.0, 4.0, 6.0, 8.0),
}
# Nanoseconds, measured at 8K to 128K keys on one core (benchmarks/index_search.py measures the same searches): of a key
# that a graph search visits, of a code per dimension, of a key re-ranked, of a number in a matrix product, of a scan.
_VISIT_NS, _CODE_NS_PER_DIM, _RERANK_NS, _FLAT_NS_PER_DIM, _SCAN_NS = 60.0, 0.014, 40.0, 0.2, 20_000.0


@dataclass(frozen=True)
class Choice:
    """What serves one KV head, and why.

    Args:
        kind: `graph`, `scan` or `flat`.
        effort: Its default effort.
        mass, worst: Share of the ideal top-k mass that the probes recovered: mean and 10th percentile.
        cost_us: Estimated microseconds per query on one core.
    """

    kind: str
    effort: int
    mass: float
    worst: float
    cost_us: float


@dataclass(frozen=True)
class Group:
    """KV heads that one index serves."""

    heads: list[int]
    index: KeyIndex


class AutoIndex:
    """Indexes of several kinds for the KV heads of one layer.

    Args:
        groups: Disjoint heads and the index of each.
        choices: One per KV head.
    """

    kind = "auto"

    def __init__(self, groups: Sequence[Group], choices: Sequence[Choice]) -> None:
        self._groups, self.choices = tuple(groups), tuple(choices)

    @property
    def n_heads(self) -> int:
        return len(self.choices)

    @property
    def n_keys(self) -> int:
        return self._groups[0].index.n_keys

    @property
    def bytes_per_key(self) -> float:
        return sum(group.index.bytes_per_key * len(group.heads) for group in self._groups) / self.n_heads

    @classmethod
    def build(
        cls,
        keys: NDArray[np.float32],
        samples: Sequence[QuerySample],
        *,
        seed: int = 0,
        threads: int = 1,
        k: int = 100,
        mass: float = 0.985,
        worst: float = 0.965,
        scaling: float | None = None,
        probes: int = 256,
        dtype: Dtype = "int8",
        exact: Dtype = "float32",
        config: GraphConfig | None = None,
        **options: Any,
    ) -> Self:
        """See `KeyIndex.build`.

        Args:
            k: Keys per query that searches will ask for.
            mass, worst: Share of the softmax mass of the exact top `k` that has to be recovered: mean over the probes,
                and their 10th percentile (answers hang on the worst queries).
            scaling: Of the scores before the softmax; None: 1 / sqrt(head_dim).
            probes: Sampled queries per KV head that judge and are not built from.
            dtype: What graph searches score; int8 candidates are scored again by `exact`.
            exact: What scores count, of graph and scan.
            config: Of the graphs.
            options: Of `GraphIndex.build`.

        Raises:
            ConfigError: A sample has no query vectors: nothing to choose by.
        """
        check_keys(keys)
        check_samples(samples, *keys.shape)
        for name, share in (("mass", mass), ("worst", worst)):
            if not 0 < share <= 1:
                raise ConfigError(name, share, "must be in (0, 1]")
        n_heads, n_keys, dim = keys.shape
        scale = dim**-0.5 if scaling is None else scaling
        known = min((0 if sample.queries is None else len(sample.queries) for sample in samples), default=0)
        if not known:
            raise ConfigError("samples", None, "an index is chosen by sampled queries; build it with query vectors")
        rest, asked = _split(samples, min(probes, (known + 1) // 2))
        built: dict[str, KeyIndex] = {"flat": FlatIndex.build(keys, rest)}
        flat = Choice("flat", 0, 1.0, 1.0, n_keys * dim * _FLAT_NS_PER_DIM / 1e3)
        tried = [[flat] for _ in range(n_heads)]
        if n_keys > 2 * k:
            again = exact if dtype != exact else None
            shared: dict[str, Any] = {"seed": seed, "threads": threads}
            built["graph"] = GraphIndex.build(keys, rest, config=config, dtype=dtype, exact=again, **shared, **options)
            built["scan"] = ScanIndex.build(keys, rest, dtype=exact, **shared)
            ideal = built["flat"].search(asked, k=k)
            for kind in ("graph", "scan"):
                for choices, choice in zip(tried, _least(built[kind], asked, ideal, scale, (mass, worst)), strict=True):
                    if choice is not None:
                        choices.append(choice)
        chosen = [min(choices, key=lambda choice: choice.cost_us) for choices in tried]
        for head, choice in enumerate(chosen):
            _log.info("KV head %d: %s, effort %d, %.1f us", head, choice.kind, choice.effort, choice.cost_us)
        groups = []
        for kind, index in built.items():
            heads = [head for head, choice in enumerate(chosen) if choice.kind == kind]
            if heads:
                efforts = [chosen[head].effort for head in heads]
                groups.append(Group(heads, _heads(index, keys, heads, efforts)))
        return cls(groups, chosen)

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """See `KeyIndex.search`. `effort`: candidates kept by graphs; scans re-rank twice as many."""
        check_queries(queries, self.n_heads, queries.shape[-1], k=k, effort=effort, beta=beta)
        result = empty_result(self.n_heads, queries.shape[1], k)
        for group in self._groups:
            wanted = effort * (2 if group.index.kind == "scan" else 1)
            radius = None if beta is None else beta[group.heads]
            found = group.index.search(queries[group.heads], k=k, effort=wanted, beta=radius)
            for name, array in vars(found).items():
                getattr(result, name)[group.heads] = array
        return apply_beta(result, beta)

    def insert(self, keys: NDArray[np.float32]) -> None:
        """See `KeyIndex.insert`; the choices stay as they are."""
        check_keys(keys, n_heads=self.n_heads)
        for group in self._groups:
            group.index.insert(np.ascontiguousarray(keys[group.heads]))

    def to_arrow(self) -> pa.Table:
        """The columns of all kinds; rows of heads that a kind does not serve hold zeros."""
        columns: dict[str, np.ndarray] = {}
        arrays: dict[str, np.ndarray] = {}
        groups = []
        for number, group in enumerate(self._groups):
            settings, own, small = from_table(group.index.to_arrow(), group.index.kind)
            for name, array in own.items():
                column = f"{group.index.kind}.{name}"
                if column not in columns:
                    columns[column] = np.zeros((self.n_heads, *array.shape[1:]), array.dtype)
                columns[column][group.heads] = array
            arrays |= {f"{number}.{name}": array for name, array in small.items()}
            groups.append({"heads": group.heads, "settings": settings, "columns": list(own)})
        settings = {
            "kind": self.kind,
            "n_heads": self.n_heads,
            "n_keys": self.n_keys,
            "groups": groups,
            "choices": [asdict(choice) for choice in self.choices],
        }
        return to_table(settings, columns, arrays)

    @classmethod
    def from_arrow(cls, table: pa.Table, keys: NDArray[np.float32], *, threads: int = 1) -> Self:
        """See `KeyIndex.from_arrow`."""
        settings, columns, arrays = from_table(table, cls.kind)
        check_saved_keys(keys, settings["n_heads"], settings["n_keys"])
        groups = []
        try:
            for number, saved in enumerate(settings["groups"]):
                heads, kind = saved["heads"], saved["settings"]["kind"]
                own = {name: columns[f"{kind}.{name}"][heads] for name in saved["columns"]}
                prefix = f"{number}."
                small = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
                index = _KINDS[kind].from_arrow(
                    to_table(saved["settings"], own, small), np.ascontiguousarray(keys[heads]), threads=threads
                )
                groups.append(Group(heads, index))
            return cls(groups, [Choice(**choice) for choice in settings["choices"]])
        except (KeyError, TypeError) as error:
            raise IntegrityError("index table", str(error), "is no auto index; build the index again") from error


def _split(samples: Sequence[QuerySample], probes: int) -> tuple[list[QuerySample], NDArray[np.float32]]:
    """The samples without `probes` of the queries of known vectors, and those, [n_kv_heads, probes, head_dim]."""
    rest, asked = [], []
    for sample in samples:
        assert sample.queries is not None
        known = len(sample.queries)
        out = np.linspace(0, known - 1, probes).astype(int)
        kept = np.setdiff1d(np.arange(known), out)
        rest.append(QuerySample(np.concatenate([sample.topk[kept], sample.topk[known:]]), sample.queries[kept]))
        asked.append(sample.queries[out])
    return rest, np.stack(asked)


def _least(
    index: KeyIndex, queries: NDArray[np.float32], ideal: SearchResult, scaling: float, goal: tuple[float, float]
) -> list[Choice | None]:
    """Per KV head the least effort of an index that reaches the goal, or None.

    Args:
        queries: [n_kv_heads, n_probes, head_dim], float32.
        ideal: What an exact search finds for them.
        goal: Mean and 10th percentile of the recovered mass.
    """
    dim, k = queries.shape[2], ideal.ids.shape[2]
    least: list[Choice | None] = [None] * index.n_heads
    for factor in _EFFORTS[index.kind]:
        effort = int(factor * k)
        if effort >= index.n_keys or None not in least:
            break
        found = index.search(queries, k=k, effort=effort)
        share = recovered_mass(found.scores, ideal.scores, scaling=scaling)
        for head in range(index.n_heads):
            mean, low = float(share[head].mean()), float(np.quantile(share[head], 0.1))
            if least[head] is None and mean >= goal[0] and low >= goal[1]:
                if index.kind == "graph":
                    cost = float(found.visited[head].mean()) * _VISIT_NS + effort * _RERANK_NS
                else:
                    codes = index.n_keys * dim * _CODE_NS_PER_DIM
                    cost = _SCAN_NS + codes + (effort + EXCEPTIONS) * _RERANK_NS
                least[head] = Choice(index.kind, effort, mean, low, cost / 1e3)
    return least


def _heads(index: KeyIndex, keys: NDArray[np.float32], heads: list[int], efforts: list[int]) -> KeyIndex:
    """The index of some of the heads of a layer, with these default efforts."""
    if isinstance(index, GraphIndex | ScanIndex):
        return index.select(heads, efforts)
    return FlatIndex(np.ascontiguousarray(keys[heads]))
