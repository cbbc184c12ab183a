"""The fast solver: cameras first, from what pairs and flow say of them; then every depth by itself.

1. Focal length from the rays of the first views (Weiszfeld); the relative pose of each pair by PnP.
2. The scales of the pairs by least squares; one depth map per frame, the robust mean of all looks at it.
3. Poses along the most certain tree of pairs, then all cameras together (:mod:`easi3r.alignment.bundle`); where poses
   are known, the world is brought to them, and all cameras are solved for once more.
4. Depth once more, pixel by pixel, with the flow (:mod:`easi3r.alignment.dense`).
"""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor
from torch.nn.functional import one_hot

from easi3r.alignment.bundle import PRIOR_SHARE, PRIOR_TURN, Beliefs, Problem, Scatters, State, adjust, knot_weights
from easi3r.alignment.dense import refined
from easi3r.alignment.fusion import LEAST_SCATTER, FusedDepth, Looks, fuse, fuse_all
from easi3r.alignment.initialise import sample_pixels
from easi3r.alignment.lens import Lenses, lenses
from easi3r.alignment.matches import FlowField, Matches
from easi3r.alignment.normal import BLOCK, BORDER, CENTRE, FOCAL, KNOT, KNOTS, POSE, SCALE, SHARED_FOCAL
from easi3r.alignment.relative import RelativePoses, poses_by_direction, relative_poses
from easi3r.config import AlignmentSettings, KnownSettings
from easi3r.progress import Progress
from easi3r.structures import AlignedCameras, Array, Known, PairFlow, PairPredictions

logger = logging.getLogger("easi3r")

SAMPLES = 320  # pixels of a frame that the cameras are solved from
PRIOR_LOG_DEPTH = 0.01  # a standard deviation of what a weight of 1 says
UNITS_AGREE = 2.0  # poses and depths whose units differ by more are not of one world


