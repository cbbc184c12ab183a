"""Aria Digital Twin, as the minival set of TAPVid-3D has it (Pan et al. 2023, Koppula et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from easi3r.decoding import natural_key
from easi3r.errors import InputError
from easi3r.structures import Array
from evaluation.datasets.layout import Layout, check_rigid, choose, frame_shape, read_json, to_numbers
from evaluation.datasets.sequence import Sequence

FPS = 30.0  # of the glasses' colour camera; the files do not say


class Adt(Layout):
    """``SEQ/rgb/NAME.png`` and ``SEQ/camera/NAME.json`` with ``w2c``; every folder ``*release*`` is a sequence."""

    name: ClassVar[str] = "adt"
    variants: ClassVar[tuple[str, ...]] = ("minival",)
    home: ClassVar[str] = "https://tapvid3d.github.io"

    def names(self) -> list[str]:
        return self.folders(self.root, "*release*")

    def files(self, name: str) -> Iterator[Path]:
        for pair in self._frames(name):
            yield from pair

    def read(self, name: str, frames: slice) -> Sequence:
        """Poses in metres; frame i is taken at i / 30 s."""
        chosen = choose(list(enumerate(self._frames(name))), frames, name)
        images = tuple(image for _, (image, _) in chosen)
        frame_shape(images)
        return Sequence(
            name,
            images,
            times_s=np.array([i for i, _ in chosen]) / FPS,
            camera_to_world=np.stack([np.linalg.inv(read_camera(camera)) for _, (_, camera) in chosen]),
        )

    def _frames(self, name: str) -> list[tuple[Path, Path]]:
        """(image, camera), in natural order, of every name that has either."""
        images, cameras = self.root / name / "rgb", self.root / name / "camera"
        found = [*images.glob("[!.]*.png"), *cameras.glob("[!.]*.json")]
        if not found:
            raise InputError(self.is_missing(images) if not images.is_dir() else f"{images} holds no PNG; get it anew.")
        stems = sorted({path.stem for path in found}, key=lambda stem: natural_key(Path(stem)))
        return [(images / f"{stem}.png", cameras / f"{stem}.json") for stem in stems]


def read_camera(path: Path) -> Array:
    """camera/NAME.json -> world-to-camera [4, 4] float64, OpenCV axes."""
    (world_to_camera,) = read_json(path, "w2c")
    return check_rigid(to_numbers(world_to_camera, (4, 4), path, "w2c"), path)
