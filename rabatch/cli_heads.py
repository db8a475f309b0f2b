"""The options of `rabatch build` and `rabatch answer` that say which KV heads stream."""

from __future__ import annotations

import argparse
from typing import Any


def add_heads(group: argparse._ArgumentGroup, do: str) -> None:
    """Add the options to a group; `do` says what heads do with the static set."""
    text = f"folder with full_attention_heads.tsv: heads with a low gate {do} the static set only; or demo"
    group.add_argument("--head-pattern", metavar="PATH", help=text)
    kept = group.add_mutually_exclusive_group()
    kept.add_argument("--sparsity", type=float, metavar="X", help="share of the heads that stream, by lowest gate")
    kept.add_argument("--threshold", type=float, metavar="X", help="least gate of a head that does not stream")


def heads_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of `BuildConfig` and `Recipe` that they stand for."""
    names = {"head_pattern": "head_pattern", "head_sparsity": "sparsity", "head_threshold": "threshold"}
    return {field: getattr(arguments, name) for field, name in names.items()}
