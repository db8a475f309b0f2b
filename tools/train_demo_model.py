"""Train the demo model: `python tools/train_demo_model.py --out RUN [--start MODEL_DIR] [--stages NAME,NAME]`.

Without `--start` the weights begin with the circuit initialisation. Each stage has its own optimizer and learning rate
schedule; a batch is a function of seed, stage and step, so `--resume` continues exactly. The result is exported to
`RUN/model` with every checkpoint. Evaluate it with `tools/evaluate_demo_model.py`.
"""

import argparse
import math
import os
import shutil
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from demo_training.batches import ANSWER_WEIGHT, Batch, QuestionMix, copy_batch, question_batch  # noqa: E402
from demo_training.circuit import initialise_circuit, token_frequencies  # noqa: E402
from demo_training.forward import hidden_states  # noqa: E402

from rabatch.demo.corpus import ANSWER_TEMPLATE, KINDS, QUESTION_TEMPLATE, generate_document  # noqa: E402

SHIPPED = ROOT / "rabatch" / "demo" / "model"
COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the training.

    Attributes:
        lengths: sequence lengths in tokens, one of them drawn per step.
        steps: optimizer steps of about `step_tokens` tokens each.
        learning_rate: its peak; it falls to `final_rate` of it, as a cosine, over the last `decay_share` of the steps.
        copy_share: share of the steps that are random-token copying.
    """

    name: str
    lengths: tuple[int, ...]
    steps: int
    learning_rate: float
    mix: QuestionMix = field(default_factory=QuestionMix)
    step_tokens: int = 2048
    copy_share: float = 0.05
    warmup_steps: int = 50
    decay_share: float = 0.5
    final_rate: float = 0.3


STAGES = (
    Stage("copy", (512,), 200, 2e-3, step_tokens=4096, copy_share=1.0, final_rate=1.0),
    Stage("short", (256, 512, 1024), 1200, 1.2e-3, QuestionMix(question_share=0.6, max_position=16384)),
    Stage("medium", (512, 1024, 2048), 600, 1.2e-3, QuestionMix(max_position=36864)),
    Stage(
        "long", (1024, 2048, 2048, 4096, 4096, 8192), 450, 9e-4,
        QuestionMix(question_share=0.3, fact_share=(0.08, 0.5), max_position=36864),
        step_tokens=4096, warmup_steps=20, decay_share=0.8, final_rate=0.03,
    ),
    Stage(
        "tasks", (512, 1024, 1024, 2048), 1500, 1.2e-3, QuestionMix(max_position=36864, task_share=0.75),
        step_tokens=2048, warmup_steps=20, decay_share=0.3, final_rate=0.5,
    ),
    Stage(
        "tasks_long", (1024, 2048, 4096, 4096, 8192), 400, 8e-4,
        QuestionMix(question_share=0.3, fact_share=(0.08, 0.5), max_position=36864, task_share=0.75),
        step_tokens=4096, warmup_steps=20, decay_share=0.8, final_rate=0.03,
    ),
)  # fmt: skip


def make_batch(stage: Stage, step: int, seed: int, tokenizer: Tokenizer) -> Batch:
    rng = Random(f"train/{seed}/{stage.name}/{step}")
    length = rng.choice(stage.lengths)
    batch = max(1, stage.step_tokens // length)
    if rng.random() < stage.copy_share:
        length = min(length, 2048)
        batch = max(1, stage.step_tokens // length)
        return copy_batch(rng, tokenizer, batch=batch, length=length, max_position=stage.mix.max_position)
    return question_batch(rng, tokenizer, batch=batch, length=length, mix=stage.mix)


def learning_rate(stage: Stage, step: int) -> float:
    """Linear warm-up, constant, then a cosine to `final_rate` of the peak."""
    warmup = min(1.0, (step + 1) / stage.warmup_steps)
    decay = max(0.0, (step / stage.steps - (1 - stage.decay_share)) / stage.decay_share)
    cosine = (1 + math.cos(math.pi * decay)) / 2
    return stage.learning_rate * warmup * (stage.final_rate + (1 - stage.final_rate) * cosine)


def batch_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Weighted mean cross entropy, and the share of answer tokens predicted right. In fp32: many CPUs have no bf16."""
    selected = batch.loss_weights > 0
    logits = model.lm_head(hidden_states(model, batch.token_ids, batch.positions)[selected])
    targets = batch.token_ids.roll(-1, dims=1)[selected]
    weights = batch.loss_weights[selected]
    losses = F.cross_entropy(logits, targets, reduction="none")
    is_answer = weights == ANSWER_WEIGHT
    correct = (logits.argmax(-1) == targets)[is_answer].float().mean().item()
    return (losses * weights).sum() / weights.sum(), correct


