"""Rendered worlds, the noisy pair predictions of worlds.md, and what the alignment makes of them (test support)."""

from functools import cache
from typing import Any

import numpy as np

from easi3r.alignment import align
from easi3r.config import AlignmentSettings, FlowSettings, PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import Family, make_world
from easi3r.flow import estimate_flow
from easi3r.metrics import absolute_trajectory_error, depth_errors, path_length
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import AlignedCameras, PairFlow
from evaluation.pair_predictions import synthetic_predictions

SEEDS = range(6)


def ate(camera_to_world: np.ndarray, truth: np.ndarray) -> float:
    """ATE over the length of the true path."""
    return absolute_trajectory_error(camera_to_world, truth) / path_length(truth)


def static_absrel(answer: AlignedCameras, clip: Clip) -> float:
    """AbsRel of the static pixels, one scale for the clip."""
    return depth_errors(answer.depth, clip.depth, ~clip.dynamic_mask, "scale").abs_rel


@cache
def world(seed: int, num_frames: int = 12) -> Clip:
    return render(make_world(seed, Family(num_movers=3), num_frames=num_frames))


def pairs_of(clip: Clip) -> np.ndarray:
    return make_pairs(len(clip.images), PairSettings())


@cache
def dis_flow(seed: int) -> PairFlow:
    return estimate_flow(world(seed).images, pairs_of(world(seed)), FlowSettings(), silent)


@cache
def aligned(seed: int, *, hard: bool, flow: bool = False, masked: bool = True, method: Any = "fast") -> AlignedCameras:
    clip = world(seed)
    predictions = synthetic_predictions(clip, pairs_of(clip), hard=hard, seed=seed)
    return align(
        predictions,
        len(clip.images),
        AlignmentSettings(method=method),
        silent,
        dynamic_mask=clip.dynamic_mask if masked else np.zeros_like(clip.dynamic_mask),
        flow=dis_flow(seed) if flow else None,
    )


def path_errors(seeds: range = SEEDS, **variant: Any) -> np.ndarray:
    return np.array([ate(aligned(s, **variant).camera_to_world, world(s).camera_to_world) for s in seeds])
