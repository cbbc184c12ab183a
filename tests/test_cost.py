"""What the work costs, counted at the large public shape (512 x 288) without doing it: operations and bytes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from easi3r.attention_maps import AttentionStatistics
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.config import PairSettings
from easi3r.pair_passes import decoder_flops, encoder_flops
from easi3r.pairs import make_pairs

HEIGHT, WIDTH = 288, 512
GRID = (HEIGHT // 16, WIDTH // 16)
TOKENS = GRID[0] * GRID[1]
FRAMES = 30
PAIRS = make_pairs(FRAMES, PairSettings())


@pytest.fixture(scope="module")
def network() -> Dust3r:
    with torch.device("meta"):
        return Dust3r(Dust3rConfig()).requires_grad_(False)


@pytest.fixture(scope="module")
def gflop(network: Dust3r) -> dict[str, float]:
    """Of one frame (encode) or one directed pair (everything else), in 1e9."""
    image, tokens = torch.empty(1, 3, HEIGHT, WIDTH, device="meta"), torch.empty(1, TOKENS, 1024, device="meta")
    decoded = network.decode(tokens, tokens, GRID)

    def count(work: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops() / 1e9

    return {
        "encode": count(lambda: network.encode(image)),
        "attend": count(lambda: network.attend(tokens, tokens, GRID)),
        "decode": count(lambda: network.decode(tokens, tokens, GRID)),
        "predict": count(lambda: network.predict(decoded)),
        "published": count(lambda: network(image, image)),
    }


def test_the_whole_network_costs_what_is_published(gflop: dict[str, float]) -> None:
    assert gflop["published"] == pytest.approx(1355, rel=0.01)
    assert gflop["published"] == pytest.approx(2 * gflop["encode"] + gflop["decode"] + gflop["predict"], rel=1e-6)


def test_the_plan_counts_the_same_as_the_network(gflop: dict[str, float]) -> None:
    assert encoder_flops(Dust3rConfig(), TOKENS) / 1e9 == pytest.approx(gflop["encode"], rel=0.03)
    assert decoder_flops(Dust3rConfig(), TOKENS) / 1e9 == pytest.approx(gflop["decode"], rel=0.03)


def test_pass_1_reads_attention_alone(gflop: dict[str, float]) -> None:
    assert gflop["attend"] < 320
    last_block = 2 * 1e-9 * (20 * TOKENS * 768**2 + 4 * TOKENS**2 * 768)  # projv, proj, MLP; weights times values
    assert gflop["decode"] - gflop["attend"] == pytest.approx(last_block, rel=1e-6)


def test_both_passes_cost_about_a_third_of_the_published_way(gflop: dict[str, float]) -> None:
    cut = 12 * 4e-9 * TOKENS**2 * 768  # decoder 1 attends twice in the second pass
    ours = FRAMES * gflop["encode"] + len(PAIRS) * (gflop["attend"] + gflop["decode"] + cut + gflop["predict"])
    assert ours / (2 * len(PAIRS) * 1355) < 0.36


def test_masks_alone_cost_less_than_three_quarters_of_masks_and_points(gflop: dict[str, float]) -> None:
    cut = 11 * 4e-9 * TOKENS**2 * 768
    masks = FRAMES * gflop["encode"] + len(PAIRS) * (2 * gflop["attend"] + cut)
    both = FRAMES * gflop["encode"] + len(PAIRS) * (gflop["attend"] + gflop["decode"] + cut + gflop["predict"])
    assert masks / both < 0.72


def test_statistics_of_attention_are_a_thousandth_of_the_maps() -> None:
    statistics = AttentionStatistics(FRAMES, GRID)
    for start in range(0, len(PAIRS), 10):
        some = PAIRS[start : start + 10]
        maps = torch.rand(len(some), TOKENS, 12 * 12)
        statistics.update(some, maps, maps)
    kept = sum(
        tensor.numel() * tensor.element_size()
        for side in (statistics.source, statistics.reference)
        for tensor in vars(side).values()
        if isinstance(tensor, torch.Tensor)
    )
    cross_maps = 2 * 12 * 12 * TOKENS**2 * 4  # of a pair: both decoders, layers, heads; 382 MB
    assert kept > 30e6 and kept / len(PAIRS) / cross_maps < 1e-3
