"""Camera poses that the user hands in; which way they map is said by the keyword, never guessed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from easi3r.colmap import CAMERAS, IMAGES, match_names, read_colmap_images
from easi3r.errors import InputError
from easi3r.geometry import invert_rigid
from easi3r.given_arrays import check_frames, check_path, load_array, read_table, spread, to_array
from easi3r.structures import Array, Frames

logger = logging.getLogger("easi3r")

CAMERA_TO_WORLD, WORLD_TO_CAMERA = "camera_to_world", "world_to_camera"
_EXPECTED = (
    "an array [n, 4, 4] or [n, 3, 4] with OpenCV axes (x right, y down, z forward), {frame: [4, 4]}, or a TUM .txt, "
    ".npy, .npz or COLMAP file"
)
_MAX_APART_S = 0.02  # between the clocks of a frame and its pose
_TOLERANCE = 1e-3  # of a rotation's entries


def read_poses(given: Any, frames: Frames, keyword: str) -> Array:
    """Poses -> camera_to_world [n, 4, 4] float64 in the user's world and unit, all NaN where it is not known.

    ``keyword``, 'camera_to_world' or 'world_to_camera', says which way ``given`` maps; axes are OpenCV's.

    - an array [n, 4, 4] or [n, 3, 4], NaN where a pose is not known, or {frame index: [4, 4]}
    - a text file of TUM's rows ``t tx ty tz qx qy qz qw``, which belong to the frames of their times; to all frames
      in order when no time agrees but there is one row per frame
    - an .npy file; an .npz file whose key is the keyword, with 'frames' if not for all frames
    - a COLMAP model's folder or its images file, always world_to_camera, by the names of the image files

    Raises InputError for anything else, and for what is no rotation.
    """
    if isinstance(given, (str, os.PathLike)):
        poses = _read_path(check_path(Path(given), keyword, _EXPECTED), frames, keyword)
    elif isinstance(given, Mapping):
        index = check_frames(given, frames.num_frames, keyword)
        rows = [_to_matrices(to_array(given[i], keyword, _EXPECTED)[None], 1, f"{keyword}[{i}]") for i in index]
        poses = spread(np.concatenate(rows), index, frames.num_frames)
    else:
        poses = _to_matrices(to_array(given, keyword, _EXPECTED), frames.num_frames, keyword)
    unknown = np.isnan(poses[:, :3]).all(axis=(1, 2))
    if unknown.all():
        raise InputError(f"{keyword} holds NaN for every frame; expected at least one pose that is known.")
    poses[unknown] = np.nan
    poses[~unknown] = _check_rigid(poses[~unknown], np.flatnonzero(~unknown), keyword)
    if keyword == WORLD_TO_CAMERA:
        poses[~unknown] = invert_rigid(poses[~unknown])
    return poses


def _to_matrices(array: Array, n: int, name: str) -> Array:
    if array.shape not in ((n, 4, 4), (n, 3, 4)):
        raise InputError(f"{name} is of shape {list(array.shape)} for {n} frame{'s' * (n > 1)}; expected {_EXPECTED}.")
    if array.shape[1] == 4:
        return array
    return np.concatenate([array, np.tile([0.0, 0.0, 0.0, 1.0], (n, 1, 1))], axis=1)


def _read_path(path: Path, frames: Frames, keyword: str) -> Array:
    if path.is_dir() or path.name in CAMERAS + IMAGES:
        return _read_colmap(path, frames, keyword)
    if path.suffix.lower() == ".txt":
        return _read_tum(path, frames)
    if path.suffix.lower() not in (".npy", ".npz"):
        raise InputError(f"{keyword} is {str(path)!r}; expected {_EXPECTED}.")
    other = CAMERA_TO_WORLD if keyword == WORLD_TO_CAMERA else WORLD_TO_CAMERA
    key, array, index = load_array(path, (keyword, other))
    if key == other:
        raise InputError(f"{path} holds {other}, but was given as {keyword}; say {other}={str(path)!r}.")
    n = frames.num_frames
    some = range(n) if index is None else check_frames(np.ravel(index), n, str(path))
    return spread(_to_matrices(to_array(array, str(path), _EXPECTED), len(some), str(path)), some, n)


def _read_colmap(path: Path, frames: Frames, keyword: str) -> Array:
    if keyword == CAMERA_TO_WORLD:
        raise InputError(f"The poses of COLMAP are world_to_camera; say world_to_camera={str(path)!r}.")
    matched = match_names(read_colmap_images(path), frames.names, path)
    return spread(np.stack([image.world_to_camera for image in matched.values()]), list(matched), frames.num_frames)


def _read_tum(path: Path, frames: Frames) -> Array:
    table = read_table(path)
    if table.shape[1] != 8:
        raise InputError(
            f"The rows of {path} hold {table.shape[1]} numbers; expected TUM's 8, t tx ty tz qx qy qz qw, in seconds."
        )
    table = table[np.argsort(table[:, 0], kind="stable")]
    length = np.linalg.norm(table[:, 4:], axis=1)
    if not np.isfinite(table).all() or (np.abs(length - 1) > _TOLERANCE).any():
        raise InputError(
            f"{path} holds a row that is not finite, or whose quaternion qx qy qz qw is not of length 1; leave out the "
            "rows of frames whose pose is not known."
        )
    index, rows = _match_times(table[:, 0], frames, path)
    poses = np.tile(np.eye(4), (len(index), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(table[rows, 4:]).as_matrix()
    poses[:, :3, 3] = table[rows, 1:4]
    return spread(poses, index, frames.num_frames)


def _match_times(times: Array, frames: Frames, path: Path) -> tuple[list[int], list[int]]:
    """Frames and the rows of ``times`` [k], sorted, in seconds, that belong to them."""
    clock = frames.timestamps
    after = np.searchsorted(times, clock).clip(0, len(times) - 1)
    before = (after - 1).clip(0)
    row = np.where(clock - times[before] < times[after] - clock, before, after)
    gaps = np.diff(np.sort(clock))
    near = np.abs(times[row] - clock) <= min([_MAX_APART_S, *(gaps / 2)])
    if near.any():
        return np.flatnonzero(near).tolist(), row[near].tolist()
    if len(times) == len(clock):
        logger.info("No time of %s is that of a frame: its rows are taken in order.", path)
        return list(range(len(clock))), list(range(len(clock)))
    raise InputError(
        f"No time of {path} is that of a frame: its {len(times)} poses are from {times.min():.9g} to "
        f"{times.max():.9g} s, the {len(clock)} frames from {clock.min():.9g} to {clock.max():.9g} s; expected the "
        "clock of the frames, or one row per frame."
    )


def _check_rigid(poses: Array, index: Array, keyword: str) -> Array:
    """[k, 4, 4] of the frames ``index`` [k] -> the same with the nearest rotations."""
    rotation = poses[:, :3, :3]
    if not np.isfinite(poses).all():
        bad = index[~np.isfinite(poses).all(axis=(1, 2))][0]
        raise InputError(f"{keyword} of frame {bad} is not finite; expected numbers, or NaN throughout if not known.")
    no_end = np.abs(poses[:, 3] - (0, 0, 0, 1)).max(axis=1) > _TOLERANCE
    if no_end.any():
        raise InputError(
            f"The last row of {keyword} of frame {index[no_end][0]} is {poses[no_end][0, 3].round(4).tolist()}; "
            "expected [0, 0, 0, 1], the translation in the last column."
        )
    skewed = np.abs(rotation @ np.swapaxes(rotation, 1, 2) - np.eye(3)).max(axis=(1, 2)) > _TOLERANCE
    skewed |= np.linalg.det(rotation) < 0
    if skewed.any():
        raise InputError(
            f"{keyword} of frame {index[skewed][0]} holds no rotation (its determinant is "
            f"{np.linalg.det(rotation[skewed][0]):.4g}); expected orthonormal axes with determinant 1, OpenCV's (x "
            "right, y down, z forward), without scale or mirroring."
        )
    u, _, v = np.linalg.svd(rotation)
    rigid = poses.copy()
    rigid[:, :3, :3], rigid[:, 3] = u @ v, (0, 0, 0, 1)
    return rigid
