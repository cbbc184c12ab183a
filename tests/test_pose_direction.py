"""Poses that were given the wrong way round are found from optical flow, and right ones are never doubted."""

from __future__ import annotations

import numpy as np
import pytest

from easi3r.config import FlowSettings
from easi3r.demo.rendering import render
from easi3r.demo.worlds import FAMILIES, make_world
from easi3r.errors import InputError
from easi3r.flow import estimate_flow
from easi3r.geometry import invert_rigid, pixel_grid
from easi3r.pose_direction import check_direction, pairs_to_check
from easi3r.progress import silent
from easi3r.structures import Known, PairFlow

SEEDS = range(6)


def make_clip(seed, family):
    return render(make_world(seed, FAMILIES[family]), supersample=1)


def exact_flow(clip, pairs):
    flows, seen = zip(*(clip.flow(a, b) for a, b in pairs.tolist()), strict=True)
    return PairFlow(pairs, np.stack(flows), np.stack(seen))


def found_flow(clip, pairs):
    return estimate_flow(clip.images, pairs, FlowSettings(), silent)


def from_first(poses):
    """In the frame of the first camera, as most programs write them."""
    return invert_rigid(poses[0]) @ poses


@pytest.mark.parametrize(
    "family, seed, flow_of",
    [*(("sharp", seed, found_flow) for seed in SEEDS), ("handheld", 0, found_flow), ("wide", 0, exact_flow)],
)
def test_inverted_poses_are_found_and_right_ones_pass(family, seed, flow_of, fails_with):
    clip = make_clip(seed, family)
    flow = flow_of(clip, pairs_to_check(Known(camera_to_world=clip.camera_to_world)))
    for poses in (clip.camera_to_world, from_first(clip.camera_to_world)):
        for intrinsics in (clip.intrinsics, None):
            right = Known(intrinsics=intrinsics, camera_to_world=poses)
            wrong = Known(intrinsics=intrinsics, camera_to_world=invert_rigid(poses))
            check_direction(right, flow)
            with fails_with(InputError, "camera_to_world fits the images only when inverted", "world_to_camera=..."):
                check_direction(wrong, flow)
            with fails_with(InputError, "world_to_camera fits the images only when inverted", "camera_to_world=..."):
                check_direction(wrong, flow, "world_to_camera")


def two_views(motion, depth=None, k=None, moved=None):
    """Known and flow of a wall seen from the origin and from ``motion`` [4, 4] camera-to-world, 128 x 96."""
    k = np.array([[120.0, 0, 63.5], [0, 120, 47.5], [0, 0, 1]]) if k is None else k
    depth = np.random.default_rng(0).uniform(4, 9, (96, 128)) if depth is None else depth
    grid = pixel_grid(96, 128).astype(np.float64)
    points = np.concatenate([(grid - k[:2, 2]) / k[0, 0], np.ones((96, 128, 1))], axis=-1) * depth[..., None]
    inverse = invert_rigid(motion)
    there = points @ inverse[:3, :3].T + inverse[:3, 3]
    flow = there[..., :2] / there[..., 2:] * k[0, 0] + k[:2, 2] - grid
    if moved is not None:
        flow[:moved] += 15
    known = Known(intrinsics=np.tile(k, (2, 1, 1)), camera_to_world=np.stack([np.eye(4), motion]))
    return known, PairFlow(np.array([[0, 1]]), flow[None].astype(np.float32), np.ones((1, 96, 128), dtype=bool))


def motion_of(turn_deg=0.0, translation=(0, 0, 0)):
    angle, motion = np.deg2rad(turn_deg), np.eye(4)
    motion[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    motion[:3, 3] = translation
    return motion


def inverted(known):
    return Known(intrinsics=known.intrinsics, camera_to_world=invert_rigid(known.camera_to_world))


MOTIONS = {
    "turn": motion_of(5),
    "sideways": motion_of(0, (0.4, 0, 0)),  # the lines are the same both ways: only the sense of the parallax differs
    "forwards": motion_of(0, (0, 0, 1)),
    "orbit": motion_of(-15, (1.6, 0, 0)),
    "screw": motion_of(6, (0.2, -0.3, 0.4)),
}


@pytest.mark.parametrize("moved", [0, 40])
@pytest.mark.parametrize("motion", MOTIONS.values(), ids=MOTIONS)
def test_each_kind_of_motion_tells_the_direction(motion, moved, fails_with):
    known, flow = two_views(motion, moved=moved)  # up to 40 of 96 rows move on their own
    check_direction(known, flow)
    with fails_with(InputError, "0.0 px inverted"):
        check_direction(inverted(known), flow)


def test_nothing_is_said_on_weak_evidence():
    known, flow = two_views(MOTIONS["screw"])
    wrong = inverted(known)
    with pytest.raises(InputError):
        check_direction(wrong, flow)
    hidden = flow.valid & (np.arange(96) < 40)[:, None]
    check_direction(wrong, PairFlow(flow.pairs, flow.flow, hidden))
    check_direction(wrong, PairFlow(flow.pairs, flow.flow * 0.02, flow.valid))
    check_direction(wrong, PairFlow(np.array([[0, 0]]), flow.flow, flow.valid))
    check_direction(wrong, PairFlow(flow.pairs[:0], flow.flow[:0], flow.valid[:0]))
    check_direction(Known(intrinsics=known.intrinsics), flow)
    unknown = wrong.camera_to_world.copy()
    unknown[1] = np.nan
    check_direction(Known(camera_to_world=unknown), flow)
    unrelated = np.stack([np.eye(4), motion_of(9, (1, 2, 0))])
    for poses in (unrelated, invert_rigid(unrelated)):
        check_direction(Known(intrinsics=known.intrinsics, camera_to_world=poses), flow)


def test_intrinsics_known_of_one_frame_alone(fails_with):
    known, flow = two_views(MOTIONS["screw"])
    intrinsics = known.intrinsics.copy()
    intrinsics[1] = np.nan
    check_direction(Known(intrinsics=intrinsics, camera_to_world=known.camera_to_world), flow)
    with fails_with(InputError, "inverted"):
        check_direction(Known(intrinsics=intrinsics, camera_to_world=invert_rigid(known.camera_to_world)), flow)


def known_at(frames, n):
    poses = np.full((n, 4, 4), np.nan)
    poses[list(frames)] = np.eye(4)
    return Known(camera_to_world=poses)


@pytest.mark.parametrize(
    "frames, n", [(range(12), 12), (range(300), 300), (range(0, 300, 8), 300), ([3, 4, 11, 90, 95], 100), ([1, 2], 5)]
)
def test_pairs_are_few_and_near_and_known(frames, n):
    pairs = pairs_to_check(known_at(frames, n))
    assert pairs.dtype == np.int64 and 1 <= len(pairs) <= 6
    assert len(np.unique(pairs, axis=0)) == len(pairs)
    gaps = pairs[:, 1] - pairs[:, 0]
    assert set(pairs.ravel()) <= set(frames) and gaps.min() >= 1 and gaps.max() <= 9
    if n == 300:
        assert len(pairs) >= 3 and pairs.min() < 20 and pairs.max() > 280
    if len(frames) == n:
        assert {2, 6} <= set(gaps) and gaps.max() == 6


def test_no_pair_without_two_near_poses():
    for known in (Known(), known_at([0], 1), known_at([2], 9), known_at([0, 50, 99], 100)):
        assert pairs_to_check(known).shape == (0, 2)
