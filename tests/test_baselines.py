from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_inputs import QUICK, moving_square, random_model, write_images

from easi3r.config import FrameSettings, Settings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import FAMILIES, Family, make_world
from easi3r.dynamic_masks import prove
from easi3r.geometry import depth_edges, induced_flow
from easi3r.metrics import jaccard
from easi3r.pairs import make_pairs
from easi3r.structures import PairFlow
from evaluation.baselines import (
    BASELINES,
    ego_motion_residual,
    frame_difference_masks,
    homography_flow,
    homography_masks,
    homography_residual,
    median_over_pairs,
)
from evaluation.datasets.worlds import Worlds

WEIGHTLESS = [name for name in BASELINES if name != "flow-ego-motion"]
FROM_IMAGES = [frame_difference_masks, homography_masks]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return render(make_world(1, num_frames=5), 64, 48)


def exact_flow(clip: Clip, **options: bool) -> PairFlow:
    pairs = make_pairs(len(clip.images), Settings().pairs)
    flow, valid = zip(*(clip.flow(int(i), int(j), **options) for i, j in pairs), strict=True)
    return PairFlow(pairs, np.stack(flow), np.stack(valid))


def residual_of(clip: Clip, flow: PairFlow) -> np.ndarray:
    return ego_motion_residual(flow, clip.camera_to_world, clip.intrinsics, clip.depth)


# --- masks of images -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("find_masks", FROM_IMAGES)
def test_of_a_still_clip_nothing_moves(find_masks) -> None:
    still = np.repeat(moving_square(1), 4, axis=0)
    noisy = (still + np.random.default_rng(0).integers(-2, 3, still.shape)).clip(0, 255).astype(np.uint8)
    for images in (still, noisy):
        masks = find_masks(images)
        assert masks.shape == images.shape[:3] and masks.dtype == bool
        assert masks.mean() < 0.01


@pytest.mark.parametrize("find_masks", FROM_IMAGES)
@pytest.mark.parametrize("num_frames", [1, 2])
def test_one_frame_is_static_and_two_are_enough(find_masks, num_frames: int) -> None:
    images = render(make_world(2, FAMILIES["tripod"], num_frames=5), 64, 48).images[[0, 4][:num_frames]]
    masks = find_masks(images)
    assert masks.shape == (num_frames, 48, 64)
    assert masks.any() == (num_frames == 2)


def test_a_mover_before_a_still_camera_is_found_by_frame_difference() -> None:
    clip = render(make_world(2, FAMILIES["tripod"], num_frames=6), 64, 48)
    found = frame_difference_masks(clip.images)
    still = ~clip.dynamic_mask.any(axis=0)
    assert not found[:, still].mean() > 0.01
    assert found[clip.dynamic_mask].mean() > 0.3
    assert jaccard(found, clip.dynamic_mask).mean() > 0.3


def test_a_difference_to_either_neighbour_counts() -> None:
    """A bright square steps by its own width over black: it is found, and where it was and will be."""
    images = np.zeros((4, 16, 16, 3), np.uint8)
    for i in range(4):
        images[i, 4:8, 4 * i : 4 * i + 4] = 200
    truth = images[..., 0] > 0
    found = frame_difference_masks(images)
    for i in range(4):
        np.testing.assert_array_equal(found[i], truth[max(0, i - 1) : i + 2].any(axis=0))


def test_a_change_counts_above_the_threshold_and_not_at_it() -> None:
    images = np.full((2, 2, 2, 3), 100, np.uint8)
    images[1, 0, 0], images[1, 1, 1] = 110, 89
    expected = [[False, False], [False, True]]
    np.testing.assert_array_equal(frame_difference_masks(images, 10), [expected, expected])


def rotating_camera() -> Clip:
    """Nothing moves and the camera only turns."""
    world = make_world(4, Family(num_movers=0, num_static=5), num_frames=4)
    poses = world.camera_to_world.clone()
    poses[..., :3, 3] = poses[:, :1, :3, 3]
    return render(dataclasses.replace(world, camera_to_world=poses), 64, 48)


def test_a_camera_that_only_turns_leaves_no_residual() -> None:
    clip = rotating_camera()
    flow = exact_flow(clip)
    assert np.linalg.norm(flow.flow[flow.valid], axis=-1).max() > 1
    assert np.nanmax(homography_residual(flow, 4)) < 1e-3
    assert homography_masks(clip.images).mean() < 0.02


def test_a_homography_is_found_again_beside_wrong_matches() -> None:
    true = np.array([[1.02, 0.01, 2.0], [-0.02, 0.98, -1.0], [1e-4, -1e-4, 1.0]])
    x, y = np.meshgrid(np.arange(64.0), np.arange(48.0))
    there = np.stack([x, y, np.ones_like(x)], -1) @ true.T
    flow = there[..., :2] / there[..., 2:] - np.stack([x, y], -1)
    wrong = flow.copy()
    wrong[10:30, 10:40] += [5.0, -7.0]
    np.testing.assert_allclose(homography_flow(wrong, np.ones((48, 64), bool)), flow, atol=1e-3)


