"""Intrinsics that the user hands in, always for the frames of the source as they are."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from easi3r.colmap import CAMERAS, match_names, read_colmap_cameras, read_colmap_images
from easi3r.decoding import IMAGE_SUFFIXES
from easi3r.errors import InputError
from easi3r.given_arrays import check_frames, check_path, load_array, read_table, spread, to_array
from easi3r.structures import Array, Crop, Frames
from easi3r.untrusted import open_image

logger = logging.getLogger("easi3r")

EXIF = "exif"
_NAME = "intrinsics"
_KEYS = ("original_intrinsics", "intrinsics", "K")
_EXPECTED = (
    "a focal length in pixels, 'f,cx,cy', 'fx,fy,cx,cy', [3, 3], one [3, 3] per frame, {frame: any of these}, 'exif', "
    "or a .txt, .npy, .npz or COLMAP file"
)
_FILM_DIAGONAL_MM = 43.2666  # of 36 x 24 mm, which the 35-mm-equivalent focal length refers to
_EXIF_IFD, _FOCAL_35MM = 0x8769, 41989
_FOV_DEG = (3.0, 175.0)
_ANOTHER_SIZE = 0.15  # of the frame: a centre that is off by half of that on both axes may be another size's
_OFF_CENTRE = 0.2  # of the frame: worth a warning


def read_intrinsics(given: Any, frames: Frames) -> Array:
    """K of each frame -> [n, 3, 3] float64 in pixels of the network's images, NaN where it is not known.

    ``given``, in pixels of the source's frames, the centre of the top-left one at (0, 0):

    - a focal length, the principal point being the centre; 'f,cx,cy' or 'fx,fy,cx,cy', as text or a sequence
    - an array [3, 3] for all frames or [n, 3, 3], all NaN where K is not known; [n, 3] or [n, 4] of the numbers above
    - {frame index: any of these}
    - 'exif': the 35-mm-equivalent focal lengths that the image files name
    - a .txt file of one row, n rows of 3 or 4 numbers or one [3, 3]; an .npy file; an .npz file with the key
      original_intrinsics, intrinsics or K, and 'frames' if not for all; a COLMAP model's folder or its cameras file

    Raises InputError for anything else, and for a K that cannot be that of these frames.
    """
    matrices = _source_matrices(given, frames)
    unknown = np.isnan(matrices[:, :2]).all(axis=(1, 2))
    if unknown.all():
        raise InputError("intrinsics holds NaN for every frame; expected at least one K that is known.")
    off_centre = 0
    for i in np.flatnonzero(~unknown):
        _check_numbers(matrices[i], frames.crops[i], int(i))
        off_centre += _check_centre(matrices[i], frames.crops[i], int(i))
    if off_centre:
        logger.warning(
            "The principal point of %d frames is far from their centre; is it counted from the top-left pixel?",
            off_centre,
        )
    matrices[unknown] = np.nan
    return np.stack([crop.matrix() @ matrix for crop, matrix in zip(frames.crops, matrices, strict=True)])


def _source_matrices(given: Any, frames: Frames) -> Array:
    """[n, 3, 3] float64 in pixels of the source."""
    if isinstance(given, Mapping):
        index = check_frames(given, frames.num_frames, _NAME)
        rows = [_to_matrices(_numbers(given[i], _NAME), [frames.crops[i]], f"{_NAME}[{i}]") for i in index]
        return spread(np.concatenate(rows), index, frames.num_frames)
    if isinstance(given, str) and given.strip().lower() == EXIF:
        return _read_exif(frames)
    if isinstance(given, os.PathLike) or (isinstance(given, str) and _parse_numbers(given) is None):
        return _read_path(check_path(Path(given), _NAME, _EXPECTED), frames)
    return _to_matrices(_numbers(given, _NAME), frames.crops, _NAME)


def _parse_numbers(text: str) -> list[float] | None:
    try:
        return [float(word) for word in text.replace(",", " ").split()] or None
    except ValueError:
        return None


def _numbers(given: Any, name: str) -> Array:
    parsed = _parse_numbers(given) if isinstance(given, str) else None
    return to_array(given if parsed is None else parsed, name, _EXPECTED)


def _to_matrices(array: Array, crops: Sequence[Crop], name: str) -> Array:
    """Every form that is an array -> [n, 3, 3], one per crop."""
    n, shape = len(crops), array.shape
    if array.ndim == 3 and shape == (n, 3, 3):
        return array
    rows = np.atleast_2d(array)
    if rows.shape == (3, 3) and (np.isnan(rows).all() or (rows[:, 0] == 0).any()):  # no focal length is 0
        return np.tile(rows, (n, 1, 1))
    if rows.ndim != 2 or len(rows) not in (1, n) or rows.shape[1] not in (1, 3, 4):
        raise InputError(f"{name} is of shape {list(shape)} for {n} frame{'s' * (n > 1)}; expected {_EXPECTED}.")
    rows = np.broadcast_to(rows, (n, rows.shape[1]))
    return np.stack([_to_matrix(row, crop) for row, crop in zip(rows, crops, strict=True)])


def _to_matrix(row: Array, crop: Crop) -> Array:
    """f; f, cx, cy; or fx, fy, cx, cy -> [3, 3]."""
    width, height = crop.original
    if np.isnan(row).all():
        return np.full((3, 3), np.nan)
    fx, fy = row[0], row[1] if len(row) == 4 else row[0]
    cx, cy = row[-2:] if len(row) > 1 else ((width - 1) / 2, (height - 1) / 2)
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]])


def _read_path(path: Path, frames: Frames) -> Array:
    if path.is_dir() or path.name in CAMERAS:
        return _read_colmap(path, frames)
    if path.suffix.lower() == ".txt":
        return _to_matrices(read_table(path), frames.crops, str(path))
    if path.suffix.lower() not in (".npy", ".npz"):
        raise InputError(f"{_NAME} is {str(path)!r}; expected {_EXPECTED}.")
    _, stored, index = load_array(path, _KEYS)
    array = to_array(stored, str(path), _EXPECTED)
    if index is None:
        return _to_matrices(array, frames.crops, str(path))
    some = check_frames(np.ravel(index), frames.num_frames, str(path))
    return spread(_to_matrices(array, [frames.crops[i] for i in some], str(path)), some, frames.num_frames)


def _read_colmap(path: Path, frames: Frames) -> Array:
    cameras = read_colmap_cameras(path)
    if len(cameras) == 1:
        of_frames = dict.fromkeys(range(frames.num_frames), next(iter(cameras)))
    else:
        images = read_colmap_images(path)
        of_frames = {i: image.camera for i, image in match_names(images, frames.names, path).items()}
    for i, camera in of_frames.items():
        if camera not in cameras:
            raise InputError(f"{path} has an image of camera {camera}, but no such camera; export the model anew.")
        if cameras[camera].size != frames.crops[i].original:
            raise _wrong_size(cameras[camera].size, frames.crops[i], i)
    matrices = np.stack([cameras[camera].matrix for camera in of_frames.values()])
    return spread(matrices, list(of_frames), frames.num_frames)


def _read_exif(frames: Frames) -> Array:
    source = Path(frames.source)
    folder = source if source.is_dir() else source.parent
    paths = [folder / name for name in frames.names]
    if source.is_file() and source.suffix.lower() in IMAGE_SUFFIXES:
        paths = [source]
    if not all(path.is_file() for path in paths):
        raise InputError(
            f"intrinsics is 'exif', but the frames of {frames.source} are no image files of one folder; give the focal "
            "length in pixels instead."
        )
    focal_mm = np.array([_focal_35mm(path) for path in paths])
    if np.isnan(focal_mm).all():
        raise InputError(
            f"intrinsics is 'exif', but no image of {frames.source} names its 35-mm-equivalent focal length (EXIF tag "
            f"{_FOCAL_35MM}); give the focal length in pixels instead."
        )
    diagonal = np.array([math.hypot(*crop.original) for crop in frames.crops])
    return _to_matrices((focal_mm / _FILM_DIAGONAL_MM * diagonal)[:, None], frames.crops, _NAME)


def _focal_35mm(path: Path) -> float:
    """In millimetres, NaN when the file does not say (0 says so too)."""
    try:
        with open_image(path) as image:
            focal = float(image.getexif().get_ifd(_EXIF_IFD).get(_FOCAL_35MM, 0))
    except Exception as error:  # damaged headers make Pillow raise errors of a dozen types
        raise InputError(f"The EXIF data of {path} cannot be read; give the focal length in pixels instead.") from error
    return focal if focal > 0 else math.nan


def _check_numbers(matrix: Array, crop: Crop, index: int) -> None:
    """Whether ``matrix`` [3, 3] can be the K of any frame of the crop's original width."""
    expected = "expected [[fx, 0, cx], [0, fy, cy], [0, 0, 1]] of finite numbers in pixels, without skew"
    fx, fy = matrix[0, 0], matrix[1, 1]
    others = matrix[[0, 1, 2, 2, 2], [1, 0, 0, 1, 2]]
    if not np.isfinite(matrix).all() or not np.allclose(others, (0, 0, 0, 0, 1), rtol=0, atol=1e-6 * max(fx, 1)):
        shown = ", ".join(f"[{', '.join(f'{value:g}' for value in row)}]" for row in matrix)
        raise InputError(f"The intrinsics of frame {index} are [{shown}]; {expected}.")
    if not (fx > 0 and fy > 0 and 0.5 <= fx / fy <= 2):
        raise InputError(
            f"The intrinsics of frame {index} have the focal lengths {fx:g} and {fy:g}; expected both in pixels, above "
            "0, and neither more than twice the other."
        )
    fov_deg = 2 * math.degrees(math.atan(crop.original[0] / 2 / fx))
    if not _FOV_DEG[0] <= fov_deg <= _FOV_DEG[1]:
        raise InputError(
            f"The focal length of frame {index} is {fx:g} pixels, a field of view of {fov_deg:.3g} degrees over "
            f"{crop.original[0]} pixels; expected {_FOV_DEG[0]:g} to {_FOV_DEG[1]:g} degrees, so give it in pixels."
        )


