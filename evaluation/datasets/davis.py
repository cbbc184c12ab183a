"""DAVIS 2016 and 2017: videos of 480p with the masks of what moves (Perazzi et al. 2016, Pont-Tuset et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from easi3r.errors import InputError
from evaluation.datasets.layout import Layout, choose, frame_shape, numbered, read_layers, read_list, read_mask
from evaluation.datasets.sequence import Sequence

FPS = 24.0  # of the recordings; the files do not say

_LISTS = Path(__file__).parents[2] / "configs"


class Davis(Layout):
    """``JPEGImages/480p/SEQ/00000.jpg`` and ``Annotations/480p/SEQ/00000.png``: palette PNGs, every index > 0 moves.

    The variants 2016 and 2017 are the validation splits, in ``configs/davis-YEAR.txt``.  "all" is every name of
    ``ImageSets/2017/train.txt`` and ``val.txt`` where both lists are there, else every folder of frames that has a
    folder of annotations, sorted.
    """

    name: ClassVar[str] = "davis"
    variants: ClassVar[tuple[str, ...]] = ("2016", "2017", "all")
    home: ClassVar[str] = "https://davischallenge.org"

    def names(self) -> list[str]:
        if self.variant != "all":
            return read_list(_LISTS / f"davis-{self.variant}.txt")
        lists = [self.root / "ImageSets" / "2017" / f"{split}.txt" for split in ("train", "val")]
        if all(path.is_file() for path in lists):
            return sorted({name for path in lists for name in read_list(path)})
        images, annotations = (self.root / part / "480p" for part in ("JPEGImages", "Annotations"))
        annotated = set(self.folders(annotations))
        if not (names := [name for name in self.folders(images) if name in annotated]):
            raise InputError(f"No folder of {images} has one of its name in {annotations}; get both at {self.home}.")
        return names

    def files(self, name: str) -> Iterator[Path]:
        for pair in self._frames(name):
            yield from pair

    def read(self, name: str, frames: slice) -> Sequence:
        """Masks of every frame, the first and the last too; frame i is taken at i / 24 s."""
        chosen = choose(list(enumerate(self._frames(name))), frames, name)
        images = tuple(image for _, (image, _) in chosen)
        masks = read_layers([mask for _, (_, mask) in chosen], read_mask, frame_shape(images))
        times_s = np.array([i for i, _ in chosen]) / FPS
        return Sequence(name, images, times_s, masks=masks, has_mask=np.ones(len(chosen), dtype=bool))

    def _frames(self, name: str) -> list[tuple[Path, Path]]:
        """(image, mask) from 00000 to the last of either, so that a frame lacking in between is missed."""
        images, masks = self.root / "JPEGImages" / "480p" / name, self.root / "Annotations" / "480p" / name
        last = max(0, numbered(images, "", ".jpg"), numbered(masks, "", ".png"))
        return [(images / f"{i:05}.jpg", masks / f"{i:05}.png") for i in range(last + 1)]
