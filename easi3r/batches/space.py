"""Room on the disk: asked before a clip is computed, since a result that cannot be written is work for nothing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from easi3r.errors import OutputError

RESERVE = 4 << 20  # bytes left for records and summaries, so that they can say that the disk is full


def check_space(out: Path, needed: int) -> None:
    """Raise OutputError if ``out`` has no room for so many bytes, or may not be written."""
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OutputError(f"The output {out} cannot be written any more: {error.strerror}.") from error
    if (free := free_bytes(out)) < needed:
        raise OutputError(
            f"The result needs about {size_text(needed)} on the disk of {out}, which has {size_text(free)} left for "
            "results; make room, then go on with --retry-failed (in Python: retry_failed=True)."
        )


def free_bytes(out: Path) -> int:
    """Bytes for results.  Raises OutputError."""
    try:
        return max(0, shutil.disk_usage(out).free - RESERVE)
    except OSError as error:
        raise OutputError(f"The output {out} cannot be reached: {error.strerror}.") from error


def size_text(size: float) -> str:
    """'3.2 GiB'.

    >>> size_text(3 << 30), size_text(1 << 20)
    ('3.0 GiB', '1.0 MiB')
    """
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"