def _check_centre(matrix: Array, crop: Crop, index: int) -> bool:
    """Whether the principal point is far from the centre; InputError where it is that of images of another size."""
    size = np.array(crop.original)
    point = matrix[:2, 2] + 0.5  # from the image's corner
    scale = 2 * point / size  # of the frame in whose middle it would be
    if (np.abs(scale - 1) > _ANOTHER_SIZE).any() and (np.abs(2 * point / np.array(crop.size) - 1) < 0.05).all():
        raise InputError(
            f"The intrinsics of frame {index} are for the network's images ({_text(crop.size)} pixels), but those of "
            f"the source's frames ({_text(crop.original)}) are expected; give original_intrinsics."
        )
    if (np.abs(scale - 1) > _ANOTHER_SIZE).all() and scale.min() > 0 and 0.9 < scale[0] / scale[1] < 1 / 0.9:
        width, height = (max(1, round(2 * x)) for x in point)
        raise _wrong_size((width, height), crop, index)
    if not ((point >= 0) & (point <= size)).all():
        raise InputError(
            f"The principal point of frame {index} is ({matrix[0, 2]:g}, {matrix[1, 2]:g}), outside of the frame of "
            f"{_text(crop.original)} pixels; give the intrinsics of the frames as they are."
        )
    return bool((np.abs(point - size / 2) > _OFF_CENTRE * size).any())


def _wrong_size(size: tuple[int, int], crop: Crop, index: int) -> InputError:
    x, y = (original / max(1, given) for original, given in zip(crop.original, size, strict=True))
    how = (
        f"its first two rows by {x:.3g}" if abs(x / y - 1) < 0.1 else f"its first row by {x:.3g}, its second by {y:.3g}"
    )
    return InputError(
        f"The intrinsics of frame {index} are for images of about {_text(size)} pixels, but the frames are "
        f"{_text(crop.original)}; give K for the frames as they are (multiply {how})."
    )


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
