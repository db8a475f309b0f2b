"""An evaluation without a model: recipes by name, files of questions, intervals, bytes, tables and the page."""

from __future__ import annotations

import random
import re

import pytest

from rabatch.config import BuildConfig, Recipe
from rabatch.errors import ConfigError
from rabatch.evaluation.definition import read
from rabatch.evaluation.files import csv_rows, file_contexts
from rabatch.evaluation.intervals import Estimate, _student, of_cells, of_contexts, of_differences
from rabatch.evaluation.questions import task_contexts
from rabatch.evaluation.recipes import build_for, named_recipes
from rabatch.evaluation.stored import built_bytes, needed_bytes
from rabatch.storage.manifest import Geometry

HOSTILE = "<script>alert(1)</script>"


# recipes --------------------------------------------------------------------------------------------------------


def test_recipes_by_name():
    found = named_recipes("dense, graph:top_k=50:budget=fixed:estimate=false ,graph:mass=0.9")
    assert list(found) == ["dense", "graph:top_k=50:budget=fixed:estimate=false", "graph:mass=0.9"]
    assert [*found.values()] == [
        Recipe(method="dense"),
        Recipe(method="graph", top_k=50, budget="fixed", estimate=False),
        Recipe(method="graph", mass=0.9),
    ]
    given = {"mine": {"method": "flat", "top_k": 8}, "theirs": Recipe(method="scan"), "text": "dense"}
    assert [recipe.method for recipe in named_recipes(given).values()] == ["flat", "scan", "dense"]
    assert [*named_recipes(["dense", Recipe(method="flat")])] == ["dense", "flat"]


@pytest.mark.parametrize(
    ("recipes", "reason"),
    [
        ("", "name at least one"),
        ("dense,dense", "stands twice"),
        ("grahp", "one of"),
        ("graph:topk=5", "unknown field"),
        ("graph:top_k", "no new field=value"),
        ("graph:top_k=5:top_k=6", "no new field=value"),
        ("graph:top_k=many", "must be a whole number"),
        ("graph:top_k=0", "must be a number >= 1"),
        ("graph:top_k={", "is no value of a field"),
        ("duo+graph", "--head-pattern"),
        ({"x": 3}, "must be METHOD:field=value"),
    ],
)
def test_wrong_recipes_are_named(recipes, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)) as caught:
        named_recipes(recipes)
    assert caught.value.field.startswith("recipes")


def test_duo_gives_a_recipe_its_heads():
    """Those that all recipes share, or its own sparsity or threshold."""
    heads = {"head_pattern": [[1.0, 0.0]], "head_sparsity": None, "head_threshold": 0.5}
    recipe = named_recipes("duo+graph,graph", heads)["duo+graph"]
    assert (recipe.method, recipe.head_pattern) == ("graph", ((True, False),))
    own = named_recipes("duo+scan:head_threshold=0", heads)["duo+scan:head_threshold=0"]
    assert (own.method, own.head_pattern) == ("scan", ((True, True),))
    assert named_recipes("graph", heads) == {"graph": Recipe()}


def test_one_build_serves_all_recipes():
    config = BuildConfig(window_tokens=64)
    assert build_for(named_recipes("dense,graph"), config) == config
    assert build_for(named_recipes("scan")) == BuildConfig()
    assert build_for(named_recipes("dense,h2o"), config) == BuildConfig(window_tokens=64, key_mass=True)


# questions ------------------------------------------------------------------------------------------------------


def test_task_contexts_hold_as_many_questions_as_are_wanted():
    made = list(task_contexts(["niah_multikey_3", "niah_single_1"], [256], samples=5, questions_per_context=3))
    assert [len(asked.questions) for asked in made] == [3, 2, 1, 1, 1, 1, 1]
    assert made[1].document_id == "niah_multikey_3/256/seed-0/00001"
    ids = [question.question_id for asked in made for question in asked.questions]
    assert len(set(ids)) == len(ids)
    question = made[0].questions[0]
    assert question.answers[0] in made[0].text
    assert question.row()["max_new_tokens"] == question.max_new_tokens
    more = list(task_contexts(["niah_multikey_3"], [256], samples=6, questions_per_context=3))
    assert more[0] == made[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tasks": []}, "give at least one"),
        ({"tasks": ["vt", "vt"]}, "stands twice"),
        ({"tasks": ["vtt"]}, "there is no such task"),
        ({"lengths": []}, "give at least one"),
        ({"samples": 0}, "whole number from 1"),
        ({"questions_per_context": 1.5}, "whole number from 1"),
    ],
)
def test_wrong_numbers_are_found_before_anything_is_made(change, reason):
    values = {"tasks": ["vt"], "lengths": [256], "samples": 1, "questions_per_context": 1} | change
    with pytest.raises(ConfigError, match=reason):
        task_contexts(**values)


GOOD = {"context": "The code is 7.", "question": "What is the code?", "answer": "7"}


