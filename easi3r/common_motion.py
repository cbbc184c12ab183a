"""Which parts of a frame move as one: affine models of their optical flow, and whether they agree where the parts meet.

Everything is looked at in cells, pixels taken at a stride, so that its cost does not grow with the images' size.
Lengths are in long sides of the image.
"""

from __future__ import annotations

import cv2
import numpy as np

from easi3r.structures import Array, PairFlow

CELLS = 64  # along the images' long side, at most
PAIRS = 6  # of a frame, with those nearest in time
MIN_CELLS = 8  # that a part must show of a pair's flow, below which nothing is said about it
LEAST_SHARE = 0.12  # of a region's cells that each of its two parts must have
LEAST_GAIN = 0.8  # two motions must leave less than this share of what one leaves
REWEIGHTINGS = 3  # of a fit, which minimises the sum of distances
REASSIGNMENTS = 3  # of cells to the nearer of two motions
FLOOR = 0.0025  # errors of flow below it are all the same
CAP = 0.025  # and those above it per frame
MEETING = 0.04  # how deep the seam is along which two parts are compared


class FrameMotion:
    """The flow of one frame to the k frames that it is paired with, at its cells [h, w]."""

    def __init__(self, flow: PairFlow, frame: int) -> None:
        """Cell (column, row) is the pixel (stride * column, stride * row)."""
        rows = np.flatnonzero((flow.pairs[:, 0] == frame) & (flow.pairs[:, 1] != frame))
        rows = rows[np.argsort(np.abs(flow.pairs[rows, 1] - frame), kind="stable")][:PAIRS]
        side = max(flow.valid.shape[1:])
        self.stride = -(-side // CELLS)
        some = slice(None, None, self.stride)
        self.over_time = 1 / (1 + np.abs(flow.pairs[rows, 1] - frame)).astype(np.float32)  # [k]
        self.flow = np.moveaxis(flow.flow[rows, some, some], -1, 0).astype(np.float32) / side  # [2, k, h, w]
        self.valid = flow.valid[rows, some, some]  # [k, h, w]
        height, width = self.valid.shape[1:]
        y, x = np.mgrid[:height, :width].astype(np.float32) * np.float32(self.stride / side) - np.float32(0.5)
        self.basis = np.stack([np.ones_like(x), x, y])  # [3, h, w]

    def fit(self, region: Array, parts: Array) -> tuple[Array, Array]:
        """The affine flow of parts of a region, and how far all of the region is from it.

        region: [h, w] bool, m cells.  parts: [..., m] bool.
        Returns models [..., k, 2, 3], NaN for pairs that show too little of a part, and distances [..., k, m].
        """
        basis, (across, down), seen = self.basis[:, region], self.flow[:, :, region], self.valid[:, region]
        products = (basis[:, None] * basis).reshape(9, -1).T
        shown = (parts[..., None, :] & seen).astype(np.float32)  # [..., k, m]
        weight: Array = shown
        size = (*shown.shape[:-1], 3, 3)
        ridge = np.diag([1e-6, 1e-4, 1e-4]).astype(np.float32) * len(products)  # the few are no more than shifted
        for _ in range(REWEIGHTINGS):
            sums = np.stack([(weight * across) @ basis.T, (weight * down) @ basis.T], axis=-1)
            models = np.linalg.solve((weight @ products).reshape(size) + ridge, sums).swapaxes(-1, -2)
            distance = _length(models[..., 0, :] @ basis - across, models[..., 1, :] @ basis - down)
            weight = shown * (FLOOR / np.maximum(distance, np.float32(FLOOR)))
        models[shown.sum(axis=-1) < MIN_CELLS] = np.nan
        return models, distance

    def disagreement(self, first: Array, second: Array) -> float:
        """How far the motions of two parts, each [h, w] bool, are apart where these meet or come closest.

        The median over the pairs, in long sides per frame; NaN where no pair shows both.
        """
        if not (first.any() and second.any() and len(self.over_time)):
            return np.nan
        models, _ = self.fit(both := first | second, np.stack([first[both], second[both]]))
        apart = models[0] - models[1]
        usable = np.isfinite(apart[:, 0, 0])
        if not usable.any():
            return np.nan
        meeting = self.basis[:, _seam(first, second, MEETING * max(first.shape))]
        distance = np.median(_length(apart[usable, 0] @ meeting, apart[usable, 1] @ meeting), axis=1)
        return float(np.median(distance * self.over_time[usable]))

    def split(self, region: Array, min_motion: float) -> Array | None:
        """One of the two parts of a region whose motions disagree by more than ``min_motion``, or None; [h, w] bool.

        Cells are given to the nearer of two motions, again and again, from several first guesses; the one whose two
        motions leave least is taken.
        """
        least = max(MIN_CELLS, LEAST_SHARE * region.sum())
        if region.sum() < 2 * least or not len(self.over_time):
            return None
        guesses = np.stack([guess[region] for guess in self._guesses(region)])  # [g, m]
        for _ in range(REASSIGNMENTS):
            guesses, left = self._nearer(region, guesses)
        possible = np.minimum(guesses.sum(axis=1), (~guesses).sum(axis=1)) >= least
        if not possible.any():
            return None
        best = int(np.where(possible, left, np.inf).argmin())
        whole, _ = self._residual(region, np.ones((1, 1, region.sum()), dtype=bool))
        if left[best] > LEAST_GAIN * whole.mean():
            return None
        part = np.zeros_like(region)
        part[region] = guesses[best]
        return part if self.disagreement(part, region & ~part) > min_motion else None

    def _guesses(self, region: Array) -> list[Array]:
        """The halves of a region along its two axes, and by its flow to the farthest frame that shows most of it."""
        half = [_halves(self.basis[1:], region, axis) for axis in (0, 1)]
        far = int((self.valid[:, region].mean(axis=1) / self.over_time).argmax())
        known = region & self.valid[far]
        return [*half, _halves(self.flow[:, far], known, 0)] if known.sum() >= MIN_CELLS else half

    def _residual(self, region: Array, parts: Array) -> tuple[Array, Array]:
        """What the motions of parts [g, p, m] leave of the region's cells: [g, p, m] long sides per frame.

        The mean over the pairs that tell about a cell and about all p parts; and [g, 1, m] bool, whether any does.
        """
        models, distance = self.fit(region, parts)
        usable = np.asarray(np.isfinite(models[..., 0, 0]).all(axis=1))  # [g, k]
        seen = self.valid[:, region] & usable[..., None]  # [g, k, m]
        off = np.minimum(distance * self.over_time[:, None], np.float32(CAP)) * seen[:, None]
        count = seen.sum(axis=1)[:, None]
        return off.sum(axis=2) / np.maximum(count, 1), np.asarray(count > 0)

    def _nearer(self, region: Array, guesses: Array) -> tuple[Array, Array]:
        """[g, m] bool: the cells that a part's motion explains better than the rest's, smoothed; [g] what is left."""
        off, known = self._residual(region, np.stack([guesses, ~guesses], axis=1))
        nearer = np.empty_like(guesses)
        preference = np.zeros(region.shape, np.float32)
        for guess, (here, there), told in zip(nearer, off, known[:, 0], strict=True):
            preference[region] = np.where(told, there - here, 0)
            guess[:] = cv2.blur(preference, (3, 3), borderType=cv2.BORDER_CONSTANT)[region] > 0
        return nearer, np.where(nearer, off[:, 0], off[:, 1]).mean(axis=1)


def _length(x: Array, y: Array) -> Array:
    return np.asarray(np.sqrt(x * x + y * y))


def _halves(values: Array, known: Array, axis: int) -> Array:
    """[h, w] bool: cells on one side of the mean of the known ones, along a principal axis of values [2, h, w]."""
    mean = values[:, known].mean(axis=1)
    _, axes = np.linalg.eigh(np.cov(values[:, known]))
    return np.asarray(np.tensordot(axes[:, 1 - axis], values - mean[:, None, None], 1) > 0)


def _seam(first: Array, second: Array, depth: float) -> Array:
    """[h, w] bool: the cells of either part that are nearest to the other, and those ``depth`` cells farther."""
    seam = np.zeros(first.shape, dtype=bool)
    for here, there in ((first, second), (second, first)):
        distance = cv2.distanceTransform((~there).astype(np.uint8), cv2.DIST_L2, 3)
        seam |= here & (distance <= distance[here].min() + depth)
    return seam
