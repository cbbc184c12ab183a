"""Cameras and depths of a network that knows one world already, said as the alignment reads them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from easi3r.config import KnownSettings
from easi3r.geometry import invert_rigid, transform, unproject
from easi3r.inference import empty_predictions
from easi3r.structures import AlignedCameras, Array, Known, PairPredictions


def pair_views(cameras: AlignedCameras, pairs: Array) -> PairPredictions:
    """Points of both frames of every pair [P, 2], in the first one's camera; all pairs agree on the world."""
    predictions = empty_predictions(pairs, *cameras.depth.shape[1:])
    poses = cameras.camera_to_world.astype(np.float64)
    points = unproject(cameras.depth, cameras.intrinsics)
    confidence = torch.from_numpy(cameras.confidence)
    for k, (i, j) in enumerate(pairs.tolist()):
        moved = transform(points[j], invert_rigid(poses[i]) @ poses[j])
        rows = (
            (predictions.points_first, torch.from_numpy(np.asarray(points[i]))),
            (predictions.points_second, torch.from_numpy(np.asarray(moved))),
            (predictions.confidence_first, confidence[i]),
            (predictions.confidence_second, confidence[j]),
        )
        for room, values in rows:
            most = torch.finfo(room.dtype).max
            room[k] = values.clamp(-most, most)
    return predictions


def starting_at(
    cameras: AlignedCameras, known: Known, uses: KnownSettings, *, shared_focal: bool
) -> tuple[Known, KnownSettings]:
    """What is not known, as the network says it, to begin with."""
    if known.intrinsics is None:
        lenses = cameras.intrinsics.astype(np.float64)
        lenses = np.broadcast_to(np.median(lenses, axis=0), lenses.shape).copy() if shared_focal else lenses
        known = replace(known, intrinsics=lenses)
        uses = replace(uses, intrinsics_use="init")
    if known.camera_to_world is None and known.depth is None:
        known = replace(known, camera_to_world=cameras.camera_to_world.astype(np.float64))
        uses = replace(uses, poses_use="init")
    return known, uses
