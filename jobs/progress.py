"""Progress of a phase on stderr: a bar on a terminal, elsewhere a line now and then, as in the log of a Ray job."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY_S = 30.0


class Progress:
    """How far a phase is. Made by `showing`."""

    def __init__(self, name: str, unit: str, total: int) -> None:
        self.name, self.unit, self.total = name, unit, total
        self.done = self.failed = self.tokens = 0
        self._began = time.monotonic()
        self._bar: Any = None

    def advance(self, *, tokens: int = 0, failed: bool = False) -> None:
        """One more row is finished."""
        self.done += 1
        self.tokens += tokens
        self.failed += failed
        if self._bar is not None:
            seconds = max(1e-9, time.monotonic() - self._began)
            self._bar.set_postfix_str(f"{self.failed} failed, {self.tokens / seconds:,.0f} tokens/s", refresh=False)
            self._bar.update()

    def line(self) -> str:
        """Where it stands, in one line."""
        seconds = max(1e-9, time.monotonic() - self._began)
        text = f"{self.name}: {self.done:,} of {self.total:,} {self.unit}, {self.failed:,} failed, "
        text += f"{self.tokens / seconds:,.0f} tokens/s, {clock(seconds)} so far"
        if 0 < self.done < self.total:
            text += f", {clock(seconds / self.done * (self.total - self.done))} left"
        return text


@contextmanager
def showing(
    name: str,
    unit: str,
    total: int,
    *,
    visible: bool = True,
    stream: TextIO | None = None,
    every_s: float = LINE_EVERY_S,
) -> Iterator[Progress]:
    """A phase of `total` rows, shown until the block ends.

    Args:
        name, unit: The phase, and what its rows are called.
        visible: False: nothing is written.
        stream: None: stderr. A bar if it is a terminal; else lines, the first after `every_s`, and none if it is over
            sooner.
    """
    stream = stream or sys.stderr
    progress = Progress(name, unit, total)
    if not visible:
        yield progress
    elif stream.isatty():
        with tqdm(total=total, desc=name, unit=f" {unit}", file=stream, dynamic_ncols=True) as progress._bar:
            yield progress
    else:
        over = threading.Event()
        writer = threading.Thread(target=_write_lines, args=(progress, stream, every_s, over), daemon=True)
        writer.start()
        try:
            yield progress
        finally:
            over.set()
            writer.join()


def _write_lines(progress: Progress, stream: TextIO, every_s: float, over: threading.Event) -> None:
    written = False
    while not over.wait(every_s):
        print(progress.line(), file=stream, flush=True)
        written = True
    if written:
        print(progress.line(), file=stream, flush=True)


def clock(seconds: float) -> str:
    """A duration as ``42 s``, ``3:07 min`` or ``2:05:00 h``."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{whole:02} h" if hours else f"{minutes}:{whole:02} min"
