"""The search of a scan: sums of table lookups for all keys, exact scores for the best of them."""

from __future__ import annotations

import numpy as np

from rabatch.compiling import compiled
from rabatch.index.lookup import KEYS_PER_BLOCK, MAX_LEVEL, MAX_QUERIES, above_sums, sum_lookups
from rabatch.index.rerank import score_pairs
from rabatch.index.topk.best import cut, packed, score_of, settle
from rabatch.index.topk.lanes import lowest_bit

_COUNTED = 16384
_MAXIMA = 3  # of groups of keys, for each key wanted: more cost more to make, fewer say less


@compiled
def fill_tables(query, books, tables):  # type: ignore[no-untyped-def]
    """What each word of each code adds to a key's score, in whole numbers from 0: [2 * n_bytes, 2, 16], flat, uint8.

    A unit is worth the same in all codes, so that sums can be compared; what a code adds at least is left out.

    Args:
        query: [2 * n_codes], float32, aligned.
        books: [n_codes, 16, 2], float32.
    """
    n_codes = books.shape[0]
    level = np.float32(min(MAX_LEVEL, 32767 // (2 * ((n_codes + 1) // 2))))
    products = np.empty((n_codes, 16), np.float32)
    widest = np.float32(0)
    for code in range(n_codes):
        a, b = query[2 * code], query[2 * code + 1]
        low, high = np.float32(np.inf), np.float32(-np.inf)
        for word in range(16):
            x = a * books[code, word, 0] + b * books[code, word, 1]
            products[code, word] = x
            low, high = min(low, x), max(high, x)
        for word in range(16):
            products[code, word] -= low
        widest = max(widest, high - low)
    scale = level / widest if widest > 0 else np.float32(0)
    tables[:] = 0
    for code in range(n_codes):
        for word in range(16):
            number = np.uint8(products[code, word] * scale + np.float32(0.5))
            tables[32 * code + word] = number
            tables[32 * code + 16 + word] = number


@compiled
def greatest_bar(numbers, wanted):  # type: ignore[no-untyped-def]
    """The greatest number that at least `wanted` of `numbers` exceed; -1 if no greater one does.

    Args:
        numbers: int16, -1 for none.
    """
    low, high = -1, 32767  # exceeded by enough (or -1), exceeded by too few
    while high - low > 1:
        middle = (low + high) // 2
        bound, count = np.int16(middle), 0
        for first in range(0, len(numbers), _COUNTED):
            some = numbers[first : first + _COUNTED]
            few = np.int16(0)  # as wide as what is counted, or it would not be vectorised as well
            for j in range(len(some)):
                few += np.int16(some[j] > bound)
            count += int(few)
        if count >= wanted:
            low = middle
        else:
            high = middle
    return low


@compiled
def scan_range(  # type: ignore[no-untyped-def]
    codes, books, to_query, exceptions, excluded, keys, queries, prepared, half, efforts, start, stop, scores, ids
):
    """Search pairs (head, query) number `start` to `stop`.

    Args:
        codes: [n_heads, ...], uint8: of each head as `lookup.blocked` lays them out.
        books: [n_heads, n_codes, 16, 2], float32.
        to_query: [n_heads, head_dim, head_dim], float32, of the alignments.
        exceptions: [n_heads, n_exceptions], int32, keys that are scored exactly for every query; -1 for none.
        excluded: [n_heads, n_keys], bool: the exceptions again.
        keys: `KeyCodes.codes`.
        queries: [n_heads, n_queries, head_dim], float32.
        prepared, half: The queries as `KeyCodes.prepare` gives them, and whether bits of keys are float16.
        efforts: int64 [n_heads], keys scored exactly beside the exceptions; at least k and fewer than n_keys.
        scores, ids: [n_heads, n_queries, k], written. Scores lack the offset that `KeyCodes.prepare` gave.
    """
    n_keys, dim = keys.shape[1], keys.shape[2]
    n_queries, k = ids.shape[1], ids.shape[2]
    n_codes, n_exceptions = books.shape[1], exceptions.shape[1]
    n_bytes = (n_codes + 1) // 2
    n_blocks = (n_keys + KEYS_PER_BLOCK - 1) // KEYS_PER_BLOCK
    aligned = np.zeros(2 * n_codes, np.float32)
    tables = np.empty((MAX_QUERIES, 64 * n_bytes), np.uint8)
    sums = np.empty((MAX_QUERIES, n_blocks * KEYS_PER_BLOCK), np.int16)
    item = start
    while item < stop:
        head, row = item // n_queries, item % n_queries
        effort, n = efforts[head], min(MAX_QUERIES, stop - item, n_queries - row)
        for i in range(n):
            query = queries[head, row + i]
            for t in range(dim):
                line, total = to_query[head, t], np.float32(0)
                for u in range(dim):
                    total += line[u] * query[u]
                aligned[t] = total
            fill_tables(aligned, books[head], tables[i])
        wanted = effort + n_exceptions
        per_group = max(n_keys // (_MAXIMA * wanted), 1)  # blocks whose keys in the same place make a group
        n_maxima = (n_blocks + per_group - 1) // per_group * KEYS_PER_BLOCK
        maxima = np.full((n, n_maxima + KEYS_PER_BLOCK), -1, np.int16)
        sum_lookups(codes[head], tables[:n], n_bytes, n_keys, per_group, sums[:n], maxima)
        for i in range(n):
            bar = greatest_bar(maxima[i, :n_maxima], wanted)
            pairs, kept = _best_sums(sums[i], bar, effort, n_keys, excluded[head], n_exceptions)
            for j in range(n_exceptions):
                if exceptions[head, j] >= 0:
                    pairs[kept] = packed(np.float32(0), np.int64(exceptions[head, j]))  # type: ignore[call-arg]
                    kept += 1
            score_pairs(keys, head, prepared[head, row + i], half, pairs, kept)
            settle(pairs, kept, k, scores[head, row + i], ids[head, row + i])
        item += n


@compiled
def _best_sums(sums, bar, effort, n_keys, excluded, room):  # type: ignore[no-untyped-def]
    """The `effort` keys with the greatest sums above `bar`, `packed`, in a list with room for more; their number."""
    pairs = np.empty(3 * effort + KEYS_PER_BLOCK + room, np.uint64)
    kept = 0
    for first in range(0, len(sums), KEYS_PER_BLOCK):
        bits = above_sums(sums, first, np.int16(bar))  # type: ignore[call-arg, var-annotated]
        while bits:
            key = first + lowest_bit(bits)  # type: ignore[call-arg]
            bits &= bits - 1
            if key < n_keys and not excluded[key]:
                pairs[kept] = packed(np.float32(sums[key]), key)  # type: ignore[call-arg]
                kept += 1
        if kept > 3 * effort:
            bar = int(score_of(cut(pairs, kept, effort)))  # type: ignore[call-arg]
            kept = effort
    if kept > effort:
        cut(pairs, kept, effort)
        kept = effort
    return pairs, kept
