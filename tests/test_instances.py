"""Things that move, told apart and followed: what must hold for any mask, and known answers on drawn clips."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence

import numpy as np
import pytest
from small_inputs import QUICK, moving_square, random_model

from easi3r import Motion
from easi3r.common_motion import FrameMotion
from easi3r.config import PairSettings
from easi3r.demo.rendering import render
from easi3r.demo.worlds import FAMILIES, make_world
from easi3r.instances import Region, carry, continue_ids, find_instances, largest_first, links
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import Array, Instances, PairFlow
from easi3r.whole import Whole
from evaluation import instances as evaluation

HEIGHT, WIDTH, PATCH = 48, 64, 8
MIN_MOTION = 0.004
Box = tuple[int, int, int, int]  # left, top, width, height


def drawn(objects: Sequence[Sequence[Box | None]], hiding: Box | None = None) -> tuple[Array, PairFlow, Array]:
    """Boxes that move, later ones in front: truth [n, H, W] with ids from 1, exact flow, tokens that tell them apart.

    objects: the box of each object in every frame, None = not there.  hiding: a box at rest in front of all.
    """
    n = len(objects[0])
    truth = np.zeros((n, HEIGHT, WIDTH), dtype=np.int64)
    for number, boxes in enumerate(objects, start=1):
        for frame, box in enumerate(boxes):
            if box is not None:
                x, y, width, height = box
                truth[frame, y : y + height, x : x + width] = number
    if hiding is not None:
        x, y, width, height = hiding
        truth[:, y : y + height, x : x + width] = 0
    pairs = make_pairs(n, PairSettings())
    flow = np.zeros((len(pairs), HEIGHT, WIDTH, 2), np.float32)
    valid = np.zeros((len(pairs), HEIGHT, WIDTH), bool)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for k, (a, b) in enumerate(pairs):
        for number, boxes in enumerate([[(0, 0, 0, 0)] * n, *objects]):
            here, there = boxes[a], boxes[b]
            if here is not None and there is not None:
                step = there[0] - here[0], there[1] - here[1]
                to_x, to_y = (x + step[0]).clip(0, WIDTH - 1), (y + step[1]).clip(0, HEIGHT - 1)
                inside = (to_x == x + step[0]) & (to_y == y + step[1])
                flow[k][truth[a] == number] = step
                valid[k] |= (truth[a] == number) & inside & (truth[b, to_y, to_x] == number)
    numbers = truth.reshape(n, HEIGHT // PATCH, PATCH, WIDTH // PATCH, PATCH)
    tokens = np.stack([(numbers == number).mean(axis=(2, 4)) for number in range(len(objects) + 1)], axis=-1)
    return truth, PairFlow(pairs, flow, valid), tokens.astype(np.float32)


def moving(start: tuple[int, int], step: tuple[int, int], size: tuple[int, int], n: int = 8) -> list[Box | None]:
    return [(start[0] + i * step[0], start[1] + i * step[1], *size) for i in range(n)]


def found_in(truth: Array, flow: PairFlow | None, tokens: Array | None) -> Array:
    labels = find_instances(truth > 0, flow, tokens, MIN_MOTION, silent)
    np.testing.assert_array_equal(labels > 0, truth > 0)
    return labels


def agreement(labels: Array, truth: Array) -> float:
    """Share of the moving pixels that have the id which their object mostly has, no id counting for two objects."""
    best = 0.0
    numbers, ids = np.unique(truth[truth > 0]), np.unique(labels[labels > 0])
    if len(ids) < len(numbers):
        return 0.0
    for chosen in itertools.permutations(ids[:5], len(numbers)):
        same = sum(int(((truth == t) & (labels == i)).sum()) for t, i in zip(numbers, chosen, strict=True))
        best = max(best, same / (truth > 0).sum())
    return best


# --- what must hold for any mask


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(1, 32, 48), (2, 33, 47), (4, 16, 80)])
@pytest.mark.parametrize("with_flow", [True, False])
def test_exactly_what_moves_has_an_id_and_none_is_left_out(
    shape: tuple[int, ...], share: float, with_flow: bool
) -> None:
    rng = np.random.default_rng(0)
    mask = rng.random(shape) < share
    pairs = make_pairs(shape[0], PairSettings())
    size = (len(pairs), *shape[1:])
    flow = PairFlow(pairs, rng.normal(0, 5, (*size, 2)).astype(np.float32), rng.random(size) < 0.7)
    tokens = rng.normal(size=(shape[0], shape[1] // 8, shape[2] // 8, 5)).astype(np.float32)
    fits = shape[1] % 8 == 0 and shape[2] % 8 == 0
    labels = find_instances(mask, flow if with_flow else None, tokens if fits else None, MIN_MOTION, silent)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels > 0, mask)
    counts = np.bincount(labels.reshape(-1))[1:]
    assert (counts > 0).all() and (np.diff(counts) <= 0).all()


def test_the_same_input_gives_the_same_ids() -> None:
    truth, flow, tokens = drawn([moving((2, 4), (3, 0), (14, 14)), moving((40, 20), (-2, 1), (12, 16))])
    np.testing.assert_array_equal(found_in(truth, flow, tokens), found_in(truth, flow, tokens))


def test_one_frame_has_its_components() -> None:
    truth, flow, tokens = drawn([moving((2, 4), (0, 0), (20, 14), 1), moving((40, 20), (0, 0), (12, 16), 1)])
    np.testing.assert_array_equal(found_in(truth, flow, tokens), truth)
    np.testing.assert_array_equal(found_in(truth, None, None), truth)


# --- known answers


@pytest.mark.parametrize("n", [2, 8])
def test_two_that_never_touch_keep_their_ids(n: int) -> None:
    truth, flow, tokens = drawn([moving((2, 2), (3, 0), (20, 14), n), moving((44, 26), (-4, 0), (12, 16), n)])
    np.testing.assert_array_equal(found_in(truth, flow, tokens), truth)
    np.testing.assert_array_equal(found_in(truth, flow, None), truth)


def test_two_that_cross_keep_their_ids() -> None:
    """They are one component of the mask in the middle of the clip, and one hides part of the other."""
    truth, flow, tokens = drawn([moving((0, 12), (6, 0), (18, 18)), moving((46, 18), (-6, 0), (14, 18))])
    assert evaluation.touching_frames(truth) >= 3
    for known in (tokens, None):
        assert agreement(found_in(truth, flow, known), truth) > 0.9


def test_two_that_touch_all_the_time_are_told_apart_by_their_motion() -> None:
    up, down = moving((10, 4), (0, 2), (16, 20)), moving((26, 20), (0, -2), (16, 20))
    truth, flow, tokens = drawn([up, down])
    assert evaluation.touching_frames(truth) == 8
    labels = found_in(truth, flow, tokens)
    assert labels.max() == 2 and agreement(labels, truth) > 0.95


def test_two_halves_that_move_alike_are_one_thing() -> None:
    truth, flow, tokens = drawn([moving((10, 4), (3, 2), (16, 20)), moving((26, 4), (3, 2), (16, 20))])
    assert found_in(truth, flow, tokens).max() == 1


def test_a_thing_that_a_post_cuts_in_two_is_one() -> None:
    truth, flow, tokens = drawn([moving((4, 10), (4, 0), (24, 20))], hiding=(24, 0, 4, HEIGHT))
    assert found_in(truth, flow, tokens).max() == 1


def test_a_speck_that_flow_carries_into_a_thing_is_part_of_it() -> None:
    """In one frame a part of the thing stands apart from it, and what flow says of it there is wrong."""
    truth, flow, tokens = drawn([moving((2, 6), (2, 1), (24, 20)), moving((48, 30), (-1, 0), (12, 12))])
    mask = truth > 0
    mask[3, :, 14:16] = False
    flow.flow[flow.pairs[:, 0] == 3, :, :14] += [0, 3]
    labels = find_instances(mask, flow, tokens, MIN_MOTION, silent)
    np.testing.assert_array_equal(labels, np.where(mask, truth, 0))


def test_a_thing_out_of_sight_comes_back_with_its_id_if_tokens_know_it() -> None:
    """Flow to the other side of the gap is nowhere valid, as flow is that has to reach far."""
    here, there = moving((2, 6), (2, 0), (16, 16), 10), moving((30, 28), (2, 1), (12, 12), 10)
    truth, flow, tokens = drawn([here[:3] + [None] * 4 + here[7:], there])
    across = (flow.pairs.min(axis=1) < 3) & (flow.pairs.max(axis=1) > 6)
    cut = PairFlow(flow.pairs, flow.flow, flow.valid & ~(across[:, None, None] & (truth[flow.pairs[:, 0]] == 1)))
    labels = found_in(truth, cut, tokens)
    assert labels.max() == 2 and agreement(labels, truth) == 1
    without = found_in(truth, cut, None)
    assert without.max() == 3
    assert not set(without[:3][truth[:3] == 1]) & set(without[7:][truth[7:] == 1])


def test_movers_of_a_rendered_world_are_right_with_exact_flow() -> None:
    clip = render(make_world(3001, FAMILIES["crowd"], num_frames=5), 64, 48, supersample=1)
    pairs = make_pairs(5, PairSettings())
    flow, valid = zip(*(clip.flow(a, b) for a, b in pairs.tolist()), strict=True)
    truth = evaluation.true_instances(clip)
    assert evaluation.touching_frames(truth) == 5
    labels = find_instances(truth > 0, PairFlow(pairs, np.stack(flow), np.stack(valid)), None, MIN_MOTION, silent)
    right = evaluation.objects_right(labels, truth)
    assert len(right) >= 2 and all(right.values())


# --- parts, beside slow and obvious twins


def affine_flow(seed: int = 0) -> tuple[PairFlow, Array]:
    """Two random affine motions, left and right of column 30, to two other frames; models [2, 2, 2, 3]."""
    rng = np.random.default_rng(seed)
    models = rng.normal(0, 0.05, (2, 2, 2, 3)).astype(np.float32)  # part, pair, across and down, basis
    y, x = np.mgrid[:HEIGHT, :WIDTH] / WIDTH
    basis = np.stack([np.ones_like(x), x - 0.5, y - 0.5])
    left, right = (np.einsum("kci,ihw->khwc", model, basis) * WIDTH for model in models)
    flow = np.where(np.arange(WIDTH)[:, None] < 30, left, right).astype(np.float32)
    return PairFlow(np.array([[0, 1], [0, 2]]), flow, np.ones((2, HEIGHT, WIDTH), bool)), models


def test_affine_motion_is_found_and_outliers_are_passed_over() -> None:
    flow, models = affine_flow()
    flow.flow[:, 5:15, 5:15] += 40  # of 30 columns and 48 rows
    region = np.zeros((HEIGHT, WIDTH), bool)
    region[:, :30] = True
    found, distance = FrameMotion(flow, 0).fit(region, np.ones((1, region.sum()), bool))
    np.testing.assert_allclose(found[0], models[0], atol=0.02)
    off = np.zeros((2, HEIGHT, WIDTH))
    off[:, region] = distance[0]
    assert np.median(off[:, 20:, :30]) < 0.004 and off[:, 5:15, 5:15].min() > 0.3


def test_fits_of_several_parts_are_those_of_each_alone() -> None:
    flow, _ = affine_flow(1)
    motion, rng = FrameMotion(flow, 0), np.random.default_rng(2)
    region = rng.random((HEIGHT, WIDTH)) < 0.8
    parts = rng.random((2, 3, region.sum())) < 0.4
    models, distance = motion.fit(region, parts)
    for index in np.ndindex(2, 3):
        alone, away = motion.fit(region, parts[index])
        np.testing.assert_allclose(models[index], alone, atol=1e-5)
        np.testing.assert_allclose(distance[index], away, atol=1e-5)


def test_disagreement_is_the_distance_of_the_two_motions_along_the_seam() -> None:
    flow, models = affine_flow()
    motion, first = FrameMotion(flow, 0), np.zeros((HEIGHT, WIDTH), bool)
    first[:, :30] = True
    apart = [
        (models[0, k] - models[1, k]) @ [1, 29.5 / WIDTH - 0.5, y / WIDTH - 0.5] for y in range(48) for k in (0, 1)
    ]
    far = np.linalg.norm(apart, axis=1).reshape(48, 2) / (2, 3)  # pairs one and two frames apart
    expected = np.median(np.median(far, axis=0))
    assert motion.disagreement(first, ~first) == pytest.approx(expected, rel=0.1)
    assert motion.disagreement(~first, first) == pytest.approx(motion.disagreement(first, ~first))
    assert np.isnan(motion.disagreement(first, np.zeros_like(first)))
    upper = first.copy()
    upper[20:] = False
    assert motion.disagreement(upper, first & ~upper) < 1e-3


def test_links_are_what_counting_pixel_by_pixel_finds() -> None:
    truth, flow, _ = drawn([moving((2, 2), (3, 0), (20, 14), 4), moving((44, 26), (-4, 0), (12, 16), 4)])
    regions = [
        Region(frame, np.flatnonzero(truth[frame] == number), truth[frame] == number)
        for frame in range(4)
        for number in (1, 2)
    ]
    number_of = {(r.frame, int(p)): i for i, r in enumerate(regions) for p in r.pixels}
    carried: dict[tuple[int, int], int] = {}
    for k, (a, b) in enumerate(flow.pairs.tolist()):
        for y, x in np.argwhere(flow.valid[k]):
            to_x, to_y = (np.array([x, y]) + flow.flow[k, y, x]).round().astype(int)
            ends = number_of.get((a, int(y * WIDTH + x))), number_of.get((b, int(to_y * WIDTH + to_x)))
            if None not in ends:
                carried[min(ends), max(ends)] = carried.get((min(ends), max(ends)), 0) + 1
    expected = sorted(carried, key=lambda ends: (-carried[ends], ends))
    assert links(regions, carry(regions, flow, truth.shape)) == expected and len(expected) == 8


# --- pieces of a clip, and results


def test_ids_go_on_one_to_one_where_two_pieces_share_frames() -> None:
    before = np.array([[[5, 5, 5, 0, 2, 2]]])
    labels = np.array([[[1, 1, 3, 4, 2, 2]], [[1, 1, 3, 4, 6, 5]]])
    expected = np.array([[[5, 5, 8, 9, 2, 2]], [[5, 5, 8, 9, 11, 10]]])  # 3 covers 5 too, but less of it than 1 does
    np.testing.assert_array_equal(continue_ids(before, labels, 7), expected)
    np.testing.assert_array_equal(continue_ids(before[:0], labels, 0), labels)


def test_the_largest_comes_first() -> None:
    labels = np.array([[[3, 3, 0, 1], [2, 2, 2, 0]]])
    np.testing.assert_array_equal(largest_first(labels), [[[2, 2, 0, 3], [1, 1, 1, 0]]])
    assert not largest_first(np.zeros((1, 2, 2), np.int32)).any()


def test_pieces_make_the_ids_of_the_whole_clip() -> None:
    truth, _, _ = drawn([moving((2, 2), (3, 0), (20, 14), 12), moving((48, 26), (-4, 0), (12, 16), 12)])
    whole = Whole.empty(truth.shape, with_cameras=False)
    whole.masks.mask[:] = truth > 0
    for piece, shared, names in ((range(6), 0, [0, 1, 2]), (range(4, 10), 2, [0, 2, 1]), (range(6, 12), 4, [0, 2, 1])):
        whole.write_instances(np.array(names, np.int32)[truth[piece.start : piece.stop]], piece, shared)
    instances = whole.instances()
    assert instances is not None
    np.testing.assert_array_equal(instances.labels, truth)
    assert len(instances) == 2 and instances.seen.all()


def test_scores_and_frames_of_each_thing() -> None:
    labels = np.array([[[1, 1], [0, 2]], [[1, 0], [0, 0]], [[0, 0], [0, 0]]], np.int32)
    score = np.array([[[0.5, 0.7], [0.9, 0.2]], [[0.9, 0], [0, 0]], [[0, 0], [0, 0.4]]], np.float32)
    instances = Instances.measured(labels, score)
    np.testing.assert_allclose(instances.motion_score, [0.7, 0.2])
    np.testing.assert_array_equal(instances.seen, [[True, True, False], [True, False, False]])
    assert instances.summary() == {"motion_score": [0.7, 0.2], "first_frame": [0, 0], "last_frame": [1, 0]}
    np.testing.assert_array_equal(instances.mask(2), labels == 2)
    assert len(Instances.measured(np.zeros_like(labels), score)) == 0


@pytest.fixture(scope="module")
def motion() -> Motion:
    """A clip with two movers, masks given."""
    mask = np.zeros((3, 48, 64), bool)
    mask[:, 4:20, 4:30] = mask[:, 10:30, 40:60] = True
    return random_model().segment(moving_square(), masks=mask, **QUICK)


def test_instances_come_with_a_result_and_survive_saving(motion: Motion, tmp_path) -> None:
    assert motion.instances is not None
    np.testing.assert_array_equal(motion.instances.labels > 0, motion.dynamic_mask)
    assert motion.meta["instances"]["motion_score"] == [1.0] * len(motion.instances)
    loaded = Motion.load(motion.save(tmp_path / "out"))
    assert loaded.instances is not None
    for name, values in vars(motion.instances).items():
        np.testing.assert_array_equal(getattr(loaded.instances, name), values, strict=True)


def test_results_without_instances_load(motion: Motion, tmp_path) -> None:
    out = motion.save(tmp_path / "out")
    shutil.rmtree(out / "instances")
    assert Motion.load(out).instances is None


def test_instances_can_be_left_out() -> None:
    motion = random_model().segment(moving_square(), instances=False, **QUICK)
    assert motion.instances is None and "instances" not in motion.meta


# --- the evaluation


def test_a_mover_is_right_if_one_id_is_its_own_and_covers_more_than_half() -> None:
    truth = np.array([[[1, 1, 1, 1, 2, 2, 3, 3]]])
    for labels, expected in (
        ([1, 1, 1, 2, 3, 3, 4, 4], [True, True, True]),
        ([1, 1, 2, 2, 3, 3, 4, 4], [False, True, True]),  # half is not more than half
        ([1, 1, 1, 1, 1, 1, 4, 0], [False, False, False]),  # one id for two; half is found
        ([0, 0, 0, 5, 3, 3, 0, 0], [False, True, False]),
    ):
        assert list(evaluation.objects_right(np.array([[labels]]), truth).values()) == expected


def test_frames_in_which_movers_touch_are_counted() -> None:
    truth = np.array([[[1, 0, 2], [0, 0, 0]], [[1, 0, 0], [0, 2, 0]], [[1, 1, 2], [0, 0, 0]], [[1, 1, 0], [0, 0, 0]]])
    assert evaluation.touching_frames(truth) == 2


def test_the_command_sums_movers_over_clips(monkeypatch, capsys) -> None:
    some = {"seed": 1, "masks": "true", "touching": 6, "ids": 3}
    rows = [some | {"family": "sharp", "right": 2, "movers": 2}, some | {"family": "crowd", "right": 1, "movers": 3}]
    monkeypatch.setattr(evaluation, "rows", lambda *arguments: iter(rows))
    assert evaluation.main(["--clips", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "| true | sharp | 1 | 2 | 2 | 100.0 | 3.0 | 50 |" in out
        and "| true | all | 2 | 5 | 3 | 60.0 | 3.0 | 50 |" in out
    )
