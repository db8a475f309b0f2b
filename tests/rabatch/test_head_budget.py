"""How many keys each head retrieves, and what becomes of a profile."""

from __future__ import annotations

import numpy as np
import pytest

from rabatch.budgets import head_budget
from rabatch.config import Recipe
from rabatch.errors import ConfigError, FingerprintError
from rabatch.index.profile import GRID

AT = {"n_keys": 5000, "layer": 0, "full_layers": [0, 1, 2, 3, 4]}


def profile(static: float, **held: float) -> np.ndarray:
    """Shares that rise to the given ones at the numbers of keys named k8, k100, ..., and stay there."""
    numbers = sorted((int(name[1:]), share) for name, share in held.items())
    shares = [static, *(max([static, *(share for n, share in numbers if n <= grid)]) for grid in GRID)]
    return np.array(shares, np.float32)


def of(recipe: Recipe, *profiles: np.ndarray, **options: object) -> list[int]:
    rows = np.stack(profiles) if profiles else None
    found = head_budget(recipe, rows, n_kv_heads=len(profiles) or 2, **{**AT, **options})  # type: ignore[arg-type]
    return found.tolist()


def test_a_head_gets_what_holds_its_mass() -> None:
    concentrated = profile(0.1, k8=0.985, k16=0.99, k100=0.995)
    broad = profile(0.1, k8=0.3, k64=0.7, k100=0.9, k2048=0.99)
    assert of(Recipe(budget="profile", mass=0.98), concentrated, broad) == [8, 100]
    assert of(Recipe(budget="profile", mass=0.9999), concentrated, broad) == [100, 100]
    assert of(Recipe(budget="profile", mass=0.98, top_k=40), concentrated, broad) == [8, 40]


def test_a_head_that_no_top_k_helps_is_not_searched_but_one_at_rest_is() -> None:
    diffuse = profile(0.08, k100=0.1, k2048=0.4)
    at_rest = profile(0.99, k8=0.995, k100=0.999)  # attends the static set now; what it retrieves is concentrated
    assert of(Recipe(budget="profile"), diffuse, at_rest) == [0, 100]
    assert of(Recipe(budget="profile", mass=0.5), diffuse, at_rest) == [0, 8]


def test_auto_is_the_profile_where_there_is_one() -> None:
    concentrated = profile(0.1, k8=0.99)
    assert of(Recipe(), concentrated) == [8]
    assert of(Recipe()) == [100, 100]
    with pytest.raises(FingerprintError, match="no profile"):
        of(Recipe(budget="profile"))


def test_full_budget_is_full_whatever_the_profile() -> None:
    assert of(Recipe(top_k=5000), profile(0.08, k100=0.1)) == [5000]


def test_the_pyramid_falls_and_keeps_the_mean() -> None:
    budgets = [of(Recipe(budget="pyramid"), layer=layer)[0] for layer in range(5)]
    assert budgets == sorted(budgets, reverse=True)
    assert np.mean(budgets) == pytest.approx(100, abs=1)
    assert (budgets[0], budgets[-1]) == (195, 5)
    assert of(Recipe(budget="pyramid"), full_layers=[0]) == [100, 100]


@pytest.mark.parametrize(
    ("field", "value"),
    [("mass", 0), ("mass", 1.5), ("mass", True), ("mass", "x"), ("budget", "most"), ("estimate", "yes"),
     ("tail_tokens", 0), ("question_attention", "none"), ("method", "best")],
)  # fmt: skip
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Recipe(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "n_keys", "search_list", "candidates"),
    [
        ("graph", 1000, 0, 200),
        ("graph", 1 << 17, 0, 200),
        ("scan", 1000, 0, 400),
        ("scan", 1 << 15, 0, 400),
        ("scan", 1 << 17, 0, 800),
        ("scan", 1 << 17, 300, 300),
        ("graph", 1000, 50, 100),
    ],
)
def test_candidates_of_a_search(method, n_keys, search_list, candidates):
    assert Recipe(method=method, top_k=100, search_list=search_list).candidates(n_keys) == candidates


def test_methods_that_are_compared_with_have_fixed_budgets_or_the_pyramid() -> None:
    concentrated = profile(0.1, k8=0.99)
    for method in ("ivf", "quest", "snapkv", "h2o", "infinigen"):
        for budget in ("auto", "profile", "mass", "fixed"):
            recipe = Recipe(method=method, budget=budget, top_k=96)  # type: ignore[arg-type]
            assert of(recipe, concentrated) == [96]
    falling = [of(Recipe(method="pyramidkv"), layer=layer)[0] for layer in range(5)]
    assert falling == [of(Recipe(budget="pyramid"), layer=layer)[0] for layer in range(5)]
    assert falling == [of(Recipe(method="snapkv", budget="pyramid"), layer=layer)[0] for layer in range(5)]


def test_quest_takes_whole_pages() -> None:
    assert of(Recipe(method="quest", top_k=20)) == [32, 32]
    assert of(Recipe(method="quest", top_k=32)) == [32, 32]
