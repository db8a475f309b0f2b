"""Connecting to Ray, and how many actors of what size a job runs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
import ray.data
import ray.exceptions
from ray.job_config import JobConfig

import rabatch
from rabatch.config import Resources
from rabatch.errors import ConfigError, RabatchError

MIN_LOCAL_CPUS = 4
"""Logical CPUs of the embedded Ray at least: with fewer, two actor pools and a reader do not fit beside each other."""

TASK_RETRIES = 3
"""How often the work of a dead actor is tried again. Not without end: a document that kills its actor always would
otherwise keep the job from finishing."""

OOM_RETRIES = 5
"""How often a task is tried again that Ray's memory monitor has killed; it waits longer each time. Ray's own default is
without end, and a file that never fits would keep the job from finishing."""

READER_CPUS = 0.5

_NOTICE_S = 30.0  # by default Ray checks every 3 s, waits 10 s for an answer, and gives up after 5 failures

_MEMORY_PER_WEIGHTS, _MEMORY_BESIDE = 1.5, 1 << 30

_EXCLUDED = [".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "build", "dist", "tests", "benchmarks"]


class JobError(RabatchError):
    """Ray cannot go on with a job."""


@dataclass(frozen=True)
class Cluster:
    """What the connected Ray has.

    Args:
        cpus: Logical CPUs.
        gpus: CUDA devices.
        cores: Physical parallelism: `cpus`, or less where the embedded Ray declares more CPUs than there are.
        machines: Over which Ray spreads actors.
        memory: Bytes of main memory that Ray lends, of each machine. Empty: not told.
    """

    cpus: int
    gpus: int
    cores: int
    machines: int = 1
    memory: tuple[int, ...] = ()


class Pool(NamedTuple):
    """How many actors."""

    least: int
    most: int


class Memory(NamedTuple):
    """Bytes of main memory of one actor: what it is thought to need, and what Ray reserves for it (0: nothing)."""

    needed: int = 0
    reserved: int = 0


NO_MEMORY = Memory()


def checkout_root() -> Path | None:
    """The checkout this code runs from; None if it is installed as a wheel."""
    root = Path(rabatch.__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def connect(address: str | None = None) -> Cluster:
    """Join a Ray cluster, or start one inside this process; a Ray that is already initialised is used as it is.

    Args:
        address: ``"auto"`` (the cluster this machine is part of) or ``"host:port"``. None: the environment's
            ``RAY_ADDRESS``, else an embedded Ray with max(4, cores) logical CPUs.

    Raises:
        ConfigError: the address does not answer.
    """
    _set_environment()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    root = checkout_root()
    if not ray.is_initialized():
        options: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(MIN_LOCAL_CPUS, os.cpu_count() or 1)}
        if address == "local":
            if root is not None:  # the workers of a local Ray see the checkout itself
                options["job_config"] = JobConfig(_py_driver_sys_path=[str(root)])
        else:
            options = {}
            inside_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # the job has brought its own code
            if root is not None and not inside_job:
                options["runtime_env"] = {"working_dir": str(root), "excludes": _EXCLUDED}
        try:
            with _silent_stderr():
                ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
        except Exception as error:
            if address == "local":
                fix = f"Ray could not start on this machine ({_first_line(error)}); free memory or CPUs, run again"
            else:
                fix = f"no Ray cluster answers there ({_first_line(error)}); leave it out for a local one"
            raise ConfigError("address", address, fix) from error
    resources = ray.cluster_resources()
    cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    machines, memory = len(alive), tuple(int(node["memory"]) for node in alive if "memory" in node)
    cores = min(cpus, os.cpu_count() or cpus) if machines == 1 else cpus
    return Cluster(cpus=cpus, gpus=gpus, cores=cores, machines=max(1, machines), memory=memory)


def dead_machines() -> frozenset[str]:
    """Ids of the machines that the cluster has lost so far."""
    return frozenset(node["NodeID"] for node in ray.nodes() if not node["Alive"])


def lost_machine_since(before: frozenset[str]) -> bool:
    """Whether a machine has been lost since `dead_machines` gave `before`; asked where work came to nothing.

    Calls to a machine that is gone fail at once, but Ray takes a while to notice that it is. So where there are
    several, this waits for it.
    """
    deadline = time.monotonic() + (_NOTICE_S if len(ray.nodes()) - len(before) > 1 else 0)
    while dead_machines() <= before:
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.5)
    return True


def _set_environment() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(OOM_RETRIES))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else its C++ side writes to the terminal
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    """Keep Ray's C++ side from telling the terminal that it was told to be quiet. Failures are raised, not written."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


