"""The network's parts against slow descriptions of themselves, and what holds for every size and split of the work."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from easi3r.attention_maps import AttentionStatistics
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig, PointmapPair
from easi3r.backbones.heads import LinearHead, points_and_confidence
from easi3r.backbones.layers import RotaryTable
from easi3r.config import PairSettings
from easi3r.inference import changed_by_cut, empty_predictions, encode_frames, observe_pairs, to_network_input
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from hooks import capture_attention, cut_attention

POINTMAPS = ("points_first", "points_second", "confidence_first", "confidence_second")
CPU = torch.device("cpu")


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same_points(ours: PointmapPair, theirs: PointmapPair, tolerance: float) -> None:
    for name in POINTMAPS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=tolerance)


def rotate_slowly(x: Tensor, grid: tuple[int, int], base: float) -> Tensor:
    """Token by token, channel by channel."""
    rotated = torch.empty_like(x)
    half = x.shape[-1] // 2
    for token in range(grid[0] * grid[1]):
        for axis, position in enumerate(divmod(token, grid[1])):
            for i in range(half // 2):
                angle = position / base ** (2 * i / half)
                a, b = axis * half + i, axis * half + i + half // 2
                rotated[..., token, a] = x[..., token, a] * math.cos(angle) - x[..., token, b] * math.sin(angle)
                rotated[..., token, b] = x[..., token, b] * math.cos(angle) + x[..., token, a] * math.sin(angle)
    return rotated


@pytest.mark.parametrize(("grid", "head_dim", "base"), [((3, 5), 16, 100.0), ((4, 2), 8, 10.0), ((1, 1), 4, 100.0)])
def test_rotary_table_turns_pairs_of_channels_with_row_and_column(
    grid: tuple[int, int], head_dim: int, base: float
) -> None:
    x = random_tensor(2, 3, grid[0] * grid[1], head_dim)
    torch.testing.assert_close(RotaryTable(grid, head_dim, base, CPU).rotate(x), rotate_slowly(x, grid, base))


def test_rotated_logits_depend_on_the_distance_between_tokens_alone() -> None:
    q, k = (random_tensor(1, 1, 1, 16, seed=seed).expand(1, 1, 20, 16) for seed in (1, 2))
    table = RotaryTable((4, 5), 16, 100.0, CPU)
    logits = (table.rotate(q) @ table.rotate(k).transpose(2, 3))[0, 0].reshape(4, 5, 4, 5)
    torch.testing.assert_close(logits[:3, :3, :3, :3], logits[1:, 2:, 1:, 2:])
    assert not torch.allclose(logits[0, 0], logits[0, 1])


def test_rotary_positions_need_channels_in_fours() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        RotaryTable((2, 2), 6, 100.0, CPU)


def test_rotary_tables_made_in_inference_mode_still_serve_training(make_network, random_images) -> None:
    network, images = make_network(rope_base=57.0), random_images(2, 24, 40)
    with torch.inference_mode():
        network(images, images)
    loss = network.requires_grad_(True)(images, images.flip(0)).points_first.mean()
    loss.backward()
    assert network.enc_blocks[0].attn.qkv.weight.grad is not None


@pytest.mark.parametrize("head_type", ["linear", "dpt"])
@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (3, 1), (5, 2), (2, 5), (3, 7)])
def test_any_whole_number_of_patches_gives_a_point_per_pixel(
    make_network, random_images, head_type: str, grid: tuple[int, int]
) -> None:
    network = make_network(head_type=head_type, dec_depth=2, patch_size=16)
    height, width = 16 * grid[0], 16 * grid[1]
    out = network(random_images(2, height, width), random_images(2, height, width, seed=1))
    assert out.points_first.shape == out.points_second.shape == (2, height, width, 3)
    assert out.confidence_first.shape == out.confidence_second.shape == (2, height, width)
    for name in POINTMAPS:
        values = getattr(out, name)
        assert values.dtype == torch.float32 and values.isfinite().all()
        assert values.std() > 0
    assert out.confidence_first.min() >= 1 and out.confidence_second.min() >= 1


@pytest.mark.parametrize("head_type", ["linear", "dpt"])
def test_patches_of_eight_pixels_work(make_network, random_images, head_type: str) -> None:
    network = make_network(head_type=head_type, dec_depth=2, patch_size=8)
    assert network.grid_of(24, 40) == (3, 5)
    assert network.encode(random_images(1, 24, 40)).shape == (1, 15, 32)
    assert network(random_images(1, 24, 40), random_images(1, 24, 40)).points_first.shape == (1, 24, 40, 3)


@pytest.mark.parametrize(("height", "width"), [(16, 17), (15, 16), (0, 16), (7, 7)])
def test_parts_of_patches_are_refused(tiny_network, random_images, height: int, width: int, fails_with) -> None:
    with fails_with(ValueError, f"{width}x{height}", "multiples of 8"):
        tiny_network.encode(random_images(1, height, width))


@pytest.mark.parametrize("head_type", ["linear", "dpt"])
def test_bfloat16_follows_float32_and_answers_in_float32(make_network, random_images, head_type: str) -> None:
    network, images = make_network(head_type=head_type), random_images(2, 32, 48)
    exact = network(images, images.flip(0))
    rounded = network.to(torch.bfloat16)(images, images.flip(0))
    for name in POINTMAPS:
        ours, theirs = getattr(rounded, name), getattr(exact, name)
        assert ours.dtype == torch.float32
        assert 0 < (ours - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("head_type", ["linear", "dpt"])
def test_encode_decode_predict_is_forward(make_network, random_images, head_type: str) -> None:
    network = make_network(head_type=head_type)
    first, second = random_images(2, 16, 24), random_images(2, 16, 24, seed=1)
    split = network.predict(network.decode(network.encode(first), network.encode(second), (2, 3)))
    assert_same_points(split, network(first, second), 1e-6)


@pytest.mark.parametrize("head_type", ["linear", "dpt"])
def test_a_batch_is_its_pairs_one_by_one(make_network, random_images, head_type: str) -> None:
    network = make_network(head_type=head_type)
    first, second = random_images(3, 16, 24), random_images(3, 16, 24, seed=1)
    alone = [network(first[i : i + 1], second[i : i + 1]) for i in range(3)]
    stacked = PointmapPair(*(torch.cat([getattr(pair, name) for pair in alone]) for name in POINTMAPS))
    assert_same_points(network(first, second), stacked, 1e-5)


def test_the_two_views_have_decoders_and_heads_of_their_own(tiny_network, random_images) -> None:
    first, second = random_images(1, 16, 16), random_images(1, 16, 16, seed=1)
    one, other = tiny_network(first, second), tiny_network(second, first)
    assert not torch.allclose(one.points_first, other.points_second, atol=1e-2)


def test_linear_head_lays_each_tokens_channels_out_over_its_patch() -> None:
    patch, grid, dim = 4, (2, 3), 12
    head = LinearHead(1, dim, dim, patch)
    tokens = random_tensor(2, 6, dim)
    channels = tokens @ head.proj.weight.T + head.proj.bias
    expected = torch.empty(2, 4, 8, 12)
    for row in range(8):
        for column in range(12):
            token = (row // patch) * grid[1] + column // patch
            for c in range(4):
                expected[:, c, row, column] = channels[:, token, c * 16 + (row % patch) * patch + column % patch]
    torch.testing.assert_close(head([tokens], grid), expected)


def test_points_keep_their_direction_and_stretch_their_length_exponentially() -> None:
    raw = random_tensor(2, 4, 3, 5).double()
    points, confidence = points_and_confidence(raw, (1.0, math.inf))
    assert points.dtype == confidence.dtype == torch.float32
    for b, y, x in np.ndindex(2, 3, 5):
        xyz, c = raw[b, :3, y, x].numpy(), float(raw[b, 3, y, x])
        length = float(np.linalg.norm(xyz))
        np.testing.assert_allclose(points[b, y, x], xyz / length * (math.exp(length) - 1), rtol=1e-5)
        assert float(confidence[b, y, x]) == pytest.approx(1 + math.exp(c), rel=1e-6)


def test_known_points_and_confidences() -> None:
    raw = torch.tensor([[0.0, 0.0, math.log(3), 0.0], [0.0, 0.0, 0.0, 100.0]]).T.reshape(1, 4, 1, 2)
    points, confidence = points_and_confidence(raw, (2.0, 7.0))
    torch.testing.assert_close(points[0, 0], torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    assert confidence[0, 0].tolist() == [3.0, 7.0]


def test_points_of_half_precision_are_computed_in_float32() -> None:
    raw = random_tensor(1, 4, 2, 2).to(torch.bfloat16)
    halves, fulls = (points_and_confidence(values, (1, math.inf)) for values in (raw, raw.float()))
    assert torch.equal(halves[0], fulls[0]) and torch.equal(halves[1], fulls[1])


def test_pixels_are_scaled_to_plus_minus_one() -> None:
    images = np.array([0, 255, 51], dtype=np.uint8).reshape(1, 1, 1, 3)
    torch.testing.assert_close(to_network_input(images).flatten(), torch.tensor([-1.0, 1.0, -0.6]))


# --- a clip --------------------------------------------------------------------------------------------------------

NUM_FRAMES, GRID = 5, (2, 3)


@pytest.fixture(scope="module")
def network(make_network):
    return make_network()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def dynamic() -> np.ndarray:
    return np.random.default_rng(1).random((NUM_FRAMES, *GRID)) < 0.4


PAIRS = make_pairs(NUM_FRAMES, PairSettings())


def run_pass(network, images, batch_size: int, dynamic=None):
    tokens = encode_frames(network, images, batch_size, silent)
    statistics = AttentionStatistics(NUM_FRAMES, GRID)
    predictions = empty_predictions(PAIRS, 16, 24, torch.float32)
    observe_pairs(
        network,
        tokens,
        PAIRS,
        GRID,
        statistics.update,
        silent,
        batch_size=batch_size,
        dynamic_tokens=dynamic,
        predictions=predictions,
    )
    return statistics.maps(), predictions


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, len(PAIRS), 100])
def test_batch_size_changes_nothing(network, images, dynamic, batch_size: int, masked: bool) -> None:
    given = dynamic if masked else None
    (maps, predictions), (twin, expected) = (run_pass(network, images, size, given) for size in (batch_size, 4))
    for name, values in maps.arrays().items():
        np.testing.assert_allclose(values, getattr(twin, name), rtol=0, atol=1e-5)
    assert_same_points(predictions, expected, 1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_streaming_a_pass_equals_storing_every_pair(network, images, dynamic, masked: bool) -> None:
    stored = {"source": [[] for _ in range(NUM_FRAMES)], "reference": [[] for _ in range(NUM_FRAMES)]}
    points = []
    moving = torch.from_numpy(dynamic).flatten(1)
    for first, second in PAIRS:
        one, other = (to_network_input(images[i : i + 1]) for i in (first, second))
        query, key = ~moving[[first]] & masked, moving[[second]] & masked
        with capture_attention(network) as captured, cut_attention(network, query, key):
            points.append(network(one, other))
        source, reference = (maps.clone() for maps in captured.take())
        for maps in (source, reference):
            maps[:, 0] = (maps[:, 1] + maps[:, GRID[1]]) / 2
        stored["source"][second].append(source)
        stored["reference"][first].append(reference)

    maps, predictions = run_pass(network, images, 3, dynamic if masked else None)
    for view, frames in stored.items():
        for statistic, compute in (("mean", torch.mean), ("std", torch.std)):
            stack = torch.stack([compute(torch.cat(frame), dim=0) for frame in frames])
            scaled = (stack - stack.min()) / (stack.max() - stack.min() + 1e-6)
            channels = scaled.mean(dim=2)
            expected = (channels - channels.min()) / (channels.max() - channels.min() + 1e-6)
            ours = getattr(maps, f"{view}_{statistic}")
            np.testing.assert_allclose(ours, expected.reshape(ours.shape), rtol=0, atol=1e-4)
    for name in POINTMAPS:
        expected = torch.cat([getattr(pair, name) for pair in points])
        torch.testing.assert_close(getattr(predictions, name), expected, rtol=1e-5, atol=1e-5)


def test_a_masked_pass_differs_from_a_plain_one_only_if_something_moves(network, images, dynamic) -> None:
    plain, _ = run_pass(network, images, 4)
    moving, _ = run_pass(network, images, 4, dynamic)
    still, _ = run_pass(network, images, 4, np.zeros_like(dynamic))
    assert np.abs(moving.source_mean - plain.source_mean).max() > 1e-3
    np.testing.assert_array_equal(still.source_mean, plain.source_mean)


def test_the_listener_hears_every_pair_once_and_in_order(network, images) -> None:
    heard = []
    tokens = encode_frames(network, images, 2, silent)
    observe_pairs(network, tokens, PAIRS, GRID, lambda pairs, *maps: heard.append((pairs, *maps)), silent, batch_size=3)
    np.testing.assert_array_equal(np.concatenate([pairs for pairs, _, _ in heard]), PAIRS)
    for pairs, source, reference in heard:
        assert source.shape == reference.shape == (len(pairs), 6, 4 * 3)


def test_the_large_public_shape_has_571_million_parameters() -> None:
    with torch.device("meta"):
        network = Dust3r(Dust3rConfig())
    unread = 2 * 2 * (256 * 256 * 9 + 256)  # in both heads, the unit of the coarsest fusion that has no input
    assert round((sum(p.numel() for p in network.parameters()) + unread) / 1e6) == 571


# --- what a pass without points leaves out


@pytest.mark.parametrize("masked", [False, True])
def test_attention_alone_is_that_of_the_whole_pass(network, images, dynamic, masked: bool) -> None:
    given = dynamic if masked else None
    whole, _ = run_pass(network, images, 4, given)
    statistics = AttentionStatistics(NUM_FRAMES, GRID)
    tokens = encode_frames(network, images, 4, silent)
    observe_pairs(*(network, tokens, PAIRS, GRID, statistics.update, silent), batch_size=4, dynamic_tokens=given)
    for name, values in statistics.maps().arrays().items():
        np.testing.assert_allclose(values, getattr(whole, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("moving_frames", [[], [0], [2, 3], [4], list(range(NUM_FRAMES))])
def test_pairs_that_the_masks_do_not_touch_need_no_second_look(network, images, dynamic, moving_frames) -> None:
    """The slow twin looks at every pair again."""
    moving = np.zeros_like(dynamic)
    moving[moving_frames] = dynamic[moving_frames]
    tokens = encode_frames(network, images, 4, silent)
    first = AttentionStatistics(NUM_FRAMES, GRID)
    observe_pairs(*(network, tokens, PAIRS, GRID, first.update, silent), batch_size=4)
    before = first.maps()
    again, needed = first.reopened(PAIRS, changed_by_cut(PAIRS, moving))
    if needed.any():
        observe_pairs(
            *(network, tokens, PAIRS[needed], GRID, again.update, silent), batch_size=4, dynamic_tokens=moving
        )
    expected, _ = run_pass(network, images, 4, moving)
    for name, values in again.maps().arrays().items():
        np.testing.assert_allclose(values, getattr(expected, name), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(getattr(first.maps(), name), getattr(before, name))
    assert needed.all() == (len(moving_frames) > 1) and needed.any() == bool(moving_frames)


def test_a_cut_changes_a_pair_only_if_its_second_view_moves_and_its_first_does_not_entirely() -> None:
    moving = np.zeros((3, 2, 2), bool)
    moving[1, 0, 0], moving[2] = True, True
    pairs = np.array([[0, 1], [1, 0], [1, 1], [0, 2], [2, 1], [1, 2], [0, 0]])
    assert changed_by_cut(pairs, moving).tolist() == [True, False, True, True, False, True, False]


def test_encoder_tokens_are_kept_where_they_were_asked_for(network, images) -> None:
    here, there = (encode_frames(network, images, 2, silent, on) for on in (None, torch.device("meta")))
    assert here.device == network.device and there.device.type == "meta" and there.shape == here.shape
