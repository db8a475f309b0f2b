"""Where the document and the question stand in the prompt, and how both become tokens.

The prompt is ``before_document + document + after_document + question + after_question``. The context
(everything up to the end of the document) does not depend on the question and is prefilled once; the rest is
the start of the tail. Both are tokenised apart, so a stored context fits every question.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rabatch.errors import ConfigError, DocumentError, ModelError, QuestionError

DEFAULT_TEMPLATE = "{document}\n\nQuestion: {question}\nAnswer:"
_DOCUMENT, _QUESTION = "\u241eDOCUMENT\u241e", "\u241eQUESTION\u241e"


@dataclass(frozen=True)
class EncodedContext:
    """A context as tokens.

    Attributes:
        token_ids: int32 [n_tokens].
        char_start, char_end: int64 [n_tokens]; the characters of the document a token covers, equal to each
            other for tokens of the template.
    """

    token_ids: np.ndarray
    char_start: np.ndarray
    char_end: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class PromptTemplate:
    """The texts around document and question; `bos_ids` are prepended where no chat template says so."""

    before_document: str
    after_document: str
    after_question: str
    bos_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Any, template: str | None) -> PromptTemplate:
        """The prompt of a tokenizer: `template` (or the default) inside the chat template, if it has one.

        Raises:
            ConfigError: The template lacks a placeholder, or the question comes before the document.
            ModelError: The chat template drops or repeats what it is given.
        """
        text = DEFAULT_TEMPLATE if template is None else template
        for name in ("{document}", "{question}"):
            if text.count(name) != 1:
                raise ConfigError("context_template", text, f"must hold {name} exactly once")
        if text.index("{document}") > text.index("{question}"):
            raise ConfigError(
                "context_template", text, "the document must come before the question, or nothing can be reused"
            )
        text = text.replace("{document}", _DOCUMENT).replace("{question}", _QUESTION)
        bos_ids: tuple[int, ...] = ()
        if getattr(tokenizer, "chat_template", None):
            rendered = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            if rendered.count(_DOCUMENT) != 1 or rendered.count(_QUESTION) != 1:
                raise ModelError(
                    "chat_template",
                    tokenizer.name_or_path,
                    "it drops or repeats the user's text; pass context_template",
                )
            text = rendered
        else:
            special = tokenizer("", add_special_tokens=True).input_ids
            if special and special[0] == tokenizer.bos_token_id:
                bos_ids = (special[0],)
        before, rest = text.split(_DOCUMENT)
        between, after = rest.split(_QUESTION)
        return cls(before, between, after, bos_ids)

    def encode_context(self, tokenizer: Any, document: str) -> EncodedContext:
        """Tokens of the context. Special tokens that the document's text spells out stay plain text.

        Raises:
            DocumentError: The document is empty.
        """
        if not document.strip():
            raise DocumentError("text", document, "is empty; leave the document out or give it text")
        before = list(self.bos_ids) + tokenizer(self.before_document, add_special_tokens=False).input_ids
        encoded = tokenizer(
            document, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True, verbose=False
        )
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        outside = np.zeros((len(before), 2), dtype=np.int64)
        spans = np.concatenate([outside, offsets])
        token_ids = np.asarray(before + encoded["input_ids"], dtype=np.int32)
        return EncodedContext(token_ids, spans[:, 0].copy(), spans[:, 1].copy())

    def encode_question(self, tokenizer: Any, question: str, answer_prefix: str = "") -> list[int]:
        """Tokens of the tail's start.

        Args:
            answer_prefix: How the answer begins; it ends the prompt, with its leading space if it has one.

        Raises:
            QuestionError: The question is empty, or one of them spells out a special token.
        """
        if not question.strip():
            raise QuestionError("question", question, "is empty; write a question or remove the row")
        for token in tokenizer.all_special_tokens:
            for name, text in (("question", question), ("answer_prefix", answer_prefix)):
                if token in text:
                    raise QuestionError(name, text, f"spells out the special token {token}; remove it")
        ids: list[int] = tokenizer(
            self.after_document + question + self.after_question + answer_prefix, add_special_tokens=False
        ).input_ids
        return ids
