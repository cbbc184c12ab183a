"""A model of COLMAP, binary and text, with its images and masks; Gaussian splatting reads the same folder.

Laid out as COLMAP's documentation of its output format says.  COLMAP has the centre of the top-left pixel at
(0.5, 0.5): principal points and observations are moved by half a pixel.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.transform import Rotation

from easi3r.export.options import ExportOptions
from easi3r.export.tracks import find_tracks, project
from easi3r.export.views import frame_name, view_intrinsics, view_sizes, views
from easi3r.geometry import invert_rigid
from easi3r.mask_files import MEANINGS, write_png

if TYPE_CHECKING:
    from easi3r.export.tracks import Tracks
    from easi3r.scene import Scene
    from easi3r.structures import Array

FILES = {
    "images": "the frames",
    "masks": "COLMAP's convention: <name of the image>.png, 0 = moves or is no part of the scene, no features there",
    "images_rgba": "Gaussian splatting's convention (train.py -i images_rgba): the frames, alpha 0 where masks are 0",
    "sparse/0": "the model in binary: cameras, images and points3D with the tracks of static points",
    "sparse_text": "the same model as text",
}
PINHOLE = 1  # number of the camera model fx, fy, cx, cy
ERROR = 0.0  # pixels: the observations are reprojections


@dataclass(frozen=True)
class Model:
    """What both kinds of files say; numbers of cameras, images and points begin at 1."""

    sizes: list[tuple[int, int]]  # of each camera: width, height
    parameters: Array  # [cameras, 4] float64 fx, fy, cx, cy
    camera: Array  # [n] int64 index of each image's camera
    quaternions: Array  # [n, 4] float64 world-to-camera, w first
    translations: Array  # [n, 3] float64 world-to-camera
    tracks: Tracks
    pixels: Array  # [k, 2] float64 where each observation is
    order: Array  # [k] int64 the place of each observation among those of its image


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``."""
    for name in FILES:
        (folder / name).mkdir(parents=True)
    frames = views(scene, original=options.original_images)
    for i, view in enumerate(options.progress(frames, "images")):
        name, mask = f"{frame_name(i)}.png", view.static.astype(np.uint8) * 255
        write_png(folder / "images" / name, view.image)
        write_png(folder / "masks" / f"{name}.png", mask, MEANINGS["static"])
        write_png(folder / "images_rgba" / name, np.dstack([view.image, mask]))
    model = _model(scene, options)
    _write_binary(model, folder / "sparse" / "0")
    _write_text(model, folder / "sparse_text")


def _model(scene: Scene, options: ExportOptions) -> Model:
    intrinsics = view_intrinsics(scene, original=options.original_images)
    sizes = view_sizes(scene, original=options.original_images)
    half_pixel = np.array([0.5, 0.5])
    parameters = np.column_stack([intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2] + half_pixel])
    cameras: dict[tuple[tuple[int, int], bytes], int] = {}
    camera = [
        cameras.setdefault((size, row.tobytes()), len(cameras)) for size, row in zip(sizes, parameters, strict=True)
    ]
    first = [camera.index(number) for number in range(len(cameras))]
    world_to_camera = invert_rigid(scene.camera_to_world.astype(np.float64))
    tracks = find_tracks(scene, options)
    order = np.zeros(len(tracks.frame_index), dtype=np.int64)
    for i in range(scene.num_frames):
        rows = np.flatnonzero(tracks.frame_index == i)
        order[rows] = np.arange(len(rows))
    return Model(
        sizes=[sizes[i] for i in first],
        parameters=parameters[first],
        camera=np.array(camera),
        quaternions=np.roll(Rotation.from_matrix(world_to_camera[:, :3, :3]).as_quat(canonical=True), 1, axis=1),
        translations=world_to_camera[:, :3, 3],
        tracks=tracks,
        pixels=project(tracks.camera_points, intrinsics[tracks.frame_index]) + half_pixel,
        order=order,
    )


