"""Motion beyond the camera's, read off optical flow and epipolar geometry."""

from __future__ import annotations

import numpy as np
import pytest

from easi3r.config import PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import FAMILIES, Family, make_world
from easi3r.dynamic_masks import add_flow, prove, refute
from easi3r.epipolar import MIN_POINTS, epipolar_residual, sampson_distance
from easi3r.metrics import jaccard
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import Array, DynamicMasks, PairFlow


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


def masks_and_labels() -> tuple[DynamicMasks, Array]:
    """One frame of 2 x 3 tokens of 4 pixels, everything called moving; three clusters."""
    score = np.full((1, 8, 12), 0.5, np.float32)
    return DynamicMasks(score, np.ones((1, 8, 12), bool), 0.3), np.array([[[0, 1, 2], [0, 1, 2]]])


def test_refuted_clusters_are_cleared_and_others_stay() -> None:
    masks, labels = masks_and_labels()
    residual = np.zeros((1, 8, 12), np.float32)
    residual[:, :, 4:8] = 2.0  # cluster 1 moves
    residual[:, :, 8:] = np.nan  # of cluster 2 nothing is known
    kept = refute(masks, labels, residual, 1.0)
    assert not kept.mask[..., :4].any() and kept.mask[..., 4:].all()
    np.testing.assert_array_equal(kept.score, masks.score * kept.mask)
    assert kept.threshold == masks.threshold


def test_a_cluster_is_judged_by_the_median_of_what_is_known() -> None:
    masks, labels = masks_and_labels()
    residual = np.full((1, 8, 12), 2.0, np.float32)
    residual[0, :, 0] = np.nan
    residual[0, :, 1] = 0.0  # a third of what is known of cluster 0
    assert refute(masks, labels, residual, 1.0).mask.all()
    residual[0, :, 2] = 0.0
    assert not refute(masks, labels, residual, 1.0).mask[..., :4].any()


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


def test_both_is_what_is_not_refuted_and_what_is_proven() -> None:
    masks, labels = masks_and_labels()
    masks.mask[..., 4:8] = False  # attention misses cluster 1
    residual = np.zeros((1, 8, 12), np.float32)
    residual[:, :, 4:8] = 2.0
    residual[:, :, 8:] = np.nan
    found = add_flow(masks, labels, residual, 1.0)
    assert not found.mask[..., :3].any() and found.mask[:, 2:6, 5:7].all() and found.mask[..., 8:].all()


def test_masks_by_flow_find_the_movers() -> None:
    from easi3r import Easi3R

    clip = render(make_world(5))
    model = Easi3R.from_pretrained("demo")
    found = {evidence: model.segment(clip.images, evidence=evidence) for evidence in ("both", "flow")}
    assert all(jaccard(motion.dynamic_mask, clip.dynamic_mask).mean() > 0.4 for motion in found.values())


def test_refuting_adds_nothing() -> None:
    masks, labels = masks_and_labels()
    none = DynamicMasks(masks.score, np.zeros_like(masks.mask), None)
    assert not refute(none, labels, np.full((1, 8, 12), 9.0, np.float32), 1.0).mask.any()


def test_default_masks_stay_empty_in_a_still_world_with_a_moving_camera() -> None:
    from easi3r import Easi3R

    clip = render(make_world(3, Family(num_movers=0, num_static=5)))
    model = Easi3R.from_pretrained("demo")
    assert model.segment(clip.images).dynamic_mask.mean() < 0.05
    assert model.segment(clip.images, evidence="attention").dynamic_mask.any()
