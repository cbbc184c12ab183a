"""From up to scale to the user's unit, by each of the three ways, through the whole pipeline."""

from typing import Any

import numpy as np
import pytest
from small_inputs import QUICK

from easi3r import Easi3R, Scene
from easi3r.demo.clip import demo_clip
from easi3r.errors import InputError
from easi3r.geometry import transform, unproject
from easi3r.scale import read_scale
from easi3r.structures import Crop, Frames, Known

CLIP = demo_clip()
FRAMES = 4


@pytest.fixture(scope="module")
def model() -> Easi3R:
    return Easi3R.from_pretrained("demo")


def reconstruct(model: Easi3R, **options: Any) -> Scene:
    return model.reconstruct(CLIP.images[: 3 * FRAMES : 3], **{**QUICK, "masks": "none", **options})


@pytest.fixture(scope="module")
def plain(model: Easi3R) -> Scene:
    return reconstruct(model)


def test_without_a_hint_the_scene_is_up_to_scale(plain: Scene) -> None:
    assert plain.meta["scale"] == "up to scale"
    assert plain.meta["quality"]["verdict"] in ("good", "doubtful", "bad")
    assert np.array_equal(plain.camera_to_world[0], np.eye(4))


def test_two_known_poses_scale_depth_poses_and_points_alike(model: Easi3R, plain: Scene) -> None:
    poses = CLIP.camera_to_world[: 3 * FRAMES : 3]
    scene = reconstruct(model, camera_to_world={0: poses[0], 3: poses[3]}, scale_from="poses")
    assert scene.meta["scale"] == "metric"
    np.testing.assert_allclose(scene.camera_to_world[[0, 3]], poses[[0, 3]], atol=1e-6)
    factor = np.median(scene.depth / plain.depth)
    steps = [np.linalg.norm(s.camera_to_world[3, :3, 3] - s.camera_to_world[0, :3, 3]) for s in (scene, plain)]
    assert steps[0] / steps[1] == pytest.approx(factor, rel=0.1)  # both grew, and by much the same
    assert np.median(scene.depth / CLIP.depth[: 3 * FRAMES : 3]) == pytest.approx(1, abs=0.25)
    world = transform(unproject(scene.depth, scene.intrinsics), scene.camera_to_world)
    np.testing.assert_allclose(scene.points().points, world.reshape(-1, 3), atol=1e-3)


def test_a_distance_scales_everything_by_one_factor(model: Easi3R, plain: Scene) -> None:
    scene = reconstruct(model, scale_from=(1, 20, 30, 100, 70, 2.5))
    points = unproject(scene.depth[1], scene.intrinsics[1])
    assert np.linalg.norm(points[30, 20] - points[70, 100]) == pytest.approx(2.5, rel=1e-5)
    factor = float(np.median(scene.depth / plain.depth))
    np.testing.assert_allclose(scene.depth, factor * plain.depth, rtol=1e-5)
    places = factor * plain.camera_to_world[:, :3, 3]
    np.testing.assert_allclose(scene.camera_to_world[:, :3, 3], places, atol=1e-5 * factor)
    assert scene.meta["scale"] == "metric"


def test_a_metric_depth_map_sets_the_unit(model: Easi3R) -> None:
    scene = reconstruct(model, depth={0: CLIP.depth[0]}, scale_from="depth")
    np.testing.assert_array_equal(scene.depth[0], CLIP.depth[0])
    assert np.median(scene.depth[1:] / CLIP.depth[3 : 3 * FRAMES : 3]) == pytest.approx(1, abs=0.1)
    assert scene.meta["scale"] == "metric"


