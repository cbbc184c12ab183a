"""Images of unequal size on one canvas: where each lies, and which of them can be worked on together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Box:
    """Where an image lies on the canvas, in pixels or in tokens; ``bottom`` and ``right`` are exclusive.

    >>> box = Box.centred((64, 48), (64, 64))
    >>> box, box.tokens(16).size
    (Box(top=8, left=0, bottom=56, right=64), (3, 4))
    """

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def centred(cls, size: tuple[int, int], canvas: tuple[int, int]) -> Box:
        """An image of ``size`` in the middle of a canvas, both (width, height); what is over goes right and below."""
        left, top = (canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2
        return cls(top, left, top + size[1], left + size[0])

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left

    @property
    def rows(self) -> slice:
        """An index along y."""
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        """An index along x."""
        return slice(self.left, self.right)

    def tokens(self, patch_size: int) -> Box:
        """The same in tokens of ``patch_size`` pixels."""
        return Box(*(side // patch_size for side in (self.top, self.left, self.bottom, self.right)))

    def pixels(self, patch_size: int) -> Box:
        """The same in pixels, where it is in tokens of ``patch_size``."""
        return Box(*(side * patch_size for side in (self.top, self.left, self.bottom, self.right)))


def valid_pixels(size: tuple[int, int, int], boxes: Sequence[Box] | None) -> Array:
    """[n, H, W] bool of this size, False on padding; without boxes there is none."""
    valid = np.full(size, boxes is None)
    for mask, box in zip(valid, boxes or (), strict=boxes is not None):
        mask[box.rows, box.columns] = True
    return valid


def batches(keys: Sequence[Hashable], batch_size: int) -> list[Array]:
    """Indices of equal keys, at most ``batch_size`` together, in the order in which a key first appears.

    >>> [rows.tolist() for rows in batches("aabaa", 3)]
    [[0, 1, 3], [4], [2]]
    """
    rows: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(key, []).append(row)
    return [
        np.array(same[start : start + batch_size])
        for same in rows.values()
        for start in range(0, len(same), batch_size)
    ]


def taken(tokens: Tensor, box: Box, grid: tuple[int, int]) -> Tensor:
    """[B, N, ...] on the canvas -> [B, M, ...] of those in ``box``; grid: tokens of the canvas along y and x."""
    if box.size == grid:
        return tokens
    inner: Tensor = tokens.unflatten(1, grid)[:, box.rows, box.columns].flatten(1, 2)
    return inner


def placed(tokens: Tensor, box: Box, grid: tuple[int, int]) -> Tensor:
    """[B, M, C] of those in ``box`` -> [B, N, C] on the canvas, 0 on the padding."""
    if box.size == grid:
        return tokens
    canvas = tokens.new_zeros(len(tokens), *grid, tokens.shape[-1])
    canvas[:, box.rows, box.columns] = tokens.unflatten(1, box.size)
    return canvas.flatten(1, 2)


def extended(tokens: Tensor, box: Box, grid: tuple[int, int]) -> Tensor:
    """[B, M, C] of those in ``box`` -> [B, N, C] on the canvas, the padding as the nearest token.

    So no statistic over all tokens has an extreme that the image itself does not have.
    """
    if box.size == grid:
        return tokens
    rows, columns = (np.arange(grid[k]) - (box.top, box.left)[k] for k in (0, 1))
    nearest = rows.clip(0, box.size[0] - 1)[:, None], columns.clip(0, box.size[1] - 1)
    everywhere: Tensor = tokens.unflatten(1, box.size)[:, nearest[0], nearest[1]].flatten(1, 2)
    return everywhere
