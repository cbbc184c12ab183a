"""The alignment on synthetic truth (worlds.md): easy noise, starts, a few frames, useless predictions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from alignment_runs import SEEDS, aligned, ate, pairs_of, path_errors, static_absrel, world

from easi3r.alignment import align
from easi3r.alignment.initialise import centred_pixels, initialise, weiszfeld_focal
from easi3r.alignment.observations import observe
from easi3r.config import AlignmentSettings, FlowSettings
from easi3r.demo.rendering import Clip
from easi3r.flow import estimate_flow
from easi3r.geometry import invert_rigid, unproject
from easi3r.metrics import relative_pose_errors
from easi3r.progress import silent
from easi3r.structures import AlignedCameras, PairPredictions
from evaluation.pair_predictions import synthetic_predictions

QUICK = AlignmentSettings(method="published", iterations=30)


def test_easy_noise_leaves_under_15_hundredths_of_a_percent_of_the_path_and_8_per_mille_of_the_depth() -> None:
    depth_errors = [static_absrel(aligned(s, hard=False), world(s)) for s in SEEDS]
    assert np.median(path_errors(hard=False)) < 0.0015
    assert np.median(depth_errors) < 0.008


def test_rotations_and_focal_are_right_under_easy_noise() -> None:
    for seed in SEEDS:
        answer, truth = aligned(seed, hard=False), world(seed)
        assert relative_pose_errors(answer.camera_to_world, truth.camera_to_world).rotation_deg < 0.05
        np.testing.assert_allclose(answer.intrinsics, truth.intrinsics, rtol=2e-3, atol=1e-4)


def test_the_answer_does_not_depend_on_the_unit_of_the_predictions() -> None:
    clip = world(0)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=True, seed=0)
    scaled = replace(
        predictions, points_first=100 * predictions.points_first, points_second=100 * predictions.points_second
    )
    one, other = (quick(p, clip) for p in (predictions, scaled))
    np.testing.assert_allclose(one.camera_to_world, other.camera_to_world, atol=1e-2)
    np.testing.assert_allclose(one.depth, other.depth, rtol=5e-2)
    assert np.median(np.abs(one.depth / other.depth - 1)) < 2e-3


def test_perfect_predictions_start_at_the_truth() -> None:
    clip = world(1)
    start = initialise(
        observe(synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0, noise=0.0), 12), shared_focal=True
    )
    assert ate(start.camera_to_world.numpy(), clip.camera_to_world) < 1e-3
    assert float(start.focal_px[0]) == pytest.approx(clip.intrinsics[0, 0, 0], rel=1e-3)
    assert float(start.depth.median()) == pytest.approx(1.0, rel=1e-5)


def test_align_none_is_the_spanning_tree_start_as_it_is() -> None:
    clip = world(1)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0)
    answer = quick(predictions, clip, AlignmentSettings(method="none"))
    start = initialise(observe(predictions, 12), shared_focal=True)
    relative = invert_rigid(start.camera_to_world.numpy()[:1]) @ start.camera_to_world.numpy()
    np.testing.assert_allclose(answer.camera_to_world, relative, atol=1e-5)
    np.testing.assert_allclose(answer.depth.reshape(12, -1), start.depth.numpy(), rtol=1e-5)


def test_a_focal_length_per_frame_is_found_where_it_is_not_shared() -> None:
    clip = world(2)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0)
    answer = quick(predictions, clip, replace(QUICK, focal="per-frame"))
    assert len(np.unique(answer.intrinsics[:, 0, 0])) == 12
    np.testing.assert_allclose(answer.intrinsics[:, 0, 0], clip.intrinsics[:, 0, 0], rtol=0.02)


def test_frame_0_is_the_origin_exactly_and_poses_are_rigid() -> None:
    poses = aligned(0, hard=False).camera_to_world
    assert np.array_equal(poses[0], np.eye(4))
    np.testing.assert_allclose(
        poses[:, :3, :3] @ poses[:, :3, :3].swapaxes(1, 2), np.eye(3)[None].repeat(12, 0), atol=1e-5
    )


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_a_few_frames_are_enough(num_frames: int) -> None:
    clip = world(0, num_frames)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0)
    flow = estimate_flow(clip.images, predictions.pairs, FlowSettings(), silent)
    answer = align(predictions, num_frames, QUICK, silent, dynamic_mask=clip.dynamic_mask, flow=flow)
    assert answer.camera_to_world.shape == (num_frames, 4, 4)
    assert static_absrel(answer, clip) < 0.02
    assert answer.intrinsics[0, 0, 0] == pytest.approx(clip.intrinsics[0, 0, 0], rel=0.02)


def test_it_works_where_gradients_are_switched_off() -> None:
    clip = world(0, 2)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0)
    with torch.no_grad():
        without = quick(predictions, clip)
    np.testing.assert_array_equal(without.depth, quick(predictions, clip).depth)


def test_confidence_is_the_highest_that_any_pair_gives() -> None:
    answer = aligned(0, hard=False)
    np.testing.assert_allclose(answer.confidence, 8.0)


def test_predictions_that_are_useless_give_an_answer_that_is_finite() -> None:
    clip = world(0, 3)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0)
    predictions.points_first[:] = np.nan
    predictions.points_second[:] = -1.0
    answer = quick(predictions, clip)
    assert all(np.isfinite(value).all() for value in vars(answer).values())
    assert (answer.depth > 0).all()


def test_weiszfeld_finds_the_focal_length_in_spite_of_outliers() -> None:
    clip = world(3)
    points = unproject(clip.depth[0].astype(np.float64), clip.intrinsics[0].astype(np.float64))
    rng = np.random.default_rng(0)
    points[rng.random(points.shape[:2]) < 0.2] *= [1.5, 0.7, 1.0]
    flat = torch.from_numpy(points).reshape(-1, 3).T
    focal = weiszfeld_focal(flat, torch.ones(flat.shape[1]), centred_pixels(clip.depth[0].shape))
    assert float(focal) == pytest.approx(clip.intrinsics[0, 0, 0], rel=0.01)


def quick(predictions: PairPredictions, clip: Clip, settings: AlignmentSettings = QUICK) -> AlignedCameras:
    return align(predictions, len(clip.images), settings, silent, dynamic_mask=clip.dynamic_mask)
