"""What a part holds, in memory: one layer's keys, values and index for a range of KV heads, and the tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rabatch.errors import StoreError
from rabatch.storage.codecs import Coded, check_coded
from rabatch.storage.scan_codes import ScanCodes, check_scan

MAX_PART_BYTES = 1 << 30
PROFILE_NUMBERS = 11
"""Of one head: the static set alone, and with each number of keys in `rabatch.index.profile.GRID`."""
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerBlock:
    """Keys, values and index of consecutive KV heads of one layer, in memory.

    Args:
        head_start: Number of the first head in the block.
        positions: [rows] int32, the context position of each row; shared by the heads.
        keys, values: [n_heads, rows, head_dim], float32, bfloat16 or float16; where those of the index are encoded, of
            the other rows alone.
        key_codes, value_codes: Keys and values of the index's rows, if these are encoded.
        neighbors: [n_heads, index_rows, degree] int32 ids in [0, index_rows), -1 for none; id `i` is row
            `index_start + i`. None: the layer has no graph.
        entries: [n_heads, E] int32 ids where a search starts. None without a graph.
        scan: Codes of the index's keys. None: the layer has none.
        zones: [n_heads, index_rows] int32, the zone of each indexed key, from 0. None: the layer has no zones.
        profile: [n_heads, PROFILE_NUMBERS] float32, shares of the softmax mass of late queries, ascending, that are
            held by the static set, and by it and the best 8, 16, ... other keys. None: not known.
        key_mass: [n_heads, index_rows] float32 >= 0: the attention that sampled queries of the context gave each key
            of the index, summed. None: it was not kept.
        queries: [n_heads, n <= rows, head_dim] in the dtype of the keys: sampled query vectors of the context, of all
            query heads of a KV head. None: they were not kept.
        index_start: First row of the key index, in rows.
    """

    layer: int
    head_start: int
    positions: NDArray[np.int32]
    keys: torch.Tensor
    values: torch.Tensor
    neighbors: NDArray[np.int32] | None = None
    entries: NDArray[np.int32] | None = None
    scan: ScanCodes | None = None
    zones: NDArray[np.int32] | None = None
    profile: NDArray[np.float32] | None = None
    key_mass: NDArray[np.float32] | None = None
    queries: torch.Tensor | None = None
    index_start: int = 0
    key_codes: Coded | None = None
    value_codes: Coded | None = None

    @property
    def n_heads(self) -> int:
        return int(self.keys.shape[0])

    @property
    def head_stop(self) -> int:
        return self.head_start + self.n_heads

    @property
    def rows(self) -> int:
        return len(self.positions)

    @property
    def head_dim(self) -> int:
        return int(self.keys.shape[2])

    @property
    def index_rows(self) -> int:
        if self.neighbors is not None:
            return int(self.neighbors.shape[1])
        codes = [held.codes for held in (self.scan, self.key_codes, self.value_codes) if held is not None]
        return int(codes[0].shape[1]) if codes else 0

    @property
    def codecs(self) -> tuple[str, str]:
        """Of keys and of values; ``"none"`` where they are stored as they are."""
        keys, values = (coded.codec if coded is not None else "none" for coded in (self.key_codes, self.value_codes))
        return keys, values

    def select(self, heads: range) -> LayerBlock:
        """The block of some of its heads (numbered as in the model), sharing memory."""
        return self._some(slice(heads.start - self.head_start, heads.stop - self.head_start), heads.start)

    def among(self, places: Sequence[int]) -> LayerBlock:
        """The block of some of its heads, by their places in it, ascending; `head_start` counts for the first alone."""
        return self._some(np.array(places, np.int64), self.head_start + places[0])

    def _some(self, part: slice | NDArray[np.int64], head_start: int) -> LayerBlock:
        return LayerBlock(
            layer=self.layer,
            head_start=head_start,
            positions=self.positions,
            keys=self.keys[part],
            values=self.values[part],
            neighbors=None if self.neighbors is None else self.neighbors[part],
            entries=None if self.entries is None else self.entries[part],
            scan=None if self.scan is None else self.scan.select(part),
            zones=None if self.zones is None else self.zones[part],
            profile=None if self.profile is None else self.profile[part],
            key_mass=None if self.key_mass is None else self.key_mass[part],
            queries=None if self.queries is None else self.queries[part],
            index_start=self.index_start,
            key_codes=None if self.key_codes is None else self.key_codes.select(part),
            value_codes=None if self.value_codes is None else self.value_codes.select(part),
        )

    def split(self, max_bytes: int = MAX_PART_BYTES) -> Iterator[LayerBlock]:
        """Blocks of as many heads as fit `max_bytes`, at least one head each."""
        degree = 0 if self.neighbors is None else int(self.neighbors.shape[2])
        ids = degree + (self.zones is not None) + (self.key_mass is not None) + 1  # of neighbors, zone, mass, position
        codes = 0 if self.scan is None else self.scan.code_width
        codes += sum(coded.row_bytes for coded in (self.key_codes, self.value_codes) if coded is not None)
        plain = sum(int(s.shape[1]) for s in (self.keys, self.values, self.queries) if s is not None)
        head_bytes = plain * self.head_dim * self.keys.element_size() + self.rows * (4 * ids + codes)
        step = max(1, max_bytes // max(1, head_bytes))
        for start in range(self.head_start, self.head_stop, step):
            yield self.select(range(start, min(start + step, self.head_stop)))

    def equals(self, other: LayerBlock) -> bool:
        """Whether every number is the same, bit for bit."""
        mine, theirs = ((b.layer, b.head_start, b.index_start, b.keys.dtype) for b in (self, other))
        optional = (
            (getattr(self, name), getattr(other, name))
            for name in ("neighbors", "entries", "zones", "profile", "key_mass")
        )
        return (
            mine == theirs
            and all(
                (a is None) == (b is None) and (a is None or a.equals(b))  # type: ignore[arg-type]
                for a, b in (
                    (self.scan, other.scan),
                    (self.key_codes, other.key_codes),
                    (self.value_codes, other.value_codes),
                )
            )
            and np.array_equal(self.positions, other.positions)
            and np.array_equal(bits(self.keys), bits(other.keys))
            and np.array_equal(bits(self.values), bits(other.values))
            and (self.queries is None) == (other.queries is None)
            and (self.queries is None or np.array_equal(bits(self.queries), bits(other.queries)))  # type: ignore[arg-type]
            and all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in optional)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class TokensBlock:
    """The context's tokens and where in the document's text each comes from.

    Args:
        positions: [context_tokens] int32, ascending from 0.
        token_ids: [context_tokens] int32.
        char_start, char_end: [context_tokens] int64 character offsets into the document's text, end exclusive;
            equal for a token of the template.
    """

    positions: NDArray[np.int32]
    token_ids: NDArray[np.int32]
    char_start: NDArray[np.int64]
    char_end: NDArray[np.int64]


def check_layer(block: LayerBlock, error: type[StoreError], name: str) -> None:
    """Raise `error` unless shapes and dtypes fit together, every neighbor and entry is a row of the index, every zone
    has a number it can have, and profiles are shares that grow."""

    def rule(holds: bool, where: str, value: object, fix: str) -> None:
        if not holds:
            raise error(f"{name}: {where}", value, fix)

    shape = tuple(block.keys.shape)
    rule(len(shape) == 3 and 0 not in (shape[0], shape[2]), "keys", shape, "must be [n_heads, rows, head_dim]")
    rows = shape[1] + (0 if block.key_codes is None else block.index_rows)
    rule(block.positions.shape == (rows,), "positions", block.positions.shape, f"must be [{rows}]")
    shape = (shape[0], rows, shape[2])
    for what, states, coded in (("keys", block.keys, block.key_codes), ("values", block.values, block.value_codes)):
        plain = shape if coded is None else (shape[0], rows - block.index_rows, shape[2])
        rule(tuple(states.shape) == plain, what, tuple(states.shape), f"must be {list(plain)}")
        if coded is not None:
            rule(f"{coded.of}s" == what, f"{coded.of}_codec", coded.codec, f"are no codes of {what}")
            check_coded(coded, n_heads=shape[0], index_rows=block.index_rows, head_dim=shape[2], rule=rule)
    dtypes = (block.keys.dtype, block.values.dtype)
    rule(dtypes[0] in DTYPE_NAMES and dtypes[0] == dtypes[1], "dtype", dtypes, f"must be one of {list(TORCH_DTYPES)}")
    rule(block.layer >= 0 and block.head_start >= 0, "layer", (block.layer, block.head_start), "must be >= 0")
    rule(
        block.index_start >= 0 and block.index_start + block.index_rows <= shape[1],
        "index_start",
        block.index_start,
        f"the index's {block.index_rows} rows must lie within {shape[1]} rows",
    )
    for where, ids, low in (
        ("neighbors", block.neighbors, -1),
        ("entries", block.entries, 0),
        ("zones", block.zones, 0),
    ):
        if ids is None:
            continue
        ndim = 3 if where == "neighbors" else 2
        rule(ids.ndim == ndim and ids.shape[0] == shape[0], where, ids.shape, f"must have {shape[0]} heads first")
        rule(ids.dtype == np.int32, f"{where}.dtype", str(ids.dtype), "must be int32")
        if ids.size:
            span = (int(ids.min()), int(ids.max()))
            rule(low <= span[0] and span[1] < block.index_rows, where, span, f"must be in [{low}, {block.index_rows})")
    indexed = block.neighbors is not None or block.scan is not None
    if block.scan is not None:
        check_scan(block.scan, n_heads=shape[0], index_rows=block.index_rows, head_dim=shape[2], rule=rule)
    if block.zones is not None:
        wanted = (shape[0], block.index_rows)
        fix = f"must be {list(wanted)}, with an index"
        rule(indexed and block.zones.shape == wanted, "zones", block.zones.shape, fix)
    if block.key_mass is not None:
        mass, wanted = block.key_mass, (shape[0], block.index_rows)
        known = indexed and mass.shape == wanted and mass.dtype == np.float32
        rule(known, "mass", (mass.shape, str(mass.dtype)), f"must be float32 {list(wanted)}, with an index")
        rule(bool(np.isfinite(mass).all() and (mass >= 0).all()), "mass", "not a sum", "must be finite and >= 0")
    if block.queries is not None:
        queries, most = block.queries, (shape[0], f"at most {shape[1]}", shape[2])
        known = queries.ndim == 3 and queries.shape[0] == shape[0] and queries.shape[1] <= shape[1]
        known = known and queries.shape[2] == shape[2] and queries.dtype == block.keys.dtype
        about = (tuple(queries.shape), str(queries.dtype))
        rule(indexed and known, "queries", about, f"must be {list(most)} in the dtype of the keys, with an index")
        rule(
            bool(torch.isfinite(queries).all()),
            "queries",
            "not finite",
            "must be finite; another dtype of keys and values may hold them",
        )
    if block.profile is not None:
        shares, wanted = block.profile, (shape[0], PROFILE_NUMBERS)
        known = indexed and shares.shape == wanted and shares.dtype == np.float32
        rule(known, "profile", (shares.shape, str(shares.dtype)), f"must be float32 {list(wanted)}, with an index")
        sound = bool((shares >= 0).all() and (shares <= 1).all() and (np.diff(shares) >= 0).all())
        rule(sound, "profile", shares.tolist(), "must be shares in [0, 1] that do not fall")


def bits(tensor: torch.Tensor) -> NDArray[np.uint8]:
    """The tensor's memory on the CPU, as bytes along the last dimension."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()  # type: ignore[no-any-return]
