"""`rabatch demo`: the whole way on synthetic documents, as a user would go it, with a table of what came out."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rabatch.config import GenerationSettings, Resources
from rabatch.demo.corpus import write_corpus
from rabatch.errors import StoreError
from rabatch.traits import Method

RECIPES: tuple[Method, ...] = ("graph", "dense", "streaming")
_SAMPLES = 6
_MAX_NEW_TOKENS = 64


def run_demo(
    *,
    documents: int = 8,
    tokens: int = 8192,
    questions: int = 8,
    seed: int = 0,
    keep: str | None = None,
    store: str | None = None,
    storage_options: dict[str, Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Write a corpus, build its indexes, answer its questions with each of `RECIPES`.

    Args:
        tokens: Of each document, at least.
        questions: About each document.
        keep: Folder for corpus, store and answers. None: a temporary one.
        store: Path or fsspec URL of the index store, which stays. None: in that folder. Parts of a store elsewhere are
            cached in that folder.
        storage_options: Of fsspec, for `store`.
        progress: Bars on stderr.

    Returns:
        What `rabatch demo --json` prints. `seconds.answer`, `attended_share` and `samples` are those of ``graph``;
        sizes are in bytes, `kv_bytes` those of the same tokens' keys and values in bf16.
    """
    from rabatch.jobs.answer import answer
    from rabatch.jobs.build import build

    with ExitStack() as stack:
        folder = Path(keep) if keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rabatch-demo-")))
        if keep and folder.exists() and not folder.is_dir():
            raise StoreError("keep", keep, "is a file; give a folder")
        corpus = write_corpus(
            str(folder / "corpus"), n_documents=documents, tokens=tokens, n_questions=questions, seed=seed
        )
        where: dict[str, Any] = {"store": store or str(folder / "index"), "storage_options": storage_options}
        built = build(corpus["paths"]["documents"], progress=progress, **where)
        answered = {
            method: answer(
                corpus["paths"]["questions"],
                recipe=method,
                generation=GenerationSettings(max_new_tokens=_MAX_NEW_TOKENS),
                output=str(folder / f"answers-{method}"),
                resources=Resources(cache_dir=str(folder / "cache")),
                progress=progress,
                **where,
            )
            for method in RECIPES
        }
        rows = answered["graph"].rows  # read while the folder is there
    return {
        "documents": len(built.rows),
        "tokens": built.tokens,
        "questions": len(rows),
        "exact_match": {method: answered[method].exact_match for method in sorted(RECIPES)},
        "attended_share": answered["graph"].attended_share,
        "attended_shares": {method: answered[method].attended_share for method in sorted(RECIPES)},
        "stored_bytes": built.stored_bytes,
        "kv_bytes": built.kv_bytes,
        "seconds": {
            "build": built.seconds,
            "answer": answered["graph"].seconds,
            **{f"answer_{method}": answered[method].seconds for method in RECIPES if method != "graph"},
        },
        "failed": built.failed + sum(result.failed for result in answered.values()),
        "samples": _samples(rows),
        "folder": keep,
        "store": store,
    }


def _samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    step = max(1, len(rows) // _SAMPLES)
    names = ("document_id", "question", "expected", "answer", "reason")
    return [{name: row[name] for name in names} for row in rows[::step][:_SAMPLES]]


def format_report(report: dict[str, Any]) -> str:
    """The report as a table for people."""
    seconds, stored, kv = report["seconds"], report["stored_bytes"], report["kv_bytes"]
    size = f"{stored / 1e6:,.1f} MB, {stored / kv:.2f} x keys and values in bf16" if kv else f"{stored} bytes"
    lines = [
        f"documents   {report['documents']}",
        f"tokens      {report['tokens']:,}",
        f"build       {seconds['build']:.1f} s, start of Ray and loading of the model included",
        f"stored      {size} ({kv / 1e6:,.1f} MB)",
        f"questions   {report['questions']}",
        "",
        "recipe      exact match   keys attended   seconds",
    ]
    for method in RECIPES:
        match, share = report["exact_match"][method], report["attended_shares"][method]
        took = seconds["answer" if method == "graph" else f"answer_{method}"]
        lines.append(f"{method:<12}{_percent(match):>11}   {_percent(share):>13}   {took:>7.1f}")
    lines += ["", "some questions, answered with graph:"]
    for sample in report["samples"]:
        right = "right" if sample["answer"] == sample["expected"] else f"expected {json.dumps(sample['expected'])}"
        given = sample["answer"] if sample["answer"] is not None else f"failed: {sample['reason']}"
        lines += [f"  {sample['document_id']}: {sample['question']}", f"    {given}  ({right})"]
    if report["failed"]:
        lines += ["", f"{report['failed']} rows failed"]
    if report["folder"]:
        lines += ["", f"kept in {report['folder']}"]
    if report["store"]:
        lines += ["", f"index store {report['store']}"]
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
