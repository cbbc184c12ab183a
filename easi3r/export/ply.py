"""Clouds as binary PLY."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from easi3r.export.clouds import budgeted_clouds, select
from easi3r.export.options import ExportOptions
from easi3r.export.views import frame_name

if TYPE_CHECKING:
    from easi3r.scene import PointCloud, Scene

FILES = {
    "static.ply": "what stands still, seen by all frames (not with keep=dynamic)",
    "frames": "one cloud per frame: all that it shows (keep=all alone)",
    "dynamic": "one cloud per frame: what moves in it (not with keep=static)",
}


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``.  A cloud without points is written too, so that every frame has its file."""
    clouds = budgeted_clouds(scene, options)
    moving = [int(cloud.dynamic.sum()) for cloud in clouds]
    keep = options.keep or scene.keep
    if keep != "dynamic":
        still = (select(cloud, ~cloud.dynamic) for cloud in clouds)  # one by one: together they may fill the memory
        write_ply(folder / "static.ply", still, sum(len(cloud.points) for cloud in clouds) - sum(moving))
    sequences = {"all": ("frames", "dynamic"), "dynamic": ("dynamic",), "static": ()}[keep]
    for name in sequences:
        (folder / name).mkdir()
        for i, cloud in enumerate(options.progress(clouds, name)):
            part = cloud if name == "frames" else select(cloud, cloud.dynamic)
            write_ply(folder / name / f"{frame_name(i)}.ply", [part], len(part.points))


def write_ply(path: Path, clouds: Iterable[PointCloud], count: int) -> None:
    """Write ``clouds`` of ``count`` points in all as one, little endian.

    x y z are float32 in the scene's world (y down in the first frame), red green blue uint8 sRGB.
    """
    columns = [(axis, "<f4") for axis in "xyz"] + [(color, "u1") for color in ("red", "green", "blue")]
    header = ["ply", "format binary_little_endian 1.0", f"element vertex {count}"]
    header += [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in columns]
    with path.open("wb") as file:
        file.write("\n".join([*header, "end_header", ""]).encode("ascii"))
        for cloud in clouds:
            table = np.empty(len(cloud.points), dtype=columns)
            for i, (name, _) in enumerate(columns):
                table[name] = (cloud.points if i < 3 else cloud.colors)[:, i % 3]
            file.write(table.tobytes())
