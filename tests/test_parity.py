"""Every figure that the published implementation gives for the parity checkpoints, from the encoder to the masks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from easi3r import Easi3R
from easi3r.backbones.checkpoint import load_checkpoint
from easi3r.backbones.dust3r import Dust3r, PointmapPair
from easi3r.config import PairSettings
from easi3r.dynamic_masks import make_masks, smooth_by_cluster
from easi3r.inference import encode_frames
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.scene import Motion
from easi3r.structures import DynamicMasks
from hooks import capture_attention, cut_attention

POINTMAPS = {
    "points_first": "pts1",
    "points_second": "pts2",
    "confidence_first": "conf1",
    "confidence_second": "conf2",
}
MAPS = {
    "source_mean": "src_mean",
    "source_std": "src_std",
    "reference_mean": "ref_mean",
    "reference_std": "ref_std",
    "dynamic_map": "dynamic_map",
}


@dataclass(frozen=True)
class Case:
    """One checkpoint in our network, and what the published one computes with it."""

    path: Path
    network: Dust3r
    figures: NpzFile
    tokens: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        return self.network.grid_of(*self.figures["frames"].shape[1:3])

    def kept_pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        first, second = self.figures["pairs"][self.figures["kept_pairs"]].T
        return first, second


@pytest.fixture(scope="module", params=["dpt", "linear"])
def case(
    request: pytest.FixtureRequest,
    parity_file: Callable[[str, str], Path],
    parity_figures: Callable[[str], NpzFile],
) -> Case:
    path, figures = parity_file(request.param, "pth"), parity_figures(request.param)
    network, _ = load_checkpoint(path)
    return Case(path, network, figures, encode_frames(network, figures["frames"], 4, silent))


@pytest.fixture(scope="module")
def motion(case: Case) -> Motion:
    return segment(case.path, case.figures)


@pytest.fixture(scope="module")
def first_pass(case: Case) -> PointmapPair:
    return predict(case)


@pytest.fixture(scope="module")
def masked_pass(case: Case) -> PointmapPair:
    return predict(case, case.figures["given_masks"])


def segment(path: Path, figures: NpzFile) -> Motion:
    return Easi3R.from_pretrained(path, device="cpu").segment(figures["frames"], passes=1, image_size="native")


def relative(ours: Tensor, published: NDArray[np.float32]) -> float:
    assert ours.numel() == published.size
    return float(np.abs(ours.numpy().reshape(published.shape) - published).max() / np.abs(published).max())


def predict(case: Case, given_masks: NDArray[np.bool_] | None = None) -> PointmapPair:
    """The kept pairs; with masks, static tokens of the first view do not see dynamic tokens of the second."""
    first, second = case.kept_pairs()
    cut = nullcontext()
    if given_masks is not None:
        masks = DynamicMasks(given_masks.astype(np.float32), given_masks, None)
        dynamic = torch.from_numpy(masks.tokens(case.network.config.patch_size)).flatten(1)
        cut = cut_attention(case.network, ~dynamic[first], dynamic[second])
    with cut:
        decoded = case.network.decode(case.tokens[first], case.tokens[second], case.grid)
    return case.network.predict(decoded)


def test_encoder_tokens_are_the_published_ones(case: Case) -> None:
    assert relative(case.tokens, case.figures["encoder_tokens"]) < 1e-4


@pytest.mark.parametrize("ours", POINTMAPS)
def test_first_pass_points_and_confidences_are_the_published_ones(
    case: Case, first_pass: PointmapPair, ours: str
) -> None:
    assert relative(getattr(first_pass, ours), case.figures[f"first_{POINTMAPS[ours]}"]) < 1e-4


@pytest.mark.parametrize("ours", POINTMAPS)
def test_masked_pass_points_and_confidences_are_the_published_ones(
    case: Case, first_pass: PointmapPair, masked_pass: PointmapPair, ours: str
) -> None:
    published = case.figures[f"second_{POINTMAPS[ours]}"]
    assert relative(getattr(masked_pass, ours), published) < 1e-4
    assert relative(getattr(first_pass, ours), published) > 1e-3


def test_captured_attention_is_the_published_one(case: Case) -> None:
    first, second = case.figures["pairs"].T
    with capture_attention(case.network) as captured:
        case.network.decode(case.tokens[first], case.tokens[second], case.grid)
        source, reference = captured.take()
    for ours, name in ((source, "attention_source"), (reference, "attention_reference")):
        published = case.figures[name]
        assert ours.shape == (len(first), published.shape[1] * published.shape[2], published.shape[3])
        np.testing.assert_allclose(ours.numpy().reshape(published.shape), published, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ours", MAPS)
def test_maps_of_the_public_interface_are_the_published_ones(case: Case, motion: Motion, ours: str) -> None:
    published = case.figures[MAPS[ours]]
    assert np.ptp(published) > 0.5
    np.testing.assert_allclose(getattr(motion.attention, ours), published, rtol=0, atol=1e-4)


def test_pairs_are_the_published_ones(case: Case) -> None:
    ours, published = make_pairs(len(case.figures["frames"]), PairSettings()), case.figures["pairs"]
    assert len(ours) == len(published)
    assert set(map(tuple, ours.tolist())) == set(map(tuple, published.tolist()))


def test_masks_of_given_clusters_are_the_published_ones(case: Case, motion: Motion) -> None:
    figures, labels = case.figures, case.figures["cluster_labels"]
    masks = make_masks(motion.attention.dynamic_map, labels, case.network.config.patch_size)
    refined = smooth_by_cluster(motion.attention.dynamic_map, labels)
    np.testing.assert_allclose(refined, figures["refined_dynamic_map"], rtol=0, atol=1e-4)
    assert masks.threshold == pytest.approx(float(figures["threshold"]), abs=1e-3)
    assert 0.01 < figures["masks"].mean() < 0.99
    assert np.mean(masks.mask != figures["masks"]) < 1e-3


def test_folder_layout_holds_the_same_network(case: Case, parity_file: Callable[[str, str], Path]) -> None:
    folder = parity_file(case.path.stem, "folder")
    network, info = load_checkpoint(folder)
    assert network.config == case.network.config and info.path == folder / "model.safetensors"
    ours, theirs = network.state_dict(), case.network.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_folder_layout_gives_the_same_maps(parity_file: Callable[[str, str], Path], parity_figures) -> None:
    figures = parity_figures("linear")
    from_file, from_folder = (segment(parity_file("linear", layout), figures) for layout in ("pth", "folder"))
    for name, maps in from_file.attention.arrays().items():
        np.testing.assert_array_equal(getattr(from_folder.attention, name), maps)
