"""Files that somebody else made: how large they may be, of what kind, and that none leads out of the folder named."""

from __future__ import annotations

import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from PIL.ImageFile import ImageFile

from easi3r.errors import InputError

MAX_PIXELS = 1 << 27  # of an image: 134 million, 0.4 GB once it is decoded
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP", "AVIF")  # Pillow's; others start programs (EPS)


def read_bytes(path: Path, most: int) -> bytes:
    """The whole file.  Raises ValueError, whose text says why, for more than ``most`` bytes; OSError as usual.

    Pipes and devices, which may have no end, are refused with ValueError too.
    """
    check_regular(path)
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most >> 10} KiB")
    return data


def check_regular(path: Path) -> None:
    """ValueError for a pipe, a device or a socket: reading one may never end."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder says by itself what is wrong
        raise ValueError("it is a pipe or a device, no file")


@contextmanager
def open_image(path: Path) -> Iterator[ImageFile]:
    """An image whose header was read and whose pixels were not: ValueError where it has more than ``MAX_PIXELS``.

    Only ``IMAGE_FORMATS`` are looked for, whatever the file is called.  Whatever Pillow raises passes unchanged.
    """
    check_regular(path)
    Image.init()
    formats = [name for name in IMAGE_FORMATS if name in Image.OPEN]  # old versions of Pillow know no AVIF
    try:
        opened = Image.open(path, formats=formats)
    except Image.DecompressionBombError as error:
        raise ValueError(_too_large("its size")) from error
    with opened as image:
        check_pixels(*image.size)
        yield image


def check_pixels(width: int, height: int) -> None:
    """ValueError for a size that is beyond any photograph: a small file may claim it and fill the memory."""
    if width * height > MAX_PIXELS:
        raise ValueError(_too_large(f"{width} x {height} px"))


def _too_large(size: str) -> str:
    return f"{size} is beyond the limit of {MAX_PIXELS // 10**6} million pixels"


def list_folder(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files in ``folder`` with one of ``suffixes`` (lower case), hidden ones left out, in no order.

    Raises InputError for symbolic links among them that lead out of the folder, or nowhere: somebody who hands on a
    folder must not decide which other files of ours are read, and end up in a result.
    """
    files = [path for path in folder.iterdir() if path.suffix.lower() in suffixes and not path.name.startswith(".")]
    for path in files:
        if path.is_symlink() and (target := leads_outside(path, folder)):
            raise InputError(
                f"{path} is a link to {target}, not in {folder}; put the file itself there, or remove the link."
            )
    return [path for path in files if path.is_file()]


def leads_outside(link: Path, folder: Path) -> str | None:
    """Where a symbolic link leads unless that is a file in ``folder`` (named in any way), else None."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in circles
        return str(link.readlink())
    return None if target.is_relative_to(folder.resolve()) else str(target)


def check_inside(path: Path, folder: Path) -> None:
    """ValueError for a symbolic link that leads out of ``folder``, or nowhere."""
    if path.is_symlink() and (target := leads_outside(path, folder)):
        raise ValueError(f"{path.relative_to(folder)} is a link to {target}, outside of the folder")
