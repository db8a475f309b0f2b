"""What rabatch needs to know of a Hugging Face model before it is loaded: its files, config, tokenizer, limits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from rabatch.config import ModelConfig
from rabatch.errors import ModelError

LAYER_TYPES = ("full_attention", "sliding_attention")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.py"]
_FILES = [*_SMALL_FILES, "*.safetensors"]


@dataclass(frozen=True)
class ModelGeometry:
    """Shapes of a model's attention."""

    n_layers: int
    n_kv_heads: int
    n_query_heads: int
    head_dim: int


def local_path(config: ModelConfig, *, weights: bool = True) -> Path:
    """The folder that holds the model's files; a hub name is downloaded into the hub's cache first.

    Args:
        weights: Without them config and tokenizer are downloaded alone; they lie in the same folder.

    Raises:
        ModelError: Neither a folder with a config.json nor a model the hub (or its cache) has.
    """
    if config.name == "demo":
        return Path(__file__).parent / "demo" / "model"
    path = Path(config.name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError("model", config.name, "this folder has no config.json; give a Hugging Face model folder")
        return path
    if path.is_absolute() or config.name.startswith(".") or config.name.count("/") > 1:
        raise ModelError("model", config.name, "no such folder; give an existing path, a hub name or 'demo'")
    from huggingface_hub import snapshot_download

    try:
        wanted = _FILES if weights else _SMALL_FILES
        return Path(snapshot_download(config.name, revision=config.revision, allow_patterns=wanted))
    except Exception as error:
        raise ModelError(
            "model", config.name, f"not a folder, and the hub could not deliver it ({type(error).__name__})"
        ) from error


def resolve(config: ModelConfig, *, has_cuda: bool) -> ModelConfig:
    """`config` with device and compute dtype made explicit.

    Args:
        has_cuda: Whether the machines that will run the model have a card.
    """
    device = ("cuda" if has_cuda else "cpu") if config.device == "auto" else config.device
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else checkpoint_dtype(config)
    return dataclasses.replace(config, device=device, dtype=dtype)


def read_config(config: ModelConfig) -> Any:
    """The model's text configuration (transformers' object), checked to be one rabatch can run."""
    path = local_path(config, weights=False)
    try:
        loaded = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        if "custom code" in str(error):
            fix = "runs code of its own; pass trust_remote_code=True (--trust-remote-code) if you trust it"
            raise ModelError("model", config.name, fix) from error
        raise ModelError("model", config.name, f"its config.json cannot be used ({first_line(error)})") from error
    text = loaded.get_text_config()
    if getattr(loaded, "is_encoder_decoder", False):
        raise ModelError("model", config.name, "is an encoder-decoder; rabatch runs decoder-only models")
    for kind in set(getattr(text, "layer_types", None) or ()):
        if kind not in LAYER_TYPES:
            raise ModelError("model", config.name, f"has layers of type {kind}; supported: {', '.join(LAYER_TYPES)}")
    if getattr(text, "use_bidirectional_attention", None):
        raise ModelError("model", config.name, "attends in both directions; rabatch runs causal models")
    for rope in _ropes(text):
        if rope.get("rope_type") == "dynamic":
            raise ModelError(
                "model", config.name, "its RoPE changes with the length (dynamic), so no key can be reused"
            )
    return text


def checkpoint_dtype(config: ModelConfig) -> str:
    """The dtype the weights were saved in; float32 where the config does not say."""
    dtype = getattr(read_config(config), "dtype", None)
    return str(dtype).removeprefix("torch.") if dtype is not None else "float32"


def max_context_tokens(text_config: Any) -> int:
    """The longest prompt the model takes, in tokens.

    LongRoPE switches its frequencies at the original length; keys stored before the switch would be wrong after
    it, so such a model counts as long as its original length.
    """
    limit = int(getattr(text_config, "max_position_embeddings", 0) or 1 << 30)
    for rope in _ropes(text_config):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings")
            limit = min(limit, int(original or getattr(text_config, "original_max_position_embeddings", None) or limit))
    return limit


def geometry_of(text_config: Any) -> ModelGeometry:
    """Shapes of the attention as the config states them."""
    heads = text_config.num_attention_heads
    return ModelGeometry(
        n_layers=text_config.num_hidden_layers,
        n_kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
        n_query_heads=heads,
        head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
    )


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. It must be a fast one: evidence needs character offsets."""
    try:
        path = local_path(config, weights=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError("model", config.name, f"its tokenizer cannot be loaded ({first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ModelError("model", config.name, "its tokenizer gives no character offsets; convert it to tokenizer.json")
    return tokenizer


def _ropes(text_config: Any) -> list[dict[str, Any]]:
    """RoPE settings; some models have one set per layer type."""
    rope = getattr(text_config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [r for r in rope.values() if isinstance(r, dict)]


def first_line(error: BaseException) -> str:
    """The first line of an error's message, to be quoted in ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
