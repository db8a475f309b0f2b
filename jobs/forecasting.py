"""`rabatch plan`: what a pipeline will take before anything is paid for. Reads the model's config, no weights, and the
sizes of the documents; starts no Ray."""

from __future__ import annotations

import collections
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from rabatch.config import BuildConfig, ModelConfig
from rabatch.fingerprint import config_digest, stored_dtype
from rabatch.flops import ModelWork, model_work
from rabatch.forecast import METHODS, NO_STORE, Choice, Decoding, Rates, choices
from rabatch.jobs.measured import of_answers, of_builds, stored_manifests
from rabatch.jobs.settings import model_settings, resolved_model
from rabatch.jobs.survey import Asked, Corpus, Surveyor
from rabatch.models import max_context_tokens, read_config
from rabatch.pipeline import Pipeline
from rabatch.prefill import RESERVED_TOKENS
from rabatch.sizes import ITEM_BYTES, NEEDED, IndexSize, index_size
from rabatch.storage.answers import MARKER as ANSWERS_MARKER
from rabatch.storage.answers import AnswerStore
from rabatch.storage.filesystem import Folder

_HOUR = 3600
_ANSWER_PARTS = 4  # of earlier answers, by which decoding is timed


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a pipeline will take.

    Args:
        documents, tokens, bytes: What there is to build; tokens of the contexts.
        unusable, too_long: Rows that are no document; documents that the model does not take.
        sample: What was tokenised: documents, bytes, tokens, and whether that is everything.
        questions: Pairs of question and document.
        questions_per_document: Their mean.
        model: Parameters and shapes.
        flops: Of all prefills: `gemm` and `attention`.
        stored: Bytes of the index as configured, by what they are for, and in `total`.
        requests: To an object store: `put` and `list` of building, `get` of opening every document once.
        recipes: By recipe: bytes of the smallest index that serves it, and hours of one actor, None where not known.
        hours: Of one actor, by phase, with the recipe and index of the definition; None where no rate is known.
        rates: What was reckoned with, with the source of each.
        cheapest: Which recipe takes the least time, by questions per document; empty where rates are missing.
        missing: Rates that nobody gave or measured.
    """

    documents: int
    tokens: int
    bytes: int
    unusable: int
    too_long: int
    sample: dict[str, Any]
    questions: int
    questions_per_document: float
    model: dict[str, Any]
    flops: dict[str, int]
    stored: dict[str, int]
    requests: dict[str, int]
    recipes: dict[str, dict[str, Any]]
    hours: dict[str, float | None]
    rates: dict[str, Any]
    cheapest: list[dict[str, Any]]
    missing: list[str]

    @property
    def exit_code(self) -> int:
        """0: whether documents will fail is not a plan's to judge."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    def summary(self) -> list[str]:
        """What the command prints."""
        return _text(self)


