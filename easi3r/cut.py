"""Where a long clip is cut into pieces: plain values, which a process without torch can hand on."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Cut:
    """The pieces of a clip, which overlap, and how many pairs or frames go through the network at once."""

    pieces: tuple[range, ...]  # frames that are reconstructed together
    batch_size: int

    def shared(self, number: int) -> int:
        """How many of the first frames of that piece are in pieces before it."""
        return self.pieces[number - 1].stop - self.pieces[number].start if number else 0

    def fresh(self, number: int) -> range:
        """The frames of that piece which are in none before it."""
        piece = self.pieces[number]
        return range(piece.start + self.shared(number), piece.stop)


def cut_clip(num_frames: int, at_most: int, overlap: int) -> tuple[range, ...]:
    """Pieces of equal length that share ``overlap`` frames or a few more.

    >>> cut_clip(10, 6, 2)
    (range(0, 6), range(4, 10))
    """
    if num_frames <= at_most:
        return (range(num_frames),)
    count = math.ceil((num_frames - overlap) / (at_most - overlap))
    length = math.ceil((num_frames + (count - 1) * overlap) / count)
    starts = [round(k * (num_frames - length) / (count - 1)) for k in range(count)]
    return tuple(range(start, start + length) for start in starts)
