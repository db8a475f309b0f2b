"""What the documents promise: every command of the README works, every command and option is documented.

A command that the README gains must be entered below, with how it is tested; otherwise a test here fails.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from rabatch.cli import main

ROOT = Path(__file__).parents[1]

# Run in this order, in one folder, as the reader would, but on documents of these sizes.
SESSION = (
    "rabatch corpus --out corpus --documents 8 --tokens 8192 --questions 8",
    "rabatch build corpus/documents.jsonl --store index",
    "rabatch answer corpus/questions.jsonl --store index --output answers",
    "rabatch answers --answers answers --out answers.csv",
    "rabatch inspect --store index",
    "rabatch verify --store index",
)
SMALLER = {"--documents": "2", "--tokens": "1024", "--questions": "2"}

# Not run here, and what runs it.
ELSEWHERE = {
    "make demo": "the Makefile's target; its command is run, smaller, by tests/test_packaging.py",
    "rabatch run examples/pipeline.yaml": "tests/test_examples.py runs this definition",
    "make test": "the Makefile's target, which runs this test",
    "pip install -c constraints.txt .": "tests/test_packaging.py installs the wheel that this builds",
    "pip install -c constraints.txt '.[s3]'": "the extra's packages are in `dev`, which make test installs",
}


def code_blocks(markdown: str, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", markdown, flags=re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands_of(markdown: str) -> list[str]:
    """The commands of `console` blocks (after `$ `, without output) and of `bash` blocks, comments removed."""
    commands = []
    for block in code_blocks(markdown, "console"):
        joined = block.replace("\\\n", " ")
        commands += [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
    for block in code_blocks(markdown, "bash", "sh", "shell"):
        commands += block.replace("\\\n", " ").splitlines()
    stripped = [" ".join(re.sub(r"(^|\s)#\s.*", "", command).split()) for command in commands]
    return [command for command in stripped if command]


def unknown_commands(markdown: str) -> list[str]:
    return [command for command in commands_of(markdown) if command not in (*SESSION, *ELSEWHERE)]


def rabatch(*arguments: str) -> tuple[int, str]:
    """A command in this process, whose Ray is there already: exit code and standard output."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), mock.patch.dict(os.environ, COLUMNS="120"):
        try:
            code = main(list(arguments))
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue()


def run(*arguments: str, cwd: Path, timeout_s: int = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
    )  # fmt: skip


@cache
def help_of(*command: str) -> str:
    code, printed = rabatch(*command, "--help")
    assert code == 0
    return printed


@cache
def cli_commands() -> tuple[str, ...]:
    listed = re.search(r"\{([a-z,-]+)\}", help_of())
    assert listed, "rabatch --help lists its commands as {demo,corpus,...}"
    return tuple(listed[1].split(","))


def readme() -> str:
    return (ROOT / "README.md").read_text()


def smaller(command: str) -> list[str]:
    """The arguments of a `rabatch` command with the sizes of `SMALLER`."""
    program, *words = shlex.split(command)
    assert program == "rabatch"
    return [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def test_every_command_of_the_readme_is_known():
    assert unknown_commands(readme()) == []
    assert [c for c in (*SESSION, *ELSEWHERE) if c not in commands_of(readme())] == [], "no longer in the README"


def test_an_unknown_command_is_found():
    markdown = "```bash\nmake demo   # all of it\nrabatch fly \\\n  --high\n```\n```console\n$ rabatch swim\nout\n```\n"
    assert unknown_commands(markdown) == ["rabatch swim", "rabatch fly --high"]


def test_make_targets_of_the_readme_exist():
    targets = [command.split()[1] for command in commands_of(readme()) if command.startswith("make ")]
    makefile = (ROOT / "Makefile").read_text()
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def session(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's shell session has been run."""
    folder = tmp_path_factory.mktemp("session")
    with contextlib.chdir(folder):
        for command in SESSION:
            code, printed = rabatch(*smaller(command))
            assert code == 0, f"{command}\n{printed}"
            assert printed.strip(), f"{command} printed nothing"
    return folder


def test_the_session_of_the_readme(session: Path):
    rows = [json.loads(line) for line in (session / "answers" / "answers.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows] == ["ok"] * 4
    assert (session / "answers" / "answers.parquet").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme(session: Path):
    (block,) = code_blocks(readme(), "python")
    done = run("-c", block, cwd=session)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if " -> " in line]
    assert len(lines) == 3


def test_links_lead_somewhere():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    broken = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert broken == []


def missing_tests(text: str) -> list[str]:
    """Test files, and functions in them, that `text` names but that do not exist."""
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text)
    return [
        f"{path}::{function}"
        for path, function in named
        if not (ROOT / path).is_file() or (function and f"def {function}(" not in (ROOT / path).read_text())
    ]


def test_documents_name_tests_that_exist():
    for document in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"):
        assert missing_tests(document.read_text()) == [], document.name
    assert missing_tests("`tests/test_gone.py`, `tests/test_readme.py::test_gone`, `tests/test_readme.py`") == [
        "tests/test_gone.py::",
        "tests/test_readme.py::test_gone",
    ]


def test_every_command_is_documented():
    text = readme() + (ROOT / "docs/cli.md").read_text()
    assert [command for command in cli_commands() if f"rabatch {command}" not in text] == []


def test_every_command_has_help_with_an_example():
    for command in cli_commands():
        text = help_of(command)
        assert re.search(rf"[Ee]xamples?:?\s+(\$ )?rabatch {command}\b", text), f"rabatch {command} --help: no example"


def options_in_help(command: str) -> set[str]:
    # Option names stand at the start of their line, after a short form perhaps.
    found = re.findall(r"^\s+(?:-\w(?: \S+)?, )?(--[a-z][a-z-]*)", help_of(command), flags=re.MULTILINE)
    return set(found) - {"--help"}


def documented_options(command: str) -> set[str]:
    sections = re.split(r"^## ", (ROOT / "docs/cli.md").read_text(), flags=re.MULTILINE)
    headings = [section.splitlines()[0] for section in sections]
    assert f"`rabatch {command}`" in headings, f"docs/cli.md has no section for rabatch {command}"
    own = [s for s, h in zip(sections, headings, strict=True) if f"`rabatch {command}`" in h or "every command" in h]
    return {option for section in own for option in re.findall(r"^\| `(--[a-z-]+)", section, flags=re.MULTILINE)}


def test_every_option_is_documented_and_no_other():
    for command in cli_commands():
        assert documented_options(command) == options_in_help(command), command
