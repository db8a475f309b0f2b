"""The commands about a pipeline as a whole: `rabatch plan | submit | schedule`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from rabatch import cli_arguments
from rabatch.cli_arguments import print_json, write_out
from rabatch.errors import ConfigError

if TYPE_CHECKING:
    from rabatch.jobs.schedule import Tick
    from rabatch.pipeline import Pipeline

Add = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]
_RATES = {
    "prefill_flops_per_s": "operations of prefill",
    "index_keys_per_s": "keys that graph or codes are made for, over layers and KV heads",
    "write_bytes_per_s": "bytes written to the store",
    "read_bytes_per_s": "bytes read from the store",
    "decode_bytes_per_s": "memory traffic of decoding",
    "decode_flops_per_s": "operations of decoding, if not as of prefill",
}
_INTERRUPTED = 130


def add_commands(add: Add) -> None:
    """Add the commands to a parser; `add` takes name, function, text and example."""
    text = "say what a pipeline will take, before anything is paid for"
    plan = add("plan", _plan, text, "pipeline.yaml --read-bytes-per-s 1e9")
    plan.add_argument("pipeline", nargs="?", metavar="FILE", help="a pipeline's definition in YAML: a path or URL")
    plan.add_argument("--documents", metavar="URL", help="instead of a file: what is built")
    plan.add_argument("--questions", metavar="URL", help="instead of a file: what is asked")
    plan.add_argument("--model", metavar="NAME", help="instead of a file: hub name or path")
    text = "instead of those there are"
    plan.add_argument("--questions-per-document", type=float, metavar="X", help=text)
    group = plan.add_argument_group("rates of one actor (default: those of earlier runs into the same stores)")
    for name, what in _RATES.items():
        group.add_argument("--" + name.replace("_", "-"), type=float, metavar="X", help=f"{what}, per second")

    submit = add(
        "submit", _submit, "run a pipeline as a job of a Ray cluster", "pipeline.yaml --address http://head:8265"
    )
    submit.add_argument("pipeline", metavar="FILE", help="a pipeline's definition in YAML: a path or URL")
    submit.add_argument("--address", required=True, metavar="URL", help="of the cluster's dashboard")
    text = "tells runs of the same definition and code apart"
    submit.add_argument("--run-id", default="", metavar="ID", help=text)
    submit.add_argument("--no-wait", action="store_true", help="do not follow the job to its end")
    _add_env(submit)

    text = "run a pipeline at the times of a cron expression"
    schedule = add("schedule", _schedule, text, 'pipeline.yaml --cron "0 2 * * *" --timezone Europe/Berlin')
    schedule.add_argument("pipeline", metavar="FILE", help="a pipeline's definition in YAML: a path or URL")
    text = "minute, hour, day of the month, month, day of the week"
    schedule.add_argument("--cron", required=True, metavar="EXPR", help=text)
    schedule.add_argument("--timezone", default="UTC", metavar="ZONE", help="IANA name of the zone of --cron (UTC)")
    text = "whose books are kept below schedules/ of the answers (default)"
    schedule.add_argument("--name", default="default", metavar="NAME", help=text)
    schedule.add_argument("--once", action="store_true", help="run what is due, then exit: for cron and Kubernetes")
    schedule.add_argument("--show", action="store_true", help="list past runs and next fires; run nothing")
    text = "of a cluster's dashboard: submit jobs to it, instead of running here"
    schedule.add_argument("--address", metavar="URL", help=text)
    _add_env(schedule)
    for command in (plan, submit, schedule):
        cli_arguments.add_common(command)


def _add_env(parser: argparse.ArgumentParser) -> None:
    text = "give the job this variable of ours too; may be repeated, and can be read on the dashboard"
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help=text)


def _plan(arguments: argparse.Namespace) -> int:
    from rabatch.forecast import Rates
    from rabatch.jobs.forecasting import plan

    rates: dict[str, Any] = {name: getattr(arguments, name) for name in _RATES}
    for name, value in rates.items():
        if value is not None and not value > 0:
            raise ConfigError(name, value, "must be above 0")
    keys = rates.pop("index_keys_per_s")
    index = {} if keys is None else dict.fromkeys(("graph", "scan", "graph+scan"), keys)
    return cli_arguments.show(
        plan(
            _planned(arguments),
            rates=Rates(**rates, index_keys_per_s=index),
            questions_per_document=arguments.questions_per_document,
        ),
        arguments,
    )


def _planned(arguments: argparse.Namespace) -> Pipeline:
    from rabatch.pipeline import Pipeline

    options = {name: getattr(arguments, name) for name in ("documents", "questions", "model")}
    given = {name: value for name, value in options.items() if value is not None}
    if arguments.pipeline is None:
        for name in ("documents", "questions"):
            if name not in given:
                raise ConfigError(name, None, f"give a pipeline's definition, or --{name}")
        return Pipeline(**given, store="index", answers="answers")
    if given:
        name, value = next(iter(given.items()))
        raise ConfigError(name, value, "stands in the definition; leave the option out, or the file")
    return Pipeline.from_yaml(arguments.pipeline)


def _submit(arguments: argparse.Namespace) -> int:
    from rabatch.jobs.submit import submit
    from rabatch.pipeline import Pipeline

    try:
        done = submit(
            Pipeline.from_yaml(arguments.pipeline),
            address=arguments.address,
            run_id=arguments.run_id,
            wait=not arguments.no_wait,
            env=tuple(arguments.env),
            write=_log_writer(arguments),
        )
    except KeyboardInterrupt:
        told = "rabatch: interrupted; a job that was submitted goes on: the same command follows it again, "
        sys.stderr.write(told + "`ray job stop` ends it\n")
        return _INTERRUPTED
    if arguments.json:
        print_json(done.to_dict())
    else:
        write_out("\n".join(done.summary()))
    return done.exit_code or 0


def _log_writer(arguments: argparse.Namespace) -> Callable[[str], None]:
    """The job's log goes where output goes, or, beside JSON, where progress goes."""
    stream = sys.stderr if arguments.json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


