"""Min-max scaling, as the method uses it (epsilon in the denominator)."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-6


def min_max(values: Tensor) -> Tensor:
    """Scale everything to [0, 1]."""
    low, high = values.amin(), values.amax()
    return (values - low) / (high - low + EPS)


def min_max_per_frame(maps: Tensor) -> Tensor:
    """[n, N] -> each frame scaled to [0, 1]."""
    low, high = maps.amin(dim=1, keepdim=True), maps.amax(dim=1, keepdim=True)
    return (maps - low) / (high - low + EPS)
