"""The VGGT network: the published figures, what loads and what does not, images, poses, and what it costs."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from safetensors.torch import save_file
from torch import Tensor, nn
from vggt_parity import checkpoint_script, input_of, parity_figures, parity_network, relative

import easi3r.backbones.vggt as vggt_module
from easi3r.backbones.checkpoint import load_checkpoint
from easi3r.backbones.vggt import ReadOuts, Vggt, VggtConfig
from easi3r.backbones.vggt_checkpoint import COMMERCIAL_LICENCE, LICENCE, build_vggt
from easi3r.backbones.vggt_heads import DptConfig
from easi3r.backbones.vggt_images import plan_fit, prepare_images
from easi3r.backbones.vggt_poses import decode_poses, encode_poses
from easi3r.backbones.vggt_tracker import TrackerConfig
from easi3r.errors import CheckpointError, InputError
from easi3r.geometry import invert_rigid, transform, unproject

SMALL_DPT = DptConfig((8, 8, 8, 8), 8, 8, 2)
SMALL = VggtConfig(
    embed_dim=16,
    num_heads=2,
    position_side=5,
    encoder_depth=1,
    camera_depth=1,
    depth_head=SMALL_DPT,
    point_head=dataclasses.replace(SMALL_DPT, outputs=4),
    track_head=TrackerConfig(dataclasses.replace(SMALL_DPT, outputs=None), 16, 1, 16, 4),
)


@pytest.fixture(scope="module")
def figures() -> NpzFile:
    return parity_figures()


@pytest.fixture(scope="module")
def network() -> Vggt:
    return parity_network()


@pytest.fixture(scope="module")
def tokens(network: Vggt, figures: NpzFile) -> Tensor:
    return network.encode(input_of(figures["frames"]))


@pytest.fixture(scope="module")
def read_outs(network: Vggt, tokens: Tensor, figures: NpzFile) -> ReadOuts:
    return network.aggregate(tokens, network.grid_of(*figures["frames"].shape[1:3]))


@pytest.fixture(scope="module")
def small() -> Vggt:
    """Random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Vggt(SMALL).requires_grad_(False).eval()
        for name, weight in network.named_parameters():
            if name.endswith(("token", "tokens", "tracks", "embed")):
                weight.normal_(std=0.5)
    return network


# --- the published figures -----------------------------------------------------------------------------------------


def test_patch_tokens_are_the_published_ones(tokens: Tensor, figures: NpzFile) -> None:
    assert relative(tokens, figures["patch_tokens"]) < 1e-4


def test_read_outs_are_the_published_ones(read_outs: ReadOuts, figures: NpzFile) -> None:
    for layer, ours in zip((4, 11, 17, 23), read_outs.layers, strict=True):
        assert relative(ours, figures[f"tokens_{layer}"]) < 1e-4


def test_other_layers_can_be_read(network: Vggt, tokens: Tensor, read_outs: ReadOuts, figures: NpzFile) -> None:
    first, last = network.aggregate(tokens, read_outs.grid, layers=(0, 23)).layers
    assert relative(first, figures["tokens_0"]) < 1e-4
    assert torch.equal(network.predict_poses(ReadOuts((last,), read_outs.grid)), network.predict_poses(read_outs))


def test_poses_of_all_iterations_are_the_published_ones(network: Vggt, read_outs: ReadOuts, figures: NpzFile) -> None:
    assert relative(network.predict_poses(read_outs), figures["pose_enc"]) < 1e-4


def test_cameras_are_the_published_ones_and_back(figures: NpzFile) -> None:
    height, width = figures["frames"].shape[1:3]
    camera_to_world, intrinsics = decode_poses(figures["pose_enc"][-1], height, width)
    assert relative(invert_rigid(camera_to_world)[:, :3], figures["extrinsics"]) < 1e-4
    assert relative(intrinsics, figures["intrinsics"]) < 1e-4
    again = encode_poses(camera_to_world, intrinsics, height, width)
    assert relative(again, figures["pose_enc_from_matrices"]) < 1e-4


@pytest.mark.parametrize("kind", ["depth", "points"])
def test_maps_are_the_published_ones(network: Vggt, read_outs: ReadOuts, figures: NpzFile, kind: str) -> None:
    values, confidence = getattr(network, f"predict_{kind}")(read_outs)
    kept = figures["kept_frames"]
    assert values.shape[:3] == confidence.shape == figures["frames"].shape[:3]
    assert relative(values[kept].reshape(figures[kind].shape), figures[kind]) < 1e-4
    assert relative(confidence[kept].reshape(figures[f"{kind}_conf"].shape), figures[f"{kind}_conf"]) < 1e-4


