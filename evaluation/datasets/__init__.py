"""Data sets in their official layouts, read without a preprocessing step."""

from __future__ import annotations

from evaluation.datasets.adt import Adt
from evaluation.datasets.davis import Davis
from evaluation.datasets.dycheck import DyCheck
from evaluation.datasets.sequence import Dataset, Sequence
from evaluation.datasets.sintel import Sintel
from evaluation.datasets.tum import Bonn, Tum
from evaluation.datasets.worlds import Worlds

__all__ = ["DATASETS", "Dataset", "Sequence"]

DATASETS: dict[str, type[Dataset]] = {
    dataset.name: dataset for dataset in (Davis, Sintel, Tum, Bonn, DyCheck, Adt, Worlds)
}
