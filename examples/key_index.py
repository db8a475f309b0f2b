"""The key indexes alone: build one for the keys of two heads, search it, insert keys, save and load it.

python examples/key_index.py
"""

from __future__ import annotations

import numpy as np

from rabatch.index.auto import AutoIndex
from rabatch.index.base import QuerySample
from rabatch.index.flat import FlatIndex
from rabatch.index.mass import recovered_mass
from rabatch.index.synthetic import attention_vectors


def main() -> None:
    heads = [attention_vectors(8192, 2200, head_dim=64, sharpness=sharpness) for sharpness in (1.0, 3.0)]
    queries = np.stack([q for q, _ in heads])
    keys = np.stack([k for _, k in heads])
    sampled, asked = queries[:, :2000], np.ascontiguousarray(queries[:, 2000:])

    # Prefill computes these scores anyway; here an exact search stands in for it.
    exact = FlatIndex(keys)
    lists = exact.search(np.ascontiguousarray(sampled), k=32).ids
    samples = [QuerySample(topk=lists[head], queries=np.ascontiguousarray(sampled[head])) for head in range(2)]

    index = AutoIndex.build(keys, samples, seed=0, threads=2)
    for head, choice in enumerate(index.choices):
        print(f"head {head}: {choice.kind}, effort {choice.effort}, finds {choice.mass:.3f} of the ideal mass")

    found, ideal = index.search(asked, k=100), exact.search(asked, k=100)
    share = recovered_mass(found.scores, ideal.scores, scaling=64**-0.5)
    print(f"held-out queries: {share.mean():.3f} of the ideal mass, {found.distances.mean():.0f} scores computed")

    index.insert(keys[:, :10])
    saved = index.to_arrow()
    again = AutoIndex.from_arrow(saved, np.concatenate([keys, keys[:, :10]], axis=1), threads=2)
    same = np.array_equal(again.search(asked, k=100).ids, index.search(asked, k=100).ids)
    print(
        f"{again.n_keys} keys with 10 inserted; {saved.nbytes / 2**20:.1f} MiB beside the keys; loads as saved: {same}"
    )


if __name__ == "__main__":
    main()
