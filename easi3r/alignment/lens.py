"""Focal lengths and principal points: what the rays of the first views say, and what the user knows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from easi3r.alignment.initialise import centred_pixels, weiszfeld_focal
from easi3r.alignment.relative import read_view, spread
from easi3r.config import AlignmentSettings, KnownSettings
from easi3r.structures import Known, PairPredictions

PAIRS, POINTS = 6, 1500  # that are looked at, of a frame, and of a pair
LEAST_SPREAD = 1e-5  # of log focal lengths
LEAST_SPREAD_PX = 1e-3
PRIOR_LOG_FOCAL = 0.01  # a standard deviation of what a weight of 1 says


@dataclass(frozen=True)
class Lenses:
    """Where the solver starts, and how sure it may be."""

    focal: Tensor  # [n, 2] float64 pixels along x and y
    centre: Tensor  # [n, 2] float64 pixels
    log_focal: Tensor  # [n] float64, what is believed of it, against the start
    log_focal_precision: Tensor  # [n] float64, 1 / variance
    centre_precision: float  # pixels^-2
    focal_free: Tensor  # [n] bool: of each frame by itself
    shared_focal_free: bool
    centre_free: bool


def lenses(
    predictions: PairPredictions,
    num_frames: int,
    size: tuple[int, int],
    settings: AlignmentSettings,
    known: Known,
    uses: KnownSettings,
) -> Lenses:
    """Estimate what is not known.  With a shared focal length, what is known of one frame holds for all."""
    n, (height, width) = num_frames, size
    found = [_rays_of(predictions, frame, size) for frame in range(n)]  # [k, 3]: log focal, centre x, y
    every = torch.cat(found)
    spread = 1.4826 * (every - every.median(dim=0).values).abs().median(dim=0).values.double()
    own = torch.stack([rows.median(dim=0).values for rows in found]).double()
    if settings.shared_focal:
        own = own.median(dim=0).values.expand(n, 3)
    focal = own[:, :1].exp().expand(n, 2).clone()
    middle = torch.tensor([(width - 1) / 2, (height - 1) / 2], dtype=torch.float64)
    solves_centre = settings.principal_point == "solve"
    if solves_centre:
        own_centre = every[:, 1:].median(dim=0).values.double()
        middle = middle + own_centre
    centre = middle.expand(n, 2).clone()
    precision = spread[0].clamp(min=LEAST_SPREAD).pow(-2).expand(n) / (n if settings.shared_focal else 1)
    believed, fixed = own[:, 0], torch.zeros(n, dtype=torch.bool)
    if known.intrinsics is not None:
        matrices = torch.from_numpy(known.intrinsics)
        given = matrices.isfinite().all(dim=2).all(dim=1)
        if settings.shared_focal:
            matrices = torch.where(given[:, None, None], matrices, matrices[given].median(dim=0).values)
            given = torch.ones(n, dtype=torch.bool)
        focal[given] = torch.stack([matrices[given, 0, 0], matrices[given, 1, 1]], dim=1)
        centre[given] = matrices[given, :2, 2]
        fixed = given & (uses.intrinsics_use == "fixed")
        if uses.intrinsics_use == "prior":  # the mean of what is given and what the rays say
            sure = torch.where(given, uses.intrinsics_weight / PRIOR_LOG_FOCAL**2, 0.0).double()
            sure /= int(given.sum()) if settings.shared_focal else 1
            believed = (precision * own[:, 0] + sure * focal.log().mean(dim=1)) / (precision + sure)
            precision = precision + sure
    return Lenses(
        focal=focal,
        centre=centre,
        log_focal=believed - focal.log().mean(dim=1),
        log_focal_precision=precision,
        centre_precision=float(spread[1:].max().clamp(min=LEAST_SPREAD_PX)) ** -2,
        focal_free=~fixed & (not settings.shared_focal),
        shared_focal_free=settings.shared_focal and not bool(fixed.any()),
        centre_free=solves_centre and known.intrinsics is None,
    )


def _rays_of(predictions: PairPredictions, frame: int, size: tuple[int, int]) -> Tensor:
    """[k, 3] log focal length and offset of the principal point in pixels, of some of the pairs that a frame begins."""
    index = torch.from_numpy(np.flatnonzero(predictions.pairs[:, 0] == frame))
    index, sample = index[:: math.ceil(len(index) / PAIRS)], spread(POINTS, size)
    pixels = centred_pixels(size)[:, sample]
    points, weight = read_view(predictions, "first", index, sample)
    rows = []
    for point, w in zip(points, weight, strict=True):
        focal = weiszfeld_focal(point, w, pixels)
        usable = (point[2] > 1e-6) & (w > 0)
        offset = torch.zeros(2)
        if usable.any():
            offset = (pixels - focal * point[:2] / point[2])[:, usable].median(dim=1).values
        rows.append(torch.cat([focal.log()[None], offset]))
    return torch.stack(rows)
