"""Small data sets in the official layouts are read back to the truth, and every broken file is named."""

from __future__ import annotations

import dataclasses
import json
from contextlib import contextmanager
from functools import cache

import numpy as np
import pytest
from dataset_layouts import (
    T0,
    TAG,
    write_adt,
    write_array,
    write_davis,
    write_dycheck,
    write_image,
    write_json,
    write_sintel,
    write_tum,
)

from easi3r.demo.rendering import render
from easi3r.demo.worlds import make_world
from easi3r.errors import InputError
from evaluation.datasets import DATASETS, davis
from evaluation.datasets.sintel import POSE_SEQUENCES, SEQUENCES, Sintel, moves
from evaluation.datasets.tum import Bonn, Tum

N, WIDTH, HEIGHT = 6, 64, 48
EVERY = slice(None)
D16 = [
    *("blackswan", "bmx-trees", "breakdance", "camel", "car-roundabout", "car-shadow", "cows", "dance-twirl", "dog"),
    *("drift-chicane", "drift-straight", "goat", "horsejump-high", "kite-surf", "libby", "motocross-jump"),
    *("paragliding-launch", "parkour", "scooter-black", "soapbox"),
]
D17_MORE = ("bike-packing", "dogs-jump", "gold-fish", "india", "judo", "lab-coat", "loading", "mbike-trick", "pigs")
D17 = sorted([*D16, *D17_MORE, "shooting"])
VARIANTS = [(name, variant) for name, dataset in DATASETS.items() for variant in dataset.variants if name != "worlds"]


@cache
def make_clip(num_frames=N):
    return render(make_world(3, num_frames=num_frames), WIDTH, HEIGHT, supersample=1)


def write(name, variant, root, clip, count=None):
    """(root, the first sequence's name): the first ``count`` sequences of the variant, or all, from one clip."""
    if name == "davis":
        names = {"2016": D16, "2017": D17, "all": ["bear", "zebra"]}[variant][:count]
        write_davis(root, names, clip)
    elif name == "sintel":
        names = (POSE_SEQUENCES if variant.endswith("poses") else SEQUENCES)[:count]
        write_sintel(root, names, clip)
    elif name in ("tum", "bonn"):
        dataset = {"tum": Tum, "bonn": Bonn}[name]
        names = dataset.sequences[:count]
        write_tum(root, [f"{dataset.prefix}{name}" for name in names], clip)
    elif name == "dycheck":
        names = ["apple", "spin"][:count]
        write_dycheck(root, names, clip)
    else:
        names = ["a_release_seq1", "b_release_seq2"][:count]
        write_adt(root, names, clip)
    return root, names[0]


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """``roots(name, variant)``: a whole data set of three frames per sequence; Sintel's and DyCheck's serve all."""

    @cache
    def written(name, variant):
        return write(name, variant, tmp_path_factory.mktemp(name), make_clip(3))[0]

    return lambda name, variant: written(name, variant if name == "davis" else DATASETS[name].variants[0])


@pytest.fixture(params=VARIANTS, ids="-".join)
def small(request, roots):
    """A reader of three frames per sequence, all files there, and its first sequence; leave it as it was."""
    dataset = DATASETS[request.param[0]](roots(*request.param), request.param[1])
    return dataset, dataset.names()[0]


@contextmanager
def changed(path, content):
    """The file has other bytes, or None: is gone."""
    kept = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(kept)


def check_poses(sequence, clip):
    np.testing.assert_allclose(sequence.camera_to_world, clip.camera_to_world, atol=1e-6)
    assert sequence.camera_to_world.dtype == np.float64


# --- the truth comes back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["2016", "2017", "all"])
def test_davis(variant, tmp_path):
    root, first = write("davis", variant, tmp_path, make_clip(), count=2)
    dataset, clip = DATASETS["davis"](root, variant), make_clip()
    assert dataset.names() == {"2016": D16, "2017": D17, "all": ["bear", "zebra"]}[variant]
    sequence = dataset.read(first, EVERY)
    assert sequence.name == first
    assert sequence.images == tuple(root / "JPEGImages" / "480p" / first / f"{i:05}.jpg" for i in range(N))
    assert clip.dynamic_mask.any() and len(np.unique(clip.object_ids[clip.dynamic_mask])) > 1  # so merging shows
    np.testing.assert_array_equal(sequence.masks, clip.dynamic_mask)
    assert sequence.masks.dtype == bool and sequence.has_mask.all()
    np.testing.assert_allclose(sequence.times_s, np.arange(N) / 24)
    assert sequence.camera_to_world is sequence.intrinsics is sequence.depth is None


