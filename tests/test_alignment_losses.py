"""The fused terms of the alignment against the same terms written plainly, with autograd."""

import numpy as np
import pytest
import roma
import torch

from easi3r.alignment.losses import World, flow_loss, flow_targets, point_loss, smoothness_loss
from easi3r.alignment.observations import observe
from easi3r.structures import PairFlow, PairPredictions

N, H, W = 3, 4, 5
PAIRS = np.array([[0, 1], [1, 2], [1, 0], [2, 1]])


def make_world(seed: int = 0) -> World:
    torch.manual_seed(seed)
    parameters = {
        "rotation": roma.rotvec_to_rotmat(0.1 * torch.randn(N, 3, dtype=torch.float64)),
        "translation": 0.2 * torch.randn(N, 3, dtype=torch.float64),
        "focal_px": 5 + torch.rand(N, dtype=torch.float64),
        "depth": 2 + torch.rand(N, H * W, dtype=torch.float64),
        "pair_rotation": roma.rotvec_to_rotmat(0.1 * torch.randn(len(PAIRS), 3, dtype=torch.float64)),
        "pair_translation": 0.2 * torch.randn(len(PAIRS), 3, dtype=torch.float64),
        "pair_scale": 1 + 0.1 * torch.rand(len(PAIRS), dtype=torch.float64),
    }
    return World(**{name: value.requires_grad_() for name, value in parameters.items()}, size=(H, W))


def make_predictions() -> PairPredictions:
    torch.manual_seed(1)
    p = len(PAIRS)
    return PairPredictions(
        pairs=PAIRS,
        points_first=torch.randn(p, H, W, 3, dtype=torch.float64),
        points_second=torch.randn(p, H, W, 3, dtype=torch.float64),
        confidence_first=1 + torch.rand(p, H, W, dtype=torch.float64),
        confidence_second=1 + torch.rand(p, H, W, dtype=torch.float64),
    )


def make_flow(seed: int = 2, scale: float = 1.0) -> tuple[PairFlow, np.ndarray]:
    rng = np.random.default_rng(seed)
    flow = PairFlow(PAIRS, scale * rng.standard_normal((len(PAIRS), H, W, 2)), rng.random((len(PAIRS), H, W)) < 0.8)
    return flow, rng.random((N, H, W)) < 0.2


def world_point(world: World, frame: int, row: int, column: int) -> torch.Tensor:
    return world.rotation[frame] @ camera_point(world, frame, row, column) + world.translation[frame]


def camera_point(world: World, frame: int, row: int, column: int) -> torch.Tensor:
    z = world.depth[frame, row * W + column]
    ray = torch.tensor([column - (W - 1) / 2, row - (H - 1) / 2], dtype=torch.float64) / world.focal_px[frame]
    return torch.cat([ray * z, z[None]])


def plain_point_loss(world: World, predictions: PairPredictions) -> torch.Tensor:
    views = (
        (predictions.points_first, predictions.confidence_first),
        (predictions.points_second, predictions.confidence_second),
    )
    total = torch.zeros((), dtype=torch.float64)
    for k, pair in enumerate(PAIRS):
        for frame, (points, confidence) in zip(pair, views, strict=True):
            for row in range(H):
                for column in range(W):
                    said = (
                        world.pair_scale[k] * world.pair_rotation[k] @ points[k, row, column]
                        + world.pair_translation[k]
                    )
                    distance = (world_point(world, frame, row, column) - said).norm()
                    total = total + confidence[k, row, column].log() * distance
    return total / (len(PAIRS) * H * W)


