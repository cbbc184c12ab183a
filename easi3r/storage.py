"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from easi3r.errors import OutputError

_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}(\.[^.]*)?", re.DOTALL)  # what _beside makes, and whole_file of it
MARKER = "scene.json"  # a folder that holds it is one of ours


def check_output(path: str | Path, *, overwrite: bool) -> Path:
    """Return the absolute path if a folder can be written there; meant to be called before any work.

    Raises OutputError if something is in the way, or if its parent can be neither found nor made.
    """
    target = Path(path).absolute()
    try:
        if target.exists() or target.is_symlink():
            if not overwrite:
                raise OutputError(
                    f"The output {path} exists; choose another name, or replace it with --overwrite "
                    "(in Python: overwrite=True)."
                )
            if not (target / MARKER).is_file():
                raise OutputError(
                    f"The output {path} exists and holds no {MARKER}, so it is not replaced; remove it first."
                )
        parent = next(p for p in (*target.parents, target) if p.exists())  # target: '/' has no parents
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise _refused(path, error) from error
    if not parent.is_dir():
        raise OutputError(f"The output {path} cannot be written: {parent} is a file; expected a folder.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"The output {path} cannot be written: no permission to write in {parent}.")
    return target


@contextlib.contextmanager
def whole_folder(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``path``; on success it takes that name, on an error it is removed.

    An old folder is replaced only once the new one is whole; of a symbolic link the link alone is replaced.  Raises
    OutputError as ``check_output`` does, and for whatever the file system refuses (a full disk, say).
    """
    target = check_output(path, overwrite=overwrite)
    made = [p for p in target.parents if not p.exists()]
    partial = _beside(target, "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        _put_in_place(partial, target, overwrite=overwrite)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:  # innermost first; a folder that others filled meanwhile stays
            with contextlib.suppress(OSError):
                folder.rmdir()
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a new name beside ``path``, of the same kind; on success it replaces ``path``, on an error it is removed.

    Raises OutputError for whatever the file system refuses.
    """
    target = Path(path)
    partial = _beside(target, "partial").with_suffix(target.suffix)
    try:
        yield partial
        partial.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _refused(path, error) from error
        raise


def remove_stale(folder: Path) -> None:
    """Remove what writers left in ``folder`` that were killed; nobody may be writing there.

    Raises OutputError for whatever the file system refuses.
    """
    try:
        for path in folder.iterdir():
            if _TEMPORARY.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise _refused(folder, error) from error


def _put_in_place(partial: Path, target: Path, *, overwrite: bool) -> None:
    check_output(target, overwrite=overwrite)  # again: somebody else may have written there meanwhile
    if not target.exists():
        partial.rename(target)
        return
    old = _beside(target, "old")
    target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        _put_back(old, target)
        raise
    _remove(old)


def _put_back(old: Path, target: Path) -> None:
    """Undo the first half of a replacement, unless another writer's result has taken the place."""
    while not target.exists():
        try:
            old.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            return
    _remove(old)


def _remove(old: Path) -> None:
    if old.is_symlink():
        old.unlink()
    else:
        shutil.rmtree(old, ignore_errors=True)


def _beside(target: Path, what: str) -> Path:
    """A new hidden name in the same folder; cut, since file names end at 255 bytes."""
    return target.with_name(f".{target.name[:40]}.{secrets.token_hex(4)}.{what}")


def _refused(path: str | Path, error: OSError) -> OutputError:
    return OutputError(f"The output {path} cannot be written: {error.strerror or error}; choose another place.")
