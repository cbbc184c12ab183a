"""What the readers share: a root, a variant, the list of what must lie there, and files read with one error each."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from PIL import Image

from easi3r.errors import InputError, nearest_name
from easi3r.given_arrays import summary
from easi3r.structures import Array

T = TypeVar("T")

_RIGID_TOLERANCE = 1e-3  # of a rotation's entries: text files round them
_BAND_MODES = ("1", "L", "LA", "RGB", "RGBA")  # of masks, besides palettes


class Layout(ABC):
    """A data set's root folder, one of its variants, and what has to lie there; the base of every reader."""

    name: ClassVar[str]
    variants: ClassVar[tuple[str, ...]]
    seen_on_real_files: ClassVar[bool] = False  # until somebody has compared with the real files
    home: ClassVar[str]  # where the data set is to be had

    def __init__(self, root: Path, variant: str | None = None) -> None:
        self.root = Path(root)
        self.variant = self.variants[0] if variant is None else variant
        if self.variant not in self.variants:
            raise InputError(
                f"{self.name} has no variant {variant!r}; expected one of {', '.join(self.variants)}"
                f"{nearest_name(self.variant, self.variants)}."
            )

    @abstractmethod
    def names(self) -> list[str]:
        """Of the variant's sequences."""

    @abstractmethod
    def files(self, name: str) -> Iterator[Path]:
        """All files that reading the whole of a sequence opens; they need not be there.

        Raises InputError where a list, from which their names come, cannot be read.
        """

    def missing(self) -> list[str]:
        """One sentence for each file that is not there, or for the folder that would hold it; no image is opened."""
        try:
            names = self.names()
        except InputError as error:
            return [str(error)]
        return list(dict.fromkeys(sentence for name in names for sentence in self._missing_of(name)))

    def _missing_of(self, name: str) -> Iterator[str]:
        try:
            for path in self.files(name):
                if not path.is_file():
                    yield self.is_missing(path)
        except InputError as error:
            yield str(error)

    def is_missing(self, path: Path) -> str:
        """The sentence that ``path``, or the topmost of its folders that does not exist, is missing."""
        top = next((folder for folder in reversed(path.parents) if not folder.exists()), path)
        return (
            f"{top} is missing; expected the layout of {self.name}, so give its root and get the rest at {self.home}."
        )

    def folders(self, parent: Path, pattern: str = "*") -> list[str]:
        """The sorted names of the folders in ``parent``, hidden ones left out; InputError where there is none."""
        if not parent.is_dir():
            raise InputError(self.is_missing(parent))
        found = sorted(path.name for path in parent.glob(pattern) if path.is_dir() and path.name[0] != ".")
        if not found:
            raise InputError(
                f"{parent} holds no folder {pattern!r}; expected one for each sequence of {self.name}, so give its "
                f"root and get them at {self.home}."
            )
        return found


def choose(candidates: Sequence[T], frames: slice, name: str) -> list[T]:
    """The candidates in the slice; InputError if that holds none."""
    chosen = list(candidates[frames])
    if not chosen:
        part = ":".join("" if end is None else str(end) for end in (frames.start, frames.stop, frames.step))
        raise InputError(f"[{part}] chooses none of the {len(candidates)} frames of {name}; choose at least one.")
    return chosen


def numbered(folder: Path, prefix: str, suffix: str) -> int:
    """The highest number of the files PREFIX[0-9]+SUFFIX in a folder; -1 without any."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = [re.fullmatch(rf"{re.escape(prefix)}([0-9]+){re.escape(suffix)}", name) for name in names]
    return max((int(match[1]) for match in found if match), default=-1)


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong inside is one InputError: ``path`` is missing, or no whole ``kind``."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; 'python -m evaluation check' lists all that is.") from error
    except Exception as error:  # damaged files make decoders raise errors of a dozen types
        raise InputError(f"{path} is no whole {kind} ({summary(error)}); get it anew.") from error


def read_list(path: Path) -> list[str]:
    """The words at the beginning of the lines of a text file, of which '#' begins a comment."""
    with reading(path, "text file"):
        lines = [line.split("#")[0].split() for line in path.read_text("utf-8").splitlines()]
    names = [words[0] for words in lines if words]
    if not names:
        raise InputError(f"{path} holds no names; expected one per line, so get it anew.")
    return names


def read_json(path: Path, *keys: str) -> list[Any]:
    """The values of the keys of a JSON file."""
    with reading(path, "JSON file"):
        content = json.loads(path.read_text("utf-8"))
    lacking = [key for key in keys if not isinstance(content, dict) or key not in content]
    if lacking:
        raise InputError(f"{path} has no {', '.join(map(repr, lacking))}; expected an object with it, so get it anew.")
    return [content[key] for key in keys]


def to_numbers(value: Any, shape: tuple[int, ...], path: Path, key: str) -> Array:
    """float64 of ``shape``, all finite; InputError naming the file and the key."""
    with reading(path, "file of its kind"):
        array = np.array(value, dtype=np.float64)
    if array.shape != shape or not np.isfinite(array).all():
        expected = f"{list(shape)} finite numbers" if shape else "one finite number"
        raise InputError(f"{key!r} of {path} is {str(value)[:60]!r}; expected {expected}, so get the file anew.")
    return array


def check_rigid(matrix: Array, path: Path) -> Array:
    """[4, 4] float64 from [3, 4] or [4, 4] that is a rotation and a translation; InputError naming the file."""
    turn, end = matrix[:3, :3], matrix[3:]
    if (
        not np.isfinite(matrix).all()
        or np.abs(turn @ turn.T - np.eye(3)).max() > _RIGID_TOLERANCE
        or np.linalg.det(turn) < 0
        or (end.size and np.abs(end - (0, 0, 0, 1)).max() > _RIGID_TOLERANCE)
    ):
        raise InputError(f"The camera of {path} is no rotation and translation; expected [R | t], so get it anew.")
    return np.concatenate([matrix[:3], [[0.0, 0.0, 0.0, 1.0]]])


def frame_shape(images: Sequence[Path]) -> tuple[int, int]:
    """(height, width) that all the images have, from their headers alone; InputError where they differ."""
    shapes = []
    for path in images:
        with reading(path, "image"), Image.open(path) as image:
            shapes.append((image.height, image.width))
        if shapes[-1] != shapes[0]:
            raise _other_size(path, shapes[-1], shapes[0])
    return shapes[0]


def read_layers(paths: Sequence[Path], read: Callable[[Path], Array], shape: tuple[int, ...]) -> Array:
    """[n, *shape] what ``read`` makes of each file; InputError for one whose size is not that of the frames."""
    layers = []
    for path in paths:
        layers.append(read(path))
        if layers[-1].shape != shape:
            raise _other_size(path, layers[-1].shape, shape)
    return np.stack(layers)


def read_mask(path: Path) -> Array:
    """[H, W] bool: a palette's index, or any of the colours, is above 0."""
    with reading(path, "image"), Image.open(path) as image:
        if image.mode not in ("P", *_BAND_MODES):
            raise InputError(
                f"The mask {path} is of the mode {image.mode!r}; expected a palette, grey or colours, 8 bits each."
            )
        values = np.asarray(image) if image.mode == "P" else np.asarray(image.convert("RGB")).max(axis=2)
    return values > 0


def _other_size(path: Path, shape: tuple[int, ...], expected: tuple[int, ...]) -> InputError:
    given, wanted = (" x ".join(map(str, sizes)) for sizes in (shape, expected))
    return InputError(f"{path} is {given}; expected {wanted}, height x width of the sequence's frames, so get it anew.")
