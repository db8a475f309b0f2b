"""The compiled pass over static set, found keys and tail against partial results that are merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rabatch.attention.merge import dense_partial, gathered_partial, merge
from rabatch.attention.step import StaticSet, attend_sets

N_KV, BATCH, DIM, N_KEYS = 2, 3, 24, 90


def case(dtype: torch.dtype, *, group: int, q_tokens: int, n_static: int, k: int, seed: int = 0) -> dict:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    keys, values = (normal(N_KV, N_KEYS, DIM).to(dtype) for _ in range(2))
    positions = torch.randperm(N_KEYS, generator=make)[:n_static].sort().values
    others = torch.ones(N_KEYS, dtype=torch.bool).index_fill(0, positions, False).nonzero()[:, 0]
    queries = normal(N_KV, BATCH, group, q_tokens, DIM)
    order = torch.rand((N_KV, BATCH * group * q_tokens, len(others)), generator=make).argsort(-1)[..., :k]
    ids = others[order]
    if k > 2:
        ids[..., -1] = -1  # an index may find less
    rows = queries.reshape(N_KV, -1, DIM)
    scores = (rows @ keys.float().transpose(1, 2)).gather(2, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
    counts = torch.tensor([q_tokens, max(1, q_tokens - 2), max(1, q_tokens - 1)])
    places = torch.tensor([0, 5, 2])[:, None] + torch.arange(q_tokens)
    tail = tuple(normal(BATCH, N_KV, int(places.max()) + 1, DIM) for _ in range(2))
    return {
        "queries": queries, "keys": keys, "values": values, "positions": positions, "ids": ids, "scores": scores,
        "counts": counts, "places": places, "tail": tail,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    ("group", "q_tokens", "n_static", "k"),
    [(3, 1, 20, 7), (1, 1, 1, 1), (4, 5, 33, 20), (2, 3, 0, 9), (7, 2, 16, 0), (2, 4, 0, 0)],
)
def test_one_pass_is_the_merge_of_its_parts(
    group: int, q_tokens: int, n_static: int, k: int, softcap: float | None, dtype: torch.dtype
) -> None:
    made = case(dtype, group=group, q_tokens=q_tokens, n_static=n_static, k=k)
    queries, values, positions = made["queries"], made["values"], made["positions"]
    options = {"scaling": 0.3, "softcap": softcap}
    mass = np.zeros((BATCH, N_KEYS), np.float32)
    static_keys, static_values = (t[:, positions].float() for t in (made["keys"], values))
    found = attend_sets(
        queries, StaticSet.of(static_keys, static_values, positions), (made["scores"], made["ids"]), values,
        made["tail"], made["places"], made["counts"], mass=mass, **options,
    )  # fmt: skip
    rows = queries.reshape(N_KV, -1, DIM)
    static = dense_partial(rows, static_keys, static_values, **options)
    gathered = gathered_partial(made["scores"], made["ids"], values, **options)
    tail_keys, tail_values = made["tail"]
    mask = torch.arange(tail_keys.shape[2]) <= made["places"][:, :, None]
    of_batch = queries.transpose(0, 1).reshape(BATCH, N_KV, -1, DIM)
    tail = dense_partial(of_batch, tail_keys, tail_values, mask=mask.repeat(1, group, 1)[:, None], **options)
    tail = type(tail)(*(t.transpose(0, 1).reshape(N_KV, len(rows[0]), *t.shape[3:]) for t in tail))
    whole = merge([static, gathered, tail])
    expected = whole.out.reshape(N_KV, BATCH, group, q_tokens, DIM).permute(1, 3, 0, 2, 4).flatten(2, 3)
    lse = whole.lse.reshape(N_KV, BATCH, group, q_tokens)
    for b, count in enumerate(made["counts"].tolist()):
        torch.testing.assert_close(found[b, :count], expected[b, :count], atol=1e-5, rtol=1e-4)
        assert (found[b, count:] == 0).all()
        seen = torch.zeros(N_KEYS)
        for head in range(N_KV):
            for g in range(group):
                row = (b * group + g) * q_tokens + count - 1
                ids = made["ids"][head, row]
                ids = torch.cat([positions, ids[ids >= 0]])
                products = 0.3 * made["keys"][head, ids].float() @ rows[head, row]
                logits = products if softcap is None else softcap * torch.tanh(products / softcap)
                seen[ids] += (logits - lse[head, b, g, count - 1]).exp()
        torch.testing.assert_close(torch.from_numpy(mass[b]), seen, atol=1e-5, rtol=1e-4)


def test_threads_do_not_change_a_bit() -> None:
    made = case(torch.bfloat16, group=3, q_tokens=4, n_static=20, k=11)
    static = StaticSet.of(*(t[:, made["positions"]].float() for t in (made["keys"], made["values"])), made["positions"])
    results = []
    for threads in (1, 2, 3):
        mass = np.zeros((BATCH, N_KEYS), np.float32)
        found = attend_sets(
            made["queries"], static, (made["scores"], made["ids"]), made["values"], made["tail"], made["places"],
            made["counts"], scaling=0.3, softcap=None, mass=mass, threads=threads,
        )  # fmt: skip
        results.append((found, torch.from_numpy(mass)))
    for found, mass in results[1:]:
        assert torch.equal(found, results[0][0])
        assert torch.equal(mass, results[0][1])
