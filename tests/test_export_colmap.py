"""COLMAP's model: text and binary alike, tracks that are true, and a bundle adjustment that finds its way back."""

from __future__ import annotations

import imageio.v3 as iio
import numpy as np
import pytest
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation
from test_export import all_moving, rigid, world_clip, world_scene

from easi3r.export import ExportOptions
from easi3r.export.tracks import find_tracks


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return world_scene().export(tmp_path_factory.mktemp("export") / "colmap", "colmap", max_points=600)


def read_text(folder):
    """The model by the documentation of COLMAP's text files: cameras, images and points by their numbers."""

    def lines(name):
        return [line for line in (folder / name).read_text().split("\n")[:-1] if not line.startswith("#")]

    cameras = {}
    for line in lines("cameras.txt"):
        number, model, width, height, *values = line.split()
        assert model == "PINHOLE"
        cameras[int(number)] = (int(width), int(height)), np.array(values, float)
    images = {}
    rows = lines("images.txt")
    for head, observations in zip(rows[::2], rows[1::2], strict=True):
        number, w, x, y, z, *translation, camera, name = head.split()
        pose = rigid(np.array([x, y, z, w], float), np.array(translation, float))
        table = np.array(observations.split(), float).reshape(-1, 3)
        images[int(number)] = name, int(camera), pose, table[:, :2], table[:, 2].astype(int)
    points = {}
    for line in lines("points3D.txt"):
        number, *values = line.split()
        xyz, color, error, track = values[:3], values[3:6], values[6], values[7:]
        points[int(number)] = np.array(xyz, float), np.array(color, int), float(error), np.reshape(track, (-1, 2))
    return cameras, images, points


def project_all(model):
    """Reprojection errors in pixels, all observations of the text model, centres of pixels at (0.5, 0.5)."""
    cameras, images, points = model
    errors = []
    for _, camera, pose, pixels, numbers in images.values():
        _, (fx, fy, cx, cy) = cameras[camera]
        seen = np.array([points[number][0] for number in numbers]) @ pose[:3, :3].T + pose[:3, 3]
        errors.append(np.hypot(*(seen[:, :2] / seen[:, 2:] * [fx, fy] + [cx, cy] - pixels).T))
    return np.concatenate(errors)


# --- the text model, read here


def test_points_are_points_of_the_scene_and_have_several_observations(exported):
    _, images, points = read_text(exported / "sparse_text")
    cloud = world_scene().points(keep="static", edges=False)
    colors = dict(zip(map(tuple, cloud.points.tolist()), cloud.colors.tolist(), strict=True))
    assert len(points) == 600 and sorted(points) == list(range(1, 601))
    for number, (xyz, color, error, track) in points.items():
        assert colors[tuple(xyz)] == color.tolist() and error == 0 and len(track) >= 2
        for image, place in track.astype(int):
            assert images[image][4][place] == number
        assert len(set(track[:, 0])) == len(track)
    assert sum(len(image[4]) for image in images.values()) == sum(len(point[3]) for point in points.values())


def test_observations_are_where_the_points_fall(exported):
    model = read_text(exported / "sparse_text")
    errors = project_all(model)
    assert errors.max() < 1e-3  # points are written as float32
    for (width, height), _ in model[0].values():
        for image in model[1].values():
            assert (image[3] >= 0).all() and (image[3] <= [width, height]).all()


def test_the_frames_of_a_track_see_the_same_place_of_the_world(exported):
    """Against the renderer's own flow, which knows what hides what."""
    _, images, points = read_text(exported / "sparse_text")
    clip = world_clip()
    flow = {(i, j): clip.flow(i, j) for i in range(5) for j in range(5) if i != j}
    wrong = total = 0
    for _, _, _, track in points.values():
        seen = {int(image) - 1: images[int(image)][3][int(place)] - 0.5 for image, place in track}
        own = {i: np.rint(pixel).astype(int) for i, pixel in seen.items() if abs(pixel - np.rint(pixel)).max() < 1e-3}
        assert own  # the frame the point is from
        i, (x, y) = next(iter(own.items()))
        assert not clip.dynamic_mask[i, y, x]
        for j in set(seen) - {i}:
            offset, visible = flow[i, j]
            distance = np.abs(offset[y, x] + (x, y) - seen[j]).max()
            assert distance < 0.01
            if (seen[j] >= 0).all() and (seen[j] <= (clip.depth.shape[2] - 1, clip.depth.shape[1] - 1)).all():
                total, wrong = total + 1, wrong + (not visible[y, x])
    assert total > 1200 and wrong < 0.01 * total, (wrong, total)  # nearer things at a depth that is nearly the same