def test_davis_takes_masks_in_grey_and_in_colour_but_not_in_16_bits(tmp_path, fails_with):
    root, _ = write("davis", "all", tmp_path, make_clip())
    path, moving = root / "Annotations" / "480p" / "bear" / "00002.png", make_clip().dynamic_mask[2]
    colour = np.zeros((*moving.shape, 3), dtype=np.uint8)
    colour[moving, 2] = 7
    for pixels in ((255 * moving).astype(np.uint8), moving.astype(np.uint8), colour, moving):
        write_image(path, pixels)
        np.testing.assert_array_equal(DATASETS["davis"](root, "all").read("bear", slice(2, 3)).masks[0], moving)
    write_image(path, moving.astype(np.uint16))
    with fails_with(InputError, str(path), "'I;16'"):
        DATASETS["davis"](root, "all").read("bear", EVERY)


def test_the_split_lists_of_davis_are_the_published_ones():
    assert DATASETS["davis"](davis._LISTS, "2016").names() == D16 and len(D16) == 20
    assert DATASETS["davis"](davis._LISTS, "2017").names() == D17 and len(D17) == 30


def test_all_of_davis_is_what_the_official_lists_name(tmp_path, fails_with):
    root, _ = write("davis", "all", tmp_path, make_clip())
    dataset, lists = DATASETS["davis"](root, "all"), root / "ImageSets" / "2017"
    (root / "JPEGImages" / "480p" / "aerobatics").mkdir()  # of the test split: no annotations
    assert dataset.names() == ["bear", "zebra"]
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("zebra\n")
    assert dataset.names() == ["bear", "zebra"]
    (lists / "val.txt").write_text("bear\ntractor\n")
    assert dataset.names() == ["bear", "tractor", "zebra"]
    sentences = dataset.missing()
    assert len(sentences) == 2 and all("480p/tractor is missing" in sentence for sentence in sentences)
    with fails_with(InputError, "480p/tractor/00000.jpg is missing"):
        dataset.read("tractor", EVERY)


@pytest.mark.parametrize("rendering", ["final", "clean"])
def test_sintel(rendering, tmp_path):
    clip, root = make_clip(), write_sintel(tmp_path, ["alley_2"], make_clip())
    sequence = DATASETS["sintel"](root, rendering).read("alley_2", EVERY)
    assert sequence.images == tuple(
        root / "training" / rendering / "alley_2" / f"frame_{i + 1:04}.png" for i in range(N)
    )
    check_poses(sequence, clip)
    np.testing.assert_array_equal(sequence.intrinsics, clip.intrinsics)  # no half pixel
    np.testing.assert_array_equal(sequence.depth, clip.depth)
    assert sequence.depth.dtype == np.float32
    np.testing.assert_allclose(sequence.times_s, np.arange(N) / 24)
    assert sequence.has_mask.tolist() == [True] * (N - 1) + [False] and not sequence.masks[-1].any()
    masks, truth = sequence.masks[:-1], clip.dynamic_mask[:-1]
    seen = np.stack([clip.flow(i, i + 1)[1] for i in range(N - 1)])
    assert (masks == truth)[seen].mean() > 0.99
    assert (masks & truth)[seen & truth].mean() > 0.95 and truth.mean() > 0.02  # not by showing nothing


