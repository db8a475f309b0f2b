"""Zones: the keys of a KV head in small clusters, each known by its sums alone (RetroInfer, PVLDB 19, estimation zone).

What a query gets of the keys it does not retrieve is estimated from zones: with `n` keys that sum to `s`, whose values
sum to `v`, a zone weighs about `n exp(q . s / n)` and brings the value `v / n`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rabatch.compiling import compiled
from rabatch.errors import ConfigError, KeysError
from rabatch.index.compiled import read_only, run_ranges, run_tasks
from rabatch.index.machine import add_scaled
from rabatch.index.token_codes import TokenCodes, sizes
from rabatch.index.topk.lanes import LANES, TILE_ROWS, add_tile, greatest

# Measured on real keys: the estimated output of a diffuse head is then 4-5 % off, where leaving the keys out costs 80 %
# and zones of 16 consecutive tokens 14-17 %. One centroid per 16 keys, or 10 iterations, gain almost nothing.
SEGMENT_KEYS = 8192
ITERATIONS = 3


class ZoneSums(NamedTuple):
    """What is known of each zone.

    Attributes:
        counts: [n_kv_heads, n_zones], int64: keys in it. 0 past the last zone of a head that has fewer than others.
        key_sums: [n_kv_heads, n_zones, head_dim], float32.
        value_sums: [n_kv_heads, n_zones, value_dim], float32.
    """

    counts: NDArray[np.int64]
    key_sums: NDArray[np.float32]
    value_sums: NDArray[np.float32]


def partition(keys: NDArray[np.float32], *, zone_tokens: int, threads: int = 1) -> NDArray[np.int32]:
    """The zone of every key: k-means within segments of at most `SEGMENT_KEYS` consecutive keys.

    Centroids start at evenly spaced keys and move `ITERATIONS` times. Zones are numbered by segment, and of a head no
    number up to its last is empty; heads may have different numbers of zones. The result does not depend on `threads`.

    Args:
        keys: [n_kv_heads, n_keys, head_dim], float32, finite.
        zone_tokens: Keys per centroid. Smaller: more zones, a better estimate, more work for every query.

    Returns:
        [n_kv_heads, n_keys], int32, from 0; at most one zone per begun `zone_tokens` keys of a segment.

    Raises:
        ConfigError: `zone_tokens` or `threads` is below 1.
        KeysError: A key is not finite.
    """
    if zone_tokens < 1:
        raise ConfigError("zone_tokens", zone_tokens, "must be >= 1")
    n_heads, n_keys, _ = keys.shape
    zones = np.empty((n_heads, n_keys), np.int32)
    if n_keys == 0:
        return zones
    centers = keys.mean(axis=1, dtype=np.float64)
    bounds = np.linspace(0, n_keys, -(-n_keys // SEGMENT_KEYS) + 1).astype(int)
    segments = [slice(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]

    def cluster(head: int, segment: slice) -> None:
        moved = keys[head, segment] - centers[head]
        scale = np.abs(moved).max() or 1.0  # distances keep their order, and squares do not overflow
        if not np.isfinite(scale):
            raise KeysError(f"keys: KV head {head}", float(scale), "must be finite")
        zones[head, segment] = _clusters((moved / scale).astype(np.float32), zone_tokens)

    run_tasks(cluster, [(head, segment) for head in range(n_heads) for segment in segments], threads=threads)
    for of_head in zones:
        for before, segment in itertools.pairwise(segments):
            of_head[segment] += of_head[before].max() + 1
    return zones


def zone_sums(
    keys: NDArray[np.generic] | TokenCodes,
    values: NDArray[np.generic] | TokenCodes,
    zones: NDArray[np.int32],
    *,
    half: bool = False,
    first_row: int | tuple[int, int] = 0,
    threads: int = 1,
) -> ZoneSums:
    """Count and sum up the zones of every head; deterministic for any number of threads.

    Args:
        keys, values: [n_kv_heads, n_rows, head_dim], float32, the bits of 16-bit floats as uint16, int8, or codes.
        zones: [n_kv_heads, n_keys], int32: of the rows from `first_row` on.
        half: Whether bits are IEEE float16; else they are bfloat16.
        first_row: The row that the first zone number is of; or that of the keys and that of the values.
        threads: Heads are divided among them.

    Returns:
        Of the zones up to the largest number in `zones`.

    Raises:
        KeysError: `zones` holds a number below 0, or has other heads or more rows than the keys.
        ConfigError: Keys or values are of another dtype.
    """
    first_rows = first_row if isinstance(first_row, tuple) else (first_row, first_row)
    for name, states, first in (("keys", keys, first_rows[0]), ("values", values, first_rows[1])):
        held = states.codes if isinstance(states, TokenCodes) else states
        if not isinstance(states, TokenCodes) and held.dtype not in (np.float32, np.uint16, np.int8):
            raise ConfigError(
                f"{name}.dtype", str(held.dtype), "must be float32, int8 or the bits of 16-bit floats, uint16"
            )
        if len(held) != len(zones) or not 0 <= first <= held.shape[1] - zones.shape[1]:
            raise KeysError("zones", zones.shape, f"do not fit {name} {held.shape} from row {first} on")
    if zones.size and zones.min() < 0:
        raise KeysError("zones", int(zones.min()), "must be >= 0")
    n_heads, n_zones = len(zones), int(zones.max(initial=-1)) + 1
    counts = np.zeros((n_heads, n_zones), np.int64)
    of_key = read_only(np.asarray(zones, np.int32))
    sums = []
    for states, first in zip((keys, values), first_rows, strict=True):
        summed = np.zeros((n_heads, n_zones, sizes(states)[1]), np.float32)
        given = states._replace(codes=read_only(states.codes)) if isinstance(states, TokenCodes) else read_only(states)
        rest = given, of_key, half, first, summed
        run_ranges(lambda start, stop, rest=rest: _add_heads(start, stop, *rest), n_heads, threads=threads)  # type: ignore[misc]
        sums.append(summed)
    for head, of_head in enumerate(zones):
        counts[head] = np.bincount(of_head, minlength=n_zones)
    return ZoneSums(counts, *sums)


def _clusters(keys: NDArray[np.float32], zone_tokens: int) -> NDArray[np.int64]:
    """The cluster of each of some keys, [n_keys], from 0 without gaps."""
    n_keys, dim = keys.shape
    count = -(-n_keys // zone_tokens)
    centroids = keys[(2 * np.arange(count) + 1) * n_keys // (2 * count)]
    rows = np.pad(keys, ((0, -n_keys % TILE_ROWS), (0, 1)))
    rows[:, dim] = 1  # times -|c|^2 / 2, the last number of a centroid in the panels
    rows = rows.ravel()
    nearest = np.empty(n_keys, np.int64)
    for _ in range(ITERATIONS):
        _assign(rows, _panels(centroids), dim + 1, count, nearest)
        _move(keys, nearest, centroids)
    _assign(rows, _panels(centroids), dim + 1, count, nearest)
    numbers: NDArray[np.int64] = np.unique(nearest, return_inverse=True)[1]
    return numbers.reshape(-1)


def _panels(centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centroids, 16 beside each other, number by number, and -|c|^2 / 2 after the last: -inf where there is none."""
    count, dim = centroids.shape
    padded = np.zeros((count + -count % LANES, dim + 1), np.float32)
    padded[:count, :dim] = centroids
    padded[:, dim] = -np.inf
    padded[:count, dim] = -np.square(centroids).sum(axis=1) / 2
    return np.ascontiguousarray(padded.reshape(-1, LANES, dim + 1).transpose(0, 2, 1)).ravel()