def test_no_observation_is_on_what_moves(exported):
    _, images, _ = read_text(exported / "sparse_text")
    for i, (_, _, _, pixels, _) in enumerate(images.values()):
        column, row = np.rint(pixels - 0.5).astype(int).T
        assert len(row) and not world_clip().dynamic_mask[i, row, column].any()


def test_a_frame_whose_depth_disagrees_sees_nothing_of_the_others():
    scene = world_scene()
    scene.depth[2] *= 1.1
    tracks = find_tracks(scene, ExportOptions())
    with_others = np.bincount(tracks.point_index[tracks.frame_index == 2], minlength=len(tracks.cloud.points)) > 0
    assert len(tracks.cloud.points) > 1000 and with_others.mean() < 0.01
    assert (np.bincount(tracks.point_index) >= 2).all()


def test_one_frame_keeps_points_that_it_alone_sees(tmp_path):
    _, images, points = read_text(world_scene(1).export(tmp_path / "out", "colmap") / "sparse_text")
    assert len(images) == 1 and len(points) == len(world_scene(1).points(keep="static", edges=False).points)
    assert all(len(track) == 1 for *_, track in points.values())


def test_a_world_that_moves_all_over_has_cameras_and_no_points(tmp_path):
    folder = all_moving().export(tmp_path / "out", "colmap")
    cameras, images, points = read_text(folder / "sparse_text")
    assert (len(cameras), len(images), len(points)) == (1, 5, 0)
    assert (folder / "sparse" / "0" / "points3D.bin").read_bytes() == bytes(8)


def test_masks_follow_both_conventions(exported):
    for i, image in enumerate(world_clip().images):
        name = f"frame_{i:05d}.png"
        np.testing.assert_array_equal(iio.imread(exported / "images" / name), image)
        static = np.where(world_clip().dynamic_mask[i], 0, 255)
        np.testing.assert_array_equal(iio.imread(exported / "masks" / f"{name}.png"), static)
        both = np.dstack([image, static])
        np.testing.assert_array_equal(iio.imread(exported / "images_rgba" / name), both)


def test_a_bundle_adjustment_by_scipy_finds_its_way_back(exported):
    cameras, images, points = read_text(exported / "sparse_text")
    chosen = sorted(points)[::4]
    place = {number: i for i, number in enumerate(chosen)}
    fx, fy, cx, cy = cameras[1][1]
    rows = [
        (i, place[number], *pixel)
        for i, (*_, pixels, numbers) in enumerate(images.values())
        for pixel, number in zip(pixels, numbers, strict=True)
        if number in place
    ]
    frame, point, *uv = np.array(rows).T
    frame, point, uv = frame.astype(int), point.astype(int), np.stack(uv, axis=1)
    poses = np.array([image[2] for image in images.values()])
    xyz = np.array([points[number][0] for number in chosen])
    rng = np.random.default_rng(0)
    distance = np.median(xyz[:, 2])
    start_turns = Rotation.from_matrix(poses[:, :3, :3]).as_rotvec() + 0.01 * rng.normal(size=(5, 3))
    start_positions = poses[:, :3, 3] + 0.01 * distance * rng.normal(size=(5, 3))
    start_turns[0], start_positions[0] = 0, poses[0, :3, 3]
    unknown = np.concatenate([start_turns[1:].ravel(), start_positions[1:].ravel()])
    scale_camera = 4  # the last camera's distance from the first fixes the scale

    def residuals(x):
        turns, shifts = x[:12].reshape(4, 3), x[12:24].reshape(4, 3)
        matrices = np.concatenate([poses[:1, :3, :3], Rotation.from_rotvec(turns).as_matrix()])
        translations = np.concatenate([poses[:1, :3, 3], shifts])
        world = x[24:].reshape(-1, 3)
        seen = np.einsum("kij,kj->ki", matrices[frame], world[point]) + translations[frame]
        pixels = seen[:, :2] / seen[:, 2:] * [fx, fy] + [cx, cy]
        length = np.linalg.norm(translations[scale_camera]) - np.linalg.norm(poses[scale_camera, :3, 3])
        return np.append((pixels - uv).ravel(), 1000 * length)

    from scipy.sparse import lil_matrix

    pattern = lil_matrix((2 * len(uv) + 1, 24 + xyz.size), dtype=int)
    for k in range(len(uv)):
        for r in (2 * k, 2 * k + 1):
            pattern[r, 24 + 3 * point[k] : 27 + 3 * point[k]] = 1
            if frame[k]:
                pattern[r, 3 * frame[k] - 3 : 3 * frame[k]] = pattern[r, 3 * frame[k] + 9 : 3 * frame[k] + 12] = 1
    pattern[-1, 12:24] = 1
    x0 = np.concatenate([unknown, xyz.ravel()])
    assert np.abs(residuals(x0)).max() > 1  # pixels
    found = least_squares(residuals, x0, jac_sparsity=pattern, x_scale="jac", method="trf", max_nfev=60).x
    assert np.abs(residuals(found)).max() < 1e-2
    turns = Rotation.from_rotvec(found[:12].reshape(4, 3)) * Rotation.from_matrix(poses[1:, :3, :3]).inv()
    assert turns.magnitude().max() < 1e-4
    np.testing.assert_allclose(found[12:24].reshape(4, 3), poses[1:, :3, 3], atol=1e-3 * distance)


