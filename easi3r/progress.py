"""Progress of long loops: a function that wraps a sequence, chosen by whoever starts the work."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """Called as ``progress(items, 'what is being done')``; yields the items."""

    def __call__(self, items: Sequence[T], label: str) -> Iterable[T]: ...


def silent(items: Sequence[T], label: str) -> Iterable[T]:
    """No bar."""
    return items


def bar(items: Sequence[T], label: str) -> Iterable[T]:
    """A bar on stderr that appears only once the loop has taken two seconds."""
    from tqdm import tqdm

    return tqdm(items, desc=label, delay=2, leave=False, file=sys.stderr, dynamic_ncols=True)
