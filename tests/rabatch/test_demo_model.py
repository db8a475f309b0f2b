"""The shipped demo model: what it is, that it answers, and that its training script runs."""

import json
import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rabatch.demo.corpus import QUESTION_TEMPLATE, generate_document

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(str(files("rabatch.demo") / "model"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def test_is_a_small_llama_with_grouped_queries(model):
    assert type(model) is LlamaForCausalLM
    assert model.config.num_attention_heads >= 2 * model.config.num_key_value_heads
    assert model.config.num_key_value_heads >= 2
    assert (FOLDER / "model.safetensors").stat().st_size <= 16 * 2**20
    assert json.loads((FOLDER / "config.json").read_text())["dtype"] == "bfloat16"
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


@settings(deadline=None, max_examples=200)
@given(st.text())
@example("🙂🙃 👩‍👩‍👧\x00\x07\x1b\x7f")
@example("  two  spaces\t\r\n\n\n 12 345 6789 ")
@example("ſtraße ﷽ \u202e\ufeff\u0301")
def test_tokenizer_round_trips(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(deadline=None, max_examples=50)
@given(st.text())
def test_question_tokenises_the_same_alone_as_after_a_document(tokenizer, question):
    document = "The value of key 12 is 34."
    tail = QUESTION_TEMPLATE.format(question=question)
    together = tokenizer(document + tail, add_special_tokens=False).input_ids
    apart = [tokenizer(text, add_special_tokens=False).input_ids for text in (document, tail)]
    assert together == apart[0] + apart[1]


def test_answers_questions_about_a_document(model, tokenizer):
    document, questions = generate_document(document_id="shipped", tokens=2048, n_questions=16, seed=77)
    right = []
    for question in questions:
        prompt = document["text"] + QUESTION_TEMPLATE.format(question=question["question"])
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            output = model.generate(**inputs)
        text = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        right.append(text.strip() == question["expected"])
    assert sum(right) >= 0.9 * len(questions)


@pytest.fixture
def tools(monkeypatch):
    """Lets a test import the scripts in tools/, and restores what they set."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    n_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(n_threads)


def test_training_forward_equals_transformers(model, tokenizer, tools):
    from demo_training.forward import hidden_states

    ids = tokenizer("The value of key 12 is 34." * 9, return_tensors="pt").input_ids
    with torch.no_grad():
        ours = hidden_states(model, ids, torch.arange(ids.shape[1])[None])
        theirs = model.model(ids).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_training_runs_every_stage_and_resumes_exactly(tmp_path, tools, capsys):
    from train_demo_model import main

    tiny = ["--steps", "2,2,1,1", "--length", "256", "--step-tokens", "256", "--check-every", "2", "--threads", "1"]
    tiny += ["--check-lengths", "256"]
    main(["--out", str(tmp_path / "whole"), *tiny])
    losses = [float(value) for value in re.findall(r"loss (\S+),", capsys.readouterr().out)]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)

    main(["--out", str(tmp_path / "parts"), *tiny, "--stop-after", "3"])
    main(["--out", str(tmp_path / "parts"), *tiny, "--resume"])
    weights = [
        AutoModelForCausalLM.from_pretrained(tmp_path / run / "model").state_dict() for run in ("whole", "parts")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight)


def test_evaluation_counts_dense_and_static_answers(tools, capsys):
    from evaluate_demo_model import main

    main(["--tokens", "1024", "--documents", "1", "--questions", "16", "--threads", "1"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])["results"][0]
    assert [sum(counts) for counts in zip(*result["dense"].values(), strict=True)][1] == 16
    assert sum(right for right, _ in result["dense"].values()) >= 13
    assert sum(right for right, _ in result["static"].values()) == 0
