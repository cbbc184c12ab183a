"""What a protocol makes of an estimate: known answers by hand, perfect, empty and impossible estimates, crops."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY
from PIL import Image
from scipy.spatial.transform import Rotation
from small_inputs import QUICK, random_model

from easi3r import Settings
from easi3r.errors import InputError
from easi3r.frames import plan_crop
from easi3r.structures import Crop
from evaluation.datasets.sequence import Sequence
from evaluation.methods import METHODS, AllStatic, Easi3RMethod, Estimate
from evaluation.protocols import CLOUD_NUMBERS, NUMBERS, PROTOCOLS, Scores, score, to_network, to_original
from evaluation.published import FILE, differences, published
from evaluation.results import Record, means

EASI3R, DAVIS, VGGT4D, MONST3R = (PROTOCOLS[name] for name in ("easi3r", "davis", "vggt4d", "monst3r"))
CROPS = {  # original: network image
    (64, 48): (64, 48),
    (854, 480): (512, 288),
    (101, 67): (48, 32),  # both sides lose a margin
    (31, 23): (64, 32),  # enlarged
    (480, 854): (288, 512),
}


def make_crop(original: tuple[int, int], size: tuple[int, int]) -> Crop:
    crop = plan_crop(original, 56 if original == (101, 67) else max(size), patch_size=16, trained_size=512)
    assert crop.size == size
    return crop


def truth_of(n: int = 5, height: int = 48, width: int = 64) -> Sequence:
    """A textured depth seen by a camera that turns and walks; a square moves through it."""
    rng = np.random.default_rng(0)
    masks = np.zeros((n, height, width), dtype=bool)
    for i, mask in enumerate(masks):
        mask[10:30, 5 + 3 * i : 25 + 3 * i] = True
    poses = np.tile(np.eye(4), (n, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(0.05 * rng.normal(size=(n, 3)).cumsum(axis=0)).as_matrix()
    poses[:, :3, 3] = rng.normal(size=(n, 3)).cumsum(axis=0)
    camera = np.array([[60, 0, (width - 1) / 2], [0, 60, (height - 1) / 2], [0, 0, 1.0]])
    return Sequence(
        name="square",
        images=tuple(Path(f"{i}.png") for i in range(n)),
        times_s=np.arange(n, dtype=np.float64),
        masks=masks,
        has_mask=np.ones(n, dtype=bool),
        camera_to_world=poses,
        intrinsics=np.tile(camera, (n, 1, 1)),
        depth=rng.uniform(1, 5, (n, height, width)).astype(np.float32),
    )


def perfect(truth: Sequence) -> Estimate:
    height, width = truth.masks.shape[1:]
    crop = make_crop((width, height), (width, height))
    return Estimate(
        (crop,) * len(truth.images), truth.masks, truth.camera_to_world, truth.depth, intrinsics=truth.intrinsics
    )


# --- perfect, empty, wrong


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("unit", [1.0, 0.2])
def test_a_perfect_estimate_scores_perfectly(protocol, unit: float) -> None:
    truth = truth_of()
    turn = Rotation.from_rotvec([1, 2, 3]).as_matrix()
    estimate = perfect(truth)
    poses = truth.camera_to_world.copy()  # another world, and another unit
    poses[:, :3, :3] = turn @ poses[:, :3, :3]
    poses[:, :3, 3] = unit * poses[:, :3, 3] @ turn.T + [1, 2, 3]
    found = score(truth, dataclasses.replace(estimate, camera_to_world=poses, depth=unit * truth.depth), protocol)
    assert found.frames.tolist() == ([1, 2, 3] if protocol is DAVIS else [0, 1, 2, 3, 4])
    assert (found.jaccard == 1).all() and (found.boundary_f == 1).all()
    assert list(found.numbers) == [name for name in NUMBERS if protocol.point_clouds or name not in CLOUD_NUMBERS]
    perfection = {"delta 1.25": 1.0} | dict.fromkeys(set(found.numbers) - {"delta 1.25"}, 0.0)
    for name, value in found.numbers.items():
        assert abs(value - perfection[name]) < 1e-6, name
    assert protocol.point_clouds == (protocol is EASI3R)


def test_an_empty_estimate_scores_what_theory_says() -> None:
    truth = truth_of()
    masks = truth.masks.copy()
    masks[2] = False  # nothing moves in this frame
    truth = dataclasses.replace(truth, masks=masks)
    estimate = dataclasses.replace(perfect(truth), masks=np.zeros_like(masks))
    found = score(truth, estimate, EASI3R)
    assert found.jaccard.tolist() == found.boundary_f.tolist() == [0, 0, 1, 0, 0]
    everything = score(truth, dataclasses.replace(estimate, masks=np.ones_like(masks)), EASI3R)
    np.testing.assert_allclose(everything.jaccard, masks.mean(axis=(1, 2)))


def test_a_camera_at_rest_scores_the_spread_of_the_truth(tmp_path: Path) -> None:
    truth = truth_of()
    images = tuple(tmp_path / path for path in truth.images)
    for path in images:
        Image.new("RGB", (64, 48)).save(path)
    truth = dataclasses.replace(truth, images=images)
    settings = Settings().with_options({"image_size": "native"})
    found = score(truth, METHODS["all-static"].make(settings, False, None)(images), EASI3R)
    positions = truth.camera_to_world[:, :3, 3]
    assert np.isclose(found.numbers["ATE"], np.sqrt(positions.var(axis=0).sum()))
    steps = np.diff(positions, axis=0)
    assert np.isclose(found.numbers["RTE"], np.sqrt((steps**2).sum(axis=1).mean()))
    best = np.median(truth.depth)
    assert np.isclose(found.numbers["AbsRel"], np.mean(np.abs(best - truth.depth) / truth.depth), rtol=1e-5)
    assert (found.jaccard == 0).all()


def test_only_what_both_know_is_scored() -> None:
    truth = truth_of()
    everything = {"masks", "camera_to_world", "intrinsics", "depth"}
    bare = dataclasses.replace(truth, has_mask=None, **dict.fromkeys(everything))
    assert score(bare, perfect(truth), EASI3R) == Scores(None, None, None, {})
    assert score(truth, Estimate(perfect(truth).crops), EASI3R) == Scores(None, None, None, {})
    some = score(dataclasses.replace(truth, intrinsics=None), perfect(truth), EASI3R).numbers
    assert list(some) == ["ATE", "RTE", "RRE deg", "AbsRel", "delta 1.25"]
    unknown = dataclasses.replace(truth, has_mask=np.zeros(5, bool), depth=np.full_like(truth.depth, np.nan))
    found = score(unknown, perfect(truth), DAVIS)
    assert found.jaccard is None and list(found.numbers) == ["ATE", "RTE", "RRE deg"]


def test_unknown_poses_masks_and_depths_do_not_count() -> None:
    truth, estimate = truth_of(), perfect(truth_of())
    poses, depth = truth.camera_to_world.copy(), truth.depth.copy()
    poses[1], depth[:, :, ::2], depth[:, :, 1::4] = np.nan, np.nan, 0.0
    truth = dataclasses.replace(
        truth, camera_to_world=poses, depth=depth, has_mask=np.array([True, True, False, True, True])
    )
    wrong = {name: getattr(estimate, name).copy() for name in ("masks", "camera_to_world", "depth")}
    wrong["masks"][2], wrong["camera_to_world"][1, :3, 3] = False, 100.0
    wrong["depth"][~(depth > 0)] = np.nan  # as much as the truth knows
    found = score(truth, dataclasses.replace(estimate, **wrong), EASI3R)
    assert found.frames.tolist() == [0, 1, 3, 4] and (found.jaccard == 1).all()
    assert all(value < 1e-6 for name, value in found.numbers.items() if name != "delta 1.25")
    assert set(found.numbers) == set(NUMBERS)
    one_pose = truth.camera_to_world.copy()
    one_pose[1:] = np.nan
    numbers = score(dataclasses.replace(truth, camera_to_world=one_pose), estimate, MONST3R).numbers
    assert list(numbers) == ["AbsRel", "delta 1.25"], "one pose always fits, so it says nothing"


def test_depth_by_the_protocols_alignment() -> None:
    truth, estimate = truth_of(), perfect(truth_of())
    bent = dataclasses.replace(estimate, depth=0.5 * truth.depth + 3)
    assert score(truth, bent, MONST3R).numbers["AbsRel"] < 1e-6
    assert score(truth, bent, EASI3R).numbers["AbsRel"] > 0.1
    as_it_is = dataclasses.replace(MONST3R, depth_alignment="none")
    expected = np.mean(np.abs(bent.depth - truth.depth) / truth.depth)
    assert np.isclose(score(truth, bent, as_it_is).numbers["AbsRel"], expected, rtol=1e-5)


BAD = {
    "a frame is missing": ({"crops": (make_crop((64, 48), (64, 48)),) * 4}, ["4 crops", "5 frames"]),
    "masks of another size": ({"masks": np.zeros((5, 48, 60), bool)}, ["masks", "[5, 48, 60]", "[5, 48, 64]"]),
    "poses of other frames": ({"camera_to_world": np.zeros((4, 4, 4))}, ["camera_to_world", "[4, 4, 4]"]),
    "images of another size": ({"crops": (make_crop((128, 96), (64, 48)),) * 5}, ["128 x 96", "[5, 48, 64]"]),
    "depth below 0": ({"depth": np.full((5, 48, 64), -1.0)}, ["depth", "15360 pixels"]),
    "depth that is nan": ({"depth": np.full((5, 48, 64), np.nan)}, ["depth", "15360 pixels"]),
}


@pytest.mark.parametrize("case", BAD)
def test_an_estimate_that_is_not_of_the_sequence(
    case: str, fails_with: Callable[..., AbstractContextManager[None]]
) -> None:
    changes, parts = BAD[case]
    with fails_with(InputError, "square", *parts):
        score(truth_of(), dataclasses.replace(perfect(truth_of()), **changes), EASI3R)


def test_two_frames_without_their_ends(fails_with: Callable[..., AbstractContextManager[None]]) -> None:
    truth = truth_of(2)
    with fails_with(InputError, "square", "2 frames", "davis"):
        score(truth, perfect(truth), DAVIS)
    assert score(truth, perfect(truth), EASI3R).jaccard.tolist() == [1, 1]


# --- pixels of the file and of the network


def nearest_by_pixels(count: int, resized: int, offset: int, size: int) -> list[int]:
    """The pixel of the file under the centre of each network pixel."""
    return [int((x + offset + 0.5) * count / resized) for x in range(size)]


@pytest.mark.parametrize(("original", "size"), CROPS.items())
def test_nearest_neighbours_there_and_back(original: tuple[int, int], size: tuple[int, int]) -> None:
    crop = make_crop(original, size)
    ids = np.arange(original[0] * original[1]).reshape(original[::-1])
    columns = nearest_by_pixels(original[0], crop.resized[0], crop.offset[0], size[0])
    rows = nearest_by_pixels(original[1], crop.resized[1], crop.offset[1], size[1])
    np.testing.assert_array_equal(to_network(ids, crop), ids[np.ix_(rows, columns)])
    assert to_network(np.stack([ids, ids], axis=-1), crop).shape == (*size[::-1], 2)

    mask = np.random.default_rng(0).random(size[::-1]) > 0.5
    back = to_original(mask, crop)
    assert back.shape == original[::-1] and back.dtype == bool
    for y, x in product(range(0, original[1], 7), range(0, original[0], 7)):
        u, v = (int(c) for c in np.floor((np.array([x, y]) + 0.5) * crop.scale - crop.offset))
        inside = 0 <= u < size[0] and 0 <= v < size[1]
        assert back[y, x] == (inside and mask[v, u])
    if crop.resized[0] >= original[0]:  # nothing is lost by enlarging but what the crop cuts off
        kept = to_original(np.ones_like(mask), crop)
        some = np.random.default_rng(1).random(original[::-1]) > 0.5
        np.testing.assert_array_equal(to_original(to_network(some, crop), crop)[kept], some[kept])


def test_masks_are_compared_where_the_protocol_says() -> None:
    truth = truth_of(3, 67, 101)
    crop = make_crop((101, 67), (48, 32))
    masks = np.stack([to_network(mask, crop) for mask in truth.masks])
    estimate = Estimate((crop,) * 3, masks)
    assert (score(truth, estimate, EASI3R).jaccard == 1).all(), "the truth comes into the crop"
    native = score(truth, estimate, dataclasses.replace(DAVIS, skip_ends=False))
    back = to_original(masks[0], crop)
    assert native.jaccard[0] == (back & truth.masks[0]).sum() / (back | truth.masks[0]).sum() < 1
    outside = dataclasses.replace(truth, masks=np.ones_like(truth.masks))
    everything = Estimate((crop,) * 3, np.ones_like(masks))
    share = to_original(np.ones_like(masks[0]), crop).mean()
    assert share < 1 and np.allclose(score(outside, everything, DAVIS).jaccard, share)


def test_depth_and_clouds_in_the_networks_crop() -> None:
    truth = truth_of(3, 67, 101)
    crop = make_crop((101, 67), (48, 32))
    depth = np.stack([to_network(values, crop) for values in truth.depth])
    cameras = crop.matrix() @ truth.intrinsics
    estimate = Estimate((crop,) * 3, None, truth.camera_to_world, depth, intrinsics=cameras)
    numbers = score(truth, estimate, EASI3R).numbers
    assert numbers["AbsRel"] < 1e-6 and numbers["ATE"] < 1e-6
    assert numbers["distance"] < 5 * 0.75 * max(1 / np.array(crop.scale)) / 60, "less than the rounding to a pixel"
    assert 0 < numbers["accuracy"] <= numbers["distance"]
    far = dataclasses.replace(estimate, intrinsics=2 * cameras)
    assert score(truth, far, EASI3R).numbers["distance"] > 3 * numbers["distance"]


# --- poolings


def test_poolings_differ_on_unequal_lengths_as_computed_by_hand() -> None:
    j = {"long": [1.0, 0.75, 0.25, 0.0, 0.0, 0.0], "short": [1.0, 0.5]}
    records = [
        Record(name, len(values), Scores(np.arange(len(values)), np.array(values), np.array(values), {"ATE": ate}))
        for (name, values), ate in zip(j.items(), (2.0, 4.0), strict=True)
    ]
    records.append(Record("broken", None, reason="it is broken"))
    frames, sequences = means(records, "frames"), means(records, "sequences")
    assert frames["JM %"].value == frames["FM %"].value == 100 * 3.5 / 8  # (1 + .75 + .25 + 1 + .5) / 8
    assert frames["JR %"].value == 100 * 3 / 8  # 1, .75 and 1 of eight; .5 is not above .5
    assert sequences["JM %"].value == 100 * (2 / 6 + 0.75) / 2
    assert np.isclose(sequences["JR %"].value, 100 * (2 / 6 + 1 / 2) / 2)
    # quarters of six frames end at 0, 1, 3 (2.5, halves up), 4, 5: (1 + .75) / 2 - (0 + 0) / 2; of two at 0, 0, 1, 1, 1
    assert np.isclose(sequences["JD %"].value, 100 * (0.875 + 0.5) / 2)
    assert "JD %" not in frames, "a decay across sequences means nothing"
    assert frames["ATE"].value == sequences["ATE"].value == 3
    assert {mean.count for mean in (*frames.values(), *sequences.values())} == {2}


def test_a_mean_says_over_how_many_it_was_taken() -> None:
    some = [Record("a", 3, Scores(None, None, None, {"ATE": 1.0, "AbsRel": 0.5}))]
    some += [Record("b", 3, Scores(None, None, None, {"ATE": 2.0})), Record("c", None, reason="lost")]
    found = means(some, "frames")
    assert {name: dataclasses.astuple(mean) for name, mean in found.items()} == {"ATE": (1.5, 2), "AbsRel": (0.5, 1)}
    assert means([some[2]], "frames") == means([], "sequences") == {}


# --- protocols and published figures


def test_the_frames_of_the_protocols() -> None:
    assert list(range(1000))[EASI3R.frames_of("tum")] == list(range(0, 1000, 30))
    assert list(range(1000))[EASI3R.frames_of("bonn")] == list(range(30, 140))
    assert list(range(1000))[EASI3R.frames_of("dycheck")] == list(range(0, 1000, 10))
    assert list(range(1000))[EASI3R.frames_of("adt")] == list(range(0, 1000, 5))
    assert list(range(1000))[MONST3R.frames_of("tum")] == list(range(0, 270, 3))
    for protocol in PROTOCOLS.values():
        assert protocol.frames_of("sintel") == protocol.frames_of("davis") == slice(None)
        assert all(protocol.describe("tum").values())
    assert EASI3R.describe("tum")["stride"] == "30" and "30 to 139" in EASI3R.describe("bonn")["frames"]
    assert "native" not in str(EASI3R) and "first and last frame left out" in DAVIS.describe("davis")["protocol"]


def test_published_figures_are_those_of_their_source() -> None:
    assert len(published()) == 5 * 6 + 5 * 3 + 10 * 3 + 7 + 5
    for figures in published():
        assert figures.protocol in PROTOCOLS and figures.source.count("arXiv") == 1 and figures.values
        assert figures.variant is None or isinstance(figures.variant, str)
    spec = PARITY.parent / "spec" / "published.md"
    if not spec.is_file():
        pytest.skip(f"{spec} is absent: the file cannot be compared with it here.")
    text = spec.read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("|") and any(c.isdigit() for c in line)]
    said = [cell for line in tables for cell in line.strip("|").split("|") if "/" in cell]
    said += [item.split()[-1].rstrip(".") for item in text.splitlines()[-1].split(";")]
    said = sorted(tuple(map(float, cell.split("/"))) for cell in said)
    values = [tuple(figures.values.values()) for figures in published()]
    ours = [v for v in values if len(v) < 6] + [v[i : i + 2] for v in values if len(v) == 6 for i in (0, 2, 4)]
    assert sorted(ours) == said
    assert FILE.read_text(encoding="utf-8").isascii()


def test_differences_are_to_the_same_split_and_protocol() -> None:
    found = differences({"JM %": 50.0, "JR %": 60.0, "ATE": 1.0}, "davis", "2016", "easi3r")
    assert len(found) == 10 and {figures.note for figures, _ in found} == {"", "refined by SAM2"}
    less = {figures.method: less for figures, less in found if not figures.note}
    assert np.isclose(less["Easi3R, MonST3R weights"]["JM %"], 50 - 57.7)
    assert np.isclose(less["DUSt3R (flow mask)"]["JR %"], 60 - 45.7)
    assert len(differences({"FM %": 50.0}, "davis", "all", "vggt4d")) == 5
    assert len(differences({"ATE": 0.1}, "tum", "dynamics", "easi3r")) == 10
    assert not differences({"ATE": 0.1}, "tum", "dynamics", "monst3r")
    assert not differences({"JM %": 50.0}, "davis", "2016", "davis") and not differences({}, "davis", "2016", "easi3r")


# --- methods


def test_this_repositorys_method_as_a_method(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = tuple(tmp_path / f"{i}.png" for i in range(3))
    for path in images:
        Image.fromarray(rng.integers(0, 255, (53, 70, 3), dtype=np.uint8)).save(path)
    model = random_model()
    whole = Easi3RMethod(model, Settings().with_options(QUICK))(images)
    masks = Easi3RMethod(model, Settings().with_options(QUICK), masks_only=True)(images)
    crop = plan_crop((70, 53), "native", patch_size=16, trained_size=128)
    assert whole.crops == masks.crops == AllStatic(Settings().with_options(QUICK).frames)(images).crops == (crop,) * 3
    assert whole.masks.shape == masks.masks.shape == (3, 48, 64)
    assert masks.depth is None and whole.depth.shape == whole.confidence.shape == (3, 48, 64)
    assert whole.camera_to_world.shape == (3, 4, 4) and whole.intrinsics.shape == (3, 3, 3)
    found = score(dataclasses.replace(truth_of(3, 53, 70), images=images), whole, EASI3R)
    assert list(found.numbers) == list(NUMBERS) and len(found.jaccard) == 3
    everything = METHODS["flow-ego-motion"].make(Settings().with_options(QUICK), False, model)(images)
    assert everything.masks.shape == (3, 48, 64) and everything.depth is not None
