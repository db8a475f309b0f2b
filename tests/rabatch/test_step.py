"""Attention over static set, zones, found keys and tail: torch against key by key, and compiled against torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rabatch.attention.sets import Attended, Found, StaticSet, Zones, attend_sets
from rabatch.attention.step import attend_compiled

N_KV, BATCH, DIM, N_KEYS, N_STATIC = 2, 3, 24, 90, 22
FIRST = 10  # keys 10 .. 77 are in the index, the others static
INDEXED = N_KEYS - N_STATIC
SHAPES = [(3, 1, 7), (1, 1, 1), (4, 5, 20), (7, 2, 0), (2, 3, INDEXED)]  # group, q_tokens, k


def case(
    dtype: torch.dtype, *, group: int, q_tokens: int, k: int, n_zones: int = 0, begins: bool = False, seed: int = 0
) -> dict[str, Any]:
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make)

    keys, values = (normal(N_KV, N_KEYS, DIM).to(dtype) for _ in range(2))
    of_index = torch.arange(FIRST, FIRST + INDEXED)
    positions = torch.tensor([p for p in range(N_KEYS) if p not in of_index])
    queries = normal(N_KV, BATCH, group, q_tokens, DIM)
    counts = torch.tensor([q_tokens, max(1, q_tokens - 2), max(1, q_tokens - 1)])
    places = torch.tensor([4, 9, 6])[:, None] + torch.arange(q_tokens)
    tail = tuple(normal(BATCH, N_KV, int(places.max()) + 1, DIM) for _ in range(2))
    rows = queries.reshape(N_KV, -1, DIM)
    products = rows @ keys.float().transpose(1, 2)
    order = products[..., of_index].argsort(-1, descending=True)[..., :k]
    ids = of_index[order]
    scores = products.gather(2, ids)
    if 2 < k < INDEXED:
        ids[..., -1], scores[..., -1] = -1, -torch.inf  # an index may find less
    made = {
        "queries": queries, "keys": keys, "values": values, "positions": positions, "ids": ids, "scores": scores,
        "counts": counts, "places": places, "tail": tail, "begins": torch.zeros(BATCH, dtype=torch.long), "zones": None,
    }  # fmt: skip
    static_keys, static_values = (t[:, positions].float() for t in (keys, values))
    if n_zones:
        of_key = torch.randint(0, n_zones, (N_KV, INDEXED), generator=make, dtype=torch.int32)
        of_key[:, :n_zones] = torch.arange(n_zones)
        one_hot = torch.nn.functional.one_hot(of_key.long(), n_zones).float()
        zone_counts = one_hot.sum(1)
        means = [one_hot.transpose(1, 2) @ t[:, of_index].float() / zone_counts[..., None] for t in (keys, values)]
        made["zones"] = Zones(of_key, zone_counts, FIRST)
        static_keys, static_values = (torch.cat(pair, 1) for pair in zip((static_keys, static_values), means))  # noqa: B905
    made["static"] = StaticSet(static_keys, static_values, positions, made["zones"])
    if begins:  # the first tokens of a tail are found keys for some rows
        made["begins"] = torch.tensor([3, 0, 2])
        of_batch = tail[0].transpose(0, 1)[:, :, None, None].expand(-1, -1, group, q_tokens, -1, -1)
        extra = torch.tensor([[0, 2], [-1, -1], [1, -1]])[None, :, None, None].expand(N_KV, -1, group, q_tokens, -1)
        own = torch.einsum("hbgtd,hbgtnd->hbgtn", queries, of_batch).gather(4, extra.clamp_min(0))
        own = own.masked_fill(extra < 0, -torch.inf)
        all_ids = torch.cat([torch.where(extra < 0, -1, extra + N_KEYS).flatten(1, 3), ids], -1)
        all_scores = torch.cat([own.flatten(1, 3), scores], -1)
        made["scores"], best = all_scores.sort(-1, descending=True)
        made["ids"] = all_ids.gather(2, best)
    return made


def run(attend: Any, made: dict[str, Any], *, goal: float = 1.0, **options: Any) -> tuple[Attended, np.ndarray]:
    mass = np.zeros((BATCH, N_KEYS), np.float32)
    found = attend(
        made["queries"], made["static"], lambda: Found(made["scores"], made["ids"]), made["values"], made["tail"],
        made["begins"], made["places"], made["counts"], scaling=0.3, goal=goal, mass=mass,
        **{"softcap": None, **options},
    )  # fmt: skip
    return found, mass


def one_row(made: dict[str, Any], h: int, b: int, g: int, t: int, softcap: float | None, goal: float) -> tuple:
    """Output, attended keys, share and weights of one query, key by key."""
    query = made["queries"][h, b, g, t].double()

    def weight(key: torch.Tensor) -> float:
        x = 0.3 * float(query @ key.double())
        return float(np.exp(x if softcap is None else softcap * np.tanh(x / softcap)))

    row = (b * made["queries"].shape[2] + g) * made["queries"].shape[3] + t
    found = [int(i) for i in made["ids"][h, row] if i >= 0]
    own = {j: weight(made["tail"][0][b, h, j]) for j in range(int(made["begins"][b]), int(made["places"][b, t]) + 1)}
    sure = {int(p): weight(made["keys"][h, p]) for p in made["positions"]}
    best = {
        i: weight(made["keys"][h, i] if i < N_KEYS else made["tail"][0][b, h, i - N_KEYS])
        for i in found
    }  # fmt: skip

    def rest(without: list[int]) -> list[tuple[float, torch.Tensor]]:
        """Weight and mean value of every zone; the keys that are attended are out of it, at the mean's weight."""
        zones = made["zones"]
        if zones is None:
            return []
        parts = []
        for z in range(zones.counts.shape[1]):
            mean = weight(made["static"].keys[h, N_STATIC + z])
            members = [i for i in range(INDEXED) if zones.of_key[h, i] == z]
            left = [FIRST + i for i in members if FIRST + i not in without]
            value = sum((made["values"][h, i].double() for i in left), torch.zeros(DIM).double())
            parts.append((mean, len(left), value))
        return parts

    everything = sum(sure.values()) + sum(own.values()) + sum(best.values()) + sum(w * n for w, n, _ in rest(found))
    kept: list[int] = []
    for i in found:
        if goal < 1 and sum(sure.values()) + sum(own.values()) + sum(best[j] for j in kept) >= goal * everything:
            break
        kept.append(i)
    attended = sum(sure.values()) + sum(own.values()) + sum(best[j] for j in kept)
    zones = rest(kept)
    total = attended + sum(w * n for w, n, _ in zones)
    out = sum((w * value for w, _, value in zones), torch.zeros(DIM).double())
    for p, w in sure.items():
        out = out + w * made["values"][h, p].double()
    for j, w in own.items():
        out = out + w * made["tail"][1][b, h, j].double()
    for i in kept:
        out = out + best[i] * (made["values"][h, i] if i < N_KEYS else made["tail"][1][b, h, i - N_KEYS]).double()
    of_context = {i: best[i] / total for i in kept if i < N_KEYS} | {p: w / total for p, w in sure.items()}
    return out / total, len(of_context), attended / total, of_context


