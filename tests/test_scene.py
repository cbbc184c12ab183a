"""Scene and Motion: what is saved comes back bit for bit, depth and cameras are the points, damage is told."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import imageio.v3 as iio
import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from small_inputs import listing

from easi3r import Motion, Scene
from easi3r.errors import InputError, OutputError
from easi3r.structures import AttentionMaps

MAPS = ("source_mean", "source_std", "reference_mean", "reference_std", "dynamic_map")
PIXEL_FOLDERS = {"images": "png", "dynamic_mask": "png", "dynamic_score": "npy", "depth": "npy", "confidence": "npy"}


def make_motion_values(num_frames=3, height=32, width=48, seed=0):
    rng = np.random.default_rng(seed)
    pixels = (num_frames, height, width)
    maps = [rng.random((num_frames, height // 16, width // 16), dtype=np.float32) for _ in MAPS]
    crop = {"original": [96, 80], "resized": [48, 40], "offset": [0, 4], "size": [width, height]}
    return {
        "images": rng.integers(0, 256, (*pixels, 3), dtype=np.uint8),
        "dynamic_score": rng.random(pixels, dtype=np.float32),
        "dynamic_mask": rng.random(pixels) < 0.3,
        "attention": AttentionMaps(*maps),
        "timestamps": 1e9 / 3 + np.arange(num_frames) / 7,
        "meta": {"crops": [crop] * num_frames, "seed": 3, "source": "größer 文件.mp4", "nothing": None},
    }


def make_motion(*arguments, **options):
    return Motion(**make_motion_values(*arguments, **options))


def make_scene(num_frames=3, height=32, width=48, seed=0):
    rng = np.random.default_rng(seed + 1)
    pixels = (num_frames, height, width)
    poses = np.tile(np.eye(4), (num_frames, 1, 1))
    poses[1:, :3, :3] = Rotation.random(max(num_frames - 1, 0), rng=rng).as_matrix()
    poses[1:, :3, 3] = rng.normal(size=(num_frames - 1, 3))
    intrinsics = np.tile(np.eye(3), (num_frames, 1, 1))
    intrinsics[:, 0, 0], intrinsics[:, 1, 1] = rng.uniform(30, 60, (2, num_frames))  # fx and fy differ
    intrinsics[:, :2, 2] = rng.uniform(10, 30, (num_frames, 2))
    return Scene(
        **make_motion_values(num_frames, height, width, seed),
        camera_to_world=poses.astype(np.float32),
        intrinsics=intrinsics.astype(np.float32),
        depth=rng.uniform(0.5, 9, pixels).astype(np.float32),
        confidence=rng.uniform(1, 9, pixels).astype(np.float32),
        valid_mask=np.ones(pixels, dtype=bool),
    )


def assert_same(first, second):
    """Every field, bit for bit, with its type."""
    assert type(first) is type(second)
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, AttentionMaps):
            for name in MAPS:
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(a, b, strict=True)
        else:
            assert a == b, field.name


# --- the folder


@pytest.mark.parametrize("num_frames", [1, 2, 5])
@pytest.mark.parametrize("make", [make_motion, make_scene])
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, make, num_frames):
    saved = make(num_frames)
    assert saved.save(tmp_path / "out") == tmp_path / "out"
    assert_same(type(saved).load(str(tmp_path / "out")), saved)


def test_padding_is_saved_too(tmp_path):
    scene = make_scene()
    scene.valid_mask[1, :, 40:] = False
    assert_same(Scene.load(scene.save(tmp_path / "out")), scene)
    assert sorted(path.name for path in (tmp_path / "out" / "valid_mask").iterdir()) == [
        f"frame_0000{i}.png" for i in range(3)
    ]


def test_the_folder_of_a_scene_holds_what_the_contract_lists(tmp_path):
    scene = make_scene(3)
    scene.save(tmp_path / "out")
    files = {"scene.json", "trajectory.txt", "cameras.npz", "attention.npz", "report.html", *PIXEL_FOLDERS}
    for folder, suffix in PIXEL_FOLDERS.items():
        files |= {f"{folder}/frame_{i:05d}.{suffix}" for i in range(3)}
    assert set(listing(tmp_path / "out")) == files


def test_the_files_hold_what_their_names_say(tmp_path):
    scene = make_scene(3)
    out = scene.save(tmp_path / "out")
    np.testing.assert_array_equal(iio.imread(out / "images" / "frame_00002.png"), scene.images[2])
    np.testing.assert_array_equal(iio.imread(out / "dynamic_mask" / "frame_00001.png"), scene.dynamic_mask[1] * 255)
    for name in ("dynamic_score", "depth", "confidence"):
        np.testing.assert_array_equal(np.load(out / name / "frame_00001.npy"), getattr(scene, name)[1], strict=True)
    with np.load(out / "cameras.npz") as cameras:
        for name in ("camera_to_world", "intrinsics", "original_intrinsics", "timestamps"):
            np.testing.assert_array_equal(cameras[name], getattr(scene, name), strict=True)
    with np.load(out / "attention.npz") as maps:
        assert sorted(maps.files) == sorted(MAPS)


@pytest.mark.parametrize("make", [make_motion, make_scene])
def test_scene_json_is_strict_json_with_meta_and_every_convention(tmp_path, make):
    result = make()
    out = result.save(tmp_path / "out")

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    header = json.loads((out / "scene.json").read_text(encoding="ascii"), parse_constant=refuse)
    assert header["meta"] == result.meta
    assert (header["kind"], header["num_frames"]) == (result.kind, 3)
    conventions = " ".join(f"{name}: {words}" for name, words in header["conventions"].items())
    explained = ["images", "dynamic_mask", "dynamic_score", "attention.npz", "timestamps", "255 = moves", "(0, 0)"]
    if make is make_scene:
        explained += ["depth", "confidence", "trajectory.txt", "cameras.npz", "z-depth", "OpenCV", "qx qy qz qw", "fx"]
    assert [words for words in explained if words not in conventions] == []
    unexplained = {path.name for path in out.iterdir()} - {"scene.json", "timestamps.npz", *header["conventions"]}
    assert unexplained == set()


@pytest.mark.parametrize(
    "value", [float("nan"), np.float32(1), {1, 2}, object()], ids=["nan", "numpy", "set", "object"]
)
def test_meta_that_is_no_json_is_refused_and_nothing_is_written(tmp_path, value):
    scene = make_scene()
    scene.meta["value"] = value
    with pytest.raises(OutputError, match="meta cannot be saved as JSON"):
        scene.save(tmp_path / "out")
    assert listing(tmp_path) == []


def test_saving_twice_needs_overwrite(tmp_path):
    make_scene(3).save(tmp_path / "out")
    shorter = make_scene(2, seed=5)
    with pytest.raises(OutputError, match="exists"):
        shorter.save(tmp_path / "out")
    shorter.save(tmp_path / "out", overwrite=True)
    assert_same(Scene.load(tmp_path / "out"), shorter)


# --- points


def points_by_loops(scene, frames):
    """The obvious twin of ``points``: one pixel after the other, from the textbook's formulas."""
    found = []
    for i in frames:
        (fx, _, cx), (_, fy, cy), _ = scene.intrinsics[i].astype(float)
        pose = scene.camera_to_world[i].astype(float)
        for y, row in enumerate(scene.depth[i]):
            for x, z in enumerate(row):
                point = ((x - cx) / fx * z, (y - cy) / fy * z, z)
                found.append([sum(pose[r, c] * point[c] for c in range(3)) + pose[r, 3] for r in range(3)])
    return np.array(found)


