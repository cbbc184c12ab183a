"""A network that sees all frames at once through the whole tool, on a tiny one with random weights: every property."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_inputs import moving_square, random_model, random_vggt_model
from torch import Tensor, nn

from easi3r import Easi3R, Motion, Scene
from easi3r.alignment import align
from easi3r.backbones.vggt import LAYERS_READ, Vggt
from easi3r.backbones.vggt_poses import decode_poses
from easi3r.backbones.vggt_sites import drop_patches
from easi3r.clip_passes import cleared, frames_are_the_same
from easi3r.config import AlignmentSettings
from easi3r.dynamic_masks import prove
from easi3r.errors import InputError
from easi3r.geometry import invert_rigid, transform, unproject
from easi3r.inference import to_network_input
from easi3r.metrics import absolute_trajectory_error
from easi3r.pair_views import pair_views
from easi3r.progress import silent
from easi3r.structures import AlignedCameras, DynamicMasks, GramMaps

NATIVE = {"image_size": "native"}
ATTENTION = {**NATIVE, "evidence": "attention"}
MAPS = ("qq_mean_3_7", "qq_std_18_19", "qq_mean_17_21", "kk_mean_0", "qk_std_0", "dynamic_map")


@pytest.fixture(scope="module")
def model() -> Easi3R:
    return random_vggt_model()


def clip_of(num_frames: int, height: int = 42, width: int = 56) -> np.ndarray:
    return moving_square(num_frames, height, width)


@pytest.fixture(scope="module")
def scene(model: Easi3R) -> Scene:
    """Three frames; not to be changed."""
    return model.reconstruct(clip_of(3), **ATTENTION)


def assert_contract(result: Motion, n: int, height: int, width: int) -> None:
    pixels, tokens = (n, height, width), (n, height // 14, width // 14)
    assert result.images.shape == (*pixels, 3) and result.images.dtype == np.uint8
    assert result.dynamic_score.shape == pixels and result.dynamic_score.dtype == np.float32
    assert result.dynamic_mask.shape == pixels and result.dynamic_mask.dtype == bool
    assert isinstance(result.attention, GramMaps) and tuple(result.attention.arrays()) == MAPS
    for values in (result.dynamic_score, *result.attention.arrays().values()):
        assert values.dtype == np.float32 and values.min() >= 0 and values.max() <= 1
    assert {values.shape for values in result.attention.arrays().values()} == {tokens}
    assert result.meta["checkpoint"]["network"] == "VGGT"
    if not isinstance(result, Scene):
        return
    for values in (result.depth, result.confidence):
        assert values.shape == pixels and values.dtype == np.float32 and np.isfinite(values).all()
    assert (result.depth > 0).all() and (result.confidence >= 1).all() and result.valid_mask.all()
    assert result.camera_to_world.dtype == result.intrinsics.dtype == np.float32
    np.testing.assert_array_equal(result.camera_to_world[0], np.eye(4))
    turn = result.camera_to_world[:, :3, :3].astype(float)
    np.testing.assert_allclose(turn @ turn.transpose(0, 2, 1), np.tile(np.eye(3), (n, 1, 1)), atol=1e-5)
    np.testing.assert_allclose(np.linalg.det(turn), 1, atol=1e-5)
    np.testing.assert_array_equal(result.intrinsics[:, :2, 2], np.tile(np.float32([width / 2, height / 2]), (n, 1)))
    assert (result.intrinsics[:, [0, 1], [0, 1]] > 0).all()
    assert_invariant(result)


def assert_invariant(scene: Scene) -> None:
    """Unprojecting depth is the point cloud, and projecting it comes back to the pixels."""
    camera = unproject(scene.depth.astype(float), scene.intrinsics.astype(float))
    world = transform(camera, scene.camera_to_world.astype(float))
    np.testing.assert_allclose(scene.points().points, world.reshape(-1, 3), rtol=1e-4, atol=1e-4)
    back = transform(world, invert_rigid(scene.camera_to_world.astype(float)))
    pixel = np.einsum("nij,nhwj->nhwi", scene.intrinsics.astype(float), back)
    rows, columns = np.indices(scene.depth.shape[1:])
    np.testing.assert_allclose(pixel[..., 0] / pixel[..., 2], np.broadcast_to(columns, scene.depth.shape), atol=1e-2)
    np.testing.assert_allclose(pixel[..., 1] / pixel[..., 2], np.broadcast_to(rows, scene.depth.shape), atol=1e-2)


# --- shapes


@pytest.mark.parametrize("size", [(42, 70), (70, 42), (14, 28)], ids=["landscape", "portrait", "two tokens"])
@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_scenes_and_motions_hold_the_contract(model: Easi3R, num_frames: int, size: tuple[int, int]) -> None:
    clip = np.random.default_rng(0).integers(0, 255, (num_frames, *size, 3), np.uint8)
    assert_contract(model.reconstruct(clip, **NATIVE), num_frames, *size)
    assert_contract(model.segment(clip, **NATIVE), num_frames, *size)


@pytest.mark.parametrize(
    ("size", "image_size", "expected"),
    [
        ((72, 128), None, (294, 518)),  # the published way: 518 wide
        ((128, 72), None, (518, 518)),  # of which at most 518 rows stay
        ((72, 128), 84, (42, 84)),  # the long side, nothing cut off
        ((128, 72), 84, (84, 42)),
        ((45, 60), "native", (42, 56)),
    ],
)
def test_frames_are_prepared_as_vggts(size, image_size, expected) -> None:
    crop = Vggt.preparation.plan(size[::-1], image_size)
    images = Vggt.preparation.cut(np.zeros((*size, 3), np.uint8), crop)
    assert images.shape == (*expected, 3) == (*crop.size[::-1], 3)


def test_images_too_small_are_refused(fails_with) -> None:
    with fails_with(InputError, "10 x 100", "no whole patch"):
        Vggt.preparation.plan((10, 100), "native")


# --- what comes from which pass


def by_hand(model: Easi3R, clip: np.ndarray, dynamic: Tensor | None) -> tuple[np.ndarray, Tensor]:
    """Pose encodings and depth of one pass."""
    network = model.network
    grid = network.grid_of(*clip.shape[1:3])
    tokens = network.encode(to_network_input(clip, network.input_range))
    if dynamic is None:
        read_outs = network.aggregate(tokens, grid)
    else:
        with drop_patches(network, dynamic):
            read_outs = network.aggregate(tokens, grid, layers=LAYERS_READ)
    return network.predict_poses(read_outs)[-1].numpy(), network.predict_depth(read_outs)[0]


def test_depth_and_lens_are_of_the_first_pass_and_poses_of_the_second(model: Easi3R) -> None:
    clip, masks = clip_of(3), np.zeros((3, 42, 56), bool)
    masks[:, 14:28, 14:30] = True
    scene = model.reconstruct(clip, masks=masks, **NATIVE)
    dynamic = torch.from_numpy(DynamicMasks(masks.astype(np.float32), masks, None).tokens(14)).flatten(1)
    (first, depth), (second, _) = by_hand(model, clip, None), by_hand(model, clip, dynamic)
    np.testing.assert_allclose(scene.depth, depth, rtol=1e-5)
    np.testing.assert_allclose(scene.intrinsics, decode_poses(first, 42, 56)[1], rtol=1e-5)
    poses = decode_poses(second, 42, 56)[0]
    np.testing.assert_allclose(scene.camera_to_world, np.linalg.inv(poses[0]) @ poses, atol=1e-5)
    unmoved = decode_poses(first, 42, 56)[0]
    assert np.abs(np.linalg.inv(unmoved[0]) @ unmoved - scene.camera_to_world).max() > 1e-4, "no second pass was seen"
    np.testing.assert_array_equal(scene.dynamic_mask, masks)


def test_one_pass_is_the_network_as_it_is(model: Easi3R) -> None:
    clip = clip_of(3)
    poses = decode_poses(by_hand(model, clip, None)[0], 42, 56)[0]
    for options in ({"passes": 1}, {"masks": "none"}):
        scene = model.reconstruct(clip, **options, **ATTENTION)
        np.testing.assert_allclose(scene.camera_to_world, np.linalg.inv(poses[0]) @ poses, atol=1e-5)
    assert not scene.dynamic_mask.any()


def test_fields_of_view_are_height_first(model: Easi3R, scene: Scene) -> None:
    encoding = by_hand(model, clip_of(3), None)[0]
    np.testing.assert_allclose(scene.intrinsics[:, 1, 1], 21 / np.tan(encoding[:, 7] / 2), rtol=1e-4)
    np.testing.assert_allclose(scene.intrinsics[:, 0, 0], 28 / np.tan(encoding[:, 8] / 2), rtol=1e-4)
    assert np.abs(scene.intrinsics[:, 0, 0] - scene.intrinsics[:, 1, 1]).min() > 1e-3


def test_points_of_the_point_head_give_depth_by_their_z(model: Easi3R) -> None:
    clip = clip_of(2)
    scene = model.reconstruct(clip, points="head", passes=1, **ATTENTION)
    network = model.network
    read_outs = network.aggregate(network.encode(to_network_input(clip, (0.0, 1.0))), (3, 4))
    points = network.predict_points(read_outs)[0].numpy().astype(float)
    poses = decode_poses(network.predict_poses(read_outs)[-1].numpy(), 42, 56)[0]
    z = transform(points, invert_rigid(poses))[..., 2]
    ahead = z > 1e-3
    assert ahead.mean() > 0.05
    np.testing.assert_allclose(scene.depth[ahead], z[ahead], rtol=1e-3)
    assert (scene.depth[z < 0] < 1e-3).all() and (scene.confidence[z < 0] == 1).all()
    assert_invariant(scene)


def test_every_frame_is_encoded_once_and_the_heads_run_once(model: Easi3R, monkeypatch) -> None:
    seen: list[str] = []
    for name in ("encode", "aggregate", "predict_poses", "predict_depth", "predict_points", "track"):
        method = getattr(Vggt, name)
        monkeypatch.setattr(
            Vggt, name, lambda *a, _name=name, _method=method, **k: (seen.append(_name), _method(*a, **k))[1]
        )
    masks = np.ones((3, 42, 56), bool)
    model.reconstruct(clip_of(3), masks=masks, **ATTENTION)
    assert sorted(seen) == ["aggregate", "aggregate", "encode", "predict_depth", "predict_poses", "predict_poses"]
    seen.clear()
    model.segment(clip_of(3), **ATTENTION)
    assert seen == ["encode"], "masks alone ask no head"


# --- motion


def test_nothing_moves_where_nothing_varies(model: Easi3R) -> None:
    still = np.repeat(clip_of(1), 4, axis=0)
    motion = model.segment(still, **ATTENTION)
    assert not motion.dynamic_mask.any() and not motion.attention.dynamic_map.any()
    assert motion.attention.kk_mean_0.any()
    noisy = still.astype(int) + np.random.default_rng(0).integers(-40, 40, still.shape)
    assert model.segment(noisy.clip(0, 255).astype(np.uint8), **ATTENTION).attention.dynamic_map.any()
    assert not model.segment(still[:1], **ATTENTION).dynamic_mask.any()


def test_frames_are_the_same_up_to_rounding() -> None:
    tokens = torch.randn(1, 12, 8).expand(4, -1, -1)
    assert frames_are_the_same(tokens) and frames_are_the_same(tokens + 1e-5 * torch.randn(4, 12, 8))
    assert not frames_are_the_same(tokens + 0.05 * torch.randn(4, 12, 8))
    assert frames_are_the_same(tokens[:1])


def test_evidence_of_flow_works_as_with_pairs(model: Easi3R) -> None:
    clip = clip_of(4, 56, 70)
    flow, by_pairs = (one.segment(clip, evidence="flow", seed=0, **NATIVE) for one in (model, random_model()))
    rows, columns = 48, 64  # what both see, about its centre
    top, left = (56 - rows) // 2, (70 - columns) // 2
    inner = flow.dynamic_mask[:, top : top + rows, left : left + columns]
    assert flow.dynamic_mask.any() and (inner == by_pairs.dynamic_mask).mean() > 0.9
    both = model.segment(clip, evidence="both", **NATIVE)
    changed = both.dynamic_mask != flow.dynamic_mask
    assert (np.abs(flow.dynamic_score[changed] - 0.5) <= 0.0501).all(), "attention decides close calls alone"


def test_what_the_cameras_explain_is_cleared_and_what_flow_proves_stays() -> None:
    score = np.full((2, 14, 14), 0.8, np.float32)
    found = DynamicMasks(score, np.zeros((2, 14, 14), bool), 0.5)
    found.mask[:, 2:9] = True
    seen = np.zeros((2, 14, 14), bool)
    seen[:, 7:11] = True
    residual = np.zeros((2, 14, 14), np.float32)
    residual[:, :5, :8] = 9.0
    left = cleared(found, seen, residual)
    np.testing.assert_array_equal(left.mask, seen | (found.mask & prove(residual, 1.0).mask))
    assert (left.score[found.mask & ~left.mask] == 0).all() and (left.score[~found.mask] == np.float32(0.8)).all()
    np.testing.assert_array_equal(cleared(found, seen, None).mask, seen)


def test_reprojection_can_be_left_out(model: Easi3R, scene: Scene) -> None:
    without = model.reconstruct(clip_of(3), **ATTENTION, **{"motion.reprojection": False})
    np.testing.assert_array_equal(without.dynamic_mask, model.segment(clip_of(3), **ATTENTION).dynamic_mask)
    np.testing.assert_array_equal(without.depth, scene.depth)
    assert (without.dynamic_mask != scene.dynamic_mask).any()


# --- long clips


def test_a_long_clip_is_one_scene_and_tracks_go_on(monkeypatch) -> None:
    model = random_vggt_model()
    encode, seen = Vggt.encode, []
    monkeypatch.setattr(Vggt, "encode", lambda self, images: (seen.append(len(images)), encode(self, images))[1])
    clip = clip_of(9, 140, 140)
    options = {"pieces.frames": 6, "pieces.overlap": 3, **ATTENTION, "tracks": "grid:2", "motion.reprojection": False}
    scene = model.reconstruct(clip, **options)
    assert sum(seen) == 9
    assert_contract(scene, 9, 140, 140)
    (first, second) = scene.meta["pieces"]
    assert "seam_residual" not in first and second["seam_residual"] >= 0 and second["frames"] == [3, 9]
    assert scene.tracks.coordinates.shape == (9, 4, 2)
    np.testing.assert_allclose(scene.tracks.coordinates[0], [[34.5, 34.5], [104.5, 34.5], [34.5, 104.5], [104.5] * 2])
    alone = model.reconstruct(
        clip[3:], **{**options, "tracks": scene.tracks.coordinates[3]}
    )  # native size: the same pixels
    np.testing.assert_allclose(scene.tracks.coordinates[4:], alone.tracks.coordinates[1:], atol=1e-3)


# --- tracks and heads


def test_tracks_are_saved_and_loaded_and_count_in_source_pixels(model: Easi3R, tmp_path: Path) -> None:
    clip = clip_of(2, 144, 143)
    scene = model.reconstruct(clip, tracks="20,30;50,60", **ATTENTION)
    assert scene.images.shape == (2, 140, 140, 3)
    np.testing.assert_allclose(scene.tracks.coordinates[0], [[19, 28], [49, 58]])  # cut about the centre
    assert scene.tracks.visibility.shape == scene.tracks.confidence.shape == (2, 2)
    loaded = Scene.load(scene.save(tmp_path / "out"))
    for name, values in vars(scene.tracks).items():
        np.testing.assert_array_equal(getattr(loaded.tracks, name), values, strict=True)
    assert Scene.load(model.reconstruct(clip, **ATTENTION).save(tmp_path / "none")).tracks is None
    np.savetxt(tmp_path / "queries.txt", [[20, 30], [50, 60]])
    for given in (np.array([[20, 30], [50, 60]]), tmp_path / "queries.txt"):
        again = model.reconstruct(clip, tracks=given, **ATTENTION)
        np.testing.assert_array_equal(again.tracks.coordinates, scene.tracks.coordinates)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("500,3", ("(500, 3)", "outside")),
        ("grid:0", ("grid:0",)),
        ("absent.txt", ("absent.txt",)),
        ([[1, 2, 3]], ("[1, 3]",)),
        ("1,2;3", ("1,2;3",)),
    ],
)
def test_queries_that_make_no_sense_are_refused(model: Easi3R, fails_with, given, parts) -> None:
    with fails_with(InputError, *parts):
        model.reconstruct(clip_of(2, 140, 140), tracks=given, **ATTENTION)


def test_small_images_have_no_tracks(model: Easi3R, fails_with) -> None:
    with fails_with(InputError, "56 x 42", "128"):
        model.reconstruct(clip_of(2), tracks="3,3", **ATTENTION)


@pytest.mark.parametrize(
    ("absent", "options"),
    [("point_head", {"points": "head"}), ("track_head", {"tracks": "3,3"}), ("depth_head", {}), ("camera_depth", {})],
)
def test_what_the_weights_lack_is_said_before_any_work(model: Easi3R, fails_with, monkeypatch, absent, options) -> None:
    config = dataclasses.replace(model.network.config, **{absent: None})
    with torch.device("meta"):
        less = Easi3R(Vggt(config))
    monkeypatch.setattr(Vggt, "encode", lambda *_: pytest.fail("the network ran"))
    with fails_with(InputError, absent.split("_")[0] + " head"):
        less.reconstruct(clip_of(2), **options, **ATTENTION)


def test_a_network_of_pairs_refuses_what_it_does_not_have(fails_with) -> None:
    for options in ({"points": "head"}, {"tracks": "3,3"}):
        with fails_with(InputError, "sees pairs", "VGGT"):
            random_model().reconstruct(moving_square(), **options, **NATIVE)


# --- alignment


def world_of(num_frames: int, height: int = 42, width: int = 56) -> AlignedCameras:
    """A bumpy wall seen by a camera that walks along it and turns."""
    from scipy.spatial.transform import Rotation

    poses = np.tile(np.eye(4), (num_frames, 1, 1))
    poses[:, :3, :3] = Rotation.from_euler("y", 2.0 * np.arange(num_frames)[:, None], degrees=True).as_matrix()
    poses[:, 0, 3] = 0.1 * np.arange(num_frames)
    intrinsics = np.tile(np.array([[60.0, 0, width / 2], [0, 60.0, height / 2], [0, 0, 1]]), (num_frames, 1, 1))
    rays = unproject(np.ones((num_frames, height, width)), intrinsics) @ poses[:, None, :3, :3].transpose(0, 1, 3, 2)
    depth = np.full((num_frames, height, width), 3.0)
    for _ in range(50):  # along the ray to z = 3 + 0.3 sin(3 x)
        world = rays * depth[..., None] + poses[:, None, None, :3, 3]
        depth += (3 + 0.3 * np.sin(3 * world[..., 0]) - world[..., 2]) * 0.7
    return AlignedCameras(
        poses.astype(np.float32), intrinsics.astype(np.float32), depth.astype(np.float32), np.full_like(depth, 3, "f")
    )


def test_pairs_of_one_world_hold_its_points_and_confidences() -> None:
    cameras = world_of(3)
    pairs = np.array([[0, 2], [2, 1]])
    views = pair_views(cameras, pairs)
    points = unproject(cameras.depth, cameras.intrinsics)
    for k, (i, j) in enumerate(pairs):
        world = transform(points[j].astype(float), cameras.camera_to_world[j].astype(float))
        expected = transform(world, invert_rigid(cameras.camera_to_world[i].astype(float)))
        np.testing.assert_allclose(views.points_first[k].float(), points[i], rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(views.points_second[k].float(), expected, rtol=2e-3, atol=4e-3)
    assert (views.confidence_first == 3).all() and (views.confidence_second == 3).all()


def test_an_alignment_of_one_world_gives_it_back() -> None:
    cameras, n = world_of(4), 4
    pairs = np.array([(i, j) for i in range(n) for j in range(n) if i != j])
    static = np.zeros(cameras.depth.shape, bool)
    found = align(pair_views(cameras, pairs), n, AlignmentSettings(), silent, dynamic_mask=static)
    error = absolute_trajectory_error(found.camera_to_world, cameras.camera_to_world)
    assert error < 0.01 * np.linalg.norm(cameras.camera_to_world[-1, :3, 3] - cameras.camera_to_world[0, :3, 3])
    ratio = found.depth / cameras.depth
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=0.02)


def test_alignment_is_asked_for_by_name_or_by_what_is_known(model: Easi3R, scene: Scene, fails_with) -> None:
    assert scene.meta["alignment"] == "none" and scene.meta["settings"]["alignment"]["method"] == "auto"
    clip = clip_of(3)
    refined = model.reconstruct(clip, align="fast", **ATTENTION)
    assert refined.meta["alignment"] == "fast" and len(np.unique(refined.intrinsics[:, 0, 0])) == 1
    assert np.abs(refined.depth - scene.depth).max() > 1e-4
    assert_invariant(refined)
    known = model.reconstruct(clip, intrinsics=70.0, **ATTENTION)
    assert known.meta["alignment"] == "fast"
    np.testing.assert_allclose(known.intrinsics[:, 0, 0], 70)
    with fails_with(InputError, "intrinsics", "align=none", "align=fast"):
        model.reconstruct(clip, intrinsics=70.0, align="none", **ATTENTION)
    published = model.reconstruct(clip[:2], align="published", **ATTENTION, **{"alignment.iterations": 2})
    assert published.meta["alignment"] == "published"
    pairs = random_model().reconstruct(moving_square(2), **ATTENTION)
    assert pairs.meta["alignment"] == "fast" and pairs.meta["checkpoint"]["network"] == "DUSt3R"


def test_low_precision_leaves_the_heads_in_float32(model: Easi3R, scene: Scene, monkeypatch) -> None:
    kinds = []
    predict = Vggt.predict_depth
    monkeypatch.setattr(
        Vggt,
        "predict_depth",
        lambda self, outs: (kinds.extend([self.dtype, self.depth_head.norm.weight.dtype]), predict(self, outs))[1],
    )
    low = model.reconstruct(clip_of(3), dtype="bfloat16", **ATTENTION)
    assert kinds == [torch.bfloat16, torch.float32] and low.meta["dtype"] == "bfloat16"
    difference = np.abs(low.depth - scene.depth).mean() / scene.depth.mean()
    assert 0 < difference < 0.1
    assert model.network.dtype == torch.float32


def test_no_hook_stays_behind(model: Easi3R, scene: Scene) -> None:
    def hooks(module: nn.Module) -> int:
        return len(module._forward_hooks) + len(module._forward_pre_hooks)

    assert sum(map(hooks, model.network.modules())) == 0


# --- saved


def test_maps_are_stored_under_their_own_names_and_shown(scene: Scene, tmp_path: Path) -> None:
    folder = scene.save(tmp_path / "out")
    loaded = Scene.load(folder)
    assert isinstance(loaded.attention, GramMaps)
    for name, values in scene.attention.arrays().items():
        np.testing.assert_array_equal(getattr(loaded.attention, name), values, strict=True)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(name.replace("_", " ") in page for name in MAPS) and "VGGT" in page
