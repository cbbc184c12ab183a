"""How long it will still take, said honestly: by the frames that are left, not by the clips."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Remaining:
    """Counts frames; clips whose length nobody knows count as the mean of the others."""

    waiting: dict[str, int]  # name of a clip -> frames, 0 where unknown
    done: int = 0  # frames that were computed
    begin: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        known = [count for count in self.waiting.values() if count]
        mean = round(sum(known) / len(known)) if known else 1
        self.waiting = {name: count or mean for name, count in self.waiting.items()}

    def finish(self, name: str, frames: int | None) -> None:
        """A clip is done; ``frames`` is None for one that failed: gone, but nothing is learnt of the speed."""
        self.waiting.pop(name, None)
        self.done += frames or 0

    def seconds(self) -> float | None:
        """None before anything is done."""
        if not self.done:
            return None
        return sum(self.waiting.values()) * (time.monotonic() - self.begin) / self.done

    def __str__(self) -> str:
        left = self.seconds()
        return "" if left is None or not self.waiting else f"about {duration(left)} left"


def duration(seconds: float) -> str:
    """In words.

    >>> duration(40), duration(600), duration(20000)
    ('40 s', '10 min', '5.6 h')
    """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
