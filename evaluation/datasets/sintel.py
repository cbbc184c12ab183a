"""MPI-Sintel: rendered film with exact flow, depth and cameras (Butler et al. 2012), and from these what moves."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from easi3r.errors import InputError
from easi3r.geometry import induced_flow, invert_rigid
from easi3r.structures import Array
from evaluation.datasets.layout import Layout, check_rigid, choose, frame_shape, numbered, read_layers, reading
from evaluation.datasets.sequence import Sequence

FPS = 24.0  # of the film; the files do not say
TAG = 202021.25  # the first float32 of every file of numbers
MOTION_PX = 0.1
COARSE_MOTION_PX = 13.75
_UNKNOWN_FLOW = 1e9  # Middlebury's sign for a pixel without flow, and everything beyond

SEQUENCES = (
    *("alley_1", "alley_2", "ambush_2", "ambush_4", "ambush_5", "ambush_6", "ambush_7", "bamboo_1", "bamboo_2"),
    *("bandage_1", "bandage_2", "cave_2", "cave_4", "market_2", "market_5", "market_6", "mountain_1", "shaman_2"),
    *("shaman_3", "sleeping_1", "sleeping_2", "temple_2", "temple_3"),
)
POSE_SEQUENCES = (  # in the published tables of poses: the others' cameras stand still or only turn
    *("alley_2", "ambush_4", "ambush_5", "ambush_6", "cave_2", "cave_4", "market_2", "market_5", "market_6"),
    *("shaman_3", "sleeping_1", "sleeping_2", "temple_2", "temple_3"),
)


class Sintel(Layout):
    """``training/{final,clean,depth,camdata_left,flow}/SEQ/frame_0001.{png,png,dpt,cam,flo}``, one flow fewer.

    A pixel moves if its flow to the next frame is more than ``motion_px`` off the flow of depth and cameras; where
    either is not known it counts as still.  The last frame has no flow and so no mask.

    The variants name the rendering pass: "final" and "clean" have the masks of all 23 sequences at 0.1 px, those with
    "-13.75px" the same at 13.75 px; those with "-poses" are the 14 sequences of the published tables of poses and need
    no flow, so that they have no masks.  ``motion_px`` puts any other threshold in place of the variant's.
    """

    name: ClassVar[str] = "sintel"
    variants: ClassVar[tuple[str, ...]] = (
        *("final", "clean", "final-poses", "clean-poses"),
        *(f"final-{COARSE_MOTION_PX}px", f"clean-{COARSE_MOTION_PX}px"),
    )
    home: ClassVar[str] = "http://sintel.is.tue.mpg.de"

    def __init__(self, root: Path, variant: str | None = None, *, motion_px: float | None = None) -> None:
        super().__init__(root, variant)
        self.rendering, _, kind = self.variant.partition("-")
        self.has_masks = kind != "poses"
        self.motion_px = (COARSE_MOTION_PX if kind.endswith("px") else MOTION_PX) if motion_px is None else motion_px

    def names(self) -> list[str]:
        return list(SEQUENCES if self.has_masks else POSE_SEQUENCES)

    def files(self, name: str) -> Iterator[Path]:
        last = self._last(name)
        for number in range(1, last + 1):
            for part in (self.rendering, "depth", "camdata_left"):
                yield self._file(part, name, number)
            if self.has_masks and number < last:
                yield self._file("flow", name, number)

    def read(self, name: str, frames: slice) -> Sequence:
        """Depth and cameras of every frame, in metres; frame_0001 is at 0 s, the next one at 1 / 24 s."""
        last = self._last(name)
        chosen = choose(range(1, last + 1), frames, name)
        images = tuple(self._file(self.rendering, name, number) for number in chosen)
        shape = frame_shape(images)
        depth = read_layers([self._file("depth", name, number) for number in chosen], read_depth, shape)
        cameras = [read_camera(self._file("camdata_left", name, number)) for number in chosen]
        masks = has_mask = None
        if self.has_masks:
            has_mask = np.array(chosen) < last
            masks = np.zeros(depth.shape, dtype=bool)
            for i in np.flatnonzero(has_mask):
                (flow,) = read_layers([self._file("flow", name, chosen[i])], read_flow, (*shape, 2))
                after = read_camera(self._file("camdata_left", name, chosen[i] + 1))
                masks[i] = moves(flow, depth[i], cameras[i], after, self.motion_px)
        return Sequence(
            name,
            images,
            times_s=(np.array(chosen) - 1) / FPS,
            masks=masks,
            has_mask=has_mask,
            camera_to_world=np.stack([np.linalg.inv(world_to_camera) for _, world_to_camera in cameras]),
            intrinsics=np.stack([intrinsics for intrinsics, _ in cameras]),
            depth=depth,
        )

    def _file(self, part: str, name: str, number: int) -> Path:
        suffix = {"depth": "dpt", "camdata_left": "cam", "flow": "flo"}.get(part, "png")
        return self.root / "training" / part / name / f"frame_{number:04}.{suffix}"

    def _last(self, name: str) -> int:
        """The number of frames, by whichever of images, depths and cameras goes furthest; at least 1."""
        parts = (self.rendering, "depth", "camdata_left")
        first = [self._file(part, name, 1) for part in parts]
        return max(1, *(numbered(path.parent, "frame_", path.suffix) for path in first))


def moves(
    flow: Array, depth: Array, camera: tuple[Array, Array], after: tuple[Array, Array], motion_px: float
) -> Array:
    """[H, W] bool: the flow [H, W, 2] is farther than ``motion_px`` from that of a still point at the depth [H, W].

    ``camera`` and ``after``, of this frame and the next: K [3, 3] in pixels and world-to-camera [4, 4].  A pixel with
    NaN for its flow or depth, or whose still point would come to lie behind the next camera, does not move.
    """
    (intrinsics, world_to_camera), (next_intrinsics, world_to_next) = camera, after
    poses = invert_rigid(world_to_camera), invert_rigid(world_to_next)
    still = induced_flow(depth, intrinsics, next_intrinsics, *poses)
    return np.asarray(np.linalg.norm(flow - still, axis=2) > motion_px)


def read_flow(path: Path) -> Array:
    """.flo -> [H, W, 2] float32 pixels to the next frame, NaN where it is not known."""
    flow = _read_raster(path, channels=2)
    known = (np.abs(flow) < _UNKNOWN_FLOW).all(axis=2, keepdims=True)
    return np.where(known, flow, np.float32(np.nan))


def read_depth(path: Path) -> Array:
    """.dpt -> [H, W] float32 metres along z, NaN where it is not known."""
    depth = _read_raster(path, channels=1)[..., 0]
    return np.where(np.isfinite(depth) & (depth > 0), depth, np.float32(np.nan))


def read_camera(path: Path) -> tuple[Array, Array]:
    """.cam -> K [3, 3] float64, the centre of the top-left pixel at (0, 0), and world-to-camera [4, 4] float64."""
    data = _read_tagged(path)
    if len(data) != 8 * 21:
        raise _wrong_length(path, len(data), 8 * 21)
    numbers = np.frombuffer(data, dtype="<f8")
    intrinsics = numbers[:9].reshape(3, 3).copy()
    if not np.isfinite(intrinsics).all() or min(intrinsics[0, 0], intrinsics[1, 1]) <= 0:
        raise InputError(f"The focal length in {path} is not above 0; expected Sintel's K in pixels, so get it anew.")
    return intrinsics, check_rigid(numbers[9:].reshape(3, 4), path)


def _read_raster(path: Path, channels: int) -> Array:
    """[H, W, channels] float32 after the tag, the width and the height."""
    data = _read_tagged(path)
    if len(data) < 8:
        raise _wrong_length(path, len(data), 8)
    width, height = struct.unpack_from("<ii", data)
    expected = 8 + 4 * channels * width * height
    if min(width, height) <= 0 or len(data) != expected:
        raise _wrong_length(path, len(data), expected)
    return np.frombuffer(data, dtype="<f4", offset=8).reshape(height, width, channels).astype(np.float32)


def _read_tagged(path: Path) -> bytes:
    """What follows the tag."""
    with reading(path, "file of Sintel"):
        data = path.read_bytes()
        (tag,) = struct.unpack_from("<f", data)
    if tag != TAG:
        raise InputError(f"{path} begins with {tag:g}; expected Sintel's tag {TAG}, little-endian, so get it anew.")
    return data[4:]


def _wrong_length(path: Path, length: int, expected: int) -> InputError:
    return InputError(
        f"{path} holds {length} bytes after its tag; expected {expected} by what it says of itself, so get it anew."
    )