def test_the_threshold_of_sintel_is_that_of_the_flow_off_the_still_world(tmp_path):
    clip, root = make_clip(), write_sintel(tmp_path, ["alley_2"], make_clip())
    off = [clip.flow(i, i + 1)[0] - clip.flow(i, i + 1, camera_only=True)[0] for i in range(N - 1)]
    off_px = np.linalg.norm(np.stack(off), axis=3)
    readers = {0.1: Sintel(root, "final"), 13.75: Sintel(root, "clean-13.75px")}
    for threshold in (0.5, 2.0, 5.0):
        readers[threshold] = Sintel(root, "final-13.75px", motion_px=threshold)
    shares = []
    for threshold, reader in sorted(readers.items()):
        clear = np.abs(off_px - threshold) > 1e-3
        masks = reader.read("alley_2", EVERY).masks[:-1]
        np.testing.assert_array_equal(masks[clear], (off_px > threshold)[clear])
        shares.append(masks.mean())
    assert shares == sorted(shares, reverse=True) and shares[0] > shares[2] > 0


def test_the_sequences_of_sintel():
    assert len(SEQUENCES) == 23 and len(POSE_SEQUENCES) == 14 and set(POSE_SEQUENCES) < set(SEQUENCES)
    assert Sintel(davis._LISTS, "clean").names() == list(SEQUENCES)
    assert Sintel(davis._LISTS, "clean-poses").names() == list(POSE_SEQUENCES)


def test_poses_of_sintel_need_no_flow(tmp_path):
    root = write_sintel(tmp_path, POSE_SEQUENCES, make_clip(2))
    for path in root.glob("training/flow/*/*"):
        path.unlink()
    dataset = Sintel(root, "final-poses")
    assert dataset.missing() == []
    sequence = dataset.read("alley_2", EVERY)
    assert sequence.masks is sequence.has_mask is None and sequence.depth is not None
    assert len([sentence for sentence in Sintel(root).missing() if ".flo is missing" in sentence]) == 14


def test_what_sintel_does_not_know_does_not_move(tmp_path):
    root, clip = write_sintel(tmp_path, ["alley_2"], make_clip()), make_clip()
    flow_path, depth_path = (
        root / "training" / kind / "alley_2" / f"frame_0001.{suffix}"
        for kind, suffix in (("flow", "flo"), ("depth", "dpt"))
    )
    before = Sintel(root).read("alley_2", EVERY)
    at = np.argwhere(before.masks[0])
    assert len(at) > 20
    flow = np.fromfile(flow_path, dtype="<f4")
    depth = np.fromfile(depth_path, dtype="<f4")
    flow_pixels, depth_pixels = flow[3:].reshape(HEIGHT, WIDTH, 2), depth[3:].reshape(HEIGHT, WIDTH)
    for (y, x), value in zip(at[:6], (np.nan, np.inf, -np.inf, 1e10, -1e9, 1.6e9), strict=True):
        flow_pixels[y, x, y % 2] = value
    for (y, x), value in zip(at[10:15], (np.nan, np.inf, -np.inf, 0, -1), strict=True):
        depth_pixels[y, x] = value
    flow.tofile(flow_path)
    depth.tofile(depth_path)
    after = Sintel(root).read("alley_2", EVERY)
    gone = [tuple(place) for place in np.concatenate([at[:6], at[10:15]])]
    assert not any(after.masks[0][place] for place in gone)
    assert (after.masks[0] != before.masks[0]).sum() == len(gone)
    assert sorted(map(tuple, np.argwhere(np.isnan(after.depth[0])))) == sorted(map(tuple, at[10:15]))
    np.testing.assert_array_equal(after.masks[1:], before.masks[1:])
    np.testing.assert_array_equal(after.depth[1:], clip.depth[1:])


def test_a_still_point_that_the_next_camera_leaves_behind_does_not_move():
    intrinsics, ahead = np.array([[50.0, 0, 3.5], [0, 50, 2.5], [0, 0, 1]]), np.eye(4)
    ahead[2, 3] = -2  # world-to-camera of a camera two metres ahead
    depth, flow = np.full((6, 8), 3.0, dtype=np.float32), np.zeros((6, 8, 2), dtype=np.float32)
    depth[:, :4] = 1.0
    moving = moves(flow, depth, (intrinsics, np.eye(4)), (intrinsics, ahead), 0.1)
    assert not moving[:, :4].any() and moving[:, 4:].all()  # the others should have moved by (3 / 1 - 1) x - cx
    x, y = np.meshgrid(np.arange(8) - 3.5, np.arange(6) - 2.5)
    assert not moves(2 * np.stack([x, y], -1), depth, (intrinsics, np.eye(4)), (intrinsics, ahead), 1e-4).any()


