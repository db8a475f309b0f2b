"""A pipeline's definition: one object in Python, as a dict and as YAML; strict, and shy of credentials."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest

import rabatch
from rabatch.config import BuildConfig, GraphConfig, Recipe
from rabatch.errors import ConfigError
from rabatch.pipeline import Pipeline

TEXT = """
documents: ${BUCKET}/documents.jsonl
questions: questions.jsonl   # a comment
store: ${BUCKET}/index
answers: ${BUCKET}/answers
model: demo
build: {graph: {degree: 16}, window_tokens: 64}
recipe: {method: graph, top_k: 20}
generation:
  stop_strings: ["\\n", "$${end}"]
resources: {cpus_per_actor: 2}
storage_options:
  key: ${KEY}
  secret: hunter2
  client_kwargs: {endpoint_url: "http://me:hunter3@host:9000", aws_session_token: hunter4}
max_failed_rows: 5
"""
ENV = {"BUCKET": "s3://b", "KEY": "hunter1"}
SHORT = {"documents": "d", "questions": "q", "store": "s", "answers": "a"}


def test_yaml_dict_and_python_are_one_definition(tmp_path):
    pipeline = Pipeline.from_yaml(TEXT, env=ENV)
    assert (pipeline.documents, pipeline.store) == ("s3://b/documents.jsonl", "s3://b/index")
    assert pipeline.build == BuildConfig(graph=GraphConfig(degree=16), window_tokens=64)
    assert pipeline.recipe == Recipe(method="graph", top_k=20)
    assert pipeline.generation.stop_strings == ("\n", "${end}")
    assert pipeline.storage_options["key"] == "hunter1"
    (tmp_path / "p.yaml").write_text(TEXT)
    assert Pipeline.from_yaml(tmp_path / "p.yaml", env=ENV) == pipeline
    assert Pipeline.from_yaml(pipeline.to_yaml(secrets=True), env=ENV) == pipeline
    assert Pipeline.from_dict(json.loads(json.dumps(pipeline.to_dict(secrets=True))), env=ENV) == pipeline
    assert copy.deepcopy(pipeline).to_dict() == pipeline.to_dict()
    short = Pipeline.from_dict({**SHORT, "recipe": {"method": "scan"}})
    assert rabatch.Pipeline(**SHORT, model="demo", recipe="scan") == short


def test_credentials_are_not_printed():
    pipeline = Pipeline.from_yaml(TEXT, env=ENV)
    for text in (repr(pipeline), pipeline.to_yaml(), json.dumps(pipeline.to_dict())):
        assert "hunter" not in text
    shown = pipeline.to_dict()["storage_options"]
    assert (shown["key"], shown["secret"]) == ("${KEY}", "***")
    assert shown["client_kwargs"]["endpoint_url"] == "http://***@host:9000"
    with pytest.raises(ConfigError, match="hides a credential"):
        Pipeline.from_yaml(pipeline.to_yaml(), env=ENV)
    with pytest.raises(ConfigError, match=r"^storage_options = 'str'"):
        Pipeline(**SHORT, storage_options="hunter2")


def test_the_digest_is_of_the_definition_not_of_its_form():
    pipeline = Pipeline.from_yaml(TEXT, env=ENV)
    assert Pipeline.from_dict(pipeline.to_dict(secrets=True), env=ENV).digest == pipeline.digest
    assert Pipeline.from_yaml(TEXT.replace("hunter2", "hunter9"), env={**ENV, "KEY": "new"}).digest == pipeline.digest
    plain = Pipeline(**SHORT)
    assert plain.digest == Pipeline.from_dict({**SHORT, "recipe": "graph", "build": {"sink_tokens": 128}}).digest
    changed = [{"answers": "b"}, {"recipe": "scan"}, {"build": {"graph": {"degree": 30}}}, {"max_failed_rows": 1}]
    digests = {dataclasses.replace(plain, **change).digest for change in changed} | {plain.digest}
    assert len(digests) == len(changed) + 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("\nextra: 1", "extra = 1: is an unknown field; known: answers, build, documents"),
        ("\nbuild: {graph: {degree: 2}}", "build.graph.degree = 2: must be a number >= 4"),
        ("\nbuild: {graph: {degre: 8}}", "build.graph.degre = 8: is an unknown field; known: degree, entry_points"),
        ("\nbuild: {sink_tokens: many}", "build.sink_tokens = 'many': must be a whole number"),
        ("\nbuild: [1]", r"build = \[1\]: must be a BuildConfig, or a mapping"),
        ("\nrecipe: {top_k: 0}", "recipe.top_k = 0: must be a number >= 1"),
        ("\nrecipe: grph", "recipe.method = 'grph': must be one of dense, streaming"),
        ("\ngeneration: {do_sample: maybe}", "generation.do_sample = 'maybe': must be true or false or null"),
        ("\ngeneration: {stop_strings: [1]}", r"generation.stop_strings = \[1\]: must be a list, each a string"),
        ("\nmax_failed_rows: -1", "max_failed_rows = -1: must be 0 or more"),
        ("\nmodel: ${NO_SUCH}", r"model = '\$\{NO_SUCH\}': the environment variable NO_SUCH is not set"),
        ("\nmodel: ${1x}", r"model = '\$\{1x\}': is no name of an environment variable"),
        ("\nmodel: {name: [}", "pipeline = 'YAML': line 6, column 16: "),
        ("\nstore: t", "pipeline = 'YAML': line 6, column 1: the key 'store' stands twice"),
        ("\nmodel: !!python/object/apply:os.getcwd []", "pipeline = 'YAML': line 6, column 8: could not determine"),
    ],
)
def test_errors_name_the_field_the_value_and_the_fix(change, message):
    text = "\n" + "\n".join(f"{name}: {value}" for name, value in SHORT.items())
    with pytest.raises(ConfigError, match=f"^{message}"):
        Pipeline.from_yaml(text + change, env={})


@pytest.mark.parametrize("name", SHORT)
def test_a_missing_place_is_named(name):
    rest = {key: value for key, value in SHORT.items() if key != name}
    with pytest.raises(ConfigError, match=f"^{name} = None: is missing"):
        Pipeline.from_dict(rest)


def test_what_is_no_definition_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"store: \xe9")
    for text, message in [("- 1\n", "holds a list"), ("\n", "holds nothing"), ("\n\0", "is not YAML")]:
        with pytest.raises(ConfigError, match=message):
            Pipeline.from_yaml(text)
    with pytest.raises(ConfigError, match="not UTF-8 at byte 7"):
        Pipeline.from_yaml(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Pipeline.from_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="documents = 'list': only a path or URL"):
        Pipeline(**{**SHORT, "documents": [{"text": "x"}]}).to_dict()
