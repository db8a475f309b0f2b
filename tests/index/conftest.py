"""What several test modules of the indexes set up."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rabatch.index import scan


@pytest.fixture(scope="module")
def small_scans() -> Iterator[None]:
    """Scans use their codes from 20 keys on; the shipped limit would make every scan here an exact search."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan, "MIN_KEYS", 20)
        patch.setattr(scan, "EXCEPTIONS", 3)
        yield
