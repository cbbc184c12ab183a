"""One binary glTF 2.0 file: the static points, one node per time step, cameras, and an animation.

Written after the specification.  A root node turns the scene's world (y down in the first frame) into glTF's (y up);
below it every coordinate is the scene's.  glTF has no frame-by-frame visibility: the animation scales each time step to
0 but for its turn, which the specification names for that purpose.  Without playback all of them are seen.
Colours are stored as they are, sRGB: viewers that take the colours of vertices as linear show them paler.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from easi3r._version import __version__
from easi3r.export.clouds import budgeted_clouds, merge, select
from easi3r.export.options import ExportOptions
from easi3r.export.views import frame_name

if TYPE_CHECKING:
    from easi3r.scene import PointCloud, Scene
    from easi3r.structures import Array

FILES = {"scene.glb": "nodes: static, frame_00000 and so on (what moves then), camera_00000 and so on; animation: play"}
MAX_POINTS = 1_000_000  # the default budget: what browsers show without a stutter
FRUSTUM_DEPTH = 0.1  # of the scene's median depth
GLTF_FROM_WORLD = [1.0, 0.0, 0.0, 0.0]  # quaternion x y z w: half a turn about x
CAMERA_FROM_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])  # glTF's cameras look along -z, y up
FLOAT, UNSIGNED_INT, UNSIGNED_BYTE = 5126, 5125, 5121
POINTS, LINES = 0, 1
CODES = {"f": FLOAT, "I": UNSIGNED_INT, "B": UNSIGNED_BYTE}


def write(scene: Scene, folder: Path, options: ExportOptions) -> None:
    """Fill ``folder``; see ``FILES``."""
    clouds = budgeted_clouds(scene, options, MAX_POINTS)
    document = _Document()
    root = document.node("scene", rotation=GLTF_FROM_WORLD, children=[])
    children = document.nodes[root]["children"]
    keep = options.keep or scene.keep
    if keep != "dynamic":
        still = merge([select(cloud, ~cloud.dynamic) for cloud in clouds])
        children.append(document.node("static", **document.points("static", still)))
    if keep != "static":
        steps = []
        for i, cloud in enumerate(clouds):
            moving = select(cloud, cloud.dynamic)
            steps.append(document.node(frame_name(i), **document.points(frame_name(i), moving)))
        children += steps
        document.play(steps, _start_times(scene))
    children += _add_cameras(document, scene)
    (folder / "scene.glb").write_bytes(document.binary())


class _Document:
    """A glTF document with one scene, whose first node is the root, and one buffer."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.lists: dict[str, list[dict[str, Any]]] = {}
        self.buffer = bytearray()

    def add(self, kind: str, **entry: Any) -> int:
        """Append to one of the document's lists; returns the index that others refer to it by."""
        entries = self.lists.setdefault(kind, [])
        entries.append(entry)
        return len(entries) - 1

    def node(self, name: str, **entry: Any) -> int:
        self.nodes.append({"name": name} | entry)
        return len(self.nodes) - 1

    def accessor(self, values: Array, kind: Literal["SCALAR", "VEC3", "VEC4"], **extra: Any) -> int:
        """Append to the buffer; elements are of whole 4 bytes, as the specification asks."""
        assert values.itemsize * (values.shape[1] if values.ndim > 1 else 1) % 4 == 0
        view = self.add("bufferViews", buffer=0, byteOffset=len(self.buffer), byteLength=values.nbytes)
        self.buffer += np.ascontiguousarray(values).tobytes()
        code = CODES[values.dtype.char]
        return self.add("accessors", bufferView=view, componentType=code, count=len(values), type=kind, **extra)

    def positions(self, values: Array) -> int:
        """[m, 3] float32, with the bounds that the specification asks for."""
        return self.accessor(values, "VEC3", min=values.min(0).tolist(), max=values.max(0).tolist())

    def points(self, name: str, cloud: PointCloud) -> dict[str, int]:
        """The part of a node that shows a cloud: nothing if it is empty, for glTF knows no empty meshes."""
        if not len(cloud.points):
            return {}
        opaque = np.full((len(cloud.colors), 1), 255, dtype=np.uint8)
        colors = self.accessor(np.hstack([cloud.colors, opaque]), "VEC4", normalized=True)
        attributes = {"POSITION": self.positions(cloud.points), "COLOR_0": colors}
        return {"mesh": self.add("meshes", name=name, primitives=[{"mode": POINTS, "attributes": attributes}])}

    def play(self, steps: list[int], start_times: Array) -> None:
        """An animation that scales each node of ``steps`` to 1 from its start time to the next one, and to 0 else."""
        if len(steps) < 2:
            return
        channels, samplers = [], []
        for i, node in enumerate(steps):
            times, scales = [start_times[i], start_times[i + 1]], [1.0, 0.0 if i + 1 < len(steps) else 1.0]
            if i > 0:
                times, scales = [0.0, *times], [0.0, *scales]
            seconds = np.array(times, dtype=np.float32)
            keys = self.accessor(seconds, "SCALAR", min=[float(seconds[0])], max=[float(seconds[-1])])
            values = self.accessor(np.tile(np.array(scales, dtype=np.float32)[:, None], (1, 3)), "VEC3")
            samplers.append({"input": keys, "output": values, "interpolation": "STEP"})
            channels.append({"sampler": i, "target": {"node": node, "path": "scale"}})
        self.add("animations", name="play", channels=channels, samplers=samplers)

    def binary(self) -> bytes:
        """The file: header, JSON chunk, binary chunk."""
        document: dict[str, Any] = {
            "asset": {"version": "2.0", "generator": f"easi3r {__version__}"},
            "scene": 0,
            "scenes": [{"nodes": [0]}],
            "nodes": self.nodes,
            "buffers": [{"byteLength": len(self.buffer)}],
        }
        text = json.dumps(document | self.lists, separators=(",", ":"), allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
        chunks += struct.pack("<II", len(self.buffer), 0x004E4942) + self.buffer
        return struct.pack("<III", 0x46546C67, 2, 12 + len(chunks)) + chunks


def _start_times(scene: Scene) -> Array:
    """[n + 1] float64 seconds from 0: when each frame begins, and the end; frames without a clock last a second."""
    times = scene.timestamps - scene.timestamps[0]
    steps = np.diff(times)
    if not (steps > 1e-4).all():
        return np.arange(scene.num_frames + 1, dtype=np.float64)
    return np.append(times, times[-1] + (np.median(steps) if len(steps) else 1.0))


def _add_cameras(document: _Document, scene: Scene) -> list[int]:
    """One node per frame: its pyramid of view as lines, and below it a camera (which knows no principal point)."""
    height, width = scene.images.shape[1:3]
    known = scene.depth[scene.valid_mask]
    depth = FRUSTUM_DEPTH * float(np.median(known)) if known.size else 1.0
    poses = scene.camera_to_world.astype(np.float64) @ CAMERA_FROM_OPENCV
    edges = np.array([(0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (2, 3), (3, 4), (4, 1)], dtype=np.uint32).ravel()
    pyramids: dict[bytes, tuple[int, int]] = {}
    nodes = []
    for i, intrinsics in enumerate(scene.intrinsics.astype(np.float64)):
        if (key := intrinsics.tobytes()) not in pyramids:
            corners = _corners(intrinsics, width, height) * depth
            corner_points = np.vstack([np.zeros(3), corners]).astype(np.float32)
            primitive = {
                "mode": LINES,
                "attributes": {"POSITION": document.positions(corner_points)},
                "indices": document.accessor(edges, "SCALAR"),
            }
            lens = {
                "yfov": 2 * float(np.arctan(height / 2 / intrinsics[1, 1])),
                "aspectRatio": width * intrinsics[1, 1] / (height * intrinsics[0, 0]),
                "znear": depth / 100,
            }
            mesh = document.add("meshes", name="camera", primitives=[primitive])
            pyramids[key] = mesh, document.add("cameras", type="perspective", perspective=lens)
        mesh, camera = pyramids[key]
        view = document.node(f"view_{i:05d}", camera=camera)
        matrix = poses[i].T.ravel().tolist()
        nodes.append(document.node(f"camera_{i:05d}", matrix=matrix, mesh=mesh, children=[view]))
    return nodes


def _corners(intrinsics: Array, width: int, height: int) -> Array:
    """[4, 3] the image's corners at depth 1 in glTF's camera axes."""
    pixels = np.array([(0, 0), (width, 0), (width, height), (0, height)]) - 0.5
    rays = (pixels - intrinsics[:2, 2]) / intrinsics[[0, 1], [0, 1]]
    return np.column_stack([rays, np.ones(4)]) @ CAMERA_FROM_OPENCV[:3, :3]
