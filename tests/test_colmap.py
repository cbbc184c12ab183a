"""COLMAP's models, text and binary, as its documentation lays them out."""

from __future__ import annotations

import logging
import struct

import numpy as np
import pytest
from test_known import make_frames, write

from easi3r.errors import InputError
from easi3r.known import read_known

NAMES = ("a_1.jpg", "a_2.jpg", "a_3.jpg")
MODELS = {"SIMPLE_PINHOLE": 0, "PINHOLE": 1, "SIMPLE_RADIAL": 2, "RADIAL": 3, "OPENCV": 4, "OPENCV_FISHEYE": 5}
CAMERAS = [(1, "PINHOLE", 1280, 720, (1000, 1010, 650.5, 350.5)), (7, "SIMPLE_PINHOLE", 1280, 720, (900, 640, 360))]
HALF = 0.5**0.5
# id, quaternion w x y z, translation, camera, name: half a turn about y, and a quarter about z
IMAGES = [
    (4, (0, 0, 1, 0), (1, 2, 3), 7, "sub/a_3.jpg"),
    (2, (HALF, 0, 0, HALF), (4, 5, 6), 1, "sub/a_1.jpg"),
]
A_1 = [[0, -1, 0, 4], [1, 0, 0, 5], [0, 0, 1, 6], [0, 0, 0, 1]]
A_3 = [[-1, 0, 0, 1], [0, 1, 0, 2], [0, 0, -1, 3], [0, 0, 0, 1]]


def write_text(folder, cameras=CAMERAS, images=IMAGES, points="1.5 2.5 -1 3 4 12"):
    folder.mkdir(exist_ok=True)
    lines = [" ".join(map(str, (number, model, w, h, *values))) for number, model, w, h, values in cameras]
    write(folder / "cameras.txt", "\n".join(["# Camera list", *lines, ""]))
    lines = [" ".join(map(str, (i, *q, *t, camera, name))) + f"\n{points}\n" for i, q, t, camera, name in images]
    write(folder / "images.txt", "# Image list\n" + "".join(lines))
    return folder


def write_binary(folder, cameras=CAMERAS, images=IMAGES, points=2):
    folder.mkdir(exist_ok=True)
    data = struct.pack("<Q", len(cameras))
    for number, model, w, h, values in cameras:
        data += struct.pack(f"<iiQQ{len(values)}d", number, MODELS[model], w, h, *values)
    (folder / "cameras.bin").write_bytes(data)
    data = struct.pack("<Q", len(images))
    for i, q, t, camera, name in images:
        data += struct.pack("<I7dI", i, *q, *t, camera) + name.encode() + b"\0" + struct.pack("<Q", points)
        data += struct.pack("<ddq", 1.5, 2.5, -1) * points
    (folder / "images.bin").write_bytes(data)
    return folder


WRITERS = pytest.mark.parametrize("write_model", [write_text, write_binary])


@WRITERS
@pytest.mark.parametrize("names", [NAMES, ("a_1.png", "a_2.png", "a_3.png"), ("a_1", "a_2", "a_3")])
def test_a_model_gives_poses_and_intrinsics_by_file_name(write_model, names, tmp_path):
    model, frames = write_model(tmp_path / "model"), make_frames(names=names)
    suffix = ".txt" if write_model is write_text else ".bin"
    for k, w in ((model, str(model)), (model / f"cameras{suffix}", model / f"images{suffix}")):
        known = read_known(frames, intrinsics=k, world_to_camera=w)
        np.testing.assert_allclose(np.linalg.inv(known.camera_to_world[[0, 2]]), [A_1, A_3], atol=1e-12)
        # COLMAP's (650.5, 350.5) is our (650, 350), and its (640, 360) the centre
        np.testing.assert_allclose(known.intrinsics[0], [[400, 0, 259.7], [0, 404, 139.7], [0, 0, 1]])
        np.testing.assert_allclose(known.intrinsics[2], [[360, 0, 255.5], [0, 360, 143.5], [0, 0, 1]])
        assert np.isnan(known.camera_to_world[1]).all() and np.isnan(known.intrinsics[1]).all()


def test_images_without_points_leave_an_empty_line(tmp_path):
    for model in (write_text(tmp_path / "text", points=""), write_binary(tmp_path / "binary", points=0)):
        known = read_known(make_frames(names=NAMES), world_to_camera=model)
        np.testing.assert_allclose(np.linalg.inv(known.camera_to_world[[0, 2]]), [A_1, A_3], atol=1e-12)


