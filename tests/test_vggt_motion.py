"""Motion from VGGT's global attention: statistics against matrices written out, the second pass, the refinement."""

from __future__ import annotations

import dataclasses
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from vggt_parity import input_of, parity_figures, parity_network, relative

from easi3r.backbones.vggt import Vggt, VggtConfig
from easi3r.backbones.vggt_sites import drop_patches, observe_patches
from easi3r.dynamic_masks import make_masks, smooth_by_cluster
from easi3r.gram_maps import FACTORS, Factor, GramStatistics, capture_grams, source_frames
from easi3r.reprojection import (
    MAX_LOSS,
    UNKNOWN,
    cluster_losses,
    is_outlier,
    keep_clusters,
    label_movers,
    refine_masks,
    world_points,
)
from easi3r.structures import DynamicMasks
from hooks import Attend, HookError, find_sites

GRID = (10, 13)


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
def small() -> Vggt:
    config = VggtConfig(
        embed_dim=16,
        num_heads=2,
        position_side=5,
        encoder_depth=1,
        camera_depth=None,
        depth_head=None,
        point_head=None,
        track_head=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Vggt(config).requires_grad_(False).eval()


def random_layers(num_frames: int, layers: int = 22, heads: int = 2, patches: int = 12, dim: int = 4) -> Tensor:
    """[layers, 2, heads, n, P, D]: queries and keys."""
    return torch.randn(layers, 2, heads, num_frames, patches, dim, generator=torch.Generator().manual_seed(1))


def written_out(qk: Tensor, factor: Factor) -> Tensor:
    """The factor's map [n, P] in float64, from all its matrices G [layers, heads, sources, P, P]."""
    qk = qk.double()
    rows = []
    for frame in range(qk.shape[3]):
        sides = dict(zip("qk", qk[list(factor.layers)].unbind(1), strict=True))
        a, b = (sides[side] for side in factor.product)
        some = b[:, :, source_frames(frame, qk.shape[3])]
        gram = torch.einsum("lhxd,lhstd->lhsxt", a[:, :, frame], some)
        over_t = gram.mean(dim=(0, 1, 2))
        rows.append(over_t.mean(dim=1) if factor.statistic == "mean" else over_t.std(dim=1))
    return torch.stack(rows)


def stretched(maps: NDArray[np.float32]) -> NDArray[np.float32]:
    """[n, P]: every frame from 0 to 1."""
    return (maps - maps.min(axis=1, keepdims=True)) / np.ptp(maps, axis=1, keepdims=True)


# --- the published figures -----------------------------------------------------------------------------------------


def test_captured_queries_and_keys_are_the_published_ones(network: Vggt, tokens: Tensor, figures: NpzFile) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    with observe_patches(network, len(tokens), frozenset({0, 21}), lambda layer, q, k: seen.update({layer: (q, k)})):
        network.attend(tokens, GRID, 21)
    assert relative(seen[0][0][:, 1], figures["global_q_layer0_frame1"]) < 1e-4
    assert relative(seen[21][1][:, 3], figures["global_k_layer21_frame3"]) < 1e-4


def test_factors_and_the_dynamic_map_are_the_published_ones(network: Vggt, tokens: Tensor, figures: NpzFile) -> None:
    with capture_grams(network, len(tokens), GRID) as statistics:
        network.attend(tokens, GRID, max(statistics.layers))
    maps = statistics.maps()
    assert max(statistics.layers) == 21
    for factor, values in zip(FACTORS, statistics.raw_maps().unflatten(2, GRID), strict=True):
        assert relative(values, figures[f"raw_{factor.name}"]) < 1e-4, factor.name
    assert relative(maps.dynamic_map, figures["dynamic_map"]) < 1e-4
    assert figures["dynamic_map"].max() > 0.9


def test_statistics_of_every_layer_are_the_published_ones(network: Vggt, tokens: Tensor, figures: NpzFile) -> None:
    names = list(product(("qq", "kk", "qk"), range(24), ("mean", "std")))
    factors = tuple(Factor(str(name), name[0], (name[1],), name[2], inverted=False) for name in names)
    statistics = GramStatistics(len(tokens), GRID, factors)
    with observe_patches(network, len(tokens), statistics.layers, statistics.observe):
        network.aggregate(tokens, GRID)
    maps = statistics.raw_maps().unflatten(0, (3, 24, 2)).unflatten(-1, GRID)
    for kind, name in enumerate(("gram_mean", "gram_std")):
        assert relative(maps[:, :, kind], figures[name]) < 1e-4


def test_masks_of_given_clusters_are_the_published_ones(network: Vggt, tokens: Tensor, figures: NpzFile) -> None:
    with capture_grams(network, len(tokens), GRID) as statistics:
        network.attend(tokens, GRID, 21)
    dynamic_map, labels = statistics.maps().dynamic_map, figures["cluster_labels"].astype(np.int64)
    masks = make_masks(dynamic_map, labels, network.config.patch_size)
    published = unpacked(figures["masks"], figures)
    assert relative(smooth_by_cluster(dynamic_map, labels), figures["refined_dynamic_map"]) < 1e-3
    assert masks.threshold == pytest.approx(float(figures["threshold"]), abs=1e-3)
    assert 0.01 < published.mean() < 0.99
    assert np.mean(masks.mask != published) < 1e-3


def test_the_second_pass_is_the_published_one(network: Vggt, tokens: Tensor, figures: NpzFile) -> None:
    given = unpacked(figures["given_masks"], figures)
    dynamic = torch.from_numpy(DynamicMasks(given.astype(np.float32), given, None).tokens(14)).flatten(1)
    assert 0.05 < dynamic.float().mean() < 0.95
    with drop_patches(network, dynamic):
        read_outs = network.aggregate(tokens, GRID)
    pose, (depth, _) = network.predict_poses(read_outs)[-1], network.predict_depth(read_outs)
    published = figures["second_depth"]
    depth = depth[figures["kept_frames"][: len(published)]].reshape(published.shape)
    assert relative(read_outs.layers[0], figures["second_tokens_4"]) < 1e-4
    assert relative(pose, figures["second_pose_enc"]) < 1e-4
    assert relative(depth, published) < 1e-4
    assert relative(figures["pose_enc"][-1], figures["second_pose_enc"]) > 1e-3


def unpacked(masks: NDArray[np.uint8], figures: NpzFile) -> NDArray[np.bool_]:
    return np.unpackbits(masks, axis=-1, count=figures["frames"].shape[2]).astype(bool)


def test_losses_and_masks_of_the_refinement_are_the_published_ones(figures: NpzFile) -> None:
    names = ("images", "depth", "coarse", "cam2world", "intrinsics")
    images, depth, masks, camera_to_world, intrinsics = (figures[f"refine_{name}"] for name in names)
    masks = masks.astype(bool)
    for frame, labels in enumerate(figures["refine_labels"].astype(np.int64)):
        points = world_points(depth[frame], camera_to_world[frame], intrinsics[frame])
        losses = cluster_losses(frame, points, labels, images, depth, masks, camera_to_world, intrinsics)
        published = figures["refine_losses"][frame]
        present = np.unique(labels[labels >= 0])
        np.testing.assert_allclose(losses[present], published[present], rtol=1e-4)
        assert np.mean(keep_clusters(labels, losses > MAX_LOSS) != figures["refine_masks"][frame].astype(bool)) < 1e-3
        outliers = is_outlier(points.reshape(-1, 3)).reshape(labels.shape)
        assert np.mean(outliers != (labels == -2)) < 1e-3


# --- statistics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [2, 3, 4, 9])
def test_factors_equal_those_of_matrices_written_out(num_frames: int) -> None:
    qk = random_layers(num_frames)
    statistics = GramStatistics(num_frames, (3, 4))
    for layer, (q, k) in enumerate(qk):
        statistics.observe(layer, q, k)
    expected = torch.stack([written_out(qk, factor) for factor in FACTORS])
    torch.testing.assert_close(statistics.raw_maps().double(), expected, rtol=1e-4, atol=1e-5)
    maps = statistics.maps()
    assert maps.dynamic_map.shape == (num_frames, 3, 4)
    assert maps.dynamic_map.min() >= 0 and maps.dynamic_map.max() == pytest.approx(1, abs=1e-3)
    low_high = {name: stretched(values.reshape(num_frames, -1)) for name, values in maps.arrays().items()}
    by_hand = (
        (1 - low_high["qq_mean_3_7"])
        * (1 - low_high["qq_std_18_19"])
        * low_high["qq_mean_17_21"]
        * (1 - low_high["kk_mean_0"])
        * low_high["qk_std_0"]
    )
    np.testing.assert_allclose(maps.dynamic_map.reshape(num_frames, -1), stretched(by_hand), atol=1e-3)


def test_the_last_pass_counts_even_after_one_that_broke_off() -> None:
    qk = random_layers(4)
    once, twice = GramStatistics(4, (3, 4)), GramStatistics(4, (3, 4))
    for layer in (*range(19), *range(22)):
        twice.observe(layer, *qk[layer])
    for layer in range(22):
        once.observe(layer, *qk[layer])
    assert torch.equal(once.raw_maps(), twice.raw_maps())


class Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.Size] = set()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        self.seen |= {tensor.shape for tensor in tree_leaves(result) if isinstance(tensor, Tensor)}
        return result


