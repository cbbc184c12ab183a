"""easi3r: a video of a moving world in, a 4D scene out, training-free.

    from easi3r import Easi3R, Scene

    model = Easi3R.from_pretrained("naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt")
    scene = model.reconstruct("clip.mp4")
    scene.save("out")

Saved scenes open where torch is absent: nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from easi3r import _shadowing
from easi3r._version import __version__
from easi3r.errors import Easi3RError

if TYPE_CHECKING:
    from easi3r.batches import batch as batch
    from easi3r.config import Settings as Settings
    from easi3r.model import Easi3R as Easi3R
    from easi3r.scene import Motion as Motion
    from easi3r.scene import PointCloud as PointCloud
    from easi3r.scene import Scene as Scene

_HOMES = {
    "Easi3R": "easi3r.model",
    "Motion": "easi3r.scene",
    "PointCloud": "easi3r.scene",
    "Scene": "easi3r.scene",
    "Settings": "easi3r.config",
    "batch": "easi3r.batches",
}

__all__ = ["Easi3R", "Easi3RError", "Motion", "PointCloud", "Scene", "Settings", "__version__", "batch"]

_shadowing.check_hooks()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'easi3r' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
