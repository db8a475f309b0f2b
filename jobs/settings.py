"""Settings as a caller gives them, made explicit for the actors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rabatch.config import ModelConfig
from rabatch.models import checkpoint_dtype, local_path, resolve
from rabatch.storage.rules import ITEM_BYTES


def model_settings(model: ModelConfig | str | None) -> ModelConfig:
    """`model` as settings; a folder's path made absolute, for actors work elsewhere."""
    config = model if isinstance(model, ModelConfig) else ModelConfig(name=model or "demo")
    path = Path(config.name).expanduser()
    if config.name != "demo" and path.is_dir():
        config = dataclasses.replace(config, name=str(path.resolve()))
    return config


def resolved_model(config: ModelConfig, *, has_cuda: bool) -> ModelConfig:
    """Device and dtype explicit. `has_cuda`: whether the cluster, not this machine, has a card."""
    return resolve(config, has_cuda=has_cuda)


def weights_bytes(config: ModelConfig) -> int:
    """Of the model's weights in the dtype it computes in, told by the sizes of its files."""
    path = local_path(config)
    files = list(path.glob("*.safetensors")) or list(path.glob("*.bin"))
    saved = ITEM_BYTES.get(checkpoint_dtype(config), 4)
    return sum(file.stat().st_size for file in files) * ITEM_BYTES[config.dtype] // saved
