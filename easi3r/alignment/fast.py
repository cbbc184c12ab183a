"""The fast solver: cameras first, from what pairs and flow say of them; then every depth by itself.

1. Focal length from the rays of the first views (Weiszfeld); the relative pose of each pair by PnP.
2. The scales of the pairs by least squares; one depth map per frame, the robust mean of all looks at it.
3. Poses along the most certain tree of pairs, then all cameras together (:mod:`easi3r.alignment.bundle`); where poses
   are known, the world is brought to them, and all cameras are solved for once more.
4. Depth once more, pixel by pixel, with the flow (:mod:`easi3r.alignment.dense`).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor
from torch.nn.functional import one_hot

from easi3r.alignment.bundle import PRIOR_SHARE, Beliefs, Problem, Scatters, State, adjust
from easi3r.alignment.constraints import brought_to_known, what_may_move, with_known_depth
from easi3r.alignment.dense import refined
from easi3r.alignment.fusion import FusedDepth, Looks, fuse, fuse_all
from easi3r.alignment.lens import Lenses, lenses
from easi3r.alignment.matches import Cameras, FlowField
from easi3r.alignment.normal import KNOTS
from easi3r.alignment.relative import RelativePoses, poses_by_direction, relative_poses, spread
from easi3r.alignment.surfaces import Surface, knot_weights
from easi3r.config import AlignmentSettings, KnownSettings
from easi3r.progress import Progress
from easi3r.structures import AlignedCameras, Array, Known, PairFlow, PairPredictions

ROUGH_POINTS, FINE_POINTS = 800, 4000  # pixels of a pair that its relative pose is found from, first and then
SAMPLES = 320  # pixels of a frame that the cameras are solved from


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
    pixel = torch.stack([everywhere % width, everywhere // width], dim=1).float()
    pairs, static = torch.from_numpy(predictions.pairs), ~torch.from_numpy(dynamic_mask).flatten(1)
    stages = iter(progress(range(3), "aligning"))

    next(stages)
    lens = lenses(predictions, n, size, settings, known, uses)
    knots = knot_weights(pixel, size)
    relative, fused = what_pairs_say(predictions, lens, pixel, static, knots)
    depths = with_known_depth(fused, known, uses)
    next(stages)
    field = None if flow is None or not (pairs[:, 0] != pairs[:, 1]).any() else FlowField(flow, dynamic_mask)
    free, border_free = what_may_move(lens, depths.scaled, field is not None, settings)
    problem = Problem(
        size=size,
        focal=lens.focal,
        centre=lens.centre,
        depth_precision=depths.believed.amax(dim=1).double(),
        scaled=depths.scaled,
        pairs=pairs.flip(1),  # the first camera is known in the frame of the second
        relative=replace(relative, translation=relative.translation * np.exp(depths.shift)),
        surfaces=[] if field is None else sampled_surfaces(field, static, depths.fused.log_depth),
        beliefs=Beliefs.of_lenses(lens, settings.smoothness_weight),
        free=free,
        border_free=border_free,
        unit=PRIOR_SHARE * float(depths.fused.log_depth.median().exp()),
        ignore_px=settings.flow_ignore_px,
    )
    start = State.at_rest(n) if settings.camera == "static" else chained(problem.relative, problem.pairs, n)
    # as sure as the mean of so many looks is, were they independent
    scatters = Scatters(correction=fused.smooth_scatter / float(fused.looks.float().mean().sqrt()))
    state, scatters = adjust(problem, start, scatters)
    if len(known.posed()):
        problem, state = brought_to_known(problem, state, known, uses, settings)
        state, scatters = adjust(problem, state, scatters)
    next(stages)
    cameras = problem.cameras(state)
    log_depth = depths.fused.log_depth + state.correction.float() @ knots.T + depths.scaled[:, None] * state.log_scale
    if field is not None:
        precision = fused.looks[:, None] / fused.pixel_scatter**2 + depths.believed
        log_depth = refined(field, cameras, log_depth, precision, scatters, settings.flow_ignore_px)
    depth = log_depth.exp().unflatten(1, size).numpy()
    if known.depth is not None and uses.depth_use == "fixed":
        depth = np.where(np.isfinite(known.depth), known.depth, depth).astype(np.float32)
    next(stages, None)
    return answer(cameras, depth, predictions)


def what_pairs_say(
    predictions: PairPredictions, lens: Lenses, pixel: Tensor, static: Tensor, knots: Tensor
) -> tuple[RelativePoses, FusedDepth]:
    """Relative pose of the first camera of each pair in the frame of its second, and depth of the frames, in one unit.

    pixel: [N, 2] (x, y).  static: [n, N] bool.  knots: [N, G] weights.
    """
    focal, size = lens.focal.float(), (predictions.points_first.shape[1], predictions.points_first.shape[2])
    rays = ((pixel - lens.centre[:, None].float()) / focal[:, None]).mT
    rays = torch.cat([rays, torch.ones(len(rays), 1, len(pixel))], dim=1)
    relative = relative_poses(predictions, rays, focal, static, spread(ROUGH_POINTS, size))
    looks = Looks(predictions, rays, relative)
    log_scale = fuse(looks)
    cells = one_hot(knots.argmax(dim=1), KNOTS).T.float()
    fused = fuse_all(looks, log_scale, cells)
    rough = replace(relative, translation=relative.translation * log_scale.exp()[:, None])
    return poses_by_direction(
        predictions, rays, focal, static, spread(FINE_POINTS, size), fused.log_depth, rough
    ), fused


def sampled_surfaces(field: FlowField, static: Tensor, log_depth: Tensor) -> list[Surface]:
    """Of every frame that begins a pair: at pixels drawn at random among those that are static, always the same."""
    dice, found = torch.Generator().manual_seed(0), []
    for frame in range(len(static)):
        order = (torch.rand(static.shape[1], generator=dice) + ~static[frame]).argsort()
        if len(field.rows[frame]):
            found.append(Surface.of(field.matches(frame, order[:SAMPLES].sort().values), log_depth, field.size))
    return found


def chained(relative: RelativePoses, pairs: Tensor, n: int) -> State:
    """Camera poses along the spanning tree of the most certain pairs; frame 0 is the origin."""
    start = State.at_rest(n)
    information = relative.information.diagonal(dim1=1, dim2=2)[:, :3].sum(dim=1)
    certain = (information / information.max().clamp(min=1e-300)).clamp(min=1e-9).tolist()
    best: dict[tuple[int, int], int] = {}
    for k, (a, b) in enumerate(pairs.tolist()):
        edge = (min(a, b), max(a, b))
        if a != b and (edge not in best or certain[k] > certain[best[edge]]):
            best[edge] = k
    if not best:
        return start
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
        start.rotation[new] = start.rotation[known] @ turn
        start.translation[new] = start.rotation[known] @ move + start.translation[known]
    return start


def answer(cameras: Cameras, depth: Array, predictions: PairPredictions) -> AlignedCameras:
    """depth: [n, H, W] float32."""
    n = len(depth)
    poses, intrinsics = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1)), np.tile(np.eye(3, dtype=np.float32), (n, 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = cameras.rotation.numpy(), cameras.translation.numpy()
    intrinsics[:, [0, 1], [0, 1]], intrinsics[:, :2, 2] = cameras.focal.numpy(), cameras.centre.numpy()
    return AlignedCameras(poses, intrinsics, depth, highest_confidence(predictions, n))


def highest_confidence(predictions: PairPredictions, n: int) -> Array:
    """[n, H, W] float32 the highest that any pair gives a pixel; 1 where none is finite."""
    confidence = np.ones((n, *predictions.confidence_first.shape[1:]), dtype=np.float32)
    for view, said in enumerate((predictions.confidence_first, predictions.confidence_second)):
        for row, frame in enumerate(predictions.pairs[:, view].tolist()):
            one = said[row].float().nan_to_num(1.0, 1.0, 1.0).numpy()
            np.maximum(confidence[frame], one, out=confidence[frame])
    return confidence
