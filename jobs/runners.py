"""How a schedule carries out a run: in this process, or as a job of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from rabatch.jobs.schedule import Runner
from rabatch.jobs.submit import submit
from rabatch.pipeline import Pipeline


def in_process(pipeline: Pipeline, *, progress: bool = True) -> Runner:
    """Build and answer here. A Ray that this starts is stopped again: hours may pass until the next run."""

    def run(fire: datetime) -> dict[str, Any]:
        import ray

        from rabatch.jobs.run import run as run_pipeline

        ours = not ray.is_initialized()
        try:
            result = run_pipeline(pipeline, progress=progress)
        finally:
            if ours:
                ray.shutdown()
        return {"exit_code": result.exit_code, "summary": result.summary()[-1]}

    return run


def on_cluster(
    pipeline: Pipeline, *, address: str, env: tuple[str, ...] = (), write: Callable[[str], None] = lambda text: None
) -> Runner:
    """Submit a job and wait for its end. Its id holds the fire, so whoever finishes a dead scheduler's run attaches."""

    def run(fire: datetime) -> dict[str, Any]:
        done = submit(pipeline, address=address, run_id=f"{fire:%Y%m%dT%H%M%SZ}", env=env, write=write)
        return {"exit_code": done.exit_code, "submission_id": done.submission_id, "summary": done.summary()[0]}

    return run
