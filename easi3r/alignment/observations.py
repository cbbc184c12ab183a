"""What the alignment explains: each pair says twice, once per view, where a frame's pixels lie."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from easi3r.structures import PairPredictions

Record = TypeVar("Record")


@dataclass(frozen=True)
class Observations:
    """Two per directed pair, one for each view, sorted by frame.  O = 2 P observations of N = H * W pixels.

    Points that are not finite weigh nothing.
    """

    pair: Tensor  # [O] int64, index of the pair
    frame: Tensor  # [O] int64 ascending, the frame whose pixels these are
    is_first: Tensor  # [O] bool: the frame is the pair's first view, so points are in its own camera's frame
    points: Tensor  # [O, 3, N] float32, in the camera frame of the pair's first view
    weight: Tensor  # [O, N] float32, log(confidence): a confidence of 1 counts for nothing (DUSt3R)
    mean_confidence: Tensor  # [O]
    frame_confidence: Tensor  # [n, N] the highest that any pair gives the pixel
    size: tuple[int, int]  # (H, W)

    @property
    def num_frames(self) -> int:
        """n."""
        return len(self.frame_confidence)

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
    """Rearrange predictions into observations (one copy, no temporary of their size)."""
    pairs = torch.from_numpy(predictions.pairs)
    frame, order = pairs.T.flatten().sort(stable=True)
    is_first, pair = order < len(pairs), order % len(pairs)
    count, (height, width) = len(order), predictions.points_first.shape[1:3]
    kind = torch.promote_types(predictions.points_first.dtype, torch.float32)
    points = torch.empty(count, 3, height * width, dtype=kind)
    weight = torch.empty(count, height * width, dtype=kind)
    mean_confidence = weight.new_empty(count)
    frame_confidence = weight.new_ones(num_frames, height * width)
    for row in range(count):
        views = "first" if is_first[row] else "second"
        said = getattr(predictions, f"points_{views}")[pair[row]].to(kind).flatten(0, 1).T
        confidence = getattr(predictions, f"confidence_{views}")[pair[row]].to(kind).flatten()
        usable = said.isfinite().all(dim=0) & confidence.isfinite()
        confidence = torch.where(usable, confidence, 1.0)
        points[row] = torch.where(usable, said, 0.0)
        weight[row] = confidence.log()
        mean_confidence[row] = confidence.mean()
        torch.maximum(frame_confidence[frame[row]], confidence, out=frame_confidence[frame[row]])
    size = (int(height), int(width))
    return Observations(pair, frame, is_first, points, weight, mean_confidence, frame_confidence, size)


def on_device(record: Record, device: torch.device) -> Record:
    """A dataclass with its tensors on ``device``."""
    values: dict[str, Any] = {field.name: getattr(record, field.name) for field in fields(record)}  # type: ignore[arg-type]
    moved = {name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(record, **moved)  # type: ignore[type-var]
