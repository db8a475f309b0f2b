"""Learning a model's gates: the student streams by gates, the teacher attends everything, and only gates change."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from rabatch.attention.seam import attending
from rabatch.calibration import checkpoint as saved
from rabatch.calibration.data import Passkeys, Sample
from rabatch.calibration.gates import GatedAttention
from rabatch.calibration.picture import picture
from rabatch.calibration.settings import CalibrationSettings
from rabatch.errors import ModelError
from rabatch.head_pattern import CONFIG_FILE, GATES_FILE, read_gates, write_gates
from rabatch.loading import LoadedModel
from rabatch.storage.manifest import fingerprint_of

PICTURE_FILE = "gates.svg"
_KEPT_BYTES = 2 << 30
"""Of a sample's activations kept for the way back; where more is needed, each layer's are made again."""
_LINE_EVERY_S = 30.0


@dataclass(frozen=True)
class Calibration:
    """Learned gates.

    Attributes:
        gates: float64 [n_layers, n_kv_heads], in [0, 1]; 0 in layers with a sliding window of their own.
        about: What config.json says beside the static set.
    """

    folder: Path
    gates: NDArray[np.float64]
    about: dict[str, Any]
    exit_code: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"out": str(self.folder), "gates": self.gates.tolist(), **self.about}

    def summary(self) -> list[str]:
        """For people."""
        lines = [
            f"layer {number:>3}  " + " ".join(f"{gate:.2f}" for gate in row) for number, row in enumerate(self.gates)
        ]
        spent = f"{self.about['steps']:,} steps of {self.about['tokens']:,} tokens in {self.about['seconds']:,.0f} s"
        return [
            *lines,
            f"mean gate {self.about['mean_gate']:.2f}, loss {self.about['loss']:.4f}, {spent}",
            str(self.folder),
        ]


def calibrate(
    loaded: LoadedModel, folder: Path, settings: CalibrationSettings, *, progress: bool = True
) -> Calibration:
    """Learn gates and write them into `folder` as published patterns are, with a picture.

    What was begun there with the same settings and model is gone on with, and gives the same gates; what is finished is
    read.

    Args:
        progress: Show it on stderr.

    Raises:
        ConfigError: The folder holds gates or a checkpoint of other settings, or samples are too short for passkeys.
        ModelError: No layer has full attention, or the loss is no number.
    """
    decides = {"model_sha256": fingerprint_of(loaded.identity), **settings.to_dict()}
    began = saved.load(folder, decides)
    if began is None and (folder / GATES_FILE).exists():
        gates, about = read_gates(folder)
        saved.check_settings({name: about.get(name) for name in decides}, decides, folder / CONFIG_FILE)
        return Calibration(folder, gates, about)
    training = Training(loaded, settings, began)
    with _shown(settings.steps, training.step, visible=progress) as show:
        while training.step < settings.steps:
            training.advance()
            training.progress(decides).save(folder)
            show(training)
    gates = training.written()
    about = {
        **decides,
        "model": loaded.config.name,
        "sliding_layers": training.sliding,
        "mean_gate": float(np.delete(gates, training.sliding, 0).mean()),
        "loss": training.loss,
        "tokens": training.tokens,
        "seconds": round(training.seconds, 1),
    }
    (folder / PICTURE_FILE).write_text(picture(gates, loaded.config.name), encoding="utf-8")
    write_gates(folder, gates, sink_tokens=settings.sink_tokens, window_tokens=settings.recent_tokens, about=about)
    (folder / saved.FILE).unlink()
    return Calibration(folder, *read_gates(folder))


class Training:
    """Gates under way.

    Args:
        began: Where to go on; None: from the start, all gates 1.

    Attributes:
        step: Steps done.
        sliding: Layers with a sliding window of their own, which have no gates; known after a step.
        loss, tokens, seconds: Of the last step; of all.
    """

    def __init__(self, loaded: LoadedModel, settings: CalibrationSettings, began: saved.Progress | None = None) -> None:
        self.loaded, self.settings = loaded, settings
        shape, device = loaded.geometry, loaded.config.device
        self.gates = nn.Parameter(torch.ones((shape.n_layers, shape.n_kv_heads), device=device))
        self._optimizer = torch.optim.AdamW([self.gates], lr=settings.learning_rate, weight_decay=0.0)
        self._samples = Passkeys(
            loaded.tokenizer, loaded.template, settings.token_counts, settings.passkeys, settings.seed
        )
        self.step, self.loss, self.tokens, self.seconds = 0, float("nan"), 0, 0.0
        self.sliding = [] if began is None else began.sliding
        if began is not None:
            self.step, self.loss, self.tokens, self.seconds = began.step, began.loss, began.tokens, began.seconds
            with torch.no_grad():
                self.gates.copy_(torch.tensor(began.gates))
            saved.restore(self._optimizer, began.optimizer)

    @property
    def mean_gate(self) -> float:
        """Of the heads that have one."""
        return float(self._gated().detach().mean())

    def advance(self) -> None:
        """One step."""
        started = time.perf_counter()
        sample = self._samples.sample(self.step)
        loss = self.loss_of(sample)
        if not bool(torch.isfinite(loss)):
            fix = f"the loss of step {self.step} is no number; try another --dtype"
            raise ModelError("model", self.loaded.config.name, fix)
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        with torch.no_grad():
            self.gates.clamp_(0, 1)
        self.step += 1
        self.loss = float(loss.detach())
        self.tokens += sample.token_ids.shape[1]
        self.seconds += time.perf_counter() - started

    def loss_of(self, sample: Sample) -> Tensor:
        """Mean square of what the gates change in the final hidden states that answers are predicted from, and the
        gates' own part."""
        with torch.no_grad():
            wanted = self.hidden(sample, None)
        found = self.hidden(sample, self.gates)
        changed = (found.float() - wanted.float()).square().mean()
        return changed + self.settings.regularization * self._gated().abs().mean()

    def written(self) -> NDArray[np.float64]:
        """The gates as a pattern has them."""
        gates = self.gates.detach().double().cpu().numpy()
        gates[self.sliding] = 0
        return gates

    def progress(self, settings: dict[str, Any]) -> saved.Progress:
        """What a checkpoint keeps."""
        return saved.Progress(
            settings=settings,
            step=self.step,
            gates=self.gates.tolist(),
            optimizer=saved.state_of(self._optimizer),
            sliding=self.sliding,
            loss=self.loss,
            tokens=self.tokens,
            seconds=self.seconds,
        )

    def _gated(self) -> Tensor:
        full = [layer for layer in range(len(self.gates)) if layer not in self.sliding]
        return self.gates[full]

    def hidden(self, sample: Sample, gates: Tensor | None) -> Tensor:
        """Final normed hidden states that answers are predicted from: [n_answer_tokens, hidden]."""
        settings, device = self.settings, self.loaded.config.device
        session = GatedAttention(gates, sink_tokens=settings.sink_tokens, recent_tokens=settings.recent_tokens)
        decoder = self.loaded.model.get_decoder()
        again = gates is not None and _activation_bytes(self.loaded, sample.token_ids.shape[1]) > _KEPT_BYTES
        with _layers_made_again(decoder, session) if again else attending(session):
            hidden = decoder(input_ids=sample.token_ids.to(device), use_cache=False).last_hidden_state[0]
        self.sliding = [layer for layer, window in sorted(session.windows.items()) if window]
        if len(self.sliding) == len(self.gates):
            fix = "every layer has a sliding window of its own; there is no head to choose"
            raise ModelError("model", self.loaded.config.name, fix)
        chosen: Tensor = hidden[sample.predicting.to(hidden.device)]
        return chosen


