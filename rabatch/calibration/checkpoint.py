"""Where learning stands, in a file that is seen whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rabatch.errors import ConfigError

FILE = "checkpoint.json"
_OTHER = "was made with other settings; use another --out, or remove it"


@dataclass
class Progress:
    """Gates and optimiser after `step` steps, float32, exact as JSON has them.

    Attributes:
        settings: What the gates depend on: a checkpoint of others is refused.
        optimizer: State of the one parameter, by name.
        sliding: Layers without gates.
        loss: Of the last step.
        tokens: Of all samples so far.
        seconds: Spent so far.
    """

    settings: dict[str, Any]
    step: int
    gates: list[list[float]]
    optimizer: dict[str, Any]
    sliding: list[int]
    loss: float
    tokens: int
    seconds: float

    def save(self, folder: Path) -> None:
        """Take the place of the checkpoint of before."""
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{FILE}.new"
        new.write_text(json.dumps(vars(self)) + "\n", encoding="utf-8")
        os.replace(new, folder / FILE)


def load(folder: Path, settings: dict[str, Any]) -> Progress | None:
    """The checkpoint of a folder; None if there is none.

    Raises:
        ConfigError: It is damaged, or was made with other settings.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        made = Progress(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError("out", str(path), f"is no checkpoint ({error}); remove it to begin anew") from error
    check_settings(made.settings, settings, path)
    return made


def check_settings(found: Any, settings: dict[str, Any], path: Path) -> None:
    """Raises ConfigError, naming what differs, unless both are the same."""
    found = found if isinstance(found, dict) else {}
    differing = sorted(name for name in {*found, *settings} if found.get(name) != settings.get(name))
    if differing:
        raise ConfigError("out", str(path), f"{_OTHER} ({', '.join(differing)} differ)")


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Of its one parameter, as JSON values."""
    (state,) = optimizer.state_dict()["state"].values()
    return {name: value.tolist() for name, value in state.items()}


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """What `state_of` gave."""
    whole = optimizer.state_dict()
    whole["state"] = {0: {name: torch.tensor(value) for name, value in state.items()}}
    optimizer.load_state_dict(whole)