def test_unprojected_depth_is_the_published_one(figures: NpzFile) -> None:
    depth = figures["depth"].reshape(-1, *figures["frames"].shape[1:3])
    assert figures["kept_frames"][0] == 0
    camera_to_world, intrinsics = decode_poses(figures["pose_enc"][-1][:1], *depth.shape[1:])
    points = transform(unproject(depth[:1].astype(np.float64), intrinsics), camera_to_world)[0, ::7, ::7]
    assert relative(points.reshape(figures["unprojected"].shape), figures["unprojected"]) < 1e-4


def test_tracks_are_the_published_ones(network: Vggt, read_outs: ReadOuts, figures: NpzFile) -> None:
    tracks = network.track(read_outs, torch.from_numpy(figures["query_points"]).float())
    published = figures["tracks"]
    assert tracks.coordinates.shape == published.shape
    assert np.ptp(published, axis=1).max() > 0.5
    assert np.abs(tracks.coordinates.numpy() - published).max() < 1e-3
    assert np.abs(tracks.visibility.numpy() - figures["track_visibility"]).max() < 1e-3
    assert np.abs(tracks.confidence.numpy() - figures["track_confidence"]).max() < 1e-3


def test_features_for_tracks_are_the_published_ones(network: Vggt, read_outs: ReadOuts, figures: NpzFile) -> None:
    size = figures["frames"].shape[1:3]
    features = network.track_head.feature_extractor(read_outs.patches(slice(None)), read_outs.grid, size)
    assert features.shape[-2:] == (size[0] // 2, size[1] // 2)
    assert relative(features[..., ::7, ::7], figures["track_features"]) < 1e-4


def test_one_frame_alone_is_as_published(network: Vggt, tokens: Tensor, read_outs: ReadOuts, figures: NpzFile) -> None:
    alone = network.aggregate(tokens[:1], read_outs.grid)
    pose, depth = network.predict_poses(alone)[-1], network.predict_depth(alone)[0]
    assert relative(pose.reshape(figures["single_pose_enc"].shape), figures["single_pose_enc"]) < 1e-4
    assert relative(depth.reshape(figures["single_depth"].shape), figures["single_depth"]) < 1e-4
    assert (
        relative(
            network.predict_depth(read_outs)[0][:1].reshape(figures["single_depth"].shape), figures["single_depth"]
        )
        > 1e-3
    )


# --- the network's properties --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 2, 3])
@pytest.mark.parametrize(("height", "width"), [(140, 182), (182, 140)])
def test_few_frames_of_either_orientation(
    small: Vggt, random_images: Callable[..., Tensor], num_frames: int, height: int, width: int
) -> None:
    images = random_images(num_frames, height, width) / 2 + 0.5
    read_outs = small.aggregate(small.encode(images), small.grid_of(height, width))
    depth, depth_confidence = small.predict_depth(read_outs)
    points, points_confidence = small.predict_points(read_outs)
    camera_to_world, intrinsics = decode_poses(small.predict_poses(read_outs)[-1].numpy(), height, width)
    tracks = small.track(read_outs, torch.tensor([[10.0, 20.0], [width - 1.0, height - 1.0]]))
    assert depth.shape == depth_confidence.shape == points_confidence.shape == (num_frames, height, width)
    assert points.shape == (num_frames, height, width, 3)
    assert tracks.coordinates.shape == (4, num_frames, 2, 2) and tracks.visibility.shape == (num_frames, 2)
    for values in (depth, depth_confidence, points, points_confidence, tracks.coordinates, tracks.visibility):
        assert torch.isfinite(values).all()
    assert (depth > 0).all() and (depth_confidence >= 1).all() and (points_confidence >= 1).all()
    np.testing.assert_allclose(np.linalg.det(camera_to_world[:, :3, :3]), 1, atol=1e-9)
    assert np.isfinite(intrinsics).all() and (intrinsics[:, 0, 2] == width / 2).all()


def test_order_of_the_frames_after_the_first_does_not_matter(small: Vggt, random_images) -> None:
    images, order = random_images(4, 70, 56) / 2 + 0.5, [0, 3, 1, 2]
    tokens, grid = small.encode(images), small.grid_of(70, 56)
    straight, shuffled = small.aggregate(tokens, grid), small.aggregate(tokens[order], grid)
    for ours, theirs in zip(shuffled.layers, straight.layers, strict=True):
        torch.testing.assert_close(ours, theirs[order], rtol=1e-4, atol=1e-4)
    other_first = small.aggregate(tokens.flip(0), grid).layers[-1].flip(0)
    assert not torch.allclose(other_first, straight.layers[-1], rtol=1e-3, atol=1e-3)


def test_heads_give_the_same_in_chunks(small: Vggt, random_images, monkeypatch) -> None:
    read_outs = small.aggregate(small.encode(random_images(5, 56, 42) / 2 + 0.5), (4, 3))
    whole = (*small.predict_depth(read_outs), *small.predict_points(read_outs))
    monkeypatch.setattr(vggt_module, "FRAMES_AT_ONCE", 2)
    for ours, theirs in zip((*small.predict_depth(read_outs), *small.predict_points(read_outs)), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def in_bfloat16(network: Vggt) -> Vggt:
    """Change the matrices of the aggregator, and nothing else."""
    for module in network.aggregator.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            for name, weight in module.named_parameters():
                setattr(module, name, nn.Parameter(weight.detach().bfloat16(), requires_grad=False))
    return network


def test_matrices_can_be_low_in_precision(small: Vggt, random_images) -> None:
    low = in_bfloat16(copy.deepcopy(small))
    images = random_images(3, 56, 42) / 2 + 0.5
    with torch.autocast("cpu", torch.bfloat16):
        read_outs = low.aggregate(low.encode(images), (4, 3))
        outputs = (low.predict_poses(read_outs), *low.predict_depth(read_outs), *low.predict_points(read_outs))
    finer = small.aggregate(small.encode(images), (4, 3))
    expected = (small.predict_poses(finer), *small.predict_depth(finer), *small.predict_points(finer))
    assert low.dtype == torch.bfloat16 and {layer.dtype for layer in read_outs.layers} == {torch.float32}
    for ours, theirs in zip(outputs, expected, strict=True):
        assert ours.dtype == torch.float32
        assert 0 < relative(ours, theirs.numpy()) < 0.1


def test_tracks_stay_where_they_start_in_the_first_frame(small: Vggt, random_images) -> None:
    read_outs = small.aggregate(small.encode(random_images(2, 140, 140) / 2 + 0.5), (10, 10))
    queries = torch.rand(70, 2) * 139  # more than go through at once
    tracks = small.track(read_outs, queries)
    torch.testing.assert_close(tracks.coordinates[:, 0], queries.expand(4, -1, -1))
    alone = small.track(read_outs, queries[:1])
    assert alone.coordinates.shape == (4, 2, 1, 2)


def test_images_that_do_not_fit_are_refused(small: Vggt, fails_with) -> None:
    with pytest.raises(ValueError, match="multiples of 14"):
        small.encode(torch.zeros(1, 3, 140, 141))
    read_outs = small.aggregate(small.encode(torch.zeros(1, 3, 70, 140)), (5, 10))
    with fails_with(InputError, "140 x 70", "128"):
        small.track(read_outs, torch.zeros(1, 2))


# --- poses ---------------------------------------------------------------------------------------------------------


def test_poses_are_world_to_camera_and_heights_come_first() -> None:
    turn = np.sqrt(0.5)  # a quarter turn about y, written four times as long
    encoding = np.array([[1.0, 2.0, 3.0, 0, 4 * turn, 0, 4 * turn, np.pi / 2, 2 * np.arctan(0.5)]])
    camera_to_world, intrinsics = decode_poses(encoding, 100, 300)
    world_to_camera = np.linalg.inv(camera_to_world[0])
    np.testing.assert_allclose(world_to_camera[:3], [[0, 0, 1, 1], [0, 1, 0, 2], [-1, 0, 0, 3]], atol=1e-12)
    np.testing.assert_allclose(intrinsics[0], [[300, 0, 150], [0, 50, 50], [0, 0, 1]], atol=1e-9)


def test_poses_survive_the_round_trip_with_a_positive_scalar() -> None:
    rng = np.random.default_rng(0)
    encodings = np.concatenate([rng.normal(size=(20, 7)), rng.uniform(0.3, 2, (20, 2))], axis=1)
    again = encode_poses(*decode_poses(encodings, 294, 518), 294, 518)
    unit = encodings[:, 3:7] / np.linalg.norm(encodings[:, 3:7], axis=1, keepdims=True) * np.sign(encodings[:, 6:7])
    np.testing.assert_allclose(again, np.concatenate([encodings[:, :3], unit, encodings[:, 7:]], axis=1), atol=1e-9)


def test_a_field_of_view_of_zero_gives_a_finite_camera() -> None:
    camera_to_world, intrinsics = decode_poses(np.zeros((1, 9)), 140, 182)
    assert np.isfinite(camera_to_world).all() and np.isfinite(intrinsics).all()
    assert (intrinsics[0, [0, 1], [0, 1]] > 0).all()


# --- images --------------------------------------------------------------------------------------------------------


def test_sizes_and_boxes_are_the_published_ones(figures: NpzFile) -> None:
    for size, cropped, (y0, y1, x0, x1) in zip(
        figures["prep_input_wh"].tolist(),
        figures["prep_crop_hw"].tolist(),
        figures["prep_pad_box_y0y1x0x1"].tolist(),
        strict=True,
    ):
        assert plan_fit(tuple(size)).size == tuple(cropped[::-1])
        padded = plan_fit(tuple(size), "pad")
        assert padded.size == (518, 518)
        assert padded.offset == (-x0, -y0) and padded.resized == (x1 - x0, y1 - y0)


def test_a_resized_image_is_the_published_one(figures: NpzFile) -> None:
    images, _ = prepare_images([figures["prep_example_input"]])
    published = figures["prep_example_every14"]
    assert images[0, 7::14, 7::14].shape == published.shape
    np.testing.assert_array_equal(images[0, 7::14, 7::14], published)


def test_crops_lead_back_to_the_source() -> None:
    for fit, size in (("crop", (300, 900)), ("crop", (900, 300)), ("pad", (300, 900)), ("pad", (900, 300))):
        crop = plan_fit(size, fit)
        middle = crop.matrix() @ [(size[0] - 1) / 2, (size[1] - 1) / 2, 1]
        np.testing.assert_allclose(middle[:2], [(side - 1) / 2 for side in crop.size], atol=1)
        assert not crop.size[0] % 14 and not crop.size[1] % 14


def test_unequal_images_are_padded_with_white_and_transparency_is_white() -> None:
    black = np.zeros((294, 518, 3), np.uint8)
    clear = np.zeros((518, 518, 4), np.uint8)
    images, crops = prepare_images([black, clear])
    assert images.shape == (2, 518, 518, 3) and crops[0].offset == (0, -112)
    assert (images[1] == 255).all()
    assert (images[0, 112:406] == 0).all() and (images[0, :112] == 255).all() and (images[0, 406:] == 255).all()


def test_tall_images_keep_their_central_rows() -> None:
    rows = np.repeat(np.arange(1036) // 5, 518).reshape(1036, 518, 1).repeat(3, axis=2).astype(np.uint8)
    images, crops = prepare_images([rows])
    assert crops[0].offset == (0, 259)
    np.testing.assert_array_equal(images[0], rows[259:777])


def test_images_without_a_patch_are_refused(fails_with) -> None:
    with fails_with(InputError, "1000 x 2"):
        prepare_images([np.zeros((2, 1000, 3), np.uint8)])
    with fails_with(InputError, "No image"):
        prepare_images([])


# --- files ---------------------------------------------------------------------------------------------------------


def write_pt(path: Path, tensors: dict[str, Tensor]) -> Path:
    torch.save(tensors, path)
    return path


def assert_same(ours: Vggt, theirs: Vggt) -> None:
    assert ours.config == theirs.config and not ours.training
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ours.parameters())


def test_the_parity_checkpoint_is_read_whole(tmp_path: Path, network: Vggt) -> None:
    path = write_pt(tmp_path / "model.pt", checkpoint_script().state_dict())
    loaded, info = load_checkpoint(path)
    assert_same(loaded, network)
    assert (info.path, info.licence) == (path, LICENCE)
    names = set(checkpoint_script().state_dict()) - set(loaded.state_dict())
    assert names == {"aggregator.patch_embed.mask_token"}
    config = loaded.config
    assert (config.embed_dim, config.num_heads, config.depth, config.encoder_depth) == (64, 4, 24, 4)
    assert config.depth_head == DptConfig((16, 24, 32, 32), 32, 16, 2)
    assert config.track_head == TrackerConfig(DptConfig((16, 24, 32, 32), 32, 32, None), 48, 6, 48, 64)


@pytest.mark.parametrize("layout", ["pt", "safetensors", "folder"])
def test_all_layouts_hold_the_same_network(tmp_path: Path, small: Vggt, layout: str) -> None:
    tensors = {name: value.half().float() for name, value in small.state_dict().items()}
    if layout == "pt":
        path = write_pt(tmp_path / "model.pt", {name: value.half() for name, value in tensors.items()})
    elif layout == "safetensors":
        path = tmp_path / "model.safetensors"
        save_file(tensors, path)
    else:
        path = tmp_path / "VGGT-1B-Commercial"
        path.mkdir()
        save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"embed_dim": 16}))
    loaded, info = load_checkpoint(path)
    assert_same(loaded, build_vggt(tensors, "the tensors"))
    assert info.licence == (COMMERCIAL_LICENCE if layout == "folder" else LICENCE)
    assert info.path.is_file() and info.sha256()


