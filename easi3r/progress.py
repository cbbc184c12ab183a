"""Progress of long loops: a function that wraps what is looped over, chosen by whoever starts the work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Called as ``progress(items, 'what is being done')``; yields the items."""

    def __call__(self, items: Iterable[T], label: str) -> Iterable[T]: ...


def silent(items: Iterable[T], label: str) -> Iterable[T]:
    """No bar."""
    return items


def bar(items: Iterable[T], label: str) -> Iterable[T]:
    """A bar on stderr that appears only once the loop has taken two seconds."""
    from tqdm import tqdm

    often = 0.1 if sys.stderr.isatty() else 2.0  # seconds between updates; a log file keeps every one
    return tqdm(items, desc=label, delay=2, mininterval=often, leave=False, file=sys.stderr, dynamic_ncols=True)
