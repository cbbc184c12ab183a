"""Points land where they project, the nearest wins, gaps are filled; and videos of it, decoded again."""

from __future__ import annotations

import imageio.v3 as iio
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from viewer_scenes import is_blue, is_red, make_scene, project, square_center

from easi3r.decoding import video_stream
from easi3r.errors import InputError, OutputError
from easi3r.viewer import video
from easi3r.viewer.cameras import View, frame_rate, orbit_shots, path_shots, recovered_views
from easi3r.viewer.shown import shown_points
from easi3r.viewer.splatting import MAX_RADIUS, Picture, fill_holes, splat

WIDTH, HEIGHT = 40, 30


def make_view(seed=0):
    pose = np.eye(4)
    pose[:3, :3] = Rotation.random(rng=np.random.default_rng(seed)).as_matrix()
    pose[:3, 3] = (0.3, -0.2, 0.5)
    return View(pose, np.array([[35.0, 0, 18.3], [0, 33.0, 14.2], [0, 0, 1]]), WIDTH, HEIGHT)


def world_point(view, x, y, z):
    """What is seen at a pixel, at depth z."""
    camera = z * np.linalg.inv(view.intrinsics) @ [x, y, 1]
    return (view.camera_to_world[:3, :3] @ camera + view.camera_to_world[:3, 3]).astype(np.float32)


def slow_splat(points, colors, sizes, view):
    """The obvious twin: every point, every pixel of its square."""
    image, depth = np.zeros((view.height, view.width, 3), dtype=np.uint8), np.full((view.height, view.width), np.inf)
    world_to_camera = np.linalg.inv(view.camera_to_world)
    for point, color, size in zip(points, colors, sizes, strict=True):
        x, y, z = view.intrinsics @ (world_to_camera[:3, :3] @ point + world_to_camera[:3, 3])
        if z <= 0:
            continue
        column, row = int(np.floor(x / z + 0.5)), int(np.floor(y / z + 0.5))
        r = int(np.clip(np.ceil((size * view.intrinsics[0, 0] / z - 1) / 2), 0, MAX_RADIUS))
        for v in range(max(0, row - r), min(view.height, row + r + 1)):
            for u in range(max(0, column - r), min(view.width, column + r + 1)):
                if z < depth[v, u]:
                    image[v, u], depth[v, u] = color, z
    return image, depth


# --- points


def test_a_point_lands_on_its_pixel_with_its_color_and_depth():
    view = make_view()
    image, depth = splat(world_point(view, 12.4, 7.6, 3.0)[None], np.uint8([[10, 20, 30]]), 0.0, view)
    assert np.argwhere(np.isfinite(depth)).tolist() == [[8, 12]]  # row, column
    assert image[8, 12].tolist() == [10, 20, 30] and image.sum() == 60
    assert depth[8, 12] == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_nearer_point_hides_the_farther_one(order):
    view = make_view(1)
    points = np.stack([world_point(view, 20, 10, 2.0), world_point(view, 20, 10, 2.001)])[order]
    image, _ = splat(points, np.uint8([[255, 0, 0], [0, 255, 0]])[order], 0.0, view)
    assert image[10, 20].tolist() == [255, 0, 0]


def test_what_is_behind_the_camera_or_beyond_the_picture_is_not_drawn():
    view = make_view(2)
    points = np.stack([world_point(view, 5, 5, -2.0), world_point(view, 60, 5, 2.0), world_point(view, 5, 5, 0.0)])
    assert np.isinf(splat(points, np.zeros((3, 3), dtype=np.uint8), 0.1, view).depth).all()
    assert np.isinf(splat(points[:0], np.zeros((0, 3), dtype=np.uint8), 0.1, view).depth).all()


