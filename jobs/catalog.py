"""Joining questions with what the store holds: which index answers which question, and which cannot be answered."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rabatch import __version__
from rabatch.config import GenerationSettings, ModelConfig, Recipe
from rabatch.storage.manifest import Manifest

_T = TypeVar("_T")


@dataclass(frozen=True)
class Batch:
    """Questions of one document that are decoded together.

    Args:
        key: SHA-256 over all that the answers depend on; the name of the batch's part file.
        questions: Dicts of `question_id, question, expected`.
        order: Position of each question in the input.
    """

    key: str
    manifest: Manifest
    questions: tuple[dict[str, Any], ...]
    order: tuple[int, ...]


@dataclass(frozen=True)
class Refused:
    """A question that no index answers."""

    order: int
    question: dict[str, Any]
    document_id: str | None
    reason: str


class Catalog:
    """The indexes that a model may be answered from.

    Args:
        manifests: All of the store.
        model_fields: The ``model`` part of the fingerprint fields of the model that answers.
        recipe: ``graph`` and ``scan`` need indexes that hold one.
        fingerprint: Only these indexes. None: of each document the newest text, the newest index of it.
        damaged: Paths of manifests that could not be read.
    """

    def __init__(
        self,
        manifests: Iterable[Manifest],
        model_fields: dict[str, Any],
        recipe: Recipe,
        *,
        fingerprint: str | None = None,
        damaged: list[str] | None = None,
    ) -> None:
        self._others: dict[str, Manifest] = {}
        self._method, self._without_method = recipe.method, set[str]()
        self._damaged = damaged or []
        mine: dict[str, list[Manifest]] = defaultdict(list)
        plain_fields = json.loads(json.dumps(model_fields))  # as a manifest has them: tuples are lists
        for manifest in manifests:
            same = manifest.fingerprint_fields.get("model") == plain_fields
            if same and fingerprint in (None, manifest.fingerprint):
                mine[manifest.document_id].append(manifest)
            else:
                self._others[manifest.document_id] = manifest
        self.manifests: dict[str, Manifest] = {}
        for document_id in sorted(mine):
            found = sorted(mine[document_id], key=lambda m: m.created_at, reverse=True)
            newest = [m for m in found if m.content_sha256 == found[0].content_sha256]
            fit = [m for m in newest if recipe.method not in ("graph", "scan") or m.geometry.holds(recipe.method)]
            if fit:
                self.manifests[document_id] = fit[0]
            else:
                self._without_method.add(document_id)

    def targets(self, document_id: str | None) -> list[Manifest]:
        """The indexes a question is asked of."""
        if document_id is None:
            return list(self.manifests.values())
        manifest = self.manifests.get(document_id)
        return [] if manifest is None else [manifest]

    def why_none(self, document_id: str | None) -> str:
        """Why a question has no index, and what mends it."""
        if document_id is None:
            return "the store holds no document of this model; build one first (rabatch build)"
        if document_id in self._without_method:
            fix = "use another recipe (flat, dense), or build it with --index graph+scan"
            return f"its index holds no {self._method}; {fix}"
        if document_id in self._others:
            return "is indexed for another model, dtype, template or fingerprint only; build it for this one"
        hint = f"; {len(self._damaged)} manifests are damaged, see rabatch verify" if self._damaged else ""
        return f"document is not in the store; build it first, or correct the document_id{hint}"


def join(
    questions: list[dict[str, Any]],
    catalog: Catalog,
    *,
    recipe: Recipe,
    generation: GenerationSettings,
    model: ModelConfig,
    questions_per_batch: int,
) -> tuple[list[Batch], list[Refused]]:
    """Questions in batches of one document each, and those that cannot be asked.

    Args:
        questions: As `rabatch.jobs.rows.question_of` makes them.
        questions_per_batch: At most so many in one batch.
    """
    refused: list[Refused] = []
    asked: dict[str, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
    seen: dict[tuple[str, str | None], str] = {}
    for order, question in enumerate(questions):
        document_id = question["document_id"]
        targets = [] if question["error"] else catalog.targets(document_id)
        if not targets:
            refused.append(Refused(order, question, document_id, question["error"] or catalog.why_none(document_id)))
        for manifest in targets:
            pair = (question["question_id"], manifest.document_id)
            if pair in seen:
                reason = f"question_id is the same as that of {seen[pair]}, which is answered; give it another id"
                refused.append(Refused(order, question, manifest.document_id, reason))
                continue
            seen[pair] = question["source"]
            asked[manifest.document_id].append((order, question))
    batches = []
    for document_id, items in asked.items():
        manifest = catalog.manifests[document_id]
        for chunk in chunks(items, questions_per_batch):
            kept = tuple({name: q[name] for name in ("question_id", "question", "expected")} for _, q in chunk)
            key = _key(manifest, kept, recipe, generation, model)
            batches.append(Batch(key, manifest, kept, tuple(order for order, _ in chunk)))
    return batches, refused


def chunks(items: Sequence[_T], size: int) -> list[Sequence[_T]]:
    """`items` in runs of `size`, the last one shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _key(
    manifest: Manifest,
    questions: tuple[dict[str, Any], ...],
    recipe: Recipe,
    generation: GenerationSettings,
    model: ModelConfig,
) -> str:
    parts = {
        "version": __version__,
        "document": [manifest.document_id, manifest.content_sha256, manifest.fingerprint],
        "questions": questions,
        "recipe": recipe.to_dict(),
        "generation": generation.to_dict(),
        "model": [model.name, model.context_template],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def failed_row(
    question: dict[str, Any],
    *,
    document_id: str | None,
    reason: str,
    recipe: Recipe,
    model: ModelConfig,
    manifest: Manifest | None = None,
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
        "context_tokens": manifest.context_tokens if manifest else None,
        "question_tokens": None,
        "answer_tokens": None,
        "attended_share": None,
        "seconds": None,
        "recipe": recipe.method,
        "model": model.name,
        "fingerprint": manifest.fingerprint if manifest else None,
    }
