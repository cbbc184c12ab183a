"""Records of a run, one file per sequence and each written whole, so that a killed run goes on; and its tables.

DIR/run.json             what the run is: protocol, split, weights, versions, ...
DIR/sequences/NAME.json  scores of a sequence, or why there are none
DIR/results.json, results.md, results.csv
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from easi3r.errors import InputError, OutputError
from easi3r.metrics import summarise_masks
from easi3r.storage import whole_file
from evaluation.protocols import NUMBERS, Protocol, Scores
from evaluation.published import Figures, differences

HEADER, SEQUENCES = "run.json", "sequences"
MASK_COLUMNS = {"J": ("JM %", "JR %", "JD %"), "F": ("FM %", "FR %", "FD %")}  # mean, recall, decay
COLUMNS = *MASK_COLUMNS["J"], *MASK_COLUMNS["F"], *NUMBERS
NEVER_SEEN = "this reader has never met the real files: it was tested on small data written in their layout"

Header = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """What became of one sequence: scores, or the reason why there are none."""

    sequence: str
    num_frames: int | None = None  # None where the sequence could not be read
    scores: Scores | None = None
    reason: str | None = None  # one line, of a failure
    traceback: str | None = None  # of a failure
    seconds: float = 0.0  # of reading, method and scores; in no table, since no run repeats it

    def row(self) -> dict[str, float]:
        """The columns it has a value in."""
        if self.scores is None:
            return {}
        found: dict[str, float] = {}
        for name, values in (("J", self.scores.jaccard), ("F", self.scores.boundary_f)):
            if values is not None:
                percent = 100 * np.array(dataclasses.astuple(summarise_masks(values)))
                found |= dict(zip(MASK_COLUMNS[name], percent.tolist(), strict=True))
        return found | self.scores.numbers


@dataclass(frozen=True)
class Mean:
    """Of one column."""

    value: float
    count: int  # sequences that entered


# --- records -------------------------------------------------------------------------------------------------------


def open_run(folder: Path, header: Header) -> None:
    """Begin a run there, or go on with the one that is there.

    Raises InputError if that has another header, OutputError if the folder cannot be written or read.
    """
    header = json.loads(json.dumps(header))  # as it will be read
    path = folder / HEADER
    if not path.exists():
        _write(path, header)
        return
    before = _read(path)
    if before != header:
        names = [name for name in {**before, **header} if before.get(name) != header.get(name)]
        raise InputError(
            f"The run in {folder} differs from this one in {_difference(names[0], before, header)}"
            + (f", and in {', '.join(names[1:])}" if names[1:] else "")
            + "; choose another --out, or go on as it was begun."
        )


def _difference(name: str, before: Any, now: Any) -> str:
    """The first value that differs, however deep."""
    old, new = before.get(name), now.get(name)
    if isinstance(old, dict) and isinstance(new, dict):
        inner = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        return f"{name}, {_difference(inner, old, new)}"
    return f"{name} ({_short(old)} there, {_short(new)} here)"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."


def read_record(folder: Path, sequence: str) -> Record | None:
    """What an earlier run left of a sequence, None if nothing.  Raises OutputError for a damaged file."""
    path = _record_path(folder, sequence)
    if not path.exists():
        return None
    stored = _read(path)
    try:
        scores = stored.pop("scores")
        if scores is not None:
            for name, kind in (("frames", np.int64), ("jaccard", np.float64), ("boundary_f", np.float64)):
                scores[name] = None if scores[name] is None else np.array(scores[name], dtype=kind)
            scores = Scores(**scores)
        return Record(**stored, scores=scores)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OutputError(f"The record {path} is damaged ({type(error).__name__}: {error}); delete it.") from error


def write_record(folder: Path, record: Record) -> None:
    """Whole or not at all.  Raises OutputError."""
    _write(_record_path(folder, record.sequence), dataclasses.asdict(record))


def _record_path(folder: Path, sequence: str) -> Path:
    return folder / SEQUENCES / f"{file_name(sequence)}.json"


def file_name(sequence: str) -> str:
    """Of a sequence, whatever it is called."""
    return quote(sequence, safe=" ")


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict):
            raise ValueError(f"it holds a {type(stored).__name__}")
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({' '.join(str(error).split())}); delete it.") from error
    return stored


def _write(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=1, allow_nan=False, default=np.ndarray.tolist) + "\n")


def _write_text(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {path.parent} cannot be made: {error.strerror}; choose another --out."
        ) from error
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


# --- tables --------------------------------------------------------------------------------------------------------


def means(records: Sequence[Record], pooling: str) -> dict[str, Mean]:
    """Per column, over the sequences that have a value in it; those that failed have none.

    pooling="frames" takes J and F over the frames of all sequences together, and leaves out their decay, which has no
    meaning across sequences; everything else is a mean over sequences.
    """
    rows = [record.row() for record in records]
    found = {}
    for column in COLUMNS:
        values = [row[column] for row in rows if column in row]
        if values:
            found[column] = Mean(float(np.mean(values)), len(values))
    if pooling == "frames":
        for name, of in (("J", "jaccard"), ("F", "boundary_f")):
            scores = [getattr(record.scores, of) for record in records if record.scores is not None]
            frames = [values for values in scores if values is not None]
            mean, recall, decay = MASK_COLUMNS[name]
            if frames:
                pooled = summarise_masks(np.concatenate(frames))
                found[mean] = Mean(100 * pooled.mean, len(frames))
                found[recall] = Mean(100 * pooled.recall, len(frames))
                del found[decay]
    return found


def write_tables(folder: Path, header: Header, protocol: Protocol, records: Sequence[Record]) -> str:
    """Write results.json, .md and .csv, the same for the same records however they came about; return the Markdown."""
    mean = means(records, protocol.pooling)
    head = head_lines(header, protocol, records)
    values = {name: one.value for name, one in mean.items()} if header["whole_split"] else {}
    compared = differences(values, header["dataset"], header["variant"], protocol.name)
    text = markdown(head, records, mean, protocol, compared)
    result = {
        "head": head,
        "run": header,
        "sequences": [
            {
                "sequence": record.sequence,
                "num_frames": record.num_frames,
                "reason": record.reason,
                "scores": None if record.scores is None else dataclasses.asdict(record.scores),
                "row": record.row(),
            }
            for record in records
        ],
        "mean": {name: dataclasses.asdict(one) for name, one in mean.items()},
        "minus_published": [{"published": dataclasses.asdict(figures), "minus": less} for figures, less in compared],
    }
    _write(folder / "results.json", result)
    _write_text(folder / "results.md", text)
    _write_text(folder / "results.csv", comma_separated(head, records, mean, protocol))
    return text


def write_comparison(folder: Path, found: Mapping[str, Mapping[str, Mean]]) -> str:
    """Write side_by_side.md, a row of means for each name, and return it."""
    columns = [name for name in COLUMNS if any(name in mean for mean in found.values())]
    rows = [["checkpoint", *columns]]
    for name, mean in found.items():
        rows.append([name, *(rounded(c, mean[c].value) if c in mean else "" for c in columns)])
    text = "\n".join(markdown_table(rows)) + "\n"
    _write_text(folder / "side_by_side.md", text)
    return text


def head_lines(header: Header, protocol: Protocol, records: Sequence[Record]) -> dict[str, str]:
    """What stands above every table."""
    said, checkpoint = protocol.describe(header["dataset"]), header["checkpoint"]
    failed = sum(record.reason is not None for record in records)
    weights = f"{checkpoint['name']}, sha256 {checkpoint['sha256']}" if checkpoint else "none"
    lines = {
        "data set": header["dataset"],
        "method": header["method"],
        "protocol": said["protocol"],
        "split": f"{header['variant']}, {len(records)} sequences" + ("" if header["whole_split"] else " of it"),
        "frames": said["frames"],
        "stride": said["stride"],
        "alignment": said["alignment"],
        "checkpoint": weights,
        "seed": str(header["seed"]),
        "versions": ", ".join(f"{name} {version}" for name, version in header["versions"].items()),
        "failures": f"{failed} of {len(records)} sequences; the mean is over the other {len(records) - failed}",
    }
    return lines if header["seen_on_real_files"] else lines | {"note": NEVER_SEEN}


def markdown(
    head: Mapping[str, str],
    records: Sequence[Record],
    mean: Mapping[str, Mean],
    protocol: Protocol,
    compared: Sequence[tuple[Figures, dict[str, float]]],
) -> str:
    """Head, a row per sequence, the mean, and how far that is from what was published."""
    lines = [f"# {head['data set']}, {head['method']}, protocol {protocol.name}", ""]
    lines += [f"- {name}: {value}" for name, value in head.items()]
    lines += ["", *markdown_table(_cells(records, mean, protocol, rounded))]
    if compared:
        columns = [name for name in COLUMNS if any(name in less for _, less in compared)]
        rows = [["published", "note", *columns]]
        for figures, less in compared:
            cells = [
                f"{rounded(name, less[name], '+')} ({figures.values[name]:g})" if name in less else ""
                for name in columns
            ]
            rows.append([figures.method, figures.note, *cells])
        sources = "; ".join(dict.fromkeys(figures.source for figures, _ in compared))
        lines += ["", f"The mean minus the published figure (which follows in brackets). Source: {sources}.", ""]
        lines += markdown_table(rows)
    return "\n".join(lines) + "\n"


def comma_separated(
    head: Mapping[str, str], records: Sequence[Record], mean: Mapping[str, Mean], protocol: Protocol
) -> str:
    """The head in lines that begin with #, then the table with all digits."""
    text = io.StringIO()
    text.writelines(f"# {name}: {value}\n" for name, value in head.items())
    csv.writer(text, lineterminator="\n").writerows(_cells(records, mean, protocol, lambda _, value: repr(value)))
    return text.getvalue()


def _cells(
    records: Sequence[Record], mean: Mapping[str, Mean], protocol: Protocol, number: Callable[[str, float], str]
) -> list[list[str]]:
    """Column names, a row per sequence, the mean, and over how many sequences it is."""
    rows = [record.row() for record in records]
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    cells = [["sequence", "frames", *columns, "failed because"]]
    for record, row in zip(records, rows, strict=True):
        values = [number(name, row[name]) if name in row else "" for name in columns]
        cells.append([record.sequence, str(record.num_frames or ""), *values, record.reason or ""])
    frames = str(sum(record.num_frames or 0 for record in records if record.reason is None))
    pooled = "mean (J, F: of all frames)" if protocol.pooling == "frames" else "mean"
    cells.append([pooled, frames, *(number(name, mean[name].value) if name in mean else "" for name in columns), ""])
    counts = [str(mean[name].count) if name in mean else "" for name in columns]
    done = sum(record.reason is None for record in records)
    return [*cells, ["... over sequences", str(done), *counts, ""]]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def rounded(column: str, value: float, sign: str = "-") -> str:
    """Two digits of percentages, four of everything else."""
    return f"{value:{sign}.{2 if column.endswith('%') else 4}f}"
