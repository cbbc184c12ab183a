"""Cleaning of masks, against twins that visit every pixel."""

from __future__ import annotations

import numpy as np
import pytest
from small_inputs import QUICK, moving_square, random_model

from easi3r.mask_cleaning import clean_masks, drop_regions, fill_regions, median_over_time
from easi3r.structures import DynamicMasks
from easi3r.thresholds import ThresholdRule

NEAR = ((0, 1), (1, 0), (0, -1), (-1, 0))
DIAGONAL = ((1, 1), (1, -1), (-1, 1), (-1, -1))


def random_masks(seed=0, shape=(5, 17, 23), threshold=0.5, smooth=True):
    """A score of blobs and specks, and where it exceeds the threshold."""
    rng = np.random.default_rng(seed)
    score = rng.random(shape).astype(np.float32)
    if smooth:
        score = (score + np.roll(score, 1, 1) + np.roll(score, 1, 2)) / 3
    return DynamicMasks(score, score > threshold, threshold)


def regions(mask, steps):
    """Lists of pixels (y, x), by walking from neighbour to neighbour."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        queue = [left.pop()]
        for y, x in queue:
            for dy, dx in steps:
                if (y + dy, x + dx) in left:
                    left.remove((y + dy, x + dx))
                    queue.append((y + dy, x + dx))
        found.append(queue)
    return found


def slow_fill(mask, largest):
    height, width = mask.shape
    filled = mask.copy()
    for hole in regions(~mask, NEAR):
        inner = all(0 < y < height - 1 and 0 < x < width - 1 for y, x in hole)
        if inner and len(hole) <= largest:
            for pixel in hole:
                filled[pixel] = True
    return filled


def slow_drop(mask, smallest):
    kept = mask.copy()
    for region in regions(mask, NEAR + DIAGONAL):
        if len(region) < smallest:
            for pixel in region:
                kept[pixel] = False
    return kept


def slow_majority(mask, window):
    n, half = len(mask), window // 2
    votes = [[mask[min(max(i + k, 0), n - 1)] for k in range(-half, half + 1)] for i in range(n)]
    return np.array([np.sum(frames, axis=0) * 2 > window for frames in votes])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [0, 1, 3, 8, 40])
def test_holes_and_regions_are_those_that_a_walk_finds(seed, size):
    masks = random_masks(seed, threshold=0.4 if seed % 2 else 0.55)
    for score, mask in zip(masks.score, masks.mask, strict=True):
        np.testing.assert_array_equal(fill_regions(score, mask, size)[1], slow_fill(mask, size))
        np.testing.assert_array_equal(drop_regions(score, mask, size)[1], slow_drop(mask, size))


@pytest.mark.parametrize("window", [1, 3, 5, 9])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_smoothing_is_the_majority_over_time(n, window):
    masks = random_masks(1, (n, 9, 11))
    np.testing.assert_array_equal(median_over_time(masks.mask, window), slow_majority(masks.mask, window), strict=True)
    middle = median_over_time(masks.score, window)
    assert middle.dtype == np.float32
    np.testing.assert_array_equal(middle > masks.threshold, slow_majority(masks.mask, window))


@pytest.mark.parametrize("per", ["clip", "frame"])
@pytest.mark.parametrize("seed", range(3))
def test_the_mask_stays_its_score_above_the_threshold(seed, per):
    score = random_masks(seed).score
    mask, threshold = ThresholdRule("otsu", per=per).apply(score)
    smoothing = 3 if per == "clip" else 0  # thresholds that differ are not those of a neighbour's score
    cleaned = clean_masks(DynamicMasks(score, mask, threshold), smoothing=smoothing, min_area=0.02, fill_holes=0.02)
    limits = np.array(threshold).reshape(-1, 1, 1)
    np.testing.assert_array_equal(cleaned.mask, cleaned.score > limits)
    assert (cleaned.mask != mask).any() and cleaned.threshold == threshold
    assert cleaned.score.dtype == np.float32 and cleaned.score.min() >= 0 and cleaned.score.max() <= 1


def test_no_small_region_and_no_small_hole_is_left():
    masks = random_masks(3, (4, 40, 50))
    cleaned = clean_masks(masks, min_area=0.01, fill_holes=0.005)
    for mask in cleaned.mask:
        assert min(len(region) for region in regions(mask, NEAR + DIAGONAL)) >= 20
        assert slow_fill(mask, 10).sum() == mask.sum()


def test_a_ring_is_filled_before_it_is_measured():
    mask = np.zeros((1, 10, 10), bool)
    mask[0, 2:7, 2:7] = True
    mask[0, 3:6, 3:6] = False  # 16 pixels around 9
    masks = DynamicMasks(mask * np.float32(0.8), mask, 0.5)
    cleaned = clean_masks(masks, min_area=0.2, fill_holes=0.09)
    assert cleaned.mask.sum() == 25 and (cleaned.score[cleaned.mask] == np.float32(0.8)).all()
    assert not clean_masks(masks, min_area=0.2, fill_holes=0.08).mask.any()
    np.testing.assert_array_equal(masks.mask, mask)  # what is handed in stays


def test_what_reaches_the_border_is_no_hole():
    mask = np.ones((1, 6, 6), bool)
    mask[0, 0, 2] = mask[0, 3, 5] = mask[0, 2, 2] = False
    cleaned = clean_masks(DynamicMasks(mask.astype(np.float32), mask, 0.5), fill_holes=0.5).mask
    assert (~cleaned).sum() == 2 and cleaned[0, 2, 2]


def test_a_flash_of_one_frame_goes_and_a_gap_of_one_frame_is_closed():
    mask = np.zeros((5, 2, 2), bool)
    mask[2, 0, 0] = True
    mask[[0, 1, 3, 4], 1, 1] = True
    cleaned = clean_masks(DynamicMasks(mask.astype(np.float32), mask, 0.5), smoothing=3).mask
    assert not cleaned[:, 0, 0].any() and cleaned[:, 1, 1].all()


@pytest.mark.parametrize("smoothing", [0, 1])
def test_everything_is_off_by_default(smoothing):
    masks = random_masks()
    cleaned = clean_masks(masks, smoothing=smoothing)
    assert cleaned.score is masks.score and cleaned.mask is masks.mask


@pytest.mark.parametrize("value", [False, True])
def test_masks_without_an_edge_stay(value):
    mask = np.full((3, 8, 8), value)
    cleaned = clean_masks(DynamicMasks(mask.astype(np.float32), mask, None), smoothing=3, min_area=0.5, fill_holes=0.5)
    np.testing.assert_array_equal(cleaned.mask, mask)
    np.testing.assert_array_equal(cleaned.score, mask.astype(np.float32))


def test_found_masks_are_cleaned_and_given_ones_are_not():
    model, clip = random_model(), moving_square()
    cleaning = {"smoothing": 3, "min_area": 0.2, "fill_holes": 0.2}
    found = model.segment(clip, evidence="attention", passes=1, **QUICK)
    cleaned = model.segment(clip, evidence="attention", passes=1, **cleaning, **QUICK)
    masks = DynamicMasks(found.dynamic_score, found.dynamic_mask, found.meta["pieces"][0]["threshold"])
    expected = clean_masks(masks, **cleaning)
    np.testing.assert_array_equal(cleaned.dynamic_mask, expected.mask)
    np.testing.assert_array_equal(cleaned.dynamic_score, expected.score)
    assert (cleaned.dynamic_mask != found.dynamic_mask).any()
    given = np.random.default_rng(0).random(found.dynamic_mask.shape) < 0.3
    np.testing.assert_array_equal(model.segment(clip, masks=given, **cleaning, **QUICK).dynamic_mask, given)