@pytest.mark.parametrize("name, first", [("tum", "sitting_static"), ("bonn", "balloon2")])
def test_tum_and_bonn(name, first, tmp_path):
    root, clip = tmp_path, make_clip()
    dataset = DATASETS[name](root, None)
    folder = {"tum": "rgbd_dataset_freiburg3_sitting_static", "bonn": "rgbd_bonn_balloon2"}[name]
    write_tum(root, [folder], clip, without_pose=[2], without_depth=[4])
    assert dataset.names()[0] == first and len(dataset.names()) == {"tum": 8, "bonn": 5}[name]
    sequence, kept = dataset.read(first, EVERY), [0, 1, 3, 4, 5]
    np.testing.assert_allclose(sequence.times_s, T0 + np.array(kept) / 30, atol=1e-6)
    assert sequence.images == tuple(root / folder / "rgb" / f"{T0 + i / 30:.6f}.png" for i in kept)
    np.testing.assert_allclose(sequence.camera_to_world, clip.camera_to_world[kept], atol=1e-6)
    assert np.isnan(sequence.depth[3]).all()
    np.testing.assert_allclose(sequence.depth[[0, 1, 2, 4]], clip.depth[[0, 1, 3, 5]], atol=0.5 / 5000 + 1e-6)
    assert sequence.masks is sequence.has_mask is sequence.intrinsics is None
    part = dataset.read(first, slice(1, 4, 2))  # counts the frames that have a pose
    assert part.images == (sequence.images[1], sequence.images[3])
    depth_path = root / folder / "depth" / f"{T0 + 0.004:.6f}.png"
    values = np.round(5000 * clip.depth[0]).astype(np.uint16)
    values[7, 9] = 0
    write_image(depth_path, values)
    assert np.argwhere(np.isnan(dataset.read(first, slice(1)).depth[0])).tolist() == [[7, 9]]


def test_lines_of_tum_may_come_in_any_order(tmp_path):
    root = write_tum(tmp_path, ["rgbd_bonn_balloon2"], make_clip())
    before = Bonn(root).read("balloon2", EVERY)
    for name in ("rgb", "depth", "groundtruth"):
        path = root / "rgbd_bonn_balloon2" / f"{name}.txt"
        path.write_text("\n".join(reversed(path.read_text().splitlines())), encoding="utf-8")
    after = Bonn(root).read("balloon2", EVERY)
    assert after.images == before.images
    np.testing.assert_array_equal(after.camera_to_world, before.camera_to_world)
    np.testing.assert_array_equal(after.depth, before.depth)


def test_dycheck_refined(tmp_path):
    clip, root = make_clip(), write_dycheck(tmp_path, ["spin", "apple"], make_clip())
    dataset = DATASETS["dycheck"](root, None)
    assert dataset.variant == "refined" and dataset.names() == ["apple", "spin"]
    sequence = dataset.read("apple", EVERY)
    assert sequence.images == tuple(root / "apple" / "rgb" / "1x" / f"0_{2 * i:05}.png" for i in range(N))
    check_poses(sequence, clip)
    np.testing.assert_allclose(sequence.intrinsics, clip.intrinsics, atol=1e-6)
    np.testing.assert_allclose(sequence.depth, clip.depth, rtol=1e-6)
    np.testing.assert_array_equal(sequence.masks, clip.dynamic_mask)
    np.testing.assert_allclose(sequence.times_s, np.arange(N) * 2 / 30)
    assert sequence.has_mask.all() and sequence.depth.dtype == np.float32