@WRITERS
@pytest.mark.parametrize(
    "model, values, warns",
    [
        ("SIMPLE_RADIAL", (900, 640, 360, 0), False),
        ("SIMPLE_RADIAL", (900, 640, 360, -0.1), True),
        ("RADIAL", (900, 640, 360, 0, 0.01), True),
        ("OPENCV", (900, 900, 640, 360, 0, 0, 0, 0), False),
        ("OPENCV", (900, 900, 640, 360, 0, 0, 0.001, 0), True),
    ],
)
def test_one_camera_is_that_of_all_frames_and_distortion_is_dropped(
    write_model, model, values, warns, tmp_path, caplog
):
    folder = write_model(tmp_path / "model", [(3, model, 1280, 720, values)], [])
    with caplog.at_level(logging.WARNING, logger="easi3r"):
        read = read_known(make_frames(names=NAMES), intrinsics=folder).intrinsics
    np.testing.assert_allclose(read, [[[360, 0, 255.5], [0, 360, 143.5], [0, 0, 1]]] * 3)
    assert ("distortion of camera 3" in caplog.text) is warns


@WRITERS
def test_models_that_do_not_fit_are_named(write_model, tmp_path, fails_with):
    frames, model = make_frames(names=NAMES), write_model(tmp_path / "model")
    with fails_with(InputError, "world_to_camera", "say world_to_camera="):
        read_known(frames, camera_to_world=model)
    with fails_with(InputError, "for images of about 1280x720", "frames are 640x360", "by 0.5)"):
        read_known(make_frames(size=(640, 360), names=NAMES), intrinsics=model)
    with fails_with(InputError, "'sub/a_3.jpg' and the like", "'frame 0' and the like"):
        read_known(make_frames(), world_to_camera=model)
    twice = write_model(tmp_path / "twice", images=[*IMAGES, (9, (1, 0, 0, 0), (0, 0, 0), 1, "other/a_1.jpg")])
    with fails_with(InputError, "2 images", "'a_1.jpg'"):
        read_known(frames, world_to_camera=twice)
    fisheye = write_model(tmp_path / "fisheye", [(1, "OPENCV_FISHEYE", 1280, 720, (1,) * 8)])
    with fails_with(InputError, "undistort the images first"):
        read_known(frames, intrinsics=fisheye)
    with fails_with(InputError, "no such camera"):
        read_known(frames, intrinsics=write_model(tmp_path / "lacks", [CAMERAS[1], (8, *CAMERAS[0][1:])]))
    with fails_with(InputError, "not of length 1"):
        read_known(frames, world_to_camera=write_model(tmp_path / "off", images=[(1, (1, 1, 0, 0), *IMAGES[0][2:])]))
    with fails_with(InputError, "no camera"):
        read_known(frames, intrinsics=write_model(tmp_path / "none", []))
    with fails_with(InputError, "holds nothing"):
        read_known(frames, world_to_camera=write_model(tmp_path / "empty", images=[]))


def test_a_folder_without_a_model_is_named(tmp_path, fails_with):
    with fails_with(InputError, "neither cameras.bin nor cameras.txt", "sparse/0"):
        read_known(make_frames(), intrinsics=tmp_path)
    with fails_with(InputError, "neither images.bin nor images.txt"):
        read_known(make_frames(), world_to_camera=tmp_path)


def test_every_broken_off_binary_file_is_refused(tmp_path, fails_with):
    frames, model = make_frames(names=NAMES), write_binary(tmp_path / "model")
    for name, keyword in (("cameras.bin", "intrinsics"), ("images.bin", "world_to_camera")):
        whole = (model / name).read_bytes()
        for length in range(0, len(whole), 5):
            (model / name).write_bytes(whole[:length])
            with fails_with(InputError, f"no whole {name}"):
                read_known(frames, **{keyword: model})
        (model / name).write_bytes(whole)


@pytest.mark.parametrize(
    "name, text",
    [
        ("cameras.txt", "1 PINHOLE 1280"),
        ("cameras.txt", "1 PINHOLE 1280 720 a b c d"),
        ("images.txt", "1 1 0 0 0 0 0 0 1"),
        ("images.txt", "1 1 0 0 0 0 0 0 1 a_1.jpg\n2 1 0 0 0 0 0 0 1 a_2.jpg\n"),  # without the lines of points
        ("images.txt", "1 1 0 0 x 0 0 0 1 a_1.jpg\n\n"),
    ],
)
def test_damaged_text_files_are_named(name, text, tmp_path, fails_with):
    path = write(tmp_path / name, text)
    with fails_with(InputError, f"no whole {name}"):
        read_known(make_frames(), **{"intrinsics" if name == "cameras.txt" else "world_to_camera": path})
