"""Arrow schemas of what goes in and comes out: documents, questions, build reports, answers."""

from __future__ import annotations

import pyarrow as pa

DOCUMENTS = pa.schema(
    [pa.field("document_id", pa.string(), nullable=False), pa.field("text", pa.large_string(), nullable=False)]
)
"""Required columns of a corpus. Extra columns are kept as the document's metadata."""

QUESTIONS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("document_id", pa.string()),  # null: the question is asked of every document
        pa.field("expected", pa.string()),
        pa.field("answer_prefix", pa.string()),  # how the answer begins: put after the prompt, no part of the answer
        pa.field("max_new_tokens", pa.int64()),  # longest answer to this question; null: `GenerationSettings`'
    ]
)

BUILD_REPORT = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),  # where the document came from: file and row
        pa.field("status", pa.string(), nullable=False),  # built | skipped | failed
        pa.field("reason", pa.string()),
        pa.field("context_tokens", pa.int64(), nullable=False),
        pa.field("stored_bytes", pa.int64(), nullable=False),
        pa.field("prefill_s", pa.float64(), nullable=False),
        pa.field("graph_s", pa.float64(), nullable=False),
        pa.field("fingerprint", pa.string(), nullable=False),
    ]
)

EVIDENCE = pa.list_(
    pa.struct([pa.field("start", pa.int64()), pa.field("end", pa.int64()), pa.field("score", pa.float32())])
)
"""Character spans of the document's text, `start` inclusive, `end` exclusive; scores sum to at most 1."""

ANSWERS = pa.schema(
    [
        pa.field("question_id", pa.string(), nullable=False),
        pa.field("document_id", pa.string()),
        pa.field("question", pa.string()),
        pa.field("expected", pa.string()),
        pa.field("status", pa.string(), nullable=False),  # ok | failed
        pa.field("reason", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("finish_reason", pa.string()),  # stop | length
        pa.field("evidence", EVIDENCE),
        pa.field("context_tokens", pa.int64()),
        pa.field("question_tokens", pa.int64()),
        pa.field("answer_tokens", pa.int64()),
        pa.field(
            "attended_share", pa.float64()
        ),  # context keys attended / context keys, mean over queries, heads, layers
        pa.field("mass_share", pa.float64()),  # softmax mass held by attended keys, mean likewise; null: not estimated
        pa.field("seconds", pa.float64()),  # the question's share of its batch
        pa.field("recipe", pa.string()),
        pa.field("model", pa.string()),
        pa.field("fingerprint", pa.string()),
    ]
)

EXPORTED_ANSWERS = pa.schema([*ANSWERS, pa.field("run", pa.int64()), pa.field("answered_at", pa.string())])
"""Columns of what `rabatch answers` writes: which run of the answers store a row is of, and when that was committed."""

STORED_ANSWERS = pa.schema(
    [
        *ANSWERS,
        pa.field("content_sha256", pa.string()),  # of the document's text that was asked; null: it was not asked
        pa.field("answer_key", pa.string(), nullable=False),  # `storage.answers.answer_key` or `failure_key`
    ]
)
"""Columns of an answers store's parts."""
