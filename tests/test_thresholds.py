"""Thresholds by name: one for the clip or one per frame, against slow twins that try every choice."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from small_inputs import QUICK, moving_square, random_model

from easi3r import Motion, Settings
from easi3r.dynamic_masks import make_masks
from easi3r.errors import ConfigError
from easi3r.report.origin import piece_words
from easi3r.structures import DynamicMasks
from easi3r.thresholds import ThresholdRule, best_multi_otsu, multi_otsu

METHODS = ("multi-otsu", "otsu", "percentile", 0.5)


def two_groups(rng, low=0.2, high=0.8, shape=(20, 30), share=0.1):
    """Scores about ``low``, a block of them about ``high``; and that block."""
    moving = np.zeros(shape, bool)
    moving[: round(shape[0] * share * 2), : shape[1] // 2] = True
    return (rng.normal(np.where(moving, high, low), 0.02)).astype(np.float32), moving


def exhaustive_otsu(counts: np.ndarray, centres: np.ndarray, classes: int) -> float:
    """The largest between-class variance over all choices of thresholds."""
    probability = counts / counts.sum()
    best = -np.inf
    for cuts in combinations(range(1, len(counts)), classes - 1):
        best = max(best, between_class_variance(probability, centres, cuts))
    return best


def between_class_variance(probability: np.ndarray, centres: np.ndarray, cuts: tuple[int, ...]) -> float:
    edges = [0, *cuts, len(probability)]
    total = 0.0
    mean = (probability * centres).sum()
    for a, b in pairwise(edges):
        weight = probability[a:b].sum()
        if weight > 0:
            total += weight * ((probability[a:b] * centres[a:b]).sum() / weight - mean) ** 2
    return total


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_multi_otsu_reaches_the_best_of_all_choices(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 20, 18) * (rng.random(18) < 0.8)
    centres = np.linspace(0.1, 0.9, 18)
    thresholds = multi_otsu(counts, centres, classes)
    cuts = tuple(int(np.searchsorted(centres, t)) + 1 for t in thresholds)
    found = between_class_variance(counts / counts.sum(), centres, cuts)
    assert found == pytest.approx(exhaustive_otsu(counts, centres, classes), rel=1e-9)
    assert len(thresholds) == classes - 1
    assert (np.diff(thresholds) > 0).all()


def test_the_threshold_separates_two_clear_groups() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.02, 900), rng.normal(0.8, 0.02, 100)])
    threshold = best_multi_otsu(values)
    assert threshold is not None
    assert (values[:900] < threshold).mean() > 0.99
    assert (values[900:] > threshold).mean() > 0.5


def test_values_that_are_all_the_same_have_no_threshold() -> None:
    assert best_multi_otsu(np.full((2, 8, 8), 0.3)) is None


def test_two_values_have_a_threshold_between_them() -> None:
    values = np.array([0.0] * 10 + [1.0] * 3)
    threshold = best_multi_otsu(values)
    assert threshold is not None
    assert ((values > threshold) == (values == 1)).all()


# --- the rules


@pytest.mark.parametrize("seed", range(3))
def test_otsu_is_the_best_cut_of_all_in_two(seed):
    values = np.random.default_rng(seed).beta(0.6, 1.5, 3000)
    counts, edges = np.histogram(values, bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    variances = [between_class_variance(counts / counts.sum(), centres, (cut,)) for cut in range(1, 256)]
    assert ThresholdRule("otsu").find(values) == centres[int(np.argmax(variances))]


def test_otsu_and_multi_otsu_differ_where_there_are_three_groups():
    rng = np.random.default_rng(0)
    groups = ((0.05, 900), (0.5, 900), (0.95, 50))  # static, uncertain, moving
    values = np.concatenate([rng.normal(mean, 0.01, count) for mean, count in groups])
    otsu, multi = (ThresholdRule(method).find(values) for method in ("otsu", "multi-otsu"))
    assert 0.05 < otsu < 0.5 < multi < 0.95 and multi == best_multi_otsu(values)


@pytest.mark.parametrize("percentile", [1, 50, 90, 99.5])
def test_a_percentile_leaves_so_many_pixels_static(percentile):
    score = np.random.default_rng(0).permutation(12000).reshape(3, 50, 80) / 12000
    mask, threshold = ThresholdRule("percentile", percentile=percentile).apply(score)
    assert mask.mean() == pytest.approx(1 - percentile / 100, abs=1e-3)
    np.testing.assert_array_equal(mask, score > threshold)


def test_a_value_is_the_threshold_itself():
    score = np.array([[[0.0, 0.25, 0.3, 1.0]]], np.float32)
    mask, threshold = ThresholdRule(0.25).apply(score)
    assert threshold == 0.25
    np.testing.assert_array_equal(mask, [[[False, False, True, True]]])


@pytest.mark.parametrize("method", METHODS)
def test_per_frame_is_each_frame_as_a_clip_of_its_own(method):
    rng = np.random.default_rng(0)
    score = np.stack([two_groups(rng, low, high)[0] for low, high in ((0.1, 0.3), (0.5, 0.9), (0.3, 0.35))])
    mask, thresholds = ThresholdRule(method, per="frame").apply(score)
    assert isinstance(thresholds, tuple) and len(thresholds) == 3
    for i in range(3):
        alone, threshold = ThresholdRule(method).apply(score[i : i + 1])
        assert thresholds[i] == threshold
        np.testing.assert_array_equal(mask[i], alone[0])


def test_per_frame_finds_what_one_threshold_for_the_clip_misses():
    rng = np.random.default_rng(0)
    frames = [two_groups(rng, low, high) for low, high in ((0.05, 0.3), (0.6, 0.95))]
    score, moving = (np.stack(parts) for parts in zip(*frames, strict=True))
    assert (ThresholdRule("otsu", per="frame").apply(score)[0] == moving).mean() > 0.99
    assert (ThresholdRule("otsu").apply(score)[0] == moving).mean() < 0.8


@pytest.mark.parametrize("per", ["clip", "frame"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 1, 1), (3, 4, 4)])
def test_scores_without_variation_move_nowhere(method, per, shape):
    mask, threshold = ThresholdRule(method, per=per).apply(np.full(shape, 0.3, np.float32))
    assert mask.shape == shape and mask.dtype == bool and not mask.any()
    expected = None if isinstance(method, str) else method
    assert threshold == (expected if per == "clip" else (expected,) * shape[0])


def test_a_part_of_a_clip_keeps_its_own_thresholds():
    score = np.random.default_rng(0).random((4, 8, 8)).astype(np.float32)
    mask, thresholds = ThresholdRule("otsu", per="frame").apply(score)
    assert DynamicMasks(score, mask, thresholds).part(range(1, 3)).threshold == thresholds[1:3]
    assert DynamicMasks(score, mask, 0.5).part(range(1, 3)).threshold == 0.5


# --- settings


def test_masks_are_made_by_the_published_rule_unless_another_is_chosen():
    rng = np.random.default_rng(0)
    dynamic, labels = rng.random((3, 4, 5)).astype(np.float32), np.arange(60).reshape(3, 4, 5)
    masks = make_masks(dynamic, labels, 8)
    assert masks.threshold == best_multi_otsu(masks.score)
    np.testing.assert_array_equal(masks.mask, masks.score > masks.threshold)


@pytest.mark.parametrize("threshold", ["otsu", "percentile", 0.6])
def test_the_setting_reaches_the_masks_that_rest_on_attention(threshold):
    clip = moving_square()
    settings = {"threshold": threshold, "evidence": "attention", "motion.percentile": 80.0, **QUICK}
    motion = random_model().segment(clip, **settings)
    rule = ThresholdRule(threshold, percentile=80.0)
    np.testing.assert_array_equal(motion.dynamic_mask, rule.apply(motion.dynamic_score)[0])
    assert motion.meta["pieces"][0]["threshold"] == rule.find(motion.dynamic_score)


def test_thresholds_per_frame_are_saved_and_told(tmp_path):
    motion = random_model().segment(moving_square(), evidence="attention", **{"motion.threshold_per": "frame"}, **QUICK)
    found = motion.meta["pieces"][0]["threshold"]
    assert found == [best_multi_otsu(frame) for frame in motion.dynamic_score]
    motion.save(tmp_path / "out")
    assert Motion.load(tmp_path / "out").meta["pieces"][0]["threshold"] == found
    assert "one per frame" in (tmp_path / "out" / "report.html").read_text("utf-8")
    assert piece_words({"frames": [0, 2], "threshold": [None, None]}).endswith("no threshold was needed")
    assert "from 0.25 to 0.5 " in piece_words({"frames": [0, 3], "threshold": [0.5, None, 0.25]})


@pytest.mark.parametrize("evidence", ["flow", "both"])
def test_with_flow_the_threshold_is_its_limit_unless_another_is_named(evidence):
    model, clip = random_model(), moving_square()
    usual, said, high = (
        model.segment(clip, evidence=evidence, threshold=value, **QUICK) for value in ("auto", 0.5, 0.9)
    )
    assert usual.meta["pieces"][0]["threshold"] == 0.5
    np.testing.assert_array_equal(usual.dynamic_mask, said.dynamic_mask)
    np.testing.assert_array_equal(high.dynamic_mask, high.dynamic_score > 0.9)


def test_a_lower_threshold_never_moves_less_with_both_kinds_of_evidence():
    model, clip = random_model(), moving_square()
    masks = [model.segment(clip, passes=1, threshold=value, **QUICK).dynamic_mask for value in (0.1, 0.5, 0.9)]
    assert all((less <= more).all() for more, less in pairwise(masks))
    assert masks[0].sum() > masks[2].sum()


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("threshold", 1, "motion.threshold is 1.0, but it must be below 1"),
        ("threshold", 0, "motion.threshold is 0.0, but it must be greater than 0"),
        ("threshold", "otzu", "'auto', 'multi-otsu', 'otsu', 'percentile' or a number"),
        ("motion.percentile", 100, "motion.percentile is 100.0, but it must be below 100"),
        ("motion.threshold_per", "pixel", "'clip' or 'frame'"),
        ("min_area", 64, "motion.min_area is 64.0, but it must be below 1: it is a share of the image"),
        ("fill_holes", 1, "motion.fill_holes is 1.0, but it must be below 1"),
        ("smoothing", 4, "motion.smoothing is 4, but it must be an odd number"),
        ("clusters", 0, "motion.clusters is 0"),
        ("mask_polarity", "inverted", "'moving' or 'static'"),
    ],
)
def test_impossible_values_are_refused_in_one_sentence(name, value, words, fails_with):
    with fails_with(ConfigError, words):
        Settings().with_options({name: value})
