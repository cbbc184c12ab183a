"""The evidence's own arithmetic: signals that are known, scores that are known, a table that runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from easi3r.config import PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import Family, make_world
from easi3r.pairs import make_pairs
from evaluation import checkpoint, signals
from evaluation.checkpoint import Labels, best_iou, mean_and_error, separate


@pytest.fixture(scope="module")
def clip() -> Clip:
    return render(make_world(1, num_frames=5), 64, 48)


def test_labels_are_the_majority_of_a_token(clip: Clip) -> None:
    labels = Labels.of(clip, 8)
    assert labels.moving.shape == (5, 6, 8)
    assert (labels.moving <= labels.object).all()
    for frame, row, column in [(0, 2, 3), (4, 5, 0), (2, 3, 6)]:
        patch = clip.mover_mask[frame, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert labels.moving[frame, row, column] == (patch.mean() >= 0.5)


def test_truth_as_a_signal_scores_one_and_nearness_alone_is_unmasked_among_objects(clip: Clip) -> None:
    labels = Labels.of(clip, 8)
    assert separate(labels.moving.astype(float), labels) == (1.0, 1.0)
    whole, among = separate(labels.object.astype(float), labels)
    assert whole > 0.6 and among == 0.5


def test_best_iou_is_the_best_of_all_thresholds() -> None:
    dice = np.random.default_rng(0)
    values, truth = dice.normal(size=(3, 4, 5)), dice.random((3, 4, 5)) < 0.3
    by_hand = max(((values >= t) & truth).sum() / ((values >= t) | truth).sum() for t in values.reshape(-1))
    assert best_iou(values, truth) == pytest.approx(by_hand)
    assert best_iou(truth.astype(float), truth) == 1.0


def test_mean_and_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert mean == 2.0 and error == pytest.approx(1 / np.sqrt(3))
    assert np.isnan(mean_and_error([1.0])[1])


def test_expected_position_is_read_between_tokens() -> None:
    logits = torch.full((1, 1, 1, 12), -20.0)
    logits[..., 5] = logits[..., 6] = 0.0
    torch.testing.assert_close(signals.expected_position(logits, (3, 4), 8)[0, 0, 0], torch.tensor([15.5, 11.5]))


def test_flow_signals_find_motion_and_not_its_frozen_twin() -> None:
    world = make_world(2, Family(stride=(0.1, 0.1)), num_frames=6)
    pairs = make_pairs(6, PairSettings())
    found = {}
    for frozen in (False, True):
        one = render(world, frozen=frozen)
        maps = signals.flow_signals(one.images, pairs, 8)
        found[frozen] = np.median(maps["flow: epipolar residual"][Labels.of(one, 8).moving])
    assert found[False] > 0.4 > 2 * found[True]


def test_mean_over_pairs_passes_over_what_is_unknown() -> None:
    values = torch.tensor([[1.0, torch.nan, 5.0], [3.0, torch.nan, torch.nan]])
    means = signals.mean_over_pairs(values, torch.tensor([0, 0]), 1)
    torch.testing.assert_close(means, torch.tensor([[2.0, 2.0, 5.0]]))  # the median (2) where no pair knows


def test_the_command_prints_its_tables_and_writes_every_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--pairs=4", "--clips=2", "--reconstructions=1", "--frames=3"]
    checkpoint.main([*small, f"--json={tmp_path / 'all.json'}"])
    screen = capsys.readouterr().out
    for words in ("held-out static pairs", "1 development clips", "1 test clips", "true masks, both", "frozen twin"):
        assert words in screen
    result = json.loads((tmp_path / "all.json").read_text())
    assert result["static pairs"]["second_view_wrong_other"] > 0
    assert set(result["reconstruction"]) == set(checkpoint.RECONSTRUCTIONS)
    for table in ("signals, test", "reconstruction", "masks"):
        assert all(np.isfinite(mean) for scores in result[table].values() for mean, _ in scores.values())
