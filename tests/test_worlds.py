"""The rendered worlds are the truth that other tests rest on, so they are checked against themselves here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from easi3r.demo.rendering import Clip, observe, render
from easi3r.demo.worlds import FAMILIES, Family, World, make_world, make_worlds, rotation
from easi3r.metrics import umeyama
from evaluation.pair_predictions import synthetic_predictions

Array = NDArray[Any]
SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=SEEDS)
def clip(request: pytest.FixtureRequest) -> Clip:
    return render(make_world(request.param))


@pytest.fixture(scope="module")
def twin(clip: Clip) -> Clip:
    return render(clip.world, frozen=True)


def pixel_grid(clip: Clip) -> Array:
    height, width = clip.depth.shape[1:]
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float64)


def reproject(clip: Clip, i: int, j: int) -> tuple[Array, Array]:
    """Pixels [H, W, 2] and z-depth [H, W] in frame j of frame i's depth, by the camera matrices alone."""
    homogeneous = np.concatenate([pixel_grid(clip), np.ones((*clip.depth.shape[1:], 1))], axis=-1)
    points = homogeneous @ np.linalg.inv(clip.intrinsics[i]).T * clip.depth[i, ..., None]
    i_to_j = np.linalg.inv(clip.camera_to_world[j]) @ clip.camera_to_world[i]
    projected = (points @ i_to_j[:3, :3].T + i_to_j[:3, 3]) @ clip.intrinsics[j].T
    return projected[..., :2] / projected[..., 2:], projected[..., 2]


def sample(image: Array, pixels: Array, interpolation: int = cv2.INTER_LINEAR) -> Array:
    x, y = np.moveaxis(pixels.astype(np.float32), -1, 0)
    return cv2.remap(image.astype(np.float32), x, y, interpolation, borderMode=cv2.BORDER_REPLICATE)


def away_from_edges(clip: Clip, frame: int) -> Array:
    """True where all of the 5 x 5 pixels around belong to one object."""
    ids = clip.object_ids[frame].astype(np.uint8)
    return np.asarray(cv2.erode(ids, np.ones((5, 5))) == cv2.dilate(ids, np.ones((5, 5))))


def differing(world: World, other: World) -> list[str]:
    tensors = {**vars(world), **vars(world.texture)}
    others = {**vars(other), **vars(other.texture)}
    return [key for key, value in tensors.items() if isinstance(value, torch.Tensor) and not value.equal(others[key])]


# --- clips ---------------------------------------------------------------------------------------------------------


def test_shapes_and_conventions(clip: Clip) -> None:
    n, height, width = 12, 96, 128
    assert clip.images.shape == (n, height, width, 3) and clip.images.dtype == np.uint8
    assert clip.depth.shape == (n, height, width) and clip.depth.dtype == np.float32
    assert clip.camera_to_world.shape == (n, 4, 4) and clip.intrinsics.shape == (n, 3, 3)
    assert clip.object_ids.shape == clip.dynamic_mask.shape == (n, height, width)
    np.testing.assert_allclose(clip.intrinsics[:, :2, 2], [[(width - 1) / 2, (height - 1) / 2]] * n)
    rotation = clip.camera_to_world[:, :3, :3]
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(3), (n, 1, 1)), atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(rotation), 1)
    assert (rotation[:, 1, 1] > 0.9).all(), "the camera's y axis points down, and so does the world's"


def test_static_flow_is_what_the_cameras_say(clip: Clip) -> None:
    for i, j in [(0, 1), (0, 11), (7, 2)]:
        flow, visible = clip.flow(i, j)
        static = visible & ~clip.dynamic_mask[i]
        assert static.mean() > 0.3
        expected = reproject(clip, i, j)[0] - pixel_grid(clip)
        np.testing.assert_allclose(flow[static], expected[static], atol=1e-3)
        np.testing.assert_allclose(clip.flow(i, j, camera_only=True)[0], expected, atol=1e-3)