@contextlib.contextmanager
def dataset_context(*, row_blocks: bool) -> Iterator[None]:
    """The settings of the datasets made inside.

    A dead actor's work is tried `TASK_RETRIES` times; what fails then is dropped, and the driver, which knows what it
    asked for, reports it.

    Args:
        row_blocks: Keep one row per block and pass each on as soon as it is made. A row is up to 128 MiB of keys or a
            document that takes hours, so rows must spread over the actors one by one.
    """
    with warnings.catch_warnings():
        # Ray Data has no other way to bound the retries before 2.64, which pyproject.toml excludes.
        warnings.filterwarnings("ignore", message=r".*ray_remote_args.*deprecated")
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\.data\.context")
        warnings.filterwarnings("ignore", message="The minimum number of concurrent actors")  # few documents
        context = ray.data.DataContext.get_current().copy()
        if row_blocks:
            context.target_max_block_size = 1  # bytes: every row exceeds it
        context.max_errored_blocks = -1
        context.execution_no_progress_timeout_s = -1  # one chunk of a long prefill may take as long as it takes
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        with ray.data.DataContext.current(context):
            yield


def actor_options(pool: Pool, *, cpus: float, gpus: float, memory: int = 0, calls: int = 1) -> dict[str, Any]:
    """Arguments of `map_batches` for a pool of actors that take one row at a time.

    Args:
        memory: Bytes that Ray reserves for an actor; 0: none.
        calls: Calls of an actor that run at the same time, each with a row; more than one from threads of their own.
    """
    calls_at_once: dict[str, Any] = {"max_concurrent_calls_per_actor": calls, "enable_true_multi_threading": calls > 1}
    return {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "compute": ray.data.ActorPoolStrategy(
            min_size=pool.least, max_size=pool.most, max_tasks_in_flight_per_actor=2, **calls_at_once
        ),
        "num_cpus": cpus,
        "num_gpus": gpus,
        **({"memory": memory} if memory else {}),
        "max_restarts": -1,
        "max_task_retries": TASK_RETRIES,
    }


def gpus_per_actor(resources: Resources, device: str) -> float:
    """GPUs of one model actor."""
    if resources.gpus_per_actor is not None:
        return resources.gpus_per_actor
    return 1.0 if device.startswith("cuda") else 0.0


def actor_memory(resources: Resources, weights_bytes: int) -> Memory:
    """Main memory of a model actor. By the model's size it is only thought of when a pool is sized, not reserved: the
    estimate must not keep an actor from starting.

    Args:
        weights_bytes: Of the model, in the dtype it computes in.
    """
    asked = resources.actor_memory_bytes
    return Memory(asked or int(_MEMORY_PER_WEIGHTS * weights_bytes) + _MEMORY_BESIDE, asked)


