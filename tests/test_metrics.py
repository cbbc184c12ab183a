"""Every metric against a slow obvious twin, known answers, what must not change it, and the DAVIS figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import astuple
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from easi3r import metrics
from easi3r.metrics import (
    absolute_trajectory_error,
    associate,
    auc,
    average_precision,
    boundary_f,
    depth_errors,
    direction_angle_deg,
    jaccard,
    nearest_distances,
    path_length,
    point_cloud_errors,
    relative_pose_errors,
    rotation_angle_deg,
    summarise_masks,
    umeyama,
)
from easi3r.structures import Array

SEEDS = range(20)


def blobs(rng: np.random.Generator, shape: tuple[int, int, int] = (3, 19, 26)) -> Array:
    """A few rectangles per frame, some of them at the border."""
    masks = np.zeros(shape, dtype=bool)
    for mask, _ in product(masks, range(3)):
        y, x = rng.integers(-3, shape[1]), rng.integers(-3, shape[2])
        mask[max(y, 0) : y + rng.integers(1, 9), max(x, 0) : x + rng.integers(1, 9)] = True
    return masks


def trajectory(rng: np.random.Generator, n: int = 12) -> Array:
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, :3, :3] = Rotation.random(n, random_state=rng).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(n, 3)).cumsum(axis=0)
    return poses


def moved(poses: Array, scale: float, rotation: Array, translation: Array) -> Array:
    result = poses.copy()
    result[:, :3, :3] = rotation @ poses[:, :3, :3]
    result[:, :3, 3] = scale * poses[:, :3, 3] @ rotation.T + translation
    return result


def at_rest(poses: Array) -> Array:
    result = poses.copy()
    result[:, :3, 3] = [0.1, 0.2, 0.3]
    return result


# --- masks


def jaccard_by_pixels(predicted: Array, truth: Array) -> float:
    pixels = list(product(range(truth.shape[0]), range(truth.shape[1])))
    both = sum(predicted[p] and truth[p] for p in pixels)
    either = sum(predicted[p] or truth[p] for p in pixels)
    return both / either if either else 1.0


def boundary_by_pixels(mask: Array) -> list[tuple[int, int]]:
    height, width = mask.shape
    found = []
    for y, x in product(range(height), range(width)):
        near = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
        if y == height - 1:
            near = near[:1]
        if x == width - 1:
            near = [p for p in near if p[1] < width]
        if any(p[0] < height and mask[p] != mask[y, x] for p in near):
            found.append((y, x))
    return found


def boundary_f_by_pixels(predicted: Array, truth: Array) -> float:
    radius = np.ceil(0.008 * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    ours, theirs = boundary_by_pixels(predicted), boundary_by_pixels(truth)
    if not ours or not theirs:
        return float(not ours and not theirs)

    def share_near(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> float:
        near = [any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in others) for y, x in some]
        return sum(near) / len(some)

    precision, recall = share_near(ours, theirs), share_near(theirs, ours)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_j_and_f_equal_their_twins(seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, truth = blobs(rng), blobs(rng)
    pairs = list(zip(predicted, truth, strict=True))
    np.testing.assert_allclose(jaccard(predicted, truth), [jaccard_by_pixels(*pair) for pair in pairs], atol=1e-15)
    np.testing.assert_allclose(boundary_f(predicted, truth), [boundary_f_by_pixels(*pair) for pair in pairs])


def test_f_on_an_image_wide_enough_for_a_disk() -> None:
    rng = np.random.default_rng(0)
    truth = np.zeros((1, 7, 480), dtype=bool)  # radius 4
    truth[0, 2:5, 100:300] = True
    predicted = np.roll(truth, 3, axis=2) ^ (rng.random(truth.shape) > 0.99)
    np.testing.assert_allclose(boundary_f(predicted, truth), boundary_f_by_pixels(predicted[0], truth[0]))


def test_f_forgives_up_to_its_tolerance() -> None:
    truth = np.zeros((1, 240, 320), dtype=bool)  # diagonal 400: 3.2 pixels, rounded up to 4
    truth[0, 80:160, 100:200] = True
    four, five, far = (np.roll(truth, shift, axis=2) for shift in (4, 5, 110))
    assert boundary_f(four, truth) == 1 and boundary_f(five, truth) < 1 and boundary_f(far, truth) < 0.01
    np.testing.assert_array_equal(boundary_f(five, truth), boundary_f(truth, five))


def test_empty_full_and_perfect_masks() -> None:
    some = np.zeros((1, 12, 16), dtype=bool)
    some[0, 4:8, 5:9] = True
    empty, full = np.zeros_like(some), np.ones_like(some)
    for mask in (some, empty, full):
        assert jaccard(mask, mask) == boundary_f(mask, mask) == 1
    assert jaccard(empty, some) == boundary_f(empty, some) == jaccard(some, empty) == boundary_f(some, empty) == 0
    assert np.isclose(jaccard(full, some), 16 / 192) and boundary_f(full, some) == 0
    assert jaccard(full, empty) == 0 and boundary_f(full, empty) == 1, "neither has a boundary"


@pytest.mark.parametrize("n", range(1, 40))
def test_summary_by_the_quarters_of_davis(n: int) -> None:
    values = np.random.default_rng(n).random(n)
    ends = np.floor(np.linspace(1, n, 5) + 0.5 + 1e-10).astype(int) - 1
    first, last = values[ends[0] : ends[1] + 1], values[ends[3] : ends[4] + 1]
    expected = values.mean(), sum(v > 0.5 for v in values) / n, first.mean() - last.mean()
    np.testing.assert_allclose(astuple(summarise_masks(values)), expected, atol=1e-15)


def test_summary_of_known_frames() -> None:
    assert astuple(summarise_masks(np.array([0.5]))) == (0.5, 0.0, 0.0), "recall counts what is above 0.5"
    assert astuple(summarise_masks(np.array([1.0, 0.0]))) == (0.5, 0.5, 1.0)


@pytest.mark.parametrize("sequence", ["blackswan", "camel", "parkour"])
def test_figures_of_davis(sequence: str) -> None:
    if not (PARITY / "segmentation.npz").is_file():
        pytest.skip(f"{PARITY} is absent: the DAVIS figures cannot be compared here.")
    with np.load(PARITY / "segmentation.npz") as figures:
        part = {key.partition("/")[2]: figures[key] for key in figures.files if key.startswith(f"{sequence}/")}
    width = int(part["width"])
    truth, predicted = (np.unpackbits(part[key], axis=-1)[..., :width] > 0 for key in ("truth", "prediction"))
    for name, metric in (("J", jaccard), ("F", boundary_f)):
        values = metric(predicted, truth)
        np.testing.assert_allclose(values, part[name], rtol=0, atol=1e-9)
        np.testing.assert_allclose(astuple(summarise_masks(values)), part[f"{name}_stats"], rtol=0, atol=1e-9)


# --- score maps


@pytest.mark.parametrize("seed", SEEDS)
def test_auc_is_the_share_of_pairs_in_the_right_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 8, size=(2, 4, 5)) / 8, rng.random((2, 4, 5)) > 0.6
    pairs = [(a > b) + (a == b) / 2 for a in scores[truth] for b in scores[~truth]]
    assert np.isclose(auc(scores, truth), np.mean(pairs), atol=1e-14)
    assert np.isclose(auc(np.exp(3 * scores), truth), auc(scores, truth)), "only the order counts"
    assert np.isclose(auc(-scores, truth), 1 - auc(scores, truth))


@pytest.mark.parametrize("seed", SEEDS)
def test_average_precision_by_thresholds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, truth = rng.integers(0, 8, size=40) / 8, rng.random(40) > 0.6
    expected, before = 0.0, 0.0
    for threshold in sorted({*scores.tolist()}, reverse=True):
        chosen = scores >= threshold
        recall = (chosen & truth).sum() / truth.sum()
        expected += (recall - before) * (chosen & truth).sum() / chosen.sum()
        before = recall
    assert np.isclose(average_precision(scores, truth), expected, atol=1e-14)


def test_scores_of_perfect_constant_and_inverted_maps() -> None:
    truth = np.array([True, False, False, False])
    assert auc(truth.astype(float), truth) == average_precision(truth.astype(np.float32), truth) == 1
    assert auc(np.zeros(4), truth) == 0.5 and average_precision(np.zeros(4), truth) == 0.25
    assert auc(~truth * 1.0, truth) == 0 and average_precision(~truth * 1.0, truth) == 0.25
    assert average_precision(np.zeros(4), np.ones(4, dtype=bool)) == 1


# --- trajectories


@pytest.mark.parametrize("seed", SEEDS)
def test_umeyama_finds_the_similarity_and_nothing_nearby_is_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    source, rotation, shift = rng.normal(size=(9, 3)), Rotation.random(random_state=rng), rng.normal(size=3)
    found = umeyama(source, 2.5 * rotation.apply(source) + shift)
    assert np.isclose(found.scale, 2.5)
    np.testing.assert_allclose(found.rotation, rotation.as_matrix(), atol=1e-12)
    np.testing.assert_allclose(found.translation, shift, atol=1e-12)

    target = source + rng.normal(size=source.shape)
    for with_scale in (True, False):
        best = umeyama(source, target, with_scale)
        cost = ((best.apply(source) - target) ** 2).sum()
        for _ in range(20):
            scale = best.scale * np.exp(0.01 * rng.normal()) if with_scale else 1.0
            turn = Rotation.from_rotvec(0.01 * rng.normal(size=3)).as_matrix() @ best.rotation
            other = metrics.Similarity(scale, turn, best.translation + 0.01 * rng.normal(size=3))
            assert ((other.apply(source) - target) ** 2).sum() >= cost


def test_umeyama_without_scale_and_without_mirrors() -> None:
    points = np.random.default_rng(0).normal(size=(20, 3))
    assert umeyama(points, 3 * points, with_scale=False).scale == 1
    assert np.isclose(np.linalg.det(umeyama(points, points * [1, 1, -1]).rotation), 1)
    flat = points * [1, 1, 0]
    np.testing.assert_allclose(umeyama(flat, flat).rotation, np.eye(3), atol=1e-12)


def test_umeyama_of_two_points_and_of_a_line() -> None:
    for source in (np.array([[0, 0, 0], [1.0, 2, 3]]), np.outer(np.arange(5.0), [1, 2, 3])):
        target = 2 * Rotation.from_euler("xyz", [1, 2, 3]).apply(source) + [4, 5, 6]
        found = umeyama(source, target)
        np.testing.assert_allclose(found.apply(source), target, atol=1e-12)
        assert np.isclose(found.scale, 2) and np.isclose(np.linalg.det(found.rotation), 1)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_umeyama_of_points_that_coincide(n: int) -> None:
    moving, still = np.random.default_rng(0).normal(size=(n, 3)), np.full((n, 3), 0.1)
    for source, target in ((moving, still), (still, moving), (still, still + 1), (0 * still, 0 * still)):
        found = umeyama(source, target)
        assert found.scale == 1 and (found.rotation == np.eye(3)).all()
        np.testing.assert_allclose(found.apply(source.mean(axis=0)), target.mean(axis=0), atol=1e-15)


@pytest.mark.parametrize("seed", SEEDS)
def test_ate_and_rpe_do_not_see_a_similarity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted, truth = trajectory(rng), trajectory(rng)
    turn = Rotation.random(random_state=rng).as_matrix()
    other = moved(predicted, 3.0, turn, np.array([5.0, -2, 1]))
    assert np.isclose(absolute_trajectory_error(other, truth), absolute_trajectory_error(predicted, truth))
    before, after = relative_pose_errors(predicted, truth), relative_pose_errors(other, truth)
    np.testing.assert_allclose(astuple(after), astuple(before))
    truth_moved = moved(truth, 1.0, turn, np.array([5.0, -2, 1]))
    assert np.isclose(absolute_trajectory_error(predicted, truth_moved), absolute_trajectory_error(predicted, truth))
    assert absolute_trajectory_error(moved(truth, 0.2, turn, np.ones(3)), truth) < 1e-12
    assert max(astuple(relative_pose_errors(moved(truth, 0.2, turn, np.ones(3)), truth))) < 1e-10


@pytest.mark.parametrize("seed", SEEDS)
def test_rpe_by_matrices(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = trajectory(rng)
    predicted = moved(truth, 0.5, np.eye(3), np.zeros(3))
    predicted[:, :3, :3] = predicted[:, :3, :3] @ Rotation.from_rotvec(0.1 * rng.normal(size=(12, 3))).as_matrix()
    predicted[:, :3, 3] += 0.1 * rng.normal(size=(12, 3))
    found = umeyama(predicted[:, :3, 3], truth[:, :3, 3])
    aligned = moved(predicted, found.scale, found.rotation, found.translation)
    lengths, angles = [], []
    for i in range(11):
        true_step = np.linalg.inv(truth[i]) @ truth[i + 1]
        error = np.linalg.inv(true_step) @ np.linalg.inv(aligned[i]) @ aligned[i + 1]
        lengths.append(np.linalg.norm(error[:3, 3]))
        angles.append(Rotation.from_matrix(error[:3, :3]).magnitude())
    expected = np.sqrt(np.mean(np.square(lengths))), np.rad2deg(np.sqrt(np.mean(np.square(angles))))
    np.testing.assert_allclose(astuple(relative_pose_errors(predicted, truth)), expected, rtol=1e-9)


def test_ate_and_rpe_equal_evo() -> None:
    evo_metrics = pytest.importorskip("evo.core.metrics", reason="evo, the oracle, is not installed")
    from evo.core.trajectory import PosePath3D

    relations = evo_metrics.PoseRelation
    for seed in range(100):
        rng = np.random.default_rng(seed)
        truth = trajectory(rng, 3 + seed % 30)
        predicted = moved(
            truth, np.exp(rng.normal()), Rotation.random(random_state=rng).as_matrix(), rng.normal(size=3)
        )
        predicted[:, :3, 3] += rng.choice([1e-3, 0.1, 1]) * rng.normal(size=(len(truth), 3))
        noise = Rotation.from_rotvec(rng.choice([1e-3, 0.1, 2]) * rng.normal(size=(len(truth), 3)))
        predicted[:, :3, :3] = predicted[:, :3, :3] @ noise.as_matrix()
        reference, estimate = PosePath3D(poses_se3=list(truth)), PosePath3D(poses_se3=list(predicted))
        assert np.isclose(path_length(truth), reference.path_length, rtol=0, atol=1e-9)
        estimate.align(reference, correct_scale=True)
        oracles = [evo_metrics.APE(relations.translation_part)]
        for relation in (relations.translation_part, relations.rotation_angle_deg):
            oracles.append(evo_metrics.RPE(relation, delta=1, delta_unit=evo_metrics.Unit.frames, all_pairs=True))
        for oracle in oracles:
            oracle.process_data((reference, estimate))
        expected = [oracle.get_statistic(evo_metrics.StatisticsType.rmse) for oracle in oracles]
        ours = absolute_trajectory_error(predicted, truth), *astuple(relative_pose_errors(predicted, truth))
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


def test_ate_and_rpe_equal_evo_on_unequal_time_stamps() -> None:
    evo_metrics = pytest.importorskip("evo.core.metrics", reason="evo, the oracle, is not installed")
    from evo.core import sync
    from evo.core.trajectory import PoseTrajectory3D

    relations = evo_metrics.PoseRelation
    for seed in range(100):
        rng = np.random.default_rng(seed)
        times = 1.3e9 + np.arange(40) / 30  # stamps differ by less than half of a step: one answer is right
        poses = trajectory(rng, 40)
        noisy = poses.copy()
        noisy[:, :3, 3] += 0.1 * rng.normal(size=(40, 3))
        noisy[:, :3, :3] @= Rotation.from_rotvec(0.1 * rng.normal(size=(40, 3))).as_matrix()
        sides = []
        for side in (noisy, poses):
            kept = np.flatnonzero(rng.random(40) > 0.2)
            sides.append((times[kept] + rng.uniform(-0.004, 0.004, len(kept)), side[kept]))
        (ours_s, predicted), (truth_s, truth) = sides
        i, j = associate(ours_s, truth_s, 0.01).T
        estimate, reference = (PoseTrajectory3D(poses_se3=list(p), timestamps=t) for t, p in sides)
        reference, estimate = sync.associate_trajectories(reference, estimate, max_diff=0.01)
        assert 10 < len(i) == estimate.num_poses < 40
        estimate.align(reference, correct_scale=True)
        oracles = [evo_metrics.APE(relations.translation_part)]
        for relation in (relations.translation_part, relations.rotation_angle_deg):
            oracles.append(evo_metrics.RPE(relation, delta=1, delta_unit=evo_metrics.Unit.frames, all_pairs=True))
        for oracle in oracles:
            oracle.process_data((reference, estimate))
        expected = [oracle.get_statistic(evo_metrics.StatisticsType.rmse) for oracle in oracles]
        errors = relative_pose_errors(predicted[i], truth[j])
        ours = absolute_trajectory_error(predicted[i], truth[j]), *astuple(errors)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-9)


def associate_by_search(a: list[float], b: list[float], most: float) -> list[list[int]]:
    left_a, left_b, pairs = set(range(len(a))), set(range(len(b))), []
    while left_a and left_b:
        difference, i, j = min((abs(a[i] - b[j]), i, j) for i in left_a for j in left_b)
        if difference > most:
            break
        left_a.remove(i)
        left_b.remove(j)
        pairs.append([i, j])
    return sorted(pairs)


@pytest.mark.parametrize("seed", SEEDS)
def test_association_takes_the_closest_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for offset, step in ((0.0, 1.0), (1.3e9, 1 / 64), (-5.0, 0.01)):
        a = offset + step * rng.uniform(0, 12, rng.integers(1, 15))  # neither is in order
        b = offset + step * np.round(rng.uniform(0, 12, rng.integers(1, 15)) * 4) / 4  # some stamps are equal
        for most in (0.0, 0.3 * step, 2 * step, 100.0):
            pairs = associate(a, b, most)
            assert pairs.tolist() == associate_by_search(a.tolist(), b.tolist(), most)
            assert pairs.dtype == np.int64 and pairs.shape == (len(pairs), 2)


def test_association_of_known_stamps() -> None:
    seconds = np.array([0.0, 1.0, 2.0])
    assert associate(seconds, seconds, 0.0).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert associate(seconds, seconds[::-1], 0.0).tolist() == [[0, 2], [1, 1], [2, 0]]
    assert associate(seconds, seconds + 0.25, 0.25).tolist() == [[0, 0], [1, 1], [2, 2]], "the end is included"
    assert associate(seconds, seconds + 0.25, 0.2499).shape == (0, 2)
    assert associate(np.array([0.0, 0.1]), np.array([0.11]), 1.0).tolist() == [[1, 0]], "each stamp once"
    assert associate(np.array([0.0, 0.5]), np.array([0.25]), 1.0).tolist() == [[0, 0]], "of equals the first"
    many = np.arange(20_000) / 30
    assert (associate(many + 1e-3, many, 0.02) == np.arange(20_000)[:, None]).all()


def test_f_by_another_tolerance() -> None:
    truth = np.zeros((1, 30, 40), dtype=bool)  # diagonal 50
    truth[0, 10:20, 10:20] = True
    moved_by_3 = np.roll(truth, 3, axis=2)
    assert boundary_f(moved_by_3, truth, 3 / 50) == 1 and boundary_f(moved_by_3, truth) < 1
    assert boundary_f(moved_by_3, truth, 0.0) < boundary_f(moved_by_3, truth)


def test_known_trajectory_errors() -> None:
    square = np.tile(np.eye(4), (4, 1, 1))
    square[:, :3, 3] = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert path_length(square) == 3 and path_length(square[:1]) == 0
    bent = square.copy()
    bent[:, 2, 3] = [0.1, -0.1, 0.1, -0.1]  # no similarity helps but a little less of it
    scale = 0.5 / 0.51
    assert np.isclose(absolute_trajectory_error(bent, square), np.sqrt(0.5 * (1 - scale) ** 2 + (0.1 * scale) ** 2))
    turned = square.copy()
    turned[2:, :3, :3] = Rotation.from_rotvec([0, np.deg2rad(3), 0]).as_matrix()
    assert np.isclose(relative_pose_errors(turned, square).rotation_deg, 3 / np.sqrt(3))


def test_trajectories_of_one_and_two_frames_and_at_rest() -> None:
    predicted, truth = (trajectory(np.random.default_rng(seed)) for seed in (0, 1))
    assert absolute_trajectory_error(predicted[:1], truth[:1]) < 1e-15
    assert np.isnan(astuple(relative_pose_errors(predicted[:1], truth[:1]))).all()
    assert absolute_trajectory_error(predicted[:2], truth[:2]) < 1e-12, "two positions always fit"
    assert np.isfinite(astuple(relative_pose_errors(predicted[:2], truth[:2]))).all()

    spread = [np.sqrt(p[:, :3, 3].var(axis=0).sum()) for p in (predicted, truth)]
    assert np.isclose(absolute_trajectory_error(predicted, at_rest(truth)), spread[0])
    assert np.isclose(absolute_trajectory_error(at_rest(predicted), truth), spread[1])
    assert absolute_trajectory_error(at_rest(predicted), at_rest(truth)) < 1e-15
    steps = [np.sqrt((np.diff(p[:, :3, 3], axis=0) ** 2).sum(axis=1).mean()) for p in (predicted, truth)]
    assert np.isclose(relative_pose_errors(predicted, at_rest(truth)).translation, steps[0])
    assert np.isclose(relative_pose_errors(at_rest(predicted), truth).translation, steps[1])


@pytest.mark.parametrize("angle_deg", [0, 1e-9, 1e-5, 1, 90, 179, 179.99999, 180])
def test_angles_keep_their_digits(angle_deg: float) -> None:
    rng = np.random.default_rng(0)
    axes = rng.normal(size=(4, 5, 3))
    axes /= np.linalg.norm(axes, axis=-1, keepdims=True)
    a = Rotation.random(20, random_state=rng)
    b = a * Rotation.from_rotvec(np.deg2rad(angle_deg) * axes.reshape(-1, 3))
    a, b = (r.as_matrix().reshape(4, 5, 3, 3) for r in (a, b))
    np.testing.assert_allclose(rotation_angle_deg(a, b), np.full((4, 5), angle_deg), atol=1e-12)
    u, v = np.array([2.0, 0, 0]), 3 * np.array([np.cos(np.deg2rad(angle_deg)), np.sin(np.deg2rad(angle_deg)), 0])
    assert np.isclose(direction_angle_deg(u, v), angle_deg, rtol=0, atol=1e-12)


# --- depth and points


def test_depth_errors_of_known_ratios() -> None:
    truth = np.array([[[1.0, 2.0], [4.0, np.nan]]])
    predicted = np.array([[[1.1, 2.0], [5.0, np.inf]]])
    valid = np.isfinite(truth)
    found = depth_errors(predicted, truth, valid)
    np.testing.assert_allclose(astuple(found), [(0.1 + 0 + 0.25) / 3, 2 / 3, 1, 0]), "1.25 is not below 1.25"
    assert astuple(depth_errors(truth, truth, valid)) == (0, 1, 1, 0)
    assert depth_errors(np.array([[[1.0]]]), np.array([[[1.25]]]), np.array([[[True]]])).delta_1_25 == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_depth_alignments(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, valid = 1 + 4 * rng.random((3, 5, 6)), rng.random((3, 5, 6)) > 0.3
    predicted = truth * np.exp(0.3 * rng.normal(size=truth.shape))
    scaled = depth_errors(predicted, truth, valid, "scale")
    assert np.isclose(scaled.scale, np.median(truth[valid] / predicted[valid])) and scaled.shift == 0
    np.testing.assert_allclose(astuple(depth_errors(7 * predicted, truth, valid, "scale"))[:2], astuple(scaled)[:2])

    fitted = depth_errors(predicted, truth, valid, "scale+shift")
    design = np.stack([predicted[valid], np.ones(valid.sum())], axis=1)
    np.testing.assert_allclose([fitted.scale, fitted.shift], np.linalg.lstsq(design, truth[valid], rcond=None)[0])
    again = depth_errors(7 * predicted + 3, truth, valid, "scale+shift")
    np.testing.assert_allclose(astuple(again)[:2], astuple(fitted)[:2])
    aligned, true = fitted.scale * predicted[valid] + fitted.shift, truth[valid]
    assert np.isclose(fitted.abs_rel, np.mean([abs(a - t) / t for a, t in zip(aligned, true, strict=True)]))
    assert np.isclose(
        fitted.delta_1_25, np.mean([max(a / t, t / a) < 1.25 for a, t in zip(aligned, true, strict=True)])
    )
    assert depth_errors(0.1 * truth + 2, truth, valid, "scale+shift").abs_rel < 1e-12


def test_a_constant_depth_takes_the_mean_of_the_truth() -> None:
    truth = np.array([[[1.0, 2.0, 3.0]]])
    found = depth_errors(np.full_like(truth, 0.1), truth, truth > 0, "scale+shift")
    assert found.scale == 1 and np.isclose(found.abs_rel, (1 + 0 + 1 / 3) / 3)


def test_nearest_distances_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    points, others = 100 + rng.normal(size=(301, 3)), 100 + rng.normal(size=(77, 3))
    expected = [min(np.linalg.norm(p - o) for o in others) for p in points]
    for pairs_at_a_time in (1, 1000, 10**9):
        monkeypatch.setattr(metrics, "PAIRS_AT_A_TIME", pairs_at_a_time)
        np.testing.assert_allclose(nearest_distances(points, others), expected, atol=1e-12)
    np.testing.assert_allclose(nearest_distances(others, points), cKDTree(points).query(others)[0], atol=1e-12)
    assert (nearest_distances(points, points[::-1]) == 0).all()


def test_point_cloud_errors_of_known_clouds() -> None:
    truth = np.array([[0, 0, 0], [10, 0, 0], [20, 0, 0], [30.0, 0, 0]])
    swapped = truth[[1, 0, 3, 2]] + [0, 0, 0.5]
    along = np.hypot(10, 0.5)
    np.testing.assert_allclose(astuple(point_cloud_errors(swapped, truth)), [0.5] * 4 + [along] * 2)
    one_far = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 8.0]])
    np.testing.assert_allclose(astuple(point_cloud_errors(one_far, truth))[:4], [2, 0, 15, 15])
    assert astuple(point_cloud_errors(truth, truth)) == (0,) * 6
    rng = np.random.default_rng(0)
    some, others = rng.normal(size=(2, 300, 3))
    by_tree = point_cloud_errors(some, others, lambda points, all_others: cKDTree(all_others).query(points)[0])
    np.testing.assert_allclose(astuple(by_tree), astuple(point_cloud_errors(some, others)), atol=1e-12)


# --- bad input, and what importing costs


MASK, POSES, DEPTH = np.zeros((2, 4, 5), dtype=bool), np.tile(np.eye(4), (3, 1, 1)), np.ones((2, 4, 5))
NAN = np.full((3, 3), np.nan)


BAD_INPUT = {
    "masks of other sizes": (lambda: jaccard(MASK, MASK[:, :3]), ["truth", "(2, 3, 5)", "(2, 4, 5)"]),
    "masks of floats": (lambda: boundary_f(MASK * 1.0, MASK), ["predicted", "float64", "bool"]),
    "one mask without its axis": (lambda: jaccard(MASK[0], MASK[0]), ["(4, 5)", "(n, H, W)"]),
    "no masks": (lambda: jaccard(MASK[:0], MASK[:0]), ["(0, 4, 5)", "not empty"]),
    "no frames": (lambda: summarise_masks(np.zeros(0)), ["values", "(0,)"]),
    "nan in a frame": (lambda: summarise_masks(np.array([1, np.nan])), ["values", "nan"]),
    "only False": (lambda: auc(DEPTH, MASK), ["truth", "False everywhere"]),
    "only True": (lambda: auc(DEPTH, ~MASK), ["truth", "True everywhere"]),
    "nothing to find": (lambda: average_precision(DEPTH, MASK), ["truth", "at least one True"]),
    "scores of another shape": (lambda: auc(DEPTH[0], MASK), ["scores", "(4, 5)", "(2, 4, 5)"]),
    "points that are not finite": (lambda: umeyama(NAN, np.ones((3, 3))), ["source_points", "nan"]),
    "trajectories of other lengths": (lambda: absolute_trajectory_error(POSES, POSES[:2]), ["truth", "(2, 4, 4)"]),
    "poses without their last row": (lambda: relative_pose_errors(POSES[:, :3], POSES), ["(3, 3, 4)", "(n, 4, 4)"]),
    "no time stamps": (lambda: associate(np.zeros(0), np.zeros(3), 1.0), ["times_a", "(0,)"]),
    "nan in time stamps": (lambda: associate(np.zeros(3), NAN[0], 1.0), ["times_b", "nan"]),
    "a negative difference": (lambda: associate(np.zeros(3), np.zeros(3), -0.1), ["max_difference_s", "-0.1"]),
    "a difference that is nan": (lambda: associate(np.zeros(3), np.zeros(3), np.nan), ["max_difference_s", "nan"]),
    "lost poses": (lambda: relative_pose_errors(0 * POSES, POSES), ["rotation"]),
    "nan in poses": (lambda: path_length(POSES * np.nan), ["camera_to_world", "nan"]),
    "no rotation": (lambda: rotation_angle_deg(2 * np.eye(3), np.eye(3)), ["rotation", "orthonormal"]),
    "no matrix": (lambda: rotation_angle_deg(np.zeros(3), np.zeros(3)), ["a has shape (3,)", "(3, 3)"]),
    "no direction": (lambda: direction_angle_deg(np.zeros(3), np.ones(3)), ["length 0"]),
    "unknown alignment": (lambda: depth_errors(DEPTH, DEPTH, ~MASK, "shift"), ["'shift'", "'scale+shift'"]),
    "nothing valid": (lambda: depth_errors(DEPTH, DEPTH, MASK), ["0 valid pixels"]),
    "depth of 0": (lambda: depth_errors(0 * DEPTH, DEPTH, ~MASK), ["40 valid pixels", "> 0"]),
    "nan where valid": (lambda: depth_errors(DEPTH, DEPTH * np.nan, ~MASK), ["truth", "nan"]),
    "one depth for two frames": (lambda: depth_errors(DEPTH[0], DEPTH, ~MASK), ["predicted", "(4, 5)"]),
    "no points": (lambda: point_cloud_errors(np.zeros((0, 3)), np.zeros((0, 3))), ["predicted", "(0, 3)"]),
    "flat points": (lambda: nearest_distances(np.zeros((4, 2)), np.zeros((4, 2))), ["points", "(n, 3)"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(case: str, fails_with: Callable[..., AbstractContextManager[None]]) -> None:
    call, parts = BAD_INPUT[case]
    with fails_with(ValueError, *parts):
        call()


def test_importing_metrics_loads_numpy_alone() -> None:
    program = "import sys, easi3r.metrics; print(*{name.partition('.')[0] for name in sys.modules})"
    root = Path(metrics.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert not {"torch", "scipy", "cv2", "PIL", "hooks"} & {*done.stdout.split()}
