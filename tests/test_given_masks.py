"""Masks that the user hands in: in the source's pixels or the network's, True = moves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_inputs import QUICK, moving_square, random_model

from easi3r import Motion
from easi3r.config import FrameSettings
from easi3r.errors import InputError
from easi3r.frames import read_frames
from easi3r.given_masks import read_masks
from easi3r.mask_files import MEANINGS, write_png
from easi3r.structures import PackedMasks

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


# --- polarity: named, never guessed


def test_what_true_means_is_said():
    masks = some_masks()
    frames = frames_like(masks)
    moving, static = (read_masks(masks, frames, polarity).mask for polarity in ("moving", "static"))
    np.testing.assert_array_equal(moving, ~static)
    np.testing.assert_array_equal(moving, read_masks(masks, frames).mask)
    assert not read_masks("none", frames, "static").mask.any()


@pytest.mark.parametrize("share, doubted", [(0.0, False), (0.79, False), (0.81, True), (1.0, True)])
@pytest.mark.parametrize("polarity, other", [("moving", "static"), ("static", "moving")])
def test_a_warning_says_when_too_much_moves_and_what_to_do(share, doubted, polarity, other, caplog, tmp_path):
    clip = np.zeros((2, 48, 128, 3), np.uint8)
    masks = np.zeros((2, 48, 128), bool)
    masks.reshape(2, -1)[:, : round(share * 48 * 128)] = True
    given = masks if polarity == "moving" else ~masks
    motion = random_model().segment(clip, masks=given, mask_polarity=polarity, **QUICK)
    np.testing.assert_array_equal(motion.dynamic_mask, masks)
    warned = motion.meta["warnings"]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == warned
    assert len(warned) == doubted
    if doubted:
        motion.save(tmp_path / "out")
        assert "may be inverted" in (tmp_path / "out" / "report.html").read_text("utf-8")
        assert "may be inverted" in warned[0] and f"{share:.0%}" in warned[0]
        assert f"was taken for {polarity}" in warned[0] and f"--mask-polarity {other}" in warned[0]
        assert "\n" not in warned[0] and warned[0].endswith(".")


def test_masks_that_are_found_are_not_doubted():
    motion = random_model().segment(moving_square(), threshold=0.001, evidence="attention", **QUICK)
    assert motion.dynamic_mask.mean() > 0.8 and motion.meta["warnings"] == []


def test_files_of_ours_that_say_the_opposite_are_refused(tmp_path):
    masks, folder = some_masks(), tmp_path / "masks"
    folder.mkdir()
    for i, mask in enumerate(masks):
        write_png(folder / f"mask_{i}.png", (~mask).astype(np.uint8) * 255, MEANINGS["static"])
    frames = frames_like(masks)
    np.testing.assert_array_equal(read_masks(folder, frames, "static").mask, read_masks(masks, frames).mask)
    with pytest.raises(
        InputError, match=r"mask_0\.png says of itself that '255 = static.*; say mask_polarity='static'"
    ):
        read_masks(folder, frames)
    write_png(folder / "mask_0.png", (~masks[0]).astype(np.uint8) * 255, "made on a Tuesday")
    write_png(folder / "mask_1.png", (~masks[1]).astype(np.uint8) * 255)
    np.testing.assert_array_equal(read_masks(folder, frames, "static").mask, read_masks(masks, frames).mask)


# --- out again as they came in


@pytest.mark.parametrize("image_size", ["native", 64, 256], ids=["cut", "shrunk", "enlarged"])
@pytest.mark.parametrize("polarity", ["moving", "static"])
def test_masks_of_the_source_come_out_to_the_pixel(image_size, polarity, tmp_path):
    masks = some_masks()
    clip = np.repeat(masks[..., None].astype(np.uint8) * 255, 3, axis=-1)
    given = masks if polarity == "moving" else ~masks
    motion = random_model().segment(clip, masks=given, mask_polarity=polarity, image_size=image_size)
    motion.save(tmp_path / "out")
    loaded = Motion.load(tmp_path / "out")
    for result in (motion, loaded):
        for i, original in enumerate(result.original_masks()):
            np.testing.assert_array_equal(original.mask, masks[i], strict=True)
            np.testing.assert_array_equal(original.score, masks[i].astype(np.float32), strict=True)
            assert original.origin == "given"
        assert i == 1
    loaded.export(tmp_path / "masks", "masks")
    again = read_masks(tmp_path / "masks" / "mask", frames_like(masks, image_size))
    np.testing.assert_array_equal(again.mask, motion.dynamic_mask)
    np.testing.assert_array_equal(np.stack(list(again.original)), masks)


def test_masks_of_the_networks_size_come_out_to_the_pixel_and_are_repeated_in_the_source(tmp_path):
    masks = some_masks((2, 48, 64))
    motion = random_model().segment(np.zeros((2, 144, 192, 3), np.uint8), masks=masks, image_size=64)
    loaded = Motion.load(motion.save(tmp_path / "out"))
    np.testing.assert_array_equal(loaded.dynamic_mask, masks)
    assert loaded.given_masks is None
    repeated = masks.repeat(3, axis=1).repeat(3, axis=2)
    np.testing.assert_array_equal(np.stack([frame.mask for frame in loaded.original_masks()]), repeated)


def test_packed_masks_are_the_masks():
    masks = [some_masks((1, *size), seed=i)[0] for i, size in enumerate(((1, 1), (5, 8), (7, 9), (3, 31)))]
    packed = PackedMasks.pack(masks)
    assert len(packed) == 4 and packed.sizes == [(1, 1), (8, 5), (9, 7), (31, 3)]
    for unpacked, mask in zip(packed, masks, strict=True):
        np.testing.assert_array_equal(unpacked, mask, strict=True)
    assert sum(rows.nbytes for rows in packed.rows) <= sum(mask.size // 8 + len(mask) for mask in masks)


@pytest.mark.parametrize(
    "given, reason",
    [
        (torch.zeros(2, 64, 96, requires_grad=True), r"^masks is no array .*grad.*; expected"),
        ([np.zeros((64, 96), bool), np.zeros((48, 96), bool)], "^masks is no array .*; expected"),
        (np.zeros((2, 64, 96), complex), "^masks is complex128 of shape"),
        (np.zeros((2, 0, 96), bool), "^Mask 0 is 96x0 pixels; expected"),
        (np.full((2, 64, 96), 255, np.int16) * np.int16(-1), "^Mask 0 holds the values -255"),
    ],
    ids=["gradient", "unequal", "complex", "empty", "negative"],
)
def test_more_of_what_does_not_fit_is_refused_in_one_sentence(given, reason):
    with pytest.raises(InputError, match=reason) as caught:
        read_masks(given, frames_like(some_masks()))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_files_of_unequal_sizes_are_named(tmp_path):
    masks = some_masks()
    folder = write_masks(tmp_path / "masks", masks)
    Image.fromarray(np.zeros((50, 50), np.uint8)).save(folder / "mask_1.png")
    with pytest.raises(InputError, match=r"mask_1.png is 50x50 pixels; expected"):
        read_masks(folder, frames_like(masks))
