"""How much there is to do: sizes of the documents, and tokens by a sample that is tokenised. Needs no running Ray.

Text files are listed, not read; lines and rows are read once, for their lengths.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from rabatch.config import ModelConfig
from rabatch.errors import SourceError
from rabatch.jobs.rows import decode, document_of, question_of, read_unit
from rabatch.jobs.sources import JSONL, PARQUET, Units, list_units
from rabatch.models import load_tokenizer
from rabatch.prompts import PromptTemplate

SAMPLE_DOCUMENTS = 32
SAMPLE_CHARS = 65_536
"""Of one document in the sample at most, from its middle."""
_SAMPLE_QUESTIONS = 64


@dataclass(frozen=True)
class Corpus:
    """The documents.

    Args:
        tokens: Of each document's context, estimated; exact where `exact`.
        bytes: Of all texts, as UTF-8.
        unusable: Rows that are no document: no text, not UTF-8, not JSON.
        sampled_documents, sampled_bytes, sampled_tokens: What was tokenised.
        exact: Whether that is all of it.
    """

    tokens: tuple[int, ...]
    bytes: int
    unusable: int
    sampled_documents: int
    sampled_bytes: int
    sampled_tokens: int

    @property
    def exact(self) -> bool:
        return self.sampled_bytes == self.bytes and self.sampled_documents == len(self.tokens)


@dataclass(frozen=True)
class Asked:
    """The questions.

    Args:
        pairs: Of question and document: a question without a document is asked of all.
        tokens: Of a question with the prompt around it, mean of a sample.
        unusable: Rows that are no question.
    """

    pairs: int
    tokens: float
    unusable: int


@dataclass(frozen=True)
class _Text:
    number: int
    nbytes: int
    text: str | None  # None: of a file, not read yet
    path: str


class Surveyor:
    """Measures documents and questions with a model's tokenizer.

    Raises:
        ModelError: The tokenizer cannot be loaded.
    """

    def __init__(self, model: ModelConfig, storage_options: dict[str, Any] | None = None) -> None:
        self._tokenizer = load_tokenizer(model)
        self._template = PromptTemplate.of(self._tokenizer, model.context_template)
        self._options = dict(storage_options or {})

    def documents(self, source: Any) -> Corpus:
        """Of a path or URL.

        Raises:
            SourceError: It is neither, does not exist or holds no documents.
        """
        units = self._units(source, "documents")
        filesystem, _ = fsspec.core.url_to_fs(units.url, **units.storage_options)
        sizes: list[int] = []
        sample: list[tuple[str, int, _Text]] = []
        unusable = 0
        for name, item in _texts(units, filesystem):
            if item is None:
                unusable += 1
                continue
            item = _Text(len(sizes), item.nbytes, item.text, item.path)
            sizes.append(item.nbytes)
            # Those of the smallest hashes: every document is as likely, in one pass, and the next plan takes the same.
            rank = (_inverted(hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()), item.number, item)
            (heapq.heappush if len(sample) < SAMPLE_DOCUMENTS else heapq.heappushpop)(sample, rank)
        return self._counted(sizes, [item for _, _, item in sample], filesystem, unusable)

    def questions(self, source: Any, *, n_documents: int) -> Asked:
        """Of a path or URL; errors as of `documents`."""
        units = self._units(source, "questions", JSONL + PARQUET)
        pairs, unusable = 0, 0
        sampled: list[int] = []
        for unit in units.units:
            for record in read_unit(units, unit):
                question = question_of(record)
                if question["error"] is not None:
                    unusable += 1
                    continue
                pairs += n_documents if question["document_id"] is None else 1
                if len(sampled) < _SAMPLE_QUESTIONS:
                    text = self._template.after_document + question["question"] + self._template.after_question
                    text += question["answer_prefix"] or ""
                    sampled.append(len(self._tokenizer(text, add_special_tokens=False).input_ids))
        return Asked(pairs, sum(sampled) / max(1, len(sampled)), unusable)

    def _units(self, source: Any, field: str, suffixes: tuple[str, ...] | None = None) -> Units:
        if not isinstance(source, str):
            fix = "plan reads paths and URLs; write the rows to a .jsonl or .parquet file"
            raise SourceError(field, type(source).__name__, fix)
        more: dict[str, Any] = {} if suffixes is None else {"suffixes": suffixes}
        return list_units(source, field=field, storage_options=self._options, **more)

    def _counted(self, sizes: list[int], sample: list[_Text], filesystem: Any, unusable: int) -> Corpus:
        before = len(self._template.encode_context(self._tokenizer, "x")) - 1
        nbytes, n_tokens, whole = 0, 0, {}
        documents = 0
        for item in sample:
            text = item.text
            if text is None:
                text, error = decode(filesystem.cat_file(item.path))
                if error is not None or not text.strip():
                    unusable += 1
                    sizes[item.number] = -1
                    continue
                sizes[item.number] = len(text.encode())  # without a byte order mark
            stretch = _middle(text)
            found = len(self._tokenizer(stretch, add_special_tokens=False, split_special_tokens=True).input_ids)
            seen = len(stretch.encode("utf-8", "surrogatepass"))
            if seen == sizes[item.number]:
                whole[item.number] = found
            documents += 1
            nbytes += seen
            n_tokens += found
        per_byte = n_tokens / max(1, nbytes)
        tokens = [
            before + whole.get(number, max(1, round(size * per_byte))) for number, size in enumerate(sizes) if size >= 0
        ]
        total = sum(size for size in sizes if size >= 0)
        return Corpus(tuple(tokens), total, unusable, documents, nbytes, n_tokens)


def _texts(units: Units, filesystem: Any) -> Iterator[tuple[str, _Text | None]]:
    """Name and size of every document; None for a row that is none."""
    files = {unit.path for unit in units.units if unit.kind == "text"}
    listed = filesystem.find(units.url, detail=True) if files else {}
    for unit in units.units:
        if unit.kind == "text":
            info = listed.get(unit.path) or filesystem.info(unit.path)
            yield unit.name, _Text(0, int(info["size"]), None, unit.path) if info["size"] else None
            continue
        for record in read_unit(units, unit, columns=("document_id", "text")):
            document = document_of(record)
            text = document["text"]
            usable = document["error"] is None
            nbytes = len(text.encode("utf-8", "surrogatepass"))
            yield f"{unit.name}:{record.row}", _Text(0, nbytes, _middle(text), "") if usable else None


def _middle(text: str) -> str:
    start = max(0, (len(text) - SAMPLE_CHARS) // 2)
    return text[start : start + SAMPLE_CHARS]


def _inverted(digest: str) -> str:
    """So that a heap, whose first is the smallest, gives up the largest digest first."""
    return digest.translate(str.maketrans("0123456789abcdef", "fedcba9876543210"))
