"""Head patterns: the published format, read and written, gates to true and false, and the fingerprint."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rabatch.cli_arguments import Parser, add_build, build_settings
from rabatch.config import BuildConfig, ModelConfig, Recipe
from rabatch.errors import ConfigError
from rabatch.fingerprint import index_fields, model_fields
from rabatch.head_pattern import pattern_of, read_gates, resolve, write_gates
from rabatch.storage.manifest import fingerprint_of

DEMO = ModelConfig(device="cpu", dtype="float32")
GATES = np.array([[0.0, 0.9, 0.25], [1.0, 0.5, 0.75]])


def published(folder: Path, text: str, config: str = '{"sink_size": 128, "recent_size": 256, "lr": 0.02}') -> Path:
    (folder / "config.json").write_text(config)
    (folder / "full_attention_heads.tsv").write_text(text)
    return folder


def test_a_published_pattern_is_read(tmp_path: Path) -> None:
    """As numpy's savetxt writes it; learned gates may lie a little outside of [0, 1]."""
    folder = published(
        tmp_path,
        "6.054687500000000000e-01\t-1.5258789e-04\t9.687500000000000000e-01\n"
        "1.000000000000000000e+00\t1.001e+00\t4.310607910156250000e-04\n",
    )
    gates, about = read_gates(folder)
    assert gates.tolist() == [[0.60546875, 0.0, 0.96875], [1.0, 1.0, 0.00043106079101562500]]
    assert (about["sink_size"], about["recent_size"]) == (128, 256)


@given(st.integers(1, 4), st.integers(1, 5), st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, layers: int, heads: int, data: st.DataObject
) -> None:
    row = st.lists(st.floats(0, 1), min_size=heads, max_size=heads)
    gates = data.draw(st.lists(row, min_size=layers, max_size=layers))
    folder = tmp_path_factory.mktemp("pattern")
    write_gates(folder / "new", gates, sink_tokens=4, window_tokens=8, about={"steps": 2000})
    found, about = read_gates(folder / "new")
    assert found.tolist() == gates
    assert about == {"steps": 2000, "sink_size": 4, "recent_size": 8}
    assert np.loadtxt(folder / "new" / "full_attention_heads.tsv", delimiter="\t", ndmin=2).tolist() == gates


