"""What a pipeline will take, by recipe: seconds of each phase, and from how many questions on which recipe is cheapest.

A roofline: a step of decoding takes the memory traffic at the rate that memory gives, or the arithmetic at the
machine's rate, whichever is more. Where earlier answers were timed, their seconds take the place of the roofline's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rabatch.config import BuildConfig, Recipe
from rabatch.flops import ModelWork
from rabatch.storage.codecs import code_width
from rabatch.traits import Method

METHODS: tuple[Method, ...] = ("dense", "flat", "graph", "scan")
"""What is compared. `streaming` answers another question, and `auto` is one of these."""
NO_STORE = "prefill"
"""The alternative to all of them: the document is prefilled again for every question, and attended by all."""
_VISITED_PER_CANDIDATE = 12
"""Keys that a graph search scores, per candidate it keeps: 1.8 % of 128K keys with 200 (docs/indexes.md)."""
_MOST_QUESTIONS = 10**6
_SUM_BYTES = 4  # sums of zones are float32


@dataclass(frozen=True)
class Rates:
    """Throughput of one actor of those that will do the work; None: not known.

    Args:
        prefill_flops_per_s: Operations of a model actor.
        index_keys_per_s: Keys for which graph or codes are made, over layers and KV heads, by index kind.
        write_bytes_per_s, read_bytes_per_s: To and from the store.
        decode_bytes_per_s: Memory traffic of decoding.
        decode_flops_per_s: Operations of decoding; None: as of prefill, on the same machines.
        measured_over_modelled: Seconds per token of earlier answers, as a multiple of the roofline's, by method.
        sources: Where each came from, for people, by name.
    """

    prefill_flops_per_s: float | None = None
    index_keys_per_s: dict[str, float] = field(default_factory=dict)
    write_bytes_per_s: float | None = None
    read_bytes_per_s: float | None = None
    decode_bytes_per_s: float | None = None
    decode_flops_per_s: float | None = None
    measured_over_modelled: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def decoding_flops_per_s(self) -> float | None:
        """Of decoding, whether given or taken from prefill."""
        return self.decode_flops_per_s or self.prefill_flops_per_s


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded.

    Args:
        weight_bytes: Of one weight of the model.
        kv_bytes: Of one number of a key or value where none is encoded.
        question_tokens, answer_tokens: Of one question, on average.
        questions_per_batch: Questions decoded together at most.
    """

    work: ModelWork
    build: BuildConfig
    recipe: Recipe
    weight_bytes: int
    kv_bytes: int
    question_tokens: float
    answer_tokens: float
    questions_per_batch: int

    def token_bytes(self, method: Method, n_tokens: float, together: int) -> float:
        """Memory traffic of one token of one of the questions decoded together."""
        shape, build, recipe = self.work.geometry, self.build, self.recipe
        weights = (self.work.token_weights + self.work.output_weights) * self.weight_bytes / together
        row = 2 * shape.head_dim * self.kv_bytes
        static = min(n_tokens, build.sink_tokens + build.window_tokens)
        indexed = n_tokens - static
        group = shape.n_query_heads // shape.n_kv_heads
        key, value = self._row_bytes()
        found = group * min(recipe.top_k, indexed) * (key + value)
        zones = 0.0
        if build.zone_tokens and recipe.estimate is not False:
            zones = indexed / build.zone_tokens * 2 * shape.head_dim * _SUM_BYTES / together
        if method == "graph":
            indexed_bytes = group * self._visited(indexed) * key + found + zones
        elif method == "scan":
            scored = self._candidates("scan", indexed) * key
            indexed_bytes = group * (indexed * shape.head_dim / 4 + scored) + found + zones
        elif method == "flat":
            indexed_bytes = indexed * key / together + found
        else:
            indexed_bytes = indexed * (key + value) / together
        own = sum(min(n_tokens, window) * row for window in self.work.windows if window) / together
        static_heads, index_heads = self._full_heads()
        heads = static_heads * static * row / together + index_heads * indexed_bytes
        return weights + shape.n_kv_heads * own + heads

    def _row_bytes(self) -> tuple[int, int]:
        """Of a key and of a value of the index, as they are held; keys in groups are decoded when they are opened."""
        dim, build = self.work.geometry.head_dim, self.build
        key = code_width("int8", "key", dim) if build.key_codec == "int8" else dim * self.kv_bytes
        plain = build.value_codec == "none"
        return key, dim * self.kv_bytes if plain else code_width(build.value_codec, "value", dim)

    def _full_heads(self) -> tuple[int, int]:
        """KV heads of all layers with full attention, and how many of them keep the whole context."""
        full = [layer for layer, window in enumerate(self.work.windows) if not window]
        every = len(full) * self.work.geometry.n_kv_heads
        streaming = ({*self.build.streaming_heads(layer), *self.recipe.streaming_heads(layer)} for layer in full)
        return every, every - sum(map(len, streaming))

    def _candidates(self, method: Method, indexed: float) -> float:
        """Of a search by the method that is reckoned."""
        return min(indexed, dataclasses.replace(self.recipe, method=method).candidates(round(indexed)))

    def _visited(self, indexed: float) -> float:
        """Keys that a graph search scores."""
        return min(indexed, _VISITED_PER_CANDIDATE * self._candidates("graph", indexed))

    def token_flops(self, method: Method, n_tokens: float) -> float:
        """Arithmetic of one token: the weights, and the keys that it attends."""
        shape, recipe = self.work.geometry, self.recipe
        static = min(n_tokens, self.build.sink_tokens + self.build.window_tokens)
        indexed = n_tokens - static
        found = static + min(recipe.top_k, indexed)
        # A key that is scored and not attended costs half of one that is. Sums of codes are traffic, above.
        scored = {"flat": indexed, "graph": self._visited(indexed), "scan": self._candidates("scan", indexed)}
        attended = n_tokens if method == "dense" else found + scored[method] / 2
        every, kept = self._full_heads()
        own = sum(min(n_tokens, window) for window in self.work.windows if window) * shape.n_kv_heads
        pairs = own + kept * attended + (every - kept) * static
        group = shape.n_query_heads // shape.n_kv_heads
        weights = self.work.token_weights + self.work.output_weights
        return 2 * weights + 4 * shape.head_dim * group * pairs

    def token_seconds(self, method: Method, n_tokens: float, together: int, rates: Rates) -> float | None:
        """By the roofline; None without its rates."""
        if rates.decode_bytes_per_s is None:
            return None
        seconds = self.token_bytes(method, n_tokens, together) / rates.decode_bytes_per_s
        if rates.decoding_flops_per_s is not None:
            seconds = max(seconds, self.token_flops(method, n_tokens) / rates.decoding_flops_per_s)
        return seconds

    def question_seconds(self, method: Method, n_tokens: float, questions: float, rates: Rates) -> float | None:
        """Of one of so many questions about a document."""
        together = max(1, min(round(questions), self.questions_per_batch))
        seconds = self.token_seconds(method, n_tokens, together, rates)
        if seconds is None:
            return None
        seconds *= rates.measured_over_modelled.get(method, 1.0)
        asked = 0.0
        if rates.decoding_flops_per_s is not None:  # a question goes through the model at once, like a chunk
            asked = 2 * self.work.token_weights * self.question_tokens / rates.decoding_flops_per_s
        return asked + self.answer_tokens * seconds


@dataclass(frozen=True)
class Choice:
    """The cheapest way for a range of questions per document; `last` None: for all more, as far as was looked."""

    recipe: str
    first: int
    last: int | None


def choices(cost: Callable[[str, int], float], options: tuple[str, ...]) -> list[Choice]:
    """Which of `options` is cheapest for how many questions per document, from 1 to a million.

    Between the numbers that are tried, about a tenth apart, the change is found by halving.

    Args:
        cost: Of an option for so many questions about one document; infinite where not known.
    """

    def best(questions: int) -> str:
        return min(options, key=lambda option: cost(option, questions))

    found: list[Choice] = []
    first, recipe, before = 1, best(1), 1
    for questions in _tried():
        while best(questions) != recipe:
            low, high = before, questions
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if best(middle) == recipe else (low, middle)
            found.append(Choice(recipe, first, low))
            first, recipe, before = high, best(high), high
        before = questions
    return [*found, Choice(recipe, first, None)]


def _tried() -> Iterator[int]:
    questions = 1.0
    while questions <= _MOST_QUESTIONS:
        yield math.ceil(questions)
        questions = max(questions + 1, questions * 1.1)
