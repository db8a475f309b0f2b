"""Measure the demo model: `python tools/evaluate_demo_model.py [--model DIR] [--tokens 2048,4096,8192,16384]`.

Greedy exact match of the whole answer, one question per prompt. A document is prefilled once; each of its questions
is then answered over the whole context (dense) and over its first 128 and last 512 tokens only. The second is counted
where no sentence the answer needs lies in those tokens. Prints a table and, last, one JSON line.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rabatch.demo.corpus import ANSWER_TEMPLATE, KINDS, QUESTION_TEMPLATE, generate_document  # noqa: E402

SINK_TOKENS = 128
WINDOW_TOKENS = 512
PREFILL_CHUNK_TOKENS = 1024


@torch.no_grad()
def prefill(model: Any, ids: list[int]) -> DynamicCache:
    """The cache of `ids`, computed in chunks so that memory stays small."""
    cache = DynamicCache(config=model.config)
    for start in range(0, len(ids), PREFILL_CHUNK_TOKENS):
        chunk = torch.tensor([ids[start : start + PREFILL_CHUNK_TOKENS]])
        model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def static_part(model: Any, cache: Any) -> DynamicCache:
    """Only the first `SINK_TOKENS` and the last `WINDOW_TOKENS` entries of every layer, at their old positions."""
    part = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        kept = [
            torch.cat([states[:, :, :SINK_TOKENS], states[:, :, -WINDOW_TOKENS:]], dim=2)
            for states in (layer.keys, layer.values)
        ]
        part.update(kept[0], kept[1], index)
    return part


@torch.no_grad()
def answer(model: Any, cache: DynamicCache, n_context: int, question: list[int], max_new_tokens: int) -> list[int]:
    """Greedy answer ids, up to and including the end token. The cache is cut back to what it was."""
    entries = cache.get_seq_length()
    end = model.generation_config.eos_token_id
    out: list[int] = []
    ids, position = question, n_context
    while len(out) < max_new_tokens and (not out or out[-1] != end):
        positions = torch.arange(position, position + len(ids))[None]
        result = model(
            input_ids=torch.tensor([ids]), position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        position += len(ids)
        ids = [int(result.logits[0, -1].argmax())]
        out += ids
    cache.crop(entries - cache.get_seq_length())
    return out


def evaluate(
    model: Any, tokenizer: Any, *, tokens: int, n_documents: int, n_questions: int, seed: int
) -> dict[str, Any]:
    """Counts [right, asked] by kind, for dense attention and for the static part alone."""
    dense: dict[str, list[bool]] = defaultdict(list)
    static: dict[str, list[bool]] = defaultdict(list)
    failures = []
    started = time.monotonic()
    for index in range(n_documents):
        document, questions = generate_document(
            document_id=f"evaluation-{tokens}-{index}", tokens=tokens, n_questions=n_questions, seed=seed
        )
        encoded = tokenizer(document["text"], add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = encoded.input_ids, encoded.offset_mapping
        cache = prefill(model, ids)
        part = static_part(model, cache)
        first_far, last_far = offsets[SINK_TOKENS][0], offsets[len(ids) - WINDOW_TOKENS][0]
        for item in questions:
            asked = tokenizer(QUESTION_TEMPLATE.format(question=item["question"]), add_special_tokens=False).input_ids
            wanted = tokenizer(ANSWER_TEMPLATE.format(expected=item["expected"]), add_special_tokens=False).input_ids
            got = answer(model, cache, len(ids), asked, len(wanted) + 2)
            dense[item["kind"]].append(got == wanted)
            if got != wanted:
                failures.append({"tokens": tokens, "question": item["question"], "expected": item["expected"],
                                 "got": tokenizer.decode(got)})  # fmt: skip
            if all(start >= first_far and end <= last_far for start, end in item["fact_spans"]):
                static[item["kind"]].append(answer(model, part, len(ids), asked, len(wanted) + 2) == wanted)
    return {
        "tokens": tokens,
        "dense": {kind: [sum(dense[kind]), len(dense[kind])] for kind in KINDS},
        "static": {kind: [sum(static[kind]), len(static[kind])] for kind in KINDS},
        "failures": failures,
        "seconds": round(time.monotonic() - started, 1),
    }


def _share(counts: list[list[int]]) -> str:
    right, asked = (sum(column) for column in zip(*counts, strict=True))
    return f"{100 * right / asked:5.1f} % ({right}/{asked})" if asked else "-"


def print_table(results: list[dict[str, Any]]) -> None:
    print(f"| tokens | attention | {' | '.join(KINDS)} | single + many_keys | all |")
    print(f"|---|---|{'---|' * (len(KINDS) + 2)}")
    for result in results:
        for name, label in (("dense", "dense"), ("static", f"{SINK_TOKENS} + {WINDOW_TOKENS} only")):
            counts = result[name]
            cells = [_share([counts[kind]]) for kind in KINDS]
            cells += [_share([counts["single"], counts["many_keys"]]), _share(list(counts.values()))]
            print(f"| {result['tokens']} | {label} | {' | '.join(cells)} |")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "rabatch" / "demo" / "model"), help="model folder")
    parser.add_argument("--tokens", default="2048,4096,8192,16384", help="document lengths")
    parser.add_argument("--documents", default="6,6,6,3", help="documents per length")
    parser.add_argument("--questions", type=int, default=40, help="questions per document, kinds in turn")
    parser.add_argument("--seed", type=int, default=30_000_000, help="of the documents")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--failures", type=int, default=0, help="print this many wrong answers per length")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    results = []
    for tokens, n_documents in zip(
        map(int, options.tokens.split(",")), map(int, options.documents.split(",")), strict=True
    ):
        result = evaluate(
            model, tokenizer, tokens=tokens, n_documents=n_documents, n_questions=options.questions, seed=options.seed
        )
        for failure in result.pop("failures")[: options.failures]:
            print(failure)
        results.append(result)
        print(f"{tokens} tokens: {result['seconds']} s", file=sys.stderr, flush=True)
    print_table(results)
    print(json.dumps({"model": Path(options.model).name, "seed": options.seed, "results": results}))


if __name__ == "__main__":
    main()
