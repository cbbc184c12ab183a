from itertools import combinations, pairwise

import numpy as np
import pytest
import torch

from easi3r.dynamic_masks import best_multi_otsu, cluster_tokens, make_masks, multi_otsu, smooth_by_cluster
from easi3r.structures import DynamicMasks


def exhaustive_otsu(counts: np.ndarray, centres: np.ndarray, classes: int) -> float:
    """The largest between-class variance over all choices of thresholds."""
    probability = counts / counts.sum()
    best = -np.inf
    for cuts in combinations(range(1, len(counts)), classes - 1):
        best = max(best, between_class_variance(probability, centres, cuts))
    return best


def between_class_variance(probability: np.ndarray, centres: np.ndarray, cuts: tuple[int, ...]) -> float:
    edges = [0, *cuts, len(probability)]
    total = 0.0
    mean = (probability * centres).sum()
    for a, b in pairwise(edges):
        weight = probability[a:b].sum()
        if weight > 0:
            total += weight * ((probability[a:b] * centres[a:b]).sum() / weight - mean) ** 2
    return total


@pytest.mark.parametrize("classes", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_multi_otsu_reaches_the_best_of_all_choices(classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 20, 18) * (rng.random(18) < 0.8)
    centres = np.linspace(0.1, 0.9, 18)
    thresholds = multi_otsu(counts, centres, classes)
    cuts = tuple(int(np.searchsorted(centres, t)) + 1 for t in thresholds)
    found = between_class_variance(counts / counts.sum(), centres, cuts)
    assert found == pytest.approx(exhaustive_otsu(counts, centres, classes), rel=1e-9)
    assert len(thresholds) == classes - 1
    assert (np.diff(thresholds) > 0).all()


def test_the_threshold_separates_two_clear_groups() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.2, 0.02, 900), rng.normal(0.8, 0.02, 100)])
    threshold = best_multi_otsu(values)
    assert threshold is not None
    assert (values[:900] < threshold).mean() > 0.99
    assert (values[900:] > threshold).mean() > 0.5


def test_values_that_are_all_the_same_have_no_threshold() -> None:
    assert best_multi_otsu(np.full((2, 8, 8), 0.3)) is None


def test_two_values_have_a_threshold_between_them() -> None:
    values = np.array([0.0] * 10 + [1.0] * 3)
    threshold = best_multi_otsu(values)
    assert threshold is not None
    assert ((values > threshold) == (values == 1)).all()


def test_every_token_takes_the_mean_of_its_cluster() -> None:
    dynamic = np.array([[[0.0, 1.0], [0.5, 0.2]]], dtype=np.float32)
    labels = np.array([[[0, 1], [0, 1]]])
    smoothed = smooth_by_cluster(dynamic, labels)  # means 0.25 and 0.6, then 0 and 1
    np.testing.assert_allclose(smoothed, [[[0, 1], [0, 1]]], atol=1e-5)


def test_masks_of_a_map_without_variation_are_empty() -> None:
    masks = make_masks(np.zeros((3, 2, 4), np.float32), np.zeros((3, 2, 4), np.int64), 16)
    assert masks.threshold is None
    assert masks.mask.shape == masks.score.shape == (3, 32, 64)
    assert not masks.mask.any()


def test_a_moving_block_is_found_where_it_is() -> None:
    dynamic = np.zeros((2, 6, 8), np.float32)
    dynamic[:, 2:4, 3:6] = 1.0
    labels = np.arange(dynamic.size).reshape(dynamic.shape)
    masks = make_masks(dynamic, labels, 16)
    assert masks.mask[:, 2 * 16 + 8 : 4 * 16 - 8, 3 * 16 + 8 : 6 * 16 - 8].all()
    assert not masks.mask[:, : 16 + 8].any()
    assert masks.score.dtype == np.float32
    assert 0 <= masks.score.min() <= masks.score.max() <= 1


def test_clusters_are_the_same_for_the_same_seed_and_as_many_as_asked() -> None:
    tokens = torch.randn(4, 30, 16, generator=torch.Generator().manual_seed(0))
    one, two = (cluster_tokens(tokens, 8, seed=3) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert one.shape == (4, 30)
    assert len(np.unique(one)) == 8


def test_separate_groups_of_tokens_become_separate_clusters() -> None:
    centres = 100 * torch.eye(4)
    membership = torch.arange(40) % 4
    tokens = (centres[membership] + torch.randn(40, 4, generator=torch.Generator().manual_seed(0)))[None]
    labels = cluster_tokens(tokens, 4, seed=0)[0]
    for k in range(4):
        assert len(np.unique(labels[membership == k])) == 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_there_are_never_more_clusters_than_tokens(count: int) -> None:
    labels = cluster_tokens(torch.randn(1, count, 8), 64, seed=0)
    assert labels.max() < count


def test_identical_tokens_can_be_clustered() -> None:
    labels = cluster_tokens(torch.ones(2, 50, 8), 64, seed=0)
    assert labels.shape == (2, 50)


def test_a_token_is_dynamic_if_any_of_its_pixels_is() -> None:
    mask = np.zeros((1, 32, 48), dtype=bool)
    mask[0, 31, 47] = mask[0, 0, 16] = True
    tokens = DynamicMasks(mask.astype(np.float32), mask, None).tokens(16)
    np.testing.assert_array_equal(tokens, [[[False, True, False], [False, False, True]]])
