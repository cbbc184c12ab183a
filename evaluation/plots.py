"""Pictures of results: trajectories against the truth, and film strips of masks; PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image

from easi3r.errors import InputError, MissingExtraError
from easi3r.geometry import invert_rigid
from easi3r.metrics import absolute_trajectory_error, jaccard, umeyama
from easi3r.structures import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, which the colour-blind can tell apart; RGB.
HIT = (0, 158, 115)  # green: moves and was found
MISS = (213, 94, 0)  # vermilion: moves and was not found
FALSE_ALARM = (0, 114, 178)  # blue: found and does not move
UNJUDGED = (204, 121, 167)  # purple: found, and no truth is known
TRUTH = (255, 255, 255)
LEGEND = {"hit": HIT, "miss": MISS, "false alarm": FALSE_ALARM}
PAPER, INK = (255, 255, 255), (40, 40, 40)
TILE_WIDTH = 192  # pixels; smaller images are enlarged by a whole number, larger ones shrunk
GAP, MARGIN, LINE = 4, 64, 22  # pixels between tiles, left of them for their names, for a line of text


# --- masks ---------------------------------------------------------------------------------------------------------


def film_strip(
    path: Path,
    images: Array,
    predicted: Array,
    truth: Array | None = None,
    *,
    has_mask: Array | None = None,
    title: str = "",
    columns: int = 8,
) -> None:
    """Write up to ``columns`` frames, evenly spread, one below the other: image, true mask, predicted mask.

    images: [n, H, W, 3] uint8 RGB.  predicted, truth: [n, H, W] bool, True = moves; None leaves the row out.
    has_mask: [n] bool, of which frames the truth is known; None = of all.
    Raises InputError where these do not fit each other.
    """
    known = np.full(len(images), truth is not None) if has_mask is None or truth is None else has_mask
    true = np.zeros_like(predicted) if truth is None else truth
    if images.ndim != 4 or not len(images) or {predicted.shape, true.shape} != {images.shape[:3]}:
        raise InputError(
            f"The images are {list(images.shape)}, the masks {list(predicted.shape)} and {list(true.shape)}; expected "
            "[n, H, W, 3] and, for the same frames and pixels, [n, H, W]."
        )
    shown = np.unique(np.linspace(0, len(images) - 1, min(columns, len(images))).round().astype(int)).tolist()
    scores = jaccard(predicted, true)
    strip = []
    for frame in shown:
        tiles = [images[frame]]
        if truth is not None:
            tiles.append(paint(images[frame], {TRUTH: true[frame] & known[frame]}))
        tiles.append(judged(images[frame], predicted[frame], true[frame] if known[frame] else None))
        caption = f"frame {frame}" + (f"  J {scores[frame]:.2f}" if known[frame] else "")
        strip.append(_column(tiles, caption))
    names = ["image", "truth", "found"] if truth is not None else ["image", "found"]
    legend = LEGEND if known[shown].all() else {"found, no truth": UNJUDGED}
    if known[shown].any() and not known[shown].all():
        legend = LEGEND | legend
    Image.fromarray(_page(strip, names, title, legend)).save(path, format="PNG")


def judged(image: Array, predicted: Array, truth: Array | None) -> Array:
    """[H, W, 3] uint8: the image dimmed and, opaque, HIT, MISS and FALSE_ALARM; without truth, UNJUDGED.

    image: [H, W, 3] uint8 RGB.  predicted, truth: [H, W] bool.
    """
    if truth is None:
        return paint(image, {UNJUDGED: predicted})
    return paint(image, {HIT: predicted & truth, MISS: ~predicted & truth, FALSE_ALARM: predicted & ~truth})


def paint(image: Array, colours: dict[tuple[int, int, int], Array]) -> Array:
    """[H, W, 3] uint8: the image in dark grey, and each colour where its mask [H, W] is True."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2
    painted = np.repeat(grey[..., None], 3, axis=-1)
    for colour, mask in colours.items():
        painted[mask] = colour
    return np.asarray(painted)


def _column(tiles: Sequence[Array], caption: str) -> Array:
    """Tiles below each other, under their caption."""
    parts = []
    for tile in tiles:
        resized = fit_tile(tile)
        parts += [resized, np.full((GAP, resized.shape[1], 3), PAPER, np.uint8)]
    head = np.full((LINE, parts[0].shape[1], 3), PAPER, np.uint8)
    _write(head, caption, (2, LINE - 7))
    return np.concatenate([head, *parts])


def fit_tile(tile: Array) -> Array:
    """About TILE_WIDTH wide: every pixel of a small image becomes a square, a large image is shrunk."""
    height, width = tile.shape[:2]
    if width <= TILE_WIDTH:
        times = max(1, round(TILE_WIDTH / width))
        return np.asarray(tile.repeat(times, axis=0).repeat(times, axis=1))
    size = TILE_WIDTH, max(1, round(height * TILE_WIDTH / width))
    return np.asarray(cv2.resize(tile, size, interpolation=cv2.INTER_AREA))