@pytest.mark.parametrize("goal", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("n_zones", [0, 5])
@pytest.mark.parametrize(("group", "q_tokens", "k"), SHAPES)
def test_every_key_counts_once(
    group: int, q_tokens: int, k: int, n_zones: int, softcap: float | None, goal: float
) -> None:
    made = case(torch.float32, group=group, q_tokens=q_tokens, k=k, n_zones=n_zones, begins=True)
    found, mass = run(attend_sets, made, softcap=softcap, goal=goal)
    for b, count in enumerate(made["counts"].tolist()):
        keys = share = 0.0
        seen = np.zeros(N_KEYS)
        for t in range(count):
            for h in range(N_KV):
                for g in range(group):
                    out, n, held, weights = one_row(made, h, b, g, t, softcap, goal)
                    torch.testing.assert_close(found.out[b, t, h * group + g].double(), out, atol=1e-5, rtol=1e-4)
                    keys, share = keys + n / (N_KV * group), share + held / (N_KV * group)
                    if t == count - 1:
                        for i, w in weights.items():
                            seen[i] += w
        assert (found.out[b, count:] == 0).all()
        np.testing.assert_allclose([found.keys[b], found.share[b]], [keys, share], rtol=1e-5)
        np.testing.assert_allclose(mass[b], seen, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize(
    ("n_zones", "goal", "begins"), [(0, 1.0, False), (6, 1.0, True), (6, 0.8, False), (0, 0.8, True)]
)
@pytest.mark.parametrize(("group", "q_tokens", "k"), SHAPES)
def test_compiled_is_torch(
    group: int,
    q_tokens: int,
    k: int,
    n_zones: int,
    goal: float,
    begins: bool,
    softcap: float | None,
    dtype: torch.dtype,
) -> None:
    made = case(dtype, group=group, q_tokens=q_tokens, k=k, n_zones=n_zones, begins=begins)
    expected, expected_mass = run(attend_sets, made, softcap=softcap, goal=goal)
    found, mass = run(attend_compiled, made, softcap=softcap, goal=goal)
    torch.testing.assert_close(found.out, expected.out, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(mass, expected_mass, atol=1e-5)
    np.testing.assert_allclose(found.keys, expected.keys)
    np.testing.assert_allclose(found.share, expected.share, rtol=1e-5)


def test_all_keys_found_is_dense_whatever_the_zones() -> None:
    made = case(torch.float32, group=2, q_tokens=2, k=INDEXED, n_zones=4)
    bare = case(torch.float32, group=2, q_tokens=2, k=INDEXED)
    for attend in (attend_sets, attend_compiled):
        estimated, plain = (run(attend, one)[0] for one in (made, bare))
        torch.testing.assert_close(estimated.out, plain.out, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(estimated.share, plain.share, rtol=1e-5)


def test_zones_bring_the_output_nearer_to_dense() -> None:
    dense = run(attend_sets, case(torch.float32, group=2, q_tokens=1, k=INDEXED))[0].out
    without = run(attend_sets, case(torch.float32, group=2, q_tokens=1, k=6))[0].out
    with_zones = run(attend_sets, case(torch.float32, group=2, q_tokens=1, k=6, n_zones=12))[0].out
    assert (with_zones - dense).norm() < 0.8 * (without - dense).norm()


def test_threads_do_not_change_a_bit() -> None:
    made = case(torch.bfloat16, group=3, q_tokens=4, k=11, n_zones=5, begins=True)
    results = [run(attend_compiled, made, threads=threads) for threads in (1, 2, 3)]
    for found, mass in results[1:]:
        assert torch.equal(found.out, results[0][0].out)
        assert np.array_equal(mass, results[0][1])
        assert np.array_equal(found.share, results[0][0].share)


@pytest.mark.parametrize("goal", [1.0, 0.8])
def test_more_rows_and_keys_than_a_block_holds(goal: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("N_KEYS", 400), ("N_STATIC", 300), ("INDEXED", 100)):
        monkeypatch.setitem(globals(), name, value)
    made = case(torch.bfloat16, group=5, q_tokens=23, k=9, n_zones=40, begins=True)
    expected, expected_mass = run(attend_sets, made, goal=goal)
    found, mass = run(attend_compiled, made, goal=goal, threads=2)
    torch.testing.assert_close(found.out, expected.out, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(mass, expected_mass, atol=1e-5)
    np.testing.assert_allclose(found.share, expected.share, rtol=1e-5)
