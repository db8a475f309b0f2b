"""Submission: a pipeline as a job of a Ray cluster, with the code that runs here.

The id of the job is made of the definition and the code, so submitting twice is submitting once: the second time
attaches to the job, or tells how it ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rabatch.definition import HIDDEN
from rabatch.errors import ConfigError
from rabatch.jobs.cluster import JobError, worker_url
from rabatch.jobs.wheel import code_digest, code_files, write_wheel
from rabatch.pipeline import Pipeline

ENTRYPOINT = "python -m rabatch.jobs.run pipeline.yaml"
_DIGITS = 12  # of a digest in an id
_RECONNECTS = 10  # without a new line of the log between them
_POLL_S = 1.0
_COULD_NOT_RUN = 2
_TALKATIVE = (
    *("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"),
    "ray._private.runtime_env.packaging",
)


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """A job of a cluster.

    Args:
        submission_id: By which ``ray job`` knows it.
        address: Of the cluster.
        attached: Whether it was there already.
        status: Ray's word: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED`` or ``STOPPED``.
        exit_code: The job's own: 0 all good, 1 some rows failed, 2 could not run; also 2 if it was stopped or lost.
            None while it is not over.
        message: What Ray says of it.
        definition, code: SHA-256 of both.
    """

    submission_id: str
    address: str
    attached: bool
    status: str
    exit_code: int | None
    message: str
    definition: str
    code: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    def summary(self) -> list[str]:
        """What the command prints."""
        if self.exit_code is None:
            begun = "was submitted before" if self.attached else "submitted"
            follow = "the same command without --no-wait follows it"
            return [f"job {self.submission_id} {begun}: {self.status.lower()}; {follow}"]
        lines = [f"job {self.submission_id} {self.status.lower()}, exit code {self.exit_code}"]
        if self.status != "SUCCEEDED" and self.message:
            lines.append(f"  {' '.join(self.message.split())[:500]}")
        if self.attached:
            lines.append("it was submitted before; to run it anew, give another --run-id")
        return lines


def submit(
    pipeline: Pipeline,
    *,
    address: str,
    run_id: str = "",
    wait: bool = True,
    env: tuple[str, ...] = (),
    write: Callable[[str], None] = lambda text: None,
) -> Submitted:
    """Run a pipeline on a Ray cluster, as a job.

    Args:
        pipeline: With paths or URLs that the cluster's machines reach; relative paths are made absolute here.
        address: Of the cluster's dashboard, such as ``http://head:8265``.
        run_id: Tells runs of the same definition and code apart.
        wait: Follow the job to its end.
        env: Names of variables of this process that the job gets too. Their values can be read on the dashboard.
        write: Takes the log of the job, in pieces.

    Raises:
        ConfigError: No cluster answers there, or the definition cannot be sent.
        JobError: The cluster refuses the job, or has lost it.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{0,60}", run_id):
        raise ConfigError("run_id", run_id, "must be at most 60 letters, digits, '.', '_' and '-'")
    text = _sent(pipeline)
    missing = [name for name in env if name not in os.environ]
    if missing:
        raise ConfigError("env", missing[0], "is not set in this process; set it, or leave it out")
    client = _connect(address)
    files = code_files()
    code = code_digest(files)
    submission_id = "-".join(part for part in ("rabatch", pipeline.digest[:_DIGITS], code[:_DIGITS], run_id) if part)
    attached = _status(client, submission_id) is not None
    if not attached:
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            (folder / "job").mkdir()
            (folder / "job" / "pipeline.yaml").write_text(text)
            runtime_env = {
                "py_modules": [str(write_wheel(folder, files))],
                "working_dir": str(folder / "job"),
                "env_vars": {name: os.environ[name] for name in env},
            }
            about = {"rabatch_definition": pipeline.digest, "rabatch_code": code}
            try:
                client.submit_job(
                    entrypoint=ENTRYPOINT, submission_id=submission_id, runtime_env=runtime_env, metadata=about
                )
            except OSError as error:
                fix = f"the connection broke while the job was sent ({_line(error)}); submit it again"
                raise JobError("address", address, fix) from error
            except RuntimeError as error:
                if _status(client, submission_id) is None:
                    fix = f"the cluster refused the job ({_line(error)})"
                    raise JobError("address", address, fix) from error
                attached = True  # another submitted it between our look and our put
    info = _follow(client, submission_id, write) if wait else client.get_job_info(submission_id)
    return Submitted(
        submission_id=submission_id,
        address=address,
        attached=attached,
        status=str(info.status.value),
        exit_code=_exit_code(info),
        message=info.message or "",
        definition=pipeline.digest,
        code=code,
    )