def test_dycheck_clamps_the_aligned_depth(tmp_path):
    clip, root = make_clip(), write_dycheck(tmp_path, ["apple"], make_clip())
    inverse = 1 / clip.depth
    inverse[1, 5, 6], inverse[1, 5, 7], inverse[4, 0, 0], inverse[4, 0, 1] = 0, 1e-9, -3, np.nan
    inverse[2, 3, 3] = 1 / 100
    folder = root / "apple" / "flow3d_preprocessed" / "aligned_depth_anything_colmap" / "1x"
    for i in range(N):
        write_array(folder / f"0_{2 * i:05}.npy", inverse[i])
    maxima = [clip.depth[0].max(), 1000, 100, clip.depth[3].max(), 1000, clip.depth[5].max()]
    farthest = 2.5 * np.median(maxima)
    assert clip.depth.max() < farthest < 1000
    expected = np.minimum(1 / np.maximum(inverse, 1e-3), farthest)
    dataset = DATASETS["dycheck"](root, "refined")
    np.testing.assert_allclose(dataset.read("apple", EVERY).depth, expected, rtol=1e-6)
    assert np.isnan(expected[4, 0, 1]) and expected[1, 5, 6] == expected[4, 0, 0] == farthest
    # the limit does not depend on the choice of frames
    np.testing.assert_allclose(dataset.read("apple", slice(1, 3)).depth, expected[1:3], rtol=1e-6)


def test_dycheck_original(tmp_path):
    clip, root = make_clip(), write_dycheck(tmp_path, ["apple"], make_clip())
    lidar = clip.depth[2].copy()
    lidar[4, 5] = 0
    write_array(root / "apple" / "depth" / "1x" / "0_00004.npy", lidar[..., None])
    sequence = DATASETS["dycheck"](root, "original").read("apple", EVERY)
    check_poses(sequence, clip)
    np.testing.assert_allclose(sequence.intrinsics, clip.intrinsics, atol=1e-9)
    expected = clip.depth.copy()
    expected[2, 4, 5] = np.nan
    np.testing.assert_array_equal(sequence.depth, expected)


def test_frames_that_colmap_did_not_place_have_no_pose(tmp_path):
    root = write_dycheck(tmp_path, ["apple"], make_clip())
    path = root / "apple" / "flow3d_preprocessed" / "colmap" / "sparse" / "images.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], *lines[5:], ""]))  # a comment, then two lines per image
    dataset = DATASETS["dycheck"](root, None)
    sequence = dataset.read("apple", EVERY)
    lost = [False, True, False, False, False, False]
    np.testing.assert_array_equal(np.isnan(sequence.camera_to_world).all(axis=(1, 2)), lost)
    np.testing.assert_array_equal(np.isnan(sequence.intrinsics).all(axis=(1, 2)), lost)
    assert np.isnan(dataset.read("apple", slice(1, 2)).camera_to_world).all()


def test_adt(tmp_path):
    clip, root = make_clip(), write_adt(tmp_path, ["b_release_x", "a_release_y"], make_clip())
    (root / "notes").mkdir()
    dataset = DATASETS["adt"](root, None)
    assert dataset.names() == ["a_release_y", "b_release_x"]
    sequence = dataset.read("b_release_x", EVERY)
    assert [path.name for path in sequence.images] == [f"{8 + i}.png" for i in range(N)]
    check_poses(sequence, clip)
    np.testing.assert_allclose(sequence.times_s, np.arange(N) / 30)
    assert sequence.masks is sequence.intrinsics is sequence.depth is None


# --- what holds of all ----------------------------------------------------------------------------------------------


def test_nothing_is_missing_from_a_whole_data_set(small):
    dataset, _ = small
    assert dataset.missing() == []
    assert dataset.seen_on_real_files is False
    for name in dataset.names()[:2]:
        assert len(dataset.read(name, EVERY).images) == 3


def test_a_choice_of_frames_is_a_part_of_all_of_them(small):
    dataset, first = small
    whole = dataset.read(first, EVERY)
    for frames in (slice(1), slice(0, None, 2), slice(1, 3), slice(2, 99), slice(-1, None)):
        part = dataset.read(first, frames)
        for field in dataclasses.fields(whole):
            expected = getattr(whole, field.name)
            if field.name != "name" and expected is not None:
                np.testing.assert_array_equal(getattr(part, field.name), expected[frames], err_msg=field.name)


