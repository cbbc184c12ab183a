"""Our own generated worlds as a data set; their clips are rendered when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import imageio.v3 as iio
import numpy as np

from easi3r.demo.rendering import render
from easi3r.demo.worlds import FAMILIES, make_world
from easi3r.errors import InputError, nearest_name
from evaluation.datasets.sequence import Sequence

FIRST_SEED = 1000  # held out: training and the bundled clip use smaller seeds, baselines were tuned on 3000 and up
DEFAULT_FAMILY = "sharp"  # what the bundled network is trained on


@dataclass(frozen=True)
class Worlds:
    """Held-out clips of one family (the variant) with exact masks, cameras (metres) and depth of every frame.

    ``root`` is where frames go, as PNG files in a folder per clip; nothing needs to be there beforehand.  They are
    written at each reading, so that images can never be of other worlds than the truth.
    """

    name: ClassVar[str] = "worlds"
    variants: ClassVar[tuple[str, ...]] = (DEFAULT_FAMILY, *(f for f in FAMILIES if f != DEFAULT_FAMILY))
    seen_on_real_files: ClassVar[bool] = True  # there are no others: what this class writes is the data set

    root: Path
    variant: str = DEFAULT_FAMILY
    num_clips: int = 20
    num_frames: int = 12  # that one and the same walk is sampled at
    size: tuple[int, int] = (128, 96)  # (width, height)
    first_seed: int = FIRST_SEED

    def names(self) -> list[str]:
        """``seed_1000`` and so on.  Raises InputError for a variant that does not exist."""
        if self.variant not in FAMILIES:
            raise InputError(
                f"{self.variant!r} is no family of worlds{nearest_name(self.variant, FAMILIES)}; expected one of "
                f"{', '.join(self.variants)}."
            )
        return [f"seed_{seed}" for seed in range(self.first_seed, self.first_seed + self.num_clips)]

    def missing(self) -> list[str]:
        """Nothing: frames are made."""
        return []

    def read(self, name: str, frames: slice) -> Sequence:
        """Render and write the clip, and take ``frames`` of it; frame i is at i seconds.

        Raises InputError for an unknown name, a choice without any frame, and a folder that cannot be written to.
        """
        if name not in (names := self.names()):
            raise InputError(f"{name!r} is no clip of these worlds; expected {names[0]} to {names[-1]}.")
        chosen = np.arange(self.num_frames)[frames]
        if not len(chosen):
            raise InputError(f"{frames} chooses none of the {self.num_frames} frames of {name}; choose at least one.")
        family = FAMILIES[self.variant]
        clip = render(make_world(int(name.removeprefix("seed_")), family, num_frames=self.num_frames), *self.size)
        width, height = self.size
        folder = Path(self.root) / f"{self.variant}_{width}x{height}x{self.num_frames}" / name
        paths = tuple(folder / f"{frame:05d}.png" for frame in chosen)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path, image in zip(paths, clip.images[chosen], strict=True):
                iio.imwrite(path, image)
        except OSError as error:
            raise InputError(
                f"Frames of {name} cannot be written to {folder} ({error.strerror}); give another root."
            ) from error
        return Sequence(
            name=name,
            images=paths,
            times_s=chosen.astype(np.float64),
            masks=clip.dynamic_mask[chosen],
            has_mask=np.ones(len(chosen), dtype=bool),
            camera_to_world=clip.camera_to_world[chosen],
            intrinsics=clip.intrinsics[chosen],
            depth=clip.depth[chosen],
        )
