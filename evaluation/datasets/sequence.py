"""One clip of a data set and what is known to be true of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from easi3r.structures import Array


@dataclass(frozen=True)
class Sequence:
    """n frames of H x W pixels, as they lie on the disk; None for what the data set does not say."""

    name: str
    images: tuple[Path, ...]  # n files
    times_s: Array  # [n] float64
    masks: Array | None = None  # [n, H, W] bool, True = moves; objects are merged
    has_mask: Array | None = None  # [n] bool: the frame's mask is known (the last of Sintel's is not)
    camera_to_world: Array | None = None  # [n, 4, 4] float64, OpenCV axes; NaN for a frame without a pose
    intrinsics: Array | None = None  # [n, 3, 3] float64, (0, 0) is the centre of the top-left pixel
    depth: Array | None = None  # [n, H, W] float32 z-depth in the unit of the poses; NaN where it is not known


class Dataset(Protocol):
    """A folder on the disk, which is not looked at before it is asked for."""

    name: ClassVar[str]  # as typed on the command line
    variants: ClassVar[tuple[str, ...]]  # the first is the default
    seen_on_real_files: ClassVar[bool]  # every table says so where it is False

    def __init__(self, root: Path, variant: str) -> None: ...

    def names(self) -> list[str]:
        """Of the variant's sequences, in the order of the official list.  Raises InputError where that is missing."""
        ...

    def missing(self) -> list[str]:
        """One sentence for each file or folder that the variant needs and that is not there."""
        ...

    def read(self, name: str, frames: slice) -> Sequence:
        """A sequence's frames, of which ``frames`` are chosen, with the truth.

        Raises InputError, one sentence with the file's name, where a file is missing or not what its layout says.
        """
        ...
