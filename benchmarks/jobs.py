"""The jobs at scale: more actors, the cost of Ray and the store, many tiny documents, and being killed again and again.

    python benchmarks/jobs.py [scaling] [overhead] [many] [kills] [--quick]

scaling: one prefill actor and two, with a thread each, on documents without an index, so that the model is what takes
the time. overhead: a build of documents, two at a time, against two processes that do nothing but prefill and make
the indexes; the start of Ray is not counted, that of the actors and processes is. many: documents of some hundred
tokens with ten questions each; memory is that of the driver's process. kills: a build and its answering in processes of
their own; at random times the driver, a prefill, graph or answer actor is killed, and the command is run again until
all is done. The answers must be those of a run that nobody disturbed, and nothing committed may be written again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.killing import VICTIMS, answers_in, descendants, disturbed, stored_pairs, undisturbed
from common.measures import machine, table

from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Resources
from rabatch.demo.corpus import generate_document, write_corpus
from rabatch.indexing import layer_block
from rabatch.jobs.answer import answer
from rabatch.jobs.build import build
from rabatch.jobs.cluster import connect, limit_threads
from rabatch.jobs.observing import Observer
from rabatch.jobs.settings import resolved_model
from rabatch.loading import load_model
from rabatch.prefill import encode, prefill_units

PARTS = ("scaling", "overhead", "many", "kills")
Target = dict[str, Any]


def documents_of(n_documents: int, tokens: int) -> list[dict[str, Any]]:
    made = (generate_document(document_id=f"d{n:04}", tokens=tokens, n_questions=1, seed=n) for n in range(n_documents))
    return [document for document, _ in made]


def target(name: str, value: float, goal: float, *, at_least: bool) -> Target:
    return {
        "name": name,
        "value": round(value, 3),
        "target": goal,
        "holds": value >= goal if at_least else value <= goal,
    }


@contextmanager
def folder_of(name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=f"rabatch-{name}-") as folder:
        yield Path(folder)


def must_be_whole(result: Any, n_documents: int) -> None:
    if (result.built, result.failed) != (n_documents, 0):
        raise AssertionError(f"built {result.built}, failed {result.failed} of {n_documents}: not timed")


# scaling


def scaling(args: argparse.Namespace) -> list[Target]:
    n_documents, tokens, repeats = (4, 2048, 1) if args.quick else (16, 8192, 2)
    documents, config = documents_of(n_documents, tokens), BuildConfig(index="none")
    connect()
    seconds: dict[int, list[float]] = {1: [], 2: []}
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):  # in turns, so that a slower minute of the machine falls on both
        for actors in seconds:
            with folder_of("scaling") as folder:
                watch = Observer(progress=False)
                resources = Resources(prefill_actors=actors, graph_actors=1)
                result = build(documents, store=folder, config=config, resources=resources, observer=watch)
                must_be_whole(result, n_documents)
                seconds[actors].append(watch.run.phases[0].elapsed_s)
                rates[actors].append(steady_rate(folder, actors))
    rows = [
        {
            "prefill actors": actors,
            "documents": n_documents,
            "seconds": round(min(seconds[actors]), 1),
            "documents/s": round(n_documents / min(seconds[actors]), 3),
            "after the first of each": round(max(rates[actors]), 3),
        }
        for actors in seconds
    ]
    print(table(rows, list(rows[0])), "\n")
    whole, steady = min(seconds[1]) / min(seconds[2]), max(rates[2]) / max(rates[1])
    print(f"two actors / one: {whole:.2f} start of the actors included, {steady:.2f} after the first document of each")
    return [target("documents/s, two actors / one", steady, 1.7, at_least=True)]


def steady_rate(store: Path, actors: int) -> float:
    """Documents a second once each actor has given its first."""
    times = sorted(path.stat().st_mtime for path in store.glob("manifests/*/*.json"))
    return (len(times) - actors) / max(1e-9, times[-1] - times[actors - 1])


# overhead


def bare_loop(documents: list[dict[str, Any]], ready: Any, done: Any) -> None:
    """Prefill and index construction in one process, and nothing else."""
    limit_threads(1)
    loaded = load_model(resolved_model(ModelConfig(), has_cuda=False))
    limit_threads(1)
    config = BuildConfig()
    for document in documents:
        context = encode(loaded, document["document_id"], document["text"])
        for _, unit in prefill_units(loaded, [context], config):
            if unit["unit_kind"] != "tokens":
                layer_block(unit, config)
    done.put(time.process_time())


def overhead(args: argparse.Namespace) -> list[Target]:
    n_documents, tokens, repeats = (4, 2048, 1) if args.quick else (16, 8192, 1)
    documents = documents_of(n_documents, tokens)
    connect()
    bare, bare_cpu, jobs, jobs_cpu = [], [], [], []
    for _ in range(repeats):
        spawn = multiprocessing.get_context("spawn")
        done = spawn.Queue()
        began = time.perf_counter()
        halves = [documents[0::2], documents[1::2]]
        running = [spawn.Process(target=bare_loop, args=(half, None, done)) for half in halves]
        for process in running:
            process.start()
        bare_cpu.append(sum(done.get() for _ in running))
        for process in running:
            process.join()
        bare.append(time.perf_counter() - began)
        with folder_of("overhead") as folder:
            with cpu_time() as spent:
                began = time.perf_counter()
                must_be_whole(build(documents, store=folder, progress=False), n_documents)
                jobs.append(time.perf_counter() - began)
            jobs_cpu.append(spent[0])
    rows = [
        {"what": "bare loop, two processes", "seconds": round(min(bare), 1), "CPU seconds": round(min(bare_cpu), 1)},
        {"what": "rabatch build", "seconds": round(min(jobs), 1), "CPU seconds": round(min(jobs_cpu), 1)},
    ]
    print(f"{n_documents} documents of {tokens} tokens\n{table(rows, list(rows[0]))}\n")
    share = min(jobs) / min(bare) - 1
    print(f"overhead: {share:.1%} of the time, {min(jobs_cpu) / min(bare_cpu) - 1:.1%} of the CPU time")
    return [target("build over the bare loop, share more", share, 0.15, at_least=False)]


@contextmanager
def cpu_time() -> Iterator[list[float]]:
    """CPU seconds of this process and all that descend from it meanwhile; those that end are seen to 0.2 s before."""
    tick, found = os.sysconf("SC_CLK_TCK"), [0.0]
    first: dict[int, float] = {}
    last: dict[int, float] = {}

    def look(new: float | None) -> None:
        for pid in descendants(os.getpid()) | {os.getpid()}:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            last[pid] = sum(map(int, fields[11:13])) / tick
            first.setdefault(pid, last[pid] if new is None else new)

    look(None)
    try:
        with watching(lambda: look(0.0)):
            yield found
    finally:
        look(0.0)
        found[0] = sum(last.values()) - sum(first.values())


@contextmanager
def watching(look: Callable[[], None]) -> Iterator[None]:
    """Looks five times a second, from a thread."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# many