def plain_flow_loss(
    world: World, flow: PairFlow, dynamic: np.ndarray, ignore_px: float, drop_px: float
) -> torch.Tensor:
    taken = []
    for k, (a, b) in enumerate(PAIRS):
        for row in range(H):
            for column in range(W):
                if dynamic[a, row, column] or not flow.valid[k, row, column]:
                    continue
                y = world.rotation[b].T @ (world_point(world, a, row, column) - world.translation[b])
                seen = world.focal_px[b] * y[:2] / y[2]
                here = torch.tensor([column - (W - 1) / 2, row - (H - 1) / 2], dtype=torch.float64)
                target = torch.from_numpy(flow.flow[k, row, column])
                loss = torch.nn.functional.smooth_l1_loss(seen - here, target, reduction="sum")
                if float(loss.detach()) < ignore_px:
                    taken.append(loss)
    mean = torch.stack(taken).mean()
    return mean if float(mean.detach()) < drop_px else 0 * mean


def gradients(loss: torch.Tensor, world: World) -> dict[str, torch.Tensor]:
    names = [name for name, value in vars(world).items() if isinstance(value, torch.Tensor)]
    found = torch.autograd.grad(loss, [getattr(world, name) for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(getattr(world, name)) if g is None else g for name, g in zip(names, found, strict=True)
    }


def assert_same(fused: torch.Tensor, plain: torch.Tensor, world: World) -> None:
    torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)
    expected = gradients(plain, world)
    for name, gradient in gradients(fused, world).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-10, msg=name)


def test_point_loss_and_its_gradient_equal_the_plain_sum() -> None:
    world, predictions = make_world(), make_predictions()
    fused = point_loss(world, world.camera_points(), observe(predictions, N))
    assert_same(fused, plain_point_loss(world, predictions), world)


@pytest.mark.parametrize(("scale", "ignore_px", "drop_px"), [(1.0, 50.0, 25.0), (3.0, 4.0, 25.0)])
def test_flow_loss_and_its_gradient_equal_the_plain_sum(scale: float, ignore_px: float, drop_px: float) -> None:
    world, (flow, dynamic) = make_world(), make_flow(scale=scale)
    fused = flow_loss(world, world.camera_points(), flow_targets(flow, dynamic), ignore_px=ignore_px, drop_px=drop_px)
    assert float(fused.detach()) > 0
    assert_same(fused, plain_flow_loss(world, flow, dynamic, ignore_px, drop_px), world)


def test_flow_loss_is_dropped_whole_where_its_mean_is_too_large() -> None:
    world, (flow, dynamic) = make_world(), make_flow(scale=20.0)
    targets = flow_targets(flow, dynamic)
    loss = flow_loss(world, world.camera_points(), targets, ignore_px=1e9, drop_px=1.0)
    assert float(loss.detach()) == 0
    assert all(float(g.abs().max()) == 0 for g in gradients(loss, world).values())


def test_flow_loss_is_zero_where_everything_moves() -> None:
    world, (flow, dynamic) = make_world(), make_flow()
    targets = flow_targets(flow, np.ones_like(dynamic))
    assert float(flow_loss(world, world.camera_points(), targets, ignore_px=50, drop_px=25).detach()) == 0


def test_a_point_that_is_not_finite_weighs_nothing() -> None:
    world, predictions = make_world(), make_predictions()
    predictions.points_first[0, 0, 0, 1] = torch.inf
    predictions.confidence_second[1, 2, 3] = torch.nan
    observations = observe(predictions, N)
    assert int((observations.weight == 0).sum()) == 2
    assert torch.isfinite(point_loss(world, world.camera_points(), observations))


def test_smoothness_is_zero_for_a_camera_that_rests_and_grows_with_its_steps() -> None:
    world = make_world()
    still = World(
        **{**vars(world), "rotation": world.rotation[:1].expand(N, 3, 3), "translation": torch.ones(N, 3).double()}
    )
    assert float(smoothness_loss(still).detach()) == pytest.approx(0, abs=1e-12)
    moving = World(**{**vars(still), "translation": torch.tensor([[0.0, 0, 0], [1, 0, 0], [3, 0, 0]]).double()})
    assert float(smoothness_loss(moving).detach()) == pytest.approx(1.5)