def one(**change):
    (asked,) = file_contexts([("f:1", GOOD | change, None)])
    return asked.questions[0]


def test_rows_of_a_file_with_the_same_context_are_asked_together():
    rows = [GOOD, GOOD | {"context": "Other."}, GOOD | {"question": "And?", "task": "vt", "length": 4096}, {}]
    made = file_contexts((f"f:{number}", row, None) for number, row in enumerate(rows, 1))
    assert [[question.question_id for question in asked.questions] for asked in made] == [
        ["f:1", "f:3"],
        ["f:2"],
        ["f:4"],
    ]
    assert made[0].text == GOOD["context"]
    third = made[0].questions[1]
    assert (third.task, third.length, third.document_id) == ("vt", 4096, made[0].document_id)
    assert (made[2].document_id, made[2].text, made[2].questions[0].task) == ("", "", "file")


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        ("7", ("7",)),
        (["7", "8"], ("7", "8")),
        ('["7", "8"]', ("7", "8")),
        ("['7', \"it's\"]", ("7", "it's")),
        ("[7, 8.5]", ("7", "8.5")),
        (7, ("7",)),
        ("[see page 7", ("[see page 7",)),
    ],
)
def test_answers_are_one_or_several(given, answers):
    found = one(answer=given)
    assert (found.answers, found.expected, found.error) == (answers, answers[0], None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": None}, "column context is missing or null"),
        ({"context": "  "}, "context is empty"),
        ({"question": 3}, "question is a int"),
        ({"answer": None}, "column answer is missing"),
        ({"answer": []}, "must be a string, or a list of strings"),
        ({"answer": [["7"]]}, "must be a string, or a list of strings"),
        ({"answer": ["7", ""]}, "answer is empty"),
        ({"answer": True}, "must be a string, or a list of strings"),
        ({"answer_prefix": 3}, "answer_prefix is a int"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many'"),
        ({"max_new_tokens": float("nan")}, "max_new_tokens is nan"),
        ({"length": -1}, "length is -1"),
        ({"context": "\udcff"}, "not UTF-8"),
    ],
)
def test_a_wrong_row_says_why_and_is_not_asked(change, reason):
    found = one(**change)
    assert reason in found.error
    assert found.document_id is None


def test_numbers_may_be_text_and_whole_floats():
    found = one(max_new_tokens="8", length=4096.0, answer_prefix=" It is")
    assert (found.max_new_tokens, found.length, found.answer_prefix) == (8, 4096, " It is")


def test_question_answering_is_right_with_any_answer():
    assert (one(task="qa_1").match, one(task="vt").match, one().match) == ("part", "all", "all")


def test_csv():
    text = 'context,question,answer,task\r\n"a\nb",Who?,"[""x"", ""y""]",vt\r\nonly,two\r\nc,Why?,,\r\n'
    rows = list(csv_rows(text.splitlines(keepends=True), "q.csv"))
    assert rows[0] == ("q.csv:1", {"context": "a\nb", "question": "Who?", "answer": '["x", "y"]', "task": "vt"}, None)
    assert rows[1][2] == "has 2 cells where the header has 4; mend the row"
    assert rows[2][1]["answer"] is None
    made = file_contexts(rows)
    assert made[0].questions[0].answers == ("x", "y")
    assert "is no CSV" in next(csv_rows(["a,b\n", '"x"y,z\n'], "q.csv"))[2]
    assert list(csv_rows([], "q.csv")) == []


# intervals ------------------------------------------------------------------------------------------------------


def test_independent_answers_have_wilsons_interval():
    found = of_contexts([[1.0]] * 8 + [[0.0]] * 2)
    assert (found.mean, found.low, found.high) == (
        0.8,
        pytest.approx(0.4902, abs=1e-4),
        pytest.approx(0.9433, abs=1e-4),
    )
    assert of_contexts([[], []]) is None


@pytest.mark.parametrize("score", [0.0, 1.0, 0.5])
def test_where_contexts_do_not_differ_they_are_what_counts(score):
    found, fewer = of_contexts([[score] * 5] * 10), of_contexts([[score] * 50] * 10)
    assert found == fewer
    assert found.mean == score
    assert found.high - found.low > 0.2
    assert 0 <= found.low <= score <= found.high <= 1


def test_one_context_says_almost_nothing():
    found = of_contexts([[1.0, 0.0, 1.0, 1.0]])
    assert found.high - found.low > 0.7


