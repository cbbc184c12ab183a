"""The fast alignment on synthetic truth (worlds.md): how near it comes, and what is known beforehand."""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from alignment_runs import aligned, ate, dis_flow, pairs_of, static_absrel, world

from easi3r.alignment import align
from easi3r.config import AlignmentSettings, FlowSettings, KnownSettings
from easi3r.demo.rendering import render
from easi3r.demo.worlds import FAMILIES, Family, make_world
from easi3r.errors import InputError
from easi3r.flow import estimate_flow
from easi3r.metrics import relative_pose_errors, umeyama
from easi3r.progress import silent
from easi3r.structures import AlignedCameras, Known, PairFlow, PairPredictions
from evaluation.pair_predictions import synthetic_predictions

WORLDS = range(10)
EVERY_FIFTH = np.arange(12) % 5 == 0


@cache
def predictions_of(seed: int, *, hard: bool = True, noise: float = 1.0) -> PairPredictions:
    return synthetic_predictions(world(seed), pairs_of(world(seed)), hard=hard, seed=seed, noise=noise)


def solved(
    seed: int,
    known: Known = Known(),  # noqa: B008
    uses: dict[str, Any] | None = None,
    flow: PairFlow | None = None,
    predictions: PairPredictions | None = None,
    **settings: Any,
) -> AlignedCameras:
    clip = world(seed)
    return align(
        predictions_of(seed) if predictions is None else predictions,
        len(clip.images),
        AlignmentSettings(**settings),
        silent,
        dynamic_mask=clip.dynamic_mask,
        flow=flow,
        known=known,
        uses=KnownSettings(**(uses or {})),
    )


def rotation_error(answer: AlignedCameras, seed: int) -> float:
    return relative_pose_errors(answer.camera_to_world, world(seed).camera_to_world).rotation_deg


# --- against the truth ---------------------------------------------------------------------------------------------


def test_under_easy_noise_the_path_is_at_least_as_near_as_the_published_optimisers() -> None:
    answers = [aligned(s, hard=False) for s in WORLDS]
    assert np.median([ate(a.camera_to_world, world(s).camera_to_world) for s, a in enumerate(answers)]) < 0.00026
    assert np.median([rotation_error(a, s) for s, a in enumerate(answers)]) < 0.025
    assert np.median([static_absrel(a, world(s)) for s, a in enumerate(answers)]) < 0.0055


def test_under_hard_noise_flow_from_the_images_brings_it_within_one_percent() -> None:
    answers = [aligned(s, hard=True, flow=True) for s in WORLDS]
    assert np.median([ate(a.camera_to_world, world(s).camera_to_world) for s, a in enumerate(answers)]) < 0.01
    assert np.median([rotation_error(a, s) for s, a in enumerate(answers)]) < 0.2
    assert np.median([static_absrel(a, world(s)) for s, a in enumerate(answers)]) < 0.01


def test_a_few_movers_without_a_mask_do_little_harm() -> None:
    for seed in range(3):
        answer = aligned(seed, hard=True, flow=True, masked=False)
        assert ate(answer.camera_to_world, world(seed).camera_to_world) < 0.01


@pytest.mark.parametrize("flow", [False, True])
def test_pointmaps_without_noise_give_the_truth(flow: bool) -> None:
    for seed in range(2):
        answer = solved(seed, predictions=predictions_of(seed, noise=0.0), flow=dis_flow(seed) if flow else None)
        assert ate(answer.camera_to_world, world(seed).camera_to_world) < 1e-4
        assert static_absrel(answer, world(seed)) < 1e-3
        np.testing.assert_allclose(answer.intrinsics, world(seed).intrinsics, rtol=1e-4, atol=1e-3)


