"""Typed, frozen settings. Every value is checked when the object is made; errors name the field and the fix.

Past 400 lines because most of them say what a field means, where a user looks for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rabatch.checked import Checked, WithHeads
from rabatch.errors import ConfigError
from rabatch.traits import COMPARED, METHODS, TRAITS, Method, Traits

DTYPES = ("float32", "bfloat16", "float16")
IndexKind = Literal["graph+scan", "graph", "scan", "none"]
INDEX_KINDS: tuple[IndexKind, ...] = ("graph+scan", "graph", "scan", "none")

Codec = Literal["none", "int8", "int4", "kivi2"]
CODECS: tuple[Codec, ...] = ("none", "int8", "int4", "kivi2")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """Which model, and how it is loaded.

    Args:
        name: Hub name or path of a Hugging Face causal language model; ``"demo"`` is the one in the package.
        revision: Hub revision (branch, tag or commit).
        device: ``"auto"`` (CUDA if there is a card), ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        dtype: Compute dtype; ``"auto"`` is float32 on a CPU and the checkpoint's own on CUDA.
        trust_remote_code: Run code that comes with the model. Off unless asked for.
        context_template: Text of the prompt around the document and question, with ``{document}`` and
            ``{question}`` once each, the document first. None: the demo's form inside the tokenizer's chat template.
    """

    name: str = "demo"
    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    context_template: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("model", self.name, "give a model name or path, or 'demo'")
        self.one_of("dtype", ("auto", *DTYPES))
        if not (self.device in ("auto", "cpu") or self.device.split(":")[0] == "cuda"):
            raise ConfigError("device", self.device, "must be auto, cpu, cuda or cuda:N")


@dataclass(frozen=True, kw_only=True)
class GraphConfig(Checked):
    """The attention-aware graph of one (layer, KV head).

    Args:
        degree: Links per key. Fewer: smaller index, lower recall.
        key_neighbors: How many of the links are nearest keys (the rest come from queries). 0 trusts the sampled
            queries alone, `degree` ignores them.
        entry_points: Where a search starts, at most (`rabatch.index.entries`). Fewer: keys unlike all others are missed
            where a text repeats itself.
    """

    degree: int = 32
    key_neighbors: int = 12
    entry_points: int = 256

    def __post_init__(self) -> None:
        self.at_least(4, "degree")
        self.at_least(0, "key_neighbors")
        self.at_least(1, "entry_points")
        if self.key_neighbors > self.degree - 2:
            raise ConfigError("key_neighbors", self.key_neighbors, f"must be <= degree - 2 = {self.degree - 2}")


@dataclass(frozen=True, kw_only=True)
class BuildConfig(WithHeads):
    """What is stored of a document: part of the fingerprint, so a change means a new index.

    Args:
        sink_tokens, window_tokens: The static set: first and last context tokens, attended by every query and
            kept out of the key index (RetrievalAttention, section 3: 128 + 512).
        index: ``"graph"``, ``"scan"`` (codes of 4 bits for every two dimensions), both, or ``"none"`` to store keys and
            values only (recipes dense, streaming and flat).
        graph: Parameters of the graph.
        query_share: Share of the context's query vectors, per query head, whose top-k keys are kept.
        query_top_k: How many keys per sampled query (N_q of RoarGraph).
        sample_vectors: How many of the sampled queries, per KV head and at most, are known by their vectors too: from
            them come the coordinates that graphs are made in. Rounded down to whole positions (a multiple of the
            query heads that share a KV head). 0: graphs are made of the keys as they are.
        zone_tokens: Keys per zone, about: what is not retrieved can be estimated from the sums of zones. Smaller: a
            little better, and more zones for every query to look at. 0: no zones are stored.
        key_mass: Whether the attention that the sampled queries give each key is summed and stored, for recipe ``h2o``.
        query_vectors: Whether the `sample_vectors` are stored too, for recipe ``vamana``; of a KV head at most as many
            as the context has tokens.
        prefill_chunk_tokens: Tokens per forward pass. Memory grows with it; results do not change beyond rounding,
            so it is not part of the fingerprint.
        kv_dtype: Stored dtype; ``"auto"`` is the checkpoint's.
        key_codec, value_codec: How keys and values of the index are encoded, the static set left as it is: ``"none"``,
            ``"int8"`` (a step per channel), ``"int4"`` and ``"kivi2"`` (4 and 2 bits in KIVI's groups of 32: keys of
            one channel, values of one token).
        head_pattern: Which KV heads keep the whole context; the others, streaming heads, keep the static set only
            (DuoAttention). A folder with gates in the published form, ``"demo"`` for those of the demo model, or a row
            per layer of gates, or of true and false. Read when the object is made, which then holds true and false.
            None: all heads do.
        head_sparsity, head_threshold: What makes true and false of gates (`rabatch.head_pattern.resolve`): the share
            of the heads that stream, those with the lowest gates; or the least gate that keeps the context. None once
            they are.
    """

    sink_tokens: int = 128
    window_tokens: int = 512
    index: IndexKind = "graph+scan"
    graph: GraphConfig = field(default_factory=GraphConfig)
    query_share: float = 0.25
    query_top_k: int = 32
    sample_vectors: int = 1024
    zone_tokens: int = 64
    key_mass: bool = False
    query_vectors: bool = False
    prefill_chunk_tokens: int = 2048
    kv_dtype: str = "auto"
    key_codec: Codec = "none"
    value_codec: Codec = "none"
    head_pattern: str | os.PathLike[str] | Sequence[Sequence[float | bool]] | None = None
    head_sparsity: float | None = None
    head_threshold: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.graph, dict):
            object.__setattr__(self, "graph", GraphConfig.from_dict(self.graph))
        self.resolve_heads()
        self.at_least(0, "sink_tokens", "sample_vectors", "zone_tokens")
        self.at_least(1, "window_tokens", "query_top_k", "prefill_chunk_tokens")
        self.one_of("index", INDEX_KINDS)
        self.one_of("kv_dtype", ("auto", *DTYPES))
        self.one_of("key_codec", CODECS)
        self.one_of("value_codec", CODECS)
        if self.key_mass and self.index == "none":
            raise ConfigError("key_mass", self.key_mass, "is of the queries sampled for an index; build with an index")
        if self.query_vectors and (self.index == "none" or not self.sample_vectors):
            fix = "are those sampled for an index; build with an index, and sample_vectors > 0"
            raise ConfigError("query_vectors", self.query_vectors, fix)
        if not 0 < self.query_share <= 1:
            raise ConfigError("query_share", self.query_share, "must be in (0, 1]")

    def builds(self, kind: str) -> bool:
        """Whether the index has a ``"graph"`` or ``"scan"``."""
        return kind in self.index.split("+")

    def stored_fields(self) -> dict[str, Any]:
        """The fields that change stored numbers."""
        fields = self.fields_but_heads()
        del fields["prefill_chunk_tokens"], fields["kv_dtype"]  # kv_dtype enters the fingerprint resolved
        for name in ("key_codec", "value_codec"):  # what is stored without is what was stored before there were any
            if fields[name] == "none":
                del fields[name]
        for name in ("key_mass", "query_vectors"):  # likewise
            if not fields[name]:
                del fields[name]
        if not self.builds("graph"):
            del fields["graph"]
        if self.index == "none":
            for name in ("query_share", "query_top_k", "sample_vectors", "zone_tokens"):
                del fields[name]
        return fields


@dataclass(frozen=True, kw_only=True)
class Recipe(WithHeads):
    """How a question attends a stored context.

    Args:
        method: ``dense`` (every key), ``streaming`` (static set only), ``flat`` (static set + exact top-k),
            ``graph`` (static set + top-k found by graph search), ``scan`` (static set + top-k found by codes of all
            keys), ``auto`` (of ``dense`` and what the index holds, ``graph`` or ``scan``, the fastest for this context
            and as many questions, by times taken on this machine). The others are there to be compared with:
            docs/methods.md says what each does. They have no zones, so `estimate` is nothing to them, and their
            `budget` is ``fixed`` unless it is ``pyramid``, as it is of ``pyramidkv`` always.
        top_k: Keys attended per query head beyond the static set. At least as many as the index holds: full budget.
        budget: How many of them: ``fixed`` (`top_k`), ``mass`` (of each query the best that together hold `mass` of
            the softmax), ``profile`` (per head, by how the context's own queries attended when the index was built),
            ``pyramid`` (falling over the layers, `top_k` on average), ``auto`` (profile; fixed where the index holds
            none).
        mass: Share of the softmax mass that ``mass`` and ``profile`` keep.
        estimate: Whether the keys that are not retrieved are estimated by the zones of the index (RetroInfer), and not
            left out. None: where the index has zones.
        search_list: Candidates: kept during a graph search (ef), or scored exactly after a scan; more find more and
            cost more. 0: 2 x top_k of a graph; 4 x top_k of a scan, and with the root of the length more past 32K keys,
            where codes mistake more keys for the best. Of ``ivf`` the cells probed, and 0 a sixteenth of them.
        question_attention: How the question's tokens attend the context: ``exact`` (all keys), ``index`` (like
            generated tokens), or ``auto``: what is cheaper for this context, by times taken on this machine. Of
            ``snapkv`` and ``pyramidkv``, which choose keys by the question's attention, it is always exact.
        tail_tokens: Question and generated tokens that are attended whole, the last ones; older ones are retrieved
            from a private index.
        head_pattern, head_sparsity, head_threshold: As of `BuildConfig`: KV heads that stream attend the static set and
            the tail only, whatever the method, though the index holds all of them. A head that streams in the index
            streams anyway.
        dense_layers: First layers in which every key is attended. None: as published, 2 of ``quest``, 1 of
            ``infinigen``, whose first layer has none before it to be foreseen by, and none of the others.
    """

    method: Method = "graph"
    top_k: int = 100
    budget: Literal["auto", "fixed", "mass", "profile", "pyramid"] = "auto"
    mass: float = 0.98
    estimate: bool | None = None
    search_list: int = 0
    question_attention: Literal["exact", "index", "auto"] = "index"
    tail_tokens: int = 1024
    head_pattern: str | os.PathLike[str] | Sequence[Sequence[float | bool]] | None = None
    head_sparsity: float | None = None
    head_threshold: float | None = None
    dense_layers: int | None = None

    def __post_init__(self) -> None:
        self.resolve_heads()
        self.one_of("method", METHODS)
        if self.dense_layers is not None:
            self.at_least(self.traits.least_dense_layers, "dense_layers")
        self.at_least(1, "top_k")
        self.at_least(0, "search_list")
        self.at_least(1, "tail_tokens")
        self.one_of("budget", ("auto", "fixed", "mass", "profile", "pyramid"))
        self.one_of("question_attention", ("exact", "index", "auto"))
        if isinstance(self.mass, bool) or not isinstance(self.mass, int | float) or not 0 < self.mass <= 1:
            raise ConfigError("mass", self.mass, "must be in (0, 1]")
        if self.estimate not in (None, True, False):
            raise ConfigError("estimate", self.estimate, "must be true, false or none")

    def deciding_fields(self) -> dict[str, Any]:
        """The fields that change answers."""
        return self.fields_but_heads()

    def to_dict(self) -> dict[str, Any]:
        """`dense_layers` only if it is given: answers are known by this, those of before it too."""
        fields = super().to_dict()
        if self.dense_layers is None:
            del fields["dense_layers"]
        return fields

    @property
    def traits(self) -> Traits:
        """Of the method."""
        return TRAITS[self.method]

    @property
    def attends_all(self) -> bool:
        """Whether there can be passes that attend every key of the context."""
        questions = self.question_attention != "index" and self.method != "streaming"
        return self.method in ("dense", "auto") or questions or self.traits.observes_questions

    @property
    def budget_in_use(self) -> str:
        """`budget`, as far as the method has it."""
        if self.method not in COMPARED:
            return self.budget
        return "pyramid" if self.budget == "pyramid" or self.traits.falling_budget else "fixed"

    @property
    def leading_dense_layers(self) -> int:
        """First layers in which every key is attended."""
        return self.traits.dense_layers if self.dense_layers is None else self.dense_layers

    def candidates(self, n_keys: int) -> int:
        """The number of candidates of a search of so many keys; never below `top_k`."""
        several: float = self.traits.candidates_per_key
        if self.traits.enough_up_to is not None:
            several *= max(1.0, math.sqrt(n_keys / self.traits.enough_up_to))
        return max(self.search_list or round(several * self.top_k), self.top_k)


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Checked):
    """Overrides of the model's own `GenerationConfig`; names and meaning are transformers'.

    `seed` makes sampling repeatable: each question draws from its own stream, seeded by (seed, question id).
    """

    max_new_tokens: int = 64
    stop_strings: tuple[str, ...] = ()
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))
        self.at_least(1, "max_new_tokens")
        if any(not isinstance(s, str) or not s for s in self.stop_strings):
            raise ConfigError("stop_strings", self.stop_strings, "must be non-empty strings")
        for name, low, high in (("temperature", 0.0, float("inf")), ("top_p", 0.0, 1.0)):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise ConfigError(name, value, f"must be in ({low}, {high}]")


@dataclass(frozen=True, kw_only=True)
class Resources(Checked):
    """What the jobs take of the cluster.

    Args:
        prefill_actors, graph_actors, answer_actors: Pool sizes: a number, or (least, most), between which Ray scales
            with the work. 0: as many as the cluster has room for.
        gpus_per_actor: GPUs of one prefill or answer actor. None: 1 if the model runs on CUDA, else 0.
        cpus_per_actor: Logical CPUs of one actor; also its threads.
        actor_memory_bytes: Main memory that Ray reserves for one prefill or answer actor. 0: none, but there are no
            more actors by default than the machines have memory for, by 1.5 times the model's weights and 1 GiB each.
        questions_per_batch: Questions of one document decoded together; as one ends, the next begins. Up to four times
            as many where the document is larger than `memory_bytes`.
        memory_bytes: Of opened indexes that one answer actor holds in memory. 0: half of what the machine has left,
            in equal parts among the actors on it.
        cache_dir: Folder on each machine where parts of a store elsewhere are kept for all of its answer actors. None:
            ``~/.cache/rabatch/parts``.
        cache_bytes: Of all parts in it together. None: a quarter of what its disk has free; 0: no cache.
        recall_share: Share of the searches of answering of which recall is measured, for reports and metrics; it
            changes no answer. Each reads all keys of one KV head and layer.
    """

    prefill_actors: int | tuple[int, int] = 0
    graph_actors: int | tuple[int, int] = 0
    answer_actors: int | tuple[int, int] = 0
    gpus_per_actor: float | None = None
    cpus_per_actor: int = 1
    actor_memory_bytes: int = 0
    questions_per_batch: int = 16
    memory_bytes: int = 0
    cache_dir: str | None = None
    cache_bytes: int | None = None
    recall_share: float = 0.0

    def __post_init__(self) -> None:
        self.at_least(0, "recall_share")
        if self.recall_share > 1:
            raise ConfigError("recall_share", self.recall_share, "must be in [0, 1]")
        for name in ("prefill_actors", "graph_actors", "answer_actors"):
            object.__setattr__(self, name, _pool(name, getattr(self, name)))
        for name in ("memory_bytes", "actor_memory_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(name, value, "must be a whole number of bytes, or 0")
        if self.cache_bytes is not None and (type(self.cache_bytes) is not int or self.cache_bytes < 0):
            raise ConfigError("cache_bytes", self.cache_bytes, "must be a whole number of bytes, or 0 for no cache")
        if self.cache_dir is not None and (not self.cache_dir or "://" in self.cache_dir or "\0" in self.cache_dir):
            raise ConfigError("cache_dir", self.cache_dir, "must be a folder of each machine, not a URL")
        self.at_least(1, "cpus_per_actor", "questions_per_batch")
        if self.gpus_per_actor is not None:
            self.at_least(0, "gpus_per_actor")


def _pool(name: str, size: Any) -> int | tuple[int, int]:
    """A pool's size as it is kept: lists, as YAML has them, become tuples."""
    bounds = (size, size) if type(size) is int else tuple(size) if isinstance(size, list | tuple) else ()
    if len(bounds) != 2 or any(type(bound) is not int for bound in bounds) or not 0 <= bounds[0] <= bounds[1]:
        raise ConfigError(name, size, "must be a number of actors >= 0, or [least, most]")
    if bounds[0] == 0 and type(size) is not int:
        raise ConfigError(name, size, "least must be 1 or more")
    return size if type(size) is int else (bounds[0], bounds[1])
