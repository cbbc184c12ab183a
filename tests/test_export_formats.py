"""Formats as programs that nobody here wrote read them, and as their documentation says."""

from __future__ import annotations

import json
import struct

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
from test_export import SCENES, all_moving, all_static, glb_nodes, read_glb, without_points, world_scene

from easi3r.geometry import transform, unproject

# --- glb: the animation


def visible(document, values, seconds):
    """Names of the time steps that the animation shows at ``seconds``, by glTF's rule for STEP."""
    (animation,) = document["animations"]
    names = []
    for channel in animation["channels"]:
        sampler = animation["samplers"][channel["sampler"]]
        assert (channel["target"]["path"], sampler["interpolation"]) == ("scale", "STEP")
        times, scales = values(sampler["input"])[:, 0], values(sampler["output"])
        assert (np.diff(times) > 0).all() and len(times) == len(scales)
        scale = scales[max(np.searchsorted(times, seconds, side="right") - 1, 0)]
        assert scale.tolist() in ([0, 0, 0], [1, 1, 1])
        if scale[0]:
            names.append(document["nodes"][channel["target"]["node"]]["name"])
    return names


@pytest.mark.parametrize("make", [world_scene, all_static, all_moving])
def test_the_animation_shows_one_time_step_at_a_time(make, tmp_path):
    document, values = read_glb(make().export(tmp_path / "out", "glb") / "scene.glb")
    for i in range(5):  # four frames a second
        assert visible(document, values, i / 4) == [f"frame_0000{i}"]
        assert visible(document, values, i / 4 + 0.249) == [f"frame_0000{i}"]
    assert visible(document, values, 9) == ["frame_00004"]
    assert max(values(sampler["input"]).max() for sampler in document["animations"][0]["samplers"]) == 1.25


def test_frames_without_a_clock_last_a_second_each(tmp_path):
    scene = world_scene(timestamps=np.zeros(5))
    document, values = read_glb(scene.export(tmp_path / "out", "glb") / "scene.glb")
    assert [visible(document, values, i + 0.5) for i in range(5)] == [[f"frame_0000{i}"] for i in range(5)]


def test_one_frame_needs_no_animation(tmp_path):
    document, _ = read_glb(world_scene(1).export(tmp_path / "out", "glb") / "scene.glb")
    assert "animations" not in document


def test_cameras_of_a_glb_see_the_scene_as_its_images_show_it(tmp_path):
    scene = world_scene()
    document, values = read_glb(scene.export(tmp_path / "out", "glb") / "scene.glb")
    nodes = {node["name"]: node for node in document["nodes"]}
    assert nodes["scene"]["rotation"] == [1, 0, 0, 0] and document["scenes"][0]["nodes"] == [0]
    assert len(nodes["scene"]["children"]) == 1 + 5 + 5
    assert document["nodes"][nodes["camera_00003"]["children"][0]] is nodes["view_00003"]
    lens = document["cameras"][nodes["view_00003"]["camera"]]["perspective"]
    height, width = scene.images.shape[1:3]
    assert lens["aspectRatio"] == pytest.approx(width / height)
    assert np.tan(lens["yfov"] / 2) == pytest.approx(height / 2 / scene.intrinsics[3, 1, 1])
    primitive = document["meshes"][nodes["camera_00003"]["mesh"]]["primitives"][0]
    corners = values(primitive["attributes"]["POSITION"])[1:]  # the first one is the camera itself
    assert primitive["mode"] == 1 and values(primitive["indices"]).shape == (16, 1)
    seen = corners * [1, -1, -1]
    pixels = seen[:, :2] / seen[:, 2:] * scene.intrinsics[3, [0, 1], [0, 1]] + scene.intrinsics[3, :2, 2]
    edge = [(-0.5, -0.5), (width - 0.5, -0.5), (width - 0.5, height - 0.5), (-0.5, height - 0.5)]
    np.testing.assert_allclose(pixels, edge, atol=1e-3)


# --- nerfstudio