def solve(
    predictions: PairPredictions,
    num_frames: int,
    settings: AlignmentSettings,
    progress: Progress,
    *,
    dynamic_mask: Array,
    flow: PairFlow | None,
    known: Known,
    uses: KnownSettings,
) -> AlignedCameras:
    """See :func:`easi3r.alignment.align`."""
    n, (height, width) = num_frames, predictions.points_first.shape[1:3]
    size, everywhere = (int(height), int(width)), torch.arange(height * width)
    some = sample_pixels(height * width)
    lens = lenses(predictions, n, size, some, settings, known, uses)
    pixel = torch.stack([everywhere % width, everywhere // width], dim=1).float()
    rays = ((pixel - lens.centre[:, None].float()) / lens.focal[:, None].float()).mT
    rays = torch.cat([rays, torch.ones(n, 1, len(pixel))], dim=1)
    static = torch.from_numpy(~dynamic_mask).flatten(1)
    stages = iter(progress(range(4), "aligning"))

    next(stages)
    relative = relative_poses(predictions, rays, lens.focal.float(), static, some[::8])
    next(stages)
    looks = Looks(predictions, rays, relative, some)
    log_scale = fuse(looks)
    knots = knot_weights(pixel, size)
    fused = fuse_all(looks.on(everywhere), log_scale, one_hot(knots.argmax(dim=1), KNOTS).T.float())
    rough = replace(relative, translation=relative.translation * log_scale.exp()[:, None])
    relative = poses_by_direction(predictions, rays, lens.focal.float(), static, some[::2], fused.log_depth, rough)
    fused, shift, scaled = with_known_depth(fused, known, uses)
    believed = torch.zeros(n, len(everywhere))  # 1 / variance of log depth
    if known.depth is not None and uses.depth_use == "prior":
        believed += uses.depth_weight / PRIOR_LOG_DEPTH**2 * torch.from_numpy(np.isfinite(known.depth)).flatten(1)
    next(stages)
    pairs = torch.from_numpy(predictions.pairs)
    field = None if flow is None or not (pairs[:, 0] != pairs[:, 1]).any() else FlowField(flow, dynamic_mask)
    free, border_free = what_may_move(lens, scaled, field is not None, settings)
    problem = Problem(
        size=size,
        focal=lens.focal,
        centre=lens.centre,
        log_depth=fused.log_depth,
        depth_precision=believed.amax(dim=1).double(),
        scaled=scaled,
        pairs=pairs.flip(1),  # the first camera is known in the frame of the second
        relative=replace(relative, translation=relative.translation * np.exp(shift)),
        matches=[] if field is None else sampled_matches(field, static),
        beliefs=Beliefs.of_lenses(lens, settings.smoothness_weight),
        free=free,
        border_free=border_free,
        unit=PRIOR_SHARE * float(fused.log_depth.median().exp()),
        ignore_px=settings.flow_ignore_px,
    )
    start = State.at(*chained(problem.relative, problem.pairs, n))
    if settings.camera == "static":
        start = State.at(torch.eye(3, dtype=torch.float64).repeat(n, 1, 1), torch.zeros(n, 3, dtype=torch.float64))
    # as sure as the mean of so many looks is, were they independent
    scatters = Scatters(correction=fused.smooth_scatter / float(fused.looks.float().mean().sqrt()))
    state, scatters = adjust(problem, start, scatters)
    if len(known.posed()):
        problem, state = brought_to_known(problem, state, known, uses, settings)
        state, scatters = adjust(problem, state, scatters)
    next(stages)
    cameras = problem.cameras(state)
    log_depth = problem.log_depth + (state.correction.float() @ knots.T) + scaled[:, None] * state.log_scale
    if field is not None:
        precision = fused.looks[:, None] / fused.pixel_scatter**2 + believed
        log_depth = refined(field, cameras, log_depth, precision, scatters, settings.flow_ignore_px)
    next(stages, None)
    depth = log_depth.exp().unflatten(1, size).numpy()
    if known.depth is not None and uses.depth_use == "fixed":
        depth = np.where(np.isfinite(known.depth), known.depth, depth).astype(np.float32)
    poses = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = cameras.rotation.numpy(), cameras.translation.numpy()
    intrinsics = np.tile(np.eye(3, dtype=np.float32), (n, 1, 1))
    intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2] = cameras.focal.numpy(), cameras.centre.numpy()
    return AlignedCameras(poses, intrinsics, depth, highest_confidence(predictions, n))


def sampled_matches(field: FlowField, static: Tensor) -> list[Matches]:
    """Of every frame that begins a pair: at pixels drawn at random among those that are static, always the same."""
    dice, found = torch.Generator().manual_seed(0), []
    for frame in range(len(static)):
        order = (torch.rand(static.shape[1], generator=dice) + ~static[frame]).argsort()
        if len(field.rows[frame]):
            found.append(field.matches(frame, order[:SAMPLES].sort().values))
    return found


def what_may_move(lens: Lenses, scaled: Tensor, has_flow: bool, settings: AlignmentSettings) -> tuple[Array, Array]:
    """``free`` and ``border_free`` of a Problem: frame 0 is the origin; without flow only poses move."""
    free, border_free = np.zeros((len(scaled), BLOCK), dtype=bool), np.zeros(BORDER, dtype=bool)
    free[1:, POSE] = settings.camera == "moving"
    free[:, KNOT] = (has_flow & (scaled > 0)).numpy()[:, None]
    free[:, FOCAL] = has_flow & lens.focal_free.numpy()
    border_free[SHARED_FOCAL] = has_flow and lens.shared_focal_free
    border_free[CENTRE] = has_flow and lens.centre_free
    return free, border_free


def with_known_depth(fused: FusedDepth, known: Known, uses: KnownSettings) -> tuple[FusedDepth, float, Tensor]:
    """Known depths instead of, or averaged with, what the pairs say.

    Returns them in the user's unit, the shift of log depth that this is for what is not known, and [n]: 0 for the
    frames whose depth stays in that unit whatever the world's scale, else 1.
    """
    n = len(fused.log_depth)
    if known.depth is None or not known.depth_sets_the_scale:
        return fused, 0.0, torch.ones(n)
    given = torch.from_numpy(known.depth).flatten(1).log().float()
    there = given.isfinite()
    shift = float((given - fused.log_depth)[there].median())
    log_depth = fused.log_depth + shift
    if uses.depth_use == "fixed":
        own = torch.where(there, given - log_depth, torch.nan).nanmedian(dim=1, keepdim=True).values
        log_depth = torch.where(there, given, log_depth + own.nan_to_num(0.0))
    elif uses.depth_use == "prior":
        looks = fused.looks.float()[:, None]
        said = looks / max(fused.smooth_scatter**2 + fused.pixel_scatter**2, LEAST_SCATTER**2)
        weight = torch.where(there, uses.depth_weight / PRIOR_LOG_DEPTH**2 / said, 0.0)
        log_depth = (log_depth + weight * given.nan_to_num(0.0)) / (1 + weight)
    fixed = there.any(dim=1) & (uses.depth_use == "fixed")
    return replace(fused, log_depth=log_depth), shift, (~fixed).float()


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


def chained(relative: RelativePoses, pairs: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Camera poses along the spanning tree of the most certain pairs; frame 0 is the origin."""
    rotation = torch.eye(3, dtype=torch.float64).repeat(n, 1, 1)
    translation = torch.zeros(n, 3, dtype=torch.float64)
    information = relative.information.diagonal(dim1=1, dim2=2)[:, :3].sum(dim=1)
    certain = (information / information.max().clamp(min=1e-300)).clamp(min=1e-9).tolist()
    best: dict[tuple[int, int], int] = {}
    for k, (a, b) in enumerate(pairs.tolist()):
        edge = (min(a, b), max(a, b))
        if a != b and (edge not in best or certain[k] > certain[best[edge]]):
            best[edge] = k
    if not best:
        return rotation, translation
    rows, columns = np.array(list(best)).T
    cost = np.array([1 / certain[k] for k in best.values()])
    tree = minimum_spanning_tree(coo_matrix((cost, (rows, columns)), shape=(n, n)))
    order, parents = breadth_first_order(tree, 0, directed=False)
    for new in order[1:].tolist():
        known = int(parents[new])
        k = best[min(known, new), max(known, new)]
        turn, move = relative.rotation[k], relative.translation[k]
        if int(pairs[k, 0]) != known:
            turn, move = turn.T, -turn.T @ move
        rotation[new] = rotation[known] @ turn
        translation[new] = rotation[known] @ move + translation[known]
    return rotation, translation


def highest_confidence(predictions: PairPredictions, n: int) -> Array:
    """[n, H, W] float32 the highest that any pair gives a pixel; 1 where none is finite."""
    confidence = np.ones((n, *predictions.confidence_first.shape[1:]), dtype=np.float32)
    for view, said in enumerate((predictions.confidence_first, predictions.confidence_second)):
        for row, frame in enumerate(predictions.pairs[:, view].tolist()):
            one = said[row].float().nan_to_num(1.0, 1.0, 1.0).numpy()
            np.maximum(confidence[frame], one, out=confidence[frame])
    return confidence