def test_every_array_has_a_row_per_frame_and_the_images_are_there(small):
    dataset, first = small
    sequence = dataset.read(first, EVERY)
    assert all(path.is_file() for path in sequence.images)
    shapes = {
        "times_s": (3,),
        "masks": (3, HEIGHT, WIDTH),
        "has_mask": (3,),
        "camera_to_world": (3, 4, 4),
        "intrinsics": (3, 3, 3),
        "depth": (3, HEIGHT, WIDTH),
    }
    for name, shape in shapes.items():
        assert getattr(sequence, name) is None or getattr(sequence, name).shape == shape
    assert (np.diff(sequence.times_s) > 0).all()


def test_a_choice_without_frames_is_refused(small, fails_with):
    dataset, first = small
    with fails_with(InputError, "[3::2]", "none of the 3 frames", first):
        dataset.read(first, slice(3, None, 2))


@pytest.mark.parametrize("name, variant", VARIANTS, ids=map("-".join, VARIANTS))
def test_a_sequence_of_one_frame(name, variant, tmp_path):
    root, first = write(name, variant, tmp_path, make_clip(1), count=1)
    dataset = DATASETS[name](root, variant)
    assert not [sentence for sentence in dataset.missing() if first in sentence]
    sequence = dataset.read(first, EVERY)
    assert len(sequence.images) == 1
    if name == "sintel" and not variant.endswith("poses"):
        assert sequence.has_mask.tolist() == [False] and not sequence.masks.any()


def test_every_file_that_is_missing_is_named(small, fails_with):
    dataset, first = small
    files = list(dataset.files(first))
    assert len(files) == len(set(files)) >= 6
    for path in files:
        with changed(path, None):
            sentences = dataset.missing()
            assert len(sentences) == 1 and "is missing" in sentences[0], sentences
            # without either form of COLMAP's files, the binary one is asked for
            named = path.with_suffix(".bin").name if path.parent.name == "sparse" else path.name
            assert named in sentences[0] and "python" not in sentences[0], sentences
            with fails_with(InputError, path.stem if path.parent.name == "sparse" else str(path)):
                dataset.read(first, EVERY)
    assert dataset.missing() == []


def test_every_empty_file_is_named(small, fails_with):
    dataset, first = small
    for path in dataset.files(first):
        with changed(path, b""), fails_with(InputError, str(path)):
            dataset.read(first, EVERY)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_every_file_of_truth_that_ends_early_is_named(small, share, fails_with):
    dataset, first = small
    images = set(dataset.read(first, EVERY).images)
    for path in dataset.files(first):
        whole = path.read_bytes()
        if path in images or path.suffix == ".txt" or (path.suffix == ".png" and share == 0.9):
            continue  # images are not decoded; a shorter list is a list; and small PNGs end in what none needs
        with changed(path, whole[: int(share * len(whole))]), fails_with(InputError, str(path)):
            dataset.read(first, EVERY)


def test_a_missing_folder_is_said_once(small, tmp_path, fails_with):
    dataset, first = small
    nowhere = type(dataset)(tmp_path / "nowhere", dataset.variant)
    (sentence,) = nowhere.missing()
    assert sentence.startswith(f"{tmp_path / 'nowhere'} is missing; expected the layout of {dataset.name}")
    assert sentence.endswith(".") and dataset.home in sentence
    with fails_with(InputError, "nowhere"):
        nowhere.read(first, EVERY)
    empty = type(dataset)(tmp_path, dataset.variant).missing()
    assert empty and all(str(tmp_path) in sentence for sentence in empty)
    folder = list(dataset.files(first))[-1].parent
    hidden = folder.with_name("elsewhere")
    folder.rename(hidden)
    sentences = dataset.missing()
    hidden.rename(folder)
    if dataset.name == "davis" and dataset.variant == "all":  # without lists, nothing says that it should be there
        assert sentences == []
    else:
        assert len([sentence for sentence in sentences if f"{folder} is missing" in sentence]) == 1


