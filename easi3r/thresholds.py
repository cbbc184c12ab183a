"""From a soft score to a mask: thresholds by name, one for the clip or one for each frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from easi3r.structures import Array, Threshold

HISTOGRAM_BINS = 256


@dataclass(frozen=True)
class ThresholdRule:
    """What counts as moving: a score above the threshold, which is found in the scores themselves or given.

    method: 'multi-otsu' (as published, ``best_multi_otsu``), 'otsu' (two classes), 'percentile', or the threshold.
    per: one threshold for the whole clip, or one for each frame by itself.
    percentile: of 'percentile': so many per cent of the pixels stay static.
    """

    method: Literal["multi-otsu", "otsu", "percentile"] | float = "multi-otsu"
    per: Literal["clip", "frame"] = "clip"
    percentile: float = 90.0

    def find(self, score: Array) -> float | None:
        """The threshold of scores of any shape; None when all are the same, so that nothing stands out."""
        if isinstance(self.method, (int, float)):
            return float(self.method)
        if self.method == "percentile":
            varies = float(np.ptp(score)) > 1e-6
            return float(np.percentile(score, self.percentile)) if varies else None
        return best_multi_otsu(score, classes=(2,) if self.method == "otsu" else (2, 3, 4))

    def apply(self, score: Array) -> tuple[Array, Threshold]:
        """score: [n, H, W] -> mask [n, H, W] bool, True = moves, and what was its threshold: one, or one per frame.

        Where there is no threshold nothing moves.
        """
        if self.per == "clip":
            threshold = self.find(score)
            return exceeds(score, threshold), threshold
        thresholds = tuple(self.find(frame) for frame in score)
        return np.stack([exceeds(frame, one) for frame, one in zip(score, thresholds, strict=True)]), thresholds


def exceeds(score: Array, threshold: float | None) -> Array:
    """Of any shape -> bool; None is exceeded nowhere."""
    return np.zeros(score.shape, dtype=bool) if threshold is None else np.asarray(score > threshold)


def best_multi_otsu(values: Array, classes: tuple[int, ...] = (2, 3, 4)) -> float | None:
    """The highest threshold of the best of 2, 3 and 4 Otsu classes; None when all values are the same.

    Each number of classes is scored by the variance of its class means divided by the square root of their number.
    """
    counts, edges = np.histogram(values, bins=HISTOGRAM_BINS)
    if np.count_nonzero(counts) < 2 or float(np.ptp(values)) <= 1e-6:
        return None
    centres = (edges[:-1] + edges[1:]) / 2
    best: tuple[float, float] | None = None
    for number in classes:
        if np.count_nonzero(counts) < number:
            break
        thresholds = multi_otsu(counts, centres, number)
        means = [values[region].mean() for region in _regions(values, thresholds) if region.any()]
        score = float(np.var(means) / np.sqrt(number))
        if best is None or score > best[0]:
            best = (score, float(thresholds[-1]))
    return None if best is None else best[1]


def multi_otsu(counts: Array, centres: Array, classes: int) -> Array:
    """Thresholds [classes - 1] that maximise the variance between classes of a histogram (Otsu 1979; Liao 2001).

    A class holds the bins up to and including its threshold.
    """
    # Prefix sums of weight and first moment: S2/S0 of any interval is its share of the between-class variance.
    weight = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)])
    moment = np.concatenate([[0.0], np.cumsum(counts * centres, dtype=np.float64)])
    interval_weight = weight[None, :] - weight[:, None]
    interval_moment = moment[None, :] - moment[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        gain = np.where(interval_weight > 0, interval_moment**2 / interval_weight, 0.0)  # [from, to), to > from
    bins = len(counts)
    best = gain[0]  # best[t]: gain of one class over bins [0, t)
    choices = []
    for _ in range(classes - 1):
        total = best[:, None] + np.where(np.arange(bins + 1)[:, None] < np.arange(bins + 1)[None, :], gain, -np.inf)
        total[0] = -np.inf  # no empty first class
        choices.append(total.argmax(axis=0))
        best = total.max(axis=0)
    cut, thresholds = bins, []
    for choice in reversed(choices):
        cut = int(choice[cut])
        thresholds.append(centres[cut - 1])
    return np.array(thresholds[::-1])


def _regions(values: Array, thresholds: Array) -> list[Array]:
    classes = np.digitize(values, thresholds)
    return [classes == k for k in range(len(thresholds) + 1)]
