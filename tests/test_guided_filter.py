"""Smoothing within the edges of an image."""

from __future__ import annotations

import numpy as np
import pytest

from easi3r.guided_filter import EPSILON, RADIUS, guided_filter
from easi3r.structures import Array


def slow_guided_filter(values: Array, image: Array) -> Array:
    """Window by window: a ridge regression of the values on the grey level, and the mean of the fits at each pixel."""
    grey = (image.astype(float) @ [0.299, 0.587, 0.114]).round() / 255
    radius = max(1, round(RADIUS * max(grey.shape)))
    v, g = (np.pad(x.astype(float), 2 * radius, mode="symmetric") for x in (values, grey))
    height, width = values.shape
    out, side = np.zeros(values.shape), 2 * radius + 1
    for y in range(height):
        for x in range(width):
            fits = []
            for wy in range(y, y + side):
                for wx in range(x, x + side):
                    window = np.s_[wy : wy + side, wx : wx + side]
                    slope = ((g[window] * v[window]).mean() - g[window].mean() * v[window].mean()) / (
                        g[window].var() + EPSILON
                    )
                    fits.append(slope * (grey[y, x] - g[window].mean()) + v[window].mean())
            out[y, x] = np.mean(fits)
    return out


@pytest.mark.parametrize("shape", [(40, 44), (41, 3)])
def test_it_is_what_a_regression_in_every_window_gives(shape: tuple[int, int]) -> None:
    dice = np.random.default_rng(0)
    image = np.repeat(dice.integers(0, 256, (*shape, 1), dtype=np.uint8), 3, axis=2)
    values = dice.random(shape).astype(np.float32)
    inner = np.s_[4:-4, 4:-4] if min(shape) > 8 else np.s_[4:-4, 1:2]  # the border is mirrored once, or twice over
    np.testing.assert_allclose(guided_filter(values, image)[inner], slow_guided_filter(values, image)[inner], atol=2e-4)


def test_a_blurred_step_returns_to_the_edge_of_the_image() -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[:, 40:] = 255
    blurred = np.clip((np.arange(80) - 34) / 8, 0, 1) * np.ones((60, 1))  # bleeds to column 34, and 1/2 at column 38
    found = guided_filter(blurred, image) > 0.5
    assert found[:, 40:].all() and not found[:, :39].any()


def test_a_constant_stays_and_flat_images_only_blur() -> None:
    dice = np.random.default_rng(1)
    image = dice.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    np.testing.assert_allclose(guided_filter(np.full((30, 40), 0.25), image), 0.25, atol=1e-5)
    step = (np.arange(40) >= 20) * np.ones((30, 1))
    flat = guided_filter(step, np.full((30, 40, 3), 128, np.uint8))
    assert (np.diff(flat, axis=1) > -1e-6).all() and flat.min() > -1e-6 and flat.max() < 1 + 1e-6
    assert flat[0, 19] == pytest.approx(1 - flat[0, 20], abs=1e-5)