def test_unprojected_depth_is_the_point_cloud():
    scene = make_scene(3, 16, 32)
    cloud = scene.points()
    np.testing.assert_allclose(cloud.points, points_by_loops(scene, range(3)), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(cloud.colors, scene.images.reshape(-1, 3), strict=True)
    np.testing.assert_array_equal(cloud.dynamic, scene.dynamic_mask.reshape(-1), strict=True)
    np.testing.assert_array_equal(cloud.frame_index, np.repeat(np.arange(3, dtype=np.int32), 16 * 32), strict=True)
    assert cloud.points.dtype == np.float32


def test_the_point_cloud_of_a_loaded_scene_is_the_same(tmp_path):
    scene = make_scene()
    for before, after in zip(scene.points(), Scene.load(scene.save(tmp_path / "out")).points(), strict=True):
        np.testing.assert_array_equal(before, after, strict=True)


def test_points_project_back_to_their_pixels():
    scene = make_scene(2, 16, 32)
    points = scene.points(frames=[1]).points.astype(float)
    world_to_camera = np.linalg.inv(scene.camera_to_world[1].astype(float))
    u, v, w = scene.intrinsics[1].astype(float) @ (world_to_camera[:3] @ np.c_[points, np.ones(len(points))].T)
    rows, columns = np.mgrid[:16, :32]
    np.testing.assert_allclose([u / w, v / w, w], [columns.ravel(), rows.ravel(), scene.depth[1].ravel()], atol=1e-3)


def rows_of(cloud):
    return {tuple(row) for row in np.c_[cloud.frame_index, cloud.points, cloud.colors]}


def test_static_and_dynamic_points_are_a_partition_of_all():
    scene = make_scene()
    every, static, dynamic = (scene.points(keep=keep) for keep in ("all", "static", "dynamic"))
    assert dynamic.dynamic.all() and not static.dynamic.any()
    assert len(dynamic.points) == scene.dynamic_mask.sum() > 0
    assert len(static.points) + len(dynamic.points) == len(every.points) == scene.depth.size
    assert rows_of(static) | rows_of(dynamic) == rows_of(every)


def test_min_confidence_leaves_out_what_is_below_and_1_keeps_all():
    scene = make_scene()
    scene.confidence[0, 0, :3] = [4.9999, 5, 1]
    assert len(scene.points(min_confidence=1).points) == scene.depth.size
    cloud = scene.points(min_confidence=5)
    assert len(cloud.points) == (scene.confidence >= 5).sum()
    np.testing.assert_array_equal(cloud.colors[0], scene.images[0, 0, 1])
    assert len(scene.points(min_confidence=np.inf).points) == 0


@pytest.mark.parametrize(
    "frames, expected",
    [
        ([1], [1]),
        ([2, 0], [2, 0]),
        ([-1], [2]),
        ([-3, 2], [0, 2]),
        ([1, 1], [1, 1]),
        (range(0, 3, 2), [0, 2]),
        (np.array([0, 1], dtype=np.uint8), [0, 1]),
        (2, [2]),
        ([], []),
    ],
)
def test_frames_are_taken_in_the_order_given(frames, expected):
    scene = make_scene()
    cloud = scene.points(frames=frames)
    np.testing.assert_array_equal(cloud.frame_index, np.repeat(expected, 32 * 48).astype(np.int32), strict=True)
    np.testing.assert_array_equal(cloud.colors, scene.images[expected].reshape(-1, 3) if expected else np.empty((0, 3)))


@pytest.mark.parametrize("frames", [[3], [-4], [0, 99], [0.5], ["a"], [True, False, True], [[0]], slice(2), "01"])
def test_frames_that_are_not_there_are_refused_in_one_sentence(frames):
    with pytest.raises(InputError, match=r"^frames is .*; expected whole numbers from -3 to 2, .* 3 frames\.$"):
        make_scene().points(frames=frames)


@pytest.mark.parametrize("keep", ["moving", "", True])
def test_another_keep_is_refused_with_the_three_that_exist(keep):
    with pytest.raises(InputError, match=r"^keep is .*; expected 'all', 'static' or 'dynamic'\.$"):
        make_scene().points(keep=keep)


def test_padding_is_never_among_the_points():
    scene = make_scene()
    scene.valid_mask[1, 20:] = False
    scene.images[~scene.valid_mask] = 7
    scene.images[scene.valid_mask] = 9
    for keep in ("all", "static", "dynamic"):
        cloud = scene.points(keep=keep)
        assert len(cloud.colors) and (cloud.colors == 9).all()
    assert len(scene.points(frames=[1]).points) == 20 * 48


# --- cameras


def test_original_intrinsics_undo_resizing_by_a_half_and_cropping():
    scene = make_scene(1)  # 96x80 was halved to 48x40, and four rows cut off at the top
    scene.intrinsics[0] = [[50, 0, 20], [0, 60, 10], [0, 0, 1]]
    # x' = (x + 0.5) / 2 - 0.5, so x = 2 (x' + 0.5) - 0.5; the rows first move down by four
    expected = [[[100, 0, 40.5], [0, 120, 28.5], [0, 0, 1]]]
    np.testing.assert_allclose(scene.original_intrinsics, expected, rtol=1e-6)
    assert scene.original_intrinsics.dtype == np.float32


def test_trajectory_of_a_known_pose_in_the_order_of_tum(tmp_path):
    scene = make_scene(2)
    half = math.sqrt(0.5)
    scene.timestamps = np.array([0.0, 1234567890.125])
    scene.camera_to_world[1] = [[1, 0, 0, 4], [0, 0, -1, 5], [0, 1, 0, 6], [0, 0, 0, 1]]  # 90 degrees about x
    out = scene.save(tmp_path / "out")
    rows = np.loadtxt(out / "trajectory.txt")
    np.testing.assert_allclose(rows[0], [0, 0, 0, 0, 0, 0, 0, 1], atol=1e-9)
    sign = np.sign(rows[1, 7])  # q and -q are the same rotation
    np.testing.assert_allclose(rows[1, :4], [1234567890.125, 4, 5, 6], rtol=0, atol=1e-6)
    np.testing.assert_allclose(sign * rows[1, 4:], [half, 0, 0, half], atol=1e-6)


def test_trajectory_gives_every_pose_back():
    scene = make_scene(5)
    for row, pose, time in zip(scene.trajectory(), scene.camera_to_world, scene.timestamps, strict=True):
        assert row[0] == time and row.dtype == np.float64
        np.testing.assert_array_equal(row[1:4], pose[:3, 3])
        np.testing.assert_allclose(Rotation.from_quat(row[4:]).as_matrix(), pose[:3, :3], atol=1e-6)


# --- without torch


def test_scenes_open_where_torch_cannot_be_imported(tmp_path):
    scene = make_scene()
    out = scene.save(tmp_path / "out")
    program = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
from easi3r import Motion, Scene
scene = Scene.load(sys.argv[1])
scene.save(sys.argv[2])
print(len(scene.points(keep="dynamic").points), scene.trajectory().shape, "torch" in sys.modules)
try:
    from easi3r import Easi3R
except ModuleNotFoundError as error:
    print(error)
"""
    command = [sys.executable, "-c", program, str(out), str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    expected = [f"{scene.dynamic_mask.sum()} (3, 8) False", "No module named 'torch'"]
    assert (done.stdout.splitlines(), done.stderr) == (expected, "")
    assert_same(Scene.load(tmp_path / "copy"), scene)


# --- damage


def edit_header(folder, **changes):
    header = json.loads((folder / "scene.json").read_text())
    (folder / "scene.json").write_text(json.dumps(header | changes))


def truncate(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


DAMAGE = {
    "not JSON": lambda out: (out / "scene.json").write_text("{"),
    "empty JSON": lambda out: (out / "scene.json").write_text(""),
    "another JSON": lambda out: (out / "scene.json").write_text('{"asset": {"version": "2.0"}}'),
    "a JSON list": lambda out: (out / "scene.json").write_text("[1, 2]"),
    "deep JSON": lambda out: (out / "scene.json").write_text("[" * 100_000),
    "not text": lambda out: (out / "scene.json").write_bytes(b"\xff\xfe\x00"),
    "NaN in JSON": lambda out: edit_header(out, meta={"value": float("nan")}),
    "meta is a list": lambda out: edit_header(out, meta=[1]),
    "absurd number of frames": lambda out: edit_header(out, num_frames=10**12),
    "negative number of frames": lambda out: edit_header(out, num_frames=-3),
    "no number of frames": lambda out: edit_header(out, num_frames="three"),
    "no frames": lambda out: edit_header(out, num_frames=0),
    "one frame fewer": lambda out: edit_header(out, num_frames=2),
    "missing frame": lambda out: (out / "depth" / "frame_00001.npy").unlink(),
    "missing folder": lambda out: shutil.rmtree(out / "confidence"),
    "missing cameras": lambda out: (out / "cameras.npz").unlink(),
    "missing attention": lambda out: (out / "attention.npz").unlink(),
    "truncated npz": lambda out: truncate(out / "cameras.npz"),
    "truncated end of npz": lambda out: truncate(out / "cameras.npz", 0.95),
    "empty npz": lambda out: truncate(out / "attention.npz", 0),
    "truncated npy": lambda out: truncate(out / "depth" / "frame_00002.npy"),
    "truncated image": lambda out: truncate(out / "images" / "frame_00000.png"),
    "empty image": lambda out: truncate(out / "images" / "frame_00000.png", 0),
    "flipped bits": lambda out: (out / "attention.npz").write_bytes(bytes(b ^ 8 for b in b"PK\3\4" + bytes(900))),
    "another npz": lambda out: np.savez(out / "attention.npz", weights=np.zeros(3)),
    "pickle": lambda out: np.save(out / "depth" / "frame_00001.npy", np.array([{}]), allow_pickle=True),
    "depth of another size": lambda out: [
        np.save(path, np.ones((8, 8), np.float32)) for path in (out / "depth").iterdir()
    ],
    "cameras of another clip": lambda out: np.savez(
        out / "cameras.npz", camera_to_world=np.eye(4)[None], intrinsics=np.eye(3)[None], timestamps=np.zeros(1)
    ),
    "grey images": lambda out: [iio.imwrite(path, np.zeros((32, 48), np.uint8)) for path in (out / "images").iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_told_in_one_sentence(tmp_path, damage):
    out = make_scene().save(tmp_path / "out")
    DAMAGE[damage](out)
    with pytest.raises(OutputError) as caught:
        Scene.load(out)
    message = str(caught.value)
    assert message.startswith(f"The saved result at {out} is damaged (") and message.endswith("); make it again.")
    assert "\n" not in message and len(message) < 300 + len(str(out))


def test_what_is_no_result_at_all_is_told_as_such(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("empty", "file", "nowhere"):
        with pytest.raises(OutputError, match=rf"no saved result at .*{name}; expected a folder with scene.json"):
            Scene.load(tmp_path / name)


def test_a_folder_of_the_other_kind_says_how_to_load_it(tmp_path):
    motion, scene = make_motion().save(tmp_path / "motion"), make_scene().save(tmp_path / "scene")
    with pytest.raises(OutputError, match=r"holds a saved motion, not a scene; load it with Motion.load\.$"):
        Scene.load(motion)
    with pytest.raises(OutputError, match=r"holds a saved scene, not a motion; load it with Scene.load\.$"):
        Motion.load(scene)


@pytest.mark.parametrize("changes", [{"format_version": 2}, {"kind": "splats"}])
def test_a_folder_from_the_future_asks_for_an_upgrade(tmp_path, changes):
    out = make_scene().save(tmp_path / "out")
    edit_header(out, **changes)
    with pytest.raises(OutputError, match="needs a newer easi3r"):
        Scene.load(out)
