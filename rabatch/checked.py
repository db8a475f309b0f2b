"""What all settings can: to a dict and back, range checks, head patterns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Self, cast

from rabatch.errors import ConfigError


class Checked:
    """`to_dict`, `from_dict` that rejects unknown fields, and small range checks."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """What `to_dict` gave; raises ConfigError for an unknown field."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise ConfigError(
                    name, values[name], f"unknown field of {cls.__name__}; known: {', '.join(sorted(known))}"
                )
        return cls(**values)

    def at_least(self, low: float, *names: str) -> None:
        """Raise ConfigError unless these fields are numbers from `low` on."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < low:
                raise ConfigError(name, value, f"must be a number >= {low}")

    def one_of(self, name: str, choices: tuple[str, ...]) -> None:
        """Raise ConfigError unless the field is one of these."""
        if getattr(self, name) not in choices:
            raise ConfigError(name, getattr(self, name), f"must be one of {', '.join(choices)}")


class WithHeads(Checked):
    """Settings with a head pattern: `head_pattern`, `head_sparsity`, `head_threshold`."""

    head_pattern: str | os.PathLike[str] | Sequence[Sequence[float | bool]] | None

    def streaming_heads(self, layer: int) -> tuple[int, ...]:
        """Numbers of the KV heads of a layer that keep only the static set."""
        rows = cast("Sequence[Sequence[bool]] | None", self.head_pattern)
        return () if rows is None else tuple(head for head, kept in enumerate(rows[layer]) if not kept)

    def resolve_heads(self) -> None:
        """Make true and false of gates; raises ConfigError if that is not said how."""
        if self.head_pattern is None:
            for name in ("head_sparsity", "head_threshold"):
                if getattr(self, name) is not None:
                    raise ConfigError(name, getattr(self, name), "needs a head_pattern with gates")
            return
        from rabatch.head_pattern import pattern_of

        source = os.fspath(self.head_pattern) if isinstance(self.head_pattern, os.PathLike) else self.head_pattern
        sparsity, threshold = (getattr(self, name) for name in ("head_sparsity", "head_threshold"))
        pattern = pattern_of(source, sparsity=sparsity, threshold=threshold)
        for name, value in (("head_pattern", pattern), ("head_sparsity", None), ("head_threshold", None)):
            object.__setattr__(self, name, value)

    def fields_but_heads(self) -> dict[str, Any]:
        """`to_dict`, with a head pattern only if a head streams: without one all is as without a pattern."""
        fields = self.to_dict()
        rows = cast("Sequence[Sequence[bool]] | None", fields.pop("head_pattern"))
        del fields["head_sparsity"], fields["head_threshold"]
        if rows is not None and not all(map(all, rows)):
            fields["head_pattern"] = [list(row) for row in rows]
        return fields