def test_quantiles_of_students_distribution():
    for degrees, exact in ((1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (49, 2.0096)):
        assert _student(degrees) == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize(("alike", "mean"), [(0.0, 0.7), (0.6, 0.7), (1.0, 0.9), (0.3, 0.05)])
def test_the_interval_holds_the_true_mean_however_alike_answers_of_a_context_are(alike, mean):
    """`alike`: the share of a context's answers that are its own fate. A plain interval covers far less at 1."""
    rng, held, n = random.Random(0), 0, 600
    for _ in range(n):
        contexts = []
        for _ in range(10):
            fate = float(rng.random() < mean)
            contexts.append([fate if rng.random() < alike else float(rng.random() < mean) for _ in range(5)])
        found = of_contexts(contexts)
        held += found.low <= mean <= found.high
    assert held / n >= 0.93


def test_differences_are_taken_question_by_question():
    """Contexts that are hard for both recipes do not widen the interval."""
    rng = random.Random(0)
    hard = [float(rng.random() < 0.5) for _ in range(20)]
    scores = of_contexts([[score] * 5 for score in hard])
    found = of_differences([[0.0, 0.0, 0.0, 0.0, -1.0 if place in (3, 9) else 0.0] for place in range(20)])
    assert found.mean == pytest.approx(-0.02)
    assert found.high - found.low < 0.2 * (scores.high - scores.low)
    assert found.low < -0.02 < 0 < found.high
    same = of_differences([[0.0] * 5] * 20)
    assert (same.mean, same.high) == (0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert same.low == -same.high
    assert of_differences([]) is None


def test_the_mean_over_tasks_counts_each_the_same():
    wide, sure = Estimate(0.5, 0.3, 0.7), Estimate(1.0, 1.0, 1.0)
    found = of_cells([wide, sure])
    assert (found.mean, found.low, found.high) == pytest.approx((0.75, 0.65, 0.85))
    many = of_cells([wide] * 4)
    assert many.high - many.mean == pytest.approx(0.1)
    assert of_cells([]) is None


# bytes ----------------------------------------------------------------------------------------------------------

GEOMETRY = Geometry(
    n_layers=2, n_kv_heads=2, n_query_heads=4, head_dim=64, kv_dtype="bfloat16", sink_tokens=128, window_tokens=512,
    index="graph+scan", degree=32, sliding_windows=(0, 0),
)  # fmt: skip


def test_a_recipe_needs_its_columns_only():
    build, tokens = BuildConfig(), [4096, 8192]

    def needed(**recipe):
        return needed_bytes(Recipe(**recipe), tokens, GEOMETRY, build)

    keys_and_values = sum(tokens) * 2 * 2 * 2 * 64 * 2
    static = len(tokens) * 640 * 2 * 2 * 2 * 64 * 2
    beside = sum(tokens) * 8 + 40_000  # tokens, footers
    assert keys_and_values < needed(method="dense") < keys_and_values + beside
    assert static < needed(method="streaming") < static + beside
    assert needed(method="dense") == needed(method="flat", estimate=False)
    assert needed(method="dense") < needed(method="scan", estimate=False) < needed(method="scan")
    assert needed(method="dense") < needed(method="graph", estimate=False) < needed(method="graph")
    assert needed(method="auto") == built_bytes(tokens, GEOMETRY, build)
    half = needed(method="graph", head_pattern=[[1, 0], [0, 1]])
    assert half == pytest.approx((needed(method="graph") + needed(method="streaming")) / 2, rel=0.01)
    massive = BuildConfig(key_mass=True)
    mass = needed_bytes(Recipe(method="h2o"), tokens, GEOMETRY, massive) - needed(method="dense")
    assert mass == pytest.approx(4 * 2 * 2 * sum(tokens), rel=0.15)
    with_queries = BuildConfig(query_vectors=True)
    queries = needed_bytes(Recipe(method="vamana"), tokens, GEOMETRY, with_queries) - needed(method="dense")
    assert queries == pytest.approx(1024 * 64 * 2 * 2 * 2 * len(tokens), rel=0.05)
    assert needed_bytes(Recipe(method="graph"), tokens, GEOMETRY, massive) == pytest.approx(
        needed(method="graph"), rel=0.01
    )


# definitions ----------------------------------------------------------------------------------------------------


def test_a_definition_becomes_arguments(tmp_path):
    path = tmp_path / "evaluation.yaml"
    path.write_text(
        "model: demo\ntasks: [vt]\nlengths: [256]\nsamples: 4\nbuild: {window_tokens: 64}\n"
        "recipes:\n  dense: dense\n  small: {method: graph, top_k: 8}\nout: ${PLACE}/out\n"
    )
    found = read(path, env={"PLACE": "/there"})
    assert (found["model"].name, found["config"].window_tokens, found["out"]) == ("demo", 64, "/there/out")
    assert named_recipes(found["recipes"])["small"].top_k == 8


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("task: [vt]", "unknown field"),
        ("tasks: vt", "must be a list"),
        ("samples: many", "must be a whole number"),
        ("build: {window: 3}", "build.window"),
        ("heads: {pattern: x}", "heads.pattern"),
        ("{", "mend the YAML"),
        ("{", "config = "),
        ("", "holds nothing"),
    ],
)
def test_a_wrong_definition_is_named(tmp_path, text, reason):
    path = tmp_path / "evaluation.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        read(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.yaml")
