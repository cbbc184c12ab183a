"""One self-contained page that plays a scene: no server, no outside address, no library, only WebGL."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image

from easi3r.progress import Progress, silent
from easi3r.storage import whole_file
from easi3r.viewer.cameras import frame_rate
from easi3r.viewer.shown import FRUSTUM_DEPTH, ShownPoints, shown_points

if TYPE_CHECKING:
    from easi3r.scene import Keep, Scene
    from easi3r.structures import Array

MAX_POINTS = 2_000_000  # 37 MB
THUMBNAIL_SIDE = 256  # pixels, the longer side of the images in the frusta
# One point as WebGL reads it: position in the box in 65535ths, then bytes.
POINT = np.dtype(
    [
        ("position", "<u2", 3),
        ("color", "u1", 3),
        ("confidence_rank", "u1"),
        ("score", "u1"),  # 255ths
        ("time", "u1"),  # 0 = first frame, 255 = last
        ("size", "u1"),  # 16 (8 + log2 of the size over the scene's typical one)
        ("padding", "u1"),
    ]
)


def write_player(
    scene: Scene,
    path: str | Path,
    *,
    max_points: int = MAX_POINTS,
    keep: Keep | None = None,
    progress: Progress = silent,
) -> Path:
    """Write the page and return its absolute path; OutputError where it cannot be written."""
    page = player_page(scene, max_points=max_points, keep=keep, progress=progress)
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")  # names of files that are no UTF-8
    return Path(path).absolute()


def player_page(
    scene: Scene, *, max_points: int = MAX_POINTS, keep: Keep | None = None, progress: Progress = silent
) -> str:
    """The page as text.  It says how many of the scene's points it holds, and heeds what follows # in its address.

    ``#frame=3&paused&view=0&panel=off`` shows frame 3, does not play, looks through the recovered camera of frame 0
    (``follow``: of the frame that is shown), and hides the controls.
    keep: all points, or the static or moving ones; None: as the scene was made for.
    """
    shown = shown_points(scene, max_points, keep=keep, progress=progress)
    low, step = quantisation_box(shown.points)
    typical = float(np.median(shown.size)) if len(shown.size) else 1.0
    height, width = scene.images.shape[1:3]
    header: dict[str, Any] = {
        "source": str(scene.meta.get("source", "scene")),
        "summary": shown.summary,
        "count": len(shown.points),
        "starts": shown.starts.tolist(),
        "low": low.tolist(),
        "step": step.tolist(),
        "size": typical,
        "depth": shown.depth,
        "frustumDepth": FRUSTUM_DEPTH * shown.depth,
        "width": width,
        "height": height,
        "rate": frame_rate(scene.timestamps),
        "seconds": (scene.timestamps - scene.timestamps[0]).tolist(),
        "cameraToWorld": [pose.ravel().tolist() for pose in scene.camera_to_world.astype(np.float64)],
        "intrinsics": [k.ravel().tolist() for k in scene.intrinsics.astype(np.float64)],
        "images": [_thumbnail(image) for image in scene.images],
    }
    template = resources.files("easi3r.viewer").joinpath("player.html").read_text(encoding="utf-8")
    # in a script element '</' alone would end it, and inside JSON's strings '\/' is the same as '/'
    scene_text = json.dumps(header, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    packed = base64.b64encode(pack_points(shown, low, step, typical).tobytes()).decode("ascii")
    parts = {"TITLE": html.escape(header["source"]), "SCENE": scene_text, "POINTS": packed}
    before, *pieces = template.split("@@")  # @@NAME@@
    page = [before]
    for name, text in zip(pieces[::2], pieces[1::2], strict=True):
        page += [parts[name], text]
    return "".join(page)


def quantisation_box(points: Array) -> tuple[Array, Array]:
    """[m, 3] -> lowest corner and step, [3] float64, of a grid of 65536 positions per axis that holds them all."""
    if not len(points):
        return np.zeros(3), np.ones(3)
    low, high = points.min(axis=0).astype(np.float64), points.max(axis=0).astype(np.float64)
    return low, np.where(high > low, (high - low) / 65535, 1.0)


def pack_points(shown: ShownPoints, low: Array, step: Array, typical_size: float) -> Array:
    """[m] records of type ``POINT``; positions are off by half a step at most."""
    packed = np.zeros(len(shown.points), dtype=POINT)
    for axis in range(3):
        packed["position"][:, axis] = np.rint((shown.points[:, axis].astype(np.float64) - low[axis]) / step[axis])
    packed["color"], packed["confidence_rank"] = shown.colors, shown.confidence_rank
    packed["score"] = np.rint(255 * np.clip(shown.score, 0, 1))
    packed["time"] = np.rint(255 * (shown.frame_index / max(1, len(shown.starts) - 2)))
    packed["size"] = np.rint(np.clip(16 * (8 + np.log2(np.maximum(shown.size / typical_size, 1e-6))), 0, 255))
    return packed


def _thumbnail(image: Array) -> str:
    """[H, W, 3] uint8 -> base64 of a JPEG, no larger than THUMBNAIL_SIDE."""
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    file = io.BytesIO()
    Image.fromarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA)).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode("ascii")