def test_colours_travel_with_the_flow(clip: Clip) -> None:
    for i, j in [(4, 5), (2, 5)]:
        flow, visible = clip.flow(i, j)
        here, there = pixel_grid(clip), pixel_grid(clip) + flow
        error = np.abs(sample(clip.images[j], there, cv2.INTER_CUBIC) - clip.images[i]).mean(-1)
        unmoved = np.abs(sample(clip.images[j], here) - clip.images[i]).mean(-1)
        inner = visible & away_from_edges(clip, i)
        # Movers turn in the light: their shade changes a little from frame to frame.
        for moving, limit in ((False, 4.0), (True, 4.0 * (j - i))):
            region = inner & (clip.dynamic_mask[i] == moving)
            assert np.median(error[region]) < limit
            assert np.median(error[region]) < 0.5 * np.median(unmoved[region])


def test_depths_of_two_frames_are_one_surface(clip: Clip) -> None:
    for i, j in [(4, 5), (1, 9)]:
        pixels, depth = reproject(clip, i, j)
        _, visible = clip.flow(i, j)
        near = np.clip(pixels.round().astype(int), 0, np.array([127, 95]))
        inner = away_from_edges(clip, j)[near[..., 1], near[..., 0]]
        region = visible & away_from_edges(clip, i) & inner & ~clip.dynamic_mask[i]
        error = np.abs(sample(clip.depth[j], pixels) - depth)[region] / depth[region]
        assert region.mean() > 0.3
        assert np.median(error) < 1e-3 and np.percentile(error, 99) < 0.02


def test_hidden_pixels_are_nearer_in_the_other_frame(clip: Clip) -> None:
    i, j = 0, 11
    flow, visible = clip.flow(i, j)
    pixels, depth = reproject(clip, i, j)
    inside = ((pixels >= 0) & (pixels <= [127, 95])).all(-1)
    hidden = inside & ~visible & ~clip.dynamic_mask[i]
    assert hidden.any()
    assert (sample(clip.depth[j], pixels)[hidden] < depth[hidden] * 1.001).mean() > 0.95
    assert not (
        visible & ~((pixel_grid(clip) + flow > -0.01) & (pixel_grid(clip) + flow < [127.01, 95.01])).all(-1)
    ).any()


def test_a_frame_flows_to_itself_unchanged(clip: Clip) -> None:
    flow, visible = clip.flow(3, 3)
    assert visible.mean() > 0.999 and np.abs(flow[visible]).max() < 1e-4


def test_dynamic_mask_is_where_the_objects_move(clip: Clip) -> None:
    for i, j in [(0, 11), (5, 8)]:
        own = np.linalg.norm(clip.flow(i, j)[0] - clip.flow(i, j, camera_only=True)[0], axis=-1)
        assert own[~clip.dynamic_mask[i]].max() < 1e-4
        assert (own[clip.dynamic_mask[i]] > 1e-2).mean() > 0.99


def test_the_frozen_twin_has_the_same_cameras_and_no_motion(clip: Clip, twin: Clip) -> None:
    np.testing.assert_array_equal(twin.camera_to_world, clip.camera_to_world)
    assert not twin.dynamic_mask.any()
    assert twin.mover_mask.any(), "the movers are still there"
    for i, j in [(0, 11), (4, 5)]:
        np.testing.assert_allclose(twin.flow(i, j)[0], reproject(twin, i, j)[0] - pixel_grid(twin), atol=1e-3)
    static = ~(clip.mover_mask | twin.mover_mask)
    np.testing.assert_allclose(clip.depth[static], twin.depth[static])


def test_the_twin_holds_the_movers_where_the_clip_has_them_at_half_time() -> None:
    world = make_world(4, num_frames=5)
    clip, twin = render(world), render(world, frozen=True)
    np.testing.assert_array_equal(twin.images[2], clip.images[2])
    assert (twin.images[0] != clip.images[0]).any()


# --- worlds --------------------------------------------------------------------------------------------------------


def test_a_seed_is_a_world() -> None:
    assert differing(make_world(7), make_world(7)) == []
    torch.manual_seed(0)  # the global generator has no say
    clip, again = render(make_world(7), 64, 48), render(make_world(7), 64, 48)
    for field in fields(clip):
        if field.name != "world":
            np.testing.assert_array_equal(getattr(clip, field.name), getattr(again, field.name))
    assert "light" in differing(make_world(7), make_world(8))