@pytest.mark.parametrize("head", ["camera_head", "depth_head", "point_head", "track_head"])
def test_a_file_without_a_head_loads_without_its_output(small: Vggt, fails_with, caplog, head: str) -> None:
    tensors = {name: value for name, value in small.state_dict().items() if not name.startswith(head)}
    with caplog.at_level(logging.INFO, "easi3r"):
        network = build_vggt(tensors, "the checkpoint x.pt")
    assert f"x.pt holds no {head}" in caplog.text
    read_outs = network.aggregate(network.encode(torch.zeros(1, 3, 140, 140)), (10, 10))
    outputs = {
        "camera_head": partial(network.predict_poses, read_outs),
        "depth_head": partial(network.predict_depth, read_outs),
        "point_head": partial(network.predict_points, read_outs),
        "track_head": partial(network.track, read_outs, torch.zeros(1, 2)),
    }
    with fails_with(InputError, head):
        outputs.pop(head)()
    for output in outputs.values():
        output()


def test_unknown_tensors_are_left_out_and_noted(small: Vggt, caplog) -> None:
    tensors = {**small.state_dict(), "normal_head.norm.weight": torch.ones(3)}
    with caplog.at_level(logging.INFO, "easi3r"):
        assert_same(build_vggt(tensors, "the checkpoint x.pt"), build_vggt(small.state_dict(), ""))
    assert "normal_head.norm.weight" in caplog.text


