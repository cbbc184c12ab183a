"""What became of each clip: one file per clip, written whole once its result is in place.

A record is what makes a result count: a clip without one is worked on again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from easi3r._version import __version__
from easi3r.batches.clips import Clip, content, stamp
from easi3r.config import Settings, get_setting, setting_kinds
from easi3r.errors import OutputError
from easi3r.storage import MARKER, whole_file

logger = logging.getLogger("easi3r")

# How a clip is computed, not what: a clip that was finished with others is finished.
NOT_IN_THE_KEY = {"device", "memory", "batch_size", "offload"}


@dataclass(frozen=True)
class Record:
    """One clip: done with what was found, or failed with the reason."""

    clip: str  # relative to the folder of the batch
    name: str  # of its result below ``clips``
    status: Literal["done", "failed"]
    settings: str  # key of settings, weights and version, see ``settings_key``
    stamp: str | None = None  # of its files, None where they could not be looked at
    content: str | None = None  # hash of its files, None where they could not be read
    error: str | None = None  # one sentence
    frames: int | None = None
    verdict: str | None = None
    reasons: tuple[str, ...] = ()
    moving_share: float | None = None
    seconds: float | None = None  # reading, computing and writing
    memory_gib: float | None = None  # peak of the process on the host, and of the GPU's memory where it has one
    gpu_memory_gib: float | None = None
    finished: str | None = None  # local time, ISO 8601
    picture: str | None = None  # the frame in which most moves, with its mask: a data URI
    traceback: str | None = None  # of an error that nobody foresaw

    def is_of(self, clip: Clip, settings: str) -> bool:
        """Whether it is about this content with these settings.  The content is read only if the files changed."""
        if self.settings != settings:
            return False
        try:
            return (self.stamp is not None and self.stamp == stamp(clip.path)) or (
                self.content is not None and self.content == content(clip.path)
            )
        except OSError:  # not to be read: whoever works on it finds out why
            return False


@dataclass(frozen=True)
class Ledger:
    """The records and results in the output of a batch."""

    out: Path

    def result(self, name: str) -> Path:
        """Where the result of that name is."""
        return self.out / "clips" / name

    def path(self, name: str) -> Path:
        """Where the record of that name is."""
        return self.out / "records" / f"{name}.json"

    def read(self, name: str) -> Record | None:
        """None where there is no record, or a damaged one, or where its result is gone."""
        path = self.path(name)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            record = Record(**stored | {"reasons": tuple(stored["reasons"])})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            logger.warning("%s is damaged (%s): its clip counts as new", path, type(error).__name__)
            return None
        if record.status == "done" and not (self.result(name) / MARKER).is_file():
            return None
        return record

    def write(self, record: Record) -> None:
        """Whole or not at all.  Raises OutputError."""
        with whole_file(self.path(record.name)) as partial:
            partial.write_text(json.dumps(dataclasses.asdict(record), indent=1), encoding="utf-8")

    def names(self) -> set[str]:
        """Of all records."""
        return {path.stem for path in self.path("").parent.glob("[!.]*.json")}

    def adopt(self, clip: Clip, orphan: Record) -> Record:
        """Let the result of a clip that has been moved be that of ``clip``.  Raises OutputError."""
        record = dataclasses.replace(orphan, clip=clip.relative, name=clip.name, stamp=stamp(clip.path))
        try:
            self.path(orphan.name).unlink()
            self.result(orphan.name).rename(self.result(clip.name))
        except OSError as error:
            raise OutputError(f"The result of {orphan.clip} cannot be renamed: {error.strerror}.") from error
        self.write(record)
        return record


def settings_key(settings: Settings, checkpoint: str | None) -> str:
    """Hash of all that decides a result besides the clip: settings, files that they name, weights, version."""
    chosen = {path: _plain(get_setting(settings, path)) for path in setting_kinds() if path not in NOT_IN_THE_KEY}
    text = json.dumps([chosen, checkpoint, __version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON; arrays and files by their content."""
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return [[str(key), _plain(inner)] for key, inner in value.items()]
    if isinstance(value, (str, os.PathLike)):
        path = Path(value)
        if path.is_file():
            return content(path)
        if path.is_dir():
            return [[str(file.relative_to(path)), content(file)] for file in sorted(path.rglob("*")) if file.is_file()]
        return str(value)
    if isinstance(value, Sequence):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float)) else repr(value)