def many(args: argparse.Namespace) -> list[Target]:
    n_documents, n_questions = (40, 3) if args.quick else (args.documents, 10)
    words = "The keeper of the north tower counted lamps and wrote their numbers into a green book. "
    documents = [{"document_id": f"d{n:05}", "text": f"Report {n}. " + words * 8} for n in range(n_documents)]
    questions = [
        {"question_id": f"q{n:05}-{m}", "document_id": f"d{n:05}", "question": f"What was counted, {m}?"}
        for n in range(n_documents)
        for m in range(n_questions)
    ]
    config, short = BuildConfig(sink_tokens=16, window_tokens=64), GenerationSettings(max_new_tokens=8)
    connect()
    with folder_of("many") as folder, growth() as grown:
        report = folder / "report.html"
        with Observer("many", progress=True, report_html=report) as watch:
            built = build(documents, store=folder / "index", config=config, observer=watch)
            must_be_whole(built, n_documents)
            asked = {"store": folder / "index", "output": folder / "answers", "generation": short}
            answered = answer(questions, **asked, observer=watch)
        size = report.stat().st_size
        stored = stored_pairs(folder / "answers")
    whole = answered.answered == len(questions) == len(stored) and set(stored.values()) == {1}
    print(f"{n_documents} documents, {built.tokens:,} tokens: built in {built.seconds:.0f} s")
    print(
        f"{len(questions)} questions: {answered.answered} answered in {answered.seconds:.0f} s; report {size:,} bytes"
    )
    print(f"memory of the driver: {grown['before']:.0f} MB before, {grown['most']:.0f} MB at most")
    return [
        target("driver's memory growth, MB", grown["most"] - grown["before"], 200, at_least=False),
        target("every question answered once, report written", float(whole and size > 0), 1, at_least=True),
    ]


@contextmanager
def growth() -> Iterator[dict[str, float]]:
    """Resident memory of this process in MB, without the pages of Ray's object store that it has mapped."""
    before = resident_mb()
    found = {"before": before, "most": before}

    def look() -> None:
        found["most"] = max(found["most"], resident_mb())

    with watching(look):
        yield found


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return (int(values["RssAnon"]) + int(values["RssFile"])) / 1024


# kills


def kills(args: argparse.Namespace) -> list[Target]:
    n_documents, tokens, n_questions = (2, 1024, 2) if args.quick else (8, 4096, 8)
    wanted = 3 if args.quick else args.kills
    draw = random.Random(args.seed)
    with folder_of("kills") as folder:
        corpus = write_corpus(str(folder / "corpus"), n_documents=n_documents, tokens=tokens, n_questions=n_questions)
        expected = undisturbed(folder, corpus["paths"])
        began = time.perf_counter()
        killed, starts = disturbed(folder, corpus["paths"], draw, wanted)
        seconds = time.perf_counter() - began
        found, stored = answers_in(folder / "answers"), stored_pairs(folder / "answers")
        made = {str(path.relative_to(folder / "index")) for path in folder.glob("index/manifests/*/*.json")}
    rows = [{"killed": name, "times": killed[name]} for name in VICTIMS]
    print(table(rows, list(rows[0])))
    print(f"\n{starts} starts of a command, {seconds:.0f} s; {len(made)} indexes, {len(found)} answers")
    same = found == expected and set(stored.values()) == {1} and len(made) == n_documents
    return [
        target("kills of driver and actors", sum(killed.values()), wanted, at_least=True),
        target("answers equal to the undisturbed run's, each once", float(same), 1, at_least=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="small: too short for the targets of time")
    parser.add_argument("--documents", type=int, default=1000, help="of the part `many`")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    print(machine(1), f"load {os.getloadavg()[0]:.1f}\n")
    targets: list[Target] = []
    for name in args.parts or PARTS:
        print(f"== {name}")
        targets += {"scaling": scaling, "overhead": overhead, "many": many, "kills": kills}[name](args)
        print()
    print(table(targets, ["name", "value", "target", "holds"]))
    print(json.dumps({"benchmark": "jobs", "settings": vars(args), "targets": targets}))


if __name__ == "__main__":
    main()
