"""What travels between the stages: plain dataclasses of numpy arrays and torch tensors.

Shapes use n frames, P directed pairs, H x W pixels, h x w tokens (H = h * patch_size).
Image coordinates are OpenCV's: the centre of the top-left pixel is (0, 0).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from easi3r.canvas import Box, valid_pixels

if TYPE_CHECKING:
    import torch


Array = NDArray[Any]
Threshold = float | tuple[float | None, ...] | None  # of a clip, or of each of its frames; None: none was needed


@dataclass(frozen=True)
class Crop:
    """How one source frame became one network image: resize to ``resized``, then cut ``size`` out at ``offset``.

    All sizes are (width, height) in pixels.

    >>> crop = Crop(original=(1280, 720), resized=(512, 288), offset=(0, 0), size=(512, 288))
    >>> crop.scale
    (0.4, 0.4)
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    size: tuple[int, int]

    @property
    def scale(self) -> tuple[float, float]:
        """Network pixels per source pixel, along x and y."""
        return self.resized[0] / self.original[0], self.resized[1] / self.original[1]

    def matrix(self) -> Array:
        """[3, 3] float64, network pixel from source pixel: ``x' = (x + 0.5) s - 0.5 - x0``."""
        (sx, sy), (x0, y0) = self.scale, self.offset
        return np.array([[sx, 0, 0.5 * sx - 0.5 - x0], [0, sy, 0.5 * sy - 0.5 - y0], [0, 0, 1]], dtype=np.float64)

    def to_original(self, intrinsics: Array) -> Array:
        """[3, 3] K in network pixels -> [3, 3] float64 K in source pixels."""
        return np.asarray(np.linalg.inv(self.matrix()) @ np.asarray(intrinsics, dtype=np.float64))


@dataclass(frozen=True)
class Preparation:
    """How source frames become a network's images, where it is not as DUSt3R's do."""

    plan: Callable[[tuple[int, int], int | Literal["native"] | None], Crop]  # (width, height), image_size -> Crop
    cut: Callable[[Array, Crop], Array]  # [H, W, 3] uint8 -> [h, w, 3] uint8


