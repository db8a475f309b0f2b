"""A run as a report shows it, and what is known of the software and the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from rabatch import __version__
from rabatch.report.statistics import Phase

_PACKAGES = ("ray", "torch", "transformers", "numpy", "pyarrow", "faiss-cpu", "numba")
_USER = re.compile(r"(?<=//)[^/@\s]*@")
_DATE = "%Y-%m-%d %H:%M:%S UTC"


@dataclass
class Run:
    """Everything that a report shows.

    Attributes:
        title: Of the page.
        phases: In their order.
        places: Where documents, indexes and answers lie: paths and URLs; users and passwords in them are left out.
        settings: By heading, names and values. Never storage options: they may hold credentials.
        error: Why it failed as a whole, if it did.
        began: When; None if it is not one run that is shown.
    """

    title: str
    phases: list[Phase] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    error: str | None = None
    began: datetime | None = field(default_factory=lambda: datetime.now(UTC))

    def facts(self) -> dict[str, str]:
        """When and where, by name."""
        facts = {} if self.began is None else {"started": self.began.strftime(_DATE)}
        facts |= {name: _USER.sub("", place) for name, place in self.places.items()}
        for phase in self.phases:
            for number, (fingerprint, rows) in enumerate(phase.fingerprints.most_common(3)):
                name = f"fingerprint of the {'indexes' if phase.name == 'build' else 'answers'}"
                facts[name + (f" ({number + 1})" if number else "")] = f"{fingerprint} ({rows:,} {phase.unit})"
        return facts


def versions() -> dict[str, str]:
    """Of rabatch, of what it computes with, and of the machine that made the report."""
    found = {"rabatch": __version__, "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["machine of the driver"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    return found
