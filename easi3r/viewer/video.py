"""Videos without a display: a rendering of the scene, and the clip with its masks.

Written by PyAV where it is installed (H.264, which every browser plays), else by OpenCV (MPEG-4).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from easi3r.decoding import find_av
from easi3r.errors import InputError, OutputError
from easi3r.progress import Progress, silent
from easi3r.storage import whole_file
from easi3r.viewer.cameras import frame_rate, orbit_shots, path_shots, recovered_views
from easi3r.viewer.shown import shown_points
from easi3r.viewer.splatting import fill_holes, splat

if TYPE_CHECKING:
    from easi3r.scene import Keep, Motion, Scene
    from easi3r.structures import Array
    from easi3r.viewer.cameras import Shot
    from easi3r.viewer.shown import ShownPoints

logger = logging.getLogger("easi3r")

MAX_POINTS = 2_000_000
LONG_SIDE = 640  # pixels; smaller frames are shown enlarged
BACKGROUND = (24, 26, 30)
MASK_COLOR = (255, 64, 48)


def write_scene_video(
    scene: Scene,
    path: str | Path,
    *,
    orbit: bool = False,
    max_points: int = MAX_POINTS,
    keep: Keep | None = None,
    progress: Progress = silent,
) -> Path:
    """Write an mp4 of the cloud: at each time the static points of all frames and the moving ones of that frame.

    keep: all points, or the static or moving ones; None: as the scene was made for.
    orbit: False looks from the recovered cameras, one picture per frame; True from a circle about their smoothed path.
    Returns the absolute path; raises InputError for a name that is no mp4, OutputError where it cannot be written.
    """
    target = check_video_name(path)
    shown = shown_points(scene, max_points, keep=keep, progress=progress)
    rate = frame_rate(scene.timestamps)
    views = recovered_views(scene, *_picture_size(scene))
    shots, rate = orbit_shots(views, shown.depth, rate) if orbit else (path_shots(views), rate)
    pictures = scene_pictures(shown, progress(shots, "video"))
    return write_video(target, pictures, rate)


def scene_pictures(shown: ShownPoints, shots: Iterable[Shot]) -> Iterator[Array]:
    """One [H, W, 3] uint8 RGB picture per shot."""
    still = shown.static
    for frame, view in shots:
        now = shown.moving(frame)
        points = np.concatenate([shown.points[still], shown.points[now]])
        colors = np.concatenate([shown.colors[still], shown.colors[now]])
        size = np.concatenate([shown.size[still], shown.size[now]])
        yield fill_holes(splat(points, colors, size, view, background=BACKGROUND))


def write_overlay_video(motion: Motion, path: str | Path, *, progress: Progress = silent) -> Path:
    """Write an mp4 of the clip as the network saw it, what moves tinted and outlined.

    Returns the absolute path; raises InputError for a name that is no mp4, OutputError where it cannot be written.
    """
    target = check_video_name(path)
    frames = progress(range(motion.num_frames), "overlay")
    size = _picture_size(motion)
    pictures = (overlay_picture(motion.images[i], motion.dynamic_mask[i], size) for i in frames)
    return write_video(target, pictures, frame_rate(motion.timestamps))


def overlay_picture(image: Array, mask: Array, size: tuple[int, int]) -> Array:
    """[H, W, 3] uint8 RGB and [H, W] bool, True = moves -> a picture of ``size`` (width, height), that part tinted."""
    enlarged = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    moves = cv2.resize(mask.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    tinted = np.rint(0.6 * enlarged[moves > 0] + 0.4 * np.array(MASK_COLOR)).astype(np.uint8)
    picture = enlarged.copy()
    picture[moves > 0] = tinted
    outlines, _ = cv2.findContours(moves, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    return np.asarray(cv2.drawContours(picture, outlines, -1, MASK_COLOR, 2))


def check_video_name(path: str | Path) -> Path:
    """The absolute path; InputError unless it ends in .mp4."""
    if Path(path).suffix.lower() != ".mp4":
        raise InputError(f"The video {path} cannot be written; expected a name that ends in .mp4.")
    return Path(path).absolute()


def write_video(path: str | Path, frames: Iterable[Array], rate: float) -> Path:
    """Write [H, W, 3] uint8 RGB frames of one size, at least one, as an mp4, whole or not at all.

    Odd sizes grow by a repeated row or column, since the colours of a video have half the resolution.
    """
    frames = iter(frames)
    first = _even(next(frames))
    frames = chain([first], map(_even, frames))
    av = find_av()
    with whole_file(path) as partial:
        if av is None:
            _write_with_opencv(partial, frames, rate, first.shape[1::-1])
        else:
            _write_with_av(av, partial, frames, rate, first.shape[1::-1])
    return Path(path).absolute()


def _write_with_av(av: Any, path: Path, frames: Iterable[Array], rate: float, size: tuple[int, int]) -> None:
    h264 = "libx264" in av.codecs_available
    try:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264" if h264 else "mpeg4", rate=Fraction(rate).limit_denominator(1001))
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "18"} if h264 else {"qscale": "3"}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())
    except av.FFmpegError as error:
        raise OutputError(f"The video {path} cannot be written ({error}); choose another place.") from error


def _write_with_opencv(path: Path, frames: Iterable[Array], rate: float, size: tuple[int, int]) -> None:
    logger.info("the video is MPEG-4, which browsers do not play; pip install 'easi3r[video]' writes H.264")
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    if not writer.isOpened():
        raise OutputError(
            f"OpenCV cannot write the video {path}; choose another place, or pip install 'easi3r[video]'."
        )
    try:
        for frame in frames:
            writer.write(np.ascontiguousarray(frame[..., ::-1]))
    finally:
        writer.release()


def _even(frame: Array) -> Array:
    height, width = frame.shape[:2]
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _picture_size(motion: Motion) -> tuple[int, int]:
    """(width, height) of the pictures: the frames' own, or a whole multiple of it so that small ones can be seen."""
    height, width = motion.images.shape[1:3]
    times = max(1, round(LONG_SIDE / max(height, width)))
    return width * times, height * times