def test_sixty_percent_of_each_frame_may_move() -> None:
    clip = render(make_world(3, Family(num_movers=9, num_static=0, size=(0.22, 0.34)), num_frames=12))
    moving = clip.dynamic_mask
    assert moving.mean() > 0.6
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=True, seed=3)
    flow = estimate_flow(clip.images, pairs_of(clip), FlowSettings(), silent)
    answer = align(predictions, 12, AlignmentSettings(), silent, dynamic_mask=moving, flow=flow)
    unmasked = align(predictions, 12, AlignmentSettings(), silent, dynamic_mask=np.zeros_like(moving), flow=flow)
    assert ate(answer.camera_to_world, clip.camera_to_world) < 0.01
    assert ate(unmasked.camera_to_world, clip.camera_to_world) > 5 * ate(answer.camera_to_world, clip.camera_to_world)


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_a_few_frames_are_enough(num_frames: int) -> None:
    clip = world(0, num_frames)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0)
    flow = estimate_flow(clip.images, predictions.pairs, FlowSettings(), silent)
    answer = align(predictions, num_frames, AlignmentSettings(), silent, dynamic_mask=clip.dynamic_mask, flow=flow)
    assert answer.camera_to_world.shape == (num_frames, 4, 4)
    assert static_absrel(answer, clip) < 0.02
    assert answer.intrinsics[0, 0, 0] == pytest.approx(clip.intrinsics[0, 0, 0], rel=0.02)


@pytest.mark.parametrize("everything_moves", [False, True])
def test_all_or_nothing_may_move(everything_moves: bool) -> None:
    mask = np.full_like(world(1).dynamic_mask, everything_moves)
    answer = align(predictions_of(1), 12, AlignmentSettings(), silent, dynamic_mask=mask, flow=dis_flow(1))
    assert all(np.isfinite(value).all() for value in vars(answer).values())
    assert ate(answer.camera_to_world, world(1).camera_to_world) < 0.15


def test_predictions_that_are_useless_give_an_answer_that_is_finite() -> None:
    clip = world(0, 3)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=False, seed=0)
    predictions.points_first[:] = np.nan
    predictions.points_second[:] = -1.0
    flow = estimate_flow(clip.images, predictions.pairs, FlowSettings(), silent)
    for given in (None, flow):
        answer = align(predictions, 3, AlignmentSettings(), silent, dynamic_mask=clip.dynamic_mask, flow=given)
        assert all(np.isfinite(value).all() for value in vars(answer).values())
        assert (answer.depth > 0).all()


def test_the_answer_does_not_depend_on_the_unit_of_the_predictions() -> None:
    one = solved(0, flow=dis_flow(0))
    p = predictions_of(0)
    scaled = replace(p, points_first=100 * p.points_first, points_second=100 * p.points_second)
    other = solved(0, predictions=scaled, flow=dis_flow(0))
    ratio = np.median(other.depth / one.depth)
    np.testing.assert_allclose(other.depth / ratio, one.depth, rtol=2e-3)
    np.testing.assert_allclose(other.camera_to_world[:, :3, 3] / ratio, one.camera_to_world[:, :3, 3], atol=1e-3)


def test_frame_0_is_the_origin_exactly_and_poses_are_rigid() -> None:
    poses = aligned(0, hard=True, flow=True).camera_to_world
    assert np.array_equal(poses[0], np.eye(4))
    np.testing.assert_allclose(
        poses[:, :3, :3] @ poses[:, :3, :3].swapaxes(1, 2), np.eye(3)[None].repeat(12, 0), atol=1e-5
    )


# --- what is known -------------------------------------------------------------------------------------------------


def test_a_known_lens_stays_as_it_is_and_never_hurts() -> None:
    for seed in range(3):
        k = world(seed).intrinsics
        with_k, without = solved(seed, Known(intrinsics=k), flow=dis_flow(seed)), aligned(seed, hard=True, flow=True)
        np.testing.assert_allclose(with_k.intrinsics, k, rtol=1e-6)
        truth = world(seed).camera_to_world
        assert ate(with_k.camera_to_world, truth) < 1.02 * ate(without.camera_to_world, truth)


