"""One batch per output: a lock that the operating system releases when its holders are gone, however they ended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from easi3r.errors import OutputError

_NOTE = 200  # bytes, so that a shorter note covers a longer one
_PATIENCE = 10.0  # seconds in which the workers of a batch that was killed end: they hold the lock too


@contextlib.contextmanager
def locked(path: Path) -> Iterator[int]:
    """Hold the lock; yields its file descriptor, which child processes inherit so that they hold it too.

    Raises OutputError if another batch holds it.
    """
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise OutputError(f"The output {path.parent} cannot be written: {error.strerror}; choose another.") from error
    try:
        end = time.monotonic() + _PATIENCE
        while not _take(handle):
            holder = _holder(path)
            if _is_alive(holder) or time.monotonic() > end:
                raise OutputError(
                    f"Another batch writes into {path.parent} (process {holder.get('process', '?')} on "
                    f"{holder.get('host', 'a machine')}); wait until it has ended, or choose another output."
                )
            time.sleep(0.1)
        note = json.dumps({"process": os.getpid(), "host": platform.node()}).ljust(_NOTE)
        with contextlib.suppress(OSError):  # a full disk: the note is for people, the lock holds without it
            os.pwrite(handle, note.encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _take(handle: int) -> bool:
    """Whether the lock is ours now."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):  # somebody else has it
            return False
        raise
    return True


def _holder(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:  # it is being written
        return {}
    return found if isinstance(found, dict) else {}


def _is_alive(holder: dict[str, object]) -> bool:
    process = holder.get("process")
    if holder.get("host") != platform.node() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
