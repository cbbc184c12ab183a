"""Smoothing that stops where the image has an edge (He, Sun and Tang 2013, Guided Image Filtering, TPAMI 35)."""

from __future__ import annotations

import cv2
import numpy as np

from easi3r.structures import Array

RADIUS = 0.025  # half the window's side over the image's long side
EPSILON = 0.01  # variance of grey levels in [0, 1], below which a window counts as flat


def guided_filter(values: Array, image: Array) -> Array:
    """Local mean of ``values`` [H, W] within what looks alike, [H, W] float32.

    image: [H, W, 3] uint8 RGB.  In each window the values are fitted by a linear function of the grey level, with
    EPSILON against steep ones; a pixel takes the mean of the fits of all windows that hold it.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    side = 2 * max(1, round(RADIUS * max(grey.shape))) + 1

    def mean(x: Array) -> Array:
        return np.asarray(cv2.blur(x, (side, side), borderType=cv2.BORDER_REFLECT))

    values = values.astype(np.float32)
    mean_grey, mean_value = mean(grey), mean(values)
    covariance = mean(grey * values) - mean_grey * mean_value
    slope = covariance / (mean(grey * grey) - mean_grey * mean_grey + EPSILON)
    return mean(slope) * grey + mean(mean_value - slope * mean_grey)