def _page(strip: Sequence[Array], names: Sequence[str], title: str, legend: dict[str, tuple[int, int, int]]) -> Array:
    """Columns side by side, the rows' names to their left, title and legend above."""
    gap = np.full((len(strip[0]), GAP, 3), PAPER, np.uint8)
    left = np.full((len(strip[0]), MARGIN, 3), PAPER, np.uint8)
    row_height = (len(strip[0]) - LINE) // len(names)
    for row, name in enumerate(names):
        _write(left, name, (6, LINE + row * row_height + row_height // 2))
    body = np.concatenate([left, *(part for column in strip for part in (column, gap))], axis=1)
    entries = {name: MARGIN + 130 * k for k, name in enumerate(legend)}
    width = max(body.shape[1], MARGIN + 130 * len(legend), MARGIN + 9 * len(title))
    head = np.full((2 * LINE if title else LINE, width, 3), PAPER, np.uint8)
    if title:
        _write(head, title, (MARGIN, LINE - 6))
    for name, x in entries.items():
        head[-LINE + 6 : -4, x : x + 12] = legend[name]
        _write(head, name, (x + 18, len(head) - 6))
    body = np.pad(body, ((0, 0), (0, width - body.shape[1]), (0, 0)), constant_values=255)
    return np.concatenate([head, body])


def _write(canvas: Array, text: str, place: tuple[int, int]) -> None:
    """Text whose base line begins at ``place`` (x, y)."""
    cv2.putText(canvas, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, INK, 1, cv2.LINE_AA)


# --- trajectories --------------------------------------------------------------------------------------------------

VIEWS = (  # name, axis to the right, axis upwards; +1 or -1: which way it points (OpenCV's y points down)
    ("from above", 0, (2, 1)),
    ("from behind", 0, (1, -1)),
    ("from the right", 2, (1, -1)),
)
AXES = ("x, right", "y, down", "z, forward")


def plot_trajectories(path: Path, predicted: Array, truth: Array, *, title: str = "", unit: str = "m") -> None:
    """Write the predicted positions after Sim(3) alignment and the true ones, in three projections of equal scale.

    predicted, truth: [n, 4, 4] camera-to-world, matched row by row, OpenCV axes, truth in ``unit`` ("" = unknown); rows
    of NaN are left out.  The axes are those of the first true camera.
    Raises InputError where these do not fit each other or nothing is left, MissingExtraError without matplotlib.
    """
    if predicted.shape != truth.shape or truth.shape[1:] != (4, 4):
        raise InputError(f"The poses are {list(predicted.shape)} and {list(truth.shape)}; expected both [n, 4, 4].")
    both = np.isfinite(predicted).all(axis=(1, 2)) & np.isfinite(truth).all(axis=(1, 2))
    if not both.any():
        raise InputError(f"None of the {len(truth)} frames has both poses; expected at least one without NaN.")
    predicted, truth = predicted[both].astype(np.float64), truth[both].astype(np.float64)
    aligned = umeyama(predicted[:, :3, 3], truth[:, :3, 3]).apply(predicted[:, :3, 3])
    first = invert_rigid(truth[0])
    true, found = (points @ first[:3, :3].T + first[:3, 3] for points in (truth[:, :3, 3], aligned))

    figure, suffix = _figure((12, 4.6)), f" [{unit}]" if unit else ""
    everything = np.concatenate([true, found])
    middle = (everything.min(0) + everything.max(0)) / 2
    reach = 0.55 * float(np.ptp(everything, axis=0).max()) or 1.0
    for axes, (name, right, (up, sign)) in zip(figure.subplots(1, 3), VIEWS, strict=True):
        for steps in zip(true, found, strict=True):  # what belongs together
            axes.plot(*np.array(steps)[:, [right, up]].T, color="0.75", linewidth=0.8, zorder=1)
        axes.plot(true[:, right], true[:, up], "o-", color="black", markersize=3, linewidth=1.2, label="truth")
        colour = np.array(MISS) / 255
        axes.plot(found[:, right], found[:, up], "o-", color=colour, markersize=3, linewidth=1.2, label="predicted")
        axes.plot(*true[0, [right, up]], "s", color="black", markersize=8, fillstyle="none", label="first frame")
        axes.set_xlim(middle[right] - reach, middle[right] + reach)
        axes.set_ylim(middle[up] - sign * reach, middle[up] + sign * reach)
        axes.set(title=name, xlabel=AXES[right] + suffix, ylabel=AXES[up] + suffix, aspect="equal")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    ate = absolute_trajectory_error(predicted, truth)
    figure.suptitle(f"{title}   ATE {ate:.3g} {unit}".strip())
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=110)


def _figure(size_inches: tuple[float, float]) -> Figure:
    """A figure that belongs to no window and no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Plots of trajectories need the package matplotlib: pip install 'easi3r[plots]'."
        ) from error
    return Figure(figsize=size_inches, layout="constrained")
