"""The command `rabatch calibrate`: learn which KV heads need the whole context."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

from rabatch import cli_arguments

Add = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]


def add_command(add: Add) -> None:
    """Add the command to a parser; `add` takes name, function, text and example."""
    text = "learn which KV heads need the whole context (DuoAttention)"
    parser = add("calibrate", _run, text, "--model Qwen/Qwen3-0.6B --out heads")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the head pattern is written")
    cli_arguments.add_model(parser)
    group = parser.add_argument_group("training")
    for name, text in (
        ("steps", "steps, one sample each (2000; of the demo model 100)"),
        ("min-tokens", "tokens of the shortest samples (1024)"),
        ("max-tokens", "tokens of the longest (32768 or what the model takes; of the demo model 2048)"),
        ("lengths", "how many lengths between them (50)"),
        ("passkeys", "numbers to be found in a sample (10)"),
        ("sink-tokens", "first tokens that a streaming head sees (128)"),
        ("recent-tokens", "last tokens before each query that it sees (256)"),
    ):
        group.add_argument(f"--{name}", type=int, metavar="N", help=text)
    group.add_argument("--learning-rate", type=float, metavar="X", help="at its highest (0.02)")
    group.add_argument("--regularization", type=float, metavar="X", help="weight of the gates in the loss (0.05)")
    group.add_argument("--seed", type=int, metavar="N", help="same seed, same gates (0)")
    parser.add_argument("--no-progress", action="store_true", help="no progress on stderr")
    cli_arguments.add_common(parser)


def _run(arguments: argparse.Namespace) -> int:
    from rabatch.calibration.settings import CalibrationSettings
    from rabatch.calibration.training import calibrate
    from rabatch.loading import load_model
    from rabatch.models import max_context_tokens, read_config

    config = cli_arguments.model_of(arguments)
    names = [field.name for field in dataclasses.fields(CalibrationSettings)]
    given = {name: getattr(arguments, name) for name in names}
    settings = CalibrationSettings.for_model(config.name, max_context_tokens(read_config(config)), **given)
    made = calibrate(load_model(config), Path(arguments.out), settings, progress=not arguments.no_progress)
    return cli_arguments.show(made, arguments)
