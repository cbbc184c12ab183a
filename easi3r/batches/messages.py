"""What a batch and its workers tell each other: plain values, so that the batch itself needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from easi3r.batches.clips import Clip
from easi3r.config import Settings
from easi3r.cut import Cut

Kind = Literal["measure", "work"]


@dataclass(frozen=True)
class Order:
    """What all clips of a batch have in common."""

    out: Path
    checkpoint: str
    settings: Settings
    threads: int
    jobs_per_host: int = 1  # that share its memory


@dataclass(frozen=True)
class Info:
    """What a worker says of itself once its model is loaded."""

    key: str  # of settings, weights and version
    licence: str
    gpus: int  # that this host has


@dataclass(frozen=True)
class Size:
    """How much work a clip is, about; zeros where nobody can say before it is read."""

    frames: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class Windows:
    """How a long clip becomes tasks, one for each of its pieces."""

    cut: Cut
    rests_on: tuple[int | None, ...]  # of each piece: which one has to be there first
    content: str | None  # hash of the clip's files


class Event(NamedTuple):
    """What became of a task: ("begun", clip, None), ("measured", clip, Size), ("ended", clip, Record), or ("lost",
    clip, sentence) where its workers died."""

    kind: str
    clip: Clip
    value: Any


def now() -> str:
    """Local time, ISO 8601."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