@pytest.mark.parametrize("known", [0, 3])
def test_too_few_matches_leave_everything_unknown(known: int) -> None:
    valid = np.zeros((12, 16), dtype=bool)
    valid.reshape(-1)[:known] = True
    assert np.isnan(homography_flow(np.ones((12, 16, 2), np.float32), valid)).all()


def test_a_homography_sees_a_mover_before_a_wall() -> None:
    """A textured plane slides by a pixel a frame, a square on it by three."""
    wall = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (64, 112, 3)).astype(np.uint8), (0, 0), 1.5)
    wall = cv2.normalize(wall, None, 0, 255, cv2.NORM_MINMAX)
    images = np.stack([wall[:, 8 + i : 104 + i] for i in range(4)])
    truth = np.zeros(images.shape[:3], bool)
    for i in range(4):
        images[i, 20:44, 20 + 3 * i : 44 + 3 * i] = wall[20:44, 60:84]
        truth[i, 20:44, 20 + 3 * i : 44 + 3 * i] = True
    assert jaccard(homography_masks(images), truth).mean() > 0.6


# --- flow against ego-motion ---------------------------------------------------------------------------------------


def test_the_induced_flow_is_the_flow_of_a_still_world(clip: Clip) -> None:
    for i, j in ((0, 4), (3, 1)):
        k, poses = clip.intrinsics, clip.camera_to_world
        induced = induced_flow(clip.depth[i], k[i], k[j], poses[i], poses[j])
        np.testing.assert_allclose(induced, clip.flow(i, j, camera_only=True)[0], atol=1e-3)


def test_behind_the_other_camera_no_flow_is_known() -> None:
    camera, other = np.array([[50, 0, 7.5], [0, 50, 5.5], [0, 0, 1.0]]), np.eye(4)
    other[2, 3] = 3.0  # stepped through a wall at 2
    depth = np.full((12, 16), 2.0)
    depth[:, 8:] = 9.0
    induced = induced_flow(depth, camera, camera, np.eye(4), other)
    assert np.isnan(induced[:, :8]).all() and np.isfinite(induced[:, 8:]).all()


@pytest.mark.parametrize("seed", [1, 3, 6])
def test_true_cameras_depth_and_flow_give_the_true_mask(seed: int) -> None:
    clip = render(make_world(seed, num_frames=5), 128, 96)
    flow = exact_flow(clip)
    residual = residual_of(clip, flow)
    seen = np.isfinite(residual)
    assert seen.mean() > 0.7
    edges = depth_edges(clip.depth)
    for mask in (residual > 0.1, prove(residual, 0.1).mask):
        right = mask == clip.dynamic_mask
        assert right[seen & ~edges].mean() > 0.99
    assert clip.dynamic_mask[seen & ~edges].mean() > 0.01  # and there is something to find


def test_nothing_is_left_when_only_the_camera_moves(clip: Clip) -> None:
    assert np.nanmax(residual_of(clip, exact_flow(clip, camera_only=True))) < 1e-2


def test_residuals_are_l1_and_medians_over_valid_pairs() -> None:
    pairs = np.array([[0, 1], [0, 2], [0, 3], [1, 0]])
    flow = np.zeros((4, 2, 3, 2), np.float32)
    flow[:, ..., 0], flow[:, ..., 1] = np.array([1, 2, 6, 9])[:, None, None], -1
    valid = np.ones((4, 2, 3), bool)
    valid[2, 0, 0] = False
    valid[:3, 1, 2] = False
    still = PairFlow(pairs, flow, valid)
    poses, camera = np.tile(np.eye(4), (4, 1, 1)), np.tile(np.eye(3), (4, 1, 1))
    found = ego_motion_residual(still, poses, camera, np.ones((4, 2, 3)))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], [[2.5, 3, 3], [3, 3, np.nan]])
    np.testing.assert_array_equal(found[1], np.full((2, 3), 10))
    assert np.isnan(found[2:]).all()


def test_a_single_frame_is_unknown() -> None:
    alone = PairFlow(make_pairs(1, Settings().pairs), np.zeros((1, 4, 5, 2), np.float32), np.zeros((1, 4, 5), bool))
    assert np.isnan(median_over_pairs(lambda k: np.zeros((4, 5)), alone, 1)).all()


