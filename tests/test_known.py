"""What users hand in besides the frames: every form of the same cameras gives the same, and what cannot be is said."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from easi3r.errors import InputError
from easi3r.frames import plan_crop
from easi3r.geometry import invert_rigid
from easi3r.given_masks import read_masks
from easi3r.known import read_known
from easi3r.structures import Frames

N, SIZE = 3, (1280, 720)  # becomes 512 x 288: a scale of 0.4
K = np.array([[1000.0, 0, 650], [0, 1010, 350], [0, 0, 1]])
K_NETWORK = np.array([[400.0, 0, 259.7], [0, 404, 139.7], [0, 0, 1]])  # (650 + 0.5) 0.4 - 0.5


def make_frames(n=N, size=SIZE, image_size=None, *, timestamps=None, source="array", names=None):
    crop = plan_crop(size, image_size, patch_size=16, trained_size=512)
    return Frames(
        images=np.zeros((n, crop.size[1], crop.size[0], 3), dtype=np.uint8),
        timestamps=np.arange(n, dtype=np.float64) if timestamps is None else np.asarray(timestamps),
        crops=(crop,) * n,
        names=names or tuple(f"frame {i}" for i in range(n)),
        source=source,
    )


def some_poses(n=N, seed=0):
    """[n, 4, 4], camera-to-world or the other way round."""
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(rng.normal(size=(n, 3))).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(n, 3)) * 10
    return poses


def tum_rows(poses, times):
    quaternions = Rotation.from_matrix(poses[:, :3, :3]).as_quat()
    return np.column_stack([times, poses[:, :3, 3], quaternions])


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def intrinsics_of(given, frames=None):
    return read_known(frames or make_frames(), intrinsics=given).intrinsics


def test_nothing_given_is_nothing_known():
    known = read_known(make_frames())
    assert known.intrinsics is None and known.camera_to_world is None and known.depth is None


# intrinsics


def test_every_way_to_give_the_same_intrinsics_gives_the_same(tmp_path):
    four, each = [1000, 1010, 650, 350], np.tile(K, (N, 1, 1))
    np.save(tmp_path / "k.npy", K)
    row = write(tmp_path / "row.txt", "# fx fy cx cy\n1000, 1010, 650, 350\n")
    rows = write(tmp_path / "rows.txt", "1000 1010 650 350  # the first\n" * N)
    matrix = write(tmp_path / "matrix.txt", "1000 0 650\n0 1010 350\n\n0 0 1\n")
    ways = [four, tuple(four), "1000,1010,650,350", " 1000 1010 650 350", np.array(four), np.array([four] * N), K, each]
    ways += [K.tolist(), K.astype(np.float32), {0: K, 1: four, np.int64(2): "1000,1010,650,350"}]
    ways += [tmp_path / "k.npy", str(tmp_path / "k.npy"), row, str(rows), matrix]
    ways += [save(tmp_path / f"{key}.npz", **{key: each}) for key in ("original_intrinsics", "intrinsics", "K")]
    ways += [save(tmp_path / "ours.npz", original_intrinsics=each, intrinsics=each * 0.4, camera_to_world=each)]
    ways += [save(tmp_path / "chosen.npz", K=each, frames=np.arange(N))]
    for given in ways:
        np.testing.assert_allclose(intrinsics_of(given), np.tile(K_NETWORK, (N, 1, 1)), rtol=1e-7, err_msg=str(given))


@pytest.mark.parametrize("given", [1000, "1000", 1000.0, np.float32(1000), [1000], "1000.txt"])
def test_a_focal_length_alone_has_its_principal_point_in_the_centre(given, tmp_path):
    if given == "1000.txt":
        given = write(tmp_path / "1000.txt", "1000\n")
    expected = [[400, 0, 255.5], [0, 400, 143.5], [0, 0, 1]]
    np.testing.assert_allclose(intrinsics_of(given), [expected] * N)


def test_three_numbers_are_one_focal_length_and_the_principal_point():
    np.testing.assert_allclose(intrinsics_of("1000, 650, 350")[2], [[400, 0, 259.7], [0, 400, 139.7], [0, 0, 1]])
    rows = [[1000, 650, 350], [1000, 650, 350], [1100, 650, 350]]  # 3 x 3, but no matrix ends in such a row
    assert intrinsics_of(rows)[:, 0, 0].tolist() == [400, 400, 440]


@pytest.mark.parametrize("size", [(1280, 720), (101, 67), (500, 500), (240, 320), (96, 128)])
@pytest.mark.parametrize("image_size", [None, "native", 224])
def test_the_crop_takes_intrinsics_back(size, image_size):
    frames = make_frames(2, size, image_size)
    given = np.array([[300.0, 0, size[0] * 0.52], [0, 310, size[1] * 0.47], [0, 0, 1]])
    for crop, matrix in zip(frames.crops, intrinsics_of(given, frames), strict=True):
        np.testing.assert_allclose(crop.to_original(matrix), given, atol=1e-9)
        np.testing.assert_allclose(matrix[:2, 2], crop.matrix()[:2] @ [*given[:2, 2], 1])


def test_what_is_not_known_of_some_frames_stays_unknown(tmp_path):
    each = np.tile(K, (N, 1, 1))
    each[1] = np.nan
    with_end = each.copy()
    with_end[1, 2] = 0, 0, 1
    stored = save(tmp_path / "some.npz", K=each[[2, 0]], frames=[2, 0])
    rows = write(tmp_path / "rows.txt", "1000 1010 650 350\nnan nan nan nan\n1000 1010 650 350\n")
    for given in (each, with_end, {0: K, 2: K}, {0: K, 1: np.full((3, 3), np.nan), 2: K}, stored, rows):
        read = intrinsics_of(given)
        np.testing.assert_allclose(read[[0, 2]], [K_NETWORK] * 2)
        assert np.isnan(read[1]).all()


def write_photos(folder, focals_mm):
    folder.mkdir(exist_ok=True)
    for i, focal in enumerate(focals_mm):
        image, exif = Image.new("RGB", (128, 96)), Image.Exif()
        if focal is not None:
            exif.get_ifd(0x8769)[41989] = focal
        image.save(folder / f"{i}.jpg", exif=exif)
    return folder


def test_exif_gives_the_focal_length(tmp_path):
    folder = write_photos(tmp_path / "photos", [26, None, 52, 0])
    frames = make_frames(4, (128, 96), "native", source=str(folder), names=("0.jpg", "1.jpg", "2.jpg", "3.jpg"))
    read = intrinsics_of("exif", frames)
    focal = 26 / math.hypot(36, 24) * 160  # the diagonal of 128 x 96
    np.testing.assert_allclose(read[0], [[focal, 0, 63.5], [0, focal, 47.5], [0, 0, 1]], rtol=1e-5)
    np.testing.assert_allclose(read[2, 0, 0], 2 * focal, rtol=1e-5)
    assert np.isnan(read[[1, 3]]).all()
    single = make_frames(1, (128, 96), "native", source=str(folder / "2.jpg"), names=("2.jpg",))
    np.testing.assert_array_equal(intrinsics_of("EXIF", single), read[2:3])


def test_exif_needs_images_that_have_it(tmp_path, fails_with):
    folder = write_photos(tmp_path / "photos", [None, 0])
    with fails_with(InputError, "no image of", "41989"):
        intrinsics_of("exif", make_frames(2, (128, 96), source=str(folder), names=("0.jpg", "1.jpg")))
    for source in ("array", str(tmp_path / "clip.mp4")):
        with fails_with(InputError, "'exif'", "no image files"):
            intrinsics_of("exif", make_frames(source=source))


BAD_INTRINSICS = [
    (None, True, "bool"),
    (None, "", "COLMAP"),
    (None, "nowhere.txt", "does not exist"),
    (None, "5e3e3", "does not exist"),
    (None, [], "[0]"),
    (None, [1000, 650], "[2]"),
    (None, [[1, 2], [3]], "no array"),
    (None, object(), "object"),
    (None, np.ones((2, 3, 3)), "[2, 3, 3] for 3 frames"),
    (None, [1000, 1000, 650, 350, 0], "[5]"),
    (None, K.T, "frame 0 are [[1000"),
    (None, np.diag([1000, 1000, 0.0]), "without skew"),
    (None, K + np.outer([1, 0, 0], [0, 9, 0]), "without skew"),
    (None, [np.inf, 640, 360], "finite"),
    (None, [1000, np.nan, 360], "finite"),
    (None, np.full((N, 3, 3), np.nan), "NaN for every frame"),
    (None, 0, "above 0"),
    (None, -1000, "above 0"),
    (None, [1000, 400, 640, 360], "twice the other"),
    (None, 0.8, "degrees"),
    (None, [0.8, 0.8, 0.5, 0.5], "degrees"),
    (None, 50_000, "degrees"),
    (None, {}, "frames []"),
    (None, {3: K}, "from 0 to 2"),
    (None, {-1: K}, "from 0 to 2"),
    (None, {"0": K}, "whole numbers"),
    (None, {True: K}, "whole numbers"),
    (None, {0: np.ones((2, 3, 3))}, "intrinsics[0]"),
    (None, {0: "exif"}, "intrinsics"),
    ("a.txt", "", "no numbers"),
    ("a.txt", "1000 x 3", "no table"),
    ("a.txt", "1000 650 350\n1000 650", "no table"),
    ("a.txt", "1000 650 350\n1000 650 350", "[2, 3] for 3 frames"),
    ("a.npy", "no array", "cannot be read by numpy"),
    ("a.npz", "", "cannot be read by numpy"),
    ("a.npz", {"M": K}, "holds M; expected the key original_intrinsics or intrinsics or K"),
    ("a.npz", {"K": np.array(["a"])}, "no plain numbers"),
    ("a.npz", {"K": np.array([None])}, "cannot be read by numpy"),
    ("a.npz", {"K": K, "frames": [0.5]}, "whole numbers"),
    ("a.npz", {"K": K, "frames": [0, 0]}, "none twice"),
    ("a.npz", {"K": K, "frames": 7}, "from 0 to 2"),
    ("a.yaml", "K: 3", "COLMAP"),
]


@pytest.mark.parametrize("name, given, part", BAD_INTRINSICS)
def test_bad_intrinsics_are_named(name, given, part, tmp_path, fails_with):
    if name:
        path = tmp_path / name
        given = write(path, given) if isinstance(given, str) else save(path, **given)
    with fails_with(InputError, part):
        intrinsics_of(given)


@pytest.mark.parametrize(
    "size, parts",
    [
        ((3840, 2160), ("about 3840x2160 pixels, but the frames are 1920x1080", "by 0.5")),
        ((1280, 720), ("about 1280x720", "by 1.5")),
        ((960, 540), ("about 960x540", "by 2)")),
        ((512, 288), ("network's images (512x288 pixels)", "original_intrinsics")),
    ],
)
def test_intrinsics_of_another_size_are_named(size, parts, fails_with):
    width, height = size
    given = [width, width, (width - 1) / 2, (height - 1) / 2]
    with fails_with(InputError, *parts):
        intrinsics_of(given, make_frames(size=(1920, 1080)))
    with fails_with(InputError, "frame 2"):
        intrinsics_of({0: 1000, 2: given}, make_frames(size=(1920, 1080)))


def test_a_principal_point_beside_the_centre(caplog, fails_with):
    def given(x, y):
        return intrinsics_of([1000, x * 1280, y * 720])

    with caplog.at_level(logging.WARNING, logger="easi3r"):
        for x, y in [(0.5, 0.5), (0.47, 0.46), (0.56, 0.56), (0.38, 0.52), (0.4, 0.6)]:
            given(x, y)
        assert not caplog.records
        given(0.2, 0.5)  # as of a picture that was cut
        assert "principal point of 3 frames" in caplog.text
    for x, y in [(-0.01, 0.5), (0.5, 1.01), (-0.5, -0.5)]:
        with fails_with(InputError, "outside of the frame of 1280x720"):
            given(x, y)


# poses


def test_every_way_to_give_the_same_poses_gives_the_same(tmp_path):
    poses = some_poses()
    table = tum_rows(poses, range(N))
    np.savetxt(tmp_path / "tum.txt", table[[2, 0, 1]], header="t tx ty tz qx qy qz qw")
    np.save(tmp_path / "poses.npy", poses)
    ways = [poses, poses[:, :3], poses.tolist(), dict(enumerate(poses)), {i: poses[i, :3] for i in range(N)}]
    ways += [tmp_path / "tum.txt", str(tmp_path / "tum.txt"), tmp_path / "poses.npy"]
    for keyword, expected in (("camera_to_world", poses), ("world_to_camera", np.linalg.inv(poses))):
        stored = save(tmp_path / f"{keyword}.npz", **{keyword: poses, "frames": np.arange(N)})
        for given in [*ways, stored]:
            read = read_known(make_frames(), **{keyword: given}).camera_to_world
            np.testing.assert_allclose(read, expected, atol=1e-12, err_msg=str(given))


def test_rotations_are_made_exact():
    poses = some_poses()
    read = read_known(make_frames(), camera_to_world=poses.round(4)).camera_to_world
    np.testing.assert_allclose(read, poses, atol=2e-4)
    rotation = read[:, :3, :3]
    np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(3), (N, 1, 1)), atol=1e-14)
    np.testing.assert_array_equal(read[:, 3], [[0, 0, 0, 1]] * N)


@pytest.mark.parametrize("keyword", ["camera_to_world", "world_to_camera"])
def test_poses_that_are_not_known_stay_unknown(keyword, tmp_path):
    poses = some_poses()
    holed, ended = poses.copy(), poses.copy()
    holed[1] = ended[1, :3] = np.nan
    stored = save(tmp_path / "some.npz", **{keyword: poses[[2, 0]], "frames": [2, 0]})
    np.savetxt(tmp_path / "tum.txt", tum_rows(poses, [0, 1.5, 2.01])[[0, 2]])
    for given in (holed, ended, holed[:, :3], {0: poses[0], 2: poses[2]}, stored, tmp_path / "tum.txt"):
        read = read_known(make_frames(), **{keyword: given}).camera_to_world
        expected = poses if keyword == "camera_to_world" else np.linalg.inv(poses)
        np.testing.assert_allclose(read[[0, 2]], expected[[0, 2]], atol=1e-12)
        assert np.isnan(read[1]).all()


def test_one_frame():
    known = read_known(make_frames(1), intrinsics=K, world_to_camera=some_poses(1), depth=np.ones((1, 288, 512)))
    np.testing.assert_allclose(known.camera_to_world, np.linalg.inv(some_poses(1)), atol=1e-12)
    np.testing.assert_allclose(known.intrinsics, [K_NETWORK])
    assert known.depth.shape == (1, 288, 512)


def read_tum(tmp_path, times, clock):
    """Which row each frame gets, None for none."""
    poses = some_poses(len(times))
    np.savetxt(tmp_path / "tum.txt", tum_rows(poses, times))
    read = read_known(make_frames(len(clock), timestamps=clock), camera_to_world=tmp_path / "tum.txt").camera_to_world
    found = np.abs(read[:, None, :3, 3] - poses[None, :, :3, 3]).max(-1) < 1e-9
    return [int(row.argmax()) if row.any() else None for row in found]


def test_tum_rows_go_to_the_frames_of_their_times(tmp_path):
    assert read_tum(tmp_path, [0, 0.1, 0.2, 0.3, 0.4], [0.1, 0.3]) == [1, 3]
    assert read_tum(tmp_path, [0.019, 1.021, 2], [0, 1, 2]) == [0, None, 2]  # 0.02 s is near
    assert read_tum(tmp_path, [0, 0.006, 0.02], [0, 0.01, 0.02]) == [0, 1, 2]  # half of the gap is 0.005 s
    assert read_tum(tmp_path, [0, 0.004, 0.02], [0, 0.01, 0.02]) == [0, None, 2]
    assert read_tum(tmp_path, [-0.01, 0.01, 0.02], [0.0]) in ([0], [1])
    assert read_tum(tmp_path, [1311868164.3, 1311868164.4], [1311868164.4, 1311868165.0]) == [1, None]


def test_tum_rows_on_another_clock_go_in_order(tmp_path, fails_with):
    assert read_tum(tmp_path, [1311868164.3, 1311868164.4], [0, 1]) == [0, 1]
    assert read_tum(tmp_path, [100.0], [0]) == [0]
    with fails_with(InputError, "3 poses are from 100 to 102 s, the 2 frames from 0 to 1 s"):
        read_tum(tmp_path, [100, 101, 102], [0, 1])


def test_poses_of_the_other_direction_are_refused(tmp_path, fails_with):
    stored = save(tmp_path / "cameras.npz", camera_to_world=some_poses())
    with fails_with(InputError, "holds camera_to_world, but was given as world_to_camera", "say camera_to_world="):
        read_known(make_frames(), world_to_camera=stored)
    stored = save(tmp_path / "both.npz", camera_to_world=some_poses(), world_to_camera=invert_rigid(some_poses()))
    for keyword in ("camera_to_world", "world_to_camera"):
        read = read_known(make_frames(), **{keyword: stored}).camera_to_world
        np.testing.assert_allclose(read, some_poses(), atol=1e-12)
    with fails_with(InputError, "both given"):
        read_known(make_frames(), camera_to_world=some_poses(), world_to_camera=some_poses())


def with_frame_1(change):
    poses = some_poses()
    poses[1] = change(poses[1])
    return poses


BAD_POSES = [
    (None, 5, "[]"),
    (None, some_poses(2), "[2, 4, 4] for 3 frames"),
    (None, some_poses()[:, :, :3], "[3, 4, 3]"),
    (None, "nowhere", "does not exist"),
    (None, {}, "frames []"),
    (None, {1: np.eye(3)}, "camera_to_world[1]"),
    (None, {5: np.eye(4)}, "from 0 to 2"),
    (None, np.full((N, 4, 4), np.nan), "NaN for every frame"),
    (None, with_frame_1(lambda pose: pose * [[2], [2], [2], [1]]), "frame 1 holds no rotation"),
    (None, with_frame_1(lambda pose: pose @ np.diag([1, 1, 1.002, 1])), "frame 1 holds no rotation"),
    (None, with_frame_1(lambda pose: pose @ np.diag([1, -1, 1, 1])), "determinant is -1"),
    (None, with_frame_1(lambda pose: pose @ np.diag([1, 1, 1, 2])), "last row of camera_to_world of frame 1"),
    (None, with_frame_1(lambda pose: pose.T), "translation in the last column"),
    (None, with_frame_1(lambda pose: np.where(np.eye(4), np.nan, pose)), "frame 1 is not finite"),
    (None, with_frame_1(lambda pose: pose + [[0, 0, 0, np.inf]] * 4), "frame 1 is not finite"),
    ("a.txt", "0 0 0 0 0 0 0", "TUM's 8"),
    ("a.txt", "0 0 0 0 0 0 0 0", "not of length 1"),
    ("a.txt", "0 0 nan 0 0 0 0 1", "not finite"),
    ("a.txt", "nan 0 0 0 0 0 0 1", "not finite"),
    ("a.npz", {"poses": some_poses()}, "expected the key camera_to_world"),
    ("a.npz", {"camera_to_world": some_poses(), "frames": [0, 1]}, "[3, 4, 4] for 2 frames"),
    ("a.json", "{}", "COLMAP"),
]


@pytest.mark.parametrize("name, given, part", BAD_POSES)
def test_bad_poses_are_named(name, given, part, tmp_path, fails_with):
    if name:
        path = tmp_path / name
        given = write(path, given) if isinstance(given, str) else save(path, **given)
    with fails_with(InputError, part):
        read_known(make_frames(), camera_to_world=given)


# depth


def some_depth(shape):
    return np.random.default_rng(0).integers(1, 1 << 20, shape) / 1024


def depth_of(given, frames):
    return read_known(frames, depth=given).depth


def test_every_way_to_give_the_same_depth_gives_the_same(tmp_path):
    frames = make_frames(2, (101, 67), "native")  # the middle 96 x 64, from (2, 1) on
    depth = some_depth((2, 67, 101))
    for folder in ("npy", "npz"):
        (tmp_path / folder).mkdir()
        for name, layer in zip(("d9", "d10"), depth, strict=True):  # in natural order
            save_one = np.save if folder == "npy" else lambda path, layer: np.savez(path, depth=layer)
            save_one(tmp_path / folder / f"{name}.{folder}", layer)
    np.save(tmp_path / "all.npy", depth)
    both = save(tmp_path / "all.npz", depth=depth[::-1], frames=[1, 0])
    ways = [depth, list(depth), depth.tolist(), dict(enumerate(depth)), depth[:, 1:65, 2:98], both]
    ways += [[depth[0], depth[1, 1:65, 2:98]], tmp_path / "npy", str(tmp_path / "npz"), tmp_path / "all.npy"]
    for given in ways:
        np.testing.assert_array_equal(depth_of(given, frames), depth[:, 1:65, 2:98], strict=True)


@pytest.mark.parametrize("size", [(128, 96), (101, 67), (500, 375), (96, 128), (100, 100)])
@pytest.mark.parametrize("image_size", [64, 128, 224, 300])
def test_depth_is_resized_like_masks(size, image_size):
    frames = make_frames(1, size, image_size)
    bits = np.random.default_rng(1).random((1, size[1], size[0])) < 0.5
    np.testing.assert_array_equal(depth_of(bits + 1.0, frames) == 2, read_masks(bits, frames).mask)


def test_depth_that_cannot_be_is_unknown():
    frames = make_frames(2, (48, 32), "native")
    depth = some_depth((2, 32, 48))
    depth[0, 0, :5] = 0, -1, np.nan, np.inf, -np.inf
    read = depth_of(depth, frames)
    assert np.isnan(read[0, 0, :5]).all() and np.isnan(read).sum() == 5
    only_last = depth_of({1: depth[1]}, frames)
    np.testing.assert_array_equal(only_last[1], depth[1])
    assert np.isnan(only_last[0]).all()


BAD_DEPTH = [
    (None, 3.0, "[]"),
    (None, np.ones((288, 512)), "[288, 512]"),
    (None, np.ones((2, 288, 512)), "2 depth maps were given for 3 frames"),
    (None, np.ones((N, 288, 512), dtype=bool), "ndarray"),
    (None, np.zeros((N, 288, 512)), "no finite value above 0"),
    (None, np.ones((N, 512, 288)), "frame 0 is 288x512 pixels"),
    (None, {0: np.ones(5)}, "frame 0 is of shape [5]"),
    (None, {4: np.ones((288, 512))}, "from 0 to 2"),
    (None, "nowhere", "does not exist"),
    ("", None, "holds no .npy"),
    ("a.png", "", "folder"),
    ("a.npz", {"z": np.ones(1)}, "expected the key depth"),
]


@pytest.mark.parametrize("name, given, part", BAD_DEPTH)
def test_bad_depth_is_named(name, given, part, tmp_path, fails_with):
    if name is not None:
        path = tmp_path / name
        given = save(path, **given) if isinstance(given, dict) else path if given is None else write(path, given)
    with fails_with(InputError, part):
        depth_of(given, make_frames())
