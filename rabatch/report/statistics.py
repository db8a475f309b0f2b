"""What a job did, in memory that does not grow with it: counts, series over time, distributions, kinds of failures."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

MAX_BINS = 128
MAX_KINDS = 50
OTHER = "other reasons"
_PER_DECADE = 20
_LEAST = 1e-4
_SHARES = 200
_EXAMPLE_CHARS = 120
_KIND_CHARS = 160
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"")


class Series:
    """Amounts over time, in bins of equal width. When time outgrows them, neighbours are joined."""

    def __init__(self) -> None:
        self.width_s = 1.0
        self._bins: list[float] = []

    def add(self, at_s: float, amount: float) -> None:
        """Enter an amount at a time, in seconds since the beginning; times need not be in order."""
        at_s = max(0.0, at_s)
        while at_s >= MAX_BINS * self.width_s:
            self._bins = _joined(self._bins)
            self.width_s *= 2
        number = int(at_s / self.width_s)
        self._bins += [0.0] * (number + 1 - len(self._bins))
        self._bins[number] += amount

    @property
    def total(self) -> float:
        return sum(self._bins)

    def rates(self, until_s: float, *, bins: int) -> list[tuple[float, float, float]]:
        """`(from, to, amount per second)` of at most `bins` bins, the last one up to `until_s`."""
        width, sums = self.width_s, list(self._bins)
        until_s = max(until_s, (len(sums) - 1) * width + 1e-9) if sums else until_s
        while math.ceil(until_s / width) > max(1, bins):
            sums, width = _joined(sums), 2 * width
        sums += [0.0] * (math.ceil(until_s / width) - len(sums))
        ends = [min((number + 1) * width, until_s) for number in range(len(sums))]
        return [
            (n * width, end, amount / (end - n * width)) for n, (end, amount) in enumerate(zip(ends, sums, strict=True))
        ]


def _joined(bins: list[float]) -> list[float]:
    return [sum(bins[start : start + 2]) for start in range(0, len(bins), 2)]


@dataclass
class Distribution:
    """Values in bins: of 0.005 from 0 to 1, or, if `logarithmic`, twenty a decade from 0.0001 on.

    Count, mean, least and greatest are exact; a quantile is right to the width of a bin.
    """

    logarithmic: bool
    count: int = 0
    total: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf
    _bins: Counter[int] = field(default_factory=Counter)

    def add(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.least, self.greatest = min(self.least, value), max(self.greatest, value)
        self._bins[self._bin(value)] += 1

    def _bin(self, value: float) -> int:
        if self.logarithmic:
            return math.floor(_PER_DECADE * math.log10(max(value, _LEAST) / _LEAST))
        return min(_SHARES - 1, max(0, math.floor(_SHARES * value)))

    def _edge(self, number: int) -> float:
        return _LEAST * 10 ** (number / _PER_DECADE) if self.logarithmic else number / _SHARES

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    def quantile(self, share: float) -> float:
        """The value below which a share of all lie; NaN without any."""
        seen, wanted = 0, share * self.count
        for number in sorted(self._bins):
            seen += self._bins[number]
            if seen >= wanted:
                middle = (self._edge(number) + self._edge(number + 1)) / 2
                return min(self.greatest, max(self.least, middle))
        return math.nan

    def bars(self, *, bins: int) -> list[tuple[float, float, int]]:
        """`(from, to, count)` of at most about `bins` neighbouring bins that hold all values."""
        if not self._bins:
            return []
        first, last = min(self._bins), max(self._bins) + 1
        step = max(1, math.ceil((last - first) / bins))
        return [
            (self._edge(start), self._edge(start + step), sum(self._bins[n] for n in range(start, start + step)))
            for start in range(first, last, step)
        ]


class Failures:
    """Failed rows by kind of reason. Of each kind the first row is kept by name, cut to a hundred characters."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, reason: str, example: str) -> str:
        """Enter a failed row; its kind."""
        kind = kind_of(reason)
        if kind not in self.counts and len(self.counts) >= MAX_KINDS:
            kind = OTHER
        self.counts[kind] += 1
        self.examples.setdefault(kind, example[:_EXAMPLE_CHARS])
        return kind


def kind_of(reason: str) -> str:
    """A reason without what differs from row to row: quoted values and numbers."""
    plain = re.sub(r"\d+", "N", _QUOTED.sub("…", " ".join(reason.split())))
    return plain if len(plain) <= _KIND_CHARS else plain[: _KIND_CHARS - 1] + "…"


@dataclass
class Phase:
    """One phase of a run: ``build`` or ``answer``.

    Attributes:
        name: What it is called.
        unit: What `rows` counts: ``documents`` or ``answers``.
        token_kind: What `tokens` counts: of contexts built, or of answers generated.
        counts: Rows by status; what an earlier run has finished is ``skipped`` or ``reused``.
        unfinished: Rows that the phase ended without.
        rows, tokens: Over time, in seconds since the phase began. Empty where times are not known.
        seconds: Work by kind (prefill, graph, write; answer), summed over all workers.
        latency, attended, recall: Of answers; empty for a build. `attended` and `recall` are shares.
        elapsed_s: Wall time of the phase; 0 where it is not known.
    """

    name: str
    unit: str
    token_kind: str
    counts: Counter[str] = field(default_factory=Counter)
    unfinished: int = 0
    n_tokens: int = 0
    stored_bytes: int = 0
    rows: Series = field(default_factory=Series)
    tokens: Series = field(default_factory=Series)
    seconds: Counter[str] = field(default_factory=Counter)
    latency: Distribution = field(default_factory=lambda: Distribution(logarithmic=True))
    attended: Distribution = field(default_factory=lambda: Distribution(logarithmic=False))
    recall: Distribution = field(default_factory=lambda: Distribution(logarithmic=False))
    failures: Failures = field(default_factory=Failures)
    fingerprints: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0

    def finish(
        self,
        status: str,
        fingerprint: str | None,
        *,
        tokens: int,
        seconds: Mapping[str, float],
        at_s: float | None = None,
    ) -> None:
        """Enter a row that has ended well.

        Args:
            seconds: Of work, by kind.
            at_s: When, in seconds since the phase began; None: not known.
        """
        self.counts[status] += 1
        self.n_tokens += tokens
        self.seconds.update(seconds)  # type: ignore[arg-type]
        if fingerprint and (fingerprint in self.fingerprints or len(self.fingerprints) < MAX_KINDS):
            self.fingerprints[fingerprint] += 1
        if at_s is not None:
            self.rows.add(at_s, 1)
            self.tokens.add(at_s, tokens)
