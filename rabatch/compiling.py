"""How kernels are compiled: numba, without the GIL, and cached on disk.

The machine code is cached beside the source, or, where that is read-only, in the user's cache folder
(`NUMBA_CACHE_DIR` overrides both); files are replaced atomically and keyed by CPU, so processes may share it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numba

_log = logging.getLogger(__name__)
FAST = {"reassoc", "contract", "nsz", "arcp"}  # sums may be reordered; NaN and infinity keep their meaning


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`numba.njit` with fastmath, no GIL, and the disk cache where any folder for it is writable."""
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError as error:  # "cannot cache function ...: no locator available"
        _log.warning("kernel %s is compiled anew in every process: %s", function.__name__, error)
        return numba.njit(**options)(function)