def test_no_matrix_of_patches_by_patches_or_frames_by_frames_is_made() -> None:
    num_frames, patches = 17, 101
    qk = random_layers(num_frames, patches=patches)
    statistics = GramStatistics(num_frames, (1, patches))
    with Shapes() as shapes:
        for layer, (q, k) in enumerate(qk):
            statistics.observe(layer, q, k)
        statistics.maps()
    assert (5, num_frames, patches) in shapes.seen
    assert not [shape for shape in shapes.seen if shape.count(patches) > 1 or shape.count(num_frames) > 1]
    assert max(shape.numel() for shape in shapes.seen) <= qk[0].numel()


def test_source_frames_are_the_methods_or_the_nearest() -> None:
    assert source_frames(10, 20) == [4, 6, 8, 12, 14, 16]
    assert source_frames(0, 4) == [2] and source_frames(3, 4) == [1]
    assert source_frames(1, 3) == [0, 2]
    assert source_frames(0, 2) == [1] and source_frames(1, 2) == [0]
    assert source_frames(0, 1) == []


def test_nothing_moves_in_a_single_frame(small: Vggt) -> None:
    tokens = small.encode(torch.rand(1, 3, 42, 56))
    with capture_grams(small, 1, (3, 4)) as statistics:
        small.attend(tokens, (3, 4), 21)
    maps = statistics.maps()
    assert maps.dynamic_map.shape == (1, 3, 4) and not maps.dynamic_map.any()


