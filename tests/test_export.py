"""Exports: all formats agree, and each is written whole or not at all."""

from __future__ import annotations

import errno
import functools
import importlib
import json
import resource
import struct
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from small_inputs import listing, write_images

from easi3r import Scene
from easi3r.demo.rendering import render
from easi3r.demo.worlds import make_world
from easi3r.errors import InputError, OutputError
from easi3r.export import FORMATS, ExportOptions, export_formats
from easi3r.geometry import depth_edges
from easi3r.structures import AttentionMaps

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
CLOUDS = ("ply", "glb", "npz")
MODULES = {name: f"easi3r.export.{name.replace('-', '_')}" for name in FORMATS}


@functools.cache
def world_clip(num_frames=5):
    """A rendered room of which all is known."""
    return render(make_world(2, num_frames=num_frames), 64, 48, supersample=1)


def world_scene(num_frames=5, **changes):
    """The scene that a perfect reconstruction of ``world_clip`` would be; ``changes`` replace fields."""
    clip = world_clip(num_frames)
    n, height, width = clip.depth.shape
    crop = {"original": [width, height], "resized": [width, height], "offset": [0, 0], "size": [width, height]}
    values = {
        "images": clip.images.copy(),
        "dynamic_score": clip.dynamic_mask.astype(np.float32),
        "dynamic_mask": clip.dynamic_mask.copy(),
        "attention": AttentionMaps(*np.zeros((5, n, height // 16, width // 16), np.float32)),
        "timestamps": 2 + np.arange(n) / 4,
        "meta": {"source": "array", "names": [f"frame {i}" for i in range(n)], "crops": [crop] * n},
        "camera_to_world": (np.linalg.inv(clip.camera_to_world[0]) @ clip.camera_to_world).astype(np.float32),
        "intrinsics": clip.intrinsics.astype(np.float32),
        "depth": clip.depth.copy(),
        "confidence": np.full(clip.depth.shape, 3, np.float32),
        "valid_mask": np.ones(clip.depth.shape, bool),
    }
    return Scene(**values | changes)


def all_static():
    return world_scene(dynamic_mask=np.zeros((5, 48, 64), bool))


def all_moving():
    return world_scene(dynamic_mask=np.ones((5, 48, 64), bool))


def without_points():
    return world_scene(valid_mask=np.zeros((5, 48, 64), bool))


SCENES = {
    "world": world_scene,
    "one frame": functools.partial(world_scene, 1),
    "two frames": functools.partial(world_scene, 2),
    "all static": all_static,
    "all moving": all_moving,
    "no points": without_points,
}


# --- readers of our own, after the formats' documentation


def read_ply(path):
    """points [m, 3] float32, colors [m, 3] uint8"""
    header, _, body = path.read_bytes().partition(b"end_header\n")
    count = int(header.split(b"element vertex ")[1].split()[0])
    table = np.frombuffer(body, dtype=[("points", "<f4", 3), ("colors", "u1", 3)])
    assert len(table) == count and b"binary_little_endian" in header
    return table["points"], table["colors"]


def read_glb(path):
    """The JSON and a function that gives an accessor's values."""
    data = path.read_bytes()
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    document = json.loads(data[20 : 20 + size])
    rest, kind = struct.unpack_from("<I4s", data, 20 + size)
    buffer = data[28 + size :]
    assert kind == b"BIN\0" and len(buffer) == rest == document["buffers"][0]["byteLength"]

    def values(index):
        accessor = document["accessors"][index]
        view = document["bufferViews"][accessor["bufferView"]]
        dtype = {5126: "<f4", 5125: "<u4", 5121: "u1"}[accessor["componentType"]]
        shape = accessor["count"], {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor["type"]]
        assert view["byteOffset"] % 4 == 0 and accessor["count"] > 0
        return np.frombuffer(buffer, dtype, shape[0] * shape[1], view["byteOffset"]).reshape(shape)

    return document, values


def glb_nodes(path):
    """name -> (matrix or None, points, colors); points are None where the node shows none"""
    document, values = read_glb(path)
    nodes = {}
    for node in document["nodes"]:
        points, colors = np.zeros((0, 3), np.float32), np.zeros((0, 3), np.uint8)
        if "mesh" in node and not node["name"].startswith("camera_"):
            attributes = document["meshes"][node["mesh"]]["primitives"][0]["attributes"]
            points, colors = values(attributes["POSITION"]), values(attributes["COLOR_0"])[:, :3]
        matrix = np.reshape(node["matrix"], (4, 4)).T if "matrix" in node else None
        nodes[node["name"]] = matrix, points, colors
    return nodes


def cameras_of(name, folder):
    """[n, 4, 4] camera-to-world in OpenCV axes and [n, 3, 3] K with our pixels, as far as the format has them."""
    if name == "nerfstudio":
        header = json.loads((folder / "transforms.json").read_text())
        poses = np.array([frame["transform_matrix"] for frame in header["frames"]]) @ FLIP
        lens = [header | frame for frame in header["frames"]]
        k = [[[v["fl_x"], 0, v["cx"] - 0.5], [0, v["fl_y"], v["cy"] - 0.5], [0, 0, 1]] for v in lens]
        return poses, np.array(k)
    if name == "glb":
        matrices = [value[0] for key, value in glb_nodes(folder / "scene.glb").items() if key.startswith("camera_")]
        return np.array(matrices) @ FLIP, None
    if name == "npz":
        with np.load(folder / "scene.npz") as arrays:
            return arrays["camera_to_world"], arrays["intrinsics"]
    if name in ("tum", "monst3r"):
        table = np.loadtxt(folder / {"tum": "trajectory.txt", "monst3r": "pred_traj.txt"}[name], ndmin=2)
        quaternions = table[:, 4:] if name == "tum" else np.roll(table[:, 4:], -1, axis=1)
        k = np.loadtxt(folder / "pred_intrinsics.txt", ndmin=2).reshape(-1, 3, 3) if name == "monst3r" else None
        return np.array([rigid(q, t) for q, t in zip(quaternions, table[:, 1:4], strict=True)]), k
    assert name == "colmap"
    from easi3r.colmap import read_colmap_cameras, read_colmap_images

    images = read_colmap_images(folder / "sparse" / "0")
    cameras = read_colmap_cameras(folder / "sparse" / "0")
    assert [image.name for image in images] == [f"frame_{i:05d}.png" for i in range(len(images))]
    poses = np.linalg.inv([image.world_to_camera for image in images])
    return poses, np.array([cameras[image.camera].matrix for image in images])


def rigid(quaternion, translation):
    """By the textbook's formula, x y z w."""
    x, y, z, w = quaternion / np.linalg.norm(quaternion)
    matrix = np.eye(4)
    matrix[:3, :3] = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    matrix[:3, 3] = translation
    return matrix


def cloud_of(name, folder):
    """static points and colors, and the same of each time step"""
    if name == "ply":
        steps = [read_ply(path) for path in sorted((folder / "dynamic").iterdir())]
        return read_ply(folder / "static.ply"), steps
    if name == "glb":
        nodes = glb_nodes(folder / "scene.glb")
        return nodes["static"][1:], [value[1:] for key, value in nodes.items() if key.startswith("frame_")]
    with np.load(folder / "scene.npz") as arrays:
        a = {key: arrays[key] for key in ("points", "colors", "frame_index", "dynamic")}
        chosen = [~a["dynamic"]] + [a["dynamic"] & (a["frame_index"] == i) for i in range(len(arrays["images"]))]
        static, *steps = [(a["points"][rows], a["colors"][rows]) for rows in chosen]
    return static, steps


def frame_count(name, folder):
    if name == "masks":
        return len(list((folder / "mask").iterdir()))
    if name.startswith("depth"):
        return len(list((folder / "depth").iterdir()))
    if name == "ply":
        return len(cloud_of(name, folder)[1])
    return len(cameras_of(name, folder)[0])


def export_all(scene, where, **options):
    written, failed = export_formats(scene, where, FORMATS, ExportOptions(**options))
    assert failed == {} and list(written) == list(FORMATS)
    return written


# --- the invariant


@pytest.mark.parametrize("kind", SCENES)
def test_all_formats_hold_the_same_points_cameras_and_frames(kind, tmp_path):
    scene = SCENES[kind]()
    folders = export_all(scene, tmp_path)
    assert {name: frame_count(name, folder) for name, folder in folders.items()} == dict.fromkeys(
        FORMATS, scene.num_frames
    )
    for name in ("colmap", "nerfstudio", "glb", "npz", "tum", "monst3r"):
        poses, intrinsics = cameras_of(name, folders[name])
        np.testing.assert_allclose(poses, scene.camera_to_world, atol=1e-6, err_msg=name)
        if intrinsics is not None:
            np.testing.assert_allclose(intrinsics, scene.intrinsics, atol=1e-4, err_msg=name)
    for name in CLOUDS:
        static, steps = cloud_of(name, folders[name])
        expected = scene.points(keep="static", edges=False)
        np.testing.assert_allclose(static[0], expected.points, atol=1e-6)
        np.testing.assert_array_equal(static[1], expected.colors)
        for i, (points, colors) in enumerate(steps):
            expected = scene.points([i], keep="dynamic", edges=False)
            np.testing.assert_allclose(points, expected.points, atol=1e-6)
            np.testing.assert_array_equal(colors, expected.colors)


def test_frames_with_lenses_of_their_own_keep_them(tmp_path):
    intrinsics = world_scene().intrinsics * np.linspace(1, 1.2, 5, dtype=np.float32)[:, None, None]
    intrinsics[:, 2, 2] = 1
    scene = world_scene(intrinsics=intrinsics)
    folders = export_all(scene, tmp_path)
    for name in ("colmap", "nerfstudio", "npz", "monst3r"):
        np.testing.assert_allclose(cameras_of(name, folders[name])[1], intrinsics, atol=1e-4, err_msg=name)
    document, _ = read_glb(folders["glb"] / "scene.glb")
    assert len({node["camera"] for node in document["nodes"] if "camera" in node}) == 5


@pytest.mark.parametrize("keep", ["all", "static", "dynamic"])
def test_keep_chooses_what_clouds_hold(keep, tmp_path):
    scene = world_scene()
    expected = np.bincount(scene.points(keep=keep, edges=False).dynamic, minlength=2)  # static, moving
    assert (expected > 0).sum() == (2 if keep == "all" else 1)
    folders, failed = export_formats(scene, tmp_path, CLOUDS, ExportOptions(keep=keep))
    assert failed == {}
    with np.load(folders["npz"] / "scene.npz") as arrays:
        np.testing.assert_array_equal(np.bincount(arrays["dynamic"], minlength=2), expected)
    nodes = glb_nodes(folders["glb"] / "scene.glb")
    assert len(nodes["static"][1] if "static" in nodes else ()) == expected[0]
    assert sum(len(value[1]) for key, value in nodes.items() if key.startswith("frame_")) == expected[1]
    files = {path.name for path in folders["ply"].iterdir()} - {"scene.json"}
    by_keep = {"all": {"static.ply", "frames", "dynamic"}, "static": {"static.ply"}, "dynamic": {"dynamic"}}
    assert files == by_keep[keep]


def test_points_of_little_confidence_on_edges_and_on_padding_are_left_out_everywhere(tmp_path):
    scene = world_scene()
    scene.confidence[:, :16], scene.valid_mask[:, 44:] = 1.5, False
    folders = export_all(scene, tmp_path, min_confidence=2.0)
    left = scene.valid_mask & (scene.confidence >= 2) & ~depth_edges(scene.depth)
    assert 0 < left.sum() < 0.7 * left.size
    for name in CLOUDS:
        static, steps = cloud_of(name, folders[name])
        assert len(static[0]) + sum(len(points) for points, _ in steps) == left.sum()
    for i in range(5):
        confidence = np.load(folders["monst3r"] / f"conf_{i}.npy")
        np.testing.assert_array_equal(confidence > 0, scene.valid_mask[i] & ~depth_edges(scene.depth[i]))
        for mask in (f"colmap/masks/frame_0000{i}.png.png", f"nerfstudio/masks/frame_0000{i}.png"):
            used = iio.imread(tmp_path / mask)
            np.testing.assert_array_equal(used, 255 * (scene.valid_mask[i] & ~scene.dynamic_mask[i]))
        for depth in ("nerfstudio/depths", "depth-png/depth"):
            known = iio.imread(tmp_path / depth / f"frame_0000{i}.png") > 0
            np.testing.assert_array_equal(known, scene.valid_mask[i])


# --- the budget


def test_a_budget_is_kept_by_all_and_met_alike_every_time(tmp_path):
    scene = world_scene()
    for where in ("once", "again"):
        export_all(scene, tmp_path / where, max_points=500)
    whole = {tuple(row) for row in scene.points(edges=False).points.tolist()}
    for name in CLOUDS:
        static, steps = cloud_of(name, tmp_path / "once" / name)
        parts = [static[0], *(points for points, _ in steps)]
        assert sum(map(len, parts)) == 500 and len(static[0]) >= 250 <= 500 - min(250, len(static[0]) - 250)
        assert {tuple(row) for row in np.vstack(parts).tolist()} <= whole
    for path in sorted((tmp_path / "once").rglob("*")):
        twin = tmp_path / "again" / path.relative_to(tmp_path / "once")
        if path.is_file() and path.suffix != ".npz":  # zip files hold the time
            assert path.read_bytes() == twin.read_bytes(), path


def test_what_moves_is_not_thinned_as_much_as_what_all_frames_see(tmp_path):
    scene = world_scene()
    moving = len(scene.points(keep="dynamic", edges=False).points)
    static, steps = cloud_of("npz", scene.export(tmp_path / "npz", "npz", max_points=2 * moving))
    assert len(static[0]) == moving == sum(len(points) for points, _ in steps)
    static, steps = cloud_of("npz", scene.export(tmp_path / "less", "npz", max_points=moving))
    assert len(static[0]) == moving - moving // 2 and sum(len(points) for points, _ in steps) == moving // 2


# --- the source's own frames


@pytest.fixture
def small_scene_of_large_images(tmp_path):
    """A scene whose images are the source's, halved and cut: (scene, source frames)."""
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (5, 104, 132, 3), dtype=np.uint8)
    folder = write_images(tmp_path / "source", source)
    crop = {"original": [132, 104], "resized": [66, 52], "offset": [1, 2], "size": [64, 48]}
    scene = world_scene()
    names = [f"frame_{i}.png" for i in range(5)]
    scene.meta |= {"source": str(folder), "names": names, "crops": [crop] * 5}
    return scene, source


def test_original_images_come_with_their_own_intrinsics_masks_and_depth(small_scene_of_large_images, tmp_path):
    scene, source = small_scene_of_large_images
    export_all(scene, tmp_path / "out", original_images=True)
    for name, masks in (("colmap", "masks/frame_00003.png.png"), ("nerfstudio", "masks/frame_00003.png")):
        folder = tmp_path / "out" / name
        np.testing.assert_array_equal(iio.imread(folder / "images" / "frame_00003.png"), source[3])
        np.testing.assert_allclose(cameras_of(name, folder)[1], scene.original_intrinsics, rtol=1e-6)
        used = iio.imread(folder / masks) > 0
        assert used.shape == (104, 132)
        # rows 4 to 99 of the source are rows 0 to 47: two rows each
        np.testing.assert_array_equal(used[5:100:2, 3:130:2] & used[4:100:2, 2:130:2], ~scene.dynamic_mask[3])
        assert not used[:3].any() and not used[101:].any() and not used[:, :1].any() and not used[:, 131:].any()
    depth = iio.imread(tmp_path / "out" / "nerfstudio" / "depths" / "frame_00003.png")
    np.testing.assert_allclose(depth[5:100:2, 3:130:2], scene.depth[3] * 1000, atol=0.51)
    np.testing.assert_array_equal(iio.imread(tmp_path / "out" / "monst3r" / "frame_0003.png"), scene.images[3])


def test_a_source_that_is_gone_or_changed_is_said_and_the_other_formats_are_kept(
    small_scene_of_large_images, tmp_path, fails_with
):
    scene, source = small_scene_of_large_images
    options = ExportOptions(original_images=True)
    (tmp_path / "source" / "frame_4.png").unlink()
    written, failed = export_formats(scene, tmp_path / "out", ["colmap", "tum"], options)
    assert list(written) == ["tum"] and listing(tmp_path / "out") == ["tum", "tum/scene.json", "tum/trajectory.txt"]
    with fails_with(InputError, str(tmp_path / "source"), "frame_4.png", "original_images"):
        raise failed["colmap"]
    write_images(tmp_path / "source", source[:, 1:])
    with fails_with(InputError, "132 x 103", "132 x 104"):
        scene.export(tmp_path / "changed", "colmap", original_images=True)
    scene.meta["source"] = str(tmp_path / "nowhere")
    with fails_with(InputError, "nowhere", "gone"):
        scene.export(tmp_path / "gone", "nerfstudio", original_images=True)
    with fails_with(InputError, "array", "without original_images"):
        world_scene().export(tmp_path / "array", "nerfstudio", original_images=True)
    assert listing(tmp_path / "out") == ["tum", "tum/scene.json", "tum/trajectory.txt"]


def test_frames_of_a_video_are_found_again_by_their_number(tmp_path):
    from small_inputs import write_video

    frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * 30
    video = write_video(tmp_path / "clip.avi", np.ascontiguousarray(np.broadcast_to(frames, (8, 48, 64, 3))))
    scene = world_scene()
    scene.meta |= {"source": str(video), "names": [f"frame {i}" for i in (1, 2, 4, 5, 7)]}
    folder = scene.export(tmp_path / "out", "nerfstudio", original_images=True)
    means = [iio.imread(folder / "images" / f"frame_0000{i}.png").mean() for i in range(5)]
    np.testing.assert_allclose(means, np.array([1, 2, 4, 5, 7]) * 30, atol=3)


# --- whole or not at all


def test_every_file_is_explained_and_every_explanation_has_its_file(tmp_path):
    for name, folder in export_all(world_scene(), tmp_path).items():
        header = json.loads((folder / "scene.json").read_text())
        assert (header["kind"], header["format"], header["num_frames"]) == ("export", name, 5)
        assert header["options"]["keep"] == "all"
        for file, words in header["files"].items():
            assert (folder / file).exists() and len(words) > 8, (name, file)
        explained = {file.partition("/")[0] for file in header["files"]} | {"scene.json"}
        found = {path.name for path in folder.iterdir()}
        if name == "monst3r":  # one file is explained for all frames
            found = {file.replace("_0001", "_0000").replace("_1.", "_0.") for file in found if not has_number(file, 2)}
        assert found == explained, name


def has_number(file, least):
    number = file.rpartition(".")[0].rpartition("_")[2]
    return number.isdecimal() and int(number) >= least


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_nothing_of_the_format_and_the_others_stay(name, tmp_path, monkeypatch, fails_with):
    module = importlib.import_module(MODULES[name])
    whole = module.write

    def write(scene, folder, options):
        whole(scene, folder, options)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write", write)
    others = [other for other in ("tum", "depth-png", name, "monst3r") if other != name]
    written, failed = export_formats(world_scene(2), tmp_path / "out", ["tum", "depth-png", name, "monst3r"])
    assert list(failed) == [name] and list(written) == others
    with fails_with(OutputError, f"out/{name}", "No space left on device"):
        raise failed[name]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(others)


def test_files_that_cannot_be_written_to_their_end_leave_nothing(tmp_path):
    saved = world_scene(2).save(tmp_path / "saved")
    formats = [name for name in FORMATS if name != "masks"]  # whose files are smaller than the limit
    arguments = ["export", str(saved), "--to", ",".join(formats), "-o", str(tmp_path / "out"), "--quiet"]

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))  # bytes: trajectory.txt and scene.json are smaller

    done = subprocess.run(
        [sys.executable, "-m", "easi3r", *arguments],
        preexec_fn=limit_files,
        capture_output=True,
        text=True,
        timeout=120,
    )
    failing = [name for name in formats if name != "tum"]
    assert (done.returncode, done.stdout) == (1, "") and len(done.stderr.splitlines()) == len(failing), done.stderr
    for name, line in zip(failing, done.stderr.splitlines(), strict=True):
        assert line.startswith(
            f"easi3r: {name} was not exported: The output {tmp_path / 'out' / name} cannot be written"
        )
    assert listing(tmp_path / "out") == ["tum", "tum/scene.json", "tum/trajectory.txt"]


