"""examples/schedule: manifests by a schema, commands by our own parser, the DAG by its syntax tree."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rabatch import cli_arguments
from rabatch.cli import make_parser
from rabatch.jobs.cron import Cron
from rabatch.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "schedule"
MANIFESTS = ("rayjob.yaml", "raycronjob.yaml", "cronjob.yaml")
SCHEMA = jsonschema.Draft202012Validator(json.loads((ROOT / "tests/data/schemas/kubernetes.json").read_text()))

# What a DAG and a task of Airflow 3 take, of what is used here: name and type of the value in the source.
DAG_ARGUMENTS = {
    **{"dag_id": ast.Constant, "schedule": ast.Constant, "start_date": ast.Call},
    **{"catchup": ast.Constant, "max_active_runs": ast.Constant},
}
TASK_ARGUMENTS = {
    **{"task_id": ast.Constant, "bash_command": ast.Constant, "env": ast.Dict, "append_env": ast.Constant},
    **{"retries": ast.Constant, "retry_delay": ast.Call, "execution_timeout": ast.Call},
}


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / name).read_text())


def errors(values: dict[str, Any]) -> list[str]:
    return [error.message for error in SCHEMA.iter_errors(values)]


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_follow_the_schema(name):
    assert errors(manifest(name)) == []


@pytest.mark.parametrize("name", MANIFESTS)
@pytest.mark.parametrize(
    ("found", "planted"),
    [("mountPath", "mountpath"), ("containers", "container"), ("apiVersion", "apiversion"), ("image: ", "imag: ")],
)
def test_a_misspelt_field_is_found(name, found, planted):
    text = (FOLDER / name).read_text()
    assert found in text
    assert errors(yaml.safe_load(text.replace(found, planted))) != []


def test_the_cron_jobs_template_is_the_job():
    assert manifest("raycronjob.yaml")["spec"]["jobTemplate"] == manifest("rayjob.yaml")["spec"]


def parsed(command: list[str]) -> Any:
    """What our parser makes of a command; fails the test if it refuses it."""
    assert command[0] == "rabatch"
    return make_parser().parse_args(command[1:])


def test_the_commands_of_the_examples_are_ours():
    lines = [line for line in (FOLDER / "crontab").read_text().splitlines() if "rabatch" in line and line[0] != "#"]
    for line in lines:
        *fields, command = line.split(maxsplit=5)
        assert Cron(" ".join(fields))
        arguments = parsed(shlex.split(command.split(" >> ")[0]))
        assert Cron(arguments.cron, arguments.timezone)
        assert arguments.once
    assert len(lines) == 1
    (container,) = manifest("cronjob.yaml")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    arguments = parsed([*container["command"], *container["args"]])
    assert Cron(arguments.cron, arguments.timezone)
    entrypoint = manifest("rayjob.yaml")["spec"]["entrypoint"].split()
    assert entrypoint[:3] == ["python", "-m", "rabatch.jobs.run"]
    parser = cli_arguments.Parser()
    cli_arguments.add_run(parser)
    assert parser.parse_args(entrypoint[3:]).pipeline == "/etc/rabatch/pipeline.yaml"
    spec = manifest("raycronjob.yaml")["spec"]
    assert Cron(spec["schedule"], spec["timeZone"])


def test_the_definition_of_the_examples():
    pipeline = Pipeline.from_yaml(FOLDER / "pipeline.yaml", env={"BUCKET": "b"})
    assert pipeline.store == "s3://b/index"


def dag_complaints(source: str) -> list[str]:
    """What is wrong with the arguments of a DAG and its tasks."""
    complaints = []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    for name, known in (("DAG", DAG_ARGUMENTS), ("BashOperator", TASK_ARGUMENTS)):
        found = [call for call in calls if ast.unparse(call.func) == name]
        if len(found) != 1:
            complaints.append(f"{len(found)} calls of {name}")
        for call in found:
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            complaints += [f"{name}: {key} is unknown" for key in given if key not in known]
            complaints += [f"{name}: {key} is missing" for key in known if key not in given]
            complaints += [
                f"{name}: {key} is a {type(value).__name__}"
                for key, value in given.items()
                if key in known and not isinstance(value, known[key])
            ]
    return complaints


def test_the_airflow_dag():
    source = (FOLDER / "airflow_dag.py").read_text()
    assert dag_complaints(source) == []
    assert dag_complaints(source.replace("bash_command", "command")) == [
        "BashOperator: command is unknown",
        "BashOperator: bash_command is missing",
    ]
    (text,) = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.keyword) and node.arg == "bash_command" and isinstance(node.value, ast.Constant)
    ]
    rendered = re.sub(r"\{\{[^}]*\}\}", "20261125T020000", text)
    assert re.fullmatch(r"[A-Za-z0-9._-]{0,60}", parsed(shlex.split(rendered)).run_id)
    (cron,) = re.findall(r'schedule="([^"]+)"', source)
    assert Cron(cron)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nightly_questions(tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / "nightly_qa.py", "out", "--nights", "2", "--tokens", "1024"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second, *past = done.stdout.splitlines()
    assert first.endswith("built 2, skipped 0, 4 new answers")
    assert second.endswith("built 1, skipped 2, 2 new answers")
    assert [line.split(": ")[1] for line in past] == ["2 built, 4 answered", "1 built, 2 answered"]