@pytest.mark.parametrize("size", [(42, 70), (70, 42), (14, 14)])
def test_few_frames_have_finite_maps(small: Vggt, size: tuple[int, int]) -> None:
    grid = small.grid_of(*size)
    tokens = small.encode(torch.rand(3, 3, *size))
    for num_frames in (2, 3):
        with capture_grams(small, num_frames, grid) as statistics:
            small.aggregate(tokens[:num_frames], grid)
        assert np.isfinite(statistics.maps().dynamic_map).all()


def test_capture_changes_nothing_and_leaves_no_hook(small: Vggt) -> None:
    tokens = small.encode(torch.rand(2, 3, 42, 56))
    plain = small.aggregate(tokens, (3, 4))
    with capture_grams(small, 2, (3, 4)):
        captured = small.aggregate(tokens, (3, 4))
    assert all(torch.equal(a, b) for a, b in zip(plain.layers, captured.layers, strict=True))
    assert not any(site.attend._forward_pre_hooks for site in find_sites(small, "global") + find_sites(small, "frame"))
    with pytest.raises(HookError, match="never reached"), capture_grams(small, 2, (3, 4)):
        small.attend(tokens, (3, 4), 20)
    with pytest.raises(ValueError, match="capture_grams"):
        GramStatistics(2, (3, 4)).maps()


