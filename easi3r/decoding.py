"""Readers: a video, image files or an array as one stream of upright 8-bit RGB frames on a clock.

Videos go through PyAV where it is installed (every codec, decode errors, exact stamps), else through OpenCV.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import ImageOps

from easi3r.errors import InputError
from easi3r.structures import Array
from easi3r.untrusted import MAX_PIXELS, check_pixels, open_image

IMAGE_SUFFIXES = {".avif", ".bmp", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"}
IMAGE_SUFFIXES |= {".tif", ".tiff", ".webp"}
VIDEO_SUFFIXES = {".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
VIDEO_SUFFIXES |= {".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
_MAY_LACK = 2  # frames fewer than the header counts: edit lists and codec delay drop that many from whole files
# FFmpeg's names of what VIDEO_SUFFIXES promise: by itself it would take a text file called .mp4 for a list of others
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,asf,avi,flv,gif,matroska,webm,mpeg,mpegts,mpegvideo,mxf,ogg"
_MORE_FORMATS = "pip install 'easi3r[video]' reads more formats"


class SourceFrame(NamedTuple):
    """One frame of the source, decoded only when it is asked for, before the next one is taken."""

    name: str
    seconds: float
    read: Callable[[], Array]  # -> [H, W, 3] uint8 RGB, upright


Stream = Generator[SourceFrame, None, None]


def array_stream(frames: Array, fps: float) -> Stream:
    """Frames of an array [n, H, W, 3] uint8, frame i at ``i / fps`` seconds."""
    return (SourceFrame(f"frame {i}", i / fps, partial(frames.__getitem__, i)) for i in range(len(frames)))


def image_stream(paths: Sequence[Path], fps: float) -> Stream:
    """Image files in the order given, file i at ``i / fps`` seconds."""
    return (SourceFrame(path.name, i / fps, partial(read_image, path)) for i, path in enumerate(paths))


def natural_key(path: Path) -> tuple[list[int | str], str]:
    """Sort key of file names that puts frame_2 before frame_10."""
    parts = re.split("([0-9]+)", path.name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) that the header says, before EXIF data turns it; InputError as `read_image`."""
    try:
        with open_image(path) as image:
            return image.size
    except Exception as error:  # see read_image
        raise InputError(_no_image(path, error)) from error


def read_image(path: Path) -> Array:
    """Read one image file -> [H, W, 3] uint8 RGB, turned upright as its EXIF data says, alpha dropped.

    16-bit values are divided by 257 and rounded.  Raises InputError for a file that is no whole image, or that
    holds floating-point or 32-bit values.
    """
    try:
        with open_image(path) as image:
            layout, mode = str(image.tile), image.mode
            image.load()  # all of it: Pillow raises where a file ends early, OpenCV would fill in grey
            if ";16" not in layout and mode not in ("F", "I"):
                upright = ImageOps.exif_transpose(image)
                # by way of RGBA: Pillow warns when it drops the transparency of a palette
                return np.asarray((upright.convert("RGBA") if mode == "P" else upright).convert("RGB"))
        if ";16" in layout:  # Pillow truncates the colours of such files to 8 bits
            return _read_deep_image(path)
    except Exception as error:  # damaged files make Pillow's decoders raise errors of a dozen types
        raise InputError(_no_image(path, error)) from error
    raise InputError(
        f"{path} holds {'floating-point' if mode == 'F' else '32-bit'} values, but frames need 8 or 16 bits per "
        "channel; convert it to PNG or JPEG first."
    )


def _no_image(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split()) or type(error).__name__
    return f"{path} cannot be read as an image ({reason}); replace it or leave it out."


