"""Parts of the fast alignment against slow twins: derivatives by differences, dense solves, scales by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from alignment_runs import dis_flow, pairs_of, world
from scipy.spatial.transform import Rotation

from easi3r.alignment.bundle import Beliefs, Problem, Scatters, State
from easi3r.alignment.fusion import robust_mean, robust_rows, scales_of_pairs
from easi3r.alignment.lens import Lenses
from easi3r.alignment.matches import FlowField, sample
from easi3r.alignment.normal import BLOCK, BORDER, GRID, KNOTS, Normal
from easi3r.alignment.relative import RelativePoses, relative_poses
from easi3r.alignment.surfaces import Surface, knot_weights
from evaluation.pair_predictions import synthetic_predictions

N, SIZE = 4, (12, 16)
DICE = np.random.default_rng(3)


@pytest.fixture(scope="module")
def problem() -> Problem:
    """A small world of nonsense, in which every term has something to say."""
    pairs = np.array([[0, 1], [1, 0], [0, 2], [2, 3], [3, 1], [1, 1]])
    from easi3r.structures import PairFlow

    flow = PairFlow(pairs, DICE.normal(0, 1, (6, *SIZE, 2)).astype(np.float32), np.ones((6, *SIZE), dtype=bool))
    field = FlowField(flow, DICE.random((N, *SIZE)) < 0.1)
    spread = DICE.normal(size=(6, 6, 9))
    lens = Lenses(
        focal=torch.full((N, 2), 14.0, dtype=torch.float64),
        centre=torch.tensor([[7.5, 5.5]] * N, dtype=torch.float64),
        log_focal=torch.from_numpy(DICE.normal(0, 0.1, N)),
        log_focal_precision=torch.full((N,), 40.0, dtype=torch.float64),
        centre_precision=3.0,
        focal_free=torch.ones(N, dtype=torch.bool),
        shared_focal_free=True,
        centre_free=True,
    )
    beliefs = replace(
        Beliefs.of_lenses(lens, 2.0),
        pose_precision=torch.full((N, 6), 5.0, dtype=torch.float64),
        translation=torch.from_numpy(DICE.normal(0, 0.1, (N, 3))),
    )
    log_depth = torch.from_numpy(DICE.normal(1, 0.1, (N, SIZE[0] * SIZE[1]))).float()
    return Problem(
        size=SIZE,
        focal=lens.focal,
        centre=lens.centre,
        depth_precision=torch.tensor([0.0, 30.0, 0.0, 0.0], dtype=torch.float64),
        scaled=torch.tensor([1.0, 1.0, 0.0, 1.0]),
        pairs=torch.from_numpy(pairs),
        relative=RelativePoses(
            torch.from_numpy(Rotation.from_rotvec(DICE.normal(0, 0.05, (6, 3))).as_matrix()),
            torch.from_numpy(DICE.normal(0, 0.2, (6, 3))),
            torch.from_numpy(spread @ spread.transpose(0, 2, 1)),
        ),
        surfaces=[Surface.of(field.matches(frame, torch.arange(0, 192, 7)), log_depth, SIZE) for frame in range(N)],
        beliefs=beliefs,
        free=np.ones((N, BLOCK), dtype=bool),
        border_free=np.ones(BORDER, dtype=bool),
        unit=0.05,
        ignore_px=50.0,
    )


@pytest.fixture(scope="module")
def state() -> State:
    dice = np.random.default_rng(5)
    start = State.at_rest(N)
    return start.moved(dice.normal(0, 0.03, (N, BLOCK)), dice.normal(0, 0.03, BORDER))


@pytest.mark.parametrize("term", ["surfaces", "beliefs", "path"])
def test_gradients_are_those_of_the_cost(problem: Problem, state: State, term: str) -> None:
    """Where the cost is exact; of the pairs' term see the next test."""
    scatters = Scatters(correction=0.1, flow_px=0.7, log_depth=0.2, turn=0.05, shift=0.1)
    arguments = () if term == "path" else (scatters,)
    add = getattr(problem, f"add_{term}")
    normal = Normal(N)
    add(normal, state, *arguments)
    for index in [*DICE.choice(N * BLOCK, 40, replace=False), *range(N * BLOCK, N * BLOCK + BORDER)]:
        if term == "path" and index >= N * BLOCK:
            continue
        step = np.zeros(N * BLOCK + BORDER)
        step[index] = 1e-3 if term == "surfaces" else 1e-5
        costs = [
            add(Normal(N), state.moved(s[: N * BLOCK].reshape(N, BLOCK), s[N * BLOCK :]), *arguments)
            for s in (step, -step)
        ]
        by_differences = (costs[0] - costs[1]) / (2 * step[index])
        found = np.append(normal.gradient.reshape(-1), normal.border_gradient)[index]
        scale = np.abs(normal.gradient).max()
        # the turn of a believed pose is linearised: the two differ by half the angle, which is small here
        assert found == pytest.approx(by_differences, abs=(5e-3 if term == "surfaces" else 2e-2) * scale)