def _schedule(arguments: argparse.Namespace) -> int:
    from rabatch.jobs.cron import Cron
    from rabatch.jobs.runners import in_process, on_cluster
    from rabatch.jobs.schedule import Scheduler
    from rabatch.pipeline import Pipeline
    from rabatch.storage.filesystem import Folder

    cron = Cron(arguments.cron, arguments.timezone)
    pipeline = Pipeline.from_yaml(arguments.pipeline)
    if arguments.address is None:
        run = in_process(pipeline)
    else:
        options: dict[str, Any] = {"env": tuple(arguments.env), "write": sys.stderr.write}
        run = on_cluster(pipeline, address=arguments.address, **options)
    folder = Folder(pipeline.answers, **(pipeline.storage_options or {}))
    scheduler = Scheduler(cron, folder, run=run, name=arguments.name)
    if arguments.show:
        shown = scheduler.show()
        if arguments.json:
            print_json(shown)
        else:
            write_out("\n".join(_shown(shown)))
        return 0

    def told(tick: Tick) -> dict[str, Any]:
        ran = None if tick.ran is None else scheduler.described(tick.ran)
        next_fire = next(cron.after(scheduler.now()))
        return {"ran": ran, "busy": tick.busy, "next": cron.local(next_fire)}

    def report(tick: Tick) -> None:
        if arguments.json:
            print_json(told(tick))
        else:
            write_out(_told(told(tick)))

    before = signal.signal(signal.SIGTERM, _interrupt)  # Kubernetes and systemd stop us so; the run is given away
    try:
        if not arguments.once:
            sys.stderr.write(f"rabatch: next fire {cron.local(next(cron.after(scheduler.now())))}\n")
            scheduler.watch(report)
        tick = scheduler.tick()
        report(tick)
        return 0 if tick.ran is None or tick.ran.done is None else int(tick.ran.done["exit_code"])
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _told(told: dict[str, Any]) -> str:
    if told["ran"] is not None:
        return f"{_run_line(told['ran'])}; next {told['next']}"
    return f"a run is under way ({told['busy']})" if told["busy"] else f"nothing is due; next {told['next']}"


def _shown(shown: dict[str, Any]) -> list[str]:
    past = [_run_line(run) for run in shown["past"]] or ["no run yet"]
    return [*past, f'next, by "{shown["cron"]}" in {shown["timezone"]}:', *(f"  {fire}" for fire in shown["next"])]


def _run_line(run: dict[str, Any]) -> str:
    line = f"run {run['run']} of {run['fire']}"
    if run["missed"]:
        line += f" and {run['missed']} missed before it"
    if run["state"] != "done":
        return f"{line}: {'running' if run['state'] == 'running' else 'its scheduler died'} ({run['holder']})"
    why = run.get("summary") or run.get("reason") or ""
    return f"{line}: exit code {run['exit_code']} in {run['seconds']} s" + (f": {why}" if why else "")
