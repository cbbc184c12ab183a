"""Folders of tiny clips, good and broken, and ``easi3r batch`` as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from small_inputs import moving_square, write_images, write_video

ROOT = Path(__file__).parents[1]
FLAGS = ["--image-size", "64", "--align", "none", "--evidence", "attention"]  # a clip in a quarter of a second
BROKEN = {  # what is wrong -> part of the reason
    "no video": "cannot be opened as a video",
    "empty file": "is empty (0 bytes)",
    "half a video": "can be read",
    "half an image": "cannot be read as an image",
    "text as image": "cannot be read as an image",
    "unequal sizes": "px",
    "empty image": "is empty (0 bytes)",
    "too flat": "holds no whole patch",
    "floating point": "floating-point",
    "dangling link": "cannot be read (No such file",
}


def write_good(folder, number, num_frames=3):
    """A folder of images, or every third time a video."""
    frames = moving_square(num_frames, seed=number)
    if number % 3 == 0:
        folder.mkdir(parents=True, exist_ok=True)
        return write_video(folder / f"clip {number}.avi", frames)
    return write_images(folder / f"walk {number}", frames)


def write_broken(folder, number):
    """The ways of BROKEN in turn."""
    way = list(BROKEN)[number % len(BROKEN)]
    path, frames = folder / f"{way} {number}", moving_square(3, seed=number)
    folder.mkdir(parents=True, exist_ok=True)
    if way in ("no video", "empty file"):
        path.with_suffix(".mp4").write_bytes(b"" if way == "empty file" else b"not a video at all " * 50)
    elif way == "half a video":
        whole = write_video(path.with_suffix(".avi"), moving_square(12, seed=number))
        whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    elif way == "dangling link":
        path.with_suffix(".mp4").symlink_to(folder / "nowhere.mp4")
    elif way == "too flat":
        write_images(path, frames[:, :4])
    else:
        file = write_images(path, frames) / "frame_2.png"
        if way == "half an image":
            file.write_bytes(file.read_bytes()[:500])
        elif way == "text as image":
            file.write_text("hello")
        elif way == "empty image":
            file.write_bytes(b"")
        elif way == "unequal sizes":
            Image.fromarray(frames[0, :32, :32]).save(file)
        else:
            file.unlink()
            Image.fromarray(np.ones((48, 64), np.float32)).save(file.with_suffix(".tif"))
    return path


def write_folder(folder, count):
    """``count`` clips, one in ten broken, two levels deep."""
    for number in range(count):
        make = write_broken if number % 10 == 7 else write_good
        make(folder / f"day {number % 2}", number // 10 if make is write_broken else number)
    return folder


def start_batch(folder, out, *flags, log=None, **popen):
    """``easi3r batch`` in a process of its own; what it says is appended to ``log``."""
    command = [sys.executable, "-m", "easi3r", "batch", str(folder), "-o", str(out), *FLAGS, *map(str, flags)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = log or Path(os.devnull)
    with log.open("ab") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, **popen)


def run_batch(folder, out, *flags, log=None, **popen):
    """Its exit code."""
    return start_batch(folder, out, *flags, log=log, **popen).wait()


def rows(out):
    """Clip -> row of summary.json."""
    return {row["clip"]: row for row in json.loads((Path(out) / "summary.json").read_text())["clips"]}


def arrays(out):
    """Name of a file below ``clips`` -> its bytes; of all that holds results and neither times nor dates."""
    files = (path for path in (Path(out) / "clips").rglob("*") if path.is_file())
    kept = {path for path in files if path.name not in ("scene.json", "report.html")}
    return {str(path.relative_to(out)): content_of(path) for path in kept}


def content_of(path):
    """Of an archive its arrays, since an archive holds the time at which it was written."""
    if path.suffix != ".npz":
        return path.read_bytes()
    with np.load(path) as stored:
        return {name: (stored[name].dtype.str, stored[name].shape, stored[name].tobytes()) for name in stored.files}


def temporaries(out):
    """Hidden names: what a writer left that was killed."""
    return sorted(str(path) for path in Path(out).rglob(".*"))
