"""The published optimiser: Adam over cameras, depths and pair similarities together."""

from __future__ import annotations

import roma
import torch
from torch import Tensor, nn

from easi3r.alignment.initialise import Start, initialise
from easi3r.alignment.losses import FlowTargets, World, flow_loss, flow_targets, point_loss, smoothness_loss
from easi3r.alignment.observations import Observations, observe, on_device
from easi3r.config import AlignmentSettings
from easi3r.progress import Progress
from easi3r.structures import AlignedCameras, Array, PairFlow, PairPredictions

FOCAL_RATE = 0.05  # a log-focal step is this much of the learning rate: focal and depth trade off along a long valley


class Unknowns(nn.Module):
    """Everything that is solved for.  The geometric mean of the pair scales is held at its start (the world's unit)."""

    def __init__(self, start: Start, size: tuple[int, int], *, shared_focal: bool) -> None:
        super().__init__()
        self.size = size
        self.num_frames = len(start.depth)
        focal = start.focal_px[:1] if shared_focal else start.focal_px
        self.quaternion = nn.Parameter(roma.rotmat_to_unitquat(start.camera_to_world[:, :3, :3]))
        self.translation = nn.Parameter(start.camera_to_world[:, :3, 3].clone())
        self.focal = nn.Parameter(focal.log() / FOCAL_RATE)
        self.log_depth = nn.Parameter(start.depth.log())
        self.pair_quaternion = nn.Parameter(roma.rotmat_to_unitquat(start.pair_rotation))
        self.pair_translation = nn.Parameter(start.pair_translation.clone())
        self.pair_log_scale = nn.Parameter(start.pair_scale.log())
        self.mean_log_scale = float(self.pair_log_scale.detach().mean())

    def world(self) -> World:
        return World(
            rotation=_rotation(self.quaternion),
            translation=self.translation,
            focal_px=(self.focal * FOCAL_RATE).exp().expand(self.num_frames),
            depth=self.log_depth.exp(),
            pair_rotation=_rotation(self.pair_quaternion),
            pair_translation=self.pair_translation,
            pair_scale=(self.pair_log_scale - self.pair_log_scale.mean() + self.mean_log_scale).exp(),
            size=self.size,
        )


def _rotation(quaternion: Tensor) -> Tensor:
    return roma.unitquat_to_rotmat(quaternion / quaternion.norm(dim=1, keepdim=True))  # type: ignore[no-any-return]


def solve(
    predictions: PairPredictions,
    num_frames: int,
    settings: AlignmentSettings,
    progress: Progress,
    *,
    dynamic_mask: Array,
    flow: PairFlow | None,
    focal_px: float | None,
    device: torch.device,
) -> AlignedCameras:
    """See :func:`easi3r.alignment.align`.  focal_px: of all frames, held fixed; None: it is solved for."""
    observations = observe(predictions, num_frames)
    start = initialise(observations, shared_focal=settings.shared_focal, focal_px=focal_px)
    unknowns = Unknowns(start, observations.size, shared_focal=settings.shared_focal)
    unknowns.focal.requires_grad_(focal_px is None)
    if settings.method == "published":
        targets = None if flow is None else flow_targets(flow, dynamic_mask)
        optimise(unknowns, observations, targets, settings, progress, device)
    return _answer(unknowns, observations)


@torch.enable_grad()
def optimise(
    unknowns: Unknowns,
    observations: Observations,
    targets: FlowTargets | None,
    settings: AlignmentSettings,
    progress: Progress,
    device: torch.device,
) -> None:
    """Adam with a linearly falling rate; moves ``unknowns`` in place."""
    unknowns.to(device)
    observations = on_device(observations, device)
    targets = None if targets is None else on_device(targets, device)
    optimiser = torch.optim.Adam(unknowns.parameters(), betas=(0.9, 0.9))
    for iteration in progress(range(settings.iterations), "aligning"):
        done = iteration / settings.iterations
        optimiser.param_groups[0]["lr"] = max(settings.learning_rate * (1 - done), settings.final_learning_rate)
        optimiser.zero_grad()
        world = unknowns.world()
        points = world.camera_points()
        loss = point_loss(world, points, observations)
        if targets is not None and done >= settings.flow_start:
            loss = loss + settings.flow_weight * flow_loss(
                world, points, targets, ignore_px=settings.flow_ignore_px, drop_px=settings.flow_drop_px
            )
        if settings.smoothness_weight > 0 and observations.num_frames > 1:
            loss = loss + settings.smoothness_weight * smoothness_loss(world)
        loss.backward()
        optimiser.step()
    unknowns.to("cpu")


@torch.no_grad()
def _answer(unknowns: Unknowns, observations: Observations) -> AlignedCameras:
    """Move frame 0 to the origin and return numpy arrays."""
    world = unknowns.world()
    height, width = observations.size
    n = observations.num_frames
    to_first = world.rotation[0].T.double()
    poses = torch.eye(4, dtype=torch.float64).repeat(n, 1, 1)
    poses[:, :3, :3] = to_first @ world.rotation.double()
    poses[:, :3, 3] = (world.translation - world.translation[0]).double() @ to_first.T
    poses[0] = torch.eye(4)
    intrinsics = torch.eye(3).repeat(n, 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = world.focal_px
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = (width - 1) / 2, (height - 1) / 2
    return AlignedCameras(
        camera_to_world=poses.float().numpy(),
        intrinsics=intrinsics.numpy(),
        depth=world.depth.unflatten(1, (height, width)).numpy(),
        confidence=observations.frame_confidence.unflatten(1, (height, width)).numpy(),
    )
