"""Results: ``Motion`` (what moves) and ``Scene`` (the 4D reconstruction), saved and loaded without torch."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

import imageio.v3 as iio
import numpy as np
from scipy.spatial.transform import Rotation

from easi3r.errors import InputError, OutputError
from easi3r.geometry import depth_edges, transform, unproject
from easi3r.mask_files import MEANINGS, write_png
from easi3r.saved_files import read_arrays, read_layers, read_masks
from easi3r.saved_meta import check_meta
from easi3r.storage import MARKER, whole_folder
from easi3r.structures import Array, Crop, Instances, Maps, PackedMasks, PointTracks, maps_of
from easi3r.untrusted import check_inside, read_bytes

if TYPE_CHECKING:
    from easi3r.original_masks import OriginalMask
    from easi3r.viewer.live import Viewer

Keep = Literal["all", "static", "dynamic"]
FORMAT_VERSION = 1
MAX_HEADER = 1 << 28  # bytes of scene.json: names and crops of a million frames

MOTION_CONVENTIONS = {
    "images": "PNG, RGB: the frames as the network saw them; meta.crops says how each source frame was resized and cut",
    "pixels": "the centre of the top-left pixel is (0, 0)",
    "dynamic_mask": "PNG: 255 = moves, 0 = static",
    "given_mask": "PNG, 255 = moves: masks that were given at the size of the source frames, as they were given",
    "dynamic_score": "0 to 1, higher moves more",
    "instances": "PNG of 16 bits: 0 = static, else which thing it is, the largest is 1; no such folder: not asked for",
    "attention.npz": "attention maps, named after the network's method, and dynamic_map, their product: [frames, h, w] "
    "tokens, 0..1",
    "timestamps": "seconds on the source's clock",
    "report.html": "this result for people: open it in a browser",
}
SCENE_CONVENTIONS = MOTION_CONVENTIONS | {
    "camera_to_world": "4x4, moves camera-frame points into the world; OpenCV axes: x right, y down, z forward",
    "world": "the first frame's camera is the origin",
    "intrinsics": "3x3 K, u = fx X / Z + cx, in pixels of images/ (original_intrinsics: of the source frames)",
    "cameras.npz": "camera_to_world, intrinsics, original_intrinsics, timestamps: one row per frame",
    "depth": "z-depth, not distance; one scale for the whole scene (meta.scale)",
    "confidence": "1 or more, higher is better; no unit",
    "valid_mask": "PNG: 0 = padding of images of unequal size; no such folder: there is no padding",
    "tracks.npz": "if asked for: where pixels of the first frame are: coordinates [frames, tracks, 2] (x, y) in pixels "
    "of images/, visibility and confidence [frames, tracks], 0..1",
    "trajectory.txt": "TUM: timestamp tx ty tz qx qy qz qw, camera-to-world, seconds",
}


class PointCloud(NamedTuple):
    """World points with what is known of each; m rows."""

    points: Array  # [m, 3] float32, world frame, in the scene's unit
    colors: Array  # [m, 3] uint8 RGB
    frame_index: Array  # [m] int32
    dynamic: Array  # [m] bool, True = moves


@dataclass
class Motion:
    """What moves in a clip of n frames, H x W pixels."""

    kind: ClassVar[str] = "motion"
    conventions: ClassVar[dict[str, str]] = MOTION_CONVENTIONS

    images: Array  # [n, H, W, 3] uint8 RGB, as the network saw them
    dynamic_score: Array  # [n, H, W] float32 in [0, 1]
    dynamic_mask: Array  # [n, H, W] bool, True = moves
    attention: Maps
    timestamps: Array  # [n] float64 seconds
    meta: dict[str, Any]
    instances: Instances | None = field(default=None, kw_only=True)  # the things that move, told apart
    given_masks: PackedMasks | None = field(default=None, kw_only=True)  # as they were given, at the source's size

    @property
    def keep(self) -> Keep:
        """Which points the scene was reconstructed for: what ``points``, exports and the viewer show unless told."""
        keep: Keep = self.meta.get("settings", {}).get("keep", "all")  # absent in what older versions saved
        return keep

    @property
    def num_frames(self) -> int:
        """How many frames there are."""
        return len(self.images)

    def original_masks(self, images: Iterable[Array] | None = None) -> Iterator[OriginalMask]:
        """(mask, score, origin) of frame after frame at the size of the source frames; see ``easi3r.original_masks``.

        images: the source frames, each [h, w, 3] uint8 RGB; None: they are read again from where they came from.
        """
        from easi3r.original_masks import original_masks

        return original_masks(self, images)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder, whole or not at all, and return its absolute path.

        An existing folder is refused with OutputError; ``overwrite`` replaces one that holds our scene.json.
        """
        with whole_folder(path, overwrite=overwrite) as folder:
            self._write(folder)
        from easi3r.report import write_report

        write_report(self, path)  # once the result is in its place, which a report that fails must not cost
        return Path(path).absolute()

    @classmethod
    def load(cls: type[M], path: str | Path) -> M:
        """Read a saved folder; OutputError if there is none, or if it is damaged or of another kind."""
        folder = Path(path)
        if not (folder / MARKER).is_file():
            raise OutputError(f"There is no saved result at {path}; expected a folder with {MARKER}.")
        try:
            check_inside(folder / MARKER, folder)
            header = json.loads(read_bytes(folder / MARKER, MAX_HEADER), parse_constant=_refuse_constant)
            kind, version, meta = header["kind"], int(header["format_version"]), header["meta"]
            if not isinstance(kind, str) or not isinstance(meta, dict):
                raise ValueError("kind is no text, or meta no table")
            if kind == cls.kind and version <= FORMAT_VERSION:
                result = cls(**cls._read(folder, header["num_frames"]), meta=meta)
                result._check_shapes()
                result._check_values()
                check_meta(meta, result.num_frames)
                return result
        except Exception as error:  # damaged files make the readers of JSON, npz, npy and PNG raise a dozen types
            reason = " ".join(str(error).split())[:160]
            raise OutputError(
                f"The saved result at {path} is damaged ({type(error).__name__}: {reason}); make it again."
            ) from error
        if kind not in (Motion.kind, Scene.kind) or version > FORMAT_VERSION:
            raise OutputError(
                f"{path} holds a {kind[:40]!r} of format {version}, which needs a newer easi3r; upgrade it."
            )
        raise OutputError(f"{path} holds a saved {kind}, not a {cls.kind}; load it with {kind.title()}.load.")

    def export(self, path: str | Path, format: str, **options: Any) -> Path:
        """Write the result for another program, whole or not at all, and return the absolute path.

        format: one of ``easi3r.export.FORMATS``: colmap, nerfstudio, ply, glb, npz, tum, monst3r, depth-png, depth-exr,
            masks (which alone needs no cameras and depth).
        path: becomes a folder; in formats that are one file, a path with that file's suffix becomes the file itself.
        options: the fields of ``easi3r.export.ExportOptions``, such as ``keep``, ``max_points`` and ``overwrite``.

        Raises InputError for unknown formats and options, OutputError where nothing can be written.
        """
        from easi3r.export import ExportOptions, export_scene

        return export_scene(self, path, format, ExportOptions.from_keywords(options))

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """What every array must look like, given the images."""
        pixels = self.images.shape[:3]
        return {"images": (*pixels, 3), "dynamic_score": pixels, "dynamic_mask": pixels, "timestamps": pixels[:1]}

    def _check_shapes(self) -> None:
        for name, expected in self._shapes().items():
            if (found := getattr(self, name).shape) != expected:
                raise ValueError(f"{name} is {list(found)} where {list(expected)} was expected")

    def _check_values(self) -> None:
        """What would make programs that read this fail later; numbers of pixels may be anything."""
        if self.images.dtype != np.uint8 or not np.isfinite(self.timestamps).all():
            raise ValueError("its images are no uint8, or its timestamps not finite")
        if len(shapes := {values.shape for values in self.attention.arrays().values()}) != 1:
            raise ValueError(f"its attention maps are of the shapes {sorted(shapes)}")
        if (shape := shapes.pop())[:1] != self.images.shape[:1] or len(shape) != 3 or 0 in shape:
            raise ValueError(f"its attention maps are of the shape {list(shape)}")

    def _write(self, folder: Path) -> None:
        header = {
            "kind": self.kind,
            "format_version": FORMAT_VERSION,
            "num_frames": self.num_frames,
            "conventions": self.conventions,
            "meta": self.meta,
        }
        try:
            text = json.dumps(header, indent=1, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise OutputError(f"meta cannot be saved as JSON ({error}); expected plain, finite values.") from error
        (folder / MARKER).write_text(text, encoding="utf-8")
        arrays: dict[str, Any] = self.attention.arrays()
        np.savez(folder / "attention.npz", **arrays)
        _write_frames(folder / "images", self.images)
        _write_masks(folder / "dynamic_mask", self.dynamic_mask, MEANINGS["moving"])
        if self.given_masks is not None:
            _write_masks(folder / "given_mask", self.given_masks, MEANINGS["moving"])
        _write_frames(folder / "dynamic_score", self.dynamic_score)
        if self.instances is not None:
            _write_frames(folder / "instances", self.instances.labels.astype(np.uint16))
        if type(self) is Motion:
            np.savez(folder / "timestamps.npz", timestamps=self.timestamps)

    @classmethod
    def _read(cls, folder: Path, num_frames: int) -> dict[str, Any]:
        # first what is as large as its file: it says how large the pictures may be that are small files
        score = read_layers(folder / "dynamic_score", num_frames)
        size = score.shape[1:]
        values: dict[str, Any] = {
            "images": read_layers(folder / "images", num_frames, size),
            "dynamic_mask": read_layers(folder / "dynamic_mask", num_frames, size) > 127,
            "dynamic_score": score,
            "attention": maps_of(read_arrays(folder / "attention.npz")),
        }
        if (folder / "instances").is_dir():
            labels = read_layers(folder / "instances", num_frames, size, ("I;16", "I")).astype(np.int32)
            values["instances"] = Instances.measured(labels, values["dynamic_score"])
        if (folder / "given_mask").is_dir():
            values["given_masks"] = PackedMasks.pack(read_masks(folder / "given_mask", num_frames))
        if cls is Motion:
            values |= read_arrays(folder / "timestamps.npz", ["timestamps"])
        return values


def load_result(path: str | Path) -> Motion:
    """Read a saved folder of either kind, a Scene where there is one; OutputError as ``Motion.load`` has it."""
    try:
        kind = json.loads((Path(path) / MARKER).read_text(encoding="utf-8"))["kind"]
    except (OSError, ValueError, KeyError, TypeError):  # load says what is wrong
        kind = None
    return (Motion if kind == Motion.kind else Scene).load(path)


M = TypeVar("M", bound=Motion)


@dataclass
class Scene(Motion):
    """A 4D scene: ``Motion``, with cameras and depth.  Unprojecting ``depth`` *is* the point cloud."""

    kind: ClassVar[str] = "scene"
    conventions: ClassVar[dict[str, str]] = SCENE_CONVENTIONS

    camera_to_world: Array  # [n, 4, 4] float32, OpenCV axes, frame 0 is the origin
    intrinsics: Array  # [n, 3, 3] float32, in pixels of ``images``
    depth: Array  # [n, H, W] float32 z-depth, up to one scale (see meta["scale"])
    confidence: Array  # [n, H, W] float32, >= 1
    valid_mask: Array  # [n, H, W] bool, False on padding
    tracks: PointTracks | None = None  # of pixels of the first frame, if they were asked for

    @property
    def original_intrinsics(self) -> Array:
        """[n, 3, 3] float32: K in pixels of the source frames, before resizing and cropping.

        Raises InputError where ``meta["crops"]`` does not say how.
        """
        if len(self.meta.get("crops") or ()) != self.num_frames:
            raise InputError(
                "meta['crops'] does not say how each source frame was cut, so their intrinsics are unknown."
            )
        crops = [Crop(**{name: tuple(size) for name, size in crop.items()}) for crop in self.meta["crops"]]
        return np.stack([crop.to_original(k) for crop, k in zip(crops, self.intrinsics, strict=True)]).astype(
            np.float32
        )

    def points(
        self,
        frames: Sequence[int] | None = None,
        keep: Keep | None = None,
        min_confidence: float = 1.0,
        *,
        edges: bool = True,
    ) -> PointCloud:
        """World points with colours, frame after frame, row-major within a frame.

        frames: indices (negative ones count from the end); None = all.
        keep: all pixels, or those that ``dynamic_mask`` calls static or dynamic; None: as it was reconstructed for.
        min_confidence: pixels below are left out; 1 keeps everything.  Padding is always left out.
        edges: False leaves out pixels on depth edges, where floaters arise; exports do.
        """
        keep = self.keep if keep is None else keep
        if keep not in ("all", "static", "dynamic"):
            raise InputError(f"keep is {keep!r}; expected 'all', 'static' or 'dynamic'.")
        index = self._frame_indices(frames)
        chosen = self.valid_mask[index] & (self.confidence[index] >= min_confidence)
        if keep != "all":
            chosen &= self.dynamic_mask[index] == (keep == "dynamic")
        if not edges:
            chosen &= ~depth_edges(self.depth[index])
        camera_points = unproject(self.depth[index].astype(np.float64), self.intrinsics[index].astype(np.float64))
        world = transform(camera_points, self.camera_to_world[index].astype(np.float64))
        frame_index = np.broadcast_to(index[:, None, None], chosen.shape)
        return PointCloud(
            points=world[chosen].astype(np.float32),
            colors=self.images[index][chosen],
            frame_index=frame_index[chosen].astype(np.int32),
            dynamic=self.dynamic_mask[index][chosen],
        )

    def _frame_indices(self, frames: Sequence[int] | None) -> Array:
        """[k] in [0, num_frames)."""
        n = self.num_frames
        if frames is None:
            return np.arange(n)
        index = np.atleast_1d(np.asarray(frames, dtype=None if np.size(frames) else np.int64))
        if index.ndim != 1 or index.dtype.kind not in "iu" or not np.isin(index, range(-n, n)).all():
            raise InputError(
                f"frames is {reprlib.repr(frames)}; expected whole numbers from {-n} to {n - 1}, since the scene has "
                f"{n} frames."
            )
        return index % n

    def trajectory(self) -> Array:
        """[n, 8] float64 in TUM's order: timestamp tx ty tz qx qy qz qw, camera-to-world."""
        quaternions = Rotation.from_matrix(self.camera_to_world[:, :3, :3].astype(np.float64)).as_quat()
        return np.column_stack([self.timestamps, self.camera_to_world[:, :3, 3], quaternions])

    def show(self, *, host: str = "127.0.0.1", port: int = 8080) -> Viewer:
        """Serve the scene to browsers until the viewer is closed (extra viewer); scripts call ``.wait()`` on it.

        host: 127.0.0.1 is this machine alone; 0.0.0.0 everybody who can reach it.  port: the next free one if it is in
        use.  Raises MissingExtraError without viser, InputError for an address that cannot be listened on.
        """
        from easi3r.viewer.live import Viewer

        return Viewer(self, host=host, port=port)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        pixels = self.images.shape[:3]
        cameras = {"camera_to_world": (*pixels[:1], 4, 4), "intrinsics": (*pixels[:1], 3, 3)}
        return super()._shapes() | cameras | dict.fromkeys(("depth", "confidence", "valid_mask"), pixels)

    def _check_values(self) -> None:
        super()._check_values()
        rotation, focal = self.camera_to_world[:, :3, :3], self.intrinsics[:, [0, 1], [0, 1]]
        if not (np.isfinite(self.camera_to_world).all() and np.isfinite(self.intrinsics).all() and (focal > 0).all()):
            raise ValueError("its cameras are not finite, or a focal length is not above 0")
        if (
            np.abs(rotation @ np.swapaxes(rotation, 1, 2) - np.eye(3)).max() > 0.01
            or (np.linalg.det(rotation) < 0).any()
        ):
            raise ValueError("a rotation of its cameras is none")

    def _write(self, folder: Path) -> None:
        super()._write(folder)
        np.savez(
            folder / "cameras.npz",
            camera_to_world=self.camera_to_world,
            intrinsics=self.intrinsics,
            original_intrinsics=self.original_intrinsics,
            timestamps=self.timestamps,
        )
        np.savetxt(folder / "trajectory.txt", self.trajectory(), fmt="%.9f")
        _write_frames(folder / "depth", self.depth)
        _write_frames(folder / "confidence", self.confidence)
        if self.tracks is not None:
            tracks: dict[str, Any] = vars(self.tracks)
            np.savez(folder / "tracks.npz", **tracks)
        if not self.valid_mask.all():
            _write_masks(folder / "valid_mask", self.valid_mask, "255 = part of the image, 0 = padding")

    @classmethod
    def _read(cls, folder: Path, num_frames: int) -> dict[str, Any]:
        values = super()._read(folder, num_frames)
        values |= read_arrays(folder / "cameras.npz", ["camera_to_world", "intrinsics", "timestamps"])
        values |= {name: read_layers(folder / name, num_frames) for name in ("depth", "confidence")}
        padded = (folder / "valid_mask").is_dir()
        values["valid_mask"] = (
            read_layers(folder / "valid_mask", num_frames, values["depth"].shape[1:]) > 127
            if padded
            else np.ones(values["depth"].shape, dtype=bool)
        )
        if (folder / "tracks.npz").is_file():
            values["tracks"] = PointTracks(
                **read_arrays(folder / "tracks.npz", ["coordinates", "visibility", "confidence"])
            )
        return values


def _write_frames(folder: Path, frames: Array) -> None:
    """One file per frame: PNG for uint8 and uint16, npy otherwise (lossless all)."""
    folder.mkdir()
    for i, frame in enumerate(frames):
        if frame.dtype in (np.uint8, np.uint16):
            iio.imwrite(folder / f"frame_{i:05d}.png", frame)
        else:
            np.save(folder / f"frame_{i:05d}.npy", frame)


def _write_masks(folder: Path, masks: Iterable[Array], meaning: str) -> None:
    folder.mkdir()
    for i, mask in enumerate(masks):
        write_png(folder / f"frame_{i:05d}.png", mask.astype(np.uint8) * 255, meaning)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
