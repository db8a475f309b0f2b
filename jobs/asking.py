"""What is asked, what of it is answered already, and the commit of what is new.

The driver holds no answers, only where each lies: in a part of the answers store, in a batch that waits for the commit,
or, where there is no answers store, the answer itself.
"""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import pyarrow as pa

from rabatch.config import ModelConfig, Recipe
from rabatch.errors import IntegrityError
from rabatch.jobs.catalog import Batch, Pair, Refused, chunks, failed_row
from rabatch.jobs.results import Failures, Tally
from rabatch.records import ANSWERS, STORED_ANSWERS
from rabatch.storage.answers import AnswerKeys, AnswerPart, AnswerStore, Run, decode, pair_key
from rabatch.storage.failures import MissingFileError
from rabatch.storage.manifest import utc_now

WINDOW_ROWS = 10_000
"""Rows that are in memory at a time, of those that are read back."""
_PART_ROWS = 20_000
_PART_BYTES = 64 << 20
_TOLD = ("question_id", "question", "expected", "answer_prefix", "max_new_tokens")
"""What an actor is told of a question."""
_SEEN_COLUMNS = ["question_id", "document_id", "status", "answer", "attended_share", "answer_key"]

Row: TypeAlias = dict[str, Any]
Source: TypeAlias = AnswerPart | str | Row  # a part, the name of a waiting batch, or the row itself

_log = logging.getLogger(__name__)