@compiled
def _assign(rows, panels, dim, count, nearest):  # type: ignore[no-untyped-def]
    """The nearest centroid of each key in L2, the first of several: the largest k . c - |c|^2 / 2."""
    width = len(panels) // dim
    lines = np.empty(TILE_ROWS * width, np.float32)
    for top in range(0, len(nearest), TILE_ROWS):
        for p in range(0, width, LANES):
            add_tile(rows, top * dim, dim, panels, p * dim, LANES, lines, p, width, dim, False)  # type: ignore[call-arg]
        for r in range(min(TILE_ROWS, len(nearest) - top)):
            best = greatest(lines, r * width, width // LANES)  # type: ignore[call-arg, var-annotated]
            c = 0
            while c < count - 1 and lines[r * width + c] != best:
                c += 1
            nearest[top + r] = c


@compiled
def _move(keys, nearest, centroids):  # type: ignore[no-untyped-def]
    """Centroids to the means of their keys; one that has none stays."""
    sums, counts = np.zeros_like(centroids), np.zeros(len(centroids), np.int64)
    for i in range(len(keys)):
        counts[nearest[i]] += 1
        for t in range(keys.shape[1]):
            sums[nearest[i], t] += keys[i, t]
    for c in range(len(centroids)):
        if counts[c]:
            for t in range(keys.shape[1]):
                centroids[c, t] = sums[c, t] / np.float32(counts[c])


@compiled
def _add_heads(start, stop, states, zones, half, first_row, sums):  # type: ignore[no-untyped-def]
    for head in range(start, stop):
        for i in range(zones.shape[1]):
            add_scaled(sums[head, zones[head, i]], states, head, first_row + i, np.float32(1), half)  # type: ignore[arg-type]
