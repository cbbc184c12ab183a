"""``summary.json`` and ``summary.csv``: what became of every clip of a batch, whole at any moment."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from easi3r._version import __version__
from easi3r.batches.clips import Clip
from easi3r.batches.page import page
from easi3r.batches.records import Record
from easi3r.errors import OutputError
from easi3r.storage import whole_file

logger = logging.getLogger("easi3r")

_SHARE = 0.05  # of the time that may go into summaries: with thousands of clips they are written less often


@dataclass
class Summary:
    """One row per clip, in the order of the folder."""

    folder: Path
    out: Path
    clips: list[Clip]
    records: dict[str, Record] = field(default_factory=dict)  # name of a clip -> what became of it
    old: set[str] = field(default_factory=set)  # names of the clips that an earlier run did
    begun: bool = False  # before that, an earlier run's files stay as they are
    _next: float = 0.0
    trouble: OutputError | None = None  # of the last time it was written

    @property
    def counts(self) -> dict[str, int]:
        """Clips that are done, failed, waiting."""
        found = Counter(record.status for record in self.records.values())
        return {"done": found["done"], "failed": found["failed"], "waiting": len(self.clips) - len(self.records)}

    @property
    def failed(self) -> list[Record]:
        """The clips that failed, each with its reason."""
        return [record for record in self.records.values() if record.status == "failed"]

    def rows(self) -> list[dict[str, Any]]:
        """Plain values; ``output`` is relative to the folder of the batch's output, None where there is none."""
        return [self._row(clip) for clip in self.clips]

    def _row(self, clip: Clip) -> dict[str, Any]:
        record = self.records.get(clip.name)
        if record is None:
            return {"clip": clip.relative, "status": "waiting", "output": None}
        row = dataclasses.asdict(record)
        for name in ("picture", "traceback", "stamp", "settings", "name"):
            del row[name]
        return row | {"clip": clip.relative, "output": f"clips/{clip.name}" if record.status == "done" else None}

    def write(self, *, at_once: bool = False) -> None:
        """The three files, each whole; now and then, unless ``at_once``.  ``trouble`` says what went wrong."""
        begin, self.begun = time.monotonic(), True
        if begin < self._next and not at_once:
            return
        try:
            self._write(self.out / "summary.json", self._json())
            self._write(self.out / "summary.csv", self._csv())
            self._write(self.out / "index.html", page(self.folder, self.clips, self.records, self.counts))
        except OutputError as error:
            if self.trouble is None:
                logger.warning("%s The batch goes on.", error)
            self.trouble = error
        else:
            self.trouble = None
        self._next = time.monotonic() + (time.monotonic() - begin) / _SHARE

    @staticmethod
    def _write(path: Path, text: str) -> None:
        with whole_file(path) as partial:
            # a file name that is no UTF-8 reaches us as lone surrogates, which cannot be written as they are
            partial.write_text(text, encoding="utf-8", errors="backslashreplace")

    def _json(self) -> str:
        content = {"easi3r": __version__, "folder": str(self.folder), **self.counts, "clips": self.rows()}
        return json.dumps(content, indent=1) + "\n"

    def _csv(self) -> str:
        text, rows = io.StringIO(), self.rows()
        names = ["clip", "status", "output", *(name for row in rows for name in row)]
        table = csv.DictWriter(text, list(dict.fromkeys(names)), lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow(
                {name: " ".join(value) if isinstance(value, (list, tuple)) else value for name, value in row.items()}
            )
        return text.getvalue()
