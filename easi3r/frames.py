"""From a video, images or an array to frames of the network's size: selection, resizing, the patch grid."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from easi3r.canvas import Box
from easi3r.config import FrameSettings
from easi3r.decoding import (
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    SourceFrame,
    Stream,
    array_stream,
    image_stream,
    natural_key,
    video_stream,
)
from easi3r.errors import InputError
from easi3r.progress import Progress, silent
from easi3r.structures import Array, Crop, Frames, Preparation
from easi3r.untrusted import MAX_PIXELS, list_folder

_SQUARE = 224  # checkpoints trained at this size take squares
_CLOCK_SLACK = 0.0015  # seconds: Matroska rounds its stamps to milliseconds


def read_frames(
    source: str | Path | Sequence[str | Path] | Array,
    settings: FrameSettings,
    *,
    patch_size: int,
    trained_size: int,
    preparation: Preparation | None = None,
    progress: Progress = silent,
) -> Frames:
    """Read a clip, choose its frames and bring them to the network's size; only images of that size are kept.

    ``source`` is a video file, a folder of images (in natural order; hidden and other files are skipped), one image
    file, a list of image files (in the order given) or an array [n, H, W, 3] uint8 RGB.

    Frames are chosen by ``start`` (inclusive) and ``end`` (exclusive) on the clock of the source, then ``fps`` (from
    the first frame at or after ``start`` on, the first frame that reaches each multiple of 1 / fps; never one twice),
    then ``stride``, then ``max_frames``; nothing after the last chosen frame is decoded.  A video's clock is 0 at its
    first frame; image i is taken at ``i / fps`` seconds, at i seconds without fps.

    ``trained_size`` is the long side in pixels that the checkpoint was trained for, ``patch_size`` the side of a
    patch; see `plan_crop` for what becomes of a frame, unless the network has a ``preparation`` of its own.

    With ``collection`` the images may be of unequal size and orientation: each is brought to the same long side, cut
    to an even number of patches along both, and put in the middle of one canvas (``Frames.boxes``).

    Returns Frames: images [n, H, W, 3] uint8, timestamps [n] float64 seconds on the clock of the source.
    Raises InputError for a source that cannot be read, frames of unequal size, or when no frame is left.
    """
    name, stream = _open(source, settings.fps or 1.0)
    # of unequal images each lies in the middle of the canvas, and on its patches too: both need even numbers of patches
    step = 2 * patch_size if settings.collection else patch_size
    images: list[Array] = []
    chosen: list[SourceFrame] = []
    crops: list[Crop] = []
    cut = apply_crop if preparation is None else preparation.cut

    def plan(size: tuple[int, int]) -> Crop:
        if preparation is not None:
            return preparation.plan(size, settings.image_size)
        return plan_crop(size, settings.image_size, patch_size=step, trained_size=trained_size)

    with closing(stream):
        for frame in progress(_select(stream, settings, name), "reading frames"):
            pixels = frame.read()
            size = pixels.shape[1], pixels.shape[0]
            if crops and size != crops[0].original and not settings.collection:
                raise InputError(
                    f"{frame.name} of {name} is {_text(size)}, but {chosen[0].name} is {_text(crops[0].original)}; "
                    "give collection=True (--collection) for photographs of unequal size, or bring all frames to one."
                )
            alike = next((crop for crop in crops if crop.original == size), None)
            crop = alike or plan(size)
            images.append(cut(pixels, crop))
            chosen.append(frame)
            crops.append(crop)
    boxes = None
    if settings.collection:
        images, crops, boxes = on_one_canvas(images, crops)
    return Frames(
        images=np.stack(images),
        timestamps=np.array([frame.seconds for frame in chosen], dtype=np.float64),
        crops=tuple(crops),
        names=tuple(frame.name for frame in chosen),
        source=name,
        boxes=boxes,
    )


def on_one_canvas(images: list[Array], crops: list[Crop]) -> tuple[list[Array], list[Crop], tuple[Box, ...] | None]:
    """Put each image in the middle of a black canvas that holds them all; the crops then lead to the canvas' pixels.

    None instead of boxes where all images have one size, so that there is no padding.
    """
    width, height = canvas = (max(crop.size[0] for crop in crops), max(crop.size[1] for crop in crops))
    if all(crop.size == canvas for crop in crops):
        return images, crops, None
    boxes = tuple(Box.centred(crop.size, canvas) for crop in crops)
    padded = []
    for image, box in zip(images, boxes, strict=True):
        padded.append(np.zeros((height, width, 3), dtype=np.uint8))
        padded[-1][box.rows, box.columns] = image
    moved = [
        replace(crop, offset=(crop.offset[0] - box.left, crop.offset[1] - box.top), size=canvas)
        for crop, box in zip(crops, boxes, strict=True)
    ]
    return padded, moved, boxes


def plan_crop(size: tuple[int, int], image_size: int | str | None, *, patch_size: int, trained_size: int) -> Crop:
    """Decide how a frame of ``size`` (width, height) becomes a network image whose sides are whole patches.

    ``image_size`` is the wanted long side, ``trained_size`` if None.  The long side is scaled to it and the rest
    beyond whole patches cut off about the centre; a frame that is square then loses a quarter of its height, for
    the networks have seen no squares.  Networks trained at 224 saw nothing else: their frames get a short side of
    224 and lose all but the central square.  "native" keeps the scale and cuts to whole patches.

    Raises InputError when not one whole patch is left.

    >>> plan_crop((1280, 720), None, patch_size=16, trained_size=512).size
    (512, 288)
    """
    native = image_size == "native"
    square = trained_size == _SQUARE and image_size in (None, _SQUARE)
    if native:
        resized = size
    else:
        target, side = (_SQUARE, min(size)) if square else (int(image_size or trained_size), max(size))
        resized = round(size[0] * target / side), round(size[1] * target / side)
    center_x, center_y = resized[0] // 2, resized[1] // 2
    width, height = 2 * center_x // patch_size * patch_size, 2 * center_y // patch_size * patch_size
    if square:
        width = height = min(width, height)
    elif resized[0] == resized[1] and not native:
        height = width * 3 // 4 // patch_size * patch_size
    if resized[0] * resized[1] > MAX_PIXELS:
        raise InputError(
            f"A frame of {_text(size)} would become {_text(resized)}; choose a smaller image_size, at most "
            f"{MAX_PIXELS // 10**6} million pixels."
        )
    if not (width and height):
        raise InputError(
            f"A frame of {_text(size)} becomes {_text(resized)}, which holds no whole patch of {patch_size} x "
            f"{patch_size} px; choose a larger image_size or other frames."
        )
    offset = center_x - width // 2, center_y - height // 2
    return Crop(original=size, resized=resized, offset=offset, size=(width, height))


def apply_crop(pixels: Array, crop: Crop) -> Array:
    """Resize and cut ``pixels`` [H, W, 3] uint8 -> [h, w, 3] uint8, by Lanczos when shrinking, else bicubic."""
    image = Image.fromarray(pixels)
    if crop.resized != crop.original:  # Pillow: OpenCV's filters do not widen when they shrink, and alias
        shrinks = max(crop.resized) < max(crop.original)
        image = image.resize(crop.resized, Image.Resampling.LANCZOS if shrinks else Image.Resampling.BICUBIC)
    (x, y), (width, height) = crop.offset, crop.size
    return np.asarray(image)[y : y + height, x : x + width]


def _open(source: str | Path | Sequence[str | Path] | Array, fps: float) -> tuple[str, Stream]:
    """The name of the source and its frames; ``fps`` is the clock of images and arrays."""
    if isinstance(source, np.ndarray):
        return "array", array_stream(_check_array(source), fps)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if _check_exists(path).is_dir():
            return str(source), image_stream(_list_folder(path), fps)
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return str(source), video_stream(_check_file(path))
        return str(source), image_stream([_check_image(path)], fps)
    if not isinstance(source, Sequence) or not all(isinstance(path, (str, os.PathLike)) for path in source):
        raise InputError(
            f"The source is a {type(source).__name__}; expected a video file, a folder of images, a list of image "
            "paths or a uint8 array [n, H, W, 3]."
        )
    if not source:
        raise InputError("The list of images is empty; expected at least one path.")
    paths = [_check_image(Path(path)) for path in source]
    return str(paths[0].parent), image_stream(paths, fps)


def _check_array(frames: Array) -> Array:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise InputError(
            f"The array of frames is {frames.dtype} {list(frames.shape)}; expected uint8 [n, H, W, 3], RGB from 0 to "
            "255, with at least one frame."
        )
    return frames


def _check_exists(path: Path) -> Path:
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} does not exist, or may not be read; check the path and its permissions.")
    return path


def _check_file(path: Path) -> Path:
    if _check_exists(path).is_dir():
        raise InputError(f"{path} is a folder, but a list of frames holds image files; give the folder by itself.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes); get a whole copy of the file.")
    return path


def _check_image(path: Path) -> Path:
    if _check_file(path).suffix.lower() not in IMAGE_SUFFIXES:
        raise InputError(
            f"{path} is no image by its name; expected one of {' '.join(sorted(IMAGE_SUFFIXES))}, or by itself a video "
            f"({' '.join(sorted(VIDEO_SUFFIXES))})."
        )
    return path


def _list_folder(folder: Path) -> list[Path]:
    entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=natural_key)
    images = sorted(list_folder(folder, IMAGE_SUFFIXES), key=natural_key)
    if not entries:
        raise InputError(f"The folder {folder} is empty; expected images or the path of a video.")
    if not images:
        raise InputError(
            f"The folder {folder} holds no image, only {entries[0].name} and the like; expected files such as "
            "frame_1.png (subfolders are not entered), or the path of a video itself."
        )
    return [_check_file(image) for image in images]


def _select(stream: Stream, settings: FrameSettings, name: str) -> Iterator[SourceFrame]:
    frames = _between(stream, settings.start, settings.end, name)
    if settings.fps is not None:
        frames = _thin(frames, settings.fps)
    return itertools.islice(itertools.islice(frames, 0, None, settings.stride), settings.max_frames)


def _between(stream: Stream, start: float | None, end: float | None, name: str) -> Iterator[SourceFrame]:
    found = False
    epsilon = 1e-6  # OpenCV's milliseconds and i / fps are a rounding away from the seconds people write
    for frame in stream:
        if end is not None and frame.seconds > end - epsilon:
            break
        if start is None or frame.seconds > start - epsilon:
            found = True
            yield frame
    if found:
        return
    if start is not None and frame.seconds < start:
        raise InputError(
            f"start is {start:g} s, but the last frame of {name} is at {frame.seconds:g} s; start earlier."
        )
    raise InputError(
        f"No frame of {name} lies between start ({start or 0:g} s) and end ({end:g} s, exclusive): the next one is at "
        f"{frame.seconds:g} s; choose a longer stretch."
    )


def _thin(frames: Iterator[SourceFrame], fps: float) -> Iterator[SourceFrame]:
    """The first frame that reaches each multiple of 1 / fps after the first frame.  Images at ``fps`` all stay."""
    slack = min(_CLOCK_SLACK * fps, 0.25)  # in multiples, less than the distance of two
    first, last = 0.0, -1
    for frame in frames:
        if last < 0:
            first = frame.seconds
        multiple = math.floor((frame.seconds - first) * fps + slack)
        if multiple > last:
            last = multiple
            yield frame


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} px"
