"""The figures others have published, from ``published.yaml``, and how far a run is from those of its own protocol."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Figures:
    """One row of a published table for one data set."""

    dataset: str
    variant: str | None  # None: of every variant the data set is read in
    protocol: str
    source: str
    method: str
    note: str  # with what the method was run, and what is known of the figures; '' if nothing
    values: dict[str, float]  # by the names of our columns


@functools.cache
def published() -> tuple[Figures, ...]:
    """All of them, in the order of the file."""
    tables = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    return tuple(figures for table in tables for figures in _flatten(table))


def _flatten(table: Mapping[str, Any]) -> list[Figures]:
    found = []
    for row in table["rows"]:
        for name, column in table["columns"].items():
            notes = [row.get("note"), column.get("note"), table.get("note")]
            values = dict(zip(table["metrics"], map(float, row[name]), strict=True))
            found.append(
                Figures(
                    dataset=column["dataset"],
                    variant=column.get("variant"),
                    protocol=table["protocol"],
                    source=table["source"],
                    method=row["method"],
                    note="; ".join(note for note in notes if note),
                    values=values,
                )
            )
    return found


def differences(
    means: Mapping[str, float], dataset: str, variant: str, protocol: str
) -> list[tuple[Figures, dict[str, float]]]:
    """Ours minus theirs, by column, for every published row of this data set, variant and protocol."""
    found = []
    for figures in published():
        same = figures.dataset == dataset and figures.variant in (None, variant) and figures.protocol == protocol
        less = {name: means[name] - value for name, value in figures.values.items() if name in means}
        if same and less:
            found.append((figures, less))
    return found
