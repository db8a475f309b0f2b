"""Which columns a layer part has, how wide they are, and in which rows they hold something."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rabatch.storage.blocks import TORCH_DTYPES, LayerBlock
from rabatch.storage.codecs import BITS, GROUP, Of, code_width, group_width
from rabatch.storage.columns import id_width
from rabatch.storage.packed_ids import is_ascending, packed_width

PACKED = 0
"""As a width of neighbors: packed, see `rabatch.storage.packed_ids`."""
MASS_BYTES = 4
"""A float32."""
STATES: tuple[Of, Of] = ("key", "value")
_SIZES = ("head_dim", "degree", "neighbor_width", "index_start", "index_rows")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of a layer part.

    Args:
        item_bytes: Of a number of `dtype`.
        neighbor_width: Bytes of a link's id, or `PACKED`.
        index_start, index_rows: Rows of the index.
        scan_width, zone_width, mass_width: Bytes of a key's scan codes, of its zone and of its mass; 0 for none.
        codecs: Of keys and of values.
        n_queries: Query vectors of a head; None: none are kept.
    """

    head_dim: int
    item_bytes: int
    graph: bool
    degree: int
    neighbor_width: int
    index_start: int
    index_rows: int
    scan_width: int
    zone_width: int
    mass_width: int
    codecs: tuple[str, str]
    n_queries: int | None = None

    @classmethod
    def of(cls, block: LayerBlock) -> Layout:
        """That a block is stored in: neighbors packed if they ascend and that is smaller."""
        degree = 0 if block.neighbors is None else int(block.neighbors.shape[2])
        n_zones = 0 if block.zones is None else int(block.zones.max(initial=-1)) + 1
        width = id_width(block.index_rows)
        if block.neighbors is not None and degree and block.index_rows:
            smaller = packed_width(block.index_rows, degree) < degree * width
            width = PACKED if smaller and is_ascending(block.neighbors) else width
        return cls(
            head_dim=block.head_dim,
            item_bytes=block.keys.element_size(),
            graph=block.neighbors is not None,
            degree=degree,
            neighbor_width=width,
            index_start=block.index_start,
            index_rows=block.index_rows,
            scan_width=0 if block.scan is None else block.scan.code_width,
            zone_width=0 if block.zones is None else id_width(n_zones),
            mass_width=0 if block.key_mass is None else MASS_BYTES,
            codecs=block.codecs,
            n_queries=None if block.queries is None else int(block.queries.shape[1]),
        )

    @classmethod
    def read(cls, meta: Mapping[str, Any], rule: Callable[[bool, str, object, str], None]) -> Layout:
        """From a part's metadata; `rule(holds, what, value, fix)` refuses what no part can have."""
        for key in _SIZES:
            size = meta.get(key)
            rule(type(size) is int and 0 <= size < 2**31, key, size, "must be a whole number >= 0")
        rule(meta.get("dtype") in TORCH_DTYPES, "dtype", meta.get("dtype"), f"must be one of {', '.join(TORCH_DTYPES)}")
        head_dim, width = meta["head_dim"], meta["neighbor_width"]
        rule(width in (PACKED, 2, 4), "neighbor_width", width, "must be 2 or 4, or 0 for packed ones")
        scan_width, zone_width = meta.get("code_width", 0), meta.get("zone_width", 0)  # parts of before them have none
        fix = f"must be 0, or of head_dim {head_dim}: {-(-head_dim // 4)}"
        rule(type(scan_width) is int and scan_width in (0, -(-head_dim // 4)), "code_width", scan_width, fix)
        rule(type(zone_width) is int and zone_width in (0, 2, 4), "zone_width", zone_width, "must be 0, 2 or 4")
        mass_width = meta.get("mass_width", 0)
        fix = f"must be 0 or {MASS_BYTES}"
        rule(type(mass_width) is int and mass_width in (0, MASS_BYTES), "mass_width", mass_width, fix)
        n_queries = meta.get("n_queries")
        sound = n_queries is None or (type(n_queries) is int and 0 <= n_queries < 2**31)
        rule(sound, "n_queries", n_queries, "must be a whole number >= 0")
        codecs = tuple(meta.get(f"{of}_codec", "none") for of in STATES)
        for of, codec in zip(STATES, codecs, strict=True):
            rule(codec == "none" or codec in BITS, f"{of}_codec", codec, f"must be none or one of {', '.join(BITS)}")
        graph = meta.get("graph") is True
        index = graph or scan_width or codecs != ("none", "none")
        rule(bool(index) or not meta["index_rows"], "index_rows", meta["index_rows"], "must be 0 without an index")
        return cls(
            head_dim=head_dim,
            item_bytes=TORCH_DTYPES[meta["dtype"]].itemsize,
            graph=graph,
            degree=meta["degree"],
            neighbor_width=width,
            index_start=meta["index_start"],
            index_rows=meta["index_rows"],
            scan_width=scan_width,
            zone_width=zone_width,
            mass_width=mass_width,
            codecs=codecs,  # type: ignore[arg-type]
            n_queries=n_queries,
        )

    @property
    def indexed(self) -> slice:
        """The rows of the index."""
        return slice(self.index_start, self.index_start + self.index_rows)

    @property
    def neighbor_bytes(self) -> int:
        """Of a row."""
        packed = self.neighbor_width == PACKED
        return packed_width(self.index_rows, self.degree) if packed else self.degree * self.neighbor_width

    def metadata(self) -> dict[str, object]:
        """What `read` reads, but for the dtype and what other parts of the metadata say."""
        codecs = {f"{of}_codec": codec for of, codec in zip(STATES, self.codecs, strict=True) if codec != "none"}
        return {
            "graph": self.graph,
            "degree": self.degree,
            "neighbor_width": self.neighbor_width,
            "index_start": self.index_start,
            "index_rows": self.index_rows,
            "zone_width": self.zone_width,
            **({"mass_width": self.mass_width} if self.mass_width else {}),  # parts without are as before there was any
            **({} if self.n_queries is None else {"n_queries": self.n_queries}),
            **codecs,
        }

    def columns(self) -> dict[str, tuple[int, bool]]:
        """Of each binary column its width, and whether it is null in some rows."""
        columns: dict[str, tuple[int, bool]] = {}
        for of, codec in zip(STATES, self.codecs, strict=True):
            columns[of] = self.head_dim * self.item_bytes, codec != "none"
            if codec != "none":
                columns[f"{of}_code"] = code_width(codec, of, self.head_dim), True
                columns[f"{of}_group"] = group_width(codec, of, self.head_dim), True
        columns["neighbors"] = self.neighbor_bytes if self.graph else 0, self.neighbor_width == PACKED
        columns["code"] = self.scan_width, False
        columns["zone"] = self.zone_width, False
        columns["mass"] = self.mass_width, True
        columns["query"] = 0 if self.n_queries is None else self.head_dim * self.item_bytes, True
        return {name: column for name, column in columns.items() if column[0]}

    def schema(self) -> pa.Schema:
        """The columns of a part."""
        binary = [pa.field(name, pa.binary(width), nullable=null) for name, (width, null) in self.columns().items()]
        return pa.schema([pa.field("position", pa.int32(), nullable=False), *binary])

    def held(self, column: str, rows: int) -> NDArray[np.bool_]:
        """In which of `rows` rows a column that is null in others holds something."""
        held = np.zeros(rows, np.bool_)
        if column == "query":
            held[: self.n_queries or 0] = True
            return held
        held[self.indexed] = True
        if column in STATES:
            return ~held
        if column.endswith("_group"):
            held[:] = False
            held[self.index_start : self.index_start + self.index_rows : GROUP] = True
        return held

    def value_bytes(self, rows: int) -> int:
        """Of a row group, positions not counted, which take next to none."""
        total = 0
        for name, (width, null) in self.columns().items():
            held = self.index_rows if null else rows
            if name in STATES and null:
                held = rows - self.index_rows
            elif name == "query":
                held = self.n_queries or 0
            elif name.endswith("_group"):
                held = -(-self.index_rows // GROUP)
            total += width * held
        return total