# --- read by COLMAP itself


@pytest.fixture(scope="module")
def pycolmap():
    return pytest.importorskip("pycolmap", exc_type=ImportError)


def poses_of(model):
    """[n, 4, 4] world-to-camera of a model that COLMAP has read"""
    matrices = [model.images[number].cam_from_world().matrix() for number in sorted(model.images)]
    return np.array([np.vstack([matrix, [0, 0, 0, 1]]) for matrix in matrices])


def test_colmap_reads_text_and_binary_alike(pycolmap, exported):
    scene = world_scene()
    binary = pycolmap.Reconstruction(exported / "sparse" / "0")
    text = pycolmap.Reconstruction(exported / "sparse_text")
    for model in (binary, text):
        assert (model.num_cameras(), model.num_reg_images(), model.num_points3D()) == (1, 5, 600)
        np.testing.assert_allclose(np.linalg.inv(poses_of(model)), scene.camera_to_world, atol=1e-6)
        (camera,) = model.cameras.values()
        k = camera.calibration_matrix() - [[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]]
        np.testing.assert_allclose(k, scene.intrinsics[0], rtol=1e-6)
        assert (camera.height, camera.width) == scene.images.shape[1:3]
    np.testing.assert_array_equal(poses_of(binary), poses_of(text))
    for number, image in binary.images.items():
        twin = text.images[number]
        assert image.name == twin.name == f"frame_{number - 1:05d}.png"
        np.testing.assert_array_equal(*([p.xy for p in i.points2D] for i in (image, twin)))
        assert [p.point3D_id for p in image.points2D] == [p.point3D_id for p in twin.points2D]
    for number, point in binary.points3D.items():
        twin = text.points3D[number]
        np.testing.assert_array_equal(point.xyz, twin.xyz)
        np.testing.assert_array_equal(point.color, twin.color)
        elements = [[(e.image_id, e.point2D_idx) for e in p.track.elements] for p in (point, twin)]
        assert elements[0] == elements[1] and len(elements[0]) >= 2


def test_colmap_finds_the_observations_where_the_points_fall(pycolmap, exported):
    model = pycolmap.Reconstruction(exported / "sparse" / "0")
    assert model.compute_mean_track_length() > 2.5
    for image in model.images.values():
        for point in image.points2D:
            seen = image.project_point(model.points3D[point.point3D_id].xyz)
            assert np.linalg.norm(seen - point.xy) < 1e-3


def test_a_bundle_adjustment_by_colmap_finds_its_way_back(pycolmap, exported):
    model = pycolmap.Reconstruction(exported / "sparse" / "0")
    truth = poses_of(model)
    rng = np.random.default_rng(0)
    distance = np.median(world_scene().depth)
    for number in sorted(model.images):
        start = np.eye(4)
        start[:3, :3] = Rotation.from_rotvec(0.01 * rng.normal(size=3)).as_matrix()
        start[:3, 3] = 0.01 * distance * rng.normal(size=3)
        pose = pycolmap.Rigid3d((start @ truth[number - 1])[:3])
        model.images[number].frame.set_cam_from_world(model.images[number].camera_id, pose)
    before = apart(poses_of(model), truth)
    options = pycolmap.BundleAdjustmentOptions()
    options.refine_focal_length = options.refine_principal_point = options.refine_extra_params = False
    options.print_summary = False
    pycolmap.bundle_adjustment(model, options)
    after = apart(poses_of(model), truth)
    assert before[0] > 0.01 and before[1] > 0.03 and after[0] < 1e-4 and after[1] < 1e-3


def apart(found, truth):
    """Largest differences of turns (radians) and of positions (over the path) as the first camera sees the others."""
    found, truth = (np.linalg.inv(poses @ np.linalg.inv(poses[0])) for poses in (found, truth))
    turns = Rotation.from_matrix(np.swapaxes(found[:, :3, :3], 1, 2) @ truth[:, :3, :3]).magnitude().max()
    found, truth = (poses[:, :3, 3] / np.linalg.norm(poses[:, :3, 3]) for poses in (found, truth))  # scale is free
    return turns, np.linalg.norm(found - truth, axis=1).max()
