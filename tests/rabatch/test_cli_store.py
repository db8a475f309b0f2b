"""`rabatch inspect | compact | gc` on small made-up stores: what is printed, exit codes, one-line errors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from rabatch.cli import main
from rabatch.records import STORED_ANSWERS
from rabatch.storage.answers import AnswerStore
from rabatch.storage.manifest import Geometry, Manifest, Part, document_key, fingerprint_of
from rabatch.storage.store import IndexStore

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def put(
    store: IndexStore,
    document_id: str,
    *,
    model: str = "demo",
    index: str = "graph",
    days: float = 0,
    build: int = 0,
    text: str = "text",
    commit: bool = True,
) -> Manifest:
    """An index of one layer and head whose parts hold nothing that can be decoded."""
    fields = {"model": model, "index": index, "build": build}
    fingerprint = fingerprint_of(fields)
    folder = f"parts/{fingerprint[:16]}/{document_key(document_id)}/{store.new_attempt()}"
    for name in ("tokens", "layer"):
        store.folder.write(f"{folder}/{name}.parquet", b"x" * 100)
    digest = hashlib.sha256(b"x" * 100).hexdigest()
    shape = {"n_layers": 1, "n_kv_heads": 1, "n_query_heads": 1, "head_dim": 1, "kv_dtype": "bfloat16"}
    about = {"bytes": 100, "sha256": digest, "rows": 4}
    manifest = Manifest(
        document_id=document_id,
        content_sha256=hashlib.sha256(text.encode()).hexdigest(),
        fingerprint=fingerprint,
        fingerprint_fields=fields,
        context_tokens=4,
        text_chars=4,
        created_at=(datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds"),
        geometry=Geometry(
            **shape, sink_tokens=1, window_tokens=1, index=index, degree=int(index == "graph"), sliding_windows=(0,)
        ),  # type: ignore[arg-type]
        parts=(
            Part(kind="tokens", path=f"{folder}/tokens.parquet", **about),  # type: ignore[arg-type]
            Part(kind="layer", path=f"{folder}/layer.parquet", layer=0, head_start=0, head_stop=1, **about),  # type: ignore[arg-type]
        ),
        metadata={"n": 1},
        stats={"model": model},
    )
    return store.commit(manifest) if commit else manifest


@pytest.fixture
def store(tmp_path: Path) -> IndexStore:
    """Five indexes of three documents, in an order that is not theirs."""
    made = IndexStore(tmp_path / "index", create=True)
    put(made, "b\u202e\n", model="hub/large", days=3)
    put(made, "a", days=10)
    put(made, "a", index="none", days=1)
    put(made, "a", days=2, build=1)
    put(made, "Größe", days=20)
    return made


def documents(out: str) -> list[str]:
    return [row["document_id"] for row in json.loads(out)["documents"]]


@pytest.mark.parametrize("compacted", [False, True])
def test_inspect_lists_the_same_with_and_without_a_catalog(cli: Cli, store: IndexStore, compacted: bool) -> None:
    if compacted:
        assert cli("compact", "--store", store.url)[0] == 0
    code, out, err = cli("inspect", "--store", store.url, "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    rows = json.loads(out)["documents"]
    assert [row["document_id"] for row in rows] == ["Größe", "a", "a", "a", "b\u202e\n"]
    assert [row["created_at"] for row in rows] == [
        m.created_at for m in sorted(store.manifests(), key=lambda m: (m.document_id, m.created_at))
    ]
    manifests = {m.path: m for m in store.manifests()}
    for row in rows:
        manifest = manifests[row["manifest"]]
        assert row["fingerprint"] == manifest.fingerprint
        assert row["content_sha256"] == manifest.content_sha256
        assert (row["context_tokens"], row["text_chars"], row["stored_bytes"], row["parts"]) == (4, 4, 200, 2)
        assert (row["sink_tokens"], row["window_tokens"], row["dtype"], row["metadata"]) == (1, 1, "bfloat16", {"n": 1})
        assert (row["index"], row["degree"]) == (manifest.geometry.index, manifest.geometry.degree)
        assert (row["heads"], row["streaming_heads"]) == (1, 0)
    code, out, _ = cli("inspect", "--store", store.url)
    lines = out.splitlines()
    heading = ["document", "tokens", "bytes", "index", "streaming", "model", "dtype", "built", "fingerprint"]
    assert lines[0].split() == heading
    assert [line.split()[0] for line in lines[1:]] == ["Größe", "a", "a", "a", "b\\u202e\\n", "5"]
    assert lines[-1] == "5 indexes, 1,000 bytes"
    assert " 20 days ago " in lines[1]
    assert len({line.index("bfloat16") for line in lines[1:5]}) == 1


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        (["--document", "a"], "aaa"),
        (["--document", "a", "--index", "none"], "a"),
        (["--document", "nowhere"], ""),
        (["--document", ""], ""),
        (["--model", "demo"], "Gaaa"),
        (["--model", "large"], "b"),
        (["--model", "hub/large"], "b"),
        (["--index", "graph"], "Gaab"),
        (["--newer-than", "36h"], "a"),
        (["--older-than", "5d"], "Ga"),
        (["--older-than", "5d", "--newer-than", "2w"], "a"),
        (["--newer-than", "1m"], ""),
    ],
)
def test_inspect_filters(cli: Cli, store: IndexStore, chosen: list[str], wanted: str) -> None:
    code, out, _ = cli("inspect", "--store", store.url, "--json", *chosen)
    assert (code, "".join(name[0] for name in documents(out))) == (0, wanted)
    code, out, _ = cli("inspect", "--store", store.url, *chosen)
    assert (code, out.splitlines()[-1]) == (0, f"{len(wanted)} indexes, {200 * len(wanted):,} bytes")


def test_compact(cli: Cli, store: IndexStore) -> None:
    assert cli("compact", "--store", store.url)[1] == "5 indexes, 5 manifests read; generation 1 written\n"
    assert cli("compact", "--store", store.url)[1] == "5 indexes, 0 manifests read; generation 1 was up to date\n"
    manifest = put(store, "bad")
    store.folder.write(manifest.path, b"{")
    code, out, _ = cli("compact", "--store", store.url, "--json")
    done = json.loads(out)
    assert (code, done["entries"], done["written"], len(done["damaged"])) == (1, 5, False, 1)
    code, out, _ = cli("compact", "--store", store.url)
    assert (code, out.startswith(f"damaged: {manifest.path}")) == (1, True)
    assert cli("inspect", "--store", store.url)[0] == 1


def test_compact_of_an_empty_store(cli: Cli, tmp_path: Path) -> None:
    IndexStore(tmp_path, create=True)
    code, out, _ = cli("compact", "--store", tmp_path)
    assert (code, out) == (0, "0 indexes, 0 manifests read; generation 0 not needed: the store is empty\n")
    assert cli("inspect", "--store", tmp_path)[1].splitlines()[-1] == "0 indexes, 0 bytes"
    assert documents(cli("inspect", "--store", tmp_path, "--json")[1]) == []


def test_gc(cli: Cli, store: IndexStore) -> None:
    loose = put(store, "interrupted", commit=False)
    before = store.folder.list()
    code, out, _ = cli("gc", "--store", store.url)
    assert (code, out) == (
        0,
        "removed 0 attempts, 0 bytes, and 0 old records; 1 attempts are within the grace period\n",
    )
    code, out, _ = cli("gc", "--store", store.url, "--grace-hours", 0, "--dry-run", "--json")
    report = json.loads(out)
    folder = loose.parts[0].path.rsplit("/", 1)[0]
    assert (code, report["dry_run"], report["attempts"]) == (0, True, [{"path": folder, "files": 2, "bytes": 200}])
    assert store.folder.list() == before
    code, out, _ = cli("gc", "--store", store.url, "--grace-hours", 0)
    first, last = out.splitlines()
    assert (code, first) == (0, f"removed: {folder} (2 files, 200 bytes)")
    assert last.startswith("removed 1 attempts, 200 bytes")
    assert store.folder.list() == {path: size for path, size in before.items() if not path.startswith(folder)}


def test_gc_of_superseded_indexes(cli: Cli, store: IndexStore) -> None:
    manifests = len(store.folder.list("manifests"))
    code, out, _ = cli("gc", "--store", store.url, "--superseded", "--dry-run")
    assert (code, out.splitlines()[0].startswith("would withdraw: manifests/")) == (0, True)
    assert len(store.folder.list("manifests")) == manifests
    code, out, _ = cli("gc", "--store", store.url, "--superseded", "--json")
    report = json.loads(out)
    assert (code, len(report["withdrawn"]), report["attempts"], report["waiting"]) == (0, 1, [], 1)
    code, out, _ = cli("inspect", "--store", store.url, "--document", "a", "--json")
    assert [(row["index"], row["degree"]) for row in json.loads(out)["documents"]] == [("graph", 1), ("none", 0)]
    code, out, _ = cli("gc", "--store", store.url, "--superseded")
    assert "withdrew 0 superseded indexes" in out


def test_gc_names_what_is_damaged(cli: Cli, store: IndexStore) -> None:
    manifest = put(store, "bad")
    store.folder.write(manifest.path, b"{")
    code, out, _ = cli("gc", "--store", store.url, "--superseded", "--grace-hours", 0)
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("damaged")]
    assert manifest.path in line
    assert {part.path for part in manifest.parts} <= set(store.folder.list("parts"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "--newer-than", "7"], "--newer-than = '7': must be a number and s, m, h, d or w"),
        (["inspect", "--older-than", "-1d"], "--older-than"),
        (["inspect", "--older-than", "999999w"], "is before the year 1"),
        (["inspect", "--index", "tree"], "invalid choice: 'tree'"),
        (["gc", "--grace-hours", "-1"], "--grace-hours = -1.0: must be a number of hours, 0 or more"),
        (["gc", "--grace-hours", "nan"], "--grace-hours = nan"),
        (["gc", "--grace-hours", "inf"], "--grace-hours = inf"),
        (["gc", "--grace-hours", "a day"], "invalid float value"),
    ],
)
def test_wrong_options_are_one_line(cli: Cli, store: IndexStore, arguments: list[str], message: str) -> None:
    code, out, err = cli(*arguments, "--store", store.url)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert message in err


def test_a_store_that_is_not_there_is_one_line(cli: Cli, tmp_path: Path) -> None:
    for command in ("inspect", "compact", "gc"):
        code, out, err = cli(command, "--store", tmp_path / "nowhere")
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert "is no rabatch store" in err


def test_gc_stops_before_a_manifest_of_nobody_knows_whom(cli: Cli, store: IndexStore) -> None:
    store.folder.write("manifests/notes.json", b"{}")
    code, out, err = cli("gc", "--store", store.url)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "manifests/notes.json" in err


def test_a_damaged_catalog_is_said_on_stderr(cli: Cli, store: IndexStore, caplog: pytest.LogCaptureFixture) -> None:
    cli("compact", "--store", store.url)
    store.folder.write("catalog/00000001.json", b"{")
    code, out, _ = cli("inspect", "--store", store.url, "--json")
    assert (code, len(documents(out))) == (0, 5)
    assert ["`rabatch compact`" in message for message in caplog.messages] == [True]


def test_gc_of_an_answers_store(tmp_path, capsys):
    store = AnswerStore(tmp_path, create=True)
    store.put_pending("batch", pa.Table.from_pylist([], STORED_ANSWERS))
    assert main(["gc", "--answers", str(tmp_path), "--grace-hours", "0", "--dry-run"]) == 0
    assert "would remove 0 attempts" in capsys.readouterr().out
    assert store.pending() == ["batch"]
    assert main(["gc", "--answers", str(tmp_path), "--grace-hours", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["others"] == ["pending/batch.parquet"]
    assert store.pending() == []
    assert main(["gc", "--answers", str(tmp_path), "--superseded"]) == 2
    assert "--superseded" in capsys.readouterr().err
