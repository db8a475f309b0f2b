"""Learning gates: the attention between full and streaming, the data, the training, and what is written."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from rabatch.attention.seam import AttentionCall
from rabatch.calibration import training
from rabatch.calibration.data import Passkeys, Sample
from rabatch.calibration.gates import GatedAttention, banded
from rabatch.calibration.picture import picture
from rabatch.calibration.settings import CalibrationSettings
from rabatch.calibration.training import PICTURE_FILE, Training, calibrate
from rabatch.cli import main
from rabatch.config import BuildConfig, GenerationSettings, ModelConfig, Recipe
from rabatch.contexts import open_context
from rabatch.decode import answer_batch
from rabatch.demo.corpus import generate_document
from rabatch.errors import ConfigError, ModelError
from rabatch.evaluation.scoring import exact_match
from rabatch.evaluation.tasks import wording
from rabatch.head_pattern import pattern_of, read_gates, resolve, write_gates
from rabatch.loading import LoadedModel, load_model
from tests.rabatch.engine import new_store, store_document
from tests.rabatch.models import SLIDING_LAYERS, save_tiny_model

SMALL = CalibrationSettings(
    steps=4, min_tokens=200, max_tokens=260, lengths=3, passkeys=2, sink_tokens=8, recent_tokens=24
)


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return load_model(ModelConfig(device="cpu", dtype="float32"))


def tiny(name: str, folder: Path) -> LoadedModel:
    return load_model(ModelConfig(name=str(save_tiny_model(name, folder / name)), device="cpu", dtype="float32"))


def a_call(
    n_tokens: int, *, window: int = 0, softcap: float | None = None, dtype: torch.dtype = torch.float32
) -> AttentionCall:
    """Of two KV heads with two query heads each."""
    make = torch.Generator().manual_seed(n_tokens)
    q, k, v = (torch.randn((1, heads, n_tokens, 8), generator=make, dtype=dtype) for heads in (4, 2, 2))
    return AttentionCall(0, 3 * q, k, v, 0.4, softcap, window)


def naive(call: AttentionCall, sink: int, recent: int) -> Tensor:
    """Row by row: [batch, tokens, heads, head_dim]."""
    group = call.query.shape[1] // call.key.shape[1]
    out = torch.empty_like(call.query)
    for head in range(call.query.shape[1]):
        for row in range(call.query.shape[2]):
            seen = [j for j in range(row + 1) if j < sink or j > row - recent]
            scores = call.key[0, head // group, seen] @ call.query[0, head, row] * call.scaling
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            out[0, head, row] = scores.softmax(0) @ call.value[0, head // group, seen]
    return out.transpose(1, 2)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("n_tokens", [1, 12, 45, 70])
def test_gates_go_from_streaming_to_full(n_tokens: int, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 1 it is all causal attention, at 0 first and last tokens, between them the mean of both; in blocks of rows."""
    monkeypatch.setattr("rabatch.calibration.gates._BLOCK_ROWS", 16)
    call, sink, recent = a_call(n_tokens, softcap=softcap), 3, 9
    full, streaming = naive(call, 0, n_tokens), naive(call, sink, recent)
    assert (n_tokens <= sink + recent) == torch.allclose(full, streaming)
    for gates in ([1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.25, 0.75]):
        session = GatedAttention(torch.tensor([gates]), sink_tokens=sink, recent_tokens=recent)
        share = torch.tensor(gates).repeat_interleave(2)[:, None]
        torch.testing.assert_close(session.attend(call), share * full + (1 - share) * streaming, atol=1e-5, rtol=1e-5)
    teacher = GatedAttention(None, sink_tokens=sink, recent_tokens=recent)
    torch.testing.assert_close(teacher.attend(call), full, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sink", "recent"), [(0, 5), (0, 100), (20, 20), (40, 1), (100, 100)])
def test_bands_of_any_width(sink: int, recent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rabatch.calibration.gates._BLOCK_ROWS", 7)
    call = a_call(50)
    found = banded(call, sink=sink, recent=recent).transpose(1, 2)
    torch.testing.assert_close(found, naive(call, sink, recent), atol=1e-5, rtol=1e-5)


def test_a_native_window_has_no_gate() -> None:
    call = a_call(60, window=10)
    gates = torch.tensor([[0.0, 0.5]], requires_grad=True)
    session = GatedAttention(gates, sink_tokens=3, recent_tokens=5)
    found = session.attend(call)
    torch.testing.assert_close(found, naive(call, 0, 10), atol=1e-5, rtol=1e-5)
    assert not found.requires_grad
    assert session.windows == {0: 10}


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_are_finite_differences(softcap: float | None) -> None:
    """To the gates, and through queries, keys and values of later layers."""
    call = a_call(40, softcap=softcap, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (call.query, call.key, call.value)]
    gates = torch.tensor([[0.3, 0.8]], dtype=torch.float64, requires_grad=True)

    def attend(gates: Tensor, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = dataclasses.replace(call, query=query, key=key, value=value)
        return GatedAttention(gates, sink_tokens=3, recent_tokens=9).attend(made)[:, -5:]

    assert torch.autograd.gradcheck(attend, (gates, *inputs), fast_mode=True)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_gradients_of_the_loss_are_finite_differences(name: str, tmp_path: Path) -> None:
    """Through a whole model, its layers kept or made again; no weight gets one."""
    loaded = tiny(name, tmp_path)
    sliding = sorted(SLIDING_LAYERS.get(name, set()))
    learner = Training(loaded, dataclasses.replace(SMALL, regularization=1e-9))
    loaded.model.double()
    learner.gates.data = torch.rand(learner.gates.shape, generator=torch.Generator().manual_seed(0)).double()
    sample = Passkeys(loaded.tokenizer, loaded.template, [220], 2, 0).sample(0)
    found = torch.autograd.grad(loss_in_double(learner, sample), learner.gates)[0]
    assert learner.sliding == sliding
    assert all(weight.grad is None for weight in loaded.model.parameters())
    with layers_made_again():
        torch.testing.assert_close(torch.autograd.grad(loss_in_double(learner, sample), learner.gates)[0], found)
    step = 1e-3  # norms compute in float32
    for layer, head in np.ndindex(*learner.gates.shape):
        sides = []
        for way in (step, -step):
            with torch.no_grad():
                learner.gates[layer, head] += way
                sides.append(float(loss_in_double(learner, sample)))
                learner.gates[layer, head] -= way
        assert float(found[layer, head]) == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-2)
        assert (float(found[layer, head]) == 0) == (layer in sliding)


def loss_in_double(learner: Training, sample: Sample) -> Tensor:
    """`Training.loss_of` rounds hidden states to float32, in which differences drown."""
    with torch.no_grad():
        wanted = learner.hidden(sample, None)
    return (learner.hidden(sample, learner.gates) - wanted).square().mean()


@contextmanager
def layers_made_again() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_KEPT_BYTES", 0)
        yield


def test_made_again_layers_keep_less(demo: LoadedModel) -> None:
    """And leave the model as it was."""
    learner = Training(demo, SMALL)
    sample = Passkeys(demo.tokenizer, demo.template, [400], 2, 0).sample(0)

    def kept_bytes() -> tuple[int, float]:
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = learner.loss_of(sample)
        return sum(kept.values()), float(loss.detach())

    whole, loss = kept_bytes()
    with layers_made_again():
        less, same = kept_bytes()
    assert less < whole / 3
    assert same == pytest.approx(loss)
    assert not [layer for layer in demo.model.get_decoder().layers if "forward" in vars(layer)]


def test_samples_hold_every_passkey_and_ask_for_it(demo: LoadedModel) -> None:
    """What is predicted from the marked tokens are the answers, digit for digit; depths are spread."""
    data = Passkeys(demo.tokenizer, demo.template, [600, 900], 10, 3)
    lengths, depths = set(), []
    for step in range(12):
        sample = data.sample(step)
        ids = sample.token_ids[0]
        text = demo.tokenizer.decode(ids)
        document = text[: text.index("Question:")]
        asked = [part.split("?")[0] for part in text.split("What is the value of key ")[1:]]
        values = [part.split("<|end|>")[0].strip() for part in text.split("Answer:")[1:]]
        assert len(set(asked)) == len(set(values)) == 10
        for key, value in zip(asked, values, strict=True):
            depths.append(document.index(wording.states(str(key), str(value))) / len(document))
        following = ids[1:][sample.predicting[:-1]]
        assert demo.tokenizer.decode(following) == "".join(values)
        assert not sample.predicting[-1]
        lengths.add(min((600, 900), key=lambda length: abs(length - len(ids))))
        assert min(abs(len(ids) - length) for length in (600, 900)) < 64
    assert lengths == {600, 900}
    assert min(depths) < 0.15
    assert max(depths) > 0.85
    again, other = Passkeys(demo.tokenizer, demo.template, [600, 900], 10, 3), dataclasses.replace(data, seed=4)
    assert torch.equal(again.sample(5).token_ids, data.sample(5).token_ids)
    assert not torch.equal(other.sample(5).token_ids[0, :99], data.sample(5).token_ids[0, :99])
    with pytest.raises(ConfigError, match="min_tokens = 200: 10 passkeys leave no room"):
        dataclasses.replace(data, lengths=[200]).sample(0)


def test_the_rate_rises_and_falls() -> None:
    rates = [CalibrationSettings(steps=100).rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.002)
    assert rates[19:81] == pytest.approx([0.02] * 62)
    assert rates[9] == rates[90] + 0 == pytest.approx(0.01)
    assert min(rates) == pytest.approx(0.002)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"lengths": 1.5}, "lengths"),
        ({"seed": -1}, "seed"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"regularization": math.nan}, "regularization"),
        ({"min_tokens": 384}, "above sink_tokens"),
        ({"max_tokens": 100}, "at least min_tokens = 1024"),
        ({"max_tokens": 9000}, "the model takes 8192 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CalibrationSettings.for_model("some", 8192, **given)


def test_settings_go_by_the_model() -> None:
    made = [CalibrationSettings.for_model(*about, steps=None) for about in (("some", 8192), ("some", 1 << 20))]
    assert [(settings.steps, settings.max_tokens) for settings in made] == [(2000, 8192), (2000, 32768)]
    demo = CalibrationSettings.for_model("demo", 40960, max_tokens=2048)
    assert (demo.steps < 2000, demo.max_tokens) == (True, 2048)
    assert CalibrationSettings(lengths=3, max_tokens=2048).token_counts == [1024, 1536, 2048]


def test_gates_of_heads_that_retrieve_stay(demo: LoadedModel) -> None:
    """Layer 0 of the demo model looks some tokens back, by construction (tools/demo_training/circuit.py)."""
    settings = CalibrationSettings(
        steps=10, min_tokens=400, max_tokens=450, passkeys=4, sink_tokens=16, recent_tokens=64, learning_rate=0.1
    )
    learner = Training(demo, settings)
    for _ in range(settings.steps):
        learner.advance()
    gates = learner.gates.detach()
    assert float(gates[2:].max()) > 0.9
    assert float(gates[0].max()) < float(gates[2:].max()) - 0.4
    assert float(gates.min()) >= 0
    assert float(gates.max()) <= 1


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_a_killed_run_goes_on_to_the_same_gates(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is written is read as a published pattern: by the command, and by a build."""
    loaded, settings = tiny(name, tmp_path), dataclasses.replace(SMALL, seed=7)
    whole = calibrate(loaded, tmp_path / "whole", settings, progress=False)
    assert whole.gates.min() < 1
    broken = tmp_path / "broken"
    advance = Training.advance

    def killed(self: Training) -> None:
        if self.step == 2:
            raise KeyboardInterrupt
        advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(loaded, broken, settings, progress=False)
    assert [path.name for path in broken.iterdir()] == ["checkpoint.json"]
    with pytest.raises(ConfigError, match=r"made with other settings.*\(seed differ\)"):
        calibrate(loaded, broken, dataclasses.replace(settings, seed=8), progress=False)
    steps = []
    monkeypatch.setattr(Training, "advance", lambda self: (steps.append(self.step), advance(self)))
    options = [part for item in dataclasses.asdict(settings).items() for part in (f"--{item[0]}", str(item[1]))]
    options = [part.replace("_", "-") if part.startswith("--") else part for part in options]
    command = ["calibrate", "--model", loaded.config.name, "--device", "cpu", "--out", str(broken), *options, "--json"]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    assert steps == [2, 3]
    assert np.array_equal(told["gates"], whole.gates)
    gates, about = read_gates(broken)
    assert np.array_equal(gates, whole.gates)
    assert (about["sink_size"], about["recent_size"], about["steps"]) == (8, 24, 4)
    assert {path.name for path in broken.iterdir()} == {"full_attention_heads.tsv", "config.json", PICTURE_FILE}
    sliding = sorted(SLIDING_LAYERS.get(name, set()))
    assert about["sliding_layers"] == sliding
    assert not gates[sliding].any()
    assert np.delete(gates, sliding, 0).all()  # four steps end far above 0
    full = [layer for layer in range(3) if layer not in sliding]
    build = BuildConfig(head_pattern=broken, head_sparsity=0.5)
    assert sum(len(build.streaming_heads(layer)) for layer in full) == len(full)  # half of those with two heads

    assert main([*command[:-1], "--no-progress"]) == 0  # nothing is left to do
    assert f"layer   {full[0]}" in capsys.readouterr().out
    assert steps == [2, 3]
    assert main([*command[:-3], "--seed", "9"]) == 2
    assert "made with other settings" in capsys.readouterr().err


def test_layers_without_gates_count_for_no_share(tmp_path: Path) -> None:
    gates = np.array([[0, 0], [0.2, 0.9], [0, 0], [0.8, 0.1]])
    wanted = ((False, False), (False, True), (False, False), (True, False))
    assert resolve(gates, sparsity=0.5, without=[0, 2]) == wanted
    write_gates(tmp_path, gates, sink_tokens=1, window_tokens=1, about={"sliding_layers": [0, 2]})
    assert pattern_of(tmp_path, sparsity=0.5) == wanted
    write_gates(tmp_path, gates, sink_tokens=1, window_tokens=1, about={"sliding_layers": [4]})
    with pytest.raises(ConfigError, match="sliding_layers must be numbers of layers"):
        pattern_of(tmp_path, sparsity=0.5)


def test_a_model_without_full_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="every layer has a sliding window"):
        Training(tiny("mistral-sliding", tmp_path), SMALL).advance()


def test_a_damaged_checkpoint_is_refused(demo: LoadedModel, tmp_path: Path) -> None:
    for text in ("{", "{}", "[]"):
        (tmp_path / "checkpoint.json").write_text(text)
        with pytest.raises(ConfigError, match=r"checkpoint\.json.*remove it to begin anew"):
            calibrate(demo, tmp_path, SMALL, progress=False)


def test_a_loss_that_is_no_number_is_refused(demo: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "loss_of", lambda self, sample: torch.tensor(math.nan))
    with pytest.raises(ModelError, match="the loss of step 0 is no number"):
        Training(demo, SMALL).advance()


def test_the_picture_shows_every_gate() -> None:
    drawn = picture(np.array([[0.25, 1.0, 0.0], [0.5, 0.75, 0.125]]), "some <model>")
    root = ElementTree.fromstring(drawn)
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"0.25", "1.00", "0.00", "0.50", "0.75", "0.12"} < set(texts)
    assert "Gates of some <model>" in texts


def test_lines_tell_how_far_it_is(
    demo: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where standard error is no terminal."""
    monkeypatch.setattr(training, "_LINE_EVERY_S", 0.0)
    calibrate(demo, tmp_path, dataclasses.replace(SMALL, steps=2))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("calibrate: 1 of 2 steps, loss 0.0")
    assert "mean gate" in lines[0]
    assert lines[1].endswith("00:00 left")


@pytest.mark.slow
def test_learned_gates_keep_answers_right_and_random_ones_do_not(demo: LoadedModel, tmp_path: Path) -> None:
    """Half of the heads stream, over one index that holds all of them."""
    settings = CalibrationSettings(steps=60, min_tokens=1024, max_tokens=1536)
    learned = calibrate(demo, tmp_path / "gates", settings, progress=False).gates
    document, asked = generate_document(document_id="d", tokens=4096, n_questions=48, seed=3)
    store = new_store(tmp_path)
    manifest = store_document(demo, store, document["text"], BuildConfig())

    def right(gates: NDArray[np.float64] | None) -> float:
        """Percent of the answers."""
        recipe = Recipe(head_pattern=gates, head_sparsity=None if gates is None else 0.5)
        context = open_context(store, manifest, demo, recipe)
        rows = answer_batch(context, asked, recipe, GenerationSettings(max_new_tokens=32))
        assert [row["status"] for row in rows] == ["ok"] * len(asked)
        return 100 * float(np.mean([exact_match(row["expected"], row["answer"]) for row in rows]))

    random = [np.random.default_rng(seed).random(learned.shape) for seed in range(6)]
    of_learned, of_random = right(learned), float(np.mean([right(gates) for gates in random]))
    assert of_learned >= right(None) - 5
    assert of_learned >= of_random + 20
