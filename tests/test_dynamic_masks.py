import numpy as np
import pytest
import torch

from easi3r.dynamic_masks import cluster_tokens, make_masks, smooth_by_cluster
from easi3r.structures import DynamicMasks


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