def build_pools(
    resources: Resources, cluster: Cluster, *, n_documents: int, gpus: float, memory: Memory = NO_MEMORY
) -> tuple[Pool, Pool]:
    """Sizes of the prefill pool and of the graph pool.

    Args:
        gpus, memory: Of one prefill actor.

    Raises:
        ConfigError: the cluster has not enough CPUs, GPUs or memory for one actor of each.
    """
    cpus = resources.cpus_per_actor
    _check_fits(cluster, cpus=2 * cpus + READER_CPUS, gpus=gpus)
    room = int((cluster.cpus - READER_CPUS) // cpus)
    prefill = _asked(resources.prefill_actors)
    if prefill is None:
        # On CPUs, prefill takes about twice the time of graph construction (demo model at 8K tokens: 9 s and 4 s).
        size = int(cluster.gpus // gpus) if gpus else math.ceil(2 * cluster.cores / (3 * cpus))
        size = max(1, min(size, n_documents, room - 1, _memory_room(cluster, memory.needed)))
        prefill = Pool(size, size)
    spare = cluster.cores - (0 if gpus else prefill.least * cpus)
    graph = _asked(resources.graph_actors)
    if graph is None:
        size = max(1, min(spare // cpus, room - prefill.least))
        graph = Pool(size, size)
    cpus *= prefill.least + graph.least
    _check_fits(cluster, cpus=cpus + READER_CPUS, gpus=prefill.least * gpus)
    _check_memory(cluster, prefill, memory)
    return prefill, graph


def answer_pool(
    resources: Resources, cluster: Cluster, *, n_rows: int, gpus: float, memory: Memory = NO_MEMORY
) -> Pool:
    """Size of the answer pool. Arguments and errors as of `build_pools`."""
    cpus = resources.cpus_per_actor
    pool = _asked(resources.answer_actors)
    if pool is None:
        size = int(cluster.gpus // gpus) if gpus else cluster.cores // cpus
        size = max(1, min(size, n_rows, cluster.cpus // cpus, _memory_room(cluster, memory.needed)))
        pool = Pool(size, size)
    _check_fits(cluster, cpus=pool.least * cpus, gpus=pool.least * gpus)
    _check_memory(cluster, pool, memory)
    return pool


def _asked(size: int | tuple[int, int]) -> Pool | None:
    """A pool's size as the settings have it; None: as many as there is room for."""
    if isinstance(size, tuple):
        return Pool(*size)
    return Pool(size, size) if size else None


def _memory_room(cluster: Cluster, memory: int) -> int:
    """For how many actors the machines have memory; one at least is tried."""
    return max(1, sum(machine // memory for machine in cluster.memory)) if memory and cluster.memory else cluster.cpus


def _check_memory(cluster: Cluster, pool: Pool, memory: Memory) -> None:
    if memory.reserved and cluster.memory:
        room = sum(machine // memory.reserved for machine in cluster.memory)
        if room < pool.least:
            lent = ", ".join(map(str, cluster.memory))
            fix = f"the machines lend {lent} bytes, room for {room} of {pool.least} actors; use fewer, or less for each"
            raise ConfigError("actor_memory_bytes", memory.reserved, fix)


def _check_fits(cluster: Cluster, *, cpus: float, gpus: float) -> None:
    if cpus > cluster.cpus:
        fix = f"the actors need {cpus:g} logical CPUs, the cluster has {cluster.cpus}; use fewer actors or CPUs"
        raise ConfigError("resources", f"{cpus:g} CPUs", fix)
    if gpus > cluster.gpus:
        fix = f"the actors need {gpus:g} GPUs, the cluster has {cluster.gpus}; use fewer actors, or device cpu"
        raise ConfigError("resources", f"{gpus:g} GPUs", fix)


def limit_threads(threads: int) -> None:
    """Cap the thread pools of this process: torch, and numba and faiss where they are loaded."""
    import torch

    torch.set_num_threads(threads)
    if "numba" in sys.modules:
        numba = sys.modules["numba"]
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
    if "faiss" in sys.modules:
        sys.modules["faiss"].omp_set_num_threads(threads)


def worker_url(url: str | os.PathLike[str], field: str) -> str:
    """`url` as every worker understands it: local paths made absolute.

    Raises:
        ConfigError: it names memory of one process.
    """
    url = os.fspath(url)
    if url.startswith("memory:"):
        raise ConfigError(field, url, "lives in one process, the actors are others; use a path or an s3:// URL")
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def rows_of(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, each as soon as it is there, in any order.

    Raises:
        JobError: Ray cannot go on, e.g. because actors die while they start.
    """
    try:
        table: Any
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from table.to_pylist()
    except (ray.exceptions.RayError, ray.data.exceptions.RayDataUserCodeException) as error:
        raise JobError(
            "ray", _first_line(error), "the job cannot go on; what is committed stays, run it again"
        ) from error