class Asked:
    """The (question, document) pairs of one run.

    Args:
        store: Where answers are kept. None: in this process.
        failures: Counts what fails, and stops the run at its limit.
    """

    def __init__(
        self,
        questions: Sequence[Row],
        pairs: list[Pair],
        refused: list[Refused],
        *,
        keys: AnswerKeys,
        recipe: Recipe,
        model: ModelConfig,
        store: AnswerStore | None,
        failures: Failures,
    ) -> None:
        self.questions, self.pairs, self.refused = questions, pairs, refused
        self.failures = failures
        self.tally = Tally()
        self.superseded = 0
        self.reused = 0
        """Pairs that earlier runs have answered."""
        self.recipe, self.store = recipe, store
        self._keys, self._model = keys, model
        self._numbers = {pair.key: number for number, pair in enumerate(pairs)}
        self._sources: list[Source | None] = [None] * len(pairs)
        self._reasons: dict[int, str] = {}
        self._runs: list[Run] = []
        self._waiting: set[str] = set()
        """Batches to be removed after the commit, for all in them is committed then."""
        self._taken: set[str] = set()
        asked = (self._pair_key(number) for number in range(len(pairs)))
        self._latest: dict[bytes, tuple[str, bool] | None] = dict.fromkeys(asked)
        """Of each pair the last committed row: its key, and whether it is an answer."""
        self._kept: list[Refused] = []
        """Refused ones that the answers store has a place for: of one document, and no second of their pair."""
        for row in refused:
            if row.document_id is not None and self._refused_key(row) not in self._latest:
                self._latest[self._refused_key(row)] = None
                self._kept.append(row)
        for row in refused:
            failures.add(self._name(row.order, row.document_id), row.reason)

    def find_answered(self) -> int:
        """Look for what earlier runs have answered, also those that never committed; how many pairs that is."""
        if self.store is None:
            return 0
        self._read_committed()
        for name in self.store.pending():
            try:
                table = self.store.read_pending(name)
            except MissingFileError:  # another run has just committed it
                continue
            except IntegrityError as error:
                _log.warning("%s; its questions are asked again", error)
                continue
            if self._see(name, table):
                self._waiting.add(name)
        self.reused = len(self.pairs) - len(self.open_pairs())
        return self.reused

    def asks(self, batch: Batch) -> Row:
        """A batch as an actor takes it."""
        asked = [self.questions[self.pairs[number].order] for number in batch.pairs]
        questions = [{name: q[name] for name in _TOLD} for q in asked]
        return {"name": batch.name, "questions": questions, "keys": [self.pairs[number].key for number in batch.pairs]}

    def all_questions(self) -> Iterator[Row]:
        """Of every row its question."""
        orders = itertools.chain((p.order for p in self.pairs), (r.order for r in self.refused))
        return (self.questions[order] for order in orders)

    def open_pairs(self) -> list[int]:
        """Numbers of the pairs of which nothing is known."""
        return [n for n, source in enumerate(self._sources) if source is None and n not in self._reasons]

    def take(self, batch: Batch, *, failed: Iterable[tuple[int, str]], tally: Tally, data: bytes) -> int:
        """Enter what became of a batch; how many pairs that settles.

        Args:
            failed: Places in the batch, and why.
            data: The answers, where there is no answers store.
        """
        if batch.name in self._taken:
            return 0  # a dead actor's work, done twice
        self._taken.add(batch.name)
        self.tally.add(tally)
        reasons = dict(failed)
        rows = decode(data, name=batch.name).to_pylist() if data else None
        for place, number in enumerate(batch.pairs):
            if place in reasons:
                self.fail(number, reasons[place])
            else:
                self._sources[number] = batch.name if rows is None else rows[place]
        if rows is None and len(reasons) < len(batch.pairs):
            self._waiting.add(batch.name)
        return len(batch.pairs)

    def fail(self, number: int, reason: str) -> None:
        """Enter why a pair has no answer."""
        pair = self.pairs[number]
        self._reasons[number] = reason
        self.failures.add(self._name(pair.order, pair.stored.document_id), reason)

    def commit(self, *, definition_sha256: str, settings: Row, seconds: float) -> int | None:
        """Commit what is new as one run; its number, or None if nothing is.

        A row is new if it is not the latest of its pair already. So no answer is stored twice, whoever else commits
        meanwhile, and an answer to an earlier text stands again once the document has that text again.
        """
        if self.store is None:
            return None
        while True:
            attempt = self.store.new_attempt()
            known = len(self._runs)
            try:
                parts, placed = self._write(attempt)
            except MissingFileError:
                self._read_committed()
                if len(self._runs) == known:
                    raise
                continue  # another run had taken it over, and has committed it
            if not parts:
                number = None
                break
            n_ok = sum(1 for item, _ in placed if item not in self._reasons)
            run = Run(
                number=known + 1,
                created_at=utc_now(),
                attempt=attempt,
                definition_sha256=definition_sha256,
                parts=tuple(parts),
                settings=settings,
                counts={"answered": n_ok, "failed": sum(p.rows for p in parts) - n_ok, "reused": self.reused},
                seconds=seconds,
            )
            if self.store.commit(run):
                number = run.number
                for item, part in placed:
                    latest = self._latest[self._pair_key(item)]
                    self.superseded += latest is not None and latest[1]
                    if item not in self._reasons:
                        self._sources[item] = part
                break
            self.store.discard(run.parts)
            self._read_committed()
        for name in sorted(self._waiting):
            self.store.drop_pending(name)
        return number

    def windows(self) -> Iterator[list[Row]]:
        """All rows in the order of the questions, then of document ids, some thousand at a time."""
        n_pairs = len(self.pairs)

        def place(item: int) -> tuple[int, str]:
            if item < n_pairs:
                return self.pairs[item].order, self.pairs[item].stored.document_id
            refused = self.refused[item - n_pairs]
            return refused.order, refused.document_id or ""

        for window in chunks(sorted(range(n_pairs + len(self.refused)), key=place), WINDOW_ROWS):
            rows = self._read([item for item in window if item < n_pairs])
            yield [rows[item] if item < n_pairs else self._refused_row(self.refused[item - n_pairs]) for item in window]

    def _read(self, numbers: Sequence[int]) -> dict[int, Row]:
        """The rows of these pairs."""
        rows: dict[int, Row] = {}
        by_source: dict[AnswerPart | str, set[int]] = defaultdict(set)
        for number in numbers:
            source = self._sources[number]
            if number in self._reasons:
                rows[number] = self._failed_row(number)
            elif isinstance(source, dict):
                rows[number] = source
            elif source is not None:
                by_source[source].add(number)
        for source, wanted in by_source.items():
            found, table = self._pick(source, wanted)
            rows |= dict(zip(found, table.to_pylist(), strict=True))
        for number, row in rows.items():  # what is expected may have been told since, or otherwise
            expected = self.questions[self.pairs[number].order]["expected"]
            rows[number] = {name: row[name] for name in ANSWERS.names} | {"expected": expected}
        return rows

    def _pick(self, source: AnswerPart | str, wanted: set[int]) -> tuple[list[int], pa.Table]:
        """The wanted pairs' rows of a part or waiting batch, and the pairs in their order."""
        assert self.store is not None
        table = self.store.read(source) if isinstance(source, AnswerPart) else self.store.read_pending(source)
        found, places = [], []
        columns = (table["answer_key"].to_pylist(), table["status"].to_pylist())
        for place, (key, status) in enumerate(zip(*columns, strict=True)):
            number = self._numbers.get(key)
            if number is not None and number in wanted and status == "ok":
                found.append(number)
                places.append(place)
        return found, table.take(pa.array(places, pa.int64()))

    def _read_committed(self) -> None:
        assert self.store is not None
        for run in self.store.runs(after=len(self._runs)):
            for part in run.parts:
                self._see(part, self.store.read(part, columns=_SEEN_COLUMNS))
            self._runs.append(run)

    def _see(self, source: AnswerPart | str, table: pa.Table) -> bool:
        """Enter what rows say of the pairs that are asked; whether all that is answered in them is asked."""
        all_asked = True
        columns = [table[name].to_pylist() for name in ("question_id", "document_id", "status", "answer_key")]
        for row, (question_id, document_id, status, key) in enumerate(zip(*columns, strict=True)):
            if isinstance(source, AnswerPart):
                pair = pair_key(question_id, document_id)
                if pair in self._latest:
                    self._latest[pair] = (key, status == "ok")
            number = self._numbers.get(key)
            if status != "ok":
                continue
            if number is None:
                all_asked = False
                continue
            if self._reasons.pop(number, None) is not None:  # another run has answered what failed here
                self.failures.count -= 1
            if self._sources[number] is None:
                about = {name: table[name][row].as_py() for name in ("status", "answer", "attended_share")}
                expected = self.questions[self.pairs[number].order]["expected"]
                self.tally.add(Tally.of([{**about, "expected": expected}]))
            if isinstance(source, AnswerPart) or self._sources[number] is None:
                self._sources[number] = source
        return all_asked

    def _write(self, attempt: str) -> tuple[list[AnswerPart], list[tuple[int, AnswerPart]]]:
        """Write the parts of a run; also which pair went into which."""
        assert self.store is not None
        parts: list[AnswerPart] = []
        placed: list[tuple[int, AnswerPart]] = []
        tables: list[pa.Table] = []
        numbers: list[int] = []
        for found, table in self._new_tables():
            tables.append(table)
            numbers += found
            if sum(t.num_rows for t in tables) >= _PART_ROWS or sum(t.nbytes for t in tables) >= _PART_BYTES:
                parts.append(self.store.put(pa.concat_tables(tables), attempt=attempt, number=len(parts)))
                placed += [(number, parts[-1]) for number in numbers]
                tables, numbers = [], []
        if tables:
            parts.append(self.store.put(pa.concat_tables(tables), attempt=attempt, number=len(parts)))
            placed += [(number, parts[-1]) for number in numbers]
        return parts, placed

    def _new_tables(self) -> Iterator[tuple[list[int], pa.Table]]:
        """Rows that are not the latest of their pair yet, and whose they are."""
        by_source: dict[AnswerPart | str, set[int]] = defaultdict(set)
        for number, source in enumerate(self._sources):
            new = self._latest[self._pair_key(number)] != (self.pairs[number].key, True)
            if new and isinstance(source, AnswerPart | str) and number not in self._reasons:
                by_source[source].add(number)
        for source, wanted in by_source.items():
            yield self._pick(source, wanted)
        failed = self._failed_rows()
        while chunk := list(itertools.islice(failed, WINDOW_ROWS)):
            rows = [row for _, row in chunk]
            yield [number for number, _ in chunk if number >= 0], pa.Table.from_pylist(rows, STORED_ANSWERS)

    def _failed_rows(self) -> Iterator[tuple[int, Row]]:
        """The failed rows that are new, and their pairs' numbers; -1 of refused ones."""
        for number in self._reasons:
            content = self.pairs[number].stored.content_sha256
            yield from self._if_new(number, self._pair_key(number), self._failed_row(number), content)
        for refused in self._kept:
            yield from self._if_new(-1, self._refused_key(refused), self._refused_row(refused), None)

    def _if_new(self, number: int, pair: bytes, row: Row, content_sha256: str | None) -> Iterator[tuple[int, Row]]:
        key = self._keys.failure(row["question_id"], row["document_id"], row["reason"])
        if self._latest[pair] != (key, False):
            yield number, {**row, "content_sha256": content_sha256, "answer_key": key}

    def _failed_row(self, number: int) -> Row:
        pair = self.pairs[number]
        about: Row = {"document_id": pair.stored.document_id, "index": pair.stored, "reason": self._reasons[number]}
        return failed_row(self.questions[pair.order], recipe=self.recipe, model=self._model, **about)

    def _refused_row(self, row: Refused) -> Row:
        about: Row = {"document_id": row.document_id, "reason": row.reason}
        return failed_row(self.questions[row.order], recipe=self.recipe, model=self._model, **about)

    def _pair_key(self, number: int) -> bytes:
        pair = self.pairs[number]
        return pair_key(self.questions[pair.order]["question_id"], pair.stored.document_id)

    def _refused_key(self, row: Refused) -> bytes:
        return pair_key(self.questions[row.order]["question_id"], row.document_id)

    def _name(self, order: int, document_id: str | None) -> str:
        return f"{self.questions[order]['question_id']!r} on {document_id!r}"