def test_more_frames_sample_the_same_walk() -> None:
    coarse, fine = make_world(3, num_frames=4), make_world(3, num_frames=7)
    np.testing.assert_allclose(coarse.camera_to_world, fine.camera_to_world[:, ::2], atol=1e-12)
    np.testing.assert_allclose(coarse.object_to_world, fine.object_to_world[:, ::2], atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_worlds_made_together_are_the_worlds_made_alone(name: str) -> None:
    together = make_worlds([3, 4], FAMILIES[name], num_frames=2)
    alone = make_world(4, FAMILIES[name], num_frames=2)
    np.testing.assert_array_equal(together.object_to_world[1:], alone.object_to_world)
    views, view = (observe(world, 32, 24) for world in (together, alone))
    np.testing.assert_array_equal(views.surface[1:], view.surface)
    np.testing.assert_allclose(views.images[1:], view.images, atol=1e-6)


def test_fewer_rays_at_once_change_nothing() -> None:
    world = make_worlds([0, 1], num_frames=3)
    at_once, one_by_one = observe(world, 32, 24, rays_at_once=1 << 20), observe(world, 32, 24, rays_at_once=1)
    for field in fields(at_once):
        np.testing.assert_allclose(getattr(at_once, field.name), getattr(one_by_one, field.name), atol=1e-6)


@pytest.mark.parametrize(("name", "count"), [(name, 1000 if name == "sharp" else 100) for name in FAMILIES])
def test_no_world_is_degenerate(name: str, count: int) -> None:
    """No empty view, no camera in an object or outside the room, no object gone, nothing at the camera's nose."""
    family = FAMILIES[name]
    for first in range(0, count, 100):
        world = make_worlds(range(first, first + 100), family, num_frames=5)
        position = world.camera_to_world[:, :, None, :, 3:]
        unit = (torch.linalg.inv(world.object_to_world) @ position)[..., :3, 0] / world.half_extents[:, None]
        ellipsoid = world.is_ellipsoid[:, None]
        inside = torch.where(ellipsoid, unit.square().sum(-1) <= 1, unit.abs().amax(-1) <= 1)
        assert inside[..., 0].all(), "in the room"
        assert not inside[..., 1:].any()
        assert (world.moves.sum(1) == family.num_movers).all() and not world.moves[:, 0].any()
        views = observe(world.to("cpu", torch.float32), 48, 36)
        assert torch.isfinite(views.depth).all() and views.depth.min() > 0.2
        in_sight = (views.surface > 0).float().mean((2, 3))
        assert in_sight.min() > 0.02 and in_sight.max() < 0.95, "objects and room, in every frame"
        assert (views.images.std((2, 3)).mean(-1) > 0.02).all(), "something to see"


def test_rotations_are_what_scipy_makes_of_them() -> None:
    vectors = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vectors[0] = 0
    np.testing.assert_allclose(rotation(vectors), Rotation.from_rotvec(vectors.numpy()).as_matrix(), atol=1e-12)


def test_moving_pixels_and_walks_are_of_the_promised_size() -> None:
    worlds = make_worlds(range(40)).to("cpu", torch.float32)
    views = observe(worlds, 64, 48)
    moving = worlds.moves.gather(1, views.surface.flatten(1)).float().mean(1)
    assert moving.min() > 0.003 and moving.max() < 0.4 and 0.05 < moving.median() < 0.3
    way = (worlds.camera_to_world[:, 0, :3, 3] - worlds.camera_to_world[:, -1, :3, 3]).norm(dim=-1)
    share = way / views.depth.flatten(1).median(dim=1).values
    assert share.min() > 0.03 and share.max() < 0.45 and (share > 0.05).float().mean() > 0.9
    assert worlds.fov_deg.max() - worlds.fov_deg.min() > 5


def test_a_tripod_stands_still() -> None:
    cameras = make_world(0, FAMILIES["tripod"]).camera_to_world[0]
    np.testing.assert_allclose(cameras, cameras[:1].expand_as(cameras), atol=1e-12)


@pytest.mark.parametrize(("num_frames", "width", "height"), [(1, 128, 96), (2, 37, 53), (3, 1, 1)])
def test_one_frame_and_odd_sizes(num_frames: int, width: int, height: int) -> None:
    clip = render(make_world(5, num_frames=num_frames), width, height)
    assert clip.images.shape == (num_frames, height, width, 3)
    assert np.isfinite(clip.depth).all() and (clip.depth > 0).all()
    flow, visible = clip.flow(0, num_frames - 1)
    assert flow.shape == (height, width, 2) and visible.shape == (height, width)


def test_empty_rooms_render() -> None:
    clip = render(make_world(0, Family(num_movers=0, num_static=0), num_frames=2), 32, 24)
    assert not clip.object_ids.any() and not clip.dynamic_mask.any()


def test_optical_flow_can_follow_the_texture(clip: Clip) -> None:
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    dis.setFinestScale(0)
    grey = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in clip.images]
    flow, visible = clip.flow(5, 6)
    error = np.linalg.norm(dis.calc(grey[5], grey[6], None) - flow, axis=-1)
    assert np.median(error[visible & ~clip.dynamic_mask[5]]) < 0.3