def test_depth_unprojected_by_nerfstudio_s_rule_is_the_scene(tmp_path):
    """docs.nerf.studio: rays through (x + 0.5, y + 0.5), camera looks along -z with y up, PNG depth in millimetres."""
    scene = world_scene()
    folder = scene.export(tmp_path / "out", "nerfstudio")
    header = json.loads((folder / "transforms.json").read_text())
    frame = header["frames"][3]
    depth = iio.imread(folder / frame["depth_file_path"])
    assert depth.dtype == np.uint16 and depth.shape == (header["h"], header["w"])
    y, x = np.mgrid[: header["h"], : header["w"]]
    directions = [
        (x + 0.5 - header["cx"]) / header["fl_x"],
        -(y + 0.5 - header["cy"]) / header["fl_y"],
        -np.ones(x.shape),
    ]
    points = np.stack(directions, axis=-1) * (depth / 1000)[..., None]
    matrix = np.array(frame["transform_matrix"])
    world = points @ matrix[:3, :3].T + matrix[:3, 3]
    expected = transform(unproject(scene.depth[3], scene.intrinsics[3]), scene.camera_to_world[3])
    np.testing.assert_allclose(world, expected, atol=1e-3)
    assert np.abs(world - expected).max() > 1e-5  # millimetres, not more
    assert header["camera_model"] == "OPENCV" and header["k1"] == header["p2"] == 0
    assert iio.imread(folder / frame["mask_path"]).shape == iio.imread(folder / frame["file_path"]).shape[:2]


def test_times_of_nerfstudio_go_from_0_to_1(tmp_path):
    header = json.loads((world_scene().export(tmp_path / "out", "nerfstudio") / "transforms.json").read_text())
    assert [frame["time"] for frame in header["frames"]] == [0, 0.25, 0.5, 0.75, 1]
    assert [frame["timestamp"] for frame in header["frames"]] == [2, 2.25, 2.5, 2.75, 3]
    single = json.loads((world_scene(1).export(tmp_path / "one", "nerfstudio") / "transforms.json").read_text())
    assert [frame["time"] for frame in single["frames"]] == [0]


def test_depth_beyond_16_bits_is_left_out_with_a_warning(tmp_path, caplog):
    scene = world_scene()
    scene.depth[1, :2, :3] = 65.536
    scene.depth[1, 2, 0] = 65.5349
    folder = scene.export(tmp_path / "out", "nerfstudio")
    depth = iio.imread(folder / "depths" / "frame_00001.png")
    assert (depth == 0).sum() == 6 and depth[2, 0] == 65535
    assert "6 pixels" in caplog.text


def test_a_world_without_static_points_has_no_sparse_cloud(tmp_path):
    folder = all_moving().export(tmp_path / "out", "nerfstudio")
    assert "ply_file_path" not in json.loads((folder / "transforms.json").read_text())
    assert not (folder / "sparse_pc.ply").exists()


# --- monst3r


@pytest.mark.parametrize("num_frames", [1, 5])
def test_the_folder_of_monst3r_has_every_file_that_its_viewers_look_for(num_frames, tmp_path):
    scene = world_scene(num_frames)
    folder = scene.export(tmp_path / "out", "monst3r")
    expected = {"pred_traj.txt", "pred_intrinsics.txt", "scene.json"}
    for i in range(num_frames):
        expected |= {f"frame_{i:04d}.png", f"frame_{i:04d}.npy", f"conf_{i}.npy", f"init_conf_{i}.npy"}
        expected |= {f"dynamic_mask_{i}.png", f"enlarged_dynamic_mask_{i}.png"}
    assert {path.name for path in folder.iterdir()} == expected
    for i in range(num_frames):
        np.testing.assert_array_equal(np.load(folder / f"frame_{i:04d}.npy"), scene.depth[i], strict=True)
        mask = iio.imread(folder / f"dynamic_mask_{i}.png") > 0
        grown = iio.imread(folder / f"enlarged_dynamic_mask_{i}.png") > 0
        np.testing.assert_array_equal(mask, scene.dynamic_mask[i])
        distance = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        assert grown[distance < 4.5].all() and not grown[distance > 5.5].any() and (grown & ~mask).any()


# --- depth