# --- as methods ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WEIGHTLESS)
@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_methods_without_weights_read_frames_as_the_product_does(name: str, num_frames: int, tmp_path: Path) -> None:
    paths = sorted(write_images(tmp_path, moving_square(num_frames, height=50, width=70)).iterdir())
    method = BASELINES[name](frames=FrameSettings(image_size="native"))
    estimate = method(tuple(paths))
    assert method.name == name
    assert estimate.masks is not None and estimate.masks.shape == (num_frames, 48, 64)
    assert [crop.offset for crop in estimate.crops] == [(3, 1)] * num_frames
    assert estimate.masks.any() == (name != "all-static" and num_frames > 1)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_ego_motion_brings_cameras_too(num_frames: int, tmp_path: Path) -> None:
    paths = sorted(write_images(tmp_path, moving_square(num_frames, height=50, width=70)).iterdir())
    method = BASELINES["flow-ego-motion"](random_model(), Settings().with_options(QUICK))
    estimate = method(tuple(paths))
    assert method.name == "flow-ego-motion"
    assert estimate.masks is not None and estimate.masks.shape == (num_frames, 48, 64)
    assert estimate.camera_to_world is not None and estimate.camera_to_world.shape == (num_frames, 4, 4)
    assert estimate.depth is not None and estimate.depth.shape == (num_frames, 48, 64)
    assert estimate.intrinsics is not None and estimate.intrinsics.shape == (num_frames, 3, 3)
    assert [crop.offset for crop in estimate.crops] == [(3, 1)] * num_frames
    assert num_frames > 1 or not estimate.masks.any()


def test_ego_motion_finds_movers_with_the_bundled_network(tmp_path: Path) -> None:
    from easi3r import Easi3R

    clip = render(make_world(5, num_frames=6))
    paths = tuple(sorted(write_images(tmp_path, clip.images).iterdir()))
    method = BASELINES["flow-ego-motion"](Easi3R.from_pretrained("demo"), Settings())
    masks = method(paths).masks
    assert masks is not None and jaccard(masks, clip.dynamic_mask).mean() > 0.3


# --- worlds as a data set ------------------------------------------------------------------------------------------


def test_the_default_variant_is_what_the_bundled_network_is_trained_on() -> None:
    assert Worlds.variants[0] == "sharp" and set(Worlds.variants) == set(FAMILIES)
    assert Worlds(Path("/nowhere")).missing() == []


def test_worlds_are_written_and_come_with_their_truth(tmp_path: Path) -> None:
    worlds = Worlds(tmp_path / "new", "tripod", num_clips=2, num_frames=4, size=(64, 48))
    assert worlds.names() == ["seed_1000", "seed_1001"] and not (tmp_path / "new").exists()
    sequence = worlds.read("seed_1001", slice(1, None, 2))
    clip = render(make_world(1001, FAMILIES["tripod"], num_frames=4), 64, 48)
    for path, image in zip(sequence.images, clip.images[[1, 3]], strict=True):
        np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], image)
    np.testing.assert_array_equal(sequence.times_s, [1, 3])
    np.testing.assert_array_equal(sequence.masks, clip.dynamic_mask[[1, 3]])
    np.testing.assert_array_equal(sequence.has_mask, [True, True])
    np.testing.assert_array_equal(sequence.camera_to_world, clip.camera_to_world[[1, 3]])
    np.testing.assert_array_equal(sequence.intrinsics, clip.intrinsics[[1, 3]])
    np.testing.assert_array_equal(sequence.depth, clip.depth[[1, 3]])


def test_clips_of_other_sizes_and_families_do_not_meet(tmp_path: Path) -> None:
    changes = [{}, {"variant": "crowd"}, {"size": (32, 48)}, {"num_frames": 3}]
    paths = [
        Worlds(tmp_path, **{"num_frames": 2, "size": (32, 32)} | change).read("seed_1000", slice(0, 1)).images[0]
        for change in changes
    ]
    assert len(set(paths)) == 4 and all(path.is_file() for path in paths)


def test_what_cannot_be_read_is_said_in_a_sentence(tmp_path: Path, fails_with) -> None:
    from easi3r.errors import InputError

    worlds = Worlds(tmp_path, num_clips=2, num_frames=2, size=(32, 32))
    with fails_with(InputError, "'sharpe'", "did you mean 'sharp'", "crowd"):
        Worlds(tmp_path, "sharpe").names()
    for name in ("seed_999", "bear", "seed_1002"):
        with fails_with(InputError, repr(name), "seed_1000 to seed_1001"):
            worlds.read(name, slice(None))
    with fails_with(InputError, "none of the 2 frames"):
        worlds.read("seed_1000", slice(5, None))
    (tmp_path / "file").touch()
    with fails_with(InputError, "cannot be written", "another root"):
        Worlds(tmp_path / "file", num_clips=1, num_frames=2, size=(32, 32)).read("seed_1000", slice(None))
