"""Global alignment: one world for all pair predictions (DUSt3R 3.4, MonST3R 3.3, Easi3R 3.3)."""

from __future__ import annotations

import numpy as np
import torch

from easi3r.alignment import fast, optimise
from easi3r.alignment.join import join_piece, later_half
from easi3r.config import AlignmentSettings, KnownSettings
from easi3r.errors import InputError
from easi3r.progress import Progress
from easi3r.structures import AlignedCameras, Array, Known, PairFlow, PairPredictions

__all__ = ["align", "join_piece", "later_half"]

NOTHING_KNOWN, DEFAULT_USES = Known(), KnownSettings()


def align(
    predictions: PairPredictions,
    num_frames: int,
    settings: AlignmentSettings,
    progress: Progress,
    *,
    dynamic_mask: Array,
    flow: PairFlow | None = None,
    known: Known = NOTHING_KNOWN,
    uses: KnownSettings = DEFAULT_USES,
    device: torch.device | None = None,
) -> AlignedCameras:
    """Bring all pairs into one world.

    dynamic_mask: [n, H, W] bool, True = moves; these pixels take no part in finding the cameras.
    flow: optical flow of the pairs; None leaves it out.
    known: what the user knows; ``uses`` says what of it is fixed, believed, or a start.
    device: where the published optimiser works; None: the CPU, where the fast one always is.

    Frame 0 is the origin, unless poses are known.  Raises InputError for what the method cannot take.
    """
    if settings.method in ("auto", "fast"):
        with torch.no_grad():
            return fast.solve(
                predictions,
                num_frames,
                settings,
                progress,
                dynamic_mask=dynamic_mask,
                flow=flow,
                known=known,
                uses=uses,
            )
    return optimise.solve(
        predictions,
        num_frames,
        settings,
        progress,
        dynamic_mask=dynamic_mask,
        flow=flow,
        focal_px=_only_a_focal_length(known, uses, settings, predictions.points_first.shape[1:3]),
        device=device or torch.device("cpu"),
    )


def _only_a_focal_length(
    known: Known, uses: KnownSettings, settings: AlignmentSettings, size: tuple[int, ...]
) -> float | None:
    """All that the published optimiser takes; InputError for more."""
    focal_px, takes = None, known.camera_to_world is None and known.depth is None and settings.camera == "moving"
    if known.intrinsics is not None:
        focal_px = float(known.intrinsics[0, 0, 0])
        middle = np.array([[focal_px, 0, (size[1] - 1) / 2], [0, focal_px, (size[0] - 1) / 2], [0, 0, 1]])
        takes &= uses.intrinsics_use == "fixed" and np.allclose(known.intrinsics, middle, rtol=1e-2, atol=0.51)
    if not takes or settings.principal_point == "solve":
        raise InputError(
            f"align={settings.method!r} knows one fixed focal length and the image's centre, no more; expected "
            "align='fast' for known poses, depths and other intrinsics, a static camera or a free principal point."
        )
    return focal_px
