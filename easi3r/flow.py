"""Optical flow between the frames of each pair, with forward-backward occlusion.

An estimator is any callable from two RGB images [H, W, 3] uint8 to flow [H, W, 2] float32 in pixels; ``ESTIMATORS``
says how to make those that ``flow.method`` can choose.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import torch

from easi3r.config import FlowSettings
from easi3r.progress import Progress
from easi3r.raft import load_raft
from easi3r.structures import Array, PairFlow

SMALL_SIDE = 256  # pixels of the long side, up to which images are doubled for DIS
DIS_MIN_SIDE = 16  # pixels; OpenCV refuses images that are smaller on both sides

FlowEstimator = Callable[[Array, Array], Array]


def dis_flow(first: Array, second: Array) -> Array:
    """Dense Inverse Search (Kroeger et al. 2016) at the full resolution, at twice that of small images; no weights.

    Its patches of 8 pixels blur the flow of small images, which then shows too little parallax.
    """
    if max(first.shape) <= SMALL_SIDE:
        doubled = (cv2.resize(x, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) for x in (first, second))
        return np.asarray(cv2.resize(_dis_flow(*doubled), first.shape[1::-1], interpolation=cv2.INTER_AREA)) / 2
    return _dis_flow(first, second)


def _dis_flow(first: Array, second: Array) -> Array:
    height, width = first.shape[:2]
    down, right = max(0, DIS_MIN_SIDE - height), max(0, DIS_MIN_SIDE - width)
    if down or right:
        first, second = (cv2.copyMakeBorder(x, 0, down, 0, right, cv2.BORDER_REPLICATE) for x in (first, second))
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    estimator.setFinestScale(0)
    grey_first, grey_second = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (first, second))
    flow = estimator.calc(grey_first, grey_second, np.zeros((*grey_first.shape, 2), np.float32))
    return np.asarray(flow)[:height, :width]


ESTIMATORS: dict[str, Callable[[FlowSettings, torch.device | None], FlowEstimator]] = {
    "dis": lambda settings, device: dis_flow,  # OpenCV's runs on the CPU whatever the device
    "raft": lambda settings, device: load_raft(settings.weights, device),
}


def make_estimator(settings: FlowSettings, device: torch.device | None = None) -> FlowEstimator:
    """The estimator that ``settings.method`` names, ready on the device (None: the CPU).

    Raises MissingExtraError without the package that it needs, CheckpointError without its weights.
    """
    return ESTIMATORS[settings.method](settings, device)


def estimate_flow(
    images: Array, pairs: Array, settings: FlowSettings, progress: Progress, device: torch.device | None = None
) -> PairFlow:
    """images: [n, H, W, 3] uint8 RGB.  pairs: [P, 2]; the reverse of a pair is computed with it, once.

    A pixel is valid where the flow there and back again returns to within ``max_inconsistency_px``.
    Raises what ``make_estimator`` raises.
    """
    estimator = make_estimator(settings, device)
    index = {(int(a), int(b)): k for k, (a, b) in enumerate(pairs)}
    shape = (len(pairs), *images.shape[1:3])
    flow, valid = np.zeros((*shape, 2), dtype=np.float32), np.zeros(shape, dtype=bool)
    undirected = sorted({(min(a, b), max(a, b)) for a, b in index if a != b})
    for a, b in progress(undirected, "optical flow"):
        forward, backward = estimator(images[a], images[b]), estimator(images[b], images[a])
        for pair, there, back in (((a, b), forward, backward), ((b, a), backward, forward)):
            if pair in index:
                flow[index[pair]] = there
                valid[index[pair]] = consistent(there, back, settings.max_inconsistency_px)
    return PairFlow(pairs, flow, valid)


def consistent(forward: Array, backward: Array, max_inconsistency_px: float) -> Array:
    """[H, W, 2] flows there and back -> [H, W] bool: the round trip ends near its start, inside the image."""
    height, width = forward.shape[:2]
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    x, y = columns + forward[..., 0], rows + forward[..., 1]
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    back = cv2.remap(backward, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(inside & (np.linalg.norm(forward + back, axis=-1) <= max_inconsistency_px))
