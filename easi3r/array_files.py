"""Arrays in .npy and .npz files, none of which can hold code, or fill the memory from a small file."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from easi3r.structures import Array
from easi3r.untrusted import check_regular

MAX_BYTES = 1 << 27  # of an array in a compressed file, unless the reader knows that more is right
_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_npy(path: Path) -> Array:
    """The array of numbers (or bools) in a .npy file.

    Raises ValueError, saying what is wrong, for anything else and for a file that ends early; OSError as usual.
    """
    check_regular(path)
    with path.open("rb") as file:
        return _read(file, path.stat().st_size, path.stat().st_size)


def read_npz(path: Path, keys: Collection[str], *, most_bytes: int = MAX_BYTES) -> dict[str, Array]:
    """Those of ``keys`` that a .npz file has, and their arrays of numbers (or bools).

    Raises ValueError for anything else, and for arrays of more than ``most_bytes``; of a damaged file whatever
    zipfile raises passes.
    """
    check_regular(path)
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        for key in keys:
            entry = archive.NameToInfo.get(f"{key}.npy")
            if entry is None:
                continue
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # all that NumPy writes
                raise ValueError(f"{key} is compressed as NumPy never does")
            with archive.open(entry) as file:
                arrays[key] = _read(file, entry.file_size, most_bytes)
    return arrays


def npz_keys(path: Path) -> list[str]:
    """The names of the arrays in a .npz file; of a damaged file whatever zipfile raises passes."""
    check_regular(path)
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def _read(file: IO[bytes], size: int, most_bytes: int) -> Array:
    """What NumPy makes of it, once the header was seen to promise no more than is there."""
    version = npy.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"its format is NumPy's {version[0]}.{version[1]}, which plain numbers do not need")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.kind not in "biuf":
        raise ValueError(f"it holds {dtype.name[:40]}, no plain numbers")
    promised = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or promised > size:
        raise ValueError(f"its header promises {_shown(shape)} {dtype}, but the file ends before that")
    if promised > most_bytes:
        raise ValueError(f"its {_shown(shape)} {dtype} are more than the {most_bytes >> 20} MiB that can be right")
    file.seek(0)
    return np.asarray(npy.read_array(file, allow_pickle=False))


def _shown(shape: tuple[int, ...]) -> str:
    return "x".join(str(side)[:12] for side in shape[:6]) or "1"