def test_a_frame_that_both_sides_lack_is_missed(tmp_path):
    root, _ = write("davis", "all", tmp_path, make_clip())
    (root / "JPEGImages" / "480p" / "bear" / "00002.jpg").unlink()
    (root / "Annotations" / "480p" / "bear" / "00002.png").unlink()
    sentences = DATASETS["davis"](root, "all").missing()
    assert [any(name in sentence for sentence in sentences) for name in ("00002.jpg", "00002.png")] == [True, True]
    assert len(sentences) == 2


def test_files_of_another_size_are_named(small, fails_with):
    dataset, first = small
    wide = np.ones((HEIGHT, WIDTH + 2), dtype=np.float32)
    size = np.array([WIDTH + 2, HEIGHT], dtype="<i4").tobytes()
    tried = set()
    for path in dataset.files(first):
        kept = path.read_bytes()
        if path.suffix == ".npy":
            write_array(path, wide)
        elif path.suffix == ".dpt":
            path.write_bytes(TAG.tobytes() + size + wide.tobytes())
        elif path.suffix == ".flo":
            path.write_bytes(TAG.tobytes() + size + wide.tobytes() * 2)
        elif path.suffix in (".png", ".jpg"):
            write_image(path, wide.astype(np.uint16 if path.parent.name == "depth" else np.uint8))
        else:
            continue
        tried.add(path.parent)
        content = path.read_bytes()
        path.write_bytes(kept)
        with changed(path, content), fails_with(InputError, f"{HEIGHT} x {WIDTH}"):
            dataset.read(first, EVERY)
    assert tried


def test_unknown_variants_are_refused(fails_with, tmp_path):
    with fails_with(InputError, "davis has no variant '2018'", "2016, 2017, all", "did you mean"):
        DATASETS["davis"](tmp_path, "2018")
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        if name != "worlds":
            with fails_with(InputError, f"{name} has no variant 'x'"):
                dataset(tmp_path, "x")


# --- files that are not what they should be -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sintel(tmp_path_factory):
    return write_sintel(tmp_path_factory.mktemp("sintel"), ["alley_2"], make_clip(3))


@pytest.mark.parametrize("kind, suffix", [("flow", "flo"), ("depth", "dpt"), ("camdata_left", "cam")])
def test_files_of_sintel_have_their_tag_and_their_length(kind, suffix, sintel, fails_with):
    path = sintel / "training" / kind / "alley_2" / f"frame_0002.{suffix}"
    whole = path.read_bytes()
    for length in {0, 1, 4, 7, 11, 12, 100, len(whole) - 1}:
        with changed(path, whole[:length]), fails_with(InputError, str(path)):
            Sintel(sintel).read("alley_2", EVERY)
    with changed(path, whole + b"\0"), fails_with(InputError, str(path), "bytes after its tag"):
        Sintel(sintel).read("alley_2", EVERY)
    for tag in (b"PIEH"[::-1], np.float32(202021.0).tobytes()):
        with changed(path, tag + whole[4:]), fails_with(InputError, str(path), "202021.25"):
            Sintel(sintel).read("alley_2", EVERY)
    if suffix != "cam":
        for size in ((0, 0), (-WIDTH, -HEIGHT), (WIDTH, HEIGHT + 1), (2**30, 2**30)):
            wrong = whole[:4] + np.array(size, dtype="<i4").tobytes() + whole[12:]
            with changed(path, wrong), fails_with(InputError, str(path)):
                Sintel(sintel).read("alley_2", EVERY)


def test_cameras_that_are_none_are_named(sintel, fails_with, tmp_path):
    path = sintel / "training" / "camdata_left" / "alley_2" / "frame_0002.cam"
    numbers = np.frombuffer(path.read_bytes()[4:], dtype="<f8")
    for at, value in ((9, 1.5), (12, np.nan), (0, 0.0), (2, np.inf), (10, 0.9)):
        wrong = numbers.copy()
        wrong[at] = value
        with changed(path, TAG.tobytes() + wrong.tobytes()), fails_with(InputError, str(path)):
            Sintel(sintel).read("alley_2", EVERY)
    root = write_adt(tmp_path, ["a_release"], make_clip(3))
    path = root / "a_release" / "camera" / "9.json"
    for w2c in (np.eye(3).tolist(), np.diag([1, 1, -1, 1]).tolist(), (2 * np.eye(4)).tolist(), "x", [[1, 2], [3]]):
        write_json(path, {"w2c": w2c})
        with fails_with(InputError, str(path)):
            DATASETS["adt"](root, None).read("a_release", EVERY)
    write_json(path, {"c2w": np.eye(4).tolist()})
    with fails_with(InputError, str(path), "'w2c'"):
        DATASETS["adt"](root, None).read("a_release", EVERY)


