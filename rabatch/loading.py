"""Loading a Hugging Face model by hub name or path onto its device, once per actor."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from rabatch.attention import seam
from rabatch.config import ModelConfig
from rabatch.errors import ModelError
from rabatch.fingerprint import model_fields
from rabatch.models import (
    ModelGeometry,
    first_line,
    geometry_of,
    load_tokenizer,
    local_path,
    max_context_tokens,
    read_config,
    resolve,
)
from rabatch.prompts import PromptTemplate

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        config: The settings, with device and dtype explicit.
        identity: What the stored numbers depend on (see `rabatch.fingerprint.model_fields`).
        max_context_tokens: The most tokens the model can attend.
    """

    config: ModelConfig
    model: Any
    tokenizer: Any
    template: PromptTemplate
    geometry: ModelGeometry
    identity: dict[str, Any]
    max_context_tokens: int


def load_model(config: ModelConfig) -> LoadedModel:
    """Loads model and tokenizer onto `config.device`; once per actor.

    Raises:
        ModelError: The model cannot be loaded, needs remote code, or is of an unsupported architecture.
    """
    config = resolve(config, has_cuda=torch.cuda.is_available())
    if config.device != "cpu" and not torch.cuda.is_available():
        raise ModelError("device", config.device, "this machine has no CUDA device; use device='cpu'")
    text_config = read_config(config)
    tokenizer = load_tokenizer(config)
    transformers_logging.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            local_path(config),
            dtype=getattr(torch, config.dtype),
            attn_implementation=seam.NAME,
            trust_remote_code=config.trust_remote_code,
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise ModelError("model", config.name, f"cannot be loaded ({first_line(error)})") from error
    model = model.to(config.device).eval().requires_grad_(False)
    _log.info("loaded %s on %s in %s", config.name, config.device, config.dtype)
    return LoadedModel(
        config=config,
        model=model,
        tokenizer=tokenizer,
        template=PromptTemplate.of(tokenizer, config.context_template),
        geometry=geometry_of(text_config),
        identity=model_fields(config),
        max_context_tokens=max_context_tokens(text_config),
    )
