"""Models of COLMAP, as its documentation describes them: the cameras and images files, text or binary."""

from __future__ import annotations

import logging
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from scipy.spatial.transform import Rotation

from easi3r.errors import InputError
from easi3r.given_arrays import summary
from easi3r.structures import Array
from easi3r.untrusted import read_bytes

logger = logging.getLogger("easi3r")

MAX_FILE = 1 << 32  # bytes: points take 24 each
CAMERAS, IMAGES = ("cameras.bin", "cameras.txt"), ("images.bin", "images.txt")
# name -> (number in binary files, focal lengths, all parameters); the rest beyond focal lengths and centre distorts
_MODELS = {
    "SIMPLE_PINHOLE": (0, 1, 3),
    "PINHOLE": (1, 2, 4),
    "SIMPLE_RADIAL": (2, 1, 4),
    "RADIAL": (3, 1, 5),
    "OPENCV": (4, 2, 8),
}
_NAMES = {number: name for name, (number, _, _) in _MODELS.items()}


class ColmapCamera(NamedTuple):
    """What one or several images were taken with."""

    size: tuple[int, int]  # width, height in pixels
    matrix: Array  # [3, 3] float64 K, the centre of the top-left pixel at (0, 0)


class ColmapImage(NamedTuple):
    """Where one image was taken from."""

    name: str  # relative path
    camera: int  # key of its camera
    world_to_camera: Array  # [4, 4] float64, OpenCV axes


def read_colmap_cameras(path: Path) -> dict[int, ColmapCamera]:
    """The cameras of a model by their number; ``path`` is the model's folder, or either file in it.

    COLMAP has the centre of the top-left pixel at (0.5, 0.5), we at (0, 0): its principal point moves by half a pixel.
    Distortion is dropped with a warning.  Raises InputError for a damaged file or a camera that is no pinhole.
    """
    file = _find(path, CAMERAS)
    cameras: dict[int, ColmapCamera] = {}
    for number, model, size, values in _parse(file, _binary_cameras, _text_cameras):
        if model not in _MODELS or len(values) != _MODELS[model][2]:
            raise InputError(
                f"Camera {number} of {file} is {model} with {len(values)} parameters; expected one of "
                f"{', '.join(_MODELS)}, so undistort the images first (colmap image_undistorter)."
            )
        focals = _MODELS[model][1]
        if any(values[focals + 2 :]):
            logger.warning("The distortion of camera %d of %s is ignored; undistort the frames first.", number, file)
        fx, fy, cx, cy = values[0], values[focals - 1], values[focals] - 0.5, values[focals + 1] - 0.5
        cameras[number] = ColmapCamera(size, np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=np.float64))
    if not cameras:
        raise InputError(f"{file} holds no camera; give a model with at least one.")
    return cameras


def read_colmap_images(path: Path) -> list[ColmapImage]:
    """The images of a model, their points left out; ``path`` is the model's folder, or either file in it.

    Raises InputError for a damaged file, or a rotation that is none.
    """
    file = _find(path, IMAGES)
    images = []
    for quaternion, translation, camera, name in _parse(file, _binary_images, _text_images):
        if not abs(np.linalg.norm(quaternion) - 1) < 1e-3:
            raise InputError(f"The quaternion of {name} in {file} is not of length 1; write the model anew.")
        matrix = np.eye(4)
        matrix[:3, :3] = Rotation.from_quat(np.roll(quaternion, -1)).as_matrix()  # COLMAP writes w first, scipy last
        matrix[:3, 3] = translation
        images.append(ColmapImage(name, camera, matrix))
    return images