@dataclass(frozen=True)
class Frames:
    """A clip on the patch grid, with the way back to the pixels and the clock of its source."""

    images: Array  # [n, H, W, 3] uint8 RGB, H and W multiples of the patch size
    timestamps: Array  # [n] float64 seconds
    crops: tuple[Crop, ...]  # one per frame
    names: tuple[str, ...]  # one per frame: file name, or 'frame 12' of a video or an array
    source: str  # the path as given, or 'array'
    boxes: tuple[Box, ...] | None = None  # where each image lies, if they are of unequal size on one canvas

    def valid_mask(self) -> Array:
        """[n, H, W] bool, False on padding."""
        return valid_pixels(self.images.shape[:3], self.boxes)

    @property
    def num_frames(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class AttentionMaps:
    """The four maps of the method and their product, one value per token, each [n, h, w] float32 in [0, 1].

    ``source``: how much the queries of other frames attend to this frame's tokens (decoder 1);
    ``reference``: the same when this frame is the pair's first view (decoder 2).
    ``std`` maps are 0 for a frame seen in fewer than two pairs, where no deviation exists.
    """

    source_mean: Array
    source_std: Array
    reference_mean: Array
    reference_std: Array
    dynamic_map: Array  # (1 - source_mean) source_std reference_mean (1 - reference_std), min-max per frame

    def arrays(self) -> dict[str, Array]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class PackedMasks:
    """Binary masks of large frames, one bit per pixel; frame i is ``masks[i]``, [h, w] bool, True = moves."""

    rows: tuple[Array, ...]  # each [h, ceil(w / 8)] uint8
    widths: tuple[int, ...]

    @classmethod
    def pack(cls, masks: Iterable[Array]) -> PackedMasks:
        """Of [h, w] bool masks, each of its own size."""
        rows, widths = [], []
        for mask in masks:
            rows.append(np.packbits(mask, axis=1))
            widths.append(mask.shape[1])
        return cls(tuple(rows), tuple(widths))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each."""
        return [(width, len(rows)) for rows, width in zip(self.rows, self.widths, strict=True)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Array:
        return np.unpackbits(self.rows[index], axis=1, count=self.widths[index]).astype(bool)

    def __iter__(self) -> Iterator[Array]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class GramMaps:
    """The five maps of VGGT4D and their product, one value per token, each [n, h, w] float32 in [0, 1].

    Products of queries (q) and keys (k) of a frame's tokens with those of frames a little before and after it, in some
    layers (counted from 0) of the attention among all frames; mean or standard deviation; min-max per frame.
    """

    qq_mean_3_7: Array
    qq_std_18_19: Array
    qq_mean_17_21: Array
    kk_mean_0: Array
    qk_std_0: Array
    # (1 - qq_mean_3_7) (1 - qq_std_18_19) qq_mean_17_21 (1 - kk_mean_0) qk_std_0, min-max per frame
    dynamic_map: Array

    def arrays(self) -> dict[str, Array]:
        """By name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


Maps = AttentionMaps | GramMaps


def maps_of(arrays: Mapping[str, Array]) -> Maps:
    """The maps of these names; ValueError where no method has such."""
    for kind in (AttentionMaps, GramMaps):
        if {field.name for field in fields(kind)} == set(arrays):
            return kind(**arrays)
    raise ValueError(f"the attention maps are {', '.join(sorted(arrays))}, which no method here has")


@dataclass(frozen=True)
class PointTracks:
    """Where t pixels of the first frame are in all n frames."""

    coordinates: Array  # [n, t, 2] float32 (x, y) in pixels of the network images
    visibility: Array  # [n, t] float32 in [0, 1]
    confidence: Array  # [n, t] float32 in [0, 1]


@dataclass(frozen=True)
class DynamicMasks:
    """Which pixels move: a score and its thresholded mask."""

    score: Array  # [n, H, W] float32 in [0, 1], clustered and upsampled
    mask: Array  # [n, H, W] bool, True = moves
    threshold: Threshold  # one for the whole clip, or one per frame; None when no threshold was needed
    original: PackedMasks | None = None  # masks that were given at the size of the source frames, as they were given

    def part(self, frames: range) -> DynamicMasks:
        """Of some consecutive frames, in the network's pixels."""
        some = slice(frames.start, frames.stop)
        threshold = self.threshold[some] if isinstance(self.threshold, tuple) else self.threshold
        return DynamicMasks(self.score[some], self.mask[some], threshold)

    def tokens(self, patch_size: int) -> Array:
        """[n, h, w] bool: a token is dynamic if any pixel of its patch is."""
        n, height, width = self.mask.shape
        patches = self.mask.reshape(n, height // patch_size, patch_size, width // patch_size, patch_size)
        return np.asarray(patches.any(axis=(2, 4)))


@dataclass(frozen=True)
class Instances:
    """The things that move, told apart: k ids from 1, the thing with most pixels first."""

    labels: Array  # [n, H, W] int32, 0 = static
    motion_score: Array  # [k] float32, of ids 1 to k: mean dynamic score of the thing's pixels
    seen: Array  # [k, n] bool, True = the frame shows the thing

    @classmethod
    def measured(cls, labels: Array, dynamic_score: Array) -> Instances:
        """From labels [n, H, W], whose ids leave none out, and scores [n, H, W]."""
        count = int(labels.max(initial=0)) + 1
        pixels = np.stack([np.bincount(frame.reshape(-1), minlength=count) for frame in labels])[:, 1:]
        sums = np.bincount(labels.reshape(-1), weights=dynamic_score.reshape(-1), minlength=count)[1:]
        return cls(labels, (sums / np.maximum(pixels.sum(axis=0), 1)).astype(np.float32), pixels.T > 0)

    def __len__(self) -> int:
        return len(self.motion_score)

    def summary(self) -> dict[str, list[float]]:
        """Of ids 1 to k, for ``meta``: motion score, first and last frame that shows the thing."""
        return {
            "motion_score": [round(float(score), 4) for score in self.motion_score],
            "first_frame": self.seen.argmax(axis=1).tolist(),
            "last_frame": (self.seen.shape[1] - 1 - self.seen[:, ::-1].argmax(axis=1)).tolist(),
        }

    def mask(self, number: int) -> Array:
        """[n, H, W] bool: where the thing of this id is."""
        return np.asarray(self.labels == number)


@dataclass(frozen=True)
class PairPredictions:
    """Pointmaps and confidences of every directed pair, both views in the first view's camera frame."""

    pairs: Array  # [P, 2] int64, (first, second) frame index
    points_first: torch.Tensor  # [P, H, W, 3] floating point; kept in half precision
    points_second: torch.Tensor  # [P, H, W, 3]
    confidence_first: torch.Tensor  # [P, H, W], >= 1
    confidence_second: torch.Tensor  # [P, H, W], >= 1


@dataclass(frozen=True)
class PairFlow:
    """Optical flow of every directed pair, in pixels of the network images."""

    pairs: Array  # [P, 2] int64
    flow: Array  # [P, H, W, 2] float32: pixel (x, y) of the first frame moves to (x, y) + flow in the second
    valid: Array  # [P, H, W] bool: forward and backward flow agree


@dataclass(frozen=True)
class Known:
    """What the user knows before anything is computed; None where nothing is, NaN where a frame or pixel is not."""

    intrinsics: Array | None = None  # [n, 3, 3] float64, pixels of the network images
    camera_to_world: Array | None = None  # [n, 4, 4] float64, OpenCV axes, the user's world and unit
    depth: Array | None = None  # [n, H, W] float64 z-depth, the user's unit

    def posed(self) -> Array:
        """[k] indices of the frames whose pose is known."""
        poses = np.full((0, 4, 4), np.nan) if self.camera_to_world is None else self.camera_to_world
        return np.flatnonzero(np.isfinite(poses).all(axis=(1, 2)))

    @property
    def poses_set_the_scale(self) -> bool:
        """Whether two of the known poses lie apart."""
        if self.camera_to_world is None or len(posed := self.posed()) < 2:
            return False
        return bool(np.ptp(self.camera_to_world[posed, :3, 3], axis=0).max() > 1e-9)

    @property
    def depth_sets_the_scale(self) -> bool:
        """Whether the depth of any pixel is known."""
        return self.depth is not None and bool(np.isfinite(self.depth).any())

    def part(self, frames: range) -> Known:
        """Of some consecutive frames."""
        some = slice(frames.start, frames.stop)
        return Known(*(None if values is None else values[some] for values in vars(self).values()))


@dataclass(frozen=True)
class AlignedCameras:
    """The alignment's answer: one world for all frames, frame 0 at the origin, up to one scale."""

    camera_to_world: Array  # [n, 4, 4] float32
    intrinsics: Array  # [n, 3, 3] float32, pixels of the network images
    depth: Array  # [n, H, W] float32 z-depth
    confidence: Array  # [n, H, W] float32, >= 1
