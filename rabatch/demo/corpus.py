"""Synthetic long documents with planted facts, and questions about them.

A document is filler prose in which facts are spread uniformly: about a tenth of its tokens are facts, most of them
distractors that resemble the asked ones. Everything is a function of the seed and the document id.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from random import Random
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from rabatch.demo.facts import MAKERS, Fact, make_entities, make_fact
from rabatch.demo.grammar import filler_sentence
from rabatch.errors import ConfigError

KINDS = ("single", "many_keys", "several_values", "two_hop")
FORMATS = ("jsonl", "parquet")
FACT_SHARE = 0.10
"""Share of a document's tokens that state facts, asked or not."""

QUESTION_TEMPLATE = "\n\nQuestion: {question}\nAnswer:"
"""What follows the document in a prompt. It tokenises the same way alone as after a document."""

ANSWER_TEMPLATE = " {expected}<|end|>"

_MIN_TOKENS = 128
_TOKENS_PER_QUESTION = 48
"""Room that the longest fact (three sentences of several values) may need, in tokens."""

_DOCUMENTS_PER_ROW_GROUP = 64
_DOCUMENT_SCHEMA = pa.schema([("document_id", pa.string()), ("text", pa.large_string())])
_QUESTION_SCHEMA = pa.schema(
    [
        ("question_id", pa.string()),
        ("document_id", pa.string()),
        ("question", pa.string()),
        ("expected", pa.string()),
        ("kind", pa.string()),
        ("fact_start", pa.int64()),
        ("fact_end", pa.int64()),
        ("fact_spans", pa.list_(pa.list_(pa.int64()))),
    ]
)


@dataclass(frozen=True, slots=True)
class PlacedFact:
    """A fact and where its sentences stand: `spans[i]` is [start, end) of `fact.sentences[i]` in characters."""

    fact: Fact
    spans: tuple[tuple[int, int], ...]


@cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(files("rabatch.demo") / "model" / "tokenizer.json"))


def count_tokens(text: str) -> int:
    """Length of `text` in tokens of the demo tokenizer, without special tokens."""
    return len(_tokenizer().encode(text, add_special_tokens=False).ids)


def compose_document(
    rng: Random,
    *,
    tokens: int,
    question_kinds: Sequence[str],
    distractor_kinds: Sequence[str] = KINDS,
    fact_share: float = FACT_SHARE,
    similarity: float = 0.5,
) -> tuple[str, list[PlacedFact]]:
    """Text of at least `tokens` and less than `tokens` + 64 tokens, and one placed fact per entry of `question_kinds`.

    Args:
        question_kinds: the kinds of the asked facts, in the order of the returned list.
        distractor_kinds: the kinds of the facts nobody asks for. They fill `fact_share` of the tokens.
        similarity: share of the entities that resemble another one (0 to 1).
    """
    taken: set[str] = set()
    entities = make_entities(rng, max(3, int(tokens * fact_share / 11 * 0.6)), similarity)
    newline = rng.choice(("\n", "\n", "\n\n", " "))
    sentences_per_paragraph = rng.randint(3, 8)
    items: list[tuple[float, str, int, int]] = []  # position in [0, 1), text, fact, sentence of the fact
    n_tokens = 0

    def add(position: float, sentence: str, fact_index: int, sentence_index: int) -> None:
        nonlocal n_tokens
        # The separator belongs to the sentence: it never merges with the "." before, so token counts add up.
        text = (newline if rng.random() * sentences_per_paragraph < 1 else " ") + sentence
        n_tokens += count_tokens(text)
        items.append((position, text, fact_index, sentence_index))

    def plant(kind: str, fact_index: int) -> Fact:
        fact = make_fact(rng, kind, entities, taken)
        positions = spread(rng, len(fact.sentences))
        if kind == "several_values":
            positions.sort()
        for index, (position, sentence) in enumerate(zip(positions, fact.sentences, strict=True)):
            add(position, sentence, fact_index, index)
        return fact

    asked = [plant(kind, index) for index, kind in enumerate(question_kinds)]
    while n_tokens < tokens * fact_share:
        plant(rng.choice(distractor_kinds), -1)
    while n_tokens < tokens + 2:  # two spare tokens: the first sentence loses its separator
        add(rng.random(), filler_sentence(rng), -1, 0)

    items.sort(key=lambda item: item[0])
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    pieces: list[str] = []
    offset = 0
    for index, (_, text, fact_index, sentence_index) in enumerate(items):
        piece = text.lstrip() if index == 0 else text
        end = offset + len(piece)
        spans[fact_index, sentence_index] = (end - len(piece.lstrip()), end)
        pieces.append(piece)
        offset = end
    placed = [
        PlacedFact(fact, tuple(spans[index, sentence] for sentence in range(len(fact.sentences))))
        for index, fact in enumerate(asked)
    ]
    return "".join(pieces), placed


def spread(rng: Random, n_positions: int) -> list[float]:
    """Positions in [0, 1), each uniform on its own, but far apart from one another (at least 0.6 / n on the circle)."""
    start = rng.random()
    return [(start + (index + 0.4 * rng.random() * (index > 0)) / n_positions) % 1.0 for index in range(n_positions)]


