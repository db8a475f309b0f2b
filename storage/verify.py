"""Read a whole store back and say what is wrong with it. Slow by design: every byte is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rabatch.errors import IntegrityError, StoreError
from rabatch.storage.blocks import LayerBlock
from rabatch.storage.manifest import Manifest, Part
from rabatch.storage.store import IndexStore

CheckGraph = Callable[[NDArray[np.int32], NDArray[np.int32]], int]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Args:
        document_id: Empty if the manifest itself cannot be read.
        part: Path of the part; empty if it is the manifest.
        reason: In one line.
        damaged: Stored bytes are wrong. False: they could not be read, or are of another format.
    """

    document_id: str
    manifest_path: str
    part: str
    reason: str
    damaged: bool


def verify(
    store: IndexStore,
    *,
    progress: Callable[[str, int], None] | None = None,
    check_graph: CheckGraph | None = None,
) -> list[Problem]:
    """Check every manifest and every part: size, SHA-256, shapes, finite values, neighbors in range.

    Args:
        progress: Called after each part with its path and bytes.
        check_graph: Given neighbors [m, degree] and entries [E] of one head, the number of keys no search reaches.

    Returns:
        The problems, by manifest; an empty list for a sound store.
    """
    problems: list[Problem] = []

    def damaged(path: str, error: StoreError) -> None:
        wrong = isinstance(error, IntegrityError)
        problems.append(Problem(document_id="", manifest_path=path, part="", reason=str(error), damaged=wrong))

    for manifest in store.manifests(on_error=damaged):
        for part in manifest.parts:
            wrong = True
            try:
                reasons = _check_part(store, manifest, part, check_graph)
            except StoreError as error:
                reasons, wrong = [str(error)], isinstance(error, IntegrityError)
            where = {"document_id": manifest.document_id, "manifest_path": manifest.path, "part": part.path}
            problems += [Problem(**where, reason=reason, damaged=wrong) for reason in reasons]
            if progress is not None:
                progress(part.path, part.bytes)
    return problems


def _check_part(store: IndexStore, manifest: Manifest, part: Part, check_graph: CheckGraph | None) -> list[str]:
    if part.kind == "tokens":
        tokens = store.read_tokens(manifest)
        starts, ends = tokens.char_start, tokens.char_end
        if bool(np.any(starts > ends)) or bool(np.any(ends > manifest.text_chars)):
            return [f"char_start, char_end: must be ascending and within {manifest.text_chars} characters"]
        return []
    block = store.read_part(manifest, part)
    reasons = []
    for name, tensor in (("keys", block.keys), ("values", block.values)):
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            reasons.append(f"{name}: {bad} numbers are not finite")
    return reasons + _check_graphs(block, check_graph)


def _check_graphs(block: LayerBlock, check_graph: CheckGraph | None) -> list[str]:
    """Neighbors are known to be in range: `decode_layer` refuses others."""
    if check_graph is None or block.neighbors is None or block.entries is None or block.index_rows == 0:
        return []
    reasons = []
    for i in range(block.n_heads):
        unreachable = check_graph(block.neighbors[i], block.entries[i])
        if unreachable:
            reasons.append(f"head {block.head_start + i}: {unreachable} of {block.index_rows} keys are unreachable")
    return reasons
