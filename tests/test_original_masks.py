"""Masks and scores at the size of the source frames: guided by them where they are, and saved with their meaning."""

from __future__ import annotations

import json

import cv2
import imageio.v3 as iio
import numpy as np
import pytest
from small_inputs import QUICK, listing, moving_square, random_model, run_cli, write_images, write_video
from test_bad_input import assert_one_sentence
from test_export import world_scene

from easi3r import Motion, Scene, cli
from easi3r.demo.rendering import render
from easi3r.demo.worlds import make_world
from easi3r.errors import InputError, OutputError
from easi3r.export import FORMATS, ExportOptions, export_formats
from easi3r.frames import apply_crop
from easi3r.mask_files import KEYWORD, MEANINGS, read_meaning, write_png
from easi3r.original_masks import guided
from easi3r.scene import load_result
from easi3r.structures import AttentionMaps, Crop

CROP = Crop(original=(256, 192), resized=(64, 48), offset=(0, 0), size=(64, 48))


def motion_of(images, masks, crop=CROP, source="array", **changes):
    """What ``segment`` would give for source frames [n, h, w, 3] if it found ``masks`` [n, H, W]."""
    n, height, width = masks.shape
    names = changes.pop("names", [f"frame_{i}.png" for i in range(n)])
    crop_values = {name: list(getattr(crop, name)) for name in ("original", "resized", "offset", "size")}
    values = {
        "images": np.stack([apply_crop(image, crop) for image in images]),
        "dynamic_score": masks.astype(np.float32),
        "dynamic_mask": masks,
        "attention": AttentionMaps(*np.zeros((5, n, height // 16, width // 16), np.float32)),
        "timestamps": np.arange(n) / 10,
        "meta": {"source": str(source), "names": names, "crops": [crop_values] * n},
    }
    return Motion(**values | changes)


@pytest.fixture(scope="module")
def world():
    """Source frames, their true masks, and these as the network sees them."""
    clip = render(make_world(101, num_frames=3), *CROP.original, supersample=1)
    small = [cv2.resize(mask.astype(np.float32), CROP.size, interpolation=cv2.INTER_AREA) for mask in clip.dynamic_mask]
    return clip.images, clip.dynamic_mask, np.stack(small) > 0.5


def iou(found, true):
    return float((found & true).sum() / (found | true).sum())


# --- the filter


def slow_guided(values, image, guide, crop, radius, eps):
    """He, Sun and Tang's equations, window after window; then the colours of the source at each of its pixels."""
    height, width = values.shape
    colors = image / 255.0
    slopes, offsets = np.zeros((height, width, 3)), np.zeros((height, width))

    def window(array, y, x):  # mirrored at the border, the last pixel not repeated
        padded = np.pad(array, [(radius, radius)] * 2 + [(0, 0)] * (array.ndim - 2), mode="reflect")
        return padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1].reshape((2 * radius + 1) ** 2, -1)

    for y in range(height):
        for x in range(width):
            inside, targets = window(colors, y, x), window(values, y, x)[:, 0]
            centred = inside - inside.mean(axis=0)
            covariance = centred.T @ centred / len(inside) + eps * np.eye(3)
            slopes[y, x] = np.linalg.solve(covariance, centred.T @ (targets - targets.mean()) / len(inside))
            offsets[y, x] = targets.mean() - slopes[y, x] @ inside.mean(axis=0)
    linear = np.dstack([slopes, offsets])
    mean = [[window(linear, y, x).mean(axis=0) for x in range(width)] for y in range(height)]
    enlarged = cv2.resize(np.array(mean), crop.original, interpolation=cv2.INTER_LINEAR)
    return (enlarged[..., :3] * (guide / 255.0)).sum(axis=2) + enlarged[..., 3]


def test_the_fast_filter_is_the_slow_one():
    rng = np.random.default_rng(0)
    crop = Crop(original=(32, 24), resized=(16, 12), offset=(0, 0), size=(16, 12))
    guide = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = apply_crop(guide, crop)
    values = rng.random((12, 16)).astype(np.float32)
    for radius, eps in ((1, 1e-3), (2, 1e-2)):
        fast = guided(values[..., None], image, guide, crop, radius, eps)[..., 0]
        np.testing.assert_allclose(fast, slow_guided(values, image, guide, crop, radius, eps), atol=2e-3)


def test_an_edge_of_the_image_becomes_the_edge_of_the_mask():
    x = np.arange(256)
    image = np.where((x < 101)[None, :, None], np.uint8([200, 60, 40]), np.uint8([40, 60, 200])).repeat(192, axis=0)
    masks = np.broadcast_to(np.arange(64) < 25, (1, 48, 64)).copy()  # the network's pixel 25 holds source 100 to 103
    frame = next(motion_of([image], masks).original_masks([image]))
    np.testing.assert_array_equal(frame.mask, np.broadcast_to(x < 101, (192, 256)))
    assert frame.origin == "guided"


def test_guided_masks_are_nearer_to_the_truth_than_interpolated_and_repeated_ones(world):
    images, true, small = world
    motion = motion_of(images, small)
    with_images = np.stack([frame.mask for frame in motion.original_masks(images)])
    without = np.stack([frame.mask for frame in motion.original_masks()])
    repeated = small.repeat(4, axis=1).repeat(4, axis=2)
    assert iou(with_images, true) > iou(without, true) > iou(repeated, true) > 0.8
    assert 1 - iou(with_images, true) < 0.75 * (1 - iou(without, true))


@pytest.mark.parametrize("value", [False, True])
def test_all_and_nothing_stay(world, value):
    for images in (None, world[0]):
        for frame in motion_of(world[0], np.full((3, 48, 64), value)).original_masks(images):
            assert (frame.mask == value).all()
            np.testing.assert_allclose(frame.score, float(value), atol=1e-3)


@pytest.mark.parametrize("with_images", [False, True])
@pytest.mark.parametrize("size, image_size", [((67, 101), "native"), ((120, 203), 64), ((37, 53), 128)])
def test_sizes_types_and_what_lies_beyond_the_cut(size, image_size, with_images):
    clip = moving_square(2, *size)
    motion = random_model().segment(clip, image_size=image_size, threshold=0.001, evidence="attention", passes=1)
    motion.dynamic_mask[:], motion.dynamic_score[:] = True, 0.75
    crop = Crop(**{name: tuple(value) for name, value in motion.meta["crops"][0].items()})
    y, x = np.mgrid[: size[0], : size[1]]
    matrix = crop.matrix()
    u, v = matrix[0, 0] * x + matrix[0, 2], matrix[1, 1] * y + matrix[1, 2]
    seen = (u >= -0.5) & (u < crop.size[0] - 0.5) & (v >= -0.5) & (v < crop.size[1] - 0.5)
    frames = list(motion.original_masks(clip if with_images else None))
    assert len(frames) == 2 and not seen.all()
    for frame in frames:
        assert (frame.mask.shape, frame.mask.dtype, frame.score.dtype) == (size, bool, np.float32)
        np.testing.assert_array_equal(frame.mask, seen)
        np.testing.assert_allclose(frame.score, np.where(seen, 0.75, 0), atol=1e-3)


def test_masks_of_the_sources_own_pixels_are_not_touched():
    clip = moving_square(2, 67, 101)
    motion = random_model().segment(clip, **QUICK)
    for i, frame in enumerate(motion.original_masks()):
        np.testing.assert_array_equal(frame.mask[1:65, 2:98], motion.dynamic_mask[i])
        np.testing.assert_array_equal(frame.score[1:65, 2:98], motion.dynamic_score[i])
        assert frame.origin == "found" and frame.mask.sum() == motion.dynamic_mask[i].sum()


# --- where the source frames come from


def test_frames_are_read_again_from_where_they_came(world, tmp_path, caplog):
    images, _, small = world
    folder = write_images(tmp_path / "clip", images)
    from_folder = list(motion_of(images, small, source=folder).original_masks())
    for again, given in zip(from_folder, motion_of(images, small).original_masks(images), strict=True):
        np.testing.assert_array_equal(again.mask, given.mask)
        np.testing.assert_array_equal(again.score, given.score)
    video = write_video(tmp_path / "clip.avi", images)
    names = [f"frame {i}" for i in (0, 1, 2)]
    assert [frame.origin for frame in motion_of(images, small, source=video, names=names).original_masks()] == [
        "guided"
    ] * 3
    assert not caplog.records


@pytest.mark.parametrize("loss", ["array", "gone", "shorter", "broken", "another size"])
def test_without_the_source_masks_are_interpolated_with_one_warning(loss, world, tmp_path, caplog):
    images, _, small = world
    folder = write_images(tmp_path / "clip", images)
    motion = motion_of(images, small, source="array" if loss == "array" else folder)
    expected = ["guided", "guided", "interpolated"]
    if loss == "gone":
        folder.rename(tmp_path / "elsewhere")
    elif loss == "shorter":
        (folder / "frame_2.png").unlink()
    elif loss == "broken":
        (folder / "frame_2.png").write_bytes(b"\x89PNG\r\n")
    elif loss == "another size":
        iio.imwrite(folder / "frame_2.png", images[2][:100])
    if loss in ("array", "gone"):
        expected = ["interpolated"] * 3
    assert [frame.origin for frame in motion.original_masks()] == expected
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "without the edges of the source frames" in record.getMessage()
    assert "original_images" not in record.getMessage() and "\n" not in record.getMessage()


@pytest.mark.parametrize(
    "images, words",
    [
        (np.zeros((2, 192, 256, 3), np.uint8), ["2 images", "3 frames"]),
        (np.zeros((3, 96, 256, 3), np.uint8), ["Image 0", "[96, 256, 3]", "[192, 256, 3]"]),
        (np.zeros((3, 192, 256, 3), np.float32), ["Image 0", "float32", "uint8"]),
    ],
)
def test_images_that_do_not_fit_are_refused(world, images, words, fails_with):
    with fails_with(InputError, *words):
        list(motion_of(world[0], world[2]).original_masks(images))


def test_where_the_crops_are_unknown_it_is_said(world, fails_with):
    with fails_with(InputError, "crops"):
        list(motion_of(world[0], world[2], meta={}).original_masks())


# --- files


def test_masks_of_segment_are_exported(world, tmp_path, capfd):
    images, _, small = world
    folder = write_images(tmp_path / "clip", images)
    motion = motion_of(images, small, source=folder)
    saved = motion.save(tmp_path / "out")
    assert run_cli("export", saved, "--to", "masks") == 0
    out, err = capfd.readouterr()
    assert err == "" and out == f"wrote {saved / 'masks'}: {FORMATS['masks'].summary}\n"
    table = json.loads((saved / "masks" / "masks.json").read_text())["frames"]
    for i, frame in enumerate(motion.original_masks()):
        mask_file, score_file = (saved / "masks" / kind / f"frame_{i:05d}.png" for kind in ("mask", "score"))
        np.testing.assert_array_equal(iio.imread(mask_file), frame.mask * np.uint8(255), strict=True)
        score = iio.imread(score_file)
        assert score.dtype == np.uint16
        np.testing.assert_allclose(score / 65535, frame.score, atol=1e-5)
        assert read_meaning(mask_file) == MEANINGS["moving"] and "65535" in read_meaning(score_file)
        assert table[i] == {"file": mask_file.name, "source": f"frame_{i}.png", "origin": "guided"}
    assert run_cli("export", saved, "--to", "masks") == 1
    assert_one_sentence(capfd.readouterr().err.rstrip("\n"), "exists", "--overwrite")
    assert run_cli("export", saved, "--to", "masks", "--overwrite", "--quiet") == 0
    assert Motion.load(saved).num_frames == 3  # the export lies inside, and disturbs nothing


def test_other_formats_need_a_scene_and_say_so(world, tmp_path, capfd, fails_with):
    motion = motion_of(world[0], world[2])
    for name in FORMATS:
        if name != "masks":
            with fails_with(InputError, repr(name), "segment", "easi3r run"):
                motion.export(tmp_path / name, name)
    saved = motion.save(tmp_path / "out")
    assert run_cli("export", saved, "--to", "masks,ply") == 1
    out, err = capfd.readouterr()
    assert out.startswith(f"wrote {saved / 'masks'}") and "easi3r: ply was not exported: The format 'ply'" in err
    assert not (saved / "ply").exists()


def test_a_scene_has_masks_too_and_its_frames_are_there_one_after_the_other(tmp_path):
    scene = world_scene(3)
    written, failed = export_formats(scene, tmp_path, ["masks"], ExportOptions())
    assert list(written) == ["masks"] and not failed
    expected = [f"{kind}/frame_{i:05d}.png" for kind in ("mask", "score") for i in range(3)]
    assert listing(written["masks"]) == sorted(["mask", "score", "masks.json", "scene.json", *expected])
    frames = scene.original_masks()
    np.testing.assert_array_equal(next(frames).mask, scene.dynamic_mask[0])
    scene.dynamic_mask[1] = False  # not looked at before it is asked for
    assert not next(frames).mask.any()


def test_every_mask_that_is_written_says_what_it_means(tmp_path):
    scene = world_scene(2)
    scene.valid_mask[:, :, :3] = False
    saved = scene.save(tmp_path / "out")
    export_formats(scene, saved, ["colmap", "nerfstudio", "monst3r", "masks"], ExportOptions())
    meanings = {
        "dynamic_mask/frame_00000.png": MEANINGS["moving"],
        "masks/mask/frame_00001.png": MEANINGS["moving"],
        "monst3r/dynamic_mask_0.png": MEANINGS["moving"],
        "monst3r/enlarged_dynamic_mask_1.png": MEANINGS["moving"],
        "colmap/masks/frame_00000.png.png": MEANINGS["static"],
        "nerfstudio/masks/frame_00001.png": MEANINGS["static"],
    }
    for name, meaning in meanings.items():
        assert read_meaning(saved / name) == meaning, name
    assert "padding" in read_meaning(saved / "valid_mask" / "frame_00000.png")
    assert read_meaning(saved / "images" / "frame_00000.png") is None
    masks = [path for path in saved.rglob("*.png") if "mask" in str(path.relative_to(saved))]
    assert masks and all(read_meaning(path) for path in masks)
    pixels = iio.imread(saved / "dynamic_mask" / "frame_00000.png")
    np.testing.assert_array_equal(pixels == 255, scene.dynamic_mask[0])


def test_meanings_stand_in_a_text_chunk_that_other_programs_read(tmp_path):
    write_png(tmp_path / "a.png", np.eye(4, dtype=np.uint8) * 255, MEANINGS["moving"])
    data = (tmp_path / "a.png").read_bytes()
    chunk = b"tEXt" + KEYWORD.encode() + b"\0" + MEANINGS["moving"].encode()
    assert chunk in data and KEYWORD == "Description"
    np.testing.assert_array_equal(iio.imread(tmp_path / "a.png"), np.eye(4, dtype=np.uint8) * 255)


def test_either_kind_of_result_is_loaded(tmp_path, world):
    motion = motion_of(world[0], world[2])
    assert type(load_result(motion.save(tmp_path / "motion"))) is Motion
    assert type(load_result(world_scene(1).save(tmp_path / "scene"))) is Scene
    with pytest.raises(OutputError, match="no saved result"):
        load_result(tmp_path / "nothing")
    (tmp_path / "motion" / "scene.json").write_text("[]")
    with pytest.raises(OutputError, match="damaged"):
        load_result(tmp_path / "motion")


# --- the share that moves, and the overlay


def test_meta_says_how_much_of_each_frame_moves():
    masks = np.zeros((3, 48, 64), bool)
    masks[1, :12] = masks[2] = True
    motion = random_model().segment(moving_square(), masks=masks, **QUICK)
    assert motion.meta["moving_share"] == [0.0, 0.25, 1.0]
    found = random_model().segment(moving_square(), **QUICK)
    np.testing.assert_allclose(found.meta["moving_share"], found.dynamic_mask.mean(axis=(1, 2)), atol=1e-6)


def test_masks_of_segment_are_shown_as_a_video(world, tmp_path, capfd):
    saved, video = motion_of(world[0], world[2]).save(tmp_path / "out"), tmp_path / "overlay.mp4"
    assert cli.main(["show", str(saved), "--overlay", str(video)]) == 0
    assert f"wrote {video}" in capfd.readouterr().out
    assert len(iio.imread(video)) == 3
    assert cli.main(["show", str(saved), "--overlay", str(video), "--html", str(tmp_path / "a.html")]) == 1
    assert_one_sentence(capfd.readouterr().err.rstrip("\n"), "motion", "scene")