def _check(n_documents: int, tokens: int, n_questions: int, kinds: Sequence[str]) -> None:
    if n_documents < 1:
        raise ConfigError("n_documents", n_documents, "ask for at least one document")
    if tokens < _MIN_TOKENS:
        raise ConfigError("tokens", tokens, f"documents have at least {_MIN_TOKENS} tokens")
    if n_questions < 0:
        raise ConfigError("n_questions", n_questions, "use 0 or more")
    if n_questions * _TOKENS_PER_QUESTION > tokens:
        fix = f"a document of {tokens} tokens holds at most {tokens // _TOKENS_PER_QUESTION} questions"
        raise ConfigError("n_questions", n_questions, fix)
    if not kinds or any(kind not in MAKERS for kind in kinds):
        raise ConfigError("kinds", list(kinds), f"name one or more of {', '.join(KINDS)}")


def generate_document(
    *, document_id: str, tokens: int, n_questions: int, kinds: Sequence[str] = KINDS, seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One document and its questions.

    Args:
        tokens: the text has at least this many tokens of the demo tokenizer and less than 64 more.
        n_questions: the kinds take turns, so that every kind appears when there are as many questions.
        kinds: of the questions; distractors are of these kinds and `single`.
        seed: same seed and document id, same document, on every machine.

    Returns:
        `{"document_id", "text"}` and a list of `{"question_id", "document_id", "question", "expected", "kind",
        "fact_start", "fact_end", "fact_spans"}`. Spans are [start, end) in characters of the text, one for each
        sentence needed; `fact_start` and `fact_end` are the first of them.

    Raises:
        ConfigError: an argument is out of range.
    """
    _check(1, tokens, n_questions, kinds)
    rng = Random(f"rabatch-demo/{seed}/{document_id}")
    asked = [kinds[index % len(kinds)] for index in range(n_questions)]
    rng.shuffle(asked)
    text, placed = compose_document(
        rng, tokens=tokens, question_kinds=asked, distractor_kinds=sorted({*kinds, "single"})
    )
    questions = [
        {
            "question_id": f"{document_id}-q{index:03d}",
            "document_id": document_id,
            "question": item.fact.question,
            "expected": item.fact.expected,
            "kind": item.fact.kind,
            "fact_start": item.spans[0][0],
            "fact_end": item.spans[0][1],
            "fact_spans": [list(span) for span in item.spans],
        }
        for index, item in enumerate(placed)
    ]
    return {"document_id": document_id, "text": text}, questions


def generate_corpus(
    *, n_documents: int, tokens: int, n_questions: int, kinds: Sequence[str] = KINDS, seed: int = 0
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """`n_documents` documents named `doc-00000`, `doc-00001`, ..., one at a time; see `generate_document`."""
    _check(n_documents, tokens, n_questions, kinds)
    return (
        generate_document(
            document_id=f"doc-{index:05d}", tokens=tokens, n_questions=n_questions, kinds=kinds, seed=seed
        )
        for index in range(n_documents)
    )


class _Sink:
    """Rows into one JSONL or Parquet file."""

    def __init__(self, file: IO[bytes], schema: pa.Schema, format: str) -> None:
        self._file = file
        self._schema = schema
        self._writer = pq.ParquetWriter(file, schema) if format == "parquet" else None

    def write(self, rows: list[dict[str, Any]]) -> None:
        if self._writer is None:
            self._file.writelines(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
        else:
            self._writer.write_table(pa.Table.from_pylist(rows, schema=self._schema))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def write_corpus(
    out: str,
    *,
    n_documents: int,
    tokens: int,
    n_questions: int,
    kinds: Sequence[str] = KINDS,
    seed: int = 0,
    format: str = "jsonl",
) -> dict[str, Any]:
    """Write documents and questions into the folder `out` (any fsspec URL).

    Returns:
        `{"documents": count, "questions": count, "tokens": total, "paths": {"documents": url, "questions": url}}`.

    Raises:
        ConfigError: an argument is out of range.
    """
    if format not in FORMATS:
        raise ConfigError("format", format, f"use {' or '.join(FORMATS)}")
    corpus = generate_corpus(n_documents=n_documents, tokens=tokens, n_questions=n_questions, kinds=kinds, seed=seed)
    filesystem, folder = fsspec.core.url_to_fs(out)
    filesystem.makedirs(folder, exist_ok=True)
    names = {name: f"{name}.{format}" for name in ("documents", "questions")}
    counts = {"documents": 0, "questions": 0, "tokens": 0}
    with (
        filesystem.open(f"{folder}/{names['documents']}", "wb") as document_file,
        filesystem.open(f"{folder}/{names['questions']}", "wb") as question_file,
    ):
        sinks = _Sink(document_file, _DOCUMENT_SCHEMA, format), _Sink(question_file, _QUESTION_SCHEMA, format)
        documents: list[dict[str, Any]] = []
        questions: list[dict[str, Any]] = []
        for document, asked in corpus:
            documents.append(document)
            questions += asked
            counts["documents"] += 1
            counts["questions"] += len(asked)
            counts["tokens"] += count_tokens(document["text"])
            if len(documents) == _DOCUMENTS_PER_ROW_GROUP or counts["documents"] == n_documents:
                sinks[0].write(documents)
                sinks[1].write(questions)
                documents, questions = [], []
        for sink in sinks:
            sink.close()
    paths = {name: f"{out.rstrip('/')}/{file}" for name, file in names.items()}
    return {**counts, "paths": paths}
