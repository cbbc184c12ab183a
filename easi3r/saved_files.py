"""The arrays of a saved folder, which somebody else may have made: no link leads out of it, no small file is huge.

Whatever is wrong with a file is an error of some kind (ValueError where it is ours to say); who calls makes it one
sentence.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from easi3r.array_files import read_npy, read_npz
from easi3r.structures import Array
from easi3r.untrusted import check_inside, open_image


def read_layers(folder: Path, num_frames: int, size: tuple[int, ...] | None = None) -> Array:
    """[n, H, W] or [n, H, W, 3] of one file per frame: PNG of ``size`` (height, width), or npy if that is None."""
    suffix = "npy" if size is None else "png"
    check_inside(folder, folder.parent)
    found = len(list(folder.glob(f"frame_*.{suffix}")))
    if found != num_frames:  # asked first, lest a damaged number of frames fill the memory
        raise ValueError(f"{folder.name} holds {found} frames where {num_frames!r} were expected")
    paths = [folder / f"frame_{i:05d}.{suffix}" for i in range(num_frames)]
    with ThreadPoolExecutor() as pool:  # decoding leaves the interpreter free
        return np.stack(list(pool.map(partial(_read_frame, size=size), paths)))


def _read_frame(path: Path, size: tuple[int, ...] | None) -> Array:
    check_inside(path, path.parents[1])
    if size is None:
        return read_npy(path)
    with open_image(path) as image:
        if image.size[::-1] != size or image.mode not in ("L", "RGB"):
            raise ValueError(f"{path.name} is {image.size[0]} x {image.size[1]} px, {image.mode}")
        return np.asarray(image)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """All of ``names`` in an npz file."""
    check_inside(path, path.parent)
    arrays = read_npz(path, names)
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    return arrays
