"""Photographs of unequal size and orientation, on one canvas."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from alignment_runs import ate
from PIL import Image
from small_inputs import random_model, run_cli, write_checkpoint, write_images

from easi3r import Scene
from easi3r.alignment import align
from easi3r.attention_maps import AttentionStatistics, replace_sink
from easi3r.canvas import Box, batches, extended, placed, taken
from easi3r.config import AlignmentSettings, FrameSettings, PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import Family, make_world
from easi3r.errors import InputError
from easi3r.frames import read_frames
from easi3r.geometry import unproject
from easi3r.inference import empty_predictions, encode_frames, observe_pairs, to_network_input
from easi3r.metrics import depth_errors
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from evaluation.pair_predictions import synthetic_predictions

SIZES = [(128, 96), (96, 128), (128, 64), (64, 128)]  # (width, height)
SIZE_OF_FRAME = [0, 1, 2, 3, 2, 0, 3, 1, 1, 2, 0, 3]


@cache
def rendered(seed: int) -> list[Clip]:
    world = make_world(seed, Family(num_movers=0))
    return [render(world, *size, supersample=1) for size in SIZES]


def photographs(seed: int, num_frames: int = 12) -> list[tuple[Clip, int]]:
    """Each frame of a world by a camera of its own size."""
    return [(rendered(seed)[SIZE_OF_FRAME[i]], i) for i in range(num_frames)]


def write_photographs(folder, seed: int = 0, num_frames: int = 12):
    folder.mkdir()
    for clip, i in photographs(seed, num_frames=num_frames):
        Image.fromarray(clip.images[i]).save(folder / f"photo_{i}.png")
    return folder


def clip_on_canvas(seed: int) -> tuple[Clip, np.ndarray]:
    """The photographs with their truth as one clip, and which pixels are none of the padding; depth is NaN there."""
    photos, canvas = photographs(seed), (128, 128)
    first = photos[0][0]
    n = len(photos)
    depth, valid = np.full((n, 128, 128), np.nan, np.float32), np.zeros((n, 128, 128), bool)
    images, intrinsics = np.zeros((n, 128, 128, 3), np.uint8), np.zeros((n, 3, 3))
    for clip, i in photos:
        box = Box.centred((clip.depth.shape[2], clip.depth.shape[1]), canvas)
        window = i, box.rows, box.columns
        depth[window], valid[window], images[window] = clip.depth[i], True, clip.images[i]
        intrinsics[i] = clip.intrinsics[i] + np.array([[0, 0, box.left], [0, 0, box.top], [0, 0, 0]])
    nothing = np.zeros((n, 128, 128), dtype=bool)
    return replace(
        first, images=images, depth=depth, intrinsics=intrinsics, dynamic_mask=nothing, mover_mask=nothing
    ), valid


# --- the canvas ------------------------------------------------------------------------------------------------------


def test_what_is_taken_was_placed_or_extended() -> None:
    tokens, grid = torch.randn(2, 6, 5), (4, 5)
    box = Box(1, 1, 3, 4)
    for put in (placed, extended):
        assert torch.equal(taken(put(tokens, box, grid), box, grid), tokens)
    assert placed(tokens, box, grid).count_nonzero() == tokens.count_nonzero()
    twin = np.pad(tokens.unflatten(1, box.size).numpy(), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    np.testing.assert_array_equal(extended(tokens, box, grid).unflatten(1, grid).numpy(), twin)


def test_batches_hold_equal_keys_and_every_index_once() -> None:
    keys = [0, 1, 0, 2, 1, 0, 0]
    order = batches(keys, 2)
    assert sorted(np.concatenate(order)) == list(range(7))
    assert all(len({keys[row] for row in rows}) == 1 and len(rows) <= 2 for rows in order)
    assert [rows.tolist() for rows in batches("aaaaa", 2)] == [[0, 1], [2, 3], [4]]


# --- frames ----------------------------------------------------------------------------------------------------------


def read(folder, **settings):
    return read_frames(folder, FrameSettings(**settings), patch_size=16, trained_size=128)


def test_each_photograph_lies_in_the_middle_of_the_canvas_on_whole_patches(tmp_path) -> None:
    frames = read(write_photographs(tmp_path / "in"), collection=True)
    assert frames.images.shape == (12, 128, 128, 3)
    valid = frames.valid_mask()
    for i, (clip, k) in enumerate(photographs(0)):
        box, (height, width) = frames.boxes[i], clip.images.shape[1:3]
        assert box.size == (height, width)
        assert (box.top + box.bottom, box.left + box.right) == (128, 128)
        assert box.tokens(16).pixels(16) == box
        np.testing.assert_array_equal(frames.images[i, box.rows, box.columns], clip.images[k])
        assert not frames.images[i][~valid[i]].any()
        assert valid[i].sum() == height * width


def test_the_crop_leads_from_the_canvas_to_the_photograph(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for i, size in enumerate([(300, 200), (200, 333), (160, 160)]):
        Image.new("RGB", size).save(tmp_path / "in" / f"{i}.png")
    frames = read(tmp_path / "in", collection=True)
    for crop, box in zip(frames.crops, frames.boxes, strict=True):
        middle = np.array([(frames.images.shape[2] - 1) / 2, (frames.images.shape[1] - 1) / 2, 1])
        source = np.linalg.inv(crop.matrix()) @ middle
        np.testing.assert_allclose(source[:2], (np.array(crop.original) - 1) / 2, atol=1.0 / min(crop.scale))
        assert all(side % 32 == 0 for side in box.size)


def test_photographs_of_one_size_need_no_padding(tmp_path) -> None:
    folder = write_images(tmp_path / "in", np.random.default_rng(0).integers(0, 255, (3, 96, 128, 3), dtype=np.uint8))
    frames = read(folder, collection=True)
    assert frames.boxes is None
    assert frames.valid_mask().all()


def test_unequal_images_without_collection_are_refused_with_the_way_out(tmp_path) -> None:
    with pytest.raises(InputError, match="collection=True"):
        read(write_photographs(tmp_path / "in"))


# --- the network -----------------------------------------------------------------------------------------------------


def test_the_network_sees_nothing_of_the_padding(tmp_path) -> None:
    """Every pair by itself, cut out by hand, against the batches."""
    network = random_model().network
    frames = read(write_photographs(tmp_path / "in", num_frames=5), collection=True)
    pairs, grid = make_pairs(5, PairSettings(graph="complete")), network.grid_of(*frames.images.shape[1:3])
    tokens = encode_frames(network, frames.images, 2, silent, boxes=frames.boxes)
    predictions = empty_predictions(pairs, *frames.images.shape[1:3], torch.float32)
    statistics = AttentionStatistics(5, grid, [box.tokens(16) for box in frames.boxes])
    heard = []

    def listen(some, source, reference) -> None:
        heard.append((some, source, reference))
        statistics.update(some, source, reference)

    observe_pairs(
        network, tokens, pairs, grid, listen, silent, batch_size=3, predictions=predictions, boxes=frames.boxes
    )
    assert sorted(map(tuple, np.concatenate([some for some, *_ in heard]).tolist())) == sorted(map(tuple, pairs))
    for row, (a, b) in enumerate(pairs):
        cut = [
            to_network_input(frames.images[f : f + 1, frames.boxes[f].rows, frames.boxes[f].columns]) for f in (a, b)
        ]
        with torch.no_grad():
            expected = network(*cut)
        for view, frame in (("first", a), ("second", b)):
            box = frames.boxes[frame]
            points = getattr(predictions, f"points_{view}")[row]
            np.testing.assert_allclose(
                points[box.rows, box.columns], getattr(expected, f"points_{view}")[0], rtol=0, atol=1e-4
            )
            outside = torch.from_numpy(~frames.valid_mask()[frame])
            assert points[outside].isnan().all()
            assert (getattr(predictions, f"confidence_{view}")[row][outside] == 1).all()
    # the padding adds no extreme: maps inside the boxes have all the values that there are
    maps = statistics.maps()
    inside = [maps.source_mean[i][b.tokens(16).rows, b.tokens(16).columns] for i, b in enumerate(frames.boxes)]
    assert min(m.min() for m in inside) == maps.source_mean.min()
    assert max(m.max() for m in inside) == maps.source_mean.max()


def test_the_sink_is_that_of_the_image_and_not_of_the_canvas() -> None:
    grid, box = (4, 4), Box(1, 0, 3, 4)
    statistics = AttentionStatistics(2, grid, [box, Box(0, 0, 4, 4)])
    source, reference = torch.randn(1, 16, 3), torch.randn(1, 8, 3)
    statistics.update(np.array([[0, 1]]), source, reference)
    np.testing.assert_allclose(
        taken(statistics.reference.mean[:1], box, grid).numpy(), replace_sink(reference, box.size).numpy(), rtol=1e-6
    )


# --- the whole tool --------------------------------------------------------------------------------------------------


def test_a_collection_becomes_one_scene_without_its_padding(tmp_path) -> None:
    folder = write_photographs(tmp_path / "in", num_frames=5)
    model = random_model()
    with pytest.raises(InputError, match="collection=True"):
        model.reconstruct(folder)
    model.reconstruct(folder, collection=True).save(tmp_path / "out")
    scene = Scene.load(tmp_path / "out")
    valid, sizes = scene.valid_mask, [clip.images.shape[1:3] for clip, _ in photographs(0, num_frames=5)]
    assert valid.sum(axis=(1, 2)).tolist() == [height * width for height, width in sizes]
    assert (scene.depth[valid] > 0).all()
    assert not scene.depth[~valid].any()
    assert (scene.confidence[~valid] == 1).all()
    assert not scene.dynamic_mask.any()
    cloud = scene.points()
    assert len(cloud.points) == valid.sum()
    world = unproject(scene.depth[3].astype(np.float64), scene.intrinsics[3].astype(np.float64))[valid[3]]
    pose = scene.camera_to_world[3].astype(np.float64)
    np.testing.assert_allclose(cloud.points[cloud.frame_index == 3], world @ pose[:3, :3].T + pose[:3, 3], atol=1e-4)
    assert scene.meta["settings"]["frames"]["collection"] is True
    assert scene.meta["quality"]["path_over_shortest_tree"] is None  # photographs have no order
    for k, (height, width) in zip(scene.original_intrinsics, sizes, strict=True):
        np.testing.assert_allclose(k[:2, 2], [(width - 1) / 2, (height - 1) / 2], atol=1e-3)


def test_padding_never_reaches_an_export(tmp_path) -> None:
    scene = random_model().reconstruct(write_photographs(tmp_path / "in", num_frames=4), collection=True)
    scene.images[~scene.valid_mask] = (255, 0, 255)
    with np.load(scene.export(tmp_path / "arrays.npz", "npz")) as stored:
        assert stored["points"].shape[0] <= scene.valid_mask.sum()
        assert not (stored["colors"] == (255, 0, 255)).all(axis=1).any()
    for form in ("colmap", "nerfstudio", "ply", "glb", "depth-png"):
        scene.export(tmp_path / form, form)


@pytest.mark.parametrize("num_frames", [1, 2])
def test_one_and_two_photographs(tmp_path, num_frames: int) -> None:
    scene = random_model().reconstruct(write_photographs(tmp_path / "in", num_frames=num_frames), collection=True)
    assert scene.num_frames == num_frames
    assert (scene.depth[scene.valid_mask] > 0).all()


def test_given_masks_of_each_photographs_own_size(tmp_path) -> None:
    folder, masks = write_photographs(tmp_path / "in", num_frames=3), tmp_path / "masks"
    masks.mkdir()
    for clip, i in photographs(0, num_frames=3):
        mask = np.zeros(clip.images.shape[1:3], np.uint8)
        mask[:16] = 255
        Image.fromarray(mask).save(masks / f"{i}.png")
    motion = random_model().segment(folder, collection=True, masks=masks)
    frames = read(folder, collection=True)
    for found, box in zip(motion.dynamic_mask, frames.boxes, strict=True):
        inner = found[box.rows, box.columns]
        assert inner[:16].all()
        assert found.sum() == inner[:16].size


def test_a_collection_from_the_command_line(tmp_path, capsys) -> None:
    folder, weights = write_photographs(tmp_path / "in", num_frames=3), write_checkpoint(tmp_path / "tiny.pth")
    done = run_cli("run", folder, "-o", tmp_path / "out", "--checkpoint", weights, "--collection")
    assert done == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "valid_mask" / "frame_00002.png").is_file()


# --- the alignment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rendered_pointmaps_of_unequal_photographs_give_one_scene(seed: int) -> None:
    """Twelve images in four sizes, easy noise: the path within 1 % (measured: see README)."""
    clip, valid = clip_on_canvas(seed)
    pairs = make_pairs(12, PairSettings(graph="complete"))
    answer = align(
        synthetic_predictions(clip, pairs, hard=False, seed=seed),
        12,
        AlignmentSettings(focal="per-frame"),
        silent,
        dynamic_mask=~valid,
    )
    assert ate(answer.camera_to_world, clip.camera_to_world) < 0.01
    assert depth_errors(answer.depth, np.nan_to_num(clip.depth, nan=1.0), valid, "scale").abs_rel < 0.02
    np.testing.assert_allclose(answer.intrinsics[:, 0, 0], clip.intrinsics[:, 0, 0], rtol=0.02)