# --- pair predictions ----------------------------------------------------------------------------------------------

PAIRS = np.array([[0, 1], [3, 0], [2, 5]])


def test_predictions_without_noise_are_the_truth(clip: Clip) -> None:
    for hard in (False, True):
        predictions = synthetic_predictions(clip, PAIRS, hard=hard, seed=0, noise=0)
        assert predictions.points_first.dtype == torch.float32
        assert predictions.points_second.shape == (3, 96, 128, 3)
        assert (predictions.confidence_first == 8).all() and (predictions.confidence_second == 6).all()
        for index, (a, b) in enumerate(PAIRS):
            np.testing.assert_allclose(predictions.points_first[index, ..., 2], clip.depth[a], rtol=1e-6)
            pixels, depth = reproject(clip, b, a)
            second = predictions.points_second[index].double().numpy()
            np.testing.assert_allclose(second[..., 2], depth, rtol=1e-5)
            projected = second @ clip.intrinsics[a].T
            np.testing.assert_allclose(projected[..., :2] / projected[..., 2:], pixels, atol=1e-3)


def test_easy_noise_is_one_factor_per_point(clip: Clip) -> None:
    truth, easy = (synthetic_predictions(clip, PAIRS, hard=False, seed=1, noise=noise) for noise in (0, 1))
    ratio = easy.points_second / truth.points_second
    np.testing.assert_allclose(ratio[..., 0], ratio[..., 2], rtol=1e-3)
    for index, (a, b) in enumerate(PAIRS):
        first, second = (easy.points_first / truth.points_first)[index, ..., 2], ratio[index, ..., 2]
        pair_scale = np.median(first)
        assert np.isclose(np.median(second), pair_scale, rtol=0.01), "both views share the pair's scale"
        for factor, moving in ((first, clip.dynamic_mask[a]), (second, clip.dynamic_mask[b])):
            factor = np.asarray(factor / pair_scale)
            assert np.isclose(factor[~moving].std(), 0.02, atol=0.002)
            assert 0.15 < (np.abs(factor[moving] - 1) > 0.08).mean() < 0.35
    assert torch.unique(ratio.flatten(1).median(dim=1).values).numel() == len(PAIRS)


def test_hard_noise_turns_the_second_camera_and_bends_the_points(clip: Clip) -> None:
    pairs = np.tile([[0, 6]], (40, 1))
    truth, easy, hard = (
        synthetic_predictions(clip, pairs, hard=is_hard, seed=2, noise=noise)
        for is_hard, noise in ((False, 0), (False, 1), (True, 1))
    )
    smooth = (hard.points_first / easy.points_first)[..., 2]
    assert 0.02 < smooth.log().std() < 0.08
    assert smooth.diff(dim=-1).abs().max() < 0.02, "smooth"
    angles, shifts = [], []
    static = ~clip.dynamic_mask[6]
    for index in range(len(pairs)):
        points, true_points = (p.points_second[index].double().numpy()[static] for p in (hard, truth))
        found = umeyama(true_points, points)
        angles.append(np.rad2deg(Rotation.from_matrix(found.rotation).magnitude()))
        shifts.append(found.translation / found.scale)
    # The pose errors, and what a fit to the bent points adds to them.
    assert 1.5 < np.sqrt(np.mean(np.square(angles))) < 5
    assert 0.1 < np.linalg.norm(np.std(shifts, axis=0)) < 1.5


def test_predictions_repeat_with_their_seed(clip: Clip) -> None:
    one, same, other = (synthetic_predictions(clip, PAIRS, hard=True, seed=seed) for seed in (3, 3, 4))
    assert one.points_second.equal(same.points_second) and not one.points_second.equal(other.points_second)
