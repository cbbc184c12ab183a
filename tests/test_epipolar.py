"""Motion beyond the camera's, read off optical flow and epipolar geometry."""

from __future__ import annotations

import numpy as np
import pytest

from easi3r.config import PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import FAMILIES, Family, make_world
from easi3r.dynamic_masks import in_close_calls, motion_score, prove
from easi3r.epipolar import MIN_POINTS, epipolar_excess, epipolar_residual, sampson_distance
from easi3r.metrics import jaccard
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import Array, PairFlow


@pytest.fixture(scope="module")
def clip() -> Clip:
    return render(make_world(1, num_frames=5), 64, 48)


def exact_flow(clip: Clip) -> PairFlow:
    pairs = make_pairs(len(clip.images), PairSettings())
    flow, valid = zip(*(clip.flow(i, j) for i, j in pairs), strict=True)
    return PairFlow(pairs, np.stack(flow), np.stack(valid))


def test_what_the_camera_alone_does_lies_on_the_epipolar_lines(clip: Clip) -> None:
    flow, visible = clip.flow(0, 4)
    distance = sampson_distance(flow, visible)
    np.testing.assert_array_equal(np.isnan(distance), ~visible)
    assert np.median(distance[visible & ~clip.dynamic_mask[0]]) < 0.01
    assert np.median(distance[visible & clip.dynamic_mask[0]]) > 0.3


def test_the_distance_is_the_first_order_distance_to_the_curve_of_exact_matches(clip: Clip) -> None:
    """A match that is moved off its line by a small step, half in either image, is that step away."""
    flow, visible = clip.flow(0, 4, camera_only=True)
    off = flow.copy()
    off[20:24, 30:34, 1] += 0.3
    moved = sampson_distance(off, visible)[20:24, 30:34]
    assert np.nanmax(moved) <= 0.3 and np.nanmax(moved) > 0.02


def test_residuals_of_frames_are_medians_over_their_pairs(clip: Clip) -> None:
    flow = exact_flow(clip)
    residual = epipolar_residual(flow, 5, silent)
    assert residual.shape == (5, 48, 64) and residual.dtype == np.float32
    by_hand = [sampson_distance(flow.flow[k], flow.valid[k])[10, 50] for k in np.flatnonzero(flow.pairs[:, 0] == 2)]
    np.testing.assert_allclose(residual[2, 10, 50], np.nanmedian(by_hand))


def test_a_frozen_twin_and_a_still_camera_leave_nothing_to_see() -> None:
    for world, frozen in ((make_world(2, num_frames=4), True), (make_world(2, FAMILIES["tripod"], num_frames=4), True)):
        residual = epipolar_residual(exact_flow(render(world, 64, 48, frozen=frozen)), 4, silent)
        assert np.nanmedian(residual) < 0.01


def test_a_still_camera_sees_what_moves() -> None:
    clip = render(make_world(2, FAMILIES["tripod"], num_frames=4), 64, 48)
    residual = epipolar_residual(exact_flow(clip), 4, silent)
    assert np.nanmedian(residual[clip.dynamic_mask]) > 0.3 > 0.01 > np.nanmedian(residual[~clip.dynamic_mask])


@pytest.mark.parametrize("known", [0, MIN_POINTS - 1])
def test_too_few_matches_say_nothing(known: int) -> None:
    valid = np.zeros((12, 16), dtype=bool)
    valid.reshape(-1)[:known] = True
    assert np.isnan(sampson_distance(np.ones((12, 16, 2), np.float32), valid)).all()


def test_frames_without_pairs_are_unknown() -> None:
    flow = PairFlow(np.zeros((0, 2), int), np.zeros((0, 12, 16, 2), np.float32), np.zeros((0, 12, 16), bool))
    assert np.isnan(epipolar_residual(flow, 1, silent)).all()


def test_excess_counts_in_what_is_motion_in_each_pair(clip: Clip) -> None:
    """Exact flow has no noise, so the limit is the setting's; with noise it is that of the pair."""
    flow = exact_flow(clip)
    excess = epipolar_excess(flow, 5, 0.5, silent)
    known = ~np.isnan(excess)
    assert known.mean() > 0.9
    np.testing.assert_allclose(excess[known], epipolar_residual(flow, 5, silent)[known] / 0.5, rtol=1e-5)
    dice = np.random.default_rng(0)
    noisy = PairFlow(flow.pairs, flow.flow + dice.normal(0, 0.4, flow.flow.shape).astype(np.float32), flow.valid)
    by_hand = []
    for k in np.flatnonzero(flow.pairs[:, 0] == 2):
        distance = sampson_distance(noisy.flow[k], noisy.valid[k])
        by_hand.append(distance / max(0.1, 2 * 1.4826 * np.nanmedian(distance)))
    excess = epipolar_excess(noisy, 5, 0.1, silent)
    known = ~np.isnan(excess[2])
    np.testing.assert_allclose(excess[2][known], np.nanmedian(np.stack(by_hand)[:, known], axis=0), rtol=1e-5)
    still = ~clip.dynamic_mask & ~np.isnan(excess)
    assert (excess[still] > 1).mean() < 0.1 < (epipolar_residual(noisy, 5, silent)[still] > 0.1).mean()


