"""What the user knows before anything is computed: intrinsics, poses and depth in the network's pixels."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from easi3r.array_files import MAX_BYTES
from easi3r.decoding import natural_key
from easi3r.errors import InputError
from easi3r.given_arrays import check_frames, check_path, load_array, to_array, to_network
from easi3r.given_intrinsics import read_intrinsics
from easi3r.given_poses import CAMERA_TO_WORLD, WORLD_TO_CAMERA, read_poses
from easi3r.structures import Array, Frames, Known
from easi3r.untrusted import list_folder

_DEPTH = (
    "an array [n, H, W], {frame: [H, W]}, a folder of one .npy or .npz file per frame, or one such file of them all"
)
_SUFFIXES = (".npy", ".npz")


def read_known(
    frames: Frames,
    *,
    intrinsics: Any = None,
    camera_to_world: Any = None,
    world_to_camera: Any = None,
    depth: Any = None,
) -> Known:
    """Read and check what is given; see `read_intrinsics`, `read_poses` and `read_depth` for all that each may be.

    Frame indices count the frames that were taken, from 0.  Raises InputError, before any work, for what cannot be
    read, does not belong to these frames or contradicts itself.
    """
    if camera_to_world is not None and world_to_camera is not None:
        raise InputError("camera_to_world and world_to_camera are both given; expected one of them, so leave one out.")
    poses = None
    if camera_to_world is not None:
        poses = read_poses(camera_to_world, frames, CAMERA_TO_WORLD)
    elif world_to_camera is not None:
        poses = read_poses(world_to_camera, frames, WORLD_TO_CAMERA)
    return Known(
        intrinsics=None if intrinsics is None else read_intrinsics(intrinsics, frames),
        camera_to_world=poses,
        depth=None if depth is None else read_depth(depth, frames),
    )


def check_first_piece(known: Known, piece: range) -> None:
    """Raise InputError where a long clip's world would be placed only after its first piece."""
    first = known.part(piece)
    for name, anywhere, at_once in (
        ("two poses apart", known.poses_set_the_scale, first.poses_set_the_scale),
        ("a pose", len(known.posed()) > 0, len(first.posed()) > 0),
        ("a depth", known.depth_sets_the_scale, first.depth_sets_the_scale),
    ):
        if anywhere and not at_once:
            raise InputError(
                f"The clip is worked on in pieces, and of the frames 0 to {piece.stop - 1} of the first one, which "
                f"place the world, {name} must be known if any is; give some of these too, or use larger pieces."
            )


def read_depth(given: Any, frames: Frames) -> Array:
    """z-depth -> [n, H, W] float64 in the network's pixels and the user's unit, NaN where it is not known.

    given: an array [n, H, W]; {frame index: [H, W]}; a folder of one .npy or .npz file per frame, in the order of
        their names; or one such file for all frames.  An .npz file has the key 'depth', and 'frames' if not for all.
        Sizes are those of the source's frames or of the network's images; 0, negative and non-finite is not known.
    Raises InputError for another count, size or kind of values.
    """
    n, height, width = frames.images.shape[:3]
    fitted = np.full((n, height, width), np.nan)
    pixels = max(crop.original[0] * crop.original[1] for crop in frames.crops)
    for i, layer in _depth_layers(given, n, max(8 * pixels, MAX_BYTES)).items():
        name = f"The depth of frame {i}"
        depth = to_array(layer, name, _DEPTH)
        if depth.ndim != 2:
            raise InputError(f"{name} is of shape {list(depth.shape)}; expected [H, W].")
        fitted[i] = to_network(depth, frames.crops[i], name)
    fitted[~(np.isfinite(fitted) & (fitted > 0))] = np.nan
    if np.isnan(fitted).all():
        raise InputError("depth holds no finite value above 0; expected z-depth in any one unit.")
    return fitted


def _depth_layers(given: Any, n: int, most_bytes: int) -> dict[int, Any]:
    """{frame index: [H, W]}, each of at most ``most_bytes`` in a file."""
    if isinstance(given, Mapping):
        return dict(zip(check_frames(given, n, "depth"), given.values(), strict=True))
    name, index = "depth", None
    if isinstance(given, (str, os.PathLike)):
        path = check_path(Path(given), name, _DEPTH)
        name = str(path)
        if path.is_dir():
            given = _read_folder(path, most_bytes)
        elif path.suffix.lower() in _SUFFIXES:
            _, given, index = load_array(path, ("depth",), n * most_bytes)
        else:
            raise InputError(f"depth is {name!r}; expected {_DEPTH}.")
    layers = given if isinstance(given, list) else to_array(given, name, _DEPTH)
    if isinstance(layers, np.ndarray) and layers.ndim != 3:
        raise InputError(f"{name} is of shape {list(layers.shape)}; expected {_DEPTH}.")
    some = range(n) if index is None else check_frames(np.ravel(index), n, name)
    if len(layers) != len(some):
        raise InputError(f"{len(layers)} depth maps were given for {len(some)} frames; expected one per frame.")
    return dict(zip(some, layers, strict=True))


def _read_folder(folder: Path, most_bytes: int) -> list[Array]:
    paths = list_folder(folder, _SUFFIXES)
    if not paths:
        raise InputError(f"The folder of depth {folder} holds no .npy or .npz file; expected one per frame.")
    return [load_array(path, ("depth",), most_bytes)[1] for path in sorted(paths, key=natural_key)]
