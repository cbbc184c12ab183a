"""The order of the stages, written once: a clip and a network in, what moves (and where everything is) out."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch

from easi3r._version import __version__
from easi3r.alignment import align
from easi3r.attention_maps import AttentionStatistics
from easi3r.backbones.checkpoint import CheckpointInfo
from easi3r.backbones.dust3r import Dust3r
from easi3r.config import Settings
from easi3r.dynamic_masks import add_flow, cluster_tokens, make_masks, prove
from easi3r.epipolar import epipolar_residual
from easi3r.errors import InputError
from easi3r.flow import estimate_flow
from easi3r.frames import read_frames
from easi3r.given_masks import read_masks
from easi3r.inference import empty_predictions, encode_frames, observe_pairs
from easi3r.pairs import make_pairs
from easi3r.progress import Progress
from easi3r.scene import Motion, Scene
from easi3r.structures import Array, AttentionMaps, DynamicMasks, Frames, PairPredictions


@torch.inference_mode(False)  # somebody may call us from within it, and the alignment needs gradients
def run(
    network: Dust3r,
    checkpoint: CheckpointInfo,
    source: Any,
    settings: Settings,
    progress: Progress,
    *,
    masks_only: bool,
) -> Motion:
    """Frames, pairs, optical flow, what moves (the network, twice), alignment.

    Returns a Scene, or with ``masks_only`` a Motion.
    """
    clock, patch_size, trained_size = Clock(), network.config.patch_size, max(network.config.img_size)
    with clock("frames"):
        frames = read_frames(
            source, settings.frames, patch_size=patch_size, trained_size=trained_size, progress=progress
        )
    n = frames.num_frames
    pairs = make_pairs(n, settings.pairs)
    with clock("flow"):
        alignment = settings.alignment
        aligns = not masks_only and alignment.method == "published" and alignment.flow_weight > 0
        asks = settings.motion.evidence != "attention" and settings.motion.masks is None
        wanted = (aligns or asks) and n > 1
        flow = estimate_flow(frames.images, pairs, settings.flow, progress) if wanted else None
        residual = epipolar_residual(flow, n, progress) if asks and flow is not None else None
    masks, attention, predictions = find_motion(
        network, frames, pairs, settings, progress, clock, residual=residual, with_points=not masks_only
    )
    moved: dict[str, Any] = {
        "images": frames.images,
        "dynamic_score": masks.score,
        "dynamic_mask": masks.mask,
        "attention": attention,
        "timestamps": frames.timestamps,
    }
    if predictions is None:
        return Motion(**moved, meta=describe(frames, checkpoint, settings, network, clock))

    with clock("alignment"):
        cameras = align(
            predictions,
            n,
            settings.alignment,
            progress,
            flow=flow if aligns else None,
            dynamic_mask=masks.mask,
            device=network.device,
        )
    return Scene(
        **moved,
        camera_to_world=cameras.camera_to_world,
        intrinsics=cameras.intrinsics,
        depth=cameras.depth,
        confidence=cameras.confidence,
        valid_mask=np.ones(cameras.depth.shape, dtype=bool),
        meta=describe(frames, checkpoint, settings, network, clock) | {"scale": "up to scale"},
    )


def find_motion(
    network: Dust3r,
    frames: Frames,
    pairs: Array,
    settings: Settings,
    progress: Progress,
    clock: Clock,
    *,
    residual: Array | None,
    with_points: bool,
) -> tuple[DynamicMasks, AttentionMaps, PairPredictions | None]:
    """Encoder once, decoders once or twice: masks of one pass cut the attention of the next.

    Masks, maps and points are those of the last pass; given masks need a single one, and are returned as they are.
    residual: [n, H, W] epipolar residuals, for masks that rest on flow too; None: masks as published.
    """
    n, height, width = frames.images.shape[:3]
    grid, patch_size = network.grid_of(height, width), network.config.patch_size
    given = None if settings.motion.masks is None else read_masks(settings.motion.masks, frames)
    with clock("encoder"):
        tokens = encode_frames(network, frames.images, settings.batch_size, progress)
        labels = cluster_tokens(tokens, settings.motion.clusters, settings.seed).reshape(n, *grid)

    masks, passes = given, 1 if given is not None else settings.motion.passes
    for number in range(1, passes + 1):
        with clock(f"pass {number}"):
            statistics = AttentionStatistics(n, grid)
            wanted = with_points and number == passes
            predictions = empty_predictions(pairs, height, width) if wanted else None
            observe_pairs(
                network,
                tokens,
                pairs,
                grid,
                statistics.update,
                progress,
                batch_size=settings.batch_size,
                dynamic_tokens=masks.tokens(patch_size) if masks is not None and masks.mask.any() else None,
                predictions=predictions,
            )
            attention = statistics.maps()
            if given is None:
                masks = make_masks(attention.dynamic_map, labels, patch_size)
                if residual is not None:
                    min_motion_px = settings.motion.min_motion * max(height, width)
                    both = settings.motion.evidence == "both"
                    masks = add_flow(masks, labels, residual, min_motion_px) if both else prove(residual, min_motion_px)
    assert masks is not None
    return masks, attention, predictions


class Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - begin, 3)


def describe(
    frames: Frames, checkpoint: CheckpointInfo, settings: Settings, network: Dust3r, clock: Clock
) -> dict[str, Any]:
    """``meta`` of a result: everything somebody needs to repeat it, as plain JSON values."""
    return {
        "source": frames.source,
        "names": list(frames.names),
        "crops": [dataclasses.asdict(crop) for crop in frames.crops],
        "settings": settings.as_dict(),
        "seed": settings.seed,
        "checkpoint": {"name": checkpoint.name, "sha256": checkpoint.sha256(), "licence": checkpoint.licence},
        "device": str(network.device),
        "versions": {
            "easi3r": __version__,
            "torch": torch.__version__,
            "opencv": cv2.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "timings_s": dict(clock.seconds),
    }


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one; raises InputError for a device that torch cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was built without
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"The device {name!r} cannot be used ({reason}); expected auto, cpu, cuda or cuda:1."
        ) from error
    return device