def test_a_place_that_cannot_be_written_to_is_said(tmp_path, fails_with):
    (tmp_path / "file").touch()
    written, failed = export_formats(world_scene(1), tmp_path / "file", ["tum", "ply"])
    assert written == {}
    for name in ("tum", "ply"):
        with fails_with(OutputError, f"file/{name}", "is a file"):
            raise failed[name]


def test_an_earlier_export_is_replaced_only_when_asked_to(tmp_path, fails_with):
    scene = world_scene(2)
    folder = scene.export(tmp_path / "out", "tum")
    assert folder == tmp_path / "out" and len(np.loadtxt(folder / "trajectory.txt")) == 2
    with fails_with(OutputError, "exists", "overwrite"):
        world_scene(5).export(folder, "tum")
    assert len(np.loadtxt(folder / "trajectory.txt")) == 2
    world_scene(5).export(folder, "tum", overwrite=True)
    assert len(np.loadtxt(folder / "trajectory.txt")) == 5


def test_a_saved_scene_is_never_replaced_by_an_export(tmp_path, fails_with):
    scene = world_scene(2)
    saved = scene.save(tmp_path / "saved")
    before = listing(saved)
    for name in ("tum", "ply"):
        with fails_with(OutputError, str(saved), "no export"):
            scene.export(saved, name, overwrite=True)
    assert listing(saved) == before and listing(tmp_path)[0] == "saved"