def test_one_noisy_pair_does_not_make_its_frame_move() -> None:
    """In pixels its noise would count as motion wherever the only other pair is in doubt."""
    clip = render(make_world(2, FAMILIES["tripod"], num_frames=4), 64, 48)
    pairs = np.array([(1, 0), (1, 2)])
    flow, valid = (np.stack(part) for part in zip(*(clip.flow(*pair) for pair in pairs), strict=True))
    flow[0] += np.random.default_rng(0).normal(0, 3, flow[0].shape)
    noisy = PairFlow(pairs, flow, valid)
    still = ~clip.dynamic_mask[1]
    excess = epipolar_excess(noisy, 4, 0.15, silent)[1]
    assert (excess[still] > 1).mean() < 0.1 < 0.8 < (epipolar_residual(noisy, 4, silent)[1][still] > 0.15).mean()
    assert (excess[~still] > 1).mean() > 0.5


@pytest.mark.parametrize("valid_in", [0, 1, 2, 3, 6])
def test_a_pixel_that_few_of_six_pairs_know_is_unknown(clip: Clip, valid_in: int) -> None:
    flow, valid = (np.repeat(part[None], 6, axis=0) for part in clip.flow(0, 4))
    assert valid[:, 20, 30].all()
    valid[valid_in:, 20, 30] = False
    known = PairFlow(np.array([(0, 4)] * 6), flow, valid)
    assert np.isnan(epipolar_excess(known, 5, 0.5, silent)[0, 20, 30]) == (valid_in < 2)
    assert np.isnan(epipolar_residual(known, 5, silent)[0, 20, 30]) == (valid_in < 1)


def test_what_is_unknown_in_all_pairs_has_no_excess() -> None:
    pairs = make_pairs(2, PairSettings())
    flow = PairFlow(pairs, np.zeros((2, 12, 16, 2), np.float32), np.zeros((2, 12, 16), bool))
    assert np.isnan(epipolar_excess(flow, 2, 0.5, silent)).all()


def test_flow_proves_what_leaves_the_lines_and_no_speck() -> None:
    residual = np.zeros((1, 20, 30), np.float32)
    residual[0, 5:15, 10:20] = 3.0
    residual[0, 2, 2] = 9.0
    residual[0, :, 25:] = np.nan
    found = prove(residual, 1.0)
    assert found.mask[0, 7:13, 12:18].all() and found.mask.sum() <= 100
    assert not found.mask[0, :4].any() and not found.mask[0, :, 25:].any()
    np.testing.assert_array_equal(found.mask, found.score > 0.5)
    assert found.score.dtype == np.float32 and found.score.max() < 1


def textured(frames: int = 1) -> Array:
    """[n, 40, 60, 3] grey, with a bright square in rows 10 to 29 and columns 20 to 39."""
    images = np.full((frames, 40, 60, 3), 60, np.uint8)
    images[:, 10:30, 20:40] = 200
    return images


def test_flow_that_bleeds_is_drawn_back_to_the_edge() -> None:
    excess = np.zeros((1, 40, 60), np.float32)
    excess[0, 8:32, 18:42] = 1.5  # two pixels too far on all sides
    excess[0, 10:30, 20:40] = 6.0
    square = textured()[..., 0] > 100
    score = motion_score(excess, textured())
    assert jaccard(score > 0.5, square).mean() > 0.95 > jaccard(prove(excess, 1.0).mask, square).mean() + 0.2
    assert score.dtype == np.float32 and score.min() >= 0 and score.max() <= 1


def test_no_excess_and_unknown_excess_are_no_motion() -> None:
    for excess in (np.zeros((2, 40, 60), np.float32), np.full((2, 40, 60), np.nan, np.float32)):
        score = motion_score(excess, textured(2))
        assert not (score > 0.5).any()
        assert not (in_close_calls(score, np.ones_like(score)) > 0.5).any()


def test_attention_decides_close_calls_alone() -> None:
    attention = np.zeros((1, 40, 60), np.float32)
    attention[..., 30:] = 1.0
    for excess, left, right in ((0.7, False, False), (0.95, False, True), (1.05, False, True), (1.4, True, True)):
        score = motion_score(np.full((1, 40, 60), excess, np.float32), textured())
        found = in_close_calls(score, attention) > 0.5
        assert (found[..., :30] == left).all() and (found[..., 30:] == right).all(), excess


def test_two_frames_have_masks_and_one_has_none() -> None:
    from easi3r import Easi3R

    clip = render(make_world(5))
    model = Easi3R.from_pretrained("demo")
    assert jaccard(model.segment(clip.images[:2]).dynamic_mask, clip.dynamic_mask[:2]).mean() > 0.3
    assert not model.segment(clip.images[:1]).dynamic_mask.any()
    assert not model.segment(clip.images[[0, 0]]).dynamic_mask.any()


def test_masks_by_flow_find_the_movers() -> None:
    from easi3r import Easi3R

    clip = render(make_world(5))
    model = Easi3R.from_pretrained("demo")
    found = {evidence: model.segment(clip.images, evidence=evidence) for evidence in ("both", "flow")}
    assert all(jaccard(motion.dynamic_mask, clip.dynamic_mask).mean() > 0.4 for motion in found.values())


def test_default_masks_stay_empty_in_a_still_world_with_a_moving_camera() -> None:
    from easi3r import Easi3R

    clip = render(make_world(3, Family(num_movers=0, num_static=5)))
    model = Easi3R.from_pretrained("demo")
    assert model.segment(clip.images).dynamic_mask.mean() < 0.05
    assert model.segment(clip.images, evidence="attention").dynamic_mask.any()
