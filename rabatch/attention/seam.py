"""The one place where rabatch meets transformers' attention.

One function is registered with `AttentionInterface` and one mask function with `AttentionMaskInterface`
(without the second, transformers would hand over no mask). Every decoder-only model that uses the
interface then runs unpatched. What the attention is about (a prefill that is being captured, questions over
a stored context) cannot be passed through `generate`, so it travels in a context variable set by `attending`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rabatch.errors import ModelError

NAME = "rabatch"


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer asks for in one forward pass.

    Attributes:
        layer: Index of the layer.
        query: [batch, n_query_heads, q_tokens, head_dim], rotated.
        key, value: [batch, n_kv_heads, kv_tokens, head_dim]: what the cache returned.
        scaling: Factor on q·k.
        softcap: Bound of the logits, or None.
        sliding_window: The layer's native window in tokens, or 0 for full attention.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    softcap: float | None
    sliding_window: int


class Attending(Protocol):
    """Whoever computes attention while it is active, and knows which keys a query sees."""

    def attend(self, call: AttentionCall) -> Tensor:
        """Returns [batch, q_tokens, n_query_heads, head_dim] in the query's dtype."""
        ...


_active: ContextVar[Attending | None] = ContextVar("rabatch_attending", default=None)


@contextmanager
def attending(session: Attending) -> Iterator[None]:
    """Route every attention layer of models loaded with ``attn_implementation="rabatch"`` to `session`."""
    token = _active.set(session)
    try:
        yield
    finally:
        _active.reset(token)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ModelError(
                "model",
                type(module).__name__,
                f"its attention uses {name}, which rabatch does not support yet; choose a model without it",
            )
    session = _active.get()
    if session is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    call = AttentionCall(
        layer=module.layer_idx,  # type: ignore[arg-type]
        query=query,
        key=key,
        value=value,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
        sliding_window=kwargs.get("sliding_window") or 0,
    )
    return session.attend(call), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """None while somebody attends: a mask would be as large as chunk times context."""
    session = _active.get()
    return None if session is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