@pytest.mark.parametrize("name, file", [("glb", "a.glb"), ("npz", "a.npz"), ("tum", "poses.txt")])
def test_a_format_of_one_file_can_be_written_as_that_file(name, file, tmp_path, fails_with, monkeypatch):
    scene = world_scene(2)
    folder = scene.export(tmp_path / "folder", name)
    (tmp_path / "files").mkdir()
    path = scene.export(tmp_path / "files" / file, name)
    assert path == tmp_path / "files" / file and listing(tmp_path / "files") == [file]
    if name != "npz":
        assert path.read_bytes() == (folder / FORMATS[name].file).read_bytes()
    with fails_with(OutputError, "exists", "overwrite"):
        scene.export(path, name)
    before = path.read_bytes()

    def write(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    module = importlib.import_module(MODULES[name])
    with monkeypatch.context() as patch, fails_with(OutputError, file, "No space left"):
        patch.setattr(module, "write", write)
        scene.export(path, name, overwrite=True)
    assert path.read_bytes() == before and listing(tmp_path / "files") == [file]
    world_scene(1).export(path, name, overwrite=True)
    assert path.read_bytes() != before


def test_what_cannot_be_chosen_is_said(tmp_path, fails_with):
    scene = world_scene(1)
    for options, words in (
        ({"max_point": 3}, ["max_point", "'max_points'"]),
        ({"max_points": 0}, ["max_points", "0"]),
        ({"max_points": 2.5}, ["max_points", "2.5"]),
        ({"max_points": True}, ["max_points", "True"]),
        ({"min_confidence": float("nan")}, ["min_confidence", "nan"]),
        ({"min_confidence": "high"}, ["min_confidence", "high"]),
        ({"keep": "moving"}, ["keep", "moving"]),
    ):
        with fails_with(InputError, *words):
            scene.export(tmp_path / "out", "ply", **options)
    with fails_with(InputError, "'colmp'", "'colmap'", "monst3r"):
        scene.export(tmp_path / "out", "colmp")
    assert listing(tmp_path) == []


def test_depth_as_png_comes_back(tmp_path):
    scene = world_scene()
    scene.valid_mask[2, :5] = False
    folder = scene.export(tmp_path / "out", "depth-png")
    scale = json.loads((folder / "depth.json").read_text())["scale"]
    assert scale == pytest.approx(scene.depth[scene.valid_mask].max() / 65535)
    for i in range(5):
        expected = np.where(scene.valid_mask[i], scene.depth[i], 0)
        steps = iio.imread(folder / "depth" / f"frame_0000{i}.png")
        assert steps.dtype == np.uint16
        np.testing.assert_allclose(steps * scale, expected, atol=0.51 * scale)


def test_exports_need_no_torch(tmp_path):
    saved = world_scene(2).save(tmp_path / "saved")
    program = (
        "import sys\nfrom easi3r import Scene\n"
        "from easi3r.export import export_formats, FORMATS\n"
        f"written, failed = export_formats(Scene.load({str(saved)!r}), {str(tmp_path / 'out')!r}, FORMATS)\n"
        "print(len(written), failed, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{len(FORMATS)} {{}} False\n", done.stderr
