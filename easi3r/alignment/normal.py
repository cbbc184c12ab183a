"""Normal equations of a world of frames: a band of blocks, one row per frame, and a border that all frames share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import solveh_banded

from easi3r.structures import Array

GRID = (3, 4)  # knots of the smooth correction of a depth map, rows and columns
KNOTS = GRID[0] * GRID[1]
TURN, MOVE, POSE, FOCAL, KNOT = slice(0, 3), slice(3, 6), slice(0, 6), 6, slice(7, 7 + KNOTS)  # of a frame's unknowns
BLOCK = 7 + KNOTS
SHARED_FOCAL, SCALE, CENTRE = 0, 1, slice(2, 4)  # of the border: log focal, log scale of the world, principal point
BORDER = 4


class Normal:
    """``hessian @ step = -gradient``, gathered term by term."""

    def __init__(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self.blocks: dict[tuple[int, int], Array] = {}  # [BLOCK, BLOCK] of frames i >= j
        self.border = np.zeros((num_frames, BLOCK, BORDER))
        self.corner = np.zeros((BORDER, BORDER))
        self.gradient = np.zeros((num_frames, BLOCK))
        self.border_gradient = np.zeros(BORDER)

    def add(self, frames: Sequence[int], hessian: Array, gradient: Array) -> None:
        """Of the unknowns of distinct ``frames``, one block after the other, and then, if there is more, the border."""
        for row, i in enumerate(frames):
            own = slice(row * BLOCK, (row + 1) * BLOCK)
            self.gradient[i] += gradient[own]
            for column, j in enumerate(frames):
                if i >= j:
                    block = hessian[own, column * BLOCK : (column + 1) * BLOCK]
                    self.blocks[i, j] = self.blocks[i, j] + block if (i, j) in self.blocks else block
        if len(gradient) > len(frames) * BLOCK:
            for row, i in enumerate(frames):
                self.border[i] += hessian[row * BLOCK : (row + 1) * BLOCK, -BORDER:]
            self.corner += hessian[-BORDER:, -BORDER:]
            self.border_gradient += gradient[-BORDER:]

    def solve(self, free: Array, border_free: Array, damping: float) -> tuple[Array, Array]:
        """Steps [n, BLOCK] and [BORDER], 0 for what is not free; Cholesky on the band, Schur's complement for the rest.

        free: [n, BLOCK] bool.  border_free: [BORDER] bool.  damping: relative, on the diagonal (Marquardt).
        """
        size = self.num_frames * BLOCK
        banded = np.zeros(((max(i - j for i, j in self.blocks) + 1) * BLOCK, size))
        row, column = np.indices((BLOCK, BLOCK))
        for (i, j), block in self.blocks.items():
            block = block * free[i][:, None] * free[j]
            below = row + (i - j) * BLOCK - column
            lower = below >= 0
            banded[below[lower], (j * BLOCK + column)[lower]] += block[lower]
        moves = free.reshape(-1)
        banded[0] = np.where(moves, banded[0] * (1 + damping) + 1e-12, 1.0)
        edge = self.border.reshape(size, BORDER) * moves[:, None] * border_free
        right = np.column_stack([-self.gradient.reshape(-1) * moves, edge])
        solved = solveh_banded(banded, right, lower=True, check_finite=False)
        corner = self.corner * border_free[:, None] * border_free
        corner += np.diag(np.where(border_free, damping * np.diag(corner) + 1e-12, 1.0))
        last = np.linalg.solve(
            corner - edge.T @ solved[:, 1:], -self.border_gradient * border_free - edge.T @ solved[:, 0]
        )
        return (solved[:, 0] - solved[:, 1:] @ last).reshape(free.shape), last
