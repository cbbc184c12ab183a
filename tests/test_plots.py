from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from easi3r.errors import InputError, MissingExtraError
from evaluation.plots import (
    FALSE_ALARM,
    GAP,
    HIT,
    LINE,
    MARGIN,
    MISS,
    TILE_WIDTH,
    TRUTH,
    UNJUDGED,
    film_strip,
    fit_tile,
    judged,
    plot_trajectories,
)

SCALE = TILE_WIDTH // 64


def strip_inputs(num_frames: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grey images of 64 x 48 px; truth is the left half, found is the upper half."""
    images = np.full((num_frames, 48, 64, 3), 120, np.uint8)
    predicted, truth = np.zeros((2, num_frames, 48, 64), bool)
    truth[:, :, :32] = True
    predicted[:, :24] = True
    return images, predicted, truth


def tile(picture: np.ndarray, row: int, column: int, rows: int = 3) -> np.ndarray:
    """One of the tiles of a strip without a title, at one pixel for each of its image's."""
    height, width = 48 * SCALE, 64 * SCALE
    top = len(picture) - (rows - row) * (height + GAP)
    left = MARGIN + column * (width + GAP)
    return picture[top : top + height : SCALE, left : left + width : SCALE]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        return np.asarray(image)


def test_hits_misses_and_false_alarms_have_their_colours(tmp_path: Path) -> None:
    images, predicted, truth = strip_inputs()
    film_strip(tmp_path / "strip.png", images, predicted, truth)
    picture = read(tmp_path / "strip.png")
    assert picture.shape == (2 * LINE + 3 * (48 * SCALE + GAP), MARGIN + 3 * (64 * SCALE + GAP), 3)
    for column in range(3):
        np.testing.assert_array_equal(tile(picture, 0, column), images[column])
        true = tile(picture, 1, column)
        assert (true[:, :32] == TRUTH).all() and (true[:, 32:] == 60).all()
        found = tile(picture, 2, column)
        assert (found[:24, :32] == HIT).all() and (found[24:, :32] == MISS).all()
        assert (found[:24, 32:] == FALSE_ALARM).all() and (found[24:, 32:] == 60).all()


def test_colours_differ_from_each_other_and_from_any_grey() -> None:
    colours = [HIT, MISS, FALSE_ALARM, UNJUDGED]
    assert len(set(colours)) == 4 and all(np.ptp(colour) > 50 for colour in colours)


def test_without_truth_nothing_is_judged(tmp_path: Path) -> None:
    images, predicted, truth = strip_inputs(2)
    film_strip(tmp_path / "none.png", images, predicted)
    found = tile(read(tmp_path / "none.png"), 1, 0, rows=2)
    assert (found[:24] == UNJUDGED).all() and (found[24:] == 60).all()
    film_strip(tmp_path / "some.png", images, predicted, truth, has_mask=np.array([True, False]))
    picture = read(tmp_path / "some.png")
    assert (tile(picture, 2, 0)[:24, :32] == HIT).all() and (tile(picture, 2, 1)[:24] == UNJUDGED).all()
    assert (tile(picture, 1, 1) == 60).all()


@pytest.mark.parametrize(("num_frames", "shown"), [(1, 1), (2, 2), (8, 8), (30, 8)])
def test_long_clips_are_thinned_evenly_from_first_to_last(num_frames: int, shown: int, tmp_path: Path) -> None:
    images, predicted, truth = strip_inputs(num_frames)
    images[:] = np.linspace(0, 200, num_frames).astype(np.uint8)[:, None, None, None]
    film_strip(tmp_path / "strip.png", images, predicted, truth)
    picture = read(tmp_path / "strip.png")
    assert picture.shape[1] >= MARGIN + shown * (64 * SCALE + GAP)
    assert (tile(picture, 0, 0) == images[0]).all() and (tile(picture, 0, shown - 1) == images[-1]).all()


def test_a_title_and_large_or_tiny_images_fit(tmp_path: Path) -> None:
    for height, width in ((5, 7), (480, 854)):
        film_strip(tmp_path / "strip.png", np.zeros((1, height, width, 3), np.uint8), np.ones((1, height, width), bool))
        assert read(tmp_path / "strip.png").shape[0] < 400
    film_strip(tmp_path / "named.png", *strip_inputs(1), title="a name that is far longer than one tile is wide " * 2)
    assert read(tmp_path / "named.png").shape[1] > 700


@pytest.mark.parametrize(("width", "expected"), [(10, 190), (64, 192), (128, 256), (192, 192), (193, 192), (854, 192)])
def test_tiles_are_of_about_one_width(width: int, expected: int) -> None:
    assert fit_tile(np.zeros((20, width, 3), np.uint8)).shape[1] == expected


def test_judged_keeps_the_picture_where_nothing_moves() -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    still = np.zeros((6, 8), bool)
    shown = judged(image, still, still)
    assert np.ptp(shown, axis=-1).max() == 0 and len(np.unique(shown)) > 10 and shown.max() <= 127


def test_masks_of_another_size_are_refused(tmp_path: Path, fails_with) -> None:
    images, predicted, truth = strip_inputs()
    for bad in ((images, predicted[:, 1:], truth), (images, predicted, truth[:2]), (images[:0], predicted, truth)):
        with fails_with(InputError, "[n, H, W]"):
            film_strip(tmp_path / "strip.png", *bad)
    assert not (tmp_path / "strip.png").exists()


# --- trajectories --------------------------------------------------------------------------------------------------


def poses(positions: np.ndarray) -> np.ndarray:
    matrices = np.tile(np.eye(4), (len(positions), 1, 1))
    matrices[:, :3, 3] = positions
    return matrices


def walk(num_frames: int) -> np.ndarray:
    t = np.linspace(0, 1, num_frames)
    return poses(np.stack([np.sin(3 * t), 0.1 * t, 2 * t], axis=-1))


@pytest.mark.parametrize("num_frames", [1, 2, 20])
def test_trajectories_are_written(num_frames: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    truth = walk(num_frames)
    plot_trajectories(tmp_path / "walk.png", poses(0.5 * truth[:, :3, 3] + [1, 2, 3]), truth, title="walk")
    with Image.open(tmp_path / "walk.png") as image:
        assert image.format == "PNG" and image.width > 1000
        assert np.asarray(image.convert("L")).std() > 5


def test_a_trajectory_at_rest_and_frames_without_a_pose_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    truth = walk(5)
    truth[2] = np.nan
    plot_trajectories(tmp_path / "a.png", walk(5), truth)
    plot_trajectories(tmp_path / "b.png", walk(5)[[0] * 5], walk(5)[[0] * 5])
    assert {path.name for path in tmp_path.iterdir()} == {"a.png", "b.png"}


def test_poses_that_do_not_match_are_refused(tmp_path: Path, fails_with) -> None:
    with fails_with(InputError, "[4, 4, 4]", "[5, 4, 4]"):
        plot_trajectories(tmp_path / "a.png", walk(4), walk(5))
    with fails_with(InputError, "None of the 5 frames"):
        plot_trajectories(tmp_path / "a.png", np.full((5, 4, 4), np.nan), walk(5))


def test_without_matplotlib_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_with
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with fails_with(MissingExtraError, "matplotlib", "pip install 'easi3r[plots]'"):
        plot_trajectories(tmp_path / "a.png", walk(3), walk(3))
    film_strip(tmp_path / "strip.png", *strip_inputs())  # needs none
    assert (tmp_path / "strip.png").is_file()
