"""The arrays of a saved folder, which somebody else may have made: no link leads out of it, no small file is huge.

Whatever is wrong with a file is an error of some kind (ValueError where it is ours to say); who calls makes it one
sentence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from easi3r.array_files import npz_keys, read_npy, read_npz
from easi3r.structures import Array
from easi3r.untrusted import check_inside, open_image

MANY = 16  # arrays in one file: no result has as many


def read_layers(
    folder: Path, num_frames: int, size: tuple[int, ...] | None = None, modes: tuple[str, ...] = ("L", "RGB")
) -> Array:
    """[n, H, W] or [n, H, W, 3] of one file per frame: PNG of ``size`` (height, width), or npy if that is None.

    modes: Pillow's names of what the pixels may be.
    """
    paths = _frame_paths(folder, num_frames, "npy" if size is None else "png")
    with ThreadPoolExecutor() as pool:  # decoding leaves the interpreter free
        return np.stack(list(pool.map(partial(_read_frame, size=size, modes=modes), paths)))


def read_masks(folder: Path, num_frames: int) -> Iterator[Array]:
    """[h, w] bool of one PNG per frame, each of its own size."""
    for path in _frame_paths(folder, num_frames, "png"):
        yield _read_frame(path, size=(), modes=("L",)) > 127


def _frame_paths(folder: Path, num_frames: int, suffix: str) -> list[Path]:
    check_inside(folder, folder.parent)
    found = len(list(folder.glob(f"frame_*.{suffix}")))
    if found != num_frames:  # asked first, lest a damaged number of frames fill the memory
        raise ValueError(f"{folder.name} holds {found} frames where {num_frames!r} were expected")
    return [folder / f"frame_{i:05d}.{suffix}" for i in range(num_frames)]


def _read_frame(path: Path, size: tuple[int, ...] | None, modes: tuple[str, ...]) -> Array:
    """size: (height, width) of a PNG, or () for any; None: an npy."""
    check_inside(path, path.parents[1])
    if size is None:
        return read_npy(path)
    with open_image(path) as image:
        if (size and image.size[::-1] != size) or image.mode not in modes:
            raise ValueError(f"{path.name} is {image.size[0]} x {image.size[1]} px, {image.mode}")
        return np.asarray(image)


def read_arrays(path: Path, names: Sequence[str] | None = None) -> dict[str, Array]:
    """All of ``names`` in an npz file; None: everything in it, which are a few arrays."""
    check_inside(path, path.parent)
    if names is None:
        names = npz_keys(path)
        if len(names) > MANY:
            raise ValueError(f"{path.name} holds {len(names)} arrays")
    arrays = read_npz(path, names)
    if missing := [name for name in names if name not in arrays]:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}")
    return arrays
