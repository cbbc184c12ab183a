"""Where a result comes from: everything that somebody needs to repeat it."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import cv2
import numpy as np
import torch

from easi3r._version import __version__
from easi3r.backbones.files import CheckpointInfo
from easi3r.backbones.interface import Backbone
from easi3r.clock import Clock
from easi3r.config import Settings
from easi3r.structures import Frames


def describe(
    frames: Frames, checkpoint: CheckpointInfo, settings: Settings, network: Backbone, clock: Clock
) -> dict[str, Any]:
    """The part of ``meta`` that says how a result was made, as plain JSON values."""
    return {
        "source": frames.source,
        "names": list(frames.names),
        "crops": [dataclasses.asdict(crop) for crop in frames.crops],
        "settings": settings.as_dict(),
        "seed": settings.seed,
        "checkpoint": checkpoint.describe() | {"network": network.kind},
        "device": str(network.device),
        "dtype": str(network.dtype).removeprefix("torch."),
        "versions": {
            "easi3r": __version__,
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "timings_s": dict(clock.seconds),
    }