@pytest.mark.parametrize(
    ("text", "config", "message"),
    [
        ("1\t0\n1\n", "{}", "row of gates per layer"),
        ("1\tx\n", "{}", "numbers between tabs"),
        ("1 0\n", "{}", "numbers between tabs"),
        ("nan\t0\n", "{}", "finite"),
        ("", "{}", "finite"),
        ("1\t0\n", "{", "must be a folder with"),
        ("1\t0\n", "[]", "must be a JSON object"),
    ],
)
def test_what_is_no_pattern_is_refused(tmp_path: Path, text: str, config: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        BuildConfig(head_pattern=published(tmp_path, text, config), head_sparsity=0.5)
    assert "head_pattern" in str(caught.value)
    with pytest.raises(ConfigError, match=r"full_attention_heads\.tsv"):
        BuildConfig(head_pattern=str(tmp_path / "nothing"), head_sparsity=0.5)


def test_a_threshold_keeps_gates_that_reach_it() -> None:
    assert resolve(GATES, threshold=0.5) == ((False, True, False), (True, True, True))
    assert resolve(GATES, threshold=0.0) == ((True,) * 3,) * 2


@pytest.mark.parametrize(
    ("sparsity", "streaming"), [(0.0, 0), (0.2, 1), (0.4, 2), (0.5, 3), (0.8, 4), (0.99, 5), (1.0, 6)]
)
def test_a_sparsity_is_the_quantile_of_all_gates(sparsity: float, streaming: int) -> None:
    """The lowest gates stream; numpy's quantile lies between gates, and at 0 and 1 none and all do."""
    kept = np.array(resolve(GATES, sparsity=sparsity))
    assert (~kept).sum() == streaming
    if 0 < streaming < 6:
        assert GATES[~kept].max() < GATES[kept].min()


def test_equal_gates_are_told_apart_and_always_alike() -> None:
    """Without it, all of many heads whose gate is 1 would pass a quantile of 1, and sparsity would mean nothing."""
    gates = np.ones((8, 8))
    gates[:2] = 0
    kept = np.array(resolve(gates, sparsity=0.5))
    assert (~kept).sum() == 32
    assert not kept[:2].any()  # gates that differ by more than the noise keep their order
    assert resolve(gates, sparsity=0.5) == resolve(gates.copy(), sparsity=0.5)
    assert resolve(gates, sparsity=0.5, seed=1) != resolve(gates, sparsity=0.5)
    assert (gates[2:] == 1).all()  # and the gates stay as they are
    mixed = kept.any(axis=1) & ~kept.all(axis=1)
    assert mixed.sum() == 0  # 16 heads of the six layers stream: two layers, not some heads of each


def test_true_and_false_need_no_threshold(tmp_path: Path) -> None:
    rows = ((True, False), (True, True))
    assert pattern_of([[True, False], [1, 1.0]]) == rows
    write_gates(tmp_path, rows, sink_tokens=1, window_tokens=1)
    assert pattern_of(tmp_path) == rows
    with pytest.raises(ConfigError, match="holds gates between 0 and 1"):
        pattern_of([[0.5, 1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_sparsity": 0.5}, "needs a head_pattern"),
        ({"head_threshold": 0.5}, "needs a head_pattern"),
        ({"head_pattern": GATES.tolist(), "head_sparsity": 0.5, "head_threshold": 0.5}, "one of both"),
        ({"head_pattern": GATES.tolist(), "head_sparsity": 1.5}, "head_sparsity"),
        ({"head_pattern": GATES.tolist(), "head_threshold": True}, "head_threshold"),
        ({"head_pattern": GATES.tolist(), "head_threshold": float("nan")}, "head_threshold"),
        ({"head_pattern": [[]]}, "head_pattern"),
        ({"head_pattern": [["a"]]}, "head_pattern"),
        ({"head_pattern": 5}, "head_pattern"),
    ],
)
def test_settings_that_make_no_pattern_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**options)


def test_settings_hold_true_and_false_and_travel(tmp_path: Path) -> None:
    """To an actor on a machine without the file, and through JSON."""
    write_gates(tmp_path, GATES, sink_tokens=1, window_tokens=1)
    build = BuildConfig(head_pattern=tmp_path, head_sparsity=0.5)
    assert build.head_pattern == resolve(GATES, sparsity=0.5)
    assert BuildConfig.from_dict(json.loads(json.dumps(build.to_dict()))) == build
    assert dataclasses.replace(build, sink_tokens=5).head_pattern == build.head_pattern
    assert [build.streaming_heads(layer) for layer in (0, 1)] == [(0, 2), (1,)]
    assert BuildConfig().streaming_heads(7) == ()


def test_the_fingerprint_goes_by_what_streams_and_not_by_the_file(tmp_path: Path) -> None:
    shape = (4, 2)
    plain = index_fields(DEMO, BuildConfig())
    assert not {"head_pattern", "head_sparsity", "head_threshold"} & set(plain["build"])
    kept = np.ones(shape)
    assert index_fields(DEMO, BuildConfig(head_pattern=kept)) == plain  # nothing streams, so nothing changes
    kept[3, 1] = 0.25
    for name in ("one", "other"):
        write_gates(tmp_path / name, kept - (name == "other") * 0.1, sink_tokens=1, window_tokens=1)
    made = [
        fingerprint_of(index_fields(DEMO, BuildConfig(head_pattern=tmp_path / name, head_threshold=0.5)))
        for name in ("one", "other")
    ]
    assert made[0] == made[1] != fingerprint_of(plain)
    kept[2, 1] = 0
    assert fingerprint_of(index_fields(DEMO, BuildConfig(head_pattern=kept, head_threshold=0.5))) != made[0]


def test_a_pattern_of_another_shape_names_both() -> None:
    with pytest.raises(ConfigError, match="the pattern has 2 layers of 3 KV heads, the model 4 layers of 2"):
        index_fields(DEMO, BuildConfig(head_pattern=GATES, head_sparsity=0.5))


def test_the_command_takes_a_pattern(tmp_path: Path) -> None:
    write_gates(tmp_path, GATES, sink_tokens=1, window_tokens=1)
    parser = Parser()
    add_build(parser)
    given_path = ["documents", "--store", "s", "--head-pattern", str(tmp_path)]
    config = build_settings(parser.parse_args([*given_path, "--threshold", "0.5"]))["config"]
    assert config.head_pattern == resolve(GATES, threshold=0.5)
    assert build_settings(parser.parse_args([*given_path, "--sparsity", "0.5"]))["config"].head_pattern is not None
    with pytest.raises(SystemExit):
        parser.parse_args([*given_path, "--threshold", "0.5", "--sparsity", "0.5"])


def test_the_demo_model_brings_its_pattern() -> None:
    """Learned with these very weights: after training the model anew, `rabatch calibrate --out` has to follow."""
    gates, about = read_gates("demo")
    assert gates.shape == (4, 2)
    assert about["model_sha256"] == fingerprint_of(model_fields(DEMO))
    build = BuildConfig(head_pattern="demo", head_sparsity=0.5)
    assert sum(len(build.streaming_heads(layer)) for layer in range(4)) == 4
    assert Recipe(head_pattern="demo", head_sparsity=0.5).head_pattern == build.head_pattern
