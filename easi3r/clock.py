"""Seconds per stage."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Clock:
    """``with clock("flow"): ...`` adds to ``clock.seconds["flow"]``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.add({stage: time.perf_counter() - begin})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Those of another clock, too."""
        for stage, more in seconds.items():
            self.seconds[stage] = round(self.seconds.get(stage, 0.0) + more, 3)