def test_capture_costs_little_and_keeps_little() -> None:
    """At 50 frames of 518 x 294 with the public network."""
    with torch.device("meta"):
        network = Vggt(dataclasses.replace(VggtConfig(), point_head=None, track_head=None)).requires_grad_(False)
        tokens, image = torch.empty(50, 777, 1024), torch.empty(1, 3, 294, 518)
        q = torch.empty(16, 50, 777, 64)
    grid = (21, 37)
    with FlopCounterMode(display=False) as encode:
        network.encode(image)
    with FlopCounterMode(display=False) as aggregate:
        network.aggregate(tokens, grid)
    plain = 50 * encode.get_total_flops() + aggregate.get_total_flops()
    statistics = GramStatistics(50, grid)
    kept = []
    with FlopCounterMode(display=False) as capture:
        for layer in range(24):
            statistics.observe(layer, q, q)
            waiting = {id(side): side for layers in statistics._waiting.values() for pair in layers for side in pair}
            kept.append(sum(values.numel() * values.element_size() for values in (statistics._maps, *waiting.values())))
    assert 0 < capture.get_total_flops() < 0.03 * plain
    matrices = len(statistics.layers) * 16 * (50 * 777) ** 2 * 4  # of the global attention, in these layers
    assert 100e6 < max(kept) < 2e-4 * matrices


# --- the second pass -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_keys_that_take_no_part_are_as_if_they_were_not_there(batch: int) -> None:
    q, k, v = torch.randn(3, batch, 2, 7, 4)
    kept = torch.rand(batch, 7) > 0.4
    kept[:, 0] = True
    weights = (q @ k.transpose(2, 3) / 2).masked_fill(~kept[:, None, None], -torch.inf).softmax(dim=-1)
    torch.testing.assert_close(Attend()(q, k, v, kept=kept), weights @ v)


def test_dropped_patches_are_seen_by_nobody_in_the_first_blocks(small: Vggt) -> None:
    tokens = small.encode(torch.rand(3, 3, 42, 56))
    dynamic = torch.zeros(3, 12, dtype=torch.bool)
    dynamic[1, 4:9] = True
    changed = tokens.clone()
    changed[dynamic] = torch.randn(5, 16)
    seen: list[list[Tensor]] = []
    for some in (tokens, changed):
        outputs: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda module, inputs, output, to=outputs: to.append(output))
            for block in small.aggregator.global_blocks
        ]
        with drop_patches(small, dynamic):
            small.aggregate(some, (3, 4))
        for handle in handles:
            handle.remove()
        seen.append([output.view(3, -1, 16) for output in outputs])
    special = small.num_special
    others = torch.cat([torch.ones(3, special, dtype=torch.bool), ~dynamic], dim=1)
    for layer in range(24):
        same = torch.allclose(seen[0][layer][others], seen[1][layer][others], atol=1e-6)
        assert same == (layer < 5), layer
    assert not torch.allclose(seen[0][0][~others], seen[1][0][~others], atol=1e-3)


