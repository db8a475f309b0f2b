"""How much memory opened indexes may take where nobody has said it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

_log = logging.getLogger(__name__)
_LEAST = 1 << 26  # 64 MiB: with less, rabatch would stream what any machine holds


def automatic_budget(device: str, *, sharing: int = 1, sharing_card: int = 1) -> int:
    """Bytes: half of the memory that is available now, in equal parts.

    The other half is for the tails of questions, for the tensors of passes and for whatever else runs there. On CUDA a
    layer lies partly on the card and partly beside it, so half of the card's free memory counts if that is less.

    Args:
        device: Of the model.
        sharing: Processes that take such a part of this machine.
        sharing_card: Processes that take such a part of this card.
    """
    room = available_bytes() // max(1, sharing)
    if device.startswith("cuda"):
        room = min(room, torch.cuda.mem_get_info(device)[0] // max(1, sharing_card))
    budget = max(_LEAST, room // 2)
    _log.info("opened indexes may take %d bytes, half of what is free", budget)
    return budget


def available_bytes(root: Path = Path("/")) -> int:
    """Memory that can be had without swapping: of the machine, or of its container where that is less.

    Args:
        root: Where ``proc`` and ``sys`` are, for tests.
    """
    found = []
    meminfo = _fields(root / "proc/meminfo")
    if "MemAvailable:" in meminfo:
        found.append(meminfo["MemAvailable:"] * 1024)
    groups = root / "sys/fs/cgroup"
    for limit, used, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        most, taken = _number(groups / limit), _number(groups / used)
        if most is not None and taken is not None:
            found.append(max(0, most - taken + _fields(groups / stat).get(cache, 0)))  # cache gives way
    if not found:  # no Linux
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
    return min(found)


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no file, or "max" in it."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _fields(file: Path) -> dict[str, int]:
    """Lines of a name and a number; others are passed over."""
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}
