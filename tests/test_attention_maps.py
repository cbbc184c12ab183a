import numpy as np
import pytest
import torch

from easi3r.attention_maps import AttentionStatistics, replace_sink

GRID = (3, 4)
N, C = 12, 6


def random_maps(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, N, C, generator=torch.Generator().manual_seed(seed))


def statistics_of(
    pairs: np.ndarray, source: torch.Tensor, reference: torch.Tensor, num_frames: int
) -> AttentionStatistics:
    statistics = AttentionStatistics(num_frames, GRID)
    statistics.update(pairs, source, reference)
    return statistics


def scaled(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min() + 1e-6)


def plain_map(maps: np.ndarray, frames: np.ndarray, num_frames: int, reduce: str) -> np.ndarray:
    """One of the four maps by storing every pair: statistic per frame, min-max, mean over channels, min-max."""
    replaced = maps.copy()
    replaced[:, 0] = (maps[:, 1] + maps[:, GRID[1]]) / 2
    stacks = [replaced[frames == i] for i in range(num_frames)]
    stack = np.stack([s.mean(0) if reduce == "mean" else s.std(0, ddof=1) for s in stacks])
    return scaled(scaled(stack).mean(-1)).reshape(num_frames, *GRID)


def test_streamed_maps_equal_maps_from_stored_pairs() -> None:
    pairs = np.array([[a, b] for a in range(4) for b in range(4) if a != b])
    source, reference = random_maps(len(pairs), 1), random_maps(len(pairs), 2)
    statistics = AttentionStatistics(4, GRID)
    for start in range(0, len(pairs), 5):
        part = slice(start, start + 5)
        statistics.update(pairs[part], source[part], reference[part])
    maps = statistics.maps()
    expected = {
        "source_mean": plain_map(source.numpy(), pairs[:, 1], 4, "mean"),
        "source_std": plain_map(source.numpy(), pairs[:, 1], 4, "std"),
        "reference_mean": plain_map(reference.numpy(), pairs[:, 0], 4, "mean"),
        "reference_std": plain_map(reference.numpy(), pairs[:, 0], 4, "std"),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(maps, name), value, atol=1e-5, err_msg=name)
    product = (1 - expected["source_mean"]) * expected["source_std"] * expected["reference_mean"]
    product *= 1 - expected["reference_std"]
    dynamic = np.stack([scaled(frame) for frame in product])
    np.testing.assert_allclose(maps.dynamic_map, dynamic, atol=1e-4)


def test_two_frames_are_scored_by_the_means_alone() -> None:
    pairs = np.array([[0, 1], [1, 0]])
    maps = statistics_of(pairs, random_maps(2, 1), random_maps(2, 2), 2).maps()
    assert not maps.source_std.any()
    assert not maps.reference_std.any()
    expected = np.stack([scaled(frame) for frame in (1 - maps.source_mean) * maps.reference_mean])
    np.testing.assert_allclose(maps.dynamic_map, expected, atol=1e-5)
    assert maps.dynamic_map.max() > 0.99


def test_a_frame_seen_once_among_others_seen_often_uses_its_means() -> None:
    pairs = np.array([[0, 1], [1, 2], [1, 0], [2, 1]])
    maps = statistics_of(pairs, random_maps(4, 1), random_maps(4, 2), 3).maps()
    assert not maps.source_std[[0, 2]].any()
    assert maps.source_std[1].max() > 0.99
    assert all(np.isfinite(value).all() for value in maps.arrays().values())


def test_nothing_varies_where_all_pairs_show_the_same() -> None:
    pairs = np.array([[0, 1], [1, 0]])
    same = random_maps(1).expand(2, N, C)
    rounding = 1 + 1e-6 * random_maps(2, 5)
    statistics = statistics_of(pairs, same * rounding, same, 2)
    assert statistics.nothing_varies()
    assert not statistics.maps().dynamic_map.any()


def test_a_change_of_one_percent_counts_as_variation() -> None:
    pairs = np.array([[0, 1], [1, 0]])
    same = random_maps(1).expand(2, N, C)
    assert not statistics_of(pairs, same + 0.01 * random_maps(2, 5), same, 2).nothing_varies()


def test_all_maps_lie_between_0_and_1() -> None:
    pairs = np.array([[a, b] for a in range(3) for b in range(3) if a != b])
    maps = statistics_of(pairs, 1e3 * random_maps(6, 1), random_maps(6, 2), 3).maps()
    for name, value in maps.arrays().items():
        assert value.shape == (3, *GRID), name
        assert value.dtype == np.float32, name
        assert 0 <= value.min() <= value.max() <= 1, name


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((2, 3), (1 + 3) / 2), ((1, 4), 1.0), ((4, 1), 1.0), ((1, 1), 0.0)],
)
def test_the_sink_takes_the_mean_of_the_neighbours_that_exist(grid: tuple[int, int], expected: float) -> None:
    maps = torch.arange(float(grid[0] * grid[1])).reshape(1, -1, 1).repeat(2, 1, 3)
    replaced = replace_sink(maps, grid)
    assert (replaced[:, 0] == expected).all()
    assert torch.equal(replaced[:, 1:], maps[:, 1:])