def plan(pipeline: Pipeline, *, rates: Rates | None = None, questions_per_document: float | None = None) -> Plan:
    """What `pipeline` will take.

    Args:
        rates: Throughput of one actor. What is not given is taken from earlier builds in the
            store, and earlier answers, of the same model.
        questions_per_document: Instead of those there are.

    Raises:
        RabatchError: Documents, questions or the model's config cannot be read.
    """
    settings = resolved_model(model_settings(pipeline.model), has_cuda=pipeline.model.device.startswith("cuda"))
    options = dict(pipeline.storage_options or {})
    work = model_work(settings)
    surveyor = Surveyor(settings, options)
    corpus = surveyor.documents(pipeline.documents)
    limit = max_context_tokens(read_config(settings))
    limit -= min(RESERVED_TOKENS, limit // 8)
    lengths = collections.Counter(n for n in corpus.tokens if n <= limit)
    n_documents = sum(lengths.values())
    asked = surveyor.questions(pipeline.questions, n_documents=n_documents)
    per_document = asked.pairs / max(1, n_documents) if questions_per_document is None else questions_per_document
    decoding = Decoding(
        work=work,
        build=pipeline.build,
        recipe=pipeline.recipe,
        weight_bytes=ITEM_BYTES[settings.dtype],
        kv_bytes=ITEM_BYTES[stored_dtype(settings, pipeline.build)],
        question_tokens=asked.tokens,
        answer_tokens=pipeline.generation.max_new_tokens,
        questions_per_batch=pipeline.resources.questions_per_batch,
    )
    known = _known(rates or Rates(), _measured(pipeline, settings, decoding, options))
    return _Planner(pipeline, settings, work, decoding, known, lengths).plan(corpus, asked, per_document)


class _Planner:
    """The arithmetic, once everything is measured."""

    def __init__(
        self,
        pipeline: Pipeline,
        settings: ModelConfig,
        work: ModelWork,
        decoding: Decoding,
        rates: Rates,
        lengths: collections.Counter[int],
    ) -> None:
        self._pipeline, self._work, self._decoding, self._rates = pipeline, work, decoding, rates
        self._lengths = lengths
        self._n = max(1, sum(lengths.values()))
        self._kv_dtype = stored_dtype(settings, pipeline.build)
        chunk = pipeline.build.prefill_chunk_tokens
        self._gemm = sum(count * work.gemm_flops(n, chunk_tokens=chunk) for n, count in lengths.items())
        self._attention = sum(count * work.attention_flops(n) for n, count in lengths.items())
        self._mean_tokens = sum(n * count for n, count in lengths.items()) / self._n

    def plan(self, corpus: Corpus, asked: Asked, per_document: float) -> Plan:
        configured = self._size(self._pipeline.build)
        hours = self._hours(self._pipeline.recipe.method, configured, self._pipeline.build.index, per_document)
        recipes: dict[str, Any] = {method: self._recipe(method, per_document) for method in METHODS}
        found = self._choices()
        shape = self._work.geometry
        return Plan(
            documents=sum(self._lengths.values()),
            tokens=sum(n * count for n, count in self._lengths.items()),
            bytes=corpus.bytes,
            unusable=corpus.unusable,
            too_long=len(corpus.tokens) - sum(self._lengths.values()),
            sample={
                "documents": corpus.sampled_documents,
                "bytes": corpus.sampled_bytes,
                "tokens": corpus.sampled_tokens,
                "all": corpus.exact,
            },
            questions=asked.pairs,
            questions_per_document=per_document,
            model={
                "name": self._pipeline.model.name,
                "parameters": self._work.parameters,
                **dataclasses.asdict(shape),
                "sliding_layers": sum(1 for window in self._work.windows if window),
            },
            flops={"gemm": self._gemm, "attention": self._attention, "total": self._gemm + self._attention},
            stored={**vars(configured.bytes), "total": configured.bytes.total},
            requests=dict(vars(configured.requests)),
            recipes=recipes,
            hours=hours,
            rates=dataclasses.asdict(self._rates),
            cheapest=[dataclasses.asdict(choice) for choice in found],
            missing=self._missing(),
        )

    def _size(self, build: BuildConfig) -> IndexSize:
        total = IndexSize()
        for n, count in self._lengths.items():
            one = index_size(n, self._work.geometry, self._work.windows, build, kv_dtype=self._kv_dtype)
            total += one.times(count)
        return total

    def _recipe(self, method: Any, per_document: float) -> dict[str, Any]:
        size = self._size(dataclasses.replace(self._pipeline.build, index=NEEDED[method]))
        hours = self._hours(method, size, NEEDED[method], per_document)
        known = [value for value in hours.values() if value is not None]
        return {
            "index": NEEDED[method],
            "stored_bytes": size.bytes.total,
            "hours": hours,
            "total_hours": sum(known) if len(known) == len(hours) else None,
        }

    def _hours(self, method: Any, size: IndexSize, index: str, per_document: float) -> dict[str, float | None]:
        """Of each phase; every document is read once."""
        rates = self._rates
        decode = self._decoding.question_seconds(_priced(method), self._mean_tokens, per_document, rates)
        seconds = {
            "prefill": _over(self._gemm + self._attention, rates.prefill_flops_per_s),
            "index": 0.0 if index == "none" else _over(size.indexed, _index_rate(rates, index)),
            "write": _over(size.bytes.total, rates.write_bytes_per_s),
            "read": _over(size.bytes.total, rates.read_bytes_per_s),
            "decode": None if decode is None else decode * per_document * self._n,
        }
        return {name: None if value is None else value / _HOUR for name, value in seconds.items()}

    def _missing(self) -> list[str]:
        return [
            name
            for name in ("prefill_flops_per_s", "write_bytes_per_s", "read_bytes_per_s", "decode_bytes_per_s")
            if getattr(self._rates, name) is None
        ] + ([] if self._rates.index_keys_per_s else ["index_keys_per_s"])

    def _choices(self) -> list[Choice]:
        """By questions per document, for a document of mean length."""
        if self._missing():
            return []
        once: dict[str, float] = {}
        for method in METHODS:
            size = self._size(dataclasses.replace(self._pipeline.build, index=NEEDED[method]))
            hours = self._hours(method, size, NEEDED[method], 0)
            once[method] = sum(value or 0.0 for value in hours.values()) * _HOUR / self._n
        prefill = (self._gemm + self._attention) / self._n / (self._rates.prefill_flops_per_s or math.inf)

        def cost(option: str, questions: int) -> float:
            if option == NO_STORE:
                alone = self._decoding.question_seconds("dense", self._mean_tokens, 1, self._rates)
                return questions * (prefill + (alone or 0.0))
            each = self._decoding.question_seconds(_priced(option), self._mean_tokens, questions, self._rates)
            return once[option] + questions * (each or 0.0)

        return choices(cost, (NO_STORE, *METHODS))


def _priced(method: str) -> Any:
    """`auto` is reckoned as `graph`, the default, as it takes what is fastest on the machine; methods that are there to
    be compared with, and `streaming`, as `flat`, which costs no less than most."""
    return method if method in METHODS else "graph" if method == "auto" else "flat"


def _over(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate


def _index_rate(rates: Rates, index: str) -> float | None:
    """Of an index kind, else of one that holds more, which takes longer, or of any."""
    known = rates.index_keys_per_s
    return known.get(index, known.get("graph+scan", min(known.values(), default=None)))


def _measured(pipeline: Pipeline, settings: ModelConfig, decoding: Decoding, options: dict[str, Any]) -> Rates:
    rates = of_builds(
        stored_manifests(pipeline.store, options),
        config_sha256=config_digest(settings),
        decoding=decoding,
        chunk_tokens=pipeline.build.prefill_chunk_tokens,
    )
    return of_answers(_earlier_answers(pipeline, options), decoding, rates)


def _earlier_answers(pipeline: Pipeline, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the last parts of the answers store; none where there is no store yet."""
    if not Folder(pipeline.answers, **options).exists(ANSWERS_MARKER):
        return []
    store, model = AnswerStore(pipeline.answers, storage_options=options), model_settings(pipeline.model).name
    parts = [part for run in store.runs() for part in run.parts][-_ANSWER_PARTS:]
    columns = ["status", "model", "recipe", "seconds", "answer_tokens", "context_tokens"]
    rows = [row for part in parts for row in store.read(part, columns=columns).to_pylist()]
    return [row for row in rows if row["model"] == model]


def _known(given: Rates, measured: Rates) -> Rates:
    """What is given, else what was measured; reading is taken to be as fast as writing, if nothing says more."""
    values: dict[str, Any] = {}
    sources = {name: text for name, text in measured.sources.items() if getattr(measured, name)}
    for field in dataclasses.fields(Rates):
        name = field.name
        if name == "sources":
            continue
        value = getattr(given, name)
        values[name] = value if value else getattr(measured, name)
        if value:
            sources[name] = "given"
    if given.decode_bytes_per_s:
        values["measured_over_modelled"] = {}  # they are relative to another rate
    if values["read_bytes_per_s"] is None and values["write_bytes_per_s"] is not None:
        values["read_bytes_per_s"] = values["write_bytes_per_s"]
        sources["read_bytes_per_s"] = "that of writing"
    return Rates(**values, sources=sources)


def _text(plan: Plan) -> list[str]:
    sample = plan.sample
    of = "all of them" if sample["all"] else f"estimated from {sample['documents']} documents, {_size(sample['bytes'])}"
    lines = [
        f"documents   {plan.documents:,}, {_size(plan.bytes)} of text"
        + (f"; {plan.unusable} rows are none" if plan.unusable else "")
        + (f"; {plan.too_long} more are too long for the model" if plan.too_long else ""),
        f"tokens      {plan.tokens:,}, counted ({of})" if sample["all"] else f"tokens      {plan.tokens:,}, {of}",
        f"questions   {plan.questions:,}, {plan.questions_per_document:.3g} per document",
        f"model       {plan.model['name']}, {plan.model['parameters']:,} parameters",
        f"prefill     {_flops(plan.flops['total'])}, {plan.flops['attention'] / max(1, plan.flops['total']):.0%} of it "
        "attention",
        f"stored      {_size(plan.stored['total'])}: "
        + ", ".join(f"{name} {_size(size)}" for name, size in plan.stored.items() if size and name != "total"),
        "requests    " + ", ".join(f"{count:,} {name}" for name, count in plan.requests.items()),
        "actor hours " + ", ".join(f"{name} {_hours_text(value)}" for name, value in plan.hours.items()),
        "",
        f"{'recipe':<10}{'index':<12}{'stored':>10}{'hours':>10}",
    ]
    for name, recipe in plan.recipes.items():
        lines.append(
            f"{name:<10}{recipe['index']:<12}{_size(recipe['stored_bytes']):>10}{_hours_text(recipe['total_hours']):>10}"
        )
    lines.append("")
    if plan.cheapest:
        lines.append("cheapest, by questions per document:")
        lines += [f"  {_range(choice):<16}{_named(choice['recipe'])}" for choice in plan.cheapest]
    if plan.missing:
        options = ", ".join("--" + name.replace("_", "-") for name in plan.missing)
        lines.append(f"not known: {options}; give them, or build a few documents into the store first")
    lines += [f"{name}: {_rate_text(plan.rates[name])} ({told})" for name, told in plan.rates["sources"].items()]
    return lines


def _rate_text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {rate:.3g}" for name, rate in value.items())
    return f"{value:.3g}"


def _range(choice: dict[str, Any]) -> str:
    if choice["last"] is None:
        return f"{choice['first']:,} and more"
    return f"{choice['first']:,} to {choice['last']:,}" if choice["last"] > choice["first"] else f"{choice['first']:,}"


def _named(recipe: str) -> str:
    return "no store: prefill for every question" if recipe == NO_STORE else recipe


def _hours_text(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}" if value >= 0.01 else f"{value:.1e}"


def _size(n_bytes: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def _flops(n: float) -> str:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.3g} FLOP"
