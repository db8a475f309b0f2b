"""What actors and driver tell each other: one-row tables, reasons of failures, errors that end the job.

Imports nothing heavy, so that a worker loads only what its own actor needs.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

import pyarrow as pa

from rabatch.config import ModelConfig
from rabatch.errors import ModelError, RabatchError

_TYPES: dict[type, pa.DataType] = {
    bytes: pa.large_binary(),
    str: pa.large_string(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
}


def one_row(row: dict[str, Any]) -> pa.Table:
    """`row` as a table. None is a null string: every row is a block of its own, so types need not agree."""
    return pa.table(
        {name: pa.array([value], _TYPES.get(type(value), pa.large_string())) for name, value in row.items()}
    )


def reason(error: BaseException) -> str:
    """Why a document or question failed, in one line that names the fix."""
    if isinstance(error, RabatchError):
        return " ".join(str(error).split())
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        return "out of memory; lower prefill_chunk_tokens, use fewer actors, or a larger machine"
    text = " ".join(str(error).split())[:300]
    return f"unexpected {name}: {text}; run it again, and report it if it stays"


def fatal(error: BaseException, model: ModelConfig) -> str:
    """An error of the model's as a row carries it; `raise_fatal` raises it again on the driver."""
    if isinstance(error, RabatchError):
        return json.dumps([error.field, str(error.value), error.fix])
    return json.dumps(["model", model.name, f"cannot be loaded: {reason(error)}"])


def raise_fatal(text: str) -> NoReturn:
    """Raise what `fatal` wrote down."""
    raise ModelError(*json.loads(text))
