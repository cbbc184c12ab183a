"""Masks that the user hands in: in the source's pixels or the network's, True = moves."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from easi3r.config import FrameSettings
from easi3r.errors import InputError
from easi3r.frames import read_frames
from easi3r.given_masks import read_masks

SOURCE = (2, 67, 101)  # frames, height, width: on patches of 16 the middle 64 x 96 remain
X, Y = 2, 1  # of these, in the source


def some_masks(shape=SOURCE, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.5


def frames_like(masks, image_size="native"):
    """White where the mask is."""
    images = np.repeat(masks[..., None].astype(np.uint8) * 255, 3, axis=-1)
    return read_frames(images, FrameSettings(image_size=image_size), patch_size=16, trained_size=128)


def write_masks(folder, masks, names=None):
    folder.mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / (names[i] if names else f"mask_{i}.png"))
    return folder


def test_masks_of_the_source_are_cut_like_its_images():
    masks = some_masks()
    frames = frames_like(masks)
    read = read_masks(masks, frames)
    np.testing.assert_array_equal(read.mask, masks[:, Y : Y + 64, X : X + 96], strict=True)
    np.testing.assert_array_equal(read.mask, frames.images[..., 0] == 255)
    np.testing.assert_array_equal(read.score, read.mask.astype(np.float32), strict=True)
    assert read.threshold is None


def test_masks_of_the_networks_size_stay_as_they_are():
    masks = some_masks((2, 64, 96))
    np.testing.assert_array_equal(read_masks(masks, frames_like(some_masks())).mask, masks, strict=True)


@pytest.mark.parametrize("image_size", [64, 256], ids=["shrunk", "enlarged"])
def test_masks_are_resized_with_their_images(image_size):
    masks = np.zeros((1, 96, 128), dtype=bool)
    masks[:, 24:72, 32:64] = True
    frames = frames_like(masks, image_size)
    scale = image_size / 128
    expected = np.zeros(frames.images.shape[:3], dtype=bool)
    expected[:, int(24 * scale) : int(72 * scale), int(32 * scale) : int(64 * scale)] = True
    np.testing.assert_array_equal(read_masks(masks, frames).mask, expected)
    assert expected.mean() == masks.mean()


def test_every_way_to_give_the_same_masks_gives_the_same(tmp_path):
    masks = some_masks()
    frames = frames_like(masks)
    folder = write_masks(tmp_path / "masks", masks)
    (folder / "notes.txt").touch()
    (folder / "._mask_0.png").write_bytes(b"what macOS leaves on foreign disks")
    ways = [masks, masks.astype(np.uint8) * 255, masks * 255.0, list(masks), masks.tolist(), folder, str(folder)]
    for given in ways:
        np.testing.assert_array_equal(read_masks(given, frames).mask, read_masks(masks, frames).mask, strict=True)


def test_none_means_that_nothing_moves():
    frames = frames_like(some_masks())
    for given in ("none", "None", np.zeros(SOURCE, dtype=bool)):
        read = read_masks(given, frames)
        assert not read.mask.any() and not read.score.any()
        assert (read.mask.shape, read.mask.dtype, read.score.dtype) == ((2, 64, 96), bool, np.float32)


def test_files_are_ordered_by_their_numbers_as_frames_are(tmp_path):
    masks = np.zeros(SOURCE, dtype=bool)
    masks[0] = True
    folder = write_masks(tmp_path / "masks", masks, ["mask_9.PNG", "mask_10.png"])
    assert [bool(mask.all()) for mask in read_masks(folder, frames_like(masks)).mask] == [True, False]


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_every_kind_of_png_with_black_and_white_is_read(tmp_path, mode):
    masks = some_masks((1, *SOURCE[1:]))
    folder = write_masks(tmp_path / "masks", masks)
    path = folder / "mask_0.png"
    if mode == "I;16":
        Image.fromarray(masks[0].astype(np.uint16) * 65535).save(path)
    else:
        Image.open(path).convert(mode).save(path)
    np.testing.assert_array_equal(
        read_masks(folder, frames_like(masks)).mask, read_masks(masks, frames_like(masks)).mask
    )


def test_coloured_objects_are_not_taken_for_static(tmp_path):
    masks = some_masks((1, *SOURCE[1:]))
    folder = write_masks(tmp_path / "masks", masks)
    Image.fromarray(masks[0][..., None].astype(np.uint8) * np.uint8([0, 255, 0])).save(folder / "mask_0.png")
    assert read_masks(folder, frames_like(masks)).mask.any()
    Image.fromarray(masks[0][..., None].astype(np.uint8) * np.uint8([0, 128, 0])).save(folder / "mask_0.png")  # DAVIS
    with pytest.raises(InputError, match="Mask 0 holds the values 0, 128"):
        read_masks(folder, frames_like(masks))


@pytest.mark.parametrize(
    "given, reason",
    [
        (np.zeros((3, 64, 96), bool), r"^3 masks were given for 2 frames; expected one mask per frame\.$"),
        (np.zeros((0, 64, 96), bool), "^0 masks were given for 2 frames"),
        (np.zeros((2, 96, 64), bool), r"^Mask 0 is 64x96 pixels; expected .*101x67.* or .*96x64"),
        (np.ones((2, 64, 96), np.uint8), r"^Mask 0 holds the values 1; expected bool, or 0 and 255"),
        (np.full((2, 64, 96), 0.5), r"^Mask 0 holds the values 0\.5"),
        (np.arange(2 * 64 * 96).reshape(2, 64, 96), r"^Mask 0 holds the values 0, 1, 2, 3, \.\.\.; expected"),
        (np.full((2, 64, 96), np.nan), "^Mask 0 holds the values nan"),
        (np.zeros((64, 96), bool), r"^masks is bool of shape \[64, 96\]; expected an array \[n, H, W\]"),
        (np.zeros((2, 64, 96, 3), np.uint8), r"^masks is uint8 of shape \[2, 64, 96, 3\]; expected"),
        (np.array([[["a"]]]), "^masks is <U1 of shape"),
        ([[1, 2], [3]], "^masks is no array .*; expected"),
        (5, r"^masks is int64 of shape \[\]; expected"),
        (True, r"^masks is bool of shape \[\]; expected"),
        ({"a": 1}, "^masks is object of shape"),
        ("nowhere", r"^masks is 'nowhere'; expected an array, a folder of PNG files, or 'none'\.$"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(given, reason):
    with pytest.raises(InputError, match=reason) as caught:
        read_masks(given, frames_like(some_masks()))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_file_in_the_place_of_a_folder_and_broken_files_are_named(tmp_path):
    frames = frames_like(some_masks())
    (tmp_path / "mask.png").touch()
    with pytest.raises(InputError, match=r"mask\.png'; expected an array, a folder"):
        read_masks(tmp_path / "mask.png", frames)
    folder = write_masks(tmp_path / "masks", some_masks())
    (folder / "mask_1.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(InputError, match=r"mask_1\.png cannot be read as an image"):
        read_masks(folder, frames)