@contextmanager
def _layers_made_again(decoder: Any, session: GatedAttention) -> Iterator[None]:
    """Keep no activations of a layer but its input. The session travels along: on a card, the way back has threads of
    its own, to which a context variable does not reach."""

    def again(forward: Any, *args: Any, **kwargs: Any) -> Any:
        with attending(session):
            return forward(*args, **kwargs)

    layers = next(part for part in decoder.children() if isinstance(part, nn.ModuleList))
    for layer in layers:
        layer.forward = partial(checkpoint, partial(again, layer.forward), use_reentrant=False)
    try:
        with attending(session):
            yield
    finally:
        for layer in layers:
            del layer.forward


def _activation_bytes(loaded: LoadedModel, n_tokens: int) -> int:
    """About what a pass keeps for the way back."""
    config = loaded.model.config.get_text_config()
    hidden = config.hidden_size
    widths = 24 * hidden + 6 * (getattr(config, "intermediate_size", None) or 4 * hidden)
    itemsize = torch.finfo(loaded.model.dtype).bits // 8
    return int(n_tokens * loaded.geometry.n_layers * widths * itemsize)


@contextmanager
def _shown(steps: int, done: int, *, visible: bool) -> Iterator[Any]:
    """What to call after each step: a bar on a terminal, else a line now and then."""
    if not visible:
        yield lambda training: None
        return
    if sys.stderr.isatty():
        with tqdm(total=steps, initial=done, desc="calibrate", unit=" steps", dynamic_ncols=True) as bar:

            def move(training: Training) -> None:
                bar.set_postfix_str(f"loss {training.loss:.4f}, mean gate {training.mean_gate:.3f}", refresh=False)
                bar.update()

            yield move
        return
    began = last = time.monotonic()

    def tell(training: Training) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _LINE_EVERY_S or (last > began and training.step == steps):
            last = now
            left = (now - began) / (training.step - done) * (steps - training.step)
            text = f"calibrate: {training.step:,} of {steps:,} steps, loss {training.loss:.4f}, "
            text += f"mean gate {training.mean_gate:.3f}, {tqdm.format_interval(left)} left"
            sys.stderr.write(text + "\n")

    yield tell
