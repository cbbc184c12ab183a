"""A start for the alignment: the strongest spanning tree of pairs, focal by Weiszfeld, poses by PnP (DUSt3R 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import roma
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

from easi3r.alignment.observations import Observations

START_POINTS = 20_000  # pixels of a frame that the start looks at; it only has to be near
PNP_POINTS = 4000  # enough for a pose; RANSAC's time grows with them
PNP_ERROR_PX = 5.0
MIN_PNP_POINTS = 6
MIN_DEPTH = 1e-3  # relative to the scene's median


@dataclass(frozen=True)
class Start:
    """Cameras and depths in one world whose unit is the median depth."""

    camera_to_world: Tensor  # [n, 4, 4]
    focal_px: Tensor  # [n]
    depth: Tensor  # [n, N]
    pair_rotation: Tensor  # [P, 3, 3] world from the first view's camera
    pair_translation: Tensor  # [P, 3]
    pair_scale: Tensor  # [P]


def initialise(observations: Observations, *, shared_focal: bool, focal_px: float | None = None) -> Start:
    """Chain the pairs of a spanning tree into one world, then read cameras, depths and pair similarities off it.

    focal_px: the focal length of all frames where it is known.
    """
    n = observations.num_frames
    sample = sample_pixels(observations.points.shape[-1])
    if focal_px is None:
        focal = torch.stack([frame_focal(observations, frame, sample) for frame in range(n)])
        focal = focal.median().expand(n).clone() if shared_focal else focal
    else:
        focal = torch.full((n,), focal_px)
    world, weight = chain_points(observations, sample)
    rotation, translation, scale = pair_similarities(observations, world, sample)
    poses = torch.eye(4).repeat(n, 1, 1)
    for i in range(n):
        pose = pose_by_pnp(world[i], weight[i], float(focal[i]), observations.size)
        if pose is None:  # the pair that starts in this frame has a pose for it too
            k = observations.pair[observations.is_first & (observations.frame == i)][0]
            pose = rotation[k], translation[k]
        poses[i, :3, :3], poses[i, :3, 3] = pose
    depth = torch.einsum("nj,njp->np", poses[:, :3, 2], world - poses[:, :3, 3:])
    depth = depth.clamp(min=MIN_DEPTH * float(depth.abs().median()) + 1e-12)
    unit = depth.median()  # so that weights and learning rates mean the same for every scene
    poses[:, :3, 3] /= unit
    return Start(poses, focal, depth / unit, rotation, translation / unit, scale / unit)


def sample_pixels(num_pixels: int) -> Tensor:
    """Indices of at most ``START_POINTS`` pixels, ascending; scattered at random, but always the same."""
    if num_pixels <= START_POINTS:
        return torch.arange(num_pixels)
    return torch.randperm(num_pixels, generator=torch.Generator().manual_seed(0))[:START_POINTS].sort().values


def frame_focal(observations: Observations, frame: int, sample: Tensor) -> Tensor:
    """Focal length in pixels of one frame: the median over the pairs in which it is the first view."""
    pixels = centred_pixels(observations.size)[:, sample]
    focals = [
        weiszfeld_focal(observations.points[o][:, sample], observations.weight[o, sample], pixels)
        for o in (observations.is_first & (observations.frame == frame)).nonzero()[:, 0].tolist()
    ]
    return torch.stack(focals).median()


def weiszfeld_focal(points: Tensor, weight: Tensor, pixels: Tensor, iterations: int = 10) -> Tensor:
    """Focal that minimises the sum of weighted distances |pixel - f * (x, y) / z|, by Weiszfeld's reweighting.

    points: [3, N] in the camera's own frame.  weight: [N].  pixels: [2, N] from the principal point.
    Twice the largest |pixel| (53 degrees along that axis) where no point lies in front of the camera.
    """
    usable = (points[2] > 1e-6) & (weight > 0)
    half_side = pixels.abs().max().clamp(min=0.5)
    if not usable.any():
        return 2 * half_side
    ray = points[:2, usable] / points[2, usable]
    pixel, weight = pixels[:, usable], weight[usable]
    reweighted = weight
    for _ in range(iterations):
        focal = (reweighted * (pixel * ray).sum(0)).sum() / (reweighted * (ray * ray).sum(0)).sum().clamp(min=1e-12)
        reweighted = weight / torch.hypot(*(pixel - focal * ray)).clamp(min=1e-6)
    # an opening between 5 and 170 degrees: what lies outside is no camera but a bad prediction
    return torch.minimum(torch.maximum(focal, 0.1 * half_side), 24 * half_side)


def chain_points(observations: Observations, sample: Tensor) -> tuple[Tensor, Tensor]:
    """World points [n, 3, N] of every frame and their weights [n, N], by Procrustes along the strongest tree."""
    views = observations.views_of_pairs()
    ends = observations.frame[views].tolist()  # of each pair: first and second frame
    score = observations.mean_confidence[views].prod(dim=1).tolist()
    strongest: dict[tuple[int, int], int] = {}  # of the two directions
    for k, (a, b) in enumerate(ends):
        edge = (min(a, b), max(a, b))
        if edge not in strongest or score[k] > score[strongest[edge]]:
            strongest[edge] = k
    root = max(strongest.values(), key=lambda k: score[k])
    num_pixels = observations.points.shape[-1]
    world = torch.zeros(observations.num_frames, 3, num_pixels)
    weight = torch.zeros(observations.num_frames, num_pixels)
    for view in reversed(views[root].tolist()):  # of a frame paired with itself, the first view stays
        world[observations.frame[view]] = observations.points[view]
        weight[observations.frame[view]] = observations.weight[view]
    for known, new, k in _tree_walk(strongest, score, observations.num_frames, ends[root][0]):
        if new not in ends[root]:
            known_view, new_view = views[k].tolist() if ends[k][0] == known else reversed(views[k].tolist())
            rotation, translation, scale = procrustes(
                observations.points[known_view][:, sample],
                world[known][:, sample],
                observations.weight[known_view, sample] * weight[known, sample],
            )
            world[new] = scale * (rotation @ observations.points[new_view]) + translation[:, None]
            weight[new] = observations.weight[new_view]
    return world, weight


def _tree_walk(
    strongest: dict[tuple[int, int], int], score: list[float], n: int, root: int
) -> list[tuple[int, int, int]]:
    """Edges (known frame, new frame, pair) of the maximum spanning tree, outwards from ``root``."""
    rows, columns = np.array(list(strongest)).T
    values = np.array([score[k] for k in strongest.values()])
    cost = 1 + values.max() - values  # positive: a zero would mean no edge
    tree = minimum_spanning_tree(coo_matrix((cost, (rows, columns)), shape=(n, n)))
    order, parents = breadth_first_order(tree, root, directed=False)
    walk = [(int(parents[node]), int(node)) for node in order[1:]]
    return [(known, new, strongest[min(known, new), max(known, new)]) for known, new in walk]


def pose_by_pnp(world: Tensor, weight: Tensor, focal_px: float, size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
    """Camera-to-world rotation [3, 3] and translation [3] from world points [3, N] of a frame's pixels.

    RANSAC-PnP on the more confident half of the pixels; None where too few of them agree.
    """
    index = ((weight >= weight.median()) & (weight > 0)).nonzero()[:, 0]
    index = index[:: max(1, len(index) // PNP_POINTS)]
    if len(index) < MIN_PNP_POINTS:
        return None
    found, rotation, translation, _ = cv2.solvePnPRansac(
        world[:, index].T.double().contiguous().numpy(),
        centred_pixels(size)[:, index].T.double().contiguous().numpy(),
        np.diag([focal_px, focal_px, 1.0]),
        None,
        iterationsCount=100,
        reprojectionError=PNP_ERROR_PX,
        flags=cv2.SOLVEPNP_SQPNP,
    )
    if not found or not np.isfinite(rotation).all() or not np.isfinite(translation).all():
        return None
    world_to_camera = cv2.Rodrigues(rotation)[0]
    centre = -world_to_camera.T @ translation[:, 0]
    return torch.from_numpy(world_to_camera.T).float(), torch.from_numpy(centre).float()


def pair_similarities(observations: Observations, world: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation [P, 3, 3], translation [P, 3] and scale [P] that carry each pair's points onto the world's."""
    found = []
    for views in observations.views_of_pairs():
        source = torch.cat([observations.points[view][:, sample] for view in views], dim=1)
        target = torch.cat([world[observations.frame[view]][:, sample] for view in views], dim=1)
        weight = torch.cat([observations.weight[view, sample] for view in views])
        found.append(procrustes(source, target, weight))
    rotation, translation, scale = (torch.stack(parts) for parts in zip(*found, strict=True))
    return rotation, translation, scale


def procrustes(
    source: Tensor, target: Tensor, weight: Tensor, *, with_scale: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Rotation, translation, scale of the weighted least-squares similarity from [3, N] onto [3, N].

    The identity where nothing has weight or the points do not spread.
    """
    if float(weight.sum()) > 0 and float((source * weight).std()) > 0:
        rotation, translation, *scaling = roma.rigid_points_registration(
            source.T.double(), target.T.double(), weights=weight.double(), compute_scaling=with_scale
        )
        scale = scaling[0] if scaling else torch.ones((), dtype=torch.float64)
        if torch.isfinite(rotation).all() and float(scale) > 1e-6:
            return rotation.float(), translation.float(), scale.float()
    return torch.eye(3), torch.zeros(3), torch.ones(())


def centred_pixels(size: tuple[int, int]) -> Tensor:
    """[2, H * W] (x, y) relative to the image's centre, row-major."""
    height, width = size
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([columns - (width - 1) / 2, rows - (height - 1) / 2]).flatten(1)