def test_a_square_grows_with_nearness_and_is_cut_at_the_border():
    view = make_view(3)
    for x, y, z, expected in ((20, 15, 4.0, 9), (20, 15, 2.0, 25), (0, 0, 4.0, 4), (-1, 5, 4.0, 3), (-2, 5, 4.0, 0)):
        size = 2.9 * 4.0 / 35  # 2.9 pixels wide at depth 4, 5.8 at depth 2 would ask for 7: 4.9 pixels do for 5
        size = size if z == 4.0 else 4.9 * 2.0 / 35
        depth = splat(world_point(view, x, y, z)[None], np.zeros((1, 3), dtype=np.uint8), size, view).depth
        assert np.isfinite(depth).sum() == expected, (x, y, z)


def test_many_points_look_like_the_slow_twin():
    view, rng = make_view(4), np.random.default_rng(0)
    pixels = rng.uniform((-6, -6), (WIDTH + 6, HEIGHT + 6), (400, 2))
    points = np.stack([world_point(view, x, y, z) for (x, y), z in zip(pixels, rng.uniform(-1, 6, 400), strict=True)])
    colors, sizes = rng.integers(0, 256, (400, 3), dtype=np.uint8), rng.uniform(0, 0.4, 400).astype(np.float32)
    picture, (image, depth) = splat(points, colors, sizes, view), slow_splat(points, colors, sizes, view)
    same = (picture.image == image).all(-1)
    assert same.mean() > 0.99  # float32 rounds a few pixels to the other side
    np.testing.assert_allclose(picture.depth[same], depth[same], rtol=1e-4)


# --- holes


def test_small_gaps_are_filled_with_what_surrounds_them_and_wide_ones_are_not():
    image = np.full((20, 20, 3), 100, dtype=np.uint8)
    depth = np.ones((20, 20), dtype=np.float32)
    for gap in ((slice(3, 4), slice(3, 4)), (slice(6, 20), slice(6, 20))):
        image[gap], depth[gap] = 0, np.inf
    filled = fill_holes(Picture(image, depth), rounds=2)
    assert filled[3, 3].tolist() == [100, 100, 100]
    assert not filled[10:, 10:].any()
    lonely = Picture(
        np.full((9, 9, 3), 50, dtype=np.uint8) * (np.arange(81).reshape(9, 9, 1) == 40), np.full((9, 9), np.inf)
    )
    lonely.depth[4, 4] = 1
    np.testing.assert_array_equal(fill_holes(lonely), lonely.image)  # what stands alone does not grow


# --- cameras


