"""Which KV heads keep the whole context, and which only its static set (DuoAttention, arXiv 2410.10819).

A gate in [0, 1] per layer and KV head says how much a head needs the middle of a context. They are published as a
folder with ``full_attention_heads.tsv``, rows layers and columns KV heads, and ``config.json``, how they were made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rabatch.errors import ConfigError

GATES_FILE = "full_attention_heads.tsv"
CONFIG_FILE = "config.json"
DEMO = "demo"
"""Names the gates that come with the demo model."""
_TIES = 1e-6  # equal gates are told apart by less than this, as published

Pattern = tuple[tuple[bool, ...], ...]
"""By layer and KV head, whether the head keeps the whole context."""


def read_gates(folder: str | Path) -> tuple[NDArray[np.float64], dict[str, Any]]:
    """Gates of a published pattern.

    Args:
        folder: Holds ``full_attention_heads.tsv`` and ``config.json``; ``"demo"``: those of the demo model.

    Returns:
        [n_layers, n_kv_heads], clipped to [0, 1], and what config.json says: ``sink_size`` and ``recent_size`` of the
        static set that the gates were learned with, among others; ``sliding_layers``, which have no gates, if it was
        written by `rabatch calibrate`.

    Raises:
        ConfigError: A file is missing, or is not of this form.
    """
    place = Path(__file__).parent / "demo" / "head_pattern" if folder == DEMO else Path(folder)
    try:
        about = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))
        lines = (place / GATES_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        fix = f"must be a folder with {GATES_FILE} and {CONFIG_FILE} ({type(error).__name__}: {error})"
        raise ConfigError("head_pattern", str(folder), fix) from error
    try:
        rows = [[float(cell) for cell in line.split("\t")] for line in lines if line.strip()]
    except ValueError as error:
        raise ConfigError(
            "head_pattern", str(place / GATES_FILE), f"must hold numbers between tabs: {error}"
        ) from error
    if not isinstance(about, dict):
        raise ConfigError("head_pattern", str(place / CONFIG_FILE), "must be a JSON object")
    return checked_gates(rows), about


def write_gates(
    folder: str | Path,
    gates: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    sink_tokens: int,
    window_tokens: int,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write gates in the published form, so that `read_gates` gives them back to the bit.

    Args:
        gates: [n_layers, n_kv_heads], in [0, 1].
        sink_tokens, window_tokens: The static set they were learned with.
        about: What else config.json is to say.

    Raises:
        ConfigError: The gates are not of this form.
    """
    made = checked_gates(gates)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(f"{gate:.18e}" for gate in row) + "\n" for row in made)
    values = {**(about or {}), "sink_size": sink_tokens, "recent_size": window_tokens}
    (place / CONFIG_FILE).write_text(json.dumps(values) + "\n", encoding="utf-8")
    (place / GATES_FILE).write_text(text, encoding="utf-8")


def checked_gates(gates: Any) -> NDArray[np.float64]:
    """Gates as an array, clipped to [0, 1]: learned ones may lie a little outside.

    Raises:
        ConfigError: They are no rows of finite numbers, all of one length.
    """
    try:
        made = np.array(gates, np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigError("head_pattern", gates, f"must be a row of gates per layer ({error})") from error
    if made.ndim != 2 or not made.size or not np.isfinite(made).all():
        fix = "must be a row of finite gates per layer, one for each KV head"
        raise ConfigError("head_pattern", gates, fix)
    return made.clip(0, 1)


def resolve(
    gates: NDArray[np.float64],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
    without: Collection[int] = (),
    seed: int = 0,
) -> Pattern:
    """Which heads keep the whole context.

    With a threshold, those whose gate is at least that. With a sparsity, those whose gate is at least that quantile of
    all gates, so that about this share streams: all at 1, none at 0. For this, equal gates are told apart by random
    numbers below 1e-6, as published, but by the layer first: the fewer layers have heads of both kinds, the fewer calls
    a decode step takes. Drawn from `seed`, so that a pattern comes out the same again.

    Args:
        without: Layers that have no gates, as they keep a sliding window of their own: they count for no share.

    Raises:
        ConfigError: Not one of both, or it is no share.
    """
    if (sparsity is None) == (threshold is None):
        fix = "give one of both: a sparsity (share of the heads that stream) or a threshold on the gates"
        raise ConfigError("head_sparsity, head_threshold", (sparsity, threshold), fix)
    if threshold is not None:
        return _rows(gates >= _share("head_threshold", threshold))
    sparsity = _share("head_sparsity", sparsity)
    if sparsity in (0, 1):
        return _rows(np.full(gates.shape, sparsity == 0))
    random = np.random.default_rng(seed)
    of_layer, of_head = random.uniform(0, _TIES, (len(gates), 1)), random.uniform(0, _TIES / 1000, gates.shape)
    apart = gates + of_layer + of_head
    counted = np.delete(apart, sorted(without), 0)
    return _rows(apart >= np.quantile(counted if counted.size else apart, sparsity))


def pattern_of(source: Any, *, sparsity: float | None = None, threshold: float | None = None) -> Pattern:
    """The pattern in a folder of published gates, or given as rows of gates, or as rows of true and false.

    Args:
        source: A path, or a row per layer.
        sparsity, threshold: As of `resolve`. None of both: every gate must be 0 or 1, or true or false.

    Raises:
        ConfigError: It is none of these.
    """
    gates, about = read_gates(source) if isinstance(source, str | Path) else (checked_gates(source), {})
    if sparsity is not None or threshold is not None:
        without = about.get("sliding_layers", [])
        if not (isinstance(without, list) and all(type(n) is int and 0 <= n < len(gates) for n in without)):
            raise ConfigError("head_pattern", f"{source}/{CONFIG_FILE}", "sliding_layers must be numbers of layers")
        return resolve(gates, sparsity=sparsity, threshold=threshold, without=without)
    if not np.isin(gates, (0, 1)).all():
        fix = (
            "holds gates between 0 and 1; give a sparsity (share of the heads that stream) or a threshold on the gates"
        )
        raise ConfigError("head_pattern", str(source), fix)
    return _rows(gates == 1)


def check_shape(pattern: Pattern, *, n_layers: int, n_kv_heads: int) -> None:
    """Raise ConfigError unless a pattern is one for a model of this shape."""
    shape = (len(pattern), len(pattern[0]))
    if shape != (n_layers, n_kv_heads):
        fix = f"the pattern has {shape[0]} layers of {shape[1]} KV heads, the model {n_layers} layers of {n_kv_heads}; "
        raise ConfigError("head_pattern", shape, fix + "take one that was made for this model")


def _share(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1 or math.isnan(value):
        raise ConfigError(field, value, "must be a number in [0, 1]")
    return float(value)


def _rows(kept: NDArray[np.bool_]) -> Pattern:
    return tuple(tuple(bool(head) for head in row) for row in kept)
