"""One local Ray and one small built corpus for the whole test session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Without a card Triton's kernels run interpreted. Read when triton is first imported, by whomever.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Ray's workers yield to every other process by default; tests have time limits. Subprocesses inherit it.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """An embedded Ray with at least 4 logical CPUs, as the jobs start it."""
    import ray

    from rabatch.jobs.cluster import connect

    connect()
    yield
    ray.shutdown()


@dataclass(frozen=True)
class DemoStore:
    """A small corpus, indexed.

    Args:
        corpus: What `write_corpus` returned: counts and `paths`.
        store: Path of the index store.
        built: The `BuildResult`.
        documents, questions: The rows of the corpus.
        static_set: Keyword arguments of the `BuildConfig` it was built with.
    """

    corpus: dict[str, Any]
    store: str
    built: Any
    documents: list[dict[str, Any]]
    questions: list[dict[str, Any]]
    static_set: dict[str, int]


@pytest.fixture(scope="session")
def demo_store(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> DemoStore:
    """3 documents of about 1.2K tokens with 4 questions each, on the demo model. Tests must not write to it."""
    import json

    from rabatch.config import BuildConfig
    from rabatch.demo.corpus import write_corpus
    from rabatch.jobs.build import build

    folder = tmp_path_factory.mktemp("demo-store")
    static_set = {"sink_tokens": 16, "window_tokens": 128}
    corpus = write_corpus(str(folder / "corpus"), n_documents=3, tokens=1200, n_questions=4)
    store = str(folder / "index")
    built = build(corpus["paths"]["documents"], store=store, config=BuildConfig(**static_set), progress=False)
    read = {
        name: [json.loads(line) for line in Path(path).read_text().splitlines()]
        for name, path in corpus["paths"].items()
    }
    return DemoStore(corpus, store, built, read["documents"], read["questions"], static_set)
