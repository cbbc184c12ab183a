import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from easi3r.config import FlowSettings
from easi3r.flow import ESTIMATORS, FlowEstimator, consistent, dis_flow, estimate_flow, make_estimator
from easi3r.progress import silent


def textured(height: int, width: int, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).random((height, width, 3))
    smooth = gaussian_filter(noise, (2, 2, 0))
    return (255 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)


def shifted_clip(steps: int = 3, dx: int = 4) -> np.ndarray:
    wide = textured(64, 96 + steps * dx)
    return np.stack([wide[:, i * dx : i * dx + 96] for i in range(steps)])


def test_a_pan_by_whole_pixels_is_found_in_both_directions() -> None:
    pairs = np.array([[0, 1], [1, 2], [0, 2], [1, 0], [2, 1], [2, 0]])
    found = estimate_flow(shifted_clip(), pairs, FlowSettings(), silent)
    for k, (a, b) in enumerate(pairs):
        inner = found.flow[k, 12:-12, 16:-16]
        assert np.abs(np.median(inner, axis=(0, 1)) - [-4 * (b - a), 0]).max() < 0.3
        assert found.valid[k, 12:-12, 16:-16].mean() > 0.95


def test_the_reverse_of_a_pair_may_be_absent() -> None:
    both = estimate_flow(shifted_clip(2), np.array([[0, 1], [1, 0]]), FlowSettings(), silent)
    one = estimate_flow(shifted_clip(2), np.array([[0, 1]]), FlowSettings(), silent)
    np.testing.assert_array_equal(one.flow[0], both.flow[0])
    np.testing.assert_array_equal(one.valid[0], both.valid[0])


def test_a_frame_paired_with_itself_has_no_flow() -> None:
    found = estimate_flow(shifted_clip(1), np.array([[0, 0]]), FlowSettings(), silent)
    assert not found.flow.any()
    assert not found.valid.any()


def test_the_round_trip_equals_a_loop_over_pixels() -> None:
    rng = np.random.default_rng(3)
    forward = rng.integers(-3, 4, (12, 16, 2)).astype(np.float32)
    backward = rng.integers(-3, 4, (12, 16, 2)).astype(np.float32)
    expected = np.zeros((12, 16), dtype=bool)
    for y in range(12):
        for x in range(16):
            to_x, to_y = int(x + forward[y, x, 0]), int(y + forward[y, x, 1])
            if 0 <= to_x < 16 and 0 <= to_y < 12:
                back = forward[y, x] + backward[to_y, to_x]
                expected[y, x] = np.hypot(*back) <= 3.0
    np.testing.assert_array_equal(consistent(forward, backward, 3.0), expected)


@pytest.mark.parametrize("shape", [(16, 16), (8, 8), (48, 16), (16, 112)])
def test_small_and_narrow_images_work(shape: tuple[int, int]) -> None:
    images = np.stack([textured(*shape, seed=i) for i in range(2)])
    found = estimate_flow(images, np.array([[0, 1], [1, 0]]), FlowSettings(), silent)
    assert np.isfinite(found.flow).all()


def test_another_estimator_is_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(settings: FlowSettings, device: torch.device | None) -> FlowEstimator:
        made.append((settings, device))
        return lambda first, second: np.full((*first.shape[:2], 2), 0.5, np.float32)

    monkeypatch.setitem(ESTIMATORS, "dis", make)
    device = torch.device("cpu")
    found = estimate_flow(shifted_clip(2), np.array([[0, 1], [1, 0]]), FlowSettings(), silent, device)
    assert (found.flow == 0.5).all()
    assert found.valid[0, 1:-2, 1:-2].all()
    assert made == [(FlowSettings(), device)]  # once for all pairs


def test_dis_ignores_the_device() -> None:
    assert make_estimator(FlowSettings()) is make_estimator(FlowSettings(), torch.device("meta")) is dis_flow