def test_a_lens_that_is_known_of_one_frame_holds_for_all_that_share_it() -> None:
    k = np.full((12, 3, 3), np.nan)
    k[4] = world(0).intrinsics[4] * [[1.1], [1.1], [1.0]]
    np.testing.assert_allclose(solved(0, Known(intrinsics=k)).intrinsics, k[4:5].repeat(12, 0), rtol=1e-6)
    own = solved(0, Known(intrinsics=k), focal="per-frame").intrinsics
    np.testing.assert_allclose(own[4], k[4], rtol=1e-6)
    np.testing.assert_allclose(own[5], world(0).intrinsics[5], rtol=0.02, atol=1.0)


def test_a_believed_lens_lies_between_what_is_said_and_what_is_seen() -> None:
    k = world(0).intrinsics.copy()
    k[:, :2, :2] *= 1.1
    predictions = replace(predictions_of(0), points_first=predictions_of(0).points_first.clone())
    noise = torch.from_numpy(1 + 0.03 * np.random.default_rng(0).standard_normal(70)).float()
    predictions.points_first[..., :2] *= noise[:, None, None, None]
    found = {
        w: solved(
            0,
            Known(intrinsics=k),
            {"intrinsics_use": "prior", "intrinsics_weight": w},
            predictions=predictions,
            flow=dis_flow(0),
        ).intrinsics[0, 0, 0]
        for w in (0.01, 1e4)
    }
    assert found[0.01] < found[1e4]
    assert found[1e4] == pytest.approx(k[0, 0, 0], rel=2e-3)


def test_a_principal_point_off_the_centre_is_found() -> None:
    p = predictions_of(0, hard=False)
    first = p.points_first.clone()
    first[..., 0] += 6 / world(0).intrinsics[0, 0, 0] * first[..., 2]  # as if the lens looked 6 pixels aside
    answer = solved(0, predictions=replace(p, points_first=first), principal_point="solve")
    np.testing.assert_allclose(answer.intrinsics[:, :2, 2], [[63.5 - 6, 47.5]] * 12, atol=0.3)


def known_poses(seed: int) -> np.ndarray:
    poses = world(seed).camera_to_world.copy()
    poses[~EVERY_FIFTH] = np.nan
    return poses


def test_known_poses_stay_and_help_the_others() -> None:
    errors = []
    for seed in WORLDS:
        truth = world(seed).camera_to_world
        answers = (
            solved(seed, Known(camera_to_world=known_poses(seed)), flow=dis_flow(seed)),
            aligned(seed, hard=True, flow=True),
        )
        np.testing.assert_allclose(answers[0].camera_to_world[EVERY_FIFTH], truth[EVERY_FIFTH], atol=1e-6)
        assert np.median(answers[0].depth / world(seed).depth) == pytest.approx(1, abs=0.03)
        errors.append([rest_error(answer.camera_to_world, truth) for answer in answers])
    assert np.median(errors, axis=0)[0] < np.median(errors, axis=0)[1]


def rest_error(poses: np.ndarray, truth: np.ndarray) -> float:
    """RMSE of the places that were not given, after a Sim(3) of the whole path."""
    places = umeyama(poses[:, :3, 3], truth[:, :3, 3]).apply(poses[:, :3, 3])
    return float(np.sqrt(np.square(places - truth[:, :3, 3])[~EVERY_FIFTH].sum(axis=1).mean()))


def test_known_poses_help_where_there_is_no_flow() -> None:
    for seed in range(2):
        truth = world(seed).camera_to_world
        answer = solved(seed, Known(camera_to_world=known_poses(seed)))
        assert ate(answer.camera_to_world, truth) < ate(aligned(seed, hard=True).camera_to_world, truth)
        assert np.median(answer.depth / world(seed).depth) == pytest.approx(1, abs=0.06)