def _observations(model: Model) -> Iterator[tuple[Array, Array]]:
    """Of each image: pixels [k, 2] and the indices of their points [k]."""
    for i in range(len(model.camera)):
        rows = model.tracks.frame_index == i
        yield model.pixels[rows], model.tracks.point_index[rows]


def _elements(model: Model) -> tuple[Array, list[int]]:
    """The tracks [k, 2], number of the image and place among its observations, and where each point's begins and ends.

    The track of point i is rows ``bounds[i]`` to ``bounds[i + 1]``.
    """
    elements = np.column_stack([model.tracks.frame_index + 1, model.order])
    bounds = np.searchsorted(model.tracks.point_index, np.arange(len(model.tracks.cloud.points) + 1))
    return elements, bounds.tolist()


def _write_binary(model: Model, folder: Path) -> None:
    with (folder / "cameras.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(model.sizes)))
        for i, (size, row) in enumerate(zip(model.sizes, model.parameters, strict=True)):
            file.write(struct.pack("<iiQQ4d", i + 1, PINHOLE, *size, *row))
    with (folder / "images.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(model.camera)))
        for i, (pixels, points) in enumerate(_observations(model)):
            pose = (*model.quaternions[i], *model.translations[i])
            file.write(struct.pack("<I7dI", i + 1, *pose, model.camera[i] + 1))
            file.write(f"{frame_name(i)}.png".encode() + b"\0" + struct.pack("<Q", len(points)))
            table = np.empty(len(points), dtype=[("pixel", "<f8", 2), ("point", "<i8")])
            table["pixel"], table["point"] = pixels, points + 1
            file.write(table.tobytes())
    points, colors = (values.tolist() for values in model.tracks.cloud[:2])
    elements, bounds = _elements(model)
    data = elements.astype("<u4").tobytes()
    with (folder / "points3D.bin").open("wb") as file:
        file.write(struct.pack("<Q", len(points)))
        for i, (begin, end) in enumerate(pairwise(bounds)):
            file.write(struct.pack("<Q3d3BdQ", i + 1, *points[i], *colors[i], ERROR, end - begin))
            file.write(data[8 * begin : 8 * end])


def _write_text(model: Model, folder: Path) -> None:
    """Numbers are written so that they read back as they are in the binary files."""
    with (folder / "cameras.txt").open("w", encoding="ascii") as file:
        file.write("# CAMERA_ID MODEL WIDTH HEIGHT FX FY CX CY\n")
        for i, (size, row) in enumerate(zip(model.sizes, model.parameters, strict=True)):
            file.write(f"{i + 1} PINHOLE {size[0]} {size[1]} {_join(row)}\n")
    with (folder / "images.txt").open("w", encoding="ascii") as file:
        file.write("# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then X Y POINT3D_ID of each observation\n")
        for i, (pixels, points) in enumerate(_observations(model)):
            pose = _join([*model.quaternions[i], *model.translations[i]])
            file.write(f"{i + 1} {pose} {model.camera[i] + 1} {frame_name(i)}.png\n")
            rows = zip(pixels.tolist(), points.tolist(), strict=True)
            file.write(" ".join(f"{x!r} {y!r} {point + 1}" for (x, y), point in rows) + "\n")
    points, colors = (values.tolist() for values in model.tracks.cloud[:2])
    elements, bounds = _elements(model)
    words = list(map(str, elements.ravel().tolist()))
    with (folder / "points3D.txt").open("w", encoding="ascii") as file:
        file.write("# POINT3D_ID X Y Z R G B ERROR, then IMAGE_ID POINT2D_IDX of each observation\n")
        for i, (begin, end) in enumerate(pairwise(bounds)):
            head = " ".join(map(repr, [i + 1, *points[i], *colors[i], ERROR]))
            file.write(f"{head} {' '.join(words[2 * begin : 2 * end])}\n")


def _join(numbers: Array | list[float]) -> str:
    return " ".join(map(repr, np.asarray(numbers, dtype=np.float64).tolist()))