def match_names(images: Sequence[ColmapImage], names: Sequence[str], path: Path) -> dict[int, ColmapImage]:
    """{index in ``names``: image} by file name, folders left out; by the name without its suffix if that finds none.

    Raises InputError when nothing matches, or more than one.
    """
    for key in (_file_name, _stem):
        theirs, ours = defaultdict(list), defaultdict(list)
        for image in images:
            theirs[key(image.name)].append(image)
        for i, name in enumerate(names):
            ours[key(name)].append(i)
        shared = [name for name in ours if name in theirs]
        for name in shared:
            if len(theirs[name]) > 1 or len(ours[name]) > 1:
                raise InputError(
                    f"{len(theirs[name])} images of {path} and {len(ours[name])} frames are called {name!r}; expected "
                    "each name once, so give all files names of their own."
                )
        if shared:
            return {ours[name][0]: theirs[name][0] for name in shared}
    theirs_example = repr(images[0].name) if images else "nothing"
    raise InputError(
        f"No image of {path} is called as a frame: it holds {theirs_example} and the like, and the frames are "
        f"{names[0]!r} and the like; give the images that the model was made from, or the cameras by frame index."
    )


def _file_name(name: str) -> str:
    return PurePosixPath(name.replace("\\", "/")).name


def _stem(name: str) -> str:
    return PurePosixPath(_file_name(name)).stem


def _find(path: Path, names: tuple[str, str]) -> Path:
    """The first of ``names`` that is in the folder ``path``, or next to the file ``path``; that file where it fits."""
    if path.name in names:
        return path
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise InputError(
            f"The folder {folder} holds neither {names[0]} nor {names[1]}; expected a model of COLMAP, which is often "
            "in a subfolder such as sparse/0."
        )
    return file


def _parse(
    file: Path, binary: Callable[[bytes], Iterator[Any]], text: Callable[[list[str]], Iterator[Any]]
) -> list[Any]:
    try:
        data = read_bytes(file, MAX_FILE)
        if file.suffix == ".bin":
            return list(binary(data))
        return list(text([line for line in data.decode("utf-8").splitlines() if not line.startswith("#")]))
    except (OSError, ValueError, struct.error) as error:
        raise InputError(f"{file} is no whole {file.name} of COLMAP ({summary(error)}); export it anew.") from error


def _text_cameras(lines: list[str]) -> Iterator[tuple[int, str, tuple[int, int], list[float]]]:
    """CAMERA_ID MODEL WIDTH HEIGHT PARAMS..."""
    for line in filter(str.strip, lines):
        number, model, width, height, *values = line.split()
        yield int(number), model, (int(width), int(height)), [float(value) for value in values]


def _text_images(lines: list[str]) -> Iterator[tuple[list[float], list[float], int, str]]:
    """IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of X Y POINT3D_ID triples, which may be empty."""
    rest = iter(lines)
    for line in rest:
        if line.strip():
            _, *numbers, camera, name = line.split(maxsplit=9)
            if len(numbers) != 7 or len(next(rest, "").split()) % 3:
                raise ValueError(f"two lines per image expected at {line[:40]!r}")
            values = [float(number) for number in numbers]
            yield values[:4], values[4:], int(camera), name.strip()


def _binary_cameras(data: bytes) -> Iterator[tuple[int, str, tuple[int, int], list[float]]]:
    """uint64 count; of each: int32 id, int32 model, uint64 width and height, the parameters as doubles."""
    at = 8
    for _ in range(*struct.unpack_from("<Q", data)):
        number, model, width, height = struct.unpack_from("<iiQQ", data, at)
        name = _NAMES.get(model, f"model {model}")
        count = _MODELS[name][2] if name in _MODELS else 0
        yield number, name, (width, height), list(struct.unpack_from(f"<{count}d", data, at + 24))
        if not count:  # whoever reads this refuses it; where the next camera begins is not known
            return
        at += 24 + 8 * count


def _binary_images(data: bytes) -> Iterator[tuple[list[float], list[float], int, str]]:
    """uint64 count; of each: uint32 id, 7 doubles, uint32 camera, name ended by 0, uint64 count, 24 bytes per point."""
    at = 8
    for _ in range(*struct.unpack_from("<Q", data)):
        values = struct.unpack_from("<I7dI", data, at)
        end = data.index(b"\0", at + 64)
        yield list(values[1:5]), list(values[5:8]), values[8], data[at + 64 : end].decode("utf-8")
        (points,) = struct.unpack_from("<Q", data, end + 1)
        at = end + 9 + 24 * points
        if at > len(data):
            raise ValueError("the file ends within an image")