def test_believed_poses_pull_and_a_start_places_the_world() -> None:
    truth = world(1).camera_to_world
    said = Known(camera_to_world=known_poses(1))
    pulled = {
        w: solved(1, said, {"poses_use": "prior", "poses_weight": w}, flow=dis_flow(1)).camera_to_world
        for w in (1.0, 1e6)
    }
    off = {w: np.abs(poses - truth)[EVERY_FIFTH].max() for w, poses in pulled.items()}
    assert off[1e6] < off[1.0] < 0.02
    assert off[1e6] < 1e-3
    start = solved(1, said, {"poses_use": "init"}, flow=dis_flow(1)).camera_to_world
    np.testing.assert_allclose(start[0], truth[0], atol=1e-6)
    assert np.abs(start - truth).max() < 0.05


def test_a_tripod_has_one_pose_and_good_depth() -> None:
    clip = render(make_world(2, FAMILIES["tripod"], num_frames=8))
    pairs = pairs_of(clip)
    flow = estimate_flow(clip.images, pairs, FlowSettings(), silent)
    answer = align(
        synthetic_predictions(clip, pairs, hard=True, seed=2),
        8,
        AlignmentSettings(camera="static"),
        silent,
        dynamic_mask=clip.dynamic_mask,
        flow=flow,
    )
    assert np.array_equal(answer.camera_to_world, np.eye(4, dtype=np.float32)[None].repeat(8, 0))
    assert static_absrel(answer, clip) < 0.015
    placed = Known(camera_to_world=clip.camera_to_world[:1].repeat(8, 0))
    answer = align(
        synthetic_predictions(clip, pairs, hard=True, seed=2),
        8,
        AlignmentSettings(camera="static"),
        silent,
        dynamic_mask=clip.dynamic_mask,
        known=placed,
    )
    np.testing.assert_allclose(answer.camera_to_world, clip.camera_to_world, atol=1e-6)


def test_known_depth_stays_sets_the_unit_and_helps() -> None:
    clip = world(0)
    depth = clip.depth.astype(np.float64)
    depth[np.arange(12) % 4 != 0] = np.nan
    depth[0, :20] = np.nan
    answer = solved(0, Known(depth=depth), flow=dis_flow(0))
    known = np.isfinite(depth)
    np.testing.assert_array_equal(answer.depth[known], clip.depth[known])
    assert np.median(answer.depth / clip.depth) == pytest.approx(1, abs=0.01)
    assert static_absrel(answer, clip) < static_absrel(aligned(0, hard=True, flow=True), clip)
    believed = solved(0, Known(depth=depth), {"depth_use": "prior", "depth_weight": 100.0}, flow=dis_flow(0))
    assert np.median(np.abs(believed.depth / depth - 1)[known]) < 0.005


def test_a_smooth_path_changes_its_velocity_less() -> None:
    def jolts(answer: AlignedCameras) -> float:
        return float(np.linalg.norm(np.diff(answer.camera_to_world[:, :3, 3], n=2, axis=0)))

    rough, smooth = (solved(0, smoothness_weight=w) for w in (0.0, 1000.0))
    assert jolts(smooth) < 0.5 * jolts(rough)


@pytest.mark.parametrize("method", ["published", "none"])
def test_the_published_optimiser_says_what_it_cannot_take(method: str) -> None:
    for known, settings in (
        (Known(camera_to_world=known_poses(0)), {}),
        (Known(depth=world(0).depth.astype(np.float64)), {}),
        (Known(), {"camera": "static"}),
        (Known(), {"principal_point": "solve"}),
    ):
        with pytest.raises(InputError, match="expected align='fast'"):
            solved(0, known, method=method, **settings)
    answer = solved(0, Known(intrinsics=world(0).intrinsics), method=method, iterations=2)
    np.testing.assert_allclose(answer.intrinsics, world(0).intrinsics, rtol=1e-5)