def test_the_recovered_camera_shows_the_frame_itself():
    scene = make_scene()
    shown = shown_points(scene, 10**6)
    for times in (1, 3):
        views = recovered_views(scene, 64 * times, 48 * times)
        for picture, image in zip(video.scene_pictures(shown, path_shots(views)), scene.images, strict=True):
            sampled = picture[times // 2 :: times, times // 2 :: times]
            assert (is_red(sampled) == is_red(image)).mean() > 0.93  # the pixels on outlines are left out
            assert np.abs(sampled[:10].astype(int) - image[:10]).max() == 0


@pytest.mark.parametrize("num_frames", [1, 2, 7])
def test_the_orbit_is_smooth_and_keeps_looking_at_the_scene(num_frames):
    scene = make_scene(num_frames)
    shots, rate = orbit_shots(recovered_views(scene, 64, 48), 4.0, 10.0)
    assert rate == 20.0 and len(shots) >= 6 * rate and len(shots) % (2 * num_frames) == 0
    assert [shot.frame for shot in shots[: 2 * num_frames]] == [i // 2 for i in range(2 * num_frames)]
    poses = np.stack([shot.view.camera_to_world for shot in shots])
    np.testing.assert_allclose(
        poses[:, :3, :3] @ poses[:, :3, :3].transpose(0, 2, 1), np.eye(3)[None] + 0 * poses[:, :3, :3], atol=1e-9
    )
    positions = poses[:, :3, 3]
    assert np.ptp(positions[:, 0]) > 0.5  # it moves to both sides
    assert np.linalg.norm(np.diff(positions, axis=0), axis=1).max() < 0.15  # and never jumps
    ahead = positions + 4.0 * poses[:, :3, 2]
    assert np.linalg.norm(ahead[:, :2], axis=1).max() < 0.1


def test_the_rate_is_that_of_the_time_stamps():
    assert frame_rate(np.array([5.0, 5.5, 6.0])) == 2.0
    assert frame_rate(np.array([3.0])) == frame_rate(np.zeros(4)) == 10.0


# --- videos


@pytest.fixture(params=["av", "opencv"])
def backend(request, monkeypatch):
    if request.param == "opencv":
        monkeypatch.setattr(video, "find_av", lambda: None)
    else:
        pytest.importorskip("av")
    return request.param


def decode(path):
    return np.stack([frame.read() for frame in video_stream(path)])


def test_in_the_video_the_object_moves_and_the_background_stands_still(backend, tmp_path):
    scene = make_scene(5, step_back=0.0)
    path = video.write_scene_video(scene, tmp_path / "scene.mp4")
    frames = decode(path)
    times = frames.shape[2] // 64
    assert frames.shape == (5, 48 * times, 64 * times, 3)
    red = is_red(frames)
    for i in range(5):
        expected = (project(scene, i, square_center(i, 5)) + 0.5) * times - 0.5
        np.testing.assert_allclose(np.argwhere(red[i]).mean(axis=0)[::-1], expected, atol=times)
    still = ~np.any([np.roll(red.any(0), shift, axis) for shift in (-8, 0, 8) for axis in (0, 1)], axis=0)
    assert still.mean() > 0.3 and np.ptp(frames[:, still].astype(int), axis=0).max() <= 12
    assert is_blue(frames[:, still]).all()


def test_the_overlay_tints_what_moves_alone(backend, tmp_path):
    scene = make_scene(3)
    scene.images[:] = 90
    frames = decode(video.write_overlay_video(scene, tmp_path / "overlay.mp4"))
    times = frames.shape[2] // 64
    sampled = frames[:, times // 2 :: times, times // 2 :: times].astype(int)
    tinted = sampled[..., 0] - sampled[..., 2] > 30
    assert (tinted == scene.dynamic_mask).mean() > 0.97
    assert np.abs(sampled[:, :8] - 90).max() < 8


def test_odd_sizes_grow_by_one(backend, tmp_path):
    frames = np.full((3, 35, 47, 3), 120, dtype=np.uint8)
    frames[:, :, -1] = (200, 60, 60)
    found = decode(video.write_video(tmp_path / "odd.mp4", frames, 10.0))
    assert found.shape == (3, 36, 48, 3)
    assert np.abs(found[:, :, 46:].astype(int) - (200, 60, 60)).mean() < 25


def test_the_rate_of_the_video_is_the_clips(backend, tmp_path):
    path = video.write_video(tmp_path / "slow.mp4", np.zeros((5, 32, 32, 3), dtype=np.uint8), 4.0)
    seconds = [frame.seconds for frame in video_stream(path)]
    np.testing.assert_allclose(np.diff(seconds), 0.25, atol=1e-3)


def test_h264_is_written_where_it_can_be(tmp_path):
    av = pytest.importorskip("av")
    path = video.write_video(tmp_path / "video.mp4", np.zeros((2, 32, 32, 3), dtype=np.uint8), 4.0)
    if "libx264" in av.codecs_available:
        assert iio.immeta(path, plugin="pyav")["codec"] == "h264"


def test_other_names_and_places_are_refused(tmp_path, fails_with, backend):
    scene = make_scene(2)
    with fails_with(InputError, "clip.avi", ".mp4"):
        video.write_scene_video(scene, tmp_path / "clip.avi")
    with fails_with(OutputError, "video.mp4"):
        video.write_overlay_video(scene, tmp_path / "absent" / "video.mp4")
    assert list(tmp_path.iterdir()) == []
