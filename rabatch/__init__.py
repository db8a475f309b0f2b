"""rabatch: prefill long documents once, store their attention state, answer many questions in batch.

The names of the command line are the names of the API: ``rabatch.build``, ``rabatch.answer``,
``rabatch.IndexStore``. They are imported when first used, so that ``import rabatch`` and
``rabatch --help`` stay fast.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout `index/`, `storage/` and `jobs/` lie beside this package instead of inside it.
if (Path(__file__).parent.parent / "pyproject.toml").is_file():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe, Resources
    from rabatch.errors import RabatchError
    from rabatch.jobs.answer import answer
    from rabatch.jobs.build import build
    from rabatch.jobs.evaluate import evaluate
    from rabatch.jobs.run import run
    from rabatch.pipeline import Pipeline
    from rabatch.storage.answers import AnswerStore
    from rabatch.storage.store import IndexStore

_EXPORTS = {
    "AnswerStore": "rabatch.storage.answers",
    "BuildConfig": "rabatch.config",
    "GenerationSettings": "rabatch.config",
    "IndexStore": "rabatch.storage.store",
    "ModelConfig": "rabatch.config",
    "Pipeline": "rabatch.pipeline",
    "RabatchError": "rabatch.errors",
    "Recipe": "rabatch.config",
    "Resources": "rabatch.config",
    "answer": "rabatch.jobs.answer",
    "build": "rabatch.jobs.build",
    "evaluate": "rabatch.jobs.evaluate",
    "run": "rabatch.jobs.run",
}

__all__ = [
    "AnswerStore",
    "BuildConfig",
    "GenerationSettings",
    "IndexStore",
    "ModelConfig",
    "Pipeline",
    "RabatchError",
    "Recipe",
    "Resources",
    "answer",
    "build",
    "evaluate",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'rabatch' has no attribute {name!r}")
