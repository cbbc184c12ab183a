"""The frames as they are exported: at the size of ``scene.images``, or as the source has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np

from easi3r.decoding import VIDEO_SUFFIXES, read_image, video_stream
from easi3r.errors import InputError
from easi3r.structures import Array, Crop
from easi3r.untrusted import leads_outside

if TYPE_CHECKING:
    from easi3r.scene import Motion, Scene


@dataclass(frozen=True)
class View:
    """One frame of h x w pixels."""

    image: Array  # [h, w, 3] uint8 RGB
    static: Array  # [h, w] bool: False where something moves, on padding, and where the network saw nothing
    depth: Array  # [h, w] float32 z-depth, 0 where there is none


def frame_name(index: int) -> str:
    """As in a saved folder, without the suffix."""
    return f"frame_{index:05d}"


def view_intrinsics(scene: Scene, *, original: bool) -> Array:
    """[n, 3, 3] float64 K of the views, the centre of the top-left pixel at (0, 0)."""
    intrinsics = scene.intrinsics.astype(np.float64)
    if not original:
        return intrinsics
    return np.stack([crop.to_original(k) for crop, k in zip(source_crops(scene), intrinsics, strict=True)])


def view_sizes(scene: Scene, *, original: bool) -> list[tuple[int, int]]:
    """(width, height) of each view in pixels."""
    if original:
        return [crop.original for crop in source_crops(scene)]
    n, height, width = scene.images.shape[:3]
    return [(width, height)] * n


def views(scene: Scene, *, original: bool) -> Iterator[View]:
    """Frame after frame; InputError where the source of ``original`` ones is gone or has changed."""
    known = scene.valid_mask & np.isfinite(scene.depth) & (scene.depth > 0)
    depth = np.where(known, scene.depth, 0).astype(np.float32)
    static = scene.valid_mask & ~scene.dynamic_mask
    if not original:
        for i in range(scene.num_frames):
            yield View(scene.images[i], static[i], depth[i])
        return
    for i, (image, crop) in enumerate(zip(source_images(scene), source_crops(scene), strict=True)):
        yield View(image, _to_source(static[i].astype(np.uint8), crop) > 0, _to_source(depth[i], crop))


def source_crops(scene: Motion) -> list[Crop]:
    """How each source frame became an image; InputError where that is not known."""
    if "crops" not in scene.meta:
        raise InputError("meta['crops'] is missing, so nothing is known of source frames; leave out original_images.")
    return [Crop(**{name: tuple(size) for name, size in crop.items()}) for crop in scene.meta["crops"]]


def _to_source(pixels: Array, crop: Crop) -> Array:
    """[H, W] -> [h, w] on the pixels of the source frame, the nearest one's value; 0 beyond the cut."""
    flags = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return np.asarray(cv2.warpAffine(pixels, crop.matrix()[:2], crop.original, flags=flags))


def source_images(scene: Motion) -> Iterator[Array]:
    """[h, w, 3] uint8 RGB of the source, frame after frame; InputError where it is gone or has changed."""
    source, names = Path(scene.meta.get("source", "")), scene.meta.get("names", [])
    advice = "restore it, or export without original_images"
    if str(source) in (".", "array") or len(names) != scene.num_frames:
        raise InputError(
            "The scene was made from an array, so it has no source frames; export without original_images."
        )
    if not source.exists():
        raise InputError(f"The source {source} of the scene is gone, so its frames cannot be exported; {advice}.")
    images = _video_images(source, names) if _is_video(source) else _file_images(source, names)
    crops = source_crops(scene)
    count = 0
    for image, crop, name in zip(images, crops, names, strict=False):
        size = image.shape[1], image.shape[0]
        if size != crop.original:
            raise InputError(
                f"{name} of {source} is now {size[0]} x {size[1]} px, but was {crop.original[0]} x {crop.original[1]} "
                f"px when the scene was made; {advice}."
            )
        count += 1
        yield image
    if count < len(names):
        raise InputError(f"The source {source} no longer holds {names[count]}; {advice}.")


def _is_video(source: Path) -> bool:
    return source.is_file() and source.suffix.lower() in VIDEO_SUFFIXES


def _video_images(source: Path, names: list[str]) -> Iterator[Array]:
    wanted = iter(names)
    name = next(wanted, None)
    with closing(video_stream(source)) as stream:
        for frame in stream:
            if frame.name == name:
                yield frame.read()
                if (name := next(wanted, None)) is None:
                    return


def _file_images(source: Path, names: list[str]) -> Iterator[Array]:
    for name in names:
        path = source / name if source.is_dir() else source
        if path.is_symlink() and path != source and leads_outside(path, source):
            raise InputError(f"{path} is a link out of {source} now; put the file itself there.")
        if not path.exists():  # or the images came from several folders, of which only the first is on record
            return
        yield read_image(path)
