"""How much work a clip is, from headers alone: for the forecast of disk space and of the time that is left."""

from __future__ import annotations

import math
from pathlib import Path

import cv2

from easi3r.batches.clips import files_of
from easi3r.config import FrameSettings
from easi3r.decoding import CONTAINERS, find_av, open_capture
from easi3r.untrusted import open_image

BLOCK = 4096  # bytes that a small file takes
FILES_PER_FRAME = 6  # image, mask, score, depth, confidence; one for what is kept per clip
BYTES_PER_PIXEL = 16  # three float32 and the PNGs
BYTES_PER_CLIP = 1 << 20  # report, attention maps, record


def disk_bytes(num_frames: int, width: int, height: int) -> int:
    """What the result of a clip takes, about, and rather less than more of it is left over."""
    return num_frames * (BYTES_PER_PIXEL * width * height + FILES_PER_FRAME * BLOCK) + BYTES_PER_CLIP


def count_frames(path: Path, settings: FrameSettings) -> tuple[int, tuple[int, int]]:
    """How many frames ``settings`` take of a clip, about, and (width, height) of its frames; decodes nothing.

    Raises whatever the readers of broken files raise.
    """
    if path.is_dir():
        files = files_of(path)
        with open_image(files[0]) as image:
            return _chosen(len(files), settings.fps or 1.0, settings, thin=False), image.size
    count, rate, size = _video(path)
    return _chosen(count, rate, settings, thin=True), size


def _chosen(count: int, rate: float, settings: FrameSettings, *, thin: bool) -> int:
    """Of ``count`` frames at ``rate`` per second."""
    end = count if settings.end is None else min(count, _up(settings.end * rate))
    left = max(0, end - _up((settings.start or 0.0) * rate))
    if thin and settings.fps is not None and settings.fps < rate:
        left = _up(left / rate * settings.fps)
    left = _up(left / settings.stride)
    return min(left, settings.max_frames or left)


def _up(number: float) -> int:
    """The next whole number, but for roundings."""
    return math.ceil(number - 1e-6)


def _video(path: Path) -> tuple[int, float, tuple[int, int]]:
    """Frames, frames per second, (width, height), as the header says."""
    if av := find_av():
        with av.open(
            str(path.absolute()), options={"format_whitelist": CONTAINERS}, metadata_errors="ignore"
        ) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            seconds = float(container.duration or 0) / 1e6
            return stream.frames or round(seconds * rate), rate, (stream.width, stream.height)
    capture = open_capture(path)
    try:
        names = cv2.CAP_PROP_FRAME_COUNT, cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT
        count, rate, width, height = (capture.get(name) for name in names)
    finally:
        capture.release()
    return max(0, int(count)), rate or 25.0, (int(width), int(height))