def read_exr(data):
    """One channel of 32-bit scan lines, by the documentation of OpenEXR's file layout."""
    assert struct.unpack_from("<ii", data) == (20000630, 2)
    at, attributes = 8, {}
    while data[at]:
        name, kind, _ = data[at : at + 100].split(b"\0", 2)
        at += len(name) + len(kind) + 2
        (size,) = struct.unpack_from("<i", data, at)
        attributes[name.decode()] = data[at + 4 : at + 4 + size]
        at += 4 + size
    needed = {"channels", "compression", "dataWindow", "displayWindow", "lineOrder", "pixelAspectRatio"}
    assert set(attributes) == needed | {"screenWindowCenter", "screenWindowWidth"}
    assert attributes["channels"] == b"Z\0" + struct.pack("<iiii", 2, 0, 1, 1) + b"\0"
    assert attributes["compression"] == attributes["lineOrder"] == b"\0"
    left, top, right, bottom = struct.unpack("<4i", attributes["dataWindow"])
    assert (left, top) == (0, 0)
    values = np.empty((bottom + 1, right + 1), np.float32)
    for y, offset in enumerate(struct.unpack_from(f"<{len(values)}Q", data, at + 1)):
        assert struct.unpack_from("<ii", data, offset) == (y, values[y].nbytes)
        values[y] = np.frombuffer(data, "<f4", right + 1, offset + 8)
    assert offset + 8 + values[y].nbytes == len(data)
    return values


def exr_files(tmp_path):
    """(path, depth) of each frame of a scene with some padding"""
    scene = world_scene()
    scene.valid_mask[2, :5] = False
    folder = scene.export(tmp_path / "out", "depth-exr") / "depth"
    return zip(sorted(folder.iterdir()), np.where(scene.valid_mask, scene.depth, 0), strict=True)


def test_depth_as_exr_comes_back_bit_for_bit(tmp_path):
    for path, depth in exr_files(tmp_path):
        np.testing.assert_array_equal(read_exr(path.read_bytes()), depth, strict=True)


# --- read by others


def test_openexr_reads_the_depth(tmp_path):
    openexr = pytest.importorskip("OpenEXR")
    for path, depth in exr_files(tmp_path):
        with openexr.File(str(path)) as file:
            np.testing.assert_array_equal(file.channels()["Z"].pixels, depth, strict=True)


@pytest.mark.parametrize("kind", [kind for kind in SCENES if kind != "no points"])
def test_trimesh_reads_the_points_and_colours_of_ply_and_glb(kind, tmp_path):
    trimesh = pytest.importorskip("trimesh")
    scene = SCENES[kind]()
    clouds = {"static": scene.points(keep="static", edges=False)}
    for i in range(scene.num_frames):
        clouds[f"frame_{i:05d}"] = scene.points([i], keep="dynamic", edges=False)
    folder, names = scene.export(tmp_path / "ply", "ply"), []
    for name, cloud in clouds.items():
        if len(cloud.points):
            names.append(name)
            path = folder / ("static.ply" if name == "static" else f"dynamic/{name}.ply")
            assert_same_cloud(trimesh.load(path), cloud)
    loaded = trimesh.load(scene.export(tmp_path / "glb", "glb") / "scene.glb")
    turned = np.diag([1.0, -1.0, -1.0, 1.0])
    for name in names:
        matrix, geometry = loaded.graph[name]
        np.testing.assert_allclose(matrix, turned, atol=1e-12)
        assert_same_cloud(loaded.geometry[geometry], clouds[name])
    for i in range(scene.num_frames):
        matrix, geometry = loaded.graph[f"camera_{i:05d}"]
        np.testing.assert_allclose(matrix, turned @ scene.camera_to_world[i] @ turned, atol=1e-6)
        assert len(loaded.geometry[geometry].vertices) == 5


def assert_same_cloud(found, expected):
    np.testing.assert_allclose(found.vertices, expected.points, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(found.colors)[:, :3], expected.colors)


def test_trimesh_reads_a_glb_without_points(tmp_path):
    trimesh = pytest.importorskip("trimesh")
    path = without_points().export(tmp_path / "out", "glb") / "scene.glb"
    loaded = trimesh.load(path)
    assert {"camera_00000", "camera_00004"} <= set(loaded.graph.nodes)
    assert all(not len(points) for _, points, _ in glb_nodes(path).values())


def test_evo_reads_the_camera_path(tmp_path):
    file_interface = pytest.importorskip("evo.tools.file_interface")
    scene = world_scene()
    path = file_interface.read_tum_trajectory_file(str(scene.export(tmp_path / "out", "tum") / "trajectory.txt"))
    np.testing.assert_allclose(path.timestamps, scene.timestamps)
    np.testing.assert_allclose(np.array(path.poses_se3), scene.camera_to_world, atol=1e-6)
    assert path.check()[0]
