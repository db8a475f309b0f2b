"""A Hugging Face Llama checkpoint as a GGUF file, for benchmarks that run the same weights in llama.cpp.

    write_gguf(Path("rabatch/demo/model"), Path("demo.gguf"))

Needs `numpy` and `gguf`, neither torch nor transformers, so that it runs in the environment of llama.cpp's bindings.
The file has no tokenizer: token ids go in and come out. Refused is what would not compute the same: other
architectures, activations and RoPE scalings (known: none, linear, llama3).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def write_gguf(checkpoint: Path, target: Path, *, weights: str = "f16") -> Path:
    """Writes the folder `checkpoint` to the file `target`, and returns that.

    Args:
        weights: Of matrices, "f16" or "f32"; vectors (norms, biases) are always float32.

    Raises:
        ValueError: The model would not compute the same.
    """
    import gguf

    config = json.loads((checkpoint / "config.json").read_text())
    kind, activation = config["model_type"], config.get("hidden_act", "silu")
    if (kind, activation) != ("llama", "silu"):
        raise ValueError(f"{checkpoint}: {kind} with {activation}; wanted: llama with silu")
    dtype = {"f16": np.float16, "f32": np.float32}[weights]
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    theta, factors = rope_of(config, head_dim)

    unfinished = target.with_name(target.name + ".part")
    file = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    file.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if weights == "f16" else gguf.LlamaFileType.ALL_F32)
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_block_count(config["num_hidden_layers"])
    file.add_feed_forward_length(config["intermediate_size"])
    file.add_head_count(heads)
    file.add_head_count_kv(kv_heads)
    file.add_key_length(head_dim)
    file.add_value_length(head_dim)
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_dimension_count(head_dim)
    file.add_rope_freq_base(theta)
    file.add_vocab_size(config["vocab_size"])
    file.add_tokenizer_model("no_vocab")
    if factors is not None:
        file.add_tensor(f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR.ROPE_FREQS]}.weight", factors)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, values in tensors_of(checkpoint):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue  # without it, llama.cpp takes the embedding
        if ".q_proj." in name or ".k_proj." in name:
            values = interleaved(values, heads if ".q_proj." in name else kv_heads)
        stored = values.astype(dtype if values.ndim > 1 else np.float32)
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None or not np.isfinite(stored).all():
            raise ValueError(f"{checkpoint}: {name} is unknown to GGUF's llama, or not finite in {weights}")
        file.add_tensor(known, stored)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return unfinished.replace(target)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, ...] of a projection, in the order of llama.cpp's rotary embedding.

    transformers turns the dimensions i and i + head_dim / 2 of a head together, llama.cpp 2 i and 2 i + 1.
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def rope_of(config: dict[str, Any], head_dim: int) -> tuple[float, np.ndarray | None]:
    """The base of the rotary frequencies, and what each frequency is divided by (None: by nothing)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or kind not in ("default", "linear", "llama3"):
        raise ValueError(f"RoPE of type {kind}: {rope}")
    if kind == "default":
        return theta, None
    factor = float(rope["factor"])
    if kind == "linear":
        return theta, np.full(head_dim // 2, factor, np.float32)
    # llama3: frequencies that turn seldom within the original length are divided, those that turn often are not,
    # and those between are blended by how often they turn.
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return theta, (1 / (kept + (1 - kept) / factor)).astype(np.float32)


def tensors_of(checkpoint: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values of all safetensors files of a folder; bfloat16, which numpy lacks, as float32."""
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            start = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(start))
        data = np.memmap(path, mode="r", offset=8 + start)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, end = entry["data_offsets"]
            values = np.asarray(data[first:end]).view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                values = (values.astype(np.uint32) << 16).view(np.float32)
            yield name, values
