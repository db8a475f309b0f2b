"""How gates are learned: DuoAttention's settings, lengths by what the model takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rabatch.errors import ConfigError

_STEPS, _MAX_TOKENS = 2000, 32768
_DEMO = {"steps": 100, "max_tokens": 2048}
"""Enough for the eight gates of the demo model, in minutes without a card (docs/duoattention.md)."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """What decides the gates that a model is given.

    Args:
        steps: Of the optimiser, one sample each.
        min_tokens, max_tokens, lengths: Samples have one of so many lengths between these, evenly spaced.
        passkeys: Numbers to be found in a sample.
        sink_tokens, recent_tokens: What a streaming head sees while gates are learned: first tokens, and last before
            each query.
        learning_rate: At its highest: it rises over the first fifth of the steps and falls over the last.
        regularization: Weight of the gates' mean in the loss: how much a head must do to stay.
        seed: Of the samples.

    Raises:
        ConfigError: A value is out of range.
    """

    steps: int = _STEPS
    min_tokens: int = 1024
    max_tokens: int = _MAX_TOKENS
    lengths: int = 50
    passkeys: int = 10
    sink_tokens: int = 128
    recent_tokens: int = 256
    learning_rate: float = 0.02
    regularization: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"sink_tokens": 0, "seed": 0}
        for field in dataclasses.fields(self):
            value, low = getattr(self, field.name), least.get(field.name, 1)
            if field.type == "int" and (type(value) is not int or value < low):
                raise ConfigError(field.name, value, f"must be a whole number >= {low}")
            if field.type == "float" and (isinstance(value, bool) or not 0 < value < float("inf")):
                raise ConfigError(field.name, value, "must be a number above 0")
        static = self.sink_tokens + self.recent_tokens
        if self.min_tokens <= static:
            fix = f"must be above sink_tokens + recent_tokens = {static}, or streaming heads see all of a sample"
            raise ConfigError("min_tokens", self.min_tokens, fix)
        if self.max_tokens < self.min_tokens:
            raise ConfigError("max_tokens", self.max_tokens, f"must be at least min_tokens = {self.min_tokens}")

    @classmethod
    def for_model(cls, name: str, limit: int, **given: Any) -> Self:
        """The settings given (None: not given), the others by the model.

        Args:
            name: Of the model; the demo model has fewer steps and shorter samples.
            limit: The most tokens that it takes.

        Raises:
            ConfigError: As of the class, or the longest samples pass the limit.
        """
        defaults = {"max_tokens": min(_MAX_TOKENS, limit), **(_DEMO if name == "demo" else {})}
        made = cls(**{**defaults, **{key: value for key, value in given.items() if value is not None}})
        if made.max_tokens > limit:
            raise ConfigError("max_tokens", made.max_tokens, f"the model takes {limit} tokens at most")
        return made

    @property
    def token_counts(self) -> list[int]:
        """The lengths of samples, in tokens."""
        return [int(length) for length in np.linspace(self.min_tokens, self.max_tokens, self.lengths)]

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0; never below a tenth of the highest."""
        fifth = self.steps / 5
        share = min(1.0, max((step + 1) / fifth, 0.1), max((self.steps - step) / fifth, 0.1))
        return self.learning_rate * share

    def to_dict(self) -> dict[str, Any]:
        """All fields, by name."""
        return dataclasses.asdict(self)