def test_tensors_are_not_copied(tmp_path: Path, small: Vggt) -> None:
    tensors = small.state_dict()
    network = build_vggt(tensors, "the checkpoint x.pt")
    assert all(value.data_ptr() == tensors[name].data_ptr() for name, value in network.state_dict().items())


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("attacked"),)


def test_files_that_are_no_vggt_are_refused(tmp_path: Path, small: Vggt, fails_with, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"aggregator.camera_token": Attack()}, tmp_path / "attack.pt")
    with fails_with(CheckpointError, "attack.pt", "could run code"):
        load_checkpoint(tmp_path / "attack.pt")
    assert not Path("attacked").exists()
    with fails_with(CheckpointError, "other.pt", "another model's", "weight"):
        load_checkpoint(write_pt(tmp_path / "other.pt", {"weight": torch.ones(2)}))
    (tmp_path / "cut.pt").write_bytes(write_pt(tmp_path / "a.pt", small.state_dict()).read_bytes()[:5000])
    with fails_with(CheckpointError, "cut.pt", "download"):
        load_checkpoint(tmp_path / "cut.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"12345678901")
    with fails_with(CheckpointError, "cut.safetensors", "download"):
        load_checkpoint(tmp_path / "cut.safetensors")
    with fails_with(CheckpointError, "absent.pt"):
        load_checkpoint(tmp_path / "absent.pt")


def test_incomplete_and_odd_tensors_are_named(small: Vggt, fails_with) -> None:
    def without(*names: str) -> dict[str, Tensor]:
        return {name: value for name, value in small.state_dict().items() if name not in names}

    with fails_with(CheckpointError, "missing: depth_head.norm.weight"):
        build_vggt(without("depth_head.norm.weight"), "the checkpoint x.pt")
    with fails_with(CheckpointError, "x.pt", "aggregator.frame_blocks.0.attn.q_norm.weight is missing"):
        build_vggt(without("aggregator.frame_blocks.0.attn.q_norm.weight"), "the checkpoint x.pt")
    with fails_with(CheckpointError, "of the wrong shape: aggregator.frame_blocks.3.norm1.bias (2,) instead of (16,)"):
        build_vggt(
            {**small.state_dict(), "aggregator.frame_blocks.3.norm1.bias": torch.zeros(2)}, "the checkpoint x.pt"
        )
    fewer = without(*(name for name in small.state_dict() if "frame_blocks.23." in name))
    with fails_with(CheckpointError, "23 frame blocks"):
        build_vggt(fewer, "the checkpoint x.pt")
    with fails_with(CheckpointError, "no square"):
        odd = {**small.state_dict(), "aggregator.patch_embed.pos_embed": torch.zeros(1, 8, 16)}
        build_vggt(odd, "the checkpoint x.pt")
