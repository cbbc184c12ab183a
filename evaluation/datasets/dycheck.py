"""DyCheck's iPhone videos (Gao et al. 2022), as processed for Shape of Motion (Wang et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from easi3r.colmap import CAMERAS, IMAGES, match_names, read_colmap_cameras, read_colmap_images
from easi3r.errors import InputError
from easi3r.structures import Array
from evaluation.datasets.layout import (
    Layout,
    check_rigid,
    choose,
    frame_shape,
    read_json,
    read_layers,
    read_mask,
    reading,
    to_numbers,
)
from evaluation.datasets.sequence import Sequence

MIN_INVERSE_DEPTH = 1e-3
FARTHEST = 2.5  # depth is clamped at so many times the median over frames of each frame's maximum

_PROCESSED = "flow3d_preprocessed"


class DyCheck(Layout):
    """``SEQ/rgb/1x/NAME.png`` of the train split, every folder of the root being a sequence.

    "refined", the published protocol, has COLMAP's cameras and the depth that was estimated and aligned to them, its
    unit being COLMAP's; "original" has the phone's cameras and its lidar's depth, in metres.  Masks are the foreground
    that was tracked for Shape of Motion.
    """

    name: ClassVar[str] = "dycheck"
    variants: ClassVar[tuple[str, ...]] = ("refined", "original")
    home: ClassVar[str] = "https://github.com/vye16/shape-of-motion"

    def names(self) -> list[str]:
        return self.folders(self.root)

    def files(self, name: str) -> Iterator[Path]:
        folder = self.root / name
        yield folder / "extra.json"
        yield (split := folder / "splits" / "train.json")
        if self.variant == "refined":
            yield from self._model(name)
        if split.is_file():
            for frame in read_split(split)[0]:
                yield self._image(name, frame)
                yield self._mask(name, frame)
                yield self._depth(name, frame)
                if self.variant == "original":
                    yield folder / "camera" / f"{frame}.json"

    def read(self, name: str, frames: slice) -> Sequence:
        """Poses, K, depth and masks; the limit of the aligned depth is that of the whole split, whatever is chosen.

        A frame that COLMAP has not placed has NaN for its pose and its K.
        """
        folder = self.root / name
        every_frame, time_ids = read_split(folder / "splits" / "train.json")
        (fps,) = read_json(folder / "extra.json", "fps")
        if not (rate := float(to_numbers(fps, (), folder / "extra.json", "fps"))) > 0:
            raise InputError(f"'fps' of {folder / 'extra.json'} is {rate:g}; expected a number above 0.")
        chosen = choose(range(len(every_frame)), frames, name)
        chosen_frames = [every_frame[i] for i in chosen]
        images = tuple(self._image(name, frame) for frame in chosen_frames)
        shape = frame_shape(images)
        masks = read_layers([self._mask(name, frame) for frame in chosen_frames], read_mask, shape)
        depth = read_layers([self._depth(name, frame) for frame in chosen_frames], self._read_depth, shape)
        if self.variant == "refined":
            depth = np.minimum(depth, np.float32(self._farthest(name, every_frame)))
            poses, intrinsics = (part[chosen] for part in _refined_cameras(*self._model(name), every_frame, shape))
        else:
            cameras = [read_camera(folder / "camera" / f"{frame}.json") for frame in chosen_frames]
            poses, intrinsics = (np.stack(part) for part in zip(*cameras, strict=True))
        return Sequence(
            name,
            images,
            times_s=time_ids[chosen] / rate,
            masks=masks,
            has_mask=np.ones(len(chosen), dtype=bool),
            camera_to_world=poses,
            intrinsics=intrinsics,
            depth=depth,
        )

    def _farthest(self, name: str, frames: list[str]) -> float:
        """Where the depth of a sequence ends: infinity if none of it is known."""
        depths = (self._read_depth(self._depth(name, frame)) for frame in frames)
        maxima = [np.nanmax(depth) for depth in depths if not np.isnan(depth).all()]
        return FARTHEST * float(np.median(maxima)) if maxima else np.inf

    def _model(self, name: str) -> tuple[Path, Path]:
        """COLMAP's files of cameras and of images, binary unless there is text alone."""
        model = self.root / name / _PROCESSED / "colmap" / "sparse"
        cameras, images = (
            model / (text if (model / text).is_file() and not (model / binary).is_file() else binary)
            for binary, text in (CAMERAS, IMAGES)
        )
        return cameras, images

    def _image(self, name: str, frame: str) -> Path:
        return self.root / name / "rgb" / "1x" / f"{frame}.png"

    def _mask(self, name: str, frame: str) -> Path:
        return self.root / name / _PROCESSED / "track_anything" / "1x" / f"{frame}.png"

    def _depth(self, name: str, frame: str) -> Path:
        if self.variant == "original":
            return self.root / name / "depth" / "1x" / f"{frame}.npy"
        return self.root / name / _PROCESSED / "aligned_depth_anything_colmap" / "1x" / f"{frame}.npy"

    def _read_depth(self, path: Path) -> Array:
        """[H, W] float32, not clamped: of lidar as it is, else of inverse depth; NaN where it is not known."""
        with reading(path, "array of numpy"):
            values = np.load(path, allow_pickle=False).astype(np.float32)
        values = values[..., 0] if values.ndim == 3 and values.shape[2] == 1 else values
        if self.variant == "refined":
            values = 1 / np.maximum(values, np.float32(MIN_INVERSE_DEPTH))
        return np.where(np.isfinite(values) & (values > 0), values, np.float32(np.nan))


