"""Loading models: what is refused, and in which words; where prompts split; what the fingerprint covers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rabatch.config import BuildConfig, GraphConfig, ModelConfig
from rabatch.errors import ConfigError, DocumentError, ModelError, QuestionError
from rabatch.fingerprint import index_fields
from rabatch.loading import load_model
from rabatch.models import load_tokenizer, local_path, max_context_tokens, read_config, resolve
from rabatch.prompts import PromptTemplate
from rabatch.storage.manifest import fingerprint_of
from tests.rabatch.models import save_tiny_model

CPU = ModelConfig(device="cpu", dtype="float32")


def edited(tmp_path: Path, **changes: Any) -> ModelConfig:
    """A tiny Llama whose config.json is changed."""
    folder = save_tiny_model("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return ModelConfig(name=str(folder), device="cpu")


def test_demo_is_in_the_package() -> None:
    loaded = load_model(ModelConfig(device="cpu"))
    assert loaded.geometry.n_query_heads >= 2 * loaded.geometry.n_kv_heads
    assert loaded.config.dtype == "float32"
    assert loaded.max_context_tokens >= 8192 + 256


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_missing_path(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder") as caught:
        load_model(ModelConfig(name=name, device="cpu"))
    assert "\n" not in str(caught.value)


def test_unknown_hub_name_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="the hub could not deliver it") as caught:
        load_model(ModelConfig(name="nobody/nothing-at-all", device="cpu"))
    assert "\n" not in str(caught.value)


def test_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(ModelConfig(name=str(tmp_path), device="cpu"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention", "linear_attention", "full_attention"]}, "linear_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ({"model_type": "no_such_type"}, "config.json"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_unsupported_architectures_are_refused(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ModelError, match=words.replace(".", r"\.")):
        read_config(edited(tmp_path, **changes))


def test_remote_code_is_off_unless_asked_for(tmp_path: Path) -> None:
    """A model folder whose code would leave a trace when run: it is not run, and the error says what to do."""
    trace = tmp_path / "ran"
    config = edited(tmp_path, model_type="own", auto_map={"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own"})
    (Path(config.name) / "code.py").write_text(f"open({str(trace)!r}, 'w')\n")
    with pytest.raises(ModelError, match="trust_remote_code"):
        load_model(config)
    assert not trace.exists()


def test_cuda_without_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match="no CUDA device"):
        load_model(ModelConfig(device="cuda"))


def test_resolve() -> None:
    assert resolve(ModelConfig(), has_cuda=False) == ModelConfig(device="cpu", dtype="float32")
    assert resolve(ModelConfig(), has_cuda=True) == ModelConfig(device="cuda", dtype="bfloat16")
    assert resolve(ModelConfig(device="cpu"), has_cuda=True).dtype == "float32"
    assert resolve(ModelConfig(dtype="float16"), has_cuda=True).dtype == "float16"


def test_longrope_ends_at_its_original_length(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config = edited(tmp_path, rope_parameters={**rope, "original_max_position_embeddings": 1024})
    assert max_context_tokens(read_config(config)) == 1024


# prompts ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(CPU)


def test_template_splits_at_the_document(tokenizer: Any) -> None:
    template = PromptTemplate.of(tokenizer, "Read:\n{document}\n\nQuestion: {question}\nAnswer:")
    assert (template.before_document, template.after_document, template.after_question) == (
        "Read:\n",
        "\n\nQuestion: ",
        "\nAnswer:",
    )


def test_chat_template_surrounds_it(tokenizer: Any) -> None:
    chat = AutoTokenizer.from_pretrained(local_path(CPU))
    chat.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    template = PromptTemplate.of(chat, None)
    assert (template.before_document, template.after_question) == ("<user>", "\nAnswer:</><assistant>")
    chat.chat_template = "{{ messages[0].content[:5] }}"
    with pytest.raises(ModelError, match="context_template"):
        PromptTemplate.of(chat, None)


def test_bos_is_prepended_without_a_chat_template(tokenizer: Any) -> None:
    plain = AutoTokenizer.from_pretrained(local_path(CPU))
    plain.chat_template = None
    assert PromptTemplate.of(plain, None).bos_ids == ()
    encoded = PromptTemplate("", "", "", bos_ids=(4059,)).encode_context(plain, "The mill.")
    assert encoded.token_ids[0] == 4059
    assert encoded.char_start[0] == encoded.char_end[0]


@pytest.mark.parametrize(
    "template", ["{document}", "{question} {document}", "{document}{document}{question}", "no placeholders"]
)
def test_bad_templates(tokenizer: Any, template: str) -> None:
    with pytest.raises(ConfigError, match="context_template"):
        PromptTemplate.of(tokenizer, template)


@settings(deadline=None, max_examples=60)
@given(text=st.text(min_size=1).filter(str.strip))
def test_offsets_cover_the_document(text: str) -> None:
    tokenizer = load_tokenizer(CPU)
    encoded = PromptTemplate("Read: ", "", "").encode_context(tokenizer, text)
    inside = encoded.char_end > encoded.char_start
    covered = set()
    for start, end in zip(encoded.char_start[inside], encoded.char_end[inside], strict=True):
        covered.update(range(start, end))
    assert covered == set(range(len(text)))
    assert len(encoded.token_ids) == len(encoded.char_start) == len(encoded.char_end)


def test_special_tokens_in_a_document_are_plain_text(tokenizer: Any) -> None:
    encoded = PromptTemplate("", "", "").encode_context(tokenizer, "Stop.<|end|> Go on.")
    assert tokenizer.eos_token_id not in encoded.token_ids
    with pytest.raises(QuestionError, match="special token"):
        PromptTemplate("", "", "").encode_question(tokenizer, "What is <|end|>?")


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_empty(tokenizer: Any, text: str) -> None:
    with pytest.raises(DocumentError, match="empty"):
        PromptTemplate("", "", "").encode_context(tokenizer, text)
    with pytest.raises(QuestionError, match="empty"):
        PromptTemplate("", "", "").encode_question(tokenizer, text)


# fingerprint --------------------------------------------------------------------------------------------------


def fingerprint(config: ModelConfig, build: BuildConfig | None = None) -> str:
    return fingerprint_of(index_fields(config, build or BuildConfig()))


def test_fingerprint_is_about_content_not_names(tmp_path: Path) -> None:
    first = save_tiny_model("llama", tmp_path / "a")
    shutil.copytree(first, tmp_path / "b")
    one = ModelConfig(name=str(first), device="cpu", dtype="float32")
    two = ModelConfig(name=str(tmp_path / "b"), device="cpu", dtype="float32")
    assert fingerprint(one) == fingerprint(two)
    weights = tmp_path / "b" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    assert fingerprint(one) != fingerprint(two)


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(device="cpu", dtype="bfloat16"),
        ModelConfig(device="cpu", dtype="float32", context_template="Text: {document} {question}"),
    ],
)
def test_fingerprint_changes_with_dtype_and_template(config: ModelConfig) -> None:
    assert fingerprint(config) != fingerprint(CPU)


@pytest.mark.parametrize(
    "build",
    [
        BuildConfig(sink_tokens=64),
        BuildConfig(window_tokens=64),
        BuildConfig(index="none"),
        BuildConfig(query_share=0.5),
        BuildConfig(query_top_k=16),
        BuildConfig(sample_vectors=0),
        BuildConfig(zone_tokens=0),
        BuildConfig(kv_dtype="float16"),
        BuildConfig(graph=GraphConfig(degree=16, key_neighbors=8)),
    ],
)
def test_fingerprint_changes_with_the_build(build: BuildConfig) -> None:
    assert fingerprint(CPU, build) != fingerprint(CPU)


def test_fingerprint_ignores_what_changes_no_number() -> None:
    assert fingerprint(CPU, BuildConfig(prefill_chunk_tokens=64)) == fingerprint(CPU)
    without_graph = BuildConfig(index="none")
    assert fingerprint(CPU, BuildConfig(index="none", sample_vectors=0, zone_tokens=0)) == fingerprint(
        CPU, without_graph
    )
    tail_only = ModelConfig(device="cpu", dtype="float32", context_template="{document} Q: {question}")
    assert fingerprint(tail_only) == fingerprint(CPU)