@torch.no_grad()
def quick_accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, tokens: int, n_documents: int) -> dict[str, float]:
    """Share of answers predicted right under teacher forcing, by kind. Its documents are not trained on."""
    right: dict[str, list[bool]] = defaultdict(list)
    for index in range(n_documents):
        document, questions = generate_document(
            document_id=f"monitor-{index}", tokens=tokens, n_questions=min(40, tokens // 64), seed=10**9 + tokens
        )
        ids = tokenizer.encode(document["text"]).ids
        answers = []
        for question in questions:
            ids += tokenizer.encode(QUESTION_TEMPLATE.format(question=question["question"])).ids
            answer = tokenizer.encode(ANSWER_TEMPLATE.format(expected=question["expected"])).ids
            answers.append((question["kind"], len(ids), len(ids) + len(answer)))
            ids += answer
        token_ids = torch.tensor([ids])
        hidden = hidden_states(model, token_ids, torch.arange(len(ids))[None])[0]
        for kind, start, end in answers:
            predicted = model.lm_head(hidden[start - 1 : end - 1]).argmax(-1)
            right[kind].append(bool((predicted == token_ids[0, start:end]).all()))
    return {kind: sum(right[kind]) / max(1, len(right[kind])) for kind in KINDS}


def export(model: LlamaForCausalLM, folder: Path) -> None:
    """Write `model` in bf16 with the tokenizer's files, as `AutoModelForCausalLM` reads it."""
    half: Any = LlamaForCausalLM(model.config)
    half.to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    config = model.config
    half.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=32, bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id,
    )  # fmt: skip
    half.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it readable by its owner only
    for name in COPIED_FILES:
        if (SHIPPED / name).resolve() != (folder / name).resolve():
            shutil.copyfile(SHIPPED / name, folder / name)


