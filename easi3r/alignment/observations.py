"""What the alignment explains: each pair says twice, once per view, where a frame's pixels lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from easi3r.structures import PairPredictions


@dataclass(frozen=True)
class Observations:
    """Two per directed pair, one for each view, sorted by frame.  O = 2 P observations of N = H * W pixels.

    Points that are not finite weigh nothing.
    """

    pair: Tensor  # [O] int64, index of the pair
    frame: Tensor  # [O] int64 ascending, the frame whose pixels these are
    is_first: Tensor  # [O] bool: the frame is the pair's first view, so points are in its own camera's frame
    points: Tensor  # [O, 3, N] float32, in the camera frame of the pair's first view
    confidence: Tensor  # [O, N] float32, >= 1
    num_frames: int
    size: tuple[int, int]  # (H, W)

    @property
    def num_pairs(self) -> int:
        return len(self.pair) // 2

    @property
    def weight(self) -> Tensor:
        """[O, N]: the logarithm of the confidence, so that 1 counts for nothing (DUSt3R)."""
        return self.confidence.log()

    def views_of_pairs(self) -> Tensor:
        """[P, 2] int64: the observations of each pair's first and second view."""
        order = torch.argsort(2 * self.pair + (~self.is_first).long())
        return order.view(-1, 2)

    def rows_of_frames(self) -> list[slice]:
        """[n] slices: the observations of each frame."""
        return rows_by_value(self.frame, self.num_frames)


def rows_by_value(ascending: Tensor, count: int) -> list[slice]:
    """Where each of 0 .. count - 1 stands in an ascending tensor."""
    ends = torch.bincount(ascending, minlength=count).cumsum(0).tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def observe(predictions: PairPredictions, num_frames: int) -> Observations:
    """Rearrange predictions into observations (a copy)."""
    pairs = torch.from_numpy(predictions.pairs)
    frame, order = pairs.T.flatten().sort(stable=True)
    height, width = predictions.points_first.shape[1:3]
    points = torch.cat([predictions.points_first, predictions.points_second]).flatten(1, 2).transpose(1, 2)[order]
    confidence = torch.cat([predictions.confidence_first, predictions.confidence_second]).flatten(1)[order]
    usable = points.isfinite().all(dim=1) & confidence.isfinite()
    return Observations(
        pair=order % len(pairs),
        frame=frame,
        is_first=order < len(pairs),
        points=torch.where(usable[:, None], points, 0.0).contiguous(),
        confidence=torch.where(usable, confidence, 1.0),
        num_frames=num_frames,
        size=(int(height), int(width)),
    )
