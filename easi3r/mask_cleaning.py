"""What becomes of masks that were found: smoothing over time, holes filled, small regions dropped, in this order.

The score follows its mask: where a mask is its score above one threshold, it still is afterwards.  The median over time
of a score exceeds a threshold where the majority of the frames does; in a hole that is filled the score rises to the
median of the moving pixels around it, in a region that is dropped it becomes 0.
"""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np

from easi3r.structures import Array, DynamicMasks


def clean_masks(
    masks: DynamicMasks, *, smoothing: int = 0, min_area: float = 0.0, fill_holes: float = 0.0
) -> DynamicMasks:
    """Masks as they are cleaned by all three; 0 leaves a step out.

    smoothing: frames of the window about each frame, odd; the frames beyond the ends are those at the ends.
    min_area: the smallest region that is kept, and fill_holes: the largest hole that is filled, as shares of the image.
        Moving pixels that touch at a corner belong to one region; what reaches the image's border is no hole.
    """
    score, mask = masks.score, masks.mask
    if smoothing > 1:
        score, mask = median_over_time(score, smoothing), median_over_time(mask, smoothing)
    if min_area or fill_holes:
        largest, smallest = (round(share * mask[0].size, 6) for share in (fill_holes, min_area))
        cleaned = [drop_regions(*fill_regions(*frame, largest), smallest) for frame in zip(score, mask, strict=True)]
        score, mask = (np.stack(frames) for frames in zip(*cleaned, strict=True))
    return replace(masks, score=score, mask=mask)


def median_over_time(frames: Array, window: int) -> Array:
    """[n, H, W] -> the same kind, each pixel the median of ``window`` frames (odd) about its own: bools' majority."""
    half, last = window // 2, len(frames) - 1
    smooth = np.empty_like(frames)
    for i in range(len(frames)):
        around = frames[np.clip(np.arange(i - half, i + half + 1), 0, last)]
        smooth[i] = np.partition(around, half, axis=0)[half]
    return smooth


def fill_regions(score: Array, mask: Array, largest: float) -> tuple[Array, Array]:
    """Fill the holes of at most ``largest`` pixels in score and mask, each [H, W]; the score rises to its rim's."""
    filled_score, filled = score.copy(), mask.copy()
    height, width = mask.shape
    labels, boxes = _regions(~mask, connectivity=4)
    for label, (x, y, w, h, area) in enumerate(boxes):
        if label and area <= largest and x > 0 and y > 0 and x + w < width and y + h < height:
            box = slice(y - 1, y + h + 1), slice(x - 1, x + w + 1)
            hole = labels[box] == label
            rim = cv2.dilate(hole.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool) & mask[box]
            filled_score[box][hole] = np.maximum(score[box][hole], np.median(score[box][rim]))
            filled[box] |= hole
    return filled_score, filled


def drop_regions(score: Array, mask: Array, smallest: float) -> tuple[Array, Array]:
    """Clear the regions of less than ``smallest`` pixels in score and mask, each [H, W]."""
    labels, boxes = _regions(mask, connectivity=8)
    too_small = boxes[:, 4] < smallest
    too_small[0] = False
    dropped = too_small[labels]
    return np.where(dropped, np.zeros_like(score), score), mask & ~dropped


def _regions(mask: Array, connectivity: int) -> tuple[Array, Array]:
    """Connected regions of [H, W] bool: each pixel's label, 0 = none, and (x, y, width, height, area) per label."""
    _, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=connectivity)
    return np.asarray(labels), np.asarray(boxes)
