"""The verdict without ground truth: what it measures, and what it says of good and of broken reconstructions."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from typing import Any

import numpy as np
import pytest

from easi3r.config import PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import FAMILIES, Family, make_world
from easi3r.errors import InputError
from easi3r.pairs import make_pairs
from easi3r.quality import FAR_OFF, LEAST_PIXELS, measure
from easi3r.structures import AlignedCameras, Array, PairFlow
from easi3r.verdict import judge

WALK = Family(num_movers=3)


def clip_of(family: Family = WALK, width: int = 96, height: int = 64, frozen: bool = False) -> Clip:
    return render(make_world(11, family, num_frames=6), width, height, supersample=1, frozen=frozen)


@functools.cache
def scene_of(*clip: Any) -> tuple[Clip, AlignedCameras, PairFlow]:
    """A clip, its cameras and its flow, all exact."""
    made = clip_of(*clip)
    return made, cameras_of(made), exact_flow(made)


def exact_flow(clip: Clip) -> PairFlow:
    pairs = make_pairs(len(clip.images), PairSettings())
    flow, valid = zip(*(clip.flow(i, j) for i, j in pairs.tolist()), strict=True)
    return PairFlow(pairs, np.stack(flow), np.stack(valid))


def cameras_of(clip: Clip) -> AlignedCameras:
    """The truth, as an alignment would give it."""
    poses = np.linalg.inv(clip.camera_to_world[0]) @ clip.camera_to_world
    ones = np.ones(clip.depth.shape, np.float32)
    return AlignedCameras(poses.astype(np.float32), clip.intrinsics.astype(np.float32), clip.depth, ones)


def verdict(cameras: AlignedCameras, mask: Array, flow: PairFlow | None, **more: Any) -> dict[str, Any]:
    pairs = make_pairs(len(mask), PairSettings()) if flow is None else flow.pairs
    quality = judge([measure(cameras, mask, flow, pairs)], cameras, mask, **more)
    json.dumps(quality, allow_nan=False)  # plain values
    assert all(text.endswith(".") and not text[0].islower() for text in quality["reasons"] + quality["not_checked"])
    assert quality["verdict"] in ("good", "doubtful", "bad")
    assert bool(quality["reasons"]) == (quality["verdict"] != "good")
    return quality


def moved(cameras: AlignedCameras, **changes: Array) -> AlignedCameras:
    return dataclasses.replace(cameras, **changes)


def says(quality: dict[str, Any], *parts: str) -> bool:
    return any(all(part in text for part in parts) for text in quality["reasons"])


# --- measurements


def test_measurements_equal_loops_over_pixels() -> None:
    rng = np.random.default_rng(3)
    n, height, width = 3, 17, 23
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:2, :3, 3] = rng.normal(0, 0.2, (2, 3))
    poses[2] = np.diag([-1.0, 1, -1, 1])  # looks the other way: all is behind it
    intrinsics = np.array([[[f, 0, 10.3], [0, 1.1 * f, 8.8], [0, 0, 1]] for f in rng.uniform(15, 25, n)])
    depth = rng.uniform(1, 3, (n, height, width))
    mask, pairs = rng.random((n, height, width)) < 0.3, make_pairs(n, PairSettings(graph="complete"))
    flow = PairFlow(pairs, rng.normal(0, 1, (len(pairs), height, width, 2)), rng.random((len(pairs), 17, 23)) < 0.8)
    found = measure(AlignedCameras(poses, intrinsics, depth, depth), mask, flow, pairs)

    for k, (i, j) in enumerate(pairs.tolist()):
        residuals: dict[bool, list[float]] = {False: [], True: []}
        amounts, disagreements, angles = [], [], []
        for v in range(height):
            for u in range(width):
                point = poses[i] @ [*(np.linalg.inv(intrinsics[i]) @ [u, v, 1] * depth[i, v, u]), 1]
                x, y, z = (np.linalg.inv(poses[j]) @ point)[:3]
                pixel = (intrinsics[j] @ [x, y, z])[:2] / z
                if flow.valid[k, v, u]:
                    off = math.dist(pixel, [u, v] + flow.flow[k, v, u]) / width if z > 0 else 1.0
                    residuals[bool(mask[i, v, u])].append(min(off, 1.0))
                    if not mask[i, v, u]:
                        amounts.append(np.hypot(*flow.flow[k, v, u]) / width)
                column, row = round(pixel[0]), round(pixel[1])
                inside = z > 0 and -0.5 <= pixel[0] <= width - 0.5 and -0.5 <= pixel[1] <= height - 0.5
                if inside and not mask[i, v, u] and not mask[j, row, column]:
                    disagreements.append(abs(math.log(z / depth[j, row, column])))
                    one, two = point[:3] - poses[i][:3, 3], point[:3] - poses[j][:3, 3]
                    cosine = one @ two / math.hypot(*one) / math.hypot(*two)
                    angles.append(math.degrees(math.acos(min(1, cosine))))
        static = np.array(residuals[False])
        expected = {
            "frame": i,
            "valid": flow.valid[k].mean(),
            "flow": np.median(static),
            "flow_amount": np.median(amounts),
            "flow_far_off": (static > FAR_OFF).mean(),
            "flow_moving": np.median(residuals[True]),
            "depth": np.median(disagreements) if len(disagreements) >= LEAST_PIXELS else np.nan,
            "parallax_deg": np.median(angles) if len(angles) >= LEAST_PIXELS else np.nan,
        }
        for name, value in expected.items():
            np.testing.assert_allclose(getattr(found, name)[k], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} {i} {j}")


def test_units_do_not_matter() -> None:
    clip, cameras, flow = scene_of()
    poses = cameras.camera_to_world.copy()
    poses[:, :3, 3] *= 7
    one = verdict(cameras, clip.dynamic_mask, flow)
    other = verdict(moved(cameras, camera_to_world=poses, depth=7 * cameras.depth), clip.dynamic_mask, flow)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == (pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value), name


def test_flow_may_come_in_another_order_and_lack_pairs() -> None:
    clip, cameras, flow = scene_of()
    whole = measure(cameras, clip.dynamic_mask, flow, flow.pairs)
    some = np.random.default_rng(0).permutation(len(flow.pairs))[3:]
    part = measure(
        cameras, clip.dynamic_mask, PairFlow(flow.pairs[some], flow.flow[some], flow.valid[some]), flow.pairs
    )
    there = np.isin(np.arange(len(flow.pairs)), some)
    np.testing.assert_array_equal(part.flow[there], whole.flow[there])
    assert np.isnan(part.flow[~there]).all()
    np.testing.assert_array_equal(part.depth, whole.depth)


# --- verdicts


@pytest.mark.parametrize(("width", "height"), [(96, 64), (67, 45), (203, 151)])
def test_truth_is_good(width: int, height: int) -> None:
    clip, cameras, flow = scene_of(WALK, width, height)
    quality = verdict(cameras, clip.dynamic_mask, flow)
    assert quality["verdict"] == "good", quality["reasons"]
    assert quality["not_checked"] == []
    assert quality["flow_residual_of_long_side"] < 1e-5
    assert quality["flow_far_off_share"] < 1e-3
    assert quality["depth_disagreement"] < 0.01
    assert quality["flow_residual_px"] == pytest.approx(quality["flow_residual_of_long_side"] * width, abs=1e-4)
    assert quality["moving_share"] == pytest.approx(clip.dynamic_mask.mean(), abs=1e-6)


def test_inverted_masks_are_bad() -> None:
    clip, cameras, flow = scene_of()
    quality = verdict(cameras, ~clip.dynamic_mask, flow)
    assert quality["verdict"] == "bad"
    assert says(quality, "inverted")
    assert quality["flow_residual_static_over_moving"] > 1


def bent_depth(cameras: AlignedCameras, clip: Clip) -> AlignedCameras:
    rng, shape = np.random.default_rng(0), cameras.depth.shape
    coarse = np.exp(0.5 * rng.standard_normal((shape[0], 4, 6)))
    return moved(cameras, depth=(cameras.depth * np.kron(coarse, np.ones((1, 16, 16)))).astype(np.float32))


def turned_poses(cameras: AlignedCameras, clip: Clip) -> AlignedCameras:
    poses = cameras.camera_to_world.copy()
    for pose, angle in zip(poses, np.deg2rad(np.random.default_rng(0).normal(0, 4, len(poses))), strict=True):
        turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
        pose[:3, :3] = pose[:3, :3] @ turn
    return moved(cameras, camera_to_world=poses)


def of_other_frames(cameras: AlignedCameras, clip: Clip) -> AlignedCameras:
    order = np.array([3, 0, 5, 1, 4, 2])
    return AlignedCameras(*(values[order] for values in vars(cameras).values()))


@pytest.mark.parametrize("corrupt", [bent_depth, turned_poses, of_other_frames])
def test_what_does_not_explain_the_flow_is_bad(corrupt: Any) -> None:
    clip, cameras, flow = scene_of()
    quality = verdict(corrupt(cameras, clip), clip.dynamic_mask, flow)
    assert quality["verdict"] == "bad"
    assert says(quality, "optical flow of static pixels", "limit 0.8%")


def test_one_bad_piece_makes_the_clip_bad_in_any_order() -> None:
    clip, cameras, flow = scene_of()
    mask = clip.dynamic_mask
    pieces = [measure(one, mask, flow, flow.pairs) for one in (cameras, bent_depth(cameras, clip))]
    found = [judge(some, cameras, mask) for some in (pieces, pieces[::-1], pieces[:1] * 2)]
    assert [one["verdict"] for one in found] == ["bad", "bad", "good"]
    assert found[0] == found[1]


def test_a_frame_that_flew_off_is_named_wherever_its_piece_begins() -> None:
    clip, cameras, flow = scene_of()
    poses = cameras.camera_to_world.copy()
    poses[4, :3, 3] += [0.8, 0.5, 0]
    lost = moved(cameras, camera_to_world=poses)
    pieces = [measure(one, clip.dynamic_mask, flow, flow.pairs, start=s) for one, s in ((cameras, 0), (lost, 20))]
    quality = judge(pieces, cameras, clip.dynamic_mask)
    assert quality["verdict"] == "bad"
    assert quality["flow_worst_frame"] == 24
    assert says(quality, "At frame 24 ", "limit 5.0%")


def test_a_tripod_has_too_little_parallax_and_is_not_bad() -> None:
    clip, cameras, flow = scene_of(FAMILIES["tripod"])
    quality = verdict(cameras, clip.dynamic_mask, flow)
    assert quality["verdict"] == "doubtful"
    assert says(quality, "parallax", "degrees")
    assert len(quality["reasons"]) == 1
    assert len(quality["not_checked"]) == 1 and "path" in quality["not_checked"][0]
    assert quality["path_over_shortest_tree"] is None


def test_flow_that_fails_on_large_motion_proves_nothing() -> None:
    clip, cameras, flow = scene_of()
    far = np.abs(flow.pairs[:, 0] - flow.pairs[:, 1]) > 1
    wrong, valid = flow.flow.copy(), flow.valid.copy()
    wrong[far] += 9
    valid[far] &= np.random.default_rng(0).random(valid[far].shape) < 0.5
    quality = verdict(cameras, clip.dynamic_mask, PairFlow(flow.pairs, wrong, valid))
    assert quality["verdict"] == "good"


def test_all_moving_leaves_nothing_to_check() -> None:
    clip, cameras, flow = scene_of()
    quality = verdict(cameras, np.ones_like(clip.dynamic_mask), flow)
    assert quality["verdict"] == "doubtful"
    assert says(quality, "100% of the pixels are called moving")
    assert says(quality, "Neither flow")
    assert quality["flow_residual_px"] is None and quality["parallax_deg"] is None
    assert len(quality["not_checked"]) == 2


def test_nothing_moving_is_doubtful() -> None:
    clip, cameras, flow = scene_of(WALK, 96, 64, True)
    quality = verdict(cameras, clip.dynamic_mask, flow)
    assert quality["verdict"] == "doubtful"
    assert says(quality, "Only 0.00% of the pixels")
    assert len(quality["reasons"]) == 1


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize("has_flow", [True, False])
def test_few_frames(num_frames: int, has_flow: bool) -> None:
    clip, whole, flow = scene_of()
    part = slice(0, num_frames)
    cameras = AlignedCameras(*(values[part] for values in vars(whole).values()))
    inside = (flow.pairs < num_frames).all(axis=1)
    some = PairFlow(flow.pairs[inside], flow.flow[inside], flow.valid[inside]) if has_flow and inside.any() else None
    quality = verdict(cameras, clip.dynamic_mask[part], some)
    assert quality["verdict"] == ("doubtful" if num_frames == 1 else "good"), quality["reasons"]
    assert quality["path_over_shortest_tree"] is None
    assert (quality["flow_residual_px"] is None) == (some is None)
    assert (quality["depth_disagreement"] is None) == (num_frames == 1)
    assert len(quality["not_checked"]) == 1 + (some is None) + (num_frames == 1)


def test_masks_of_other_frames_are_refused(fails_with: Any) -> None:
    clip, cameras, _ = scene_of()
    with fails_with(InputError, "(5, 64, 96)", "(6, 64, 96)"):
        measure(cameras, clip.dynamic_mask[:5], None, make_pairs(6, PairSettings()))


# --- path, focal length, seams


def walk(x: Array, turn_deg: Array | None = None) -> AlignedCameras:
    """Cameras at x, 2 from all they see; no measurement goes with them."""
    n = len(x)
    poses = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
    poses[:, 0, 3] = x
    for pose, angle in zip(poses, np.deg2rad(np.zeros(n) if turn_deg is None else turn_deg), strict=True):
        pose[:3, :3] = [[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]]
    depth = np.full((n, 4, 6), 2, np.float32)
    return AlignedCameras(poses, np.tile(np.diag([5.0, 5.0, 1.0]), (n, 1, 1)), depth, depth)


def of_path(cameras: AlignedCameras, **more: Any) -> dict[str, Any]:
    return judge([], cameras, np.zeros(cameras.depth.shape, dtype=bool), **more)


def test_steps_of_the_path_are_known() -> None:
    quality = of_path(walk(np.arange(9) * 0.1))
    assert quality["path_typical_step_deg"] == pytest.approx(np.rad2deg(0.05), abs=1e-4)
    assert quality["path_largest_step_over_typical"] == pytest.approx(1, abs=1e-4)
    assert quality["path_change_over_typical_step"] == pytest.approx(0, abs=1e-4)
    assert quality["path_over_shortest_tree"] == pytest.approx(1, abs=1e-4)
    turning = of_path(walk(np.zeros(9), np.arange(9) * 3.0))
    assert turning["path_typical_step_deg"] == pytest.approx(3, rel=1e-3)


@pytest.mark.parametrize("kind", ["shift", "turn"])
def test_a_jump_is_named_with_its_frame(kind: str) -> None:
    even, jump = np.arange(12.0), np.where(np.arange(12) > 6, 1.0, 0.0)
    cameras = walk(0.02 * even + jump) if kind == "shift" else walk(0.02 * even, 30 * jump)
    quality = of_path(cameras)
    assert says(quality, "jumps", "after frame 6,")
    assert quality["path_largest_step_after_frame"] == 6
    assert quality["verdict"] == "doubtful"


def test_noise_of_a_resting_camera_is_no_jump() -> None:
    rng = np.random.default_rng(0)
    quality = of_path(walk(rng.normal(0, 0.003, 40)))
    assert not says(quality, "camera")


def test_random_order_is_bad_and_to_and_fro_is_not() -> None:
    there = 0.1 * np.arange(16.0)
    assert not says(of_path(walk(there)), "order")
    assert not says(of_path(walk(np.tile(np.concatenate([there, there[::-1]]), 3))), "order")
    shuffled = of_path(walk(np.random.default_rng(0).permutation(there)))
    assert says(shuffled, "out of order") and shuffled["verdict"] == "bad"


def test_focal_lengths_that_drift() -> None:
    cameras = walk(np.arange(5) * 0.1)
    cameras.intrinsics[3, 0, 0] *= 1.25
    assert says(of_path(cameras), "focal length drifts by 25%")
    assert not says(of_path(walk(np.arange(5) * 0.1)), "ocal")


@pytest.mark.parametrize(("seam", "expected"), [(0.01, "doubtful"), (0.08, "doubtful"), (0.4, "bad")])
def test_the_worst_seam_counts(seam: float, expected: str) -> None:
    quality = of_path(walk(np.arange(5) * 0.1), seams=[0.0, seam, 0.001])
    assert quality["seam_residual_largest"] == seam
    assert quality["verdict"] == expected  # without any measurement, never good
    assert says(quality, "Joined pieces") == (seam > 0.05)
