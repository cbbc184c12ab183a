"""TUM RGB-D and Bonn RGB-D Dynamic: a depth camera among moving people, tracked from outside.

Sturm et al. 2012, Palazzolo et al. 2019.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

from easi3r.errors import InputError
from easi3r.given_arrays import read_table
from easi3r.metrics import associate
from easi3r.structures import Array
from evaluation.datasets.layout import Layout, choose, frame_shape, read_layers, reading
from evaluation.datasets.sequence import Sequence

WITHIN_S = 0.02  # between the clocks of a frame and of its pose or depth
DEPTH_PER_METRE = 5000.0

_UNIT = 1e-3  # tolerance on a quaternion's length: four decimals are written


class Tum(Layout):
    """``rgbd_dataset_freiburg3_NAME/`` with ``rgb.txt``, ``depth.txt`` and ``groundtruth.txt``: eight moving scenes.

    Frames are the colour images that have a pose (`associate`), in the order of their times; the others are left out,
    and the slice of `read` counts those that stay.  A frame without a depth image has NaN for its depth.
    """

    name: ClassVar[str] = "tum"
    variants: ClassVar[tuple[str, ...]] = ("dynamics",)
    home: ClassVar[str] = "https://cvg.cit.tum.de/data/datasets/rgbd-dataset"
    prefix: ClassVar[str] = "rgbd_dataset_freiburg3_"
    sequences: ClassVar[tuple[str, ...]] = tuple(
        f"{people}_{camera}" for people in ("sitting", "walking") for camera in ("static", "xyz", "halfsphere", "rpy")
    )

    def names(self) -> list[str]:
        return list(self.sequences)

    def files(self, name: str) -> Iterator[Path]:
        folder = self._folder(name)
        yield folder / "groundtruth.txt"
        for path in (folder / "rgb.txt", folder / "depth.txt"):
            yield path
            if path.is_file():
                yield from read_files(path)[1]

    def read(self, name: str, frames: slice) -> Sequence:
        """Poses and depth in metres; times as the files have them, in seconds since 1970; no K, which no file gives."""
        folder = self._folder(name)
        times_s, images = read_files(folder / "rgb.txt")
        depth_times_s, depth_images = read_files(folder / "depth.txt")
        pose_times_s, camera_to_world = read_poses(folder / "groundtruth.txt")
        pose_of, depth_of = (
            dict(associate(times_s, others, WITHIN_S).tolist()) for others in (pose_times_s, depth_times_s)
        )
        if not pose_of:
            raise InputError(
                f"No time in {folder / 'rgb.txt'} is within {WITHIN_S} s of one in groundtruth.txt; expected one clock "
                "for both, so get the sequence anew."
            )
        chosen = choose(sorted(pose_of), frames, name)
        paths = tuple(images[i] for i in chosen)
        shape = frame_shape(paths)
        depth = np.full((len(chosen), *shape), np.nan, dtype=np.float32)
        for row, i in enumerate(chosen):
            if i in depth_of:
                (depth[row],) = read_layers([depth_images[depth_of[i]]], read_depth, shape)
        return Sequence(
            name,
            paths,
            times_s=times_s[chosen],
            camera_to_world=camera_to_world[[pose_of[i] for i in chosen]],
            depth=depth,
        )

    def _folder(self, name: str) -> Path:
        return self.root / f"{self.prefix}{name}"


class Bonn(Tum):
    """``rgbd_bonn_NAME/``, files as TUM's: the five sequences of the published tables."""

    name: ClassVar[str] = "bonn"
    variants: ClassVar[tuple[str, ...]] = ("dynamic",)
    home: ClassVar[str] = "https://www.ipb.uni-bonn.de/data/rgbd-dynamic-dataset"
    prefix: ClassVar[str] = "rgbd_bonn_"
    sequences: ClassVar[tuple[str, ...]] = ("balloon2", "crowd2", "crowd3", "person_tracking2", "synchronous")


def read_files(path: Path) -> tuple[Array, list[Path]]:
    """Lines ``time file``, '#' before comments -> ascending times [n] float64 and the files, which may be absent."""
    with reading(path, "list of times and files"):
        lines = [line.split("#")[0].split(maxsplit=1) for line in path.read_text("utf-8").splitlines()]
        rows = sorted((float(time), file.strip()) for time, file in filter(None, lines))
    if not rows or not np.isfinite([time for time, _ in rows]).all():
        raise InputError(f"{path} names no file with its time; expected lines of both, so get it anew.")
    return np.array([time for time, _ in rows]), [path.parent / file for _, file in rows]


def read_poses(path: Path) -> tuple[Array, Array]:
    """Lines ``t tx ty tz qx qy qz qw``, '#' before comments -> times [n] and camera-to-world [n, 4, 4], float64."""
    with reading(path, "list of poses"):
        table = read_table(path)
    if table.shape[1] != 8 or not np.isfinite(table).all():
        raise InputError(f"{path} has a row that is not 8 finite numbers; expected t tx ty tz qx qy qz qw.")
    if (np.abs(np.linalg.norm(table[:, 4:], axis=1) - 1) > _UNIT).any():
        raise InputError(f"{path} has a quaternion qx qy qz qw that is not of length 1; get it anew.")
    poses = np.tile(np.eye(4), (len(table), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(table[:, 4:]).as_matrix()
    poses[:, :3, 3] = table[:, 1:4]
    return table[:, 0], poses


def read_depth(path: Path) -> Array:
    """16-bit PNG, 5000 per metre -> [H, W] float32 metres, NaN where it is 0."""
    with reading(path, "image"), Image.open(path) as image:
        if not image.mode.startswith("I"):
            raise InputError(f"The depth {path} is of the mode {image.mode!r}; expected 16 bits, so get it anew.")
        values = np.asarray(image).astype(np.float32)
    return np.where(values > 0, values / np.float32(DEPTH_PER_METRE), np.float32(np.nan))
