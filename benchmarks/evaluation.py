"""What sparse attention costs in accuracy, and what an evaluation costs: the tables of `rabatch evaluate`.

    python benchmarks/evaluation.py [table] [baselines] [sharing] [--quick] [--longest 16384] [--samples 50]

Parts, all on the demo model:

- table: four recipes, six tasks, three lengths. It ends with the seconds of the whole.
- baselines: every recipe at the longest length, the baselines at as many attended keys as the graph.
- sharing: evaluating eight recipes against one, each from nothing.

What learned gates are worth against random ones is in `streaming_heads.py`.

A cell without an answer to each of its questions is an error: nothing of it is reported.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common.measures import machine, table

from rabatch.config import BuildConfig
from rabatch.jobs.evaluate import evaluate
from rabatch.jobs.evaluated import EvaluationResult

PARTS = ("table", "baselines", "sharing")
TASKS = ("niah_single_2", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "vt")
SEVERAL = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "niah_multivalue", "niah_multiquery", "vt", "qa")
"""Tasks whose contexts have several questions; at the longest length the others take too long."""
LENGTHS = (2048, 4096, 8192)
TABLE = ("dense", "streaming", "graph", "duo+graph")
OURS = ("graph", "scan")
QUEST = "quest:dense_layers=0"
"""The model has four layers: two dense ones would be half of it."""
BASELINES = ("streaming", "snapkv", "pyramidkv", "h2o", QUEST, "infinigen", "ivf", "flat")
BUILT_SLOWLY = ("hnsw", "vamana")
"""Built anew at every opening, for some seconds per head: of one task only."""
EIGHT = ("dense", "streaming", "graph", "scan", "flat", "snapkv", QUEST, "pyramidkv")
HEADS = {"head_pattern": "demo", "head_sparsity": 0.5}
STATIC = 128, 512
SOLVED = 0.8
"""A task that dense attention answers at least so well shows what other recipes lose."""
POINTS = 100


def run(folder: Path, **arguments: Any) -> EvaluationResult:
    """An evaluation into a folder; an error if a question has no answer."""
    result = evaluate(out=folder, heads=HEADS, **arguments)
    if result.failed or result.failed_documents:
        raise AssertionError(f"{result.failed} questions have no answer: {result.first_failures}")
    return result


def scores(result: EvaluationResult, length: int) -> dict[tuple[str, str], float]:
    """By task and recipe, in points of 100."""
    return {(c.task, c.recipe): POINTS * c.score.mean for c in result.cells if c.length == length and c.score}


def print_scores(result: EvaluationResult, length: int) -> None:
    found, tasks = scores(result, length), list(dict.fromkeys(cell.task for cell in result.cells))
    rows = []
    for mean in (cell for cell in result.means if cell.length == length):
        row: dict[str, Any] = {"recipe": mean.recipe}
        row |= {task.removeprefix("niah_"): f"{found[task, mean.recipe]:.1f}" for task in tasks}
        row["mean"] = f"{POINTS * mean.score.mean:.1f}" if mean.score else ""
        row["attended %"] = f"{POINTS * (mean.attended_share or 0):.2f}"
        row["bytes/token"] = f"{mean.stored_bytes_per_token or 0:.0f}"
        row["ms/token"] = f"{1000 * (mean.seconds_per_token or 0):.2f}"
        rows.append(row)
    print(f"\n{length} tokens")
    print(table(rows, [*rows[0]]), flush=True)


def hard(result: EvaluationResult, recipe: str) -> float:
    """Score, in points, of the questions none of whose sentences touches the static set."""
    wanted: dict[str, list[float]] = defaultdict(list)
    for row in result.predictions:
        low, high = STATIC[0] / row["length"], 1 - STATIC[1] / row["length"]
        inside = row["depths"] and all(low < depth < high - 0.01 for depth in row["depths"])
        if row["recipe"] == recipe and inside:
            wanted[row["task"]].append(row["score"])
    return POINTS * max(float(np.mean(some)) for some in wanted.values())


def lost(result: EvaluationResult, length: int, recipe: str) -> dict[str, float]:
    """Points that a recipe loses, of each task that dense attention solves."""
    found = scores(result, length)
    tasks = {task for task, _ in found}
    solved = {task for task in tasks if found[task, "dense"] >= POINTS * SOLVED}
    return {task: round(found[task, "dense"] - found[task, recipe], 2) for task in sorted(solved)}


def target(name: str, value: float, limit: float, *, at_most: bool) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 3),
        "target": limit,
        "holds": value <= limit if at_most else value >= limit,
    }


def the_table(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    began = time.perf_counter()
    result = run(folder, tasks=TASKS, lengths=options.lengths, recipes=TABLE, samples=options.samples)
    seconds = time.perf_counter() - began
    for length in options.lengths:
        print_scores(result, length)
    print(f"\n{len(result.predictions)} answers in {seconds:.0f} s: {result.seconds}")
    if options.keep:
        for name in ("report.md", "metrics.json", "report.html"):
            Path(options.keep).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, Path(options.keep) / name)
    longest = max(options.lengths)
    return [
        target("table: minutes", seconds / 60, 30, at_most=True),
        target("table: points lost by graph, most", max(lost(result, longest, "graph").values()), 0.5, at_most=True),
        target("table: points of streaming beyond the static set", hard(result, "streaming"), 5, at_most=True),
        target("table: points duo+graph is below graph, mean of tasks", _below(result, longest), 0.5, at_most=True),
    ]


def _below(result: EvaluationResult, length: int) -> float:
    mean = {cell.recipe: POINTS * cell.score.mean for cell in result.means if cell.length == length and cell.score}
    return mean["graph"] - mean["duo+graph"]


def baselines(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    length = options.longest
    recipes = ("dense", *OURS, "duo+graph", *BASELINES)
    asked: dict[str, Any] = {"lengths": (length,), "samples": options.samples, "questions_per_context": 10}
    asked["config"] = BuildConfig(key_mass=True, query_vectors=True)  # one index for both
    result = run(folder, tasks=SEVERAL, recipes=recipes, **asked)
    slow = run(folder, tasks=("niah_multikey_3",), recipes=BUILT_SLOWLY, **asked)
    print_scores(result, length)
    print_scores(slow, length)
    found = scores(result, length) | scores(slow, length)
    best = max((found["niah_multikey_3", name], name) for name in (*BASELINES, *BUILT_SLOWLY))
    print(f"\nlost by graph: {lost(result, length, 'graph')}; by scan: {lost(result, length, 'scan')}")
    print(f"the best baseline on niah_multikey_3: {best[1]}, {best[0]:.1f}")
    ahead = found["niah_multikey_3", "graph"] - best[0]
    return [
        target("longest: points lost by graph, most", max(lost(result, length, "graph").values()), 0.5, at_most=True),
        target("longest: points graph is ahead of every baseline, multikey-3", ahead, 0.01, at_most=False),
        target("longest: points of streaming beyond the static set", hard(result, "streaming"), 5, at_most=True),
    ]


def sharing(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    seconds = {}
    for recipes in (("graph",), EIGHT):
        began = time.perf_counter()
        run(
            folder / str(len(recipes)), tasks=("niah_multikey_1", "vt"), lengths=(max(options.lengths),),
            recipes=recipes, samples=options.samples,
        )  # fmt: skip
        seconds[len(recipes)] = time.perf_counter() - began
    print(f"\none recipe {seconds[1]:.1f} s, eight {seconds[8]:.1f} s")
    return [target("eight recipes / one", seconds[8] / seconds[1], 3, at_most=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="short and few: too few for the targets of accuracy")
    parser.add_argument("--longest", type=int, default=16384, help="tokens, of the part `baselines`")
    parser.add_argument("--samples", type=int, default=50, help="questions per task and length")
    parser.add_argument("--keep", metavar="DIR", help="put the report of the part `table` here")
    options = parser.parse_args()
    options.lengths = LENGTHS
    if options.quick:
        options.lengths, options.longest, options.samples = (1024, 2048), 2048, 5
    parts = options.parts or PARTS
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no such part: {', '.join(unknown)}; choose of {', '.join(PARTS)}")
    print(f"{machine(torch.get_num_threads())} load {os.getloadavg()[0]:.1f}", flush=True)
    steps = {"table": the_table, "baselines": baselines, "sharing": sharing}
    targets = []
    for part in parts:
        print(f"\n== {part}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            targets += steps[part](Path(folder), options)
    print("\n" + table(targets, ["name", "value", "target", "holds"]))
    settings = {"parts": list(parts), "quick": options.quick, "longest": options.longest, "samples": options.samples}
    print(json.dumps({"benchmark": "evaluation", "settings": settings, "targets": targets}))


if __name__ == "__main__":
    main()