def test_pair_jacobians_are_those_of_the_residuals(problem: Problem, state: State) -> None:
    """Gauss-Newton's Hessian, with every weight 1, is that of residuals taken by differences."""
    scatters = Scatters(correction=0.1, turn=1e3, shift=1e3)  # so that no residual stands out
    normal = Normal(N)
    problem.add_pairs(normal, state, scatters)
    precision = 1e-6 * np.eye(6)
    apart = np.array([0, 1, 2, 3, 4])
    columns = []
    for index in range(N * BLOCK + BORDER):
        step = np.zeros(N * BLOCK + BORDER)
        step[index] = 1e-5
        ends = [
            problem.pair_residuals(state.moved(s[: N * BLOCK].reshape(N, BLOCK), s[N * BLOCK :]))[0].numpy()[apart]
            for s in (step, -step)
        ]
        columns.append(((ends[0] - ends[1]) / 2e-5).reshape(-1))
    jacobian = np.array(columns).T
    expected = jacobian.T @ np.kron(np.eye(5), precision) @ jacobian
    found = dense(normal)
    np.testing.assert_allclose(found, expected, atol=0.1 * np.abs(expected).max())
    assert np.abs(found - expected).mean() < 0.01 * np.abs(expected).max()


def dense(normal: Normal) -> np.ndarray:
    size = normal.num_frames * BLOCK
    matrix = np.zeros((size + BORDER, size + BORDER))
    for (i, j), block in normal.blocks.items():
        matrix[i * BLOCK : (i + 1) * BLOCK, j * BLOCK : (j + 1) * BLOCK] = block
        matrix[j * BLOCK : (j + 1) * BLOCK, i * BLOCK : (i + 1) * BLOCK] = block.T
    matrix[:size, size:] = normal.border.reshape(size, BORDER)
    matrix[size:, :size] = matrix[:size, size:].T
    matrix[size:, size:] = normal.corner
    return matrix


def test_the_band_with_its_border_solves_as_the_dense_matrix_does(problem: Problem, state: State) -> None:
    normal, _ = problem.linearised(state, Scatters(correction=0.1))
    free, border_free = (
        DICE.random((N, BLOCK)) < 0.8,
        np.array([False, True, False, True]),
    )  # (each frame has its own focal length)
    step, border = normal.solve(free, border_free, 1e-6)
    moves = np.append(free.reshape(-1), border_free)
    matrix = dense(normal) + 1e-6 * np.diag(np.diag(dense(normal)))
    gradient = np.append(normal.gradient.reshape(-1), normal.border_gradient)
    expected = np.zeros(len(gradient))
    expected[moves] = np.linalg.solve(matrix[np.ix_(moves, moves)], -gradient[moves])
    np.testing.assert_allclose(np.append(step.reshape(-1), border), expected, rtol=1e-5, atol=1e-7)
    assert not step[~free].any() and not border[~border_free].any()


def test_knots_sum_to_one_everywhere_and_a_plane_is_interpolated_exactly() -> None:
    pixel = torch.tensor([[0.0, 0.0], [15.0, 11.0], [3.3, 7.1]])
    weights = knot_weights(pixel, SIZE)
    assert weights.shape == (3, KNOTS)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3))
    rows, columns = GRID
    x_of_knots = torch.linspace(0, SIZE[1] - 1, columns).repeat(rows)
    torch.testing.assert_close(weights @ x_of_knots, pixel[:, 0])


