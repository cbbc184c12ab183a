"""What can be chosen of an export."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from easi3r.errors import InputError, nearest_name
from easi3r.progress import Progress, silent

if TYPE_CHECKING:
    from easi3r.scene import Keep


@dataclass(frozen=True)
class ExportOptions:
    """One set for all formats; each heeds what it has a use for.  Raises InputError for impossible values."""

    keep: Keep | None = None  # which points ply, glb and npz hold (None: those the scene was reconstructed for);
    # colmap and nerfstudio hold the static ones
    min_confidence: float = 1.0  # points of less are left out
    max_points: int | None = (
        None  # in all; None: 100 000 in colmap and nerfstudio, 1 000 000 in glb, else all there are
    )
    original_images: bool = False  # colmap and nerfstudio: the frames of the source at their size, with their K
    overwrite: bool = False  # replace an earlier export
    progress: Progress = silent

    def __post_init__(self) -> None:
        if self.keep not in (None, "all", "static", "dynamic"):
            raise InputError(f"keep is {self.keep!r}; expected 'all', 'static' or 'dynamic'.")
        if not isinstance(self.min_confidence, (int, float)) or not math.isfinite(self.min_confidence):
            raise InputError(f"min_confidence is {self.min_confidence!r}; expected a number, such as 1.5.")
        if self.max_points is not None and not (type(self.max_points) is int and self.max_points >= 1):
            raise InputError(f"max_points is {self.max_points!r}; expected a whole number from 1 on, or None.")

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> ExportOptions:
        """Raises InputError for an unknown name too."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in known:
                raise InputError(
                    f"The option {name!r} of an export is unknown{nearest_name(name, known)}; expected "
                    f"{', '.join(known)}."
                )
        return cls(**keywords)