def read_split(path: Path) -> tuple[list[str], Array]:
    """splits/train.json -> the n names of its frames and their places in time, [n] float64, in frames."""
    names, time_ids = read_json(path, "frame_names", "time_ids")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(f"'frame_names' of {path} is {str(names)[:60]!r}; expected names, at least one.")
    return names, to_numbers(time_ids, (len(names),), path, "time_ids")


def read_camera(path: Path) -> tuple[Array, Array]:
    """camera/NAME.json -> camera-to-world [4, 4] in metres and K [3, 3], float64.

    The file's principal point has the centre of the top-left pixel at (0.5, 0.5), as Nerfies' cameras do.
    """
    keys = ("focal_length", "principal_point", "orientation", "position")
    shapes: tuple[tuple[int, ...], ...] = ((), (2,), (3, 3), (3,))
    focal, centre, turn, position = (
        to_numbers(value, shape, path, key)
        for value, shape, key in zip(read_json(path, *keys), shapes, keys, strict=True)
    )
    if focal <= 0:
        raise InputError(f"'focal_length' of {path} is {focal:g}; expected pixels, above 0.")
    intrinsics = np.diag([float(focal), float(focal), 1.0])
    intrinsics[:2, 2] = centre - 0.5
    return check_rigid(np.column_stack([turn.T, position]), path), intrinsics


def _refined_cameras(
    cameras_file: Path, images_file: Path, frames: list[str], shape: tuple[int, int]
) -> tuple[Array, Array]:
    """Camera-to-world [n, 4, 4] and K [n, 3, 3] of COLMAP's model, NaN for a frame that it does not hold."""
    cameras, images = read_colmap_cameras(cameras_file), read_colmap_images(images_file)
    poses, intrinsics = np.full((len(frames), 4, 4), np.nan), np.full((len(frames), 3, 3), np.nan)
    for i, image in match_names(images, [f"{frame}.png" for frame in frames], images_file).items():
        if image.camera not in cameras or cameras[image.camera].size != shape[::-1]:
            raise InputError(
                f"The camera of {image.name} is not in {cameras_file}, or not of {shape[1]}x{shape[0]} pixels as the "
                "frames; get the model anew."
            )
        poses[i], intrinsics[i] = np.linalg.inv(image.world_to_camera), cameras[image.camera].matrix
    return poses, intrinsics
