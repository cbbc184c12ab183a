"""What the user knows, brought into the alignment: depths, cameras, and what is left to move."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from easi3r.alignment.bundle import PRIOR_TURN, Problem, State
from easi3r.alignment.fusion import LEAST_SCATTER, FusedDepth
from easi3r.alignment.lens import Lenses
from easi3r.alignment.normal import BLOCK, BORDER, CENTRE, FOCAL, KNOT, POSE, SCALE, SHARED_FOCAL
from easi3r.config import AlignmentSettings, KnownSettings
from easi3r.structures import Array, Known

logger = logging.getLogger("easi3r")

PRIOR_LOG_DEPTH = 0.01  # a standard deviation of what a weight of 1 says
UNITS_AGREE = 2.0  # poses and depths whose units differ by more are not of one world


def what_may_move(lens: Lenses, scaled: Tensor, has_flow: bool, settings: AlignmentSettings) -> tuple[Array, Array]:
    """``free`` and ``border_free`` of a Problem: frame 0 is the origin; without flow only poses move."""
    free, border_free = np.zeros((len(scaled), BLOCK), dtype=bool), np.zeros(BORDER, dtype=bool)
    free[1:, POSE] = settings.camera == "moving"
    free[:, KNOT] = (has_flow & (scaled > 0)).numpy()[:, None]
    free[:, FOCAL] = has_flow & lens.focal_free.numpy()
    border_free[SHARED_FOCAL] = has_flow and lens.shared_focal_free
    border_free[CENTRE] = has_flow and lens.centre_free
    return free, border_free


@dataclass(frozen=True)
class Depths:
    """What is said of every depth before cameras are solved for."""

    fused: FusedDepth  # in the unit of the known depths, if there are any
    shift: float  # of log depth, from the pairs' common unit to that
    scaled: Tensor  # [n] float32: 0 for frames whose depth keeps that unit whatever the world's scale, else 1
    believed: Tensor  # [n, N] float32, 1 / variance of log depth


def with_known_depth(fused: FusedDepth, known: Known, uses: KnownSettings) -> Depths:
    """Known depths instead of, or averaged with, what the pairs say."""
    n, nothing = len(fused.log_depth), torch.zeros_like(fused.log_depth)
    if known.depth is None or not known.depth_sets_the_scale:
        return Depths(fused, 0.0, torch.ones(n), nothing)
    given = torch.from_numpy(known.depth).flatten(1).log().float()
    there = given.isfinite()
    shift = float((given - fused.log_depth)[there].median())
    log_depth, believed, scaled = fused.log_depth + shift, nothing, torch.ones(n)
    if uses.depth_use == "fixed":
        own = torch.where(there, given - log_depth, torch.nan).nanmedian(dim=1, keepdim=True).values
        log_depth = torch.where(there, given, log_depth + own.nan_to_num(0.0))
        scaled = 1.0 - there.any(dim=1).float()
    elif uses.depth_use == "prior":
        looks = fused.looks.float()[:, None]
        said = looks / max(fused.smooth_scatter**2 + fused.pixel_scatter**2, LEAST_SCATTER**2)
        believed = uses.depth_weight / PRIOR_LOG_DEPTH**2 * there
        weight = believed / said
        log_depth = (log_depth + weight * given.nan_to_num(0.0, 0.0, 0.0)) / (1 + weight)
    return Depths(replace(fused, log_depth=log_depth), shift, scaled, believed)


def brought_to_known(
    problem: Problem, state: State, known: Known, uses: KnownSettings, settings: AlignmentSettings
) -> tuple[Problem, State]:
    """The world moved to where the known cameras are; then these are fixed, believed, or no more than a start."""
    assert known.camera_to_world is not None
    given = torch.from_numpy(known.camera_to_world)
    there = given.isfinite().flatten(1).all(dim=1)
    turn, place = given[:, :3, :3].nan_to_num(0.0), given[:, :3, 3].nan_to_num(0.0)
    u, _, vt = torch.linalg.svd((turn[there] @ state.rotation[there].mT).sum(dim=0))
    rotation = u @ torch.diag(torch.tensor([1.0, 1.0, float(torch.det(u @ vt))], dtype=torch.float64)) @ vt
    ours, theirs = (x - x.mean(dim=0) for x in (state.translation[there], place[there]))
    apart = float(theirs.norm()) > 1e-9 and float(ours.norm()) > 1e-9 * problem.unit
    scale = float(theirs.norm() / ours.norm()) if apart else 1.0
    if known.depth is not None and uses.depth_use != "init":
        if not 1 / UNITS_AGREE < scale < UNITS_AGREE:
            logger.warning(
                "the given path is %.3g times as long as the given depths suggest; expected both in one unit", scale
            )
        scale, apart = 1.0, False
    moved = replace(
        state,
        rotation=rotation @ state.rotation,
        translation=scale * (state.translation - state.translation[there].mean(dim=0)) @ rotation.T
        + place[there].mean(dim=0),
        log_scale=state.log_scale + float(np.log(scale)),
    )
    if settings.camera == "static":
        there = there | True
        turn, place = (x[there.nonzero()[0, 0]].expand_as(x) for x in (turn, place))
    moved = replace(
        moved,
        rotation=torch.where(there[:, None, None], turn, moved.rotation),
        translation=torch.where(there[:, None], place, moved.translation),
    )
    free, border_free = problem.free.copy(), problem.border_free.copy()
    free[:, POSE] = settings.camera == "moving"
    if uses.poses_use == "fixed":
        free[there.numpy(), POSE] = False
    elif uses.poses_use == "init":
        free[int(there.nonzero()[0, 0]), POSE] = False
    border_free[SCALE] = apart and uses.poses_use != "init"
    beliefs, unit = problem.beliefs, problem.unit * scale
    if uses.poses_use == "prior":
        sure: Tensor = uses.poses_weight * torch.tensor([PRIOR_TURN**-2] * 3 + [unit**-2] * 3, dtype=torch.float64)
        beliefs = replace(
            beliefs, rotation=moved.rotation, translation=moved.translation, pose_precision=there[:, None] * sure
        )
    return replace(problem, free=free, border_free=border_free, beliefs=beliefs, unit=unit), moved
