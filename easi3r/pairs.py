"""Which frames are looked at together: directed pairs, both directions of each."""

from __future__ import annotations

import numpy as np

from easi3r.config import PairSettings
from easi3r.errors import ConfigError
from easi3r.structures import Array


def make_pairs(num_frames: int, settings: PairSettings) -> Array:
    """Return the directed pairs [P, 2] int64 of (first, second) frame indices: all (i, j) with i < j, then all (j, i).

    Graphs: ``window`` pairs frame i with i + 1, i + 1 + stride, ... (``window`` partners, no wrap-around),
    ``complete`` everything with everything, ``logarithmic`` i with i + 1, 2, 4, 8, ..., ``reference`` one frame with
    all others.  A single frame is paired with itself, once.  Raises ConfigError for a reference beyond the clip.

    >>> make_pairs(3, PairSettings()).tolist()
    [[0, 1], [1, 2], [1, 0], [2, 1]]
    """
    if settings.graph == "reference" and settings.reference >= num_frames:
        raise ConfigError(
            f"pairs.reference is {settings.reference}, but the clip has {num_frames} frames; expected one of them, "
            f"0 to {num_frames - 1}."
        )
    if num_frames == 1:
        return np.zeros((1, 2), dtype=np.int64)
    if settings.graph == "reference":
        centre = settings.reference
        forward = sorted((min(i, centre), max(i, centre)) for i in range(num_frames) if i != centre)
    else:
        forward = [(i, i + step) for i in range(num_frames) for step in _steps(settings, num_frames - 1 - i)]
    pairs = np.array(forward, dtype=np.int64)
    return np.concatenate([pairs, pairs[:, ::-1]])


def _steps(settings: PairSettings, furthest: int) -> list[int]:
    if settings.graph == "complete":
        return list(range(1, furthest + 1))
    if settings.graph == "logarithmic":
        return [1 << k for k in range(furthest.bit_length())]
    return [1 + settings.stride * k for k in range(settings.window) if 1 + settings.stride * k <= furthest]
