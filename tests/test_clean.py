"""Floaters that other frames look through, and the depth edges where they arise."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest

from easi3r.clean import clean_confidence
from easi3r.config import PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import make_world
from easi3r.geometry import depth_edges, pixel_grid
from easi3r.pairs import make_pairs
from easi3r.scene import Scene
from easi3r.structures import Array, AttentionMaps


@functools.cache
def world(seed: int) -> Clip:
    return render(make_world(seed), supersample=1)


def values_of(clip: Clip, seed: int = 0) -> dict[str, Any]:
    """The true clip with random confidences, as keywords of ``clean_confidence``."""
    confidence = 1 + np.random.default_rng(seed).gamma(2, 2, clip.depth.shape)
    return {
        "depth": clip.depth,
        "confidence": confidence.astype(np.float32),
        "intrinsics": clip.intrinsics,
        "camera_to_world": clip.camera_to_world,
        "dynamic_mask": clip.dynamic_mask,
        "pairs": make_pairs(len(clip.depth), PairSettings()),
    }


def with_floaters(values: dict[str, Any], share: float = 0.01) -> tuple[dict[str, Any], Array]:
    """A share of the static pixels at 0.6 of their depth, of little confidence."""
    floaters = (np.random.default_rng(1).random(values["depth"].shape) < share) & ~values["dynamic_mask"]
    depth = np.where(floaters, np.float32(0.6) * values["depth"], values["depth"])
    confidence = np.where(floaters, np.float32(1.01), np.maximum(values["confidence"], 1.5)).astype(np.float32)
    return values | {"depth": depth, "confidence": confidence}, floaters


def clean_by_loops(
    depth: Array,
    confidence: Array,
    intrinsics: Array,
    camera_to_world: Array,
    dynamic_mask: Array,
    pairs: Array,
    tolerance: float = 0.05,
) -> Array:
    cleaned = confidence.copy()
    _, height, width = depth.shape
    for i, j in pairs.tolist():
        i_to_j = np.linalg.inv(camera_to_world[j]) @ camera_to_world[i]
        for v in range(height):
            for u in range(width):
                ray = np.linalg.inv(intrinsics[i]) @ [u, v, 1]
                point = (i_to_j @ [*(ray * depth[i, v, u]), 1])[:3]
                if dynamic_mask[i, v, u] or point[2] <= 0:
                    continue
                x, y, _ = intrinsics[j] @ point / point[2]
                column, row = round(x), round(y)
                if not (0 <= column < width and 0 <= row < height) or dynamic_mask[j, row, column]:
                    continue
                rows = {min(max(r, 0), height - 1) for r in (math.floor(y), math.floor(y) + 1)}
                columns = {min(max(c, 0), width - 1) for c in (math.floor(x), math.floor(x) + 1)}
                surface = min(depth[j, r, c] for r in rows for c in columns)
                if point[2] < (1 - tolerance) * surface and confidence[i, v, u] < confidence[j, row, column]:
                    cleaned[i, v, u] = 1
    return cleaned


# --- clean_confidence


@pytest.mark.parametrize("tolerance", [0.05, 0.3])
def test_cleaning_equals_a_loop_over_pixels(tolerance: float) -> None:
    rng = np.random.default_rng(5)
    n, height, width = 4, 12, 16
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:3, :3, 3] = rng.normal(0, 0.2, (3, 3))
    poses[3] = np.diag([-1.0, 1, -1, 1])  # looks the other way: all is behind it
    intrinsics = np.array([[[f, 0, 7.3], [0, 1.1 * f, 5.8], [0, 0, 1]] for f in rng.uniform(9, 20, n)])
    depth = np.where(rng.random((n, height, width)) < 0.25, 1, 3) * rng.uniform(0.8, 1.2, (n, height, width))
    values = {
        "depth": depth.astype(np.float32),
        "confidence": rng.uniform(1, 4, (n, height, width)).astype(np.float32),
        "intrinsics": intrinsics,
        "camera_to_world": poses,
        "dynamic_mask": rng.random((n, height, width)) < 0.2,
        "pairs": make_pairs(n, PairSettings(graph="complete")),
    }
    found = clean_confidence(**values, tolerance=tolerance)
    assert 0.01 < (found == 1).mean() < 0.5 and (found[3] != 1).all()
    np.testing.assert_array_equal(found, clean_by_loops(**values, tolerance=tolerance))


@pytest.mark.parametrize("seed", [3, 5, 8])
def test_a_consistent_scene_loses_nothing(seed: int) -> None:
    values = values_of(world(seed))
    lost = clean_confidence(**values) != values["confidence"]
    assert lost.mean() < 1e-4 and not (lost & values["dynamic_mask"]).any()


@pytest.mark.parametrize("seed", [3, 5, 8])
def test_floaters_lose_their_confidence_and_nothing_else_changes(seed: int) -> None:
    values, floaters = with_floaters(values_of(world(seed)))
    before = {name: value.copy() for name, value in values.items()}
    found = clean_confidence(**values)
    lost = found != values["confidence"]
    assert (found[lost] == 1).all() and found.dtype == np.float32
    assert lost[floaters].mean() > 0.95
    assert lost[~floaters].mean() < 1e-4
    for name, value in before.items():
        np.testing.assert_array_equal(values[name], value)


def test_cameras_and_depth_in_single_precision_are_enough() -> None:
    values, _ = with_floaters(values_of(world(3)))
    single = values | {name: values[name].astype(np.float32) for name in ("intrinsics", "camera_to_world")}
    assert (clean_confidence(**values) != clean_confidence(**single)).mean() < 1e-4


@pytest.mark.parametrize(("others", "stays"), [(1.9, True), (2.0, True), (2.1, False)])
def test_only_a_more_confident_surface_takes(others: float, stays: bool) -> None:
    values, floaters = with_floaters(values_of(world(3)))
    confidence = np.where(floaters, np.float32(2), np.float32(others))
    found = clean_confidence(**values | {"confidence": confidence})
    kept = found == confidence
    assert kept.all() if stays else kept[floaters].mean() < 0.05


def test_moving_pixels_neither_lose_nor_take() -> None:
    values, floaters = with_floaters(values_of(world(3)))
    they_move = clean_confidence(**values | {"dynamic_mask": values["dynamic_mask"] | floaters})
    np.testing.assert_array_equal(they_move, values["confidence"])
    behind_them_moves = clean_confidence(**values | {"dynamic_mask": ~floaters})
    np.testing.assert_array_equal(behind_them_moves, values["confidence"])


def test_the_order_of_the_pairs_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    values, _ = with_floaters(values_of(world(3)), share=0.1)
    values["confidence"] = 1 + rng.gamma(2, 2, values["depth"].shape).astype(np.float32)
    expected = clean_confidence(**values)
    for pairs in (values["pairs"][::-1], rng.permutation(values["pairs"]), np.repeat(values["pairs"], 2, axis=0)):
        np.testing.assert_array_equal(clean_confidence(**values | {"pairs": pairs}), expected)


def test_only_the_pairs_given_are_looked_at() -> None:
    values, _ = with_floaters(values_of(world(3)))
    found = clean_confidence(**values | {"pairs": np.array([[4, 5]])})
    changed = (found != values["confidence"]).any(axis=(1, 2))
    assert changed.tolist() == [i == 4 for i in range(len(changed))]


@pytest.mark.parametrize("shape", [(12, 16), (1, 1), (1, 7)])
def test_one_frame_returns_an_equal_array(shape: tuple[int, int]) -> None:
    confidence = np.random.default_rng(0).uniform(1, 3, (1, *shape)).astype(np.float32)
    one = np.ones((1, *shape), np.float32), confidence, np.eye(3)[None], np.eye(4)[None], np.zeros((1, *shape), bool)
    for pairs in (np.zeros((1, 2), dtype=np.int64), np.zeros((0, 2), dtype=np.int64)):
        found = clean_confidence(*one, pairs)
        np.testing.assert_array_equal(found, confidence)
        assert found is not confidence


# --- depth_edges


def plane(height: int = 40, width: int = 60) -> Array:
    """Exact z-depth of a slanted plane, which the view nearly grazes at the top."""
    x, y = np.moveaxis(pixel_grid(height, width).astype(np.float64), -1, 0)
    return (1 / (0.001 + 0.01 * y + 0.002 * x)).astype(np.float32)


def edges_by_loops(depth: Array, tolerance: float = 0.05) -> Array:
    """Of one image; every pair of neighbours by itself."""
    edges = np.zeros(depth.shape, dtype=bool)
    for inverse, marked in ((1 / depth, edges), ((1 / depth).T, edges.T)):
        for line, out in zip(inverse, marked, strict=True):
            for a in range(len(line) - 1):
                b, least = a + 1, tolerance * max(line[a], line[a + 1])
                bends = [line[c - 1] - 2 * line[c] + line[c + 1] for c in (a, b) if 0 < c < len(line) - 1]
                if abs(line[a] - line[b]) > least and any(abs(bend) > least for bend in bends):
                    out[a] = out[b] = True
    return edges


def test_edges_equal_a_loop_over_neighbours() -> None:
    depth = np.random.default_rng(0).uniform(1, 1.1, (3, 9, 13))
    found = depth_edges(depth)
    assert 0.1 < found.mean() < 0.9
    np.testing.assert_array_equal(found, [edges_by_loops(image) for image in depth])


def test_planes_have_no_edges_however_slanted() -> None:
    depth = plane()
    assert (depth[:-1] / depth[1:]).max() > 3  # neighbours differ by far more than the tolerance
    assert not depth_edges(depth).any()
    assert not depth_edges(np.full((30, 40), 3.0)).any()


def test_a_fold_is_not_an_edge() -> None:
    depth = np.minimum(plane(), 12)  # the floor meets a wall where the floor recedes by 4 % from row to row at least
    assert not depth_edges(depth, tolerance=0.15).any()
    assert not depth_edges(np.minimum(1 / (0.1 + 0.004 * np.arange(60.0)), 5.0)[None].repeat(4, 0)).any()


@pytest.mark.parametrize("step", [0.9, 1.1, 5.0])
def test_a_step_is_an_edge_on_both_sides(step: float) -> None:
    depth = plane() * np.where(np.arange(60) < 25, 1, step).astype(np.float32)
    expected = np.zeros(depth.shape, dtype=bool)
    expected[:, 24:26] = True
    np.testing.assert_array_equal(depth_edges(depth), expected)
    rows = np.ones((40, 60)) * np.where(np.arange(40) < 39, 1, step)[:, None]  # at the image's border
    assert np.flatnonzero(depth_edges(rows).any(axis=1)).tolist() == [38, 39]


@pytest.mark.parametrize("between", [1.2, 4 / 3, 1.8])  # 4 / 3: half way in inverse depth, where nothing bends
def test_a_pixel_that_hangs_between_two_surfaces_is_on_an_edge(between: float) -> None:
    depth = np.array([1, 1, 1, between, 2, 2, 2.0])[None].repeat(3, 0)
    assert depth_edges(depth).all(axis=0).tolist() == [False, False, True, True, True, False, False]


def test_a_jump_within_the_tolerance_is_no_edge() -> None:
    depth = np.where(np.arange(20) < 10, 1.0, 1.04)[None].repeat(3, 0)
    assert not depth_edges(depth).any()
    assert depth_edges(depth, tolerance=0.03).any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1, 1), (2, 3, 4, 5)])
def test_edges_of_any_shape(shape: tuple[int, ...]) -> None:
    found = depth_edges(np.random.default_rng(0).uniform(1, 9, shape).astype(np.float32))
    assert found.shape == shape and found.dtype == bool
    assert found.any() == (shape[-1] > 2)  # of two pixels none can tell a step from a slant


def test_a_line_of_pixels_has_edges_along_itself() -> None:
    line = np.where(np.arange(9) < 4, 1.0, 2.0)
    assert depth_edges(line[None])[0].nonzero()[0].tolist() == [3, 4]
    assert depth_edges(line[:, None])[:, 0].nonzero()[0].tolist() == [3, 4]


def test_depth_that_is_no_number_makes_no_edge_and_no_warning() -> None:
    depth = np.ones((5, 5))
    depth[2, 2], depth[0, 0], depth[4, 4] = np.nan, 0, np.inf
    with np.errstate(all="raise"):
        assert not depth_edges(depth)[[2, 0], [2, 0]].any()


@pytest.mark.parametrize("seed", [3, 5, 8])
def test_edges_of_a_rendered_world_are_the_outlines_of_its_objects(seed: int) -> None:
    ids = world(seed).object_ids
    outline = np.zeros(ids.shape, dtype=bool)
    for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
        shifted = np.pad(ids, ((0, 0), (1, 1), (1, 1)), mode="edge")[:, 1 + dy :, 1 + dx :]
        outline |= shifted[:, : ids.shape[1], : ids.shape[2]] != ids
    edges = depth_edges(world(seed).depth)
    assert outline[edges].mean() > 0.9 and edges.mean() > 0.03


# --- Scene.points


def scene_of(clip: Clip) -> Scene:
    n, height, width = clip.depth.shape
    return Scene(
        images=clip.images,
        dynamic_score=clip.dynamic_mask.astype(np.float32),
        dynamic_mask=clip.dynamic_mask,
        attention=AttentionMaps(*(np.zeros((n, height // 16, width // 16), np.float32) for _ in range(5))),
        timestamps=np.arange(n) / 10,
        meta={},
        camera_to_world=clip.camera_to_world.astype(np.float32),
        intrinsics=clip.intrinsics.astype(np.float32),
        depth=clip.depth,
        confidence=values_of(clip)["confidence"],
        valid_mask=np.ones(clip.depth.shape, dtype=bool),
    )


def test_points_keep_edges_unless_told_otherwise() -> None:
    scene = scene_of(world(3))
    everything, inner = scene.points(), scene.points(edges=False)
    assert len(everything.points) == scene.depth.size
    kept = ~depth_edges(scene.depth).ravel()
    for found, expected in zip(inner, everything, strict=True):
        np.testing.assert_array_equal(found, expected[kept])


def test_leaving_out_edges_goes_with_the_other_choices() -> None:
    scene = scene_of(world(3))
    found = scene.points([-1, 2], keep="static", min_confidence=3.0, edges=False)
    for frame in (scene.num_frames - 1, 2):
        chosen = ~depth_edges(scene.depth[frame]) & ~scene.dynamic_mask[frame] & (scene.confidence[frame] >= 3)
        np.testing.assert_array_equal(found.colors[found.frame_index == frame], scene.images[frame][chosen])
