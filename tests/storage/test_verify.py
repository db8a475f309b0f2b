"""`verify` finds what is wrong and names it."""

import dataclasses
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from storage_samples import make_blocks, make_tokens, prepare

from rabatch.errors import StoreError
from rabatch.storage.store import IndexStore
from rabatch.storage.verify import verify


@pytest.fixture
def store(tmp_path: Path) -> IndexStore:
    return IndexStore(tmp_path, create=True)


def test_a_sound_store_has_no_problems(store: IndexStore) -> None:
    seen: list[tuple[str, int]] = []
    manifests = [store.commit(prepare(store, f"doc {i}", heads_per_part=1)[0]) for i in range(2)]
    assert verify(store, progress=lambda path, size: seen.append((path, size))) == []
    assert sorted(seen) == sorted((p.path, p.bytes) for m in manifests for p in m.parts)
    assert verify(IndexStore("memory://empty-store", create=True)) == []


def test_every_problem_is_named(store: IndexStore) -> None:
    a, b, c = (store.commit(prepare(store, name)[0]) for name in "abc")
    store.folder.delete(a.parts[1].path)
    changed = bytearray(store.folder.read(a.parts[3].path))
    changed[200] ^= 1
    store.folder.write(a.parts[3].path, bytes(changed))
    store.folder.write(c.path, b"{}")
    problems = verify(store)
    assert {(p.document_id, p.manifest_path, p.part) for p in problems} == {
        ("a", a.path, a.parts[1].path),
        ("a", a.path, a.parts[3].path),
        ("", c.path, ""),
    }
    assert {next(w for w in ("is missing; w", "sha256", "format_version") if w in p.reason) for p in problems} == {
        "is missing; w",
        "sha256",
        "format_version",
    }
    assert all("\n" not in p.reason for p in problems)
    assert b.document_id not in {p.document_id for p in problems}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_must_be_finite(store: IndexStore, bad: float) -> None:
    manifest, _ = prepare(store)
    block = make_blocks()[0]
    block.values[1, 2, 3] = bad
    part = store.put_layer(block, document_id="doc", fingerprint=manifest.fingerprint, attempt=store.new_attempt())
    store.commit(dataclasses.replace(manifest, parts=(manifest.parts[0], part, *manifest.parts[2:])))
    assert [(p.part, p.reason) for p in verify(store)] == [(part.path, "values: 1 numbers are not finite")]


def test_offsets_must_lie_in_the_text(store: IndexStore) -> None:
    manifest, _ = prepare(store)
    tokens = make_tokens(20)
    tokens.char_end[-1] = manifest.text_chars + 1
    part = store.put_tokens(tokens, document_id="doc", fingerprint=manifest.fingerprint, attempt=store.new_attempt())
    store.commit(dataclasses.replace(manifest, parts=(part, *manifest.parts[1:])))
    (problem,) = verify(store)
    assert (problem.part, problem.reason[:10]) == (part.path, "char_start")


def test_graphs_are_checked_by_the_callers_rule(store: IndexStore) -> None:
    store.commit(prepare(store)[0])
    calls = []

    def check(neighbors: np.ndarray, entries: np.ndarray) -> int:
        calls.append((neighbors.shape, entries.shape))
        return 5 if len(calls) == 2 else 0

    (problem,) = verify(store, check_graph=check)
    assert problem.reason == "head 1: 5 of 12 keys are unreachable"
    assert calls == [((12, 4), (3,))] * 4  # two full layers of two heads; the sliding one has no graph


def test_what_cannot_be_read_is_not_called_damaged(store: IndexStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken connection must not let `verify --remove-damaged` withdraw a sound index."""
    manifest = store.commit(prepare(store, "a")[0])
    open_ = store.folder.open

    def failing(path: str) -> BinaryIO:
        if path == manifest.parts[1].path:
            raise StoreError("store", path, "the connection broke")
        return open_(path)

    monkeypatch.setattr(store.folder, "open", failing)
    (problem,) = verify(store)
    assert (problem.part, problem.damaged) == (manifest.parts[1].path, False)
    monkeypatch.setattr(store.folder, "open", open_)
    store.folder.delete(manifest.parts[1].path)
    (problem,) = verify(store)
    assert problem.damaged
    store.withdraw(problem.manifest_path)
    assert list(store.manifests()) == []
    with pytest.raises(StoreError, match="is not a manifest"):
        store.withdraw(manifest.parts[0].path)