def test_a_known_lens_is_that_of_the_source_frames(model: Easi3R) -> None:
    large = CLIP.images[:2].repeat(2, axis=1).repeat(2, axis=2)
    k = CLIP.intrinsics[0].copy()
    k[:2] *= 2
    k[:2, 2] += 0.5  # the centre of the first pixel is (0, 0) before and after
    scene = model.reconstruct(large, intrinsics=k, image_size=128, masks="none")
    np.testing.assert_allclose(scene.intrinsics, CLIP.intrinsics[:2], rtol=1e-5)
    np.testing.assert_allclose(scene.original_intrinsics, [k, k], rtol=1e-5)
    by_number = model.reconstruct(large, focal=float(k[0, 0]), image_size=128, masks="none")
    np.testing.assert_allclose(by_number.intrinsics, CLIP.intrinsics[:2], rtol=1e-5)


def test_a_long_clip_keeps_its_known_poses_and_its_single_one(model: Easi3R) -> None:
    options = {**QUICK, "masks": "none", "pieces.frames": 6, "pieces.overlap": 2}
    poses = {i: CLIP.camera_to_world[i] for i in (0, 3, 8)}
    scene = model.reconstruct(CLIP.images, camera_to_world=poses, **options)
    assert len(scene.meta["pieces"]) > 1
    for i, pose in poses.items():
        np.testing.assert_allclose(scene.camera_to_world[i], pose, atol=1e-6)
    still = model.reconstruct(CLIP.images, camera="static", **options)
    assert np.array_equal(still.camera_to_world, np.eye(4, dtype=np.float32)[None].repeat(12, 0))
    with pytest.raises(InputError, match="of the first one, which place the world, two poses apart must be known"):
        model.reconstruct(CLIP.images, camera_to_world={8: poses[8], 11: poses[3]}, **options)


def test_poses_the_wrong_way_round_are_refused_before_the_network_runs(model: Easi3R, monkeypatch: Any) -> None:
    monkeypatch.setattr("easi3r.job.encode_frames", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(InputError, match="only when inverted"):
        model.reconstruct(CLIP.images, world_to_camera=CLIP.camera_to_world, **QUICK)


def test_two_lenses_at_once_are_refused(model: Easi3R) -> None:
    with pytest.raises(InputError, match="leave one out"):
        reconstruct(model, focal=100.0, intrinsics=100.0)


FEW = Frames(
    np.zeros((2, 48, 64, 3), np.uint8),
    np.arange(2.0),
    (Crop((128, 96), (64, 48), (0, 0), (64, 48)),) * 2,
    ("a", "b"),
    "x",
)
POSES = Known(camera_to_world=np.eye(4)[None].repeat(2, 0) + [[[0.0]], [[1.0]]] * np.eye(4, k=3)[None])


@pytest.mark.parametrize(
    "given, known, said",
    [
        ("metres", Known(), "expected 'poses'"),
        ((0, 1, 2), Known(), "expected 'poses'"),
        ("0,a,2,3,4,5", Known(), "expected 'poses'"),
        ("poses", Known(), "no two given poses lie apart"),
        ("depth", Known(), "no depth is given"),
        ("2,1,1,9,9,1.0", Known(), "expected a frame from 0 to 1"),
        ("0.5,1,1,9,9,1.0", Known(), "expected a frame from 0 to 1"),
        ("0,1,1,9,9,-1.0", Known(), "a distance above 0"),
        ("0,1,1,900,9,1.0", Known(), "lies outside the part of the 128x96 frame"),
        ("0,9,9,9,9,1.0", Known(), "names one pixel twice"),
        ("0,1,1,9,9,1.0", POSES, "leave one out"),
    ],
)
def test_a_hint_that_cannot_be_used_is_refused_in_one_sentence(given: Any, known: Known, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_scale(given, known, FEW)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_pixels_of_a_distance_are_those_of_the_source() -> None:
    found = read_scale("1, 20.5, 30.5, 100.5, 70.5, 3", Known(), FEW)
    assert found is not None and found.frame == 1 and found.distance == 3
    np.testing.assert_allclose(found.pixels, [[10, 15], [50, 35]])
    assert read_scale(None, Known(), FEW) is None