@pytest.mark.parametrize(
    "name, text, part",
    [
        ("rgb.txt", "# nothing", "names no file"),
        ("rgb.txt", "noon rgb/1.png", "could not convert"),
        ("rgb.txt", f"{T0}", "no whole list"),
        ("rgb.txt", f"{T0} rgb/none.png", "none.png is missing"),
        ("rgb.txt", "1.0 rgb/none.png", "within 0.02 s"),
        ("groundtruth.txt", "# nothing", "no numbers"),
        ("groundtruth.txt", f"{T0} 0 0 0 0 0 1", "8 finite numbers"),
        ("groundtruth.txt", f"{T0} 0 0 0 0 0 0 2", "not of length 1"),
        ("groundtruth.txt", f"{T0} 0 nan 0 0 0 0 1", "8 finite numbers"),
        ("groundtruth.txt", "1.0 0 0 0 0 0 0 1", "within 0.02 s"),
        ("depth.txt", f"{T0} depth/none.png", "none.png is missing"),
    ],
)
def test_lists_of_tum_that_are_wrong_are_named(name, text, part, tmp_path, fails_with):
    root = write_tum(tmp_path, ["rgbd_bonn_crowd2"], make_clip(3))
    (root / "rgbd_bonn_crowd2" / name).write_text(text)
    with fails_with(InputError, str(root / "rgbd_bonn_crowd2"), part):
        Bonn(root).read("crowd2", EVERY)


def test_depth_of_tum_has_16_bits(tmp_path, fails_with):
    root = write_tum(tmp_path, ["rgbd_bonn_crowd2"], make_clip(3))
    path = root / "rgbd_bonn_crowd2" / "depth" / f"{T0 + 0.004:.6f}.png"
    write_image(path, np.ones((HEIGHT, WIDTH), dtype=np.uint8))
    with fails_with(InputError, str(path), "16 bits"):
        Bonn(root).read("crowd2", EVERY)


@pytest.mark.parametrize(
    "name, change, part",
    [
        ("extra.json", {"fps": 0}, "above 0"),
        ("extra.json", {"fps": "fast"}, "no whole file"),
        ("extra.json", {"factor": 1}, "'fps'"),
        ("splits/train.json", {"frame_names": [], "time_ids": []}, "at least one"),
        ("splits/train.json", {"frame_names": ["0_00000"], "time_ids": [0, 1]}, "'time_ids'"),
        ("splits/train.json", {"frame_names": ["0_00000", "9_9"], "time_ids": [0, 1]}, "9_9.png is missing"),
        ("splits/train.json", ["0_00000"], "'frame_names'"),
    ],
)
def test_lists_of_dycheck_that_are_wrong_are_named(name, change, part, tmp_path, fails_with):
    root = write_dycheck(tmp_path, ["apple"], make_clip(3))
    (root / "apple" / name).write_text(json.dumps(change))
    with fails_with(InputError, str(root / "apple"), part):
        DATASETS["dycheck"](root, None).read("apple", EVERY)
    if part.startswith("9_9") or "train" in name:
        assert DATASETS["dycheck"](root, None).missing()


def test_cameras_of_colmap_are_for_the_frames(tmp_path, fails_with):
    root = write_dycheck(tmp_path, ["apple"], make_clip(3))
    path = root / "apple" / "flow3d_preprocessed" / "colmap" / "sparse" / "cameras.txt"
    path.write_text(path.read_text().replace(f"{WIDTH} {HEIGHT}", f"{2 * WIDTH} {2 * HEIGHT}"))
    with fails_with(InputError, str(path), f"{WIDTH}x{HEIGHT}"):
        DATASETS["dycheck"](root, None).read("apple", EVERY)
