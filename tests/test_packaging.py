"""What is delivered: a wheel that holds everything and works away from the checkout, and pins for what it needs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rabatch", "index", "storage", "jobs")
FILES = ("pyproject.toml", "README.md", "LICENSE")


@dataclass(frozen=True)
class Installed:
    """A virtual environment that has the wheel, and the dependencies of this one, but not the checkout."""

    python: Path
    packages: Path
    cwd: Path

    def run(self, *arguments: str, timeout_s: int = 120) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [self.python, *arguments],
            cwd=self.cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def run_here(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools leaves a `build/` behind that would hide what a later wheel forgets."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, source)
    run_here(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ".", cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("elsewhere")
    run_here(sys.executable, "-m", "venv", "--without-pip", "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run_here(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = folder.glob("venv/lib/python*/site-packages")
    # Folders named in a .pth file are searched, but their own .pth files are not read: this lends the dependencies
    # and leaves out an editable install of the checkout.
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installed(python, packages, folder)


def source_modules() -> list[str]:
    """Paths that the wheel must have, as `rabatch/index/graph.py`."""
    places = {folder: f"rabatch/{folder}" if folder != "rabatch" else folder for folder in FOLDERS}
    return [
        f"{place}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, place in places.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


def test_the_wheel_that_is_submitted_holds_the_same(wheel: Path):
    from rabatch.jobs.wheel import code_files

    with zipfile.ZipFile(wheel) as archive:
        built = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert code_files() == built


def test_the_wheel_holds_every_module_and_the_demo_model(wheel: Path):
    held = set(zipfile.ZipFile(wheel).namelist())
    folders = [ROOT / "rabatch/demo" / name for name in ("model", "head_pattern")]
    model = [str(path.relative_to(ROOT)) for folder in folders for path in folder.iterdir() if path.is_file()]
    assert any(name.endswith(".safetensors") for name in model)
    assert any(name.endswith(".tsv") for name in model)
    assert {*source_modules(), *model, "rabatch/py.typed"} - held == set()


def test_the_wheel_holds_nothing_else(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in names} == {"rabatch"}
    assert not [name for name in names if "__pycache__" in name or name.startswith("rabatch/tests")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_every_module_of_the_wheel_is_importable_outside_the_checkout(installed: Installed):
    names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in source_modules()]
    # The one place where a kernel may need a package that CPU machines lack.
    names = [name for name in names if not name.endswith(("__main__", "topk.kernel"))]
    report = installed.run(
        "-c",
        "import importlib, json, sys\n"
        f"modules = [importlib.import_module(name) for name in {names!r}]\n"
        "print(json.dumps([m.__file__ for m in modules]))",
    )
    files = json.loads(report.splitlines()[-1])
    assert len(files) == len(names) > 20
    assert [file for file in files if not Path(file).is_relative_to(installed.packages)] == []


def test_the_command_runs_outside_the_checkout(installed: Installed):
    assert "usage" in installed.run("-m", "rabatch.cli", "--help").lower()
    script = installed.python.with_name("rabatch")
    assert script.read_text().startswith(f"#!{installed.python}")
    assert "usage" in installed.run(str(script), "--help").lower()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_runs_outside_the_checkout(installed: Installed):
    sizes = ("--documents", "1", "--tokens", "2048", "--questions", "2")
    report = json.loads(installed.run("-m", "rabatch.cli", "demo", *sizes, "--json", timeout_s=800))
    assert report["documents"] == 1
    assert report["questions"] == 2
    assert set(report["exact_match"]) == {"dense", "streaming", "graph"}


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in requirements}


def test_every_dependency_is_pinned_and_explained():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = project["optional-dependencies"]
    runtime = requirement_names(project["dependencies"])
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins[0].startswith("torch==")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "exact pins only"
    pinned = requirement_names(pins)
    # triton follows torch: see the note in constraints.txt
    assert (runtime | requirement_names([*extras["dev"], *extras["s3"]])) - pinned - {"triton"} == set()
    explained = (ROOT / "docs/dependencies.md").read_text()
    every = runtime.union(*(requirement_names(extra) for extra in extras.values()))
    assert {name for name in every if f"`{name}`" not in explained} == set()


# Imported by rabatch, but named by a dependency of ours that cannot do without it.
COMES_WITH = {"huggingface_hub": "transformers"}
IMPORTED_AS = {"faiss-cpu": "faiss", "pyyaml": "yaml"}


def undeclared_imports(sources: dict[str, str], declared: set[str]) -> list[str]:
    names = {IMPORTED_AS.get(name, name) for name in declared} | {"rabatch"}
    names |= {name for name, through in COMES_WITH.items() if through in declared}
    complaints = []
    for where, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            targets = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                targets = [node.module]
            top = {target.split(".")[0] for target in targets} - sys.stdlib_module_names - {"__future__"}
            complaints += [f"{where}:{node.lineno} imports {name}" for name in sorted(top - names)]
    return complaints


def test_every_import_is_a_declared_dependency():
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    declared = requirement_names([*project["dependencies"], *project["optional-dependencies"]["gpu"]])
    sources = {
        path.relative_to(ROOT).as_posix(): path.read_text()
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    assert undeclared_imports(sources, declared) == []
    assert undeclared_imports({"m.py": "def f():\n    import scipy.linalg, json"}, declared) == ["m.py:2 imports scipy"]