def _read_deep_image(path: Path) -> Array:
    with open_image(path) as image:
        image.verify()  # the sums of a PNG, which Pillow does not look at and OpenCV's library prints complaints about
    with _quiet_opencv():  # decoding from memory: OpenCV's own file access knows no Unicode paths on Windows
        pixels = cv2.imdecode(np.fromfile(path, dtype=np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if pixels is None:
        raise ValueError("a 16-bit layout that OpenCV does not know")
    return np.asarray((pixels[..., ::-1].astype(np.uint32) + 128) // 257, dtype=np.uint8)


def video_stream(path: Path) -> Stream:
    """Frames of a video in order of presentation, in seconds since its first frame, read to the end.

    Raises InputError where the file cannot be opened, where decoding fails, and at the end when fewer frames came
    than the header counts; whoever stops before never meets the error.  Frames whose size changes midway keep
    their sizes under PyAV; OpenCV scales them to the first one's.
    """
    av = find_av()
    damage: Exception | None = None
    number, seconds, first = 0, 0.0, 0.0
    with _open_with_av(av, path) if av else _open_with_opencv(path) as video:
        try:
            for stamp, read in video.frames:
                if number == 0:
                    first = stamp or 0.0
                else:
                    # Without a stamp (OpenCV says 0), or with one in decoding order, as of B-frames in AVI files:
                    # one frame interval later, for a clock never goes back.
                    now = 0.0 if stamp is None else stamp - first
                    seconds = now if now > seconds + 1e-6 else seconds + 1 / video.rate
                yield SourceFrame(f"frame {number}", seconds, read)
                number += 1
        except _DamageError as error:
            damage = error
    if damage or number == 0 or _broke_off(path, video, number, seconds):
        raise InputError(_damage_report(path, video.count, number, seconds, damage)) from damage


class _DamageError(Exception):
    """The video cannot be decoded any further."""


@dataclass(frozen=True)
class _Video:
    frames: Iterator[tuple[float | None, Callable[[], Array]]]  # (stamp in seconds, reader), in order of presentation
    count: int | None  # as the header says; None where it does not say exactly
    rate: float  # frames per second, on average


def find_av() -> ModuleType | None:
    """PyAV, or None where the extra ``video`` is not installed."""
    try:
        import av
    except ImportError:
        return None
    return av


@contextmanager
def _open_with_av(av: Any, path: Path) -> Iterator[_Video]:
    try:  # an absolute path, lest FFmpeg take 'a:b.mp4' for a protocol; tags may be in any encoding
        options = {"format_whitelist": CONTAINERS}
        container = av.open(str(path.absolute()), options=options, metadata_errors="ignore")
    except av.FFmpegError as error:
        raise InputError(_no_video(path, error.strerror)) from error
    with container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            raise InputError(_no_video(path, "no picture track that can be decoded"))
        _check_size(path, stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # sizes may change midway
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        yield _Video(_av_frames(av, container, stream), stream.frames or None, rate)


def _av_frames(av: Any, container: Any, stream: Any) -> Iterator[tuple[float | None, Callable[[], Array]]]:
    marked = bool(stream.frames)  # MP4 and AVI mark what is damaged, transport streams whole packets at a splice too
    try:
        for packet in container.demux(stream):
            if marked and packet.is_corrupt:
                raise _DamageError("the file ends within a frame")
            for frame in packet.decode():
                if marked and frame.is_corrupt:
                    raise _DamageError("a frame is damaged")
                yield None if frame.pts is None else float(frame.pts * stream.time_base), partial(_av_pixels, frame)
    except av.FFmpegError as error:
        raise _DamageError(error.strerror) from error


def _av_pixels(frame: Any) -> Array:
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


@contextmanager
def _open_with_opencv(path: Path) -> Iterator[_Video]:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # quiet; OpenCV reads it when it opens its first video
    if any("\ud800" <= letter <= "\udfff" for letter in str(path.absolute())):  # OpenCV would end the program
        raise InputError(_no_video(path, f"its name is not UTF-8, which OpenCV cannot open; {_MORE_FORMATS}"))
    with _quiet_opencv():
        capture = open_capture(path)
        try:
            if not capture.isOpened():
                raise InputError(_no_video(path, f"OpenCV finds no video in it; {_MORE_FORMATS}"))
            width, height = (capture.get(key) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            _check_size(path, int(width), int(height))
            rate = capture.get(cv2.CAP_PROP_FPS)
            count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if _header_counts(path) else None
            yield _Video(_opencv_frames(capture, path), count, rate if 0 < rate < 1e6 else 25.0)
        finally:
            capture.release()


def open_capture(path: Path) -> cv2.VideoCapture:
    """The open file; OpenCV takes FFmpeg's options from the environment alone, where they are but for a moment."""
    name, before = "OPENCV_FFMPEG_CAPTURE_OPTIONS", dict(os.environ)
    os.environ[name] = f"format_whitelist;{CONTAINERS}"
    try:
        return cv2.VideoCapture(str(path.absolute()), cv2.CAP_FFMPEG)
    finally:
        del os.environ[name]
        if name in before:
            os.environ[name] = before[name]


def _check_size(path: Path, width: int, height: int) -> None:
    try:
        check_pixels(width, height)
    except ValueError as error:
        raise InputError(_no_video(path, str(error))) from error


def _opencv_frames(capture: cv2.VideoCapture, path: Path) -> Iterator[tuple[float | None, Callable[[], Array]]]:
    while capture.grab():
        yield capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, partial(_opencv_pixels, capture, path)


def _opencv_pixels(capture: cv2.VideoCapture, path: Path) -> Array:
    found, pixels = capture.retrieve()
    if not found:
        raise InputError(f"OpenCV cannot convert the frames of {path} to RGB; {_MORE_FORMATS}.")
    return np.asarray(pixels)[..., ::-1]


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    logging = cv2.utils.logging
    level = logging.getLogLevel()
    logging.setLogLevel(logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        logging.setLogLevel(level)


def _no_video(path: Path, reason: str) -> str:
    return f"{path} cannot be opened as a video ({reason}); give a whole video file or a folder of images."


def _damage_report(path: Path, count: int | None, number: int, seconds: float, damage: Exception | None) -> str:
    total = f" of {count}" if count else ""
    reason = f" ({damage})" if damage else ""
    report = f"Only {number}{total} frames of {path} can be read{reason}; get a whole copy of the file"
    if number < 2:
        return f"{report}."
    end = int(seconds * 1000) / 1000  # rounded down, so that the last frame reaches it: that one may be a half (OpenCV)
    return f"{report}, or take the whole part of it with max_frames (at most {number - 1}) or end (at most {end} s)."


def _broke_off(path: Path, video: _Video, number: int, seconds: float) -> bool:
    """Whether frames are missing at the end.  An edit list may hide many, so the last stamp has a say as well."""
    if video.count is None or number >= video.count - _MAY_LACK:
        return False
    due = _presented_seconds(path) or video.count / video.rate
    interval = seconds / max(number - 1, 1)
    return due - seconds > (1 + _MAY_LACK) * interval


def _header_counts(path: Path) -> bool:
    """Whether OpenCV's frame count comes from the header (MP4, MOV and AVI), not from duration times rate."""
    with path.open("rb") as file:
        return file.read(4) == b"RIFF" or _presented_seconds(path) is not None


def _presented_seconds(path: Path) -> float | None:
    """Length of the picture track of an MP4 or MOV after its edit list, in seconds; None for any other file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for movie in _boxes(data, b"moov", 0, len(data)):
            scales = [_number(data, at + (20 if data[at] else 12)) for at, _ in _boxes(data, b"mvhd", *movie)]
            tracks = [header for track in _boxes(data, b"trak", *movie) for header in _boxes(data, b"tkhd", *track)]
            for at, end in tracks:
                duration = _number(data, at + 28, size=8) if data[at] else _number(data, at + 20)
                if duration and any(scales) and _number(data, end - 8):  # a width: pictures, not sound
                    return duration / scales[0]
    return None


def _boxes(data: mmap.mmap, kind: bytes, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Where the contents of the ISO media boxes of one kind begin and end, among the boxes from begin to end."""
    while begin + 8 <= end:
        size, header = _number(data, begin), 8
        if size == 1:
            size, header = _number(data, begin + 8, size=8), 16
        if size < header:
            return
        if data[begin + 4 : begin + 8] == kind and begin + header < min(begin + size, end):
            yield begin + header, min(begin + size, end)
        begin += size


def _number(data: mmap.mmap, position: int, *, size: int = 4) -> int:
    return int.from_bytes(data[position : position + size], "big")
