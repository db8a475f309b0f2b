"""The exceptions of rabatch. Each names the field, the value and the fix; the command line prints one line."""

from __future__ import annotations

_MAX_VALUE_CHARS = 120


class RabatchError(Exception):
    """Base of every error a user can cause or mend.

    Args:
        field: What is wrong, in the user's words: ``top_k``, ``document_id``, ``--store``.
        value: The offending value; long ones are shortened in the message.
        fix: What is wrong with it and what to do instead.
    """

    def __init__(self, field: str, value: object, fix: str) -> None:
        self.field = field
        self.value = value
        self.fix = fix
        shown = repr(value)
        if len(shown) > _MAX_VALUE_CHARS:
            shown = shown[: _MAX_VALUE_CHARS - 3] + "..."
        super().__init__(f"{field} = {shown}: {fix}")

    def __reduce__(self) -> tuple:
        return type(self), (self.field, self.value, self.fix)


class ConfigError(RabatchError):
    """A setting is out of range or contradicts another."""


class DocumentError(RabatchError):
    """One document cannot be built; it becomes a failed row."""


class QuestionError(RabatchError):
    """One question cannot be answered; it becomes a failed row."""


class SourceError(RabatchError):
    """The documents or questions as a whole cannot be read."""


class ModelError(RabatchError):
    """A model cannot be loaded, or its architecture is not supported."""


class KeysError(RabatchError):
    """Keys, queries or their top-k lists cannot be indexed; the field names the KV head."""


class StoreError(RabatchError):
    """The store cannot be read or written."""


class FormatVersionError(StoreError):
    """The store was written in a format this version does not read."""


class IntegrityError(StoreError):
    """Stored bytes are not what the manifest says."""


class FingerprintError(StoreError):
    """An index belongs to another model, dtype, template or recipe."""


class FailedRowsError(RabatchError):
    """More rows failed than the run may lose; what is committed stays."""
