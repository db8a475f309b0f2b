"""InfiniGen (arXiv 2406.19707): keys chosen by the query that the layer before foresees, in a few skewed columns."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from rabatch.attention.seam import AttentionCall, attending
from rabatch.attention.selection import Asked, Selection, rows_of
from rabatch.attention.sets import Found
from rabatch.errors import ModelError
from rabatch.index.base import SearchResult
from rabatch.index.codes import KeyCodes
from rabatch.index.flat import FlatIndex
from rabatch.index.rerank import rerank
from rabatch.selectors.opening import Opening, OverKeys

COLUMNS = 0.3
"""Share of the skewed columns that scores are foreseen by (section 5.1: partial weights)."""
ALPHA = 5.0
"""Keys whose foreseen logit is lower than the best by more than this are left out (section 5.1)."""


class InfinigenIndex(OverKeys):
    """Keys in the columns in which they reach farthest.

    The columns are the right singular vectors of a head's keys, largest singular value first: a rotation, so that with
    all of them scores are the exact ones.

    Args:
        keys: Of all KV heads of a layer, rotated as they are stored.
        columns: Share of the columns that are kept.
        threads: Of scoring exactly.
    """

    def __init__(self, keys: KeyCodes, *, columns: float = COLUMNS, threads: int = 1) -> None:
        super().__init__(keys, threads=threads)
        whole = keys.decode()
        squares = np.einsum("hnd,hne->hde", whole, whole, dtype=np.float64, optimize=True)
        kept = math.ceil(columns * whole.shape[2])
        self._skew = np.linalg.eigh(squares)[1][:, :, ::-1][:, :, :kept].astype(np.float32)  # ascending: the last ones
        self._partial = FlatIndex(whole @ self._skew)

    def search(
        self, queries: NDArray[np.float32], *, k: int, effort: int = 0, beta: NDArray[np.float32] | None = None
    ) -> SearchResult:
        """By the partial columns alone, scores included; see `KeyIndex.search`."""
        return self._partial.search(queries @ self._skew, k=k, beta=beta)

    def choose(
        self, foreseen: NDArray[np.float32], queries: NDArray[np.float32], *, k: int, scaling: float
    ) -> SearchResult:
        """At most `k` keys by foreseen queries, with the exact scores of the true ones. All keys if `k` is all."""
        reach = np.full(len(foreseen), ALPHA / scaling if k < self.n_keys else np.inf, np.float32)
        found = self.search(np.ascontiguousarray(foreseen), k=k, beta=reach)
        return rerank(found, self.keys, np.ascontiguousarray(queries), k=k, threads=self.threads)


class InfinigenSelection(Selection):
    """Foresees each layer's queries by putting the attention input of the layer before through this layer's attention.

    The module itself makes the query of it, so norms, biases and rotation are those of any architecture.

    Args:
        model: Whose attention modules are watched while it passes.

    Raises:
        ModelError: The model's attention modules cannot be told.
    """

    def __init__(self, method: str, model: nn.Module, n_layers: int) -> None:
        super().__init__(method)
        self._modules = attention_modules(model, n_layers)
        self._before: Tensor | None = None
        self._foreseen: tuple[int, Tensor] | None = None  # layer, and [batch, n_query_heads, q_tokens, head_dim]

    @contextmanager
    def passing(self) -> Iterator[None]:
        handles = [
            module.register_forward_pre_hook(functools.partial(self._enter, number), with_kwargs=True)
            for number, module in enumerate(self._modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._before = self._foreseen = None

    def find(self, asked: Asked) -> Found:
        layer, call = asked.layer, asked.call
        index = layer.indexes.get(self.method)
        n_rows = asked.rows.shape[1]
        if index is None or not n_rows:
            return layer.found(None, n_rows)
        assert isinstance(index, InfinigenIndex)
        assert self._foreseen is not None
        number, states = self._foreseen
        assert number == call.layer
        foreseen = rows_of(states, call.key.shape[1], layer.heads).float().cpu()[:, asked.real].numpy()
        k = min(int(layer.budget.max()), index.n_keys)
        return layer.found(index.choose(foreseen, asked.rows, k=k, scaling=call.scaling), n_rows)

    def _enter(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer's attention: foresee its queries, and remember its input for the next."""
        named = "hidden_states" in kwargs
        states: Tensor = kwargs["hidden_states"] if named else args[0]
        if self._before is not None:
            recorder = _Recorder()
            with attending(recorder):
                if named:
                    module.forward(*args, **{**kwargs, "hidden_states": self._before})
                else:
                    module.forward(self._before, *args[1:], **kwargs)
            assert recorder.query is not None
            self._foreseen = number, recorder.query
        self._before = states


@dataclasses.dataclass
class _Recorder:
    """Takes the query that an attention module makes, and attends nothing."""

    query: Tensor | None = None

    def attend(self, call: AttentionCall) -> Tensor:
        self.query = call.query
        batch, heads, q_tokens, _ = call.query.shape
        return call.query.new_zeros((batch, q_tokens, heads, call.value.shape[3]))


def attention_modules(model: nn.Module, n_layers: int) -> list[nn.Module]:
    """The attention module of each layer: those named ``self_attn`` that know their `layer_idx`.

    Raises:
        ModelError: There are others than one per layer.
    """
    named = [module for name, module in model.named_modules() if name.split(".")[-1] == "self_attn"]
    modules = sorted((m for m in named if hasattr(m, "layer_idx")), key=lambda m: m.layer_idx)  # type: ignore[arg-type, return-value]
    if [module.layer_idx for module in modules] != list(range(n_layers)):
        fix = f"must have one self_attn with a layer_idx for each of {n_layers} layers; choose another recipe"
        raise ModelError("infinigen: model", type(model).__name__, fix)
    return modules


def open_infinigen(opening: Opening) -> InfinigenIndex:
    return InfinigenIndex(opening.keys, threads=opening.threads)