def _sent(pipeline: Pipeline) -> str:
    """The definition as the cluster reads it: no path depends on where we are."""
    values = pipeline.to_dict()
    for name in ("documents", "questions", "store", "answers"):
        if "${" not in values[name]:
            values[name] = worker_url(values[name], name)
    if (path := Path(pipeline.model.name).expanduser()).is_dir():
        values["model"]["name"] = str(path.resolve())
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    if HIDDEN in text:
        fix = "holds credentials, which the cluster's dashboard would show; write ${NAME}, and set the variable there"
        raise ConfigError("storage_options", HIDDEN, fix)
    return text


def _connect(address: str) -> Any:
    import ray.exceptions
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray prefers them to what it is given
            return JobSubmissionClient(address)
    except ray.exceptions.AuthenticationError as error:
        fix = "the cluster wants a token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        raise ConfigError("address", address, fix) from error
    except (RuntimeError, ConnectionError, ValueError, OSError) as error:
        if "ray[default]" in str(error):
            raise ConfigError("address", address, "needs Ray's job client: pip install 'rabatch[jobs]'") from error
        fix = f"no Ray dashboard answers there ({_line(error)}); give the head's, such as http://head:8265"
        raise ConfigError("address", address, fix) from error


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _status(client: Any, submission_id: str) -> Any:
    """Of a job; None if there is none."""
    try:
        return client.get_job_status(submission_id)
    except RuntimeError as error:
        if "404" in str(error) or "does not exist" in str(error):
            return None
        raise JobError("address", client.get_address(), f"the cluster does not answer ({_line(error)})") from error


class _Log:
    """A log that is told from its beginning after every connection, written once."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write, self.shown, self._at = write, 0, 0

    def again(self) -> None:
        self._at = 0

    def take(self, text: str) -> None:
        new = text[max(0, self.shown - self._at) :]
        self._at += len(text)
        if new:
            self._write(new)
        self.shown = max(self.shown, self._at)


def _follow(client: Any, submission_id: str, write: Callable[[str], None]) -> Any:
    """Write the log as it grows, until the job is over; what Ray knows of it then."""
    log, idle = _Log(write), 0
    while True:
        before = log.shown
        log.again()
        lost: Exception | None = None
        try:
            asyncio.run(_tail(client, submission_id, log.take))
        except (RuntimeError, OSError) as error:  # the connection broke; the job goes on
            lost = error
        try:
            if _status(client, submission_id) is None:
                raise JobError("job", submission_id, "is not known to the cluster any more; its head was started anew")
            info = client.get_job_info(submission_id)
            if info.status.is_terminal():
                return info
        except OSError as error:
            lost = error
        idle = 0 if log.shown > before else idle + 1
        if lost is not None and idle > _RECONNECTS:
            fix = f"cannot be followed ({_line(lost)}); it goes on, and the same command attaches to it"
            raise JobError("job", submission_id, fix) from lost
        time.sleep(_POLL_S)


async def _tail(client: Any, submission_id: str, show: Callable[[str], None]) -> None:
    async for text in client.tail_job_logs(submission_id):
        show(text)


def _exit_code(info: Any) -> int | None:
    if not info.status.is_terminal():
        return None
    if info.status.value == "SUCCEEDED":
        return 0
    code = info.driver_exit_code
    return code if info.status.value == "FAILED" and code is not None and code > 0 else _COULD_NOT_RUN


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
