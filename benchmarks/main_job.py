"""The main job at its acceptance size: documents of 8K tokens, 200 questions and more, three recipes through Ray.

    python benchmarks/main_job.py [--quick] [--documents 26] [--tokens 8192]

Streaming is judged on facts outside its static set only: that is what it cannot see.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from rabatch.demo.run import RECIPES, run_demo
from rabatch.evaluation.scoring import exact_match
from rabatch.storage.store import IndexStore


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 documents of 2K tokens, 4 questions each")
    parser.add_argument("--documents", type=int, default=26)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--questions", type=int, default=8, help="per document")
    parser.add_argument("--seed", type=int, default=2024)
    args = parser.parse_args()
    if args.quick:
        args.documents, args.tokens, args.questions = 2, 2048, 4
    with tempfile.TemporaryDirectory(prefix="rabatch-bench-") as folder:
        report = run_demo(
            documents=args.documents, tokens=args.tokens, questions=args.questions, seed=args.seed, keep=folder
        )
        if report["failed"]:
            print(f"refusing to report: {report['failed']} rows failed", file=sys.stderr)
            return 1
        rows = judge(Path(folder))
    return show(args, report, rows)


def judge(folder: Path) -> list[dict[str, Any]]:
    """One row per question: its kind, whether its facts lie outside the static set, which recipes were right."""
    store = IndexStore(str(folder / "index"))
    outside_of = {manifest.document_id: _outside(store, manifest) for manifest in store.manifests()}
    questions = [json.loads(line) for line in (folder / "corpus" / "questions.jsonl").read_text().splitlines()]
    judged: dict[str, dict[str, Any]] = {}
    for question in questions:
        outside = outside_of[question["document_id"]]
        judged[question["question_id"]] = {
            "kind": question["kind"],
            "outside": all(outside[start:end].all() for start, end in question["fact_spans"]),
        }
    for recipe in RECIPES:
        for row in pq.read_table(folder / f"answers-{recipe}" / "answers.parquet").to_pylist():
            judged[row["question_id"]][recipe] = exact_match(row["expected"], row["answer"])
            judged[row["question_id"]][f"share_{recipe}"] = row["attended_share"]
    return list(judged.values())


def _outside(store: IndexStore, manifest: Any) -> np.ndarray:
    """Per character of the text: does its token lie outside sink and window?"""
    tokens = store.read_tokens(manifest)
    outside = np.zeros(manifest.text_chars, dtype=bool)
    for i in range(manifest.index_start, manifest.index_stop):
        outside[tokens.char_start[i] : tokens.char_end[i]] = True
    return outside


def show(args: argparse.Namespace, report: dict[str, Any], rows: list[dict[str, Any]]) -> int:
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["kind"]].append(row)
        groups["all"].append(row)
        if row["outside"]:
            groups["all, facts outside the static set"].append(row)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{report['documents']} documents, {report['tokens']:,} tokens, {report['questions']} questions\n")
    print(f"{'questions':36}{'n':>5}" + "".join(f"{recipe:>11}" for recipe in RECIPES))
    table = {}
    for name, members in sorted(groups.items()):
        scores = {recipe: float(np.mean([m[recipe] for m in members])) for recipe in RECIPES}
        table[name] = {"n": len(members), **scores}
        print(f"{name:36}{len(members):>5}" + "".join(f"{scores[recipe]:>11.1%}" for recipe in RECIPES))
    share = max(row["share_graph"] for row in rows)
    print(f"\nkeys attended by graph: at most {share:.2%} of a context; seconds: {report['seconds']}")
    everything, outside = table["all"], table.get("all, facts outside the static set", {"streaming": 1.0})
    one_hop = [row for row in rows if row["kind"] in ("single", "many_keys")]
    dense_one_hop = float(np.mean([row["dense"] for row in one_hop])) if one_hop else 0.0
    targets = [
        ("graph below dense, points", 100 * (everything["dense"] - everything["graph"]), 1.0, False),
        ("keys attended by graph, share", share, 0.10, False),
        ("streaming outside its static set, share right", outside["streaming"], 0.20, False),
        ("dense on single and many_keys, share right", dense_one_hop, 0.95, True),
    ]
    judged = [
        {"name": name, "value": value, "target": target, "holds": value >= target if at_least else value <= target}
        for name, value, target, at_least in targets
    ]
    for target in judged:
        print(
            f"{'holds' if target['holds'] else 'FAILS':6} {target['name']}: {target['value']:.4g} ({target['target']})"
        )
    print(
        json.dumps(
            {
                "benchmark": "main_job",
                "settings": vars(args),
                "table": table,
                "seconds": report["seconds"],
                "stored_bytes": report["stored_bytes"],
                "kv_bytes": report["kv_bytes"],
                "targets": judged,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