def test_bilinear_samples_are_the_values_at_the_pixels() -> None:
    maps = torch.rand(2, *SIZE)
    at = torch.tensor([[[0.0, 0.0], [15.0, 11.0], [4.0, 5.0], [4.5, 5.0], [-3.0, 5.0]]]).repeat(2, 1, 1)
    expected = [maps[:, 0, 0], maps[:, 11, 15], maps[:, 5, 4], maps[:, 5, 4:6].mean(dim=1), maps[:, 5, 0]]
    torch.testing.assert_close(sample(maps, at), torch.stack(expected, dim=1))


def test_pair_scales_are_found_in_spite_of_a_pair_that_lies() -> None:
    pairs = torch.tensor([[a, b] for a in range(5) for b in range(5) if a != b])
    scale = torch.from_numpy(DICE.normal(size=len(pairs)))
    level = torch.from_numpy(DICE.normal(size=5))
    shift = scale[:, None] - level[pairs]
    shift[3] += torch.tensor([2.0, -1.0])
    found = scales_of_pairs(shift, pairs, 5)
    honest = [k for k in range(len(pairs)) if k != 3]
    torch.testing.assert_close((found - scale)[honest], (found - scale)[0].expand(19), atol=1e-3, rtol=0)
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)


def test_robust_means_ignore_outliers_and_what_has_no_weight() -> None:
    values = torch.tensor([[1.0, 5.0], [1.01, 5.1], [0.99, 4.9], [9.0, 5.0]])
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(robust_mean(values, weight), torch.tensor([1.0, 5.0]), atol=0.05, rtol=0)
    rows = torch.cat([torch.full((1, 50), 2.0), torch.full((1, 10), 40.0)], dim=1)
    torch.testing.assert_close(robust_rows(rows, torch.ones(1, 60)), torch.tensor([2.0]), atol=1e-3, rtol=0)
    assert float(robust_rows(rows, torch.zeros(1, 60))) == 0


def test_relative_poses_are_the_true_ones_whatever_moves() -> None:
    clip, pairs = world(0), pairs_of(world(0))
    predictions = synthetic_predictions(clip, pairs, hard=False, seed=0, noise=0.0)
    height, width = clip.depth.shape[1:]
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    f, (cx, cy) = clip.intrinsics[0, 0, 0], clip.intrinsics[0, :2, 2]
    ray = np.stack([(columns - cx) / f, (rows - cy) / f, np.ones_like(columns)]).reshape(3, -1)
    n = len(clip.images)
    found = relative_poses(
        predictions,
        torch.from_numpy(ray).float().expand(n, 3, -1),
        torch.full((n, 2), float(f)),
        torch.from_numpy(~clip.dynamic_mask).flatten(1),
        slice(None),
    )
    expected = np.linalg.inv(clip.camera_to_world[pairs[:, 0]]) @ clip.camera_to_world[pairs[:, 1]]
    np.testing.assert_allclose(found.rotation.numpy(), expected[:, :3, :3], atol=1e-5)
    np.testing.assert_allclose(found.translation.numpy(), expected[:, :3, 3], atol=1e-4)
    assert (np.linalg.eigvalsh(found.information.numpy()) > 0).all()


def test_matches_leave_out_what_moves_at_either_end() -> None:
    flow, mask = dis_flow(0), world(0).dynamic_mask
    height, width = mask.shape[1:]
    matches = FlowField(flow, mask).matches(2, torch.arange(height * width))
    for row, second in zip(np.flatnonzero(flow.pairs[:, 0] == 2), matches.second.tolist(), strict=True):
        target = flow.flow[row] + np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1)
        x, y = np.clip(target.round().astype(int).reshape(-1, 2), 0, [width - 1, height - 1]).T
        plain = flow.valid[row].reshape(-1) & ~mask[2].reshape(-1) & ~mask[second][y, x]
        assert (plain == matches.usable[list(matches.second).index(second)].numpy()).mean() > 0.98