def save_checkpoint(path: Path, state: dict[str, object]) -> None:
    """Replace the checkpoint in one step, so that an interrupted run leaves a whole one."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def make_optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), eps=1e-9)


@dataclass(frozen=True, slots=True)
class Checks:
    """Every `steps` steps: a checkpoint, an export, and the quick accuracy at each of `lengths` (document tokens)."""

    steps: int
    lengths: tuple[int, ...]


def train_stage(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    stage: Stage,
    steps: range,
    *,
    out: Path,
    seed: int,
    tokens_seen: int,
    optimizer_state: dict[str, Any] | None,
    checks: Checks,
) -> int:
    """Run the `steps` of `stage` and print its progress. Returns the tokens seen so far, in this run."""
    optimizer = make_optimizer(model, stage.learning_rate)
    if optimizer_state is not None:
        optimizer.load_state_dict(optimizer_state)
    started, tokens_before = time.monotonic(), tokens_seen
    window: list[tuple[float, float]] = []
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        batch = make_batch(stage, step, seed, tokenizer)
        loss, correct = batch_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        tokens_seen += batch.token_ids.numel()
        window.append((loss.item(), correct))
        last = step + 1 == steps.stop
        if last or (step + 1) % min(25, checks.steps) == 0:
            rate = (tokens_seen - tokens_before) / (time.monotonic() - started)
            mean_loss, mean_correct = (sum(values) / len(values) for values in zip(*window, strict=True))
            print(
                f"{stage.name} {step + 1}/{stage.steps} {tokens_seen / 1e6:.2f} M tokens, loss {mean_loss:.3f}, "
                f"answer tokens {mean_correct:.3f}, {rate:.0f} tokens/s",
                flush=True,
            )
            window = []
        if last or (step + 1) % checks.steps == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "stage": stage.name}
            save_checkpoint(out / "checkpoint.pt", {**state, "step": step + 1, "tokens": tokens_seen})
            export(model, out / "model")
            for tokens in checks.lengths:
                accuracy = quick_accuracy(model, tokenizer, tokens, max(1, 4096 // tokens))
                print(f"  {tokens} tokens:", {kind: round(value, 3) for kind, value in accuracy.items()}, flush=True)
    return tokens_seen


def initial_model(start: str | None, seed: int, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """The weights of the folder `start` in fp32, or a new model of the shipped configuration."""
    if start is not None:
        loaded: LlamaForCausalLM = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        return loaded
    config = LlamaConfig.from_pretrained(SHIPPED)
    config.dtype = torch.float32
    model = LlamaForCausalLM(config)
    initialise_circuit(model, token_frequencies(tokenizer, config.vocab_size, seed), seed)
    return model


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="folder of the checkpoint and of the exported model")
    parser.add_argument("--start", help="folder of weights to continue from (default: circuit initialisation)")
    parser.add_argument("--stages", default=",".join(stage.name for stage in STAGES), help="names, in order")
    parser.add_argument("--steps", help="steps of the stages, comma separated (default: the table's)")
    parser.add_argument("--length", type=int, help="one sequence length for every stage, in tokens (for tests)")
    parser.add_argument("--step-tokens", type=int, help="tokens per step of every stage (for tests)")
    parser.add_argument("--stop-after", type=int, help="stop after this many steps in all, as if interrupted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check-every", type=int, default=100, help="steps between checkpoints and quick evaluations")
    parser.add_argument("--check-lengths", default="1024,4096", help="document tokens of the quick evaluations")
    parser.add_argument("--resume", action="store_true", help="continue from OUT/checkpoint.pt")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    table = {stage.name: stage for stage in STAGES}
    names = options.stages.split(",")
    if unknown := [name for name in names if name not in table]:
        raise SystemExit(f"--stages: unknown {', '.join(unknown)}; there are {', '.join(table)}")
    stages = [table[name] for name in names]
    if options.steps:
        steps = map(int, options.steps.split(","))
        stages = [replace(stage, steps=n) for stage, n in zip(stages, steps, strict=True)]
    if options.length:
        stages = [replace(stage, lengths=(options.length,)) for stage in stages]
    if options.step_tokens:
        stages = [replace(stage, step_tokens=options.step_tokens) for stage in stages]
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    model = initial_model(options.start, options.seed, tokenizer)
    checks = Checks(options.check_every, tuple(map(int, options.check_lengths.split(","))))
    state = None
    tokens_seen = 0
    if options.resume:
        state = torch.load(options.out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(state["model"])
        tokens_seen = state["tokens"]
        stages = stages[names.index(state["stage"]) :]
    steps_left = options.stop_after or sum(stage.steps for stage in stages)
    for stage in stages:
        first_step = state["step"] if state else 0
        stop = min(stage.steps, first_step + steps_left)
        tokens_seen = train_stage(
            model, tokenizer, stage, range(first_step, stop), out=options.out, seed=options.seed,
            tokens_seen=tokens_seen, optimizer_state=state["optimizer"] if state else None, checks=checks,
        )  # fmt: skip
        steps_left -= stop - first_step
        state = None
        if stop < stage.steps:
            break
    print(f"{options.out / 'model'}: {tokens_seen} tokens trained")


if __name__ == "__main__":
    main()
