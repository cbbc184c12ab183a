"""Which frames are paired: every graph against a slow description of itself, and what holds for all of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from easi3r.config import PairSettings
from easi3r.errors import ConfigError
from easi3r.pairs import make_pairs

GRAPHS = ("window", "complete", "logarithmic", "reference")
COUNTS = (1, 2, 3, 4, 7, 12, 33)


def pairs_of(num_frames: int, **settings: object) -> set[tuple[int, int]]:
    return set(map(tuple, make_pairs(num_frames, PairSettings(**settings)).tolist()))


def both_directions(pairs: set[tuple[int, int]]) -> set[tuple[int, int]]:
    return pairs | {(j, i) for i, j in pairs}


@pytest.mark.parametrize(("graph", "num_frames"), list(itertools.product(GRAPHS, COUNTS)))
def test_every_graph_is_directed_without_doubles_and_reaches_every_frame(graph: str, num_frames: int) -> None:
    pairs = make_pairs(num_frames, PairSettings(graph=graph))
    assert pairs.dtype == np.int64 and pairs.shape == (len(pairs), 2)
    distinct = set(map(tuple, pairs.tolist()))
    assert len(distinct) == len(pairs)
    assert distinct == {(j, i) for i, j in distinct}
    assert set(pairs.flatten().tolist()) == set(range(num_frames))
    if num_frames > 1:
        assert (pairs[:, 0] != pairs[:, 1]).all()


@pytest.mark.parametrize("num_frames", [n for n in COUNTS if n > 1])
@pytest.mark.parametrize("graph", GRAPHS)
def test_forward_pairs_come_first_and_backward_pairs_mirror_them(graph: str, num_frames: int) -> None:
    forward, backward = np.split(make_pairs(num_frames, PairSettings(graph=graph)), 2)
    assert (forward[:, 0] < forward[:, 1]).all()
    np.testing.assert_array_equal(backward, forward[:, ::-1])


@pytest.mark.parametrize("graph", GRAPHS)
def test_one_frame_is_paired_with_itself_once(graph: str) -> None:
    assert make_pairs(1, PairSettings(graph=graph)).tolist() == [[0, 0]]


@pytest.mark.parametrize("graph", GRAPHS)
def test_two_frames_are_paired_in_both_directions(graph: str) -> None:
    assert make_pairs(2, PairSettings(graph=graph)).tolist() == [[0, 1], [1, 0]]


def test_three_frames_of_each_graph() -> None:
    assert pairs_of(3) == both_directions({(0, 1), (1, 2)})
    assert pairs_of(3, graph="complete") == both_directions({(0, 1), (0, 2), (1, 2)})
    assert pairs_of(3, graph="logarithmic") == both_directions({(0, 1), (0, 2), (1, 2)})
    assert pairs_of(3, graph="reference", reference=1) == both_directions({(0, 1), (1, 2)})


def test_default_graph_has_seventy_pairs_for_twelve_frames() -> None:
    assert len(make_pairs(12, PairSettings())) == 70
    assert {j for i, j in pairs_of(12) if i == 0} == {1, 3, 5, 7, 9}


@pytest.mark.parametrize(("window", "stride"), [(5, 2), (1, 1), (3, 1), (2, 4), (40, 3)])
@pytest.mark.parametrize("num_frames", [n for n in COUNTS if n > 1])
def test_window_graph_pairs_frames_whose_distance_is_a_step(num_frames: int, window: int, stride: int) -> None:
    expected = {
        (i, j)
        for i, j in itertools.permutations(range(num_frames), 2)
        if (abs(i - j) - 1) % stride == 0 and (abs(i - j) - 1) // stride < window
    }
    assert pairs_of(num_frames, window=window, stride=stride) == expected


@pytest.mark.parametrize("num_frames", [n for n in COUNTS if n > 1])
def test_other_graphs_pair_what_their_names_say(num_frames: int) -> None:
    everything = set(itertools.permutations(range(num_frames), 2))
    powers = {1, 2, 4, 8, 16, 32}
    last = num_frames - 1
    assert pairs_of(num_frames, graph="complete") == everything
    assert pairs_of(num_frames, graph="logarithmic") == {(i, j) for i, j in everything if abs(i - j) in powers}
    assert pairs_of(num_frames, graph="reference", reference=last) == {p for p in everything if last in p}


@pytest.mark.parametrize(("num_frames", "reference"), [(3, 3), (1, 1)])
def test_reference_beyond_the_clip_is_refused(num_frames: int, reference: int, fails_with) -> None:
    with fails_with(ConfigError, "pairs.reference", f"{num_frames} frame"):
        make_pairs(num_frames, PairSettings(graph="reference", reference=reference))
