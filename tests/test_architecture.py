"""The direction of imports, and what else holds for the source as a whole (docs/design.md, "Layout").

Every module is parsed, never imported; imports inside functions count like those at the top. Each check is a
function from sources to a list of complaints, so that the tests below can plant a violation and see it found.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"rabatch": "rabatch", "index": "rabatch.index", "storage": "rabatch.storage", "jobs": "rabatch.jobs"}
BASE = (
    "rabatch.checked",
    "rabatch.compiling",
    "rabatch.config",
    "rabatch.errors",
    "rabatch.head_pattern",
    "rabatch.records",
    "rabatch.traits",
)
MAX_LINES = 400

# Modules of the engine that may import `rabatch.jobs`, and why.
IMPORTS_JOBS = {
    "rabatch": "exports rabatch.build and rabatch.answer, imported when first used",
    "rabatch.cli": "every command imports what it runs",
    "rabatch.cli_jobs": "as rabatch.cli",
    "rabatch.cli_evaluate": "as rabatch.cli",
    "rabatch.demo.run": "runs both jobs as a user would",
}
HEAVY = ("torch", "ray", "transformers")
EXECUTES_WHAT_IT_READS = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    lazy: bool
    """Inside a function, so that it happens when that is called."""
    main: bool
    """Under `if __name__ == "__main__"`, so that it happens only when the module is run."""


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")


def read_modules() -> dict[str, str]:
    return {module_name(p): p.read_text() for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))}


def read_packages() -> list[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        return list(tomllib.load(file)["tool"]["setuptools"]["packages"])


def imports_of(module: str, source: str, modules: Mapping[str, str]) -> Iterator[Import]:
    """What `module` imports. `from a import b` counts as `a.b` where that is a module, else as `a`."""
    tree = ast.parse(source)
    functions = [f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)]
    lazy = {id(n) for f in functions for n in ast.walk(f)}
    mains = [i for i in tree.body if isinstance(i, ast.If) and ast.unparse(i.test) == "__name__ == '__main__'"]
    main = {id(n) for i in mains for statement in i.body for n in ast.walk(statement)}
    is_package = any(name.startswith(module + ".") for name in modules)
    for node in ast.walk(tree):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = module.split(".")
                parent = ".".join(parts[: len(parts) - node.level + is_package])
                start = f"{parent}.{start}".rstrip(".")
            children = [f"{start}.{alias.name}" for alias in node.names]
            targets = [c if c in modules or c in FOLDERS.values() else start for c in children]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            targets = [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        for target in targets:
            yield Import(target, node.lineno, id(node) in lazy, id(node) in main)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def check_arrows(modules: Mapping[str, str]) -> list[str]:
    """`errors, config, records <- index | storage <- engine <- jobs <- cli`."""
    complaints = []
    for module, source in modules.items():
        for found in imports_of(module, source, modules):
            target = found.target
            if module in BASE:
                bad = within(target, "rabatch") and target not in BASE
            elif within(module, "rabatch.index", "rabatch.storage"):
                own = "rabatch.index" if within(module, "rabatch.index") else "rabatch.storage"
                outside = within(target, "rabatch") and target not in ("rabatch", *BASE) and not within(target, own)
                bad = outside or within(target, "transformers")
            elif within(module, "rabatch.jobs"):
                # `python -m rabatch.jobs.build` is the command `rabatch build`.
                bad = within(target, "rabatch.cli") and not found.main
            else:
                bad = within(target, "rabatch.jobs") and module not in IMPORTS_JOBS
                bad = bad or (within(target, "rabatch.cli") and not within(module, "rabatch.cli"))
            if within(target, "ray") and not within(module, "rabatch.jobs"):
                bad = True
            if module == "rabatch.cli" and within(target, "rabatch.jobs", *HEAVY) and not found.lazy:
                bad = True
            if bad:
                complaints.append(f"{module}:{found.line} imports {target}")
    return complaints


def check_storage_executes_nothing(modules: Mapping[str, str]) -> list[str]:
    complaints = []
    for module, source in modules.items():
        if not within(module, "rabatch.storage"):
            continue
        for found in imports_of(module, source, modules):
            if within(found.target, *EXECUTES_WHAT_IT_READS):
                complaints.append(f"{module}:{found.line} imports {found.target}")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                pickles = any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords)
                if called in ("eval", "exec", "compile", "torch.load") or pickles:
                    complaints.append(f"{module}:{node.lineno} calls {called}")
    return complaints


def check_packages(modules: Mapping[str, str], listed: list[str]) -> list[str]:
    """A folder that is not listed is missing from the wheel, and from the wheel only."""
    packages = {m for m in modules if any(other.startswith(m + ".") for other in modules)} | {*FOLDERS.values()}
    packages |= {m.rpartition(".")[0] for m in modules if "." in m}
    return [f"{name}: not in pyproject.toml's packages" for name in sorted(packages - {*listed})] + [
        f"{name}: listed in pyproject.toml, but has no modules" for name in sorted({*listed} - packages)
    ]


def check_length(sources: Mapping[str, str]) -> list[str]:
    complaints = []
    for name, source in sources.items():
        n_lines = source.count("\n")
        reason = re.search(rf"\b{MAX_LINES} lines\b", ast.get_docstring(ast.parse(source)) or "")
        if n_lines > MAX_LINES and not reason:
            complaints.append(
                f"{name}: {n_lines} lines; split it, or say in its docstring why it is past {MAX_LINES} lines"
            )
    return complaints


def loaded_by(code: str, names: tuple[str, ...]) -> set[str]:
    """Which of the modules `names` are loaded once `code` has run in a fresh interpreter."""
    report = f"import sys; print('\\nLOADED', *(n for n in {names!r} if n in sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", f"try:\n    {code}\nexcept SystemExit: pass\n{report}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_imports_follow_the_arrows():
    assert check_arrows(read_modules()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rabatch.errors", "import rabatch.prompts"),
        ("rabatch.config", "from rabatch import index"),
        ("rabatch.index.graph", "from rabatch.storage.store import IndexStore"),
        ("rabatch.index.graph", "from ..storage import store"),
        ("rabatch.index.graph", "def f():\n    import rabatch.models"),
        ("rabatch.index.graph", "import transformers"),
        ("rabatch.storage.store", "from rabatch import index"),
        ("rabatch.storage.store", "import ray.data"),
        ("rabatch.prefill", "def f():\n    from rabatch.jobs import build"),
        ("rabatch.prefill", "import importlib\nimportlib.import_module('rabatch.jobs.build')"),
        ("rabatch.prefill", "from . import jobs"),
        ("rabatch.demo.run", "def f():\n    import ray"),
        ("rabatch.attention.seam", "from rabatch.cli import main"),
        ("rabatch.jobs.build", "from rabatch.cli import main"),
        ("rabatch.prefill", "if __name__ == '__main__':\n    from rabatch.cli import main"),
        ("rabatch.cli", "import torch"),
        ("rabatch.cli", "from rabatch.jobs.build import build"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    planted = {"rabatch": "", "rabatch.storage.store": "", module: source}
    assert [c.split(":")[0] for c in check_arrows(planted)] == [module]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rabatch.records", "import pyarrow\nfrom rabatch.errors import RabatchError"),
        (
            "rabatch.index.graph",
            "import torch\nfrom rabatch.index import topk\nfrom rabatch.config import Recipe",
        ),
        ("rabatch.storage.store", "from rabatch import __version__\nimport rayon"),
        ("rabatch.prefill", "import rabatch.index.graph\nfrom rabatch.storage import store"),
        ("rabatch.jobs.build", "import ray\nfrom rabatch.prefill import prefill"),
        ("rabatch.jobs.build", "if __name__ == '__main__':\n    from rabatch.cli import main"),
        ("rabatch.cli", "def build(args):\n    from rabatch.jobs.build import build"),
    ],
)
def test_a_right_import_is_allowed(module, source):
    assert check_arrows({"rabatch": "", "rabatch.storage.store": "", module: source}) == []


def test_storage_reads_nothing_that_executes():
    assert check_storage_executes_nothing(read_modules()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "def f():\n    from joblib import load",
        "import torch\ntorch.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_a_reader_that_executes_is_found(source):
    assert len(check_storage_executes_nothing({"rabatch.storage.store": source})) == 1
    assert check_storage_executes_nothing({"rabatch.storage.store": "np.load(path, allow_pickle=False)"}) == []


def test_every_package_is_listed():
    assert check_packages(read_modules(), read_packages()) == []


def test_a_forgotten_package_is_found():
    modules = dict.fromkeys(("rabatch", "rabatch.index.graph", "rabatch.storage.s", "rabatch.jobs.j", "rabatch.new.x"))
    complaints = check_packages(modules, ["rabatch", "rabatch.index", "rabatch.storage", "rabatch.jobs", "rabatch.old"])
    assert [c.split(":")[0] for c in complaints] == ["rabatch.new", "rabatch.old"]


def test_modules_are_short_or_say_why():
    sources = read_modules()
    for folder in ("tools", "benchmarks", "examples"):
        sources |= {f"{folder}/{path.name}": path.read_text() for path in sorted((ROOT / folder).rglob("*.py"))}
    assert check_length(sources) == []


def test_a_long_module_is_found():
    long = '"""{}"""\n' + "x = 1\n" * MAX_LINES
    assert len(check_length({"m": long.format("A module.")})) == 1
    assert check_length({"m": long.format("Past 400 lines because the two loops share their state.")}) == []


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import rabatch", HEAVY) == set()


def test_help_loads_nothing_heavy():
    # Through `rabatch.cli.main`, the function behind both `rabatch` and `python -m rabatch.cli`.
    assert loaded_by("import rabatch.cli; rabatch.cli.main(['--help'])", HEAVY) == set()


def test_listing_a_store_loads_nothing_heavy():
    modules = "rabatch.cli_store, rabatch.storage.compaction, rabatch.storage.garbage, rabatch.storage.superseded"
    modules += ", rabatch.cli_answers, rabatch.storage.answers, rabatch.exporting, rabatch.pipeline"
    assert loaded_by(f"import {modules}", HEAVY) == set()


def test_a_loaded_module_is_found():
    assert loaded_by("import wave", ("wave", "ray")) == {"wave"}
