"""The clips below a folder: where they are, what their results are called, and whether they are still the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from easi3r.decoding import IMAGE_SUFFIXES, VIDEO_SUFFIXES, natural_key
from easi3r.errors import InputError
from easi3r.storage import MARKER

OURS = "batch.lock"  # a folder that holds it is the output of a batch
_LONGEST = 200  # bytes of a result's name: file systems end at 255, and temporary names add some


@dataclass(frozen=True)
class Clip:
    """A video or a folder of images, not opened yet."""

    path: Path
    relative: str  # to the folder of the batch, for people; '.' is that folder itself
    name: str  # of its result: unique in the batch, safe as a file name, decided by ``relative`` alone


def find_clips(folder: Path, output: Path) -> list[Clip]:
    """Videos, and folders that hold images themselves, however deep below ``folder``, in natural order.

    Hidden files, results of easi3r and ``output`` are no clips; links to files are followed, links to folders are not.
    Raises InputError if ``folder`` is none, or holds no clip.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected one that holds videos or folders of images.")
    if folder.resolve() == output.resolve():
        raise InputError(f"The output {output} is the folder of the clips itself; choose another output.")
    found = [
        Clip(path, str(relative := path.relative_to(folder)), result_name(relative, folder))
        for path in _walk(folder, output.resolve())
    ]
    if not found:
        raise InputError(f"The folder {folder} holds no video and no folder of images, however deep; check the path.")
    return found


def _walk(folder: Path, output: Path) -> Iterator[Path]:
    try:
        entries = sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=natural_key)
    except OSError:  # not to be listed: a clip that fails says so
        yield folder
        return
    if folder.resolve() == output or any(entry.name in (MARKER, OURS) for entry in entries):
        return
    if any(is_image(entry) for entry in entries):
        yield folder
    for entry in entries:
        if entry.is_dir():
            if not entry.is_symlink():
                yield from _walk(entry, output)
        elif entry.suffix.lower() in VIDEO_SUFFIXES:
            yield entry


def is_image(path: Path) -> bool:
    """By its name, and no folder."""
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()


def result_name(relative: Path, folder: Path) -> str:
    """One file name for a relative path: '+' parts folders, everything unusual is written %XX as in addresses.

    >>> result_name(Path("day 1/clip.mp4"), Path("videos")), result_name(Path("."), Path("videos"))
    ('day 1+clip.mp4', 'videos+')
    """
    parts = relative.parts or (folder.resolve().name, "")
    name = "+".join("".join(map(_safe, part)) for part in parts)
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    start = os.fsencode(name)[: _LONGEST - 40].decode("utf-8", "ignore")
    return f"{start}~{hashlib.sha256(os.fsencode(relative)).hexdigest()[:32]}"


def _safe(character: str) -> str:
    if character.isalnum() or character in " ._-":
        return character
    return "".join(f"%{byte:02X}" for byte in os.fsencode(character))


def stamp(path: Path) -> str:
    """Changes whenever a file of the clip is written, replaced, added or removed; reads no content.  Raises OSError."""
    lines = []
    for file in files_of(path):
        status = file.stat()
        lines.append(f"{file.name!r} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content(path: Path) -> str:
    """SHA-256 of all that a clip's frames depend on: bytes, the kind of a video, the names of images.

    Raises OSError.
    """
    digest = hashlib.sha256()
    for file in files_of(path):
        name = file.name if path.is_dir() else file.suffix.lower()
        digest.update(f"{name!r} {file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes.  Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def files_of(path: Path) -> list[Path]:
    """The video itself, or the images of a folder in their order.  Raises OSError."""
    if not path.is_dir():
        return [path]
    return sorted(
        (file for file in path.iterdir() if not file.name.startswith(".") and is_image(file)), key=natural_key
    )
