"""Folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from easi3r.errors import OutputError

MARKER = "scene.json"  # a folder that holds it is one of ours


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the absolute path if a folder can be written there; meant to be called before any work.

    Raises OutputError if something is in the way, or if its parent can be neither found nor made.
    """
    target = Path(path).absolute()
    if target.exists() or target.is_symlink():
        if not overwrite:
            raise OutputError(f"The output {path} exists; choose another name, or say overwrite to replace it.")
        if not (target / MARKER).is_file():
            raise OutputError(
                f"The output {path} exists and holds no {MARKER}, so it is not replaced; remove it first."
            )
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir():
        raise OutputError(f"The output {path} cannot be written: {parent} is a file; expected a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"The output {path} cannot be written: no permission to write in {parent}.")
    return target


@contextlib.contextmanager
def whole_folder(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success it takes that name, on an error it is removed.

    An old folder is replaced only once the new one is whole.  Raises OutputError as ``check_output`` does, and for
    whatever the file system refuses (a full disk, say).
    """
    target = check_output(path, overwrite=overwrite)
    made = [p for p in target.parents if not p.exists()]
    partial: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
        partial.chmod(0o777 & ~_umask())
        yield partial
        _replace(partial, target)
    except BaseException as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in made:  # innermost first; a folder that others filled meanwhile stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise OutputError(f"The output {path} cannot be written: {error.strerror or error}.") from error
        raise


def _replace(partial: Path, target: Path) -> None:
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / target.name)
    try:
        partial.rename(target)
    except OSError:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
