"""Vamana (DiskANN, 2019) and RobustStitch (OOD-DiskANN, 2022), compiled: search, prune, insert, stitch.

Points [n_points, width], float32, are compared by squared L2 distance. Links [n_points, room], int32, are as many as
`counts` [n_points], int32, says.
"""

from __future__ import annotations

import numpy as np

from rabatch.compiling import compiled


@compiled
def _distance(points, a, b):  # type: ignore[no-untyped-def]
    total = np.float32(0.0)
    for t in range(points.shape[1]):
        difference = points[a, t] - points[b, t]
        total += difference * difference
    return total


@compiled
def greedy_search(  # type: ignore[no-untyped-def]
    points, links, counts, start, target, limit, marks, list_ids, list_distances, list_open, found, distances
):
    """Best-first search of a graph that is being built, for point `target`.

    Writes the points whose links were followed to `found` and their distances to `distances`, up to their lengths,
    and returns how many. `marks` [n_points], int32, holds `target` + 1 for the points seen.
    """
    list_ids[0], list_distances[0], list_open[0] = start, _distance(points, start, target), True
    marks[start] = target + 1
    size, first, n_found = 1, 0, 0
    while first < size and n_found < len(found):
        current = list_ids[first]
        list_open[first] = False
        found[n_found], distances[n_found] = current, list_distances[first]
        n_found += 1
        lowest = size
        for j in range(counts[current]):
            point = links[current, j]
            if marks[point] == target + 1:
                continue
            marks[point] = target + 1
            distance = _distance(points, point, target)
            if size == limit and distance >= list_distances[size - 1]:
                continue
            place = min(size, limit - 1)
            while place > 0 and list_distances[place - 1] > distance:
                if place < limit:
                    list_ids[place], list_distances[place] = list_ids[place - 1], list_distances[place - 1]
                    list_open[place] = list_open[place - 1]
                place -= 1
            list_ids[place], list_distances[place], list_open[place] = point, distance, True
            size = min(size + 1, limit)
            lowest = min(lowest, place)
        first = min(first, lowest)
        while first < size and not list_open[first]:
            first += 1
    return n_found


@compiled
def robust_prune(points, owner, candidates, distances, n, alpha, degree, links, counts):  # type: ignore[no-untyped-def]
    """Set the links of `owner`: candidates, nearest first, unless one that was taken is closer by `alpha` to them.

    As DiskANN does it: with 1 for `alpha` first, then with `alpha`, for as long as there is room. Distances are
    squared, so `alpha` is too.
    """
    order = np.argsort(distances[:n], kind="mergesort")
    taken = np.zeros(n, np.bool_)
    # The largest ratio of a candidate's distance to that between it and a taken one; above alpha it is occluded.
    ratio = np.zeros(n, np.float32)
    count = 0
    for bound in (np.float32(1.0), np.float32(alpha)):
        for i in range(n):
            if count == degree:
                break
            at = order[i]
            if taken[i] or ratio[i] > bound or candidates[at] == owner:
                continue
            taken[i] = True
            links[owner, count] = candidates[at]
            count += 1
            for j in range(i + 1, n):
                if taken[j] or ratio[j] > alpha:
                    continue
                between = _distance(points, candidates[order[j]], candidates[at])
                ratio[j] = max(ratio[j], distances[order[j]] / between if between > 0 else np.float32(np.inf))
    counts[owner] = count


@compiled
def _prune_own(points, owner, alpha, degree, links, counts, candidates, distances):  # type: ignore[no-untyped-def]
    n = counts[owner]
    for j in range(n):
        candidates[j] = links[owner, j]
        distances[j] = _distance(points, owner, candidates[j])
    robust_prune(points, owner, candidates, distances, n, alpha, degree, links, counts)


@compiled
def insert_points(points, n_keys, order, start, limit, alpha, degree, links, counts):  # type: ignore[no-untyped-def]
    """Vamana's insertion of the points in `order`; a row of `links` has room for more than `degree`, to prune seldom.

    Points from `n_keys` on are queries; they get links to keys alone, for the others would be lost with them.
    """
    room = links.shape[1]
    marks = np.zeros(len(points), np.int32)
    list_ids, list_distances = np.empty(limit, np.int32), np.empty(limit, np.float32)
    list_open = np.empty(limit, np.bool_)
    n_most = 4 * limit
    candidates, distances = np.empty(n_most, np.int32), np.empty(n_most, np.float32)
    own_ids, own_distances = np.empty(room, np.int32), np.empty(room, np.float32)
    for target in order:
        n = greedy_search(
            points, links, counts, start, target, limit, marks,
            list_ids, list_distances, list_open, candidates, distances,
        )  # fmt: skip
        if target >= n_keys:
            kept = 0
            for j in range(n):
                if candidates[j] < n_keys:
                    candidates[kept], distances[kept] = candidates[j], distances[j]
                    kept += 1
            n = kept
        robust_prune(points, target, candidates, distances, n, alpha, degree, links, counts)
        for j in range(counts[target]):
            other = links[target, j]
            if counts[other] == room:
                _prune_own(points, other, alpha, degree, links, counts, own_ids, own_distances)
            links[other, counts[other]] = target
            counts[other] += 1
    for point in range(len(points)):
        if counts[point] > degree:
            _prune_own(points, point, alpha, degree, links, counts, own_ids, own_distances)


@compiled
def stitch(points, n_keys, per_query, alpha, degree, links, counts, out):  # type: ignore[no-untyped-def]
    """Write links among keys alone to `out`: a link to a query becomes links to the nearest of the keys it links to.

    Own links to keys come first, then the nearest key of each query, the second of each, up to `per_query`; what is
    too many is pruned.
    """
    most = links.shape[1] * (per_query + 1)
    near, distances = np.empty(most, np.int32), np.empty(most, np.float32)
    out_counts = np.zeros(n_keys, np.int32)
    for query in range(n_keys, len(points)):
        row = links[query, : counts[query]].copy()
        lengths = np.empty(len(row), np.float32)
        for j in range(len(row)):
            lengths[j] = _distance(points, query, row[j])
        links[query, : len(row)] = row[np.argsort(lengths, kind="mergesort")]
    for key in range(n_keys):
        n = 0
        for turn in range(per_query + 1):
            for j in range(counts[key]):
                target = links[key, j]
                if turn == 0 and target >= n_keys:
                    continue
                if turn > 0:
                    if target < n_keys or turn > counts[target]:
                        continue
                    target = links[target, turn - 1]
                known = target == key
                for i in range(n):
                    known = known or near[i] == target
                if not known:
                    near[n], distances[n] = target, _distance(points, key, target)
                    n += 1
        if n > degree:
            robust_prune(points, key, near, distances, n, alpha, degree, out, out_counts)
        else:
            out[key, :n] = near[:n]
