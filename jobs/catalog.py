"""Joining questions with what the store holds: which index answers which question, and which cannot be answered."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rabatch.config import ModelConfig, Recipe
from rabatch.storage.answers import AnswerKeys
from rabatch.storage.catalog import entries
from rabatch.storage.manifest import held
from rabatch.storage.store import IndexStore, OnError
from rabatch.storage.summaries import id_text

_T = TypeVar("_T")
_COLUMNS = (
    *("document_id", "content_sha256", "fingerprint", "model_sha256", "index", "context_tokens", "stored_bytes"),
    "created_us",
)


class Stored(NamedTuple):
    """What the driver keeps of a committed index: some hundred bytes, however many parts it has."""

    document_id: str
    content_sha256: str
    fingerprint: str
    model_sha256: str
    kind: str
    context_tokens: int
    stored_bytes: int
    created_us: int


class Pair(NamedTuple):
    """A question to one index.

    Args:
        order: Position of the question in the input.
        key: As of `AnswerKeys.answer`.
    """

    order: int
    stored: Stored
    key: str


class Batch(NamedTuple):
    """Questions of one document that are decoded and kept together.

    Args:
        name: A digest of the keys; under it the answers are kept until the run commits.
        pairs: Positions in the list of pairs.
    """

    name: str
    stored: Stored
    pairs: tuple[int, ...]


class Refused(NamedTuple):
    """A question that no index answers."""

    order: int
    document_id: str | None
    reason: str


def read_entries(store: IndexStore, *, on_error: OnError | None = None) -> Iterator[Stored]:
    """All committed indexes of a store."""
    for table in entries(store, columns=list(_COLUMNS), on_error=on_error):
        columns = [table[name].to_pylist() for name in _COLUMNS]
        for document_id, *rest in zip(*columns, strict=True):
            yield Stored(id_text(document_id), *rest)


class Catalog:
    """The indexes that a model may be answered from.

    Args:
        indexes: All of the store.
        model_sha256: Of the model that answers; `storage.summaries.digest_of`.
        recipe: ``graph`` and ``scan`` need indexes that hold one.
        fingerprint: Only these indexes. None: of each document the newest text, the newest index of it.
        damaged: Paths of manifests that could not be read.
        only: Documents that may be asked; None is no limit. The value says why one may not, None that it may.
    """

    def __init__(
        self,
        indexes: Iterable[Stored],
        model_sha256: str,
        recipe: Recipe,
        *,
        fingerprint: str | None = None,
        damaged: list[str] | None = None,
        only: Mapping[str, str | None] | None = None,
    ) -> None:
        self._others: set[str] = set()
        self._method, self._without_method = recipe.method, set[str]()
        self._damaged = damaged or []
        self._only = only
        mine: dict[str, list[Stored]] = defaultdict(list)
        for index in indexes:
            if only is not None and only.get(index.document_id, "") is not None:
                continue
            if index.model_sha256 == model_sha256 and fingerprint in (None, index.fingerprint):
                mine[index.document_id].append(index)
            else:
                self._others.add(index.document_id)
        self.indexes: dict[str, Stored] = {}
        for document_id in sorted(mine):
            found = sorted(mine[document_id], key=lambda index: index.created_us, reverse=True)
            newest = [index for index in found if index.content_sha256 == found[0].content_sha256]
            fit = [i for i in newest if recipe.method not in ("graph", "scan") or recipe.method in held(i.kind)]
            if fit:
                self.indexes[document_id] = fit[0]
            else:
                self._without_method.add(document_id)

    def targets(self, document_id: str | None) -> Iterable[Stored]:
        """The indexes a question is asked of."""
        if document_id is None:
            return self.indexes.values()
        index = self.indexes.get(document_id)
        return () if index is None else (index,)

    def why_none(self, document_id: str | None) -> str:
        """Why a question has no index, and what mends it."""
        if document_id is None:
            return "the store holds no document of this model; build one first (rabatch build)"
        if self._only is not None and self._only.get(document_id, "") is not None:
            return self._only.get(document_id) or "is none of the pipeline's documents; correct the document_id"
        if document_id in self._without_method:
            fix = "use another recipe (flat, dense), or build it with --index graph+scan"
            return f"its index holds no {self._method}; {fix}"
        if document_id in self._others:
            return "is indexed for another model, dtype, template or fingerprint only; build it for this one"
        hint = f"; {len(self._damaged)} manifests are damaged, see rabatch verify" if self._damaged else ""
        return f"document is not in the store; build it first, or correct the document_id{hint}"


def join(questions: Sequence[dict[str, Any]], catalog: Catalog, keys: AnswerKeys) -> tuple[list[Pair], list[Refused]]:
    """Every (question, index) pair, each once, and the questions that cannot be asked.

    Args:
        questions: As `rabatch.jobs.rows.question_of` makes them.
    """
    pairs: list[Pair] = []
    refused: list[Refused] = []
    seen: dict[tuple[str, str | None], int] = {}
    for order, question in enumerate(questions):
        document_id = question["document_id"]
        targets = () if question["error"] else catalog.targets(document_id)
        if not targets:
            refused.append(Refused(order, document_id, question["error"] or catalog.why_none(document_id)))
        for index in targets:
            first = seen.setdefault((question["question_id"], index.document_id), order)
            if first != order:
                source = questions[first]["source"]
                reason = f"question_id is the same as that of {source}, which is answered; give it another id"
                refused.append(Refused(order, index.document_id, reason))
                continue
            about: dict[str, Any] = {"content_sha256": index.content_sha256, "fingerprint": index.fingerprint}
            about |= {name: question[name] for name in ("answer_prefix", "max_new_tokens")}
            key = keys.answer(question["question_id"], question["question"], document_id=index.document_id, **about)
            pairs.append(Pair(order, index, key))
    return pairs, refused


def batches_of(pairs: Sequence[Pair], numbers: Iterable[int], *, questions_per_batch: int) -> list[Batch]:
    """The pairs with these numbers in batches of one document each, in the order of the questions.

    Args:
        questions_per_batch: At most so many in one batch.
    """
    by_document: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        by_document[pairs[number].stored.document_id].append(number)
    made = []
    for asked in by_document.values():
        for chunk in chunks(asked, questions_per_batch):
            name = hashlib.sha256(json.dumps([pairs[number].key for number in chunk]).encode()).hexdigest()
            made.append(Batch(name, pairs[chunk[0]].stored, tuple(chunk)))
    return made


def chunks(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """`items` in runs of `size`, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def failed_row(
    question: dict[str, Any],
    *,
    document_id: str | None,
    reason: str,
    recipe: Recipe,
    model: ModelConfig,
    index: Stored | None = None,
) -> dict[str, Any]:
    """The answer row of a question that was not answered; columns of `rabatch.records.ANSWERS`."""
    return {
        "question_id": question["question_id"],
        "document_id": document_id,
        "question": question["question"],
        "expected": question["expected"],
        "status": "failed",
        "reason": reason,
        "answer": None,
        "finish_reason": None,
        "evidence": [],
        "context_tokens": index.context_tokens if index else None,
        "question_tokens": None,
        "answer_tokens": None,
        "attended_share": None,
        "mass_share": None,
        "seconds": None,
        "recipe": recipe.method,
        "model": model.name,
        "fingerprint": index.fingerprint if index else None,
    }