def test_dropping_nothing_changes_nothing_and_everything_can_be_dropped(small: Vggt) -> None:
    tokens = small.encode(torch.rand(2, 3, 42, 56))
    plain = small.aggregate(tokens, (3, 4)).layers
    with drop_patches(small, torch.zeros(2, 12, dtype=torch.bool)):
        same = small.aggregate(tokens, (3, 4)).layers
    for ours, theirs in zip(same, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    with drop_patches(small, torch.ones(2, 12, dtype=torch.bool)):
        emptied = small.aggregate(tokens, (3, 4)).layers
    assert all(torch.isfinite(layer).all() for layer in emptied)
    assert not torch.allclose(emptied[0], plain[0], atol=1e-3)
    assert not any(site.attend._forward_pre_hooks for site in find_sites(small, "global") + find_sites(small, "frame"))
    with pytest.raises(HookError, match="never reached"), drop_patches(small, torch.zeros(2, 12, dtype=torch.bool)):
        small.attend(tokens, (3, 4), 3)


def test_statistics_and_the_cut_can_look_at_one_site_together(small: Vggt) -> None:
    tokens = small.encode(torch.rand(3, 3, 42, 56))
    dynamic = torch.zeros(3, 12, dtype=torch.bool)
    dynamic[:, :4] = True
    shapes = set()
    with (
        drop_patches(small, dynamic),
        observe_patches(small, 3, frozenset({0, 4, 5}), lambda layer, q, k: shapes.add((q.shape, k.shape))),
    ):
        small.aggregate(tokens, (3, 4))
    assert shapes == {((2, 3, 12, 8), (2, 3, 12, 8))}


# --- the refinement ------------------------------------------------------------------------------------------------


def scene(num_frames: int = 4, height: int = 48, width: int = 64) -> dict[str, NDArray[np.generic]]:
    """A textured wall at depth 2 seen by a camera that slides along it, and a patch at depth 1.5 that jumps about."""
    camera_to_world = np.tile(np.eye(4), (num_frames, 1, 1))
    camera_to_world[:, 0, 3] = 0.1 * np.arange(num_frames)
    intrinsics = np.tile(np.array([[40.0, 0, width / 2], [0, 40, height / 2], [0, 0, 1]]), (num_frames, 1, 1))
    depth = np.full((num_frames, height, width), 2.0)
    rows, columns = np.indices((height, width))
    images = np.zeros((num_frames, height, width, 3), np.uint8)
    moves = np.zeros(depth.shape, bool)
    for frame in range(num_frames):
        wall_x = columns + 2.0 * frame  # 40 px * 0.1 / 2
        images[frame] = (127 + 60 * np.sin(wall_x / 5) * np.cos(rows / 7))[..., None]
        moves[frame, 10 + 6 * frame : 18 + 6 * frame, 40 - 9 * frame : 50 - 9 * frame] = True
    depth[moves] = 1.5
    images[moves] = (250, 20, 20)
    return {
        "images": images,
        "depth": depth,
        "moves": moves,
        "camera_to_world": camera_to_world,
        "intrinsics": intrinsics,
    }


def test_what_rests_leaves_the_masks_and_what_moves_stays() -> None:
    given = scene()
    moves = given.pop("moves")
    masks = moves.copy()
    masks[:2, 30:46, 5:30] = True  # of the wall, seen elsewhere unmasked
    masks[0, 10:18, 50:52] = True
    refined = refine_masks(masks=masks, **given)
    wall = np.zeros_like(masks)
    wall[:2, 32:44, 7:28] = True
    wall &= ~cv2.dilate(moves.astype(np.uint8).transpose(1, 2, 0), np.ones((9, 9))).transpose(2, 0, 1).astype(bool)
    assert refined[moves].mean() > 0.95
    assert refined[wall].mean() < 0.1


def test_a_single_frame_keeps_its_masks() -> None:
    given = {name: values[:1] for name, values in scene().items()}
    moves = given.pop("moves")
    refined = refine_masks(masks=moves, **given)
    assert refined[moves].all() and refined.sum() < 2 * moves.sum()
    assert not refine_masks(masks=np.zeros_like(moves), **given).any()


def test_a_cluster_needs_one_projection_in_twenty() -> None:
    given = scene(num_frames=2)
    del given["moves"]
    labels = np.full((48, 64), -1)
    labels[20:24, 20:25] = 0  # 20 points of the resting wall
    points = world_points(given["depth"][0], given["camera_to_world"][0], given["intrinsics"][0])
    hidden = np.zeros((2, 48, 64), bool)
    hidden[1] = True
    arguments = {**given, "masks": hidden}
    assert cluster_losses(0, points, labels, **arguments)[0] == UNKNOWN
    hidden[1, 20:22, 17:20] = False  # a little of it lands on static pixels
    assert cluster_losses(0, points, labels, **arguments)[0] < MAX_LOSS
    assert (cluster_losses(0, points, labels, **arguments)[1:] == UNKNOWN).all()


def test_points_far_from_all_others_are_outliers_and_few_points_get_few_clusters() -> None:
    points = np.stack([*np.meshgrid(np.arange(20.0), np.arange(20.0)), np.zeros((20, 20))], axis=-1)
    points[3, 4, 2] = 100
    mask = np.zeros((20, 20), bool)
    mask[3, 2:7] = True
    labels = label_movers(points, mask, seed=0)
    assert labels[3, 4] == -2 and (labels == -2).sum() == 1
    assert sorted(labels[mask & (labels >= 0)]) == [0, 1, 2, 3]
    assert (labels[~mask] == -1).all()
