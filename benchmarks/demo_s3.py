"""The whole demo with its index store on an S3 server, beside the same on the local disk.

    python benchmarks/demo_s3.py [--quick]

The server is moto's, in a process of its own on this machine: real requests, signatures, multipart and conditional
puts, no latency. So the seconds show what the protocol costs in CPU on two sides, and the requests what a real server
would be asked. Answers and sizes of both runs are compared before anything is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from moto_server import BUCKET, moto_server

from rabatch.cli import main as rabatch
from rabatch.demo.run import RECIPES, run_demo

SAME = ("exact_match", "tokens", "kv_bytes", "stored_bytes", "failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 documents of 1.5K tokens, 4 questions each")
    quick = parser.parse_args().quick
    sizes: dict[str, Any] = {"documents": 2, "tokens": 1500, "questions": 4} if quick else {}
    url = f"s3://{BUCKET}/demo"
    run_demo(documents=1, tokens=300, questions=1, progress=False)  # Ray's start is in neither
    local = run_demo(**sizes, progress=False)
    with moto_server() as server:
        remote = run_demo(**sizes, store=url, storage_options=server.options, progress=False)
        asked = {"demo": server.requests()}
        for name in SAME:
            if remote[name] != local[name]:
                sys.exit(f"{name}: {remote[name]} on S3, {local[name]} on the disk; nothing is reported")
        seconds = {}
        for command in ("inspect", "verify"):
            begun = time.perf_counter()
            if rabatch([command, "--store", url, "--storage-options", json.dumps(server.options)]):
                sys.exit(f"rabatch {command} found something wrong")
            seconds[command] = round(time.perf_counter() - begun, 2)
            asked[command] = server.requests()
    print(f"\n{local['documents']} documents, {local['tokens']:,} tokens, {local['questions']} questions, each recipe")
    print(f"exact match, the same on both: {local['exact_match']}; stored: {local['stored_bytes'] / 1e6:.1f} MB")
    print(f"{'seconds':<18}{'disk':>8}{'S3':>8}")
    for name in ("build", "answer", *(f"answer_{method}" for method in RECIPES if method != "graph")):
        print(f"{name:<18}{local['seconds'][name]:>8.1f}{remote['seconds'][name]:>8.1f}")
    for name, took in seconds.items():
        print(f"{name:<26}{took:>8.2f}")
    for name, counts in asked.items():
        print(f"requests of {name}: {sum(counts.values())} {counts}")
    rows = [{"where": "disk", **local["seconds"]}, {"where": "s3", **remote["seconds"], **seconds, "requests": asked}]
    same = [{"name": "answers and sizes as on the disk", "value": 1, "target": 1, "holds": True}]
    print(json.dumps({"benchmark": "demo_s3", "rows": rows, "targets": same}))


if __name__ == "__main__":
    main()
