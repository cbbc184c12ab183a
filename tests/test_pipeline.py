"""The whole way from frames to a Scene or a Motion, on clips so small that every property can be tried."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform

import cv2
import numpy as np
import pytest
import torch
from small_inputs import QUICK, moving_square, random_model, write_checkpoint, write_images, write_video

import easi3r
from easi3r import Easi3R, Motion, Scene, Settings
from easi3r.attention_maps import AttentionStatistics
from easi3r.config import FrameSettings
from easi3r.errors import ConfigError, InputError
from easi3r.geometry import transform, unproject
from easi3r.structures import AttentionMaps

MAPS = tuple(field.name for field in dataclasses.fields(AttentionMaps))


@pytest.fixture(scope="module")
def model():
    return random_model()


@pytest.fixture(scope="module")
def scene(model):
    """Three frames of a moving square; not to be changed."""
    return model.reconstruct(moving_square(), **QUICK)


def arrays_of(result):
    """Name -> array of a Scene or Motion, attention maps among them."""
    fields = {name: value for name, value in vars(result).items() if isinstance(value, np.ndarray)}
    return fields | result.attention.arrays()


def assert_same_arrays(first, second, names=None):
    """Bit for bit, with the types."""
    first, second = arrays_of(first), arrays_of(second)
    assert first.keys() == second.keys() or names
    for name in names or first:
        np.testing.assert_array_equal(first[name], second[name], strict=True, err_msg=name)


def assert_contract(result, n, height, width, patch_size=16):
    """Shapes, types and ranges as the contract's table has them."""
    pixels, tokens = (n, height, width), (n, height // patch_size, width // patch_size)
    expected = {
        "images": ((*pixels, 3), np.uint8),
        "dynamic_score": (pixels, np.float32),
        "dynamic_mask": (pixels, np.bool_),
        "timestamps": ((n,), np.float64),
        **dict.fromkeys(MAPS, (tokens, np.float32)),
    }
    if isinstance(result, Scene):
        expected |= {
            "camera_to_world": ((n, 4, 4), np.float32),
            "intrinsics": ((n, 3, 3), np.float32),
            "depth": (pixels, np.float32),
            "confidence": (pixels, np.float32),
            "valid_mask": (pixels, np.bool_),
        }
    arrays = arrays_of(result)
    assert {name: (array.shape, array.dtype) for name, array in arrays.items()} == expected
    assert [name for name, array in arrays.items() if not np.isfinite(array).all()] == []
    for name in ("dynamic_score", *MAPS):
        assert arrays[name].min() >= 0 and arrays[name].max() <= 1, name
    if isinstance(result, Scene):
        assert (result.depth > 0).all() and (result.confidence >= 1).all() and result.valid_mask.all()
        np.testing.assert_array_equal(result.camera_to_world[0], np.eye(4))
        assert_cameras(result, height, width)


def assert_cameras(scene, height, width):
    rotations = scene.camera_to_world[:, :3, :3].astype(float)
    np.testing.assert_allclose(
        rotations @ rotations.transpose(0, 2, 1), np.tile(np.eye(3), (len(rotations), 1, 1)), atol=1e-5
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1, atol=1e-5)
    np.testing.assert_array_equal(scene.camera_to_world[:, 3], [[0, 0, 0, 1]] * len(rotations))
    for matrix in scene.intrinsics:
        focal = matrix[0, 0]
        assert focal > 0
        np.testing.assert_array_equal(
            matrix, np.float32([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]])
        )


# --- shapes


@pytest.mark.parametrize(
    "n, size, image_size, expected",
    [
        (1, (48, 64), "native", (48, 64)),
        (2, (48, 64), "native", (48, 64)),
        (3, (48, 64), "native", (48, 64)),
        (7, (16, 32), "native", (16, 32)),
        (2, (67, 101), "native", (64, 96)),
        (3, (101, 67), "native", (96, 64)),
        (2, (64, 64), "native", (64, 64)),
        (2, (17, 113), "native", (16, 112)),
        (2, (67, 101), 64, (32, 64)),
        (2, (67, 101), None, (80, 128)),  # 85 rows, less than six patches; the demo was made for 128
        (2, (101, 67), None, (128, 80)),
        (2, (64, 64), None, (96, 128)),  # square frames lose a quarter
    ],
)
def test_scenes_and_motions_have_the_shapes_types_and_ranges_of_the_contract(model, n, size, image_size, expected):
    clip = (
        moving_square(n, *size)
        if min(size) > 32
        else np.random.default_rng(0).integers(0, 255, (n, *size, 3), np.uint8)
    )
    options = QUICK | {"image_size": image_size}
    assert_contract(model.reconstruct(clip, **options), n, *expected)
    motion = model.segment(clip, **options)
    assert type(motion) is Motion
    assert_contract(motion, n, *expected)


def test_images_are_the_frames_cut_to_whole_patches(model):
    clip = moving_square(2, 67, 101)
    np.testing.assert_array_equal(model.segment(clip, **QUICK).images, clip[:, 1:65, 2:98])


def test_unprojected_depth_is_the_point_cloud(scene):
    points = transform(unproject(scene.depth, scene.intrinsics), scene.camera_to_world).reshape(-1, 3)
    np.testing.assert_allclose(scene.points().points, points, rtol=1e-4, atol=1e-4)


# --- what moves


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_identical_frames_have_empty_masks(model, n, passes):
    still = np.repeat(moving_square(1), n, axis=0)
    result = model.reconstruct(still, passes=passes, **QUICK)
    assert not result.dynamic_mask.any() and not result.attention.dynamic_map.any()
    assert result.dynamic_score.max() < 1e-6
    assert_contract(result, n, 48, 64)


@pytest.mark.parametrize("level", [0, 255])
def test_frames_without_any_content_have_empty_masks(model, level):
    result = model.reconstruct(np.full((3, 48, 64, 3), level, np.uint8), **QUICK)
    assert not result.dynamic_mask.any()
    assert_contract(result, 3, 48, 64)


def test_something_is_found_where_something_moves(scene):
    assert 0 < scene.dynamic_mask.mean() < 1  # the other tests would say little of empty masks


def test_segment_finds_what_reconstruct_finds_and_runs_no_head(model, scene, monkeypatch):
    def refuse(*_):
        raise AssertionError("a head was run")

    monkeypatch.setattr(model.network, "predict", refuse)
    motion = model.segment(moving_square(), **QUICK)
    assert_same_arrays(motion, scene, list(arrays_of(motion)))


def test_the_second_pass_is_a_first_one_with_attention_to_the_first_masks_cut_off(model, scene):
    first = model.reconstruct(moving_square(), passes=1, **QUICK)
    assert first.dynamic_mask.any()
    given = model.reconstruct(moving_square(), masks=first.dynamic_mask, **QUICK)
    assert_same_arrays(given, scene, MAPS)
    assert not np.array_equal(first.attention.source_mean, scene.attention.source_mean)


def test_without_a_mover_there_is_nothing_to_cut_off(model):
    clip = np.repeat(moving_square(1), 3, axis=0)
    assert_same_arrays(model.reconstruct(clip, passes=1, **QUICK), model.reconstruct(clip, passes=2, **QUICK))


def test_masks_none_is_the_same_as_masks_that_are_all_false(model):
    clip = moving_square()
    none = model.reconstruct(clip, masks="none", **QUICK)
    assert not none.dynamic_mask.any() and not none.dynamic_score.any()
    assert_same_arrays(none, model.reconstruct(clip, masks=np.zeros(clip.shape[:3], bool), **QUICK))


@pytest.mark.parametrize("passes", [1, 2])
def test_given_masks_come_back_unchanged(model, passes):
    clip, masks = moving_square(), np.random.default_rng(0).random((3, 48, 64)) < 0.5
    for act in (model.reconstruct, model.segment):
        result = act(clip, masks=masks, passes=passes, **QUICK)
        np.testing.assert_array_equal(result.dynamic_mask, masks, strict=True)
        np.testing.assert_array_equal(result.dynamic_score, masks.astype(np.float32), strict=True)
        assert "pass 2" not in result.meta["timings_s"]  # there is nothing to find first


def test_given_masks_change_what_is_seen(model, scene):
    given = model.reconstruct(moving_square(), masks=~scene.dynamic_mask, **QUICK)
    assert not np.array_equal(given.attention.source_mean, scene.attention.source_mean)
    assert not np.array_equal(given.depth, scene.depth)


# --- alignment


@pytest.mark.parametrize("n", [1, 2, 3])
def test_align_none_is_the_start_as_it_is(model, n):
    clip = moving_square(n)
    options = QUICK | {"align": "none"}
    result = model.reconstruct(clip, **options)
    assert_contract(result, n, 48, 64)
    assert_same_arrays(result, model.reconstruct(clip, **options | {"alignment.iterations": 50}))


def test_alignment_moves_the_start(model, scene):
    start = model.reconstruct(moving_square(), align="none", **QUICK)
    assert_same_arrays(start, scene, [*MAPS, "images", "dynamic_mask"])
    assert not np.array_equal(start.depth, scene.depth)


# --- the same again


def test_the_same_input_and_seed_give_the_same_bits(scene, tmp_path):
    torch.manual_seed(99)  # nobody else's dice matter
    np.random.seed(99)
    cv2.setRNGSeed(99)
    again = random_model().reconstruct(moving_square(), **QUICK)
    assert_same_arrays(again, scene)
    assert_same_arrays(Scene.load(again.save(tmp_path / "out")), scene)


def test_dice_of_the_caller_are_left_alone(model):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    random_model().segment(moving_square(), **QUICK)
    assert (torch.rand(1), np.random.rand()) == expected


def test_an_adopted_network_gives_the_same(model, scene):
    assert_same_arrays(Easi3R(model.network).reconstruct(moving_square(), **QUICK), scene)


def test_the_size_of_batches_does_not_matter(model, scene):
    one_by_one, together = (
        model.reconstruct(moving_square(), batch_size=size, dtype="float32", **QUICK) for size in (1, 6)
    )
    np.testing.assert_array_equal(one_by_one.dynamic_mask, together.dynamic_mask)
    for name in MAPS:
        np.testing.assert_allclose(arrays_of(one_by_one)[name], arrays_of(together)[name], atol=1e-4)
    # kept in half precision (depths differ more: the weights are random; some points are cleaned away in one alone)
    kept = (one_by_one.confidence > 1) & (together.confidence > 1)
    np.testing.assert_allclose(one_by_one.confidence[kept], together.confidence[kept], rtol=2e-3)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(model, scene, mode):
    with mode():
        assert_same_arrays(model.reconstruct(moving_square(), **QUICK), scene)


def test_every_source_of_the_same_frames_gives_the_same(model, scene, tmp_path):
    folder = write_images(tmp_path / "images", moving_square())
    for source in (folder, str(folder), sorted(folder.iterdir()), [str(path) for path in sorted(folder.iterdir())]):
        assert_same_arrays(model.reconstruct(source, **QUICK), scene)


def test_a_video_has_its_own_clock(model, tmp_path):
    path = write_video(tmp_path / "clip.avi", moving_square(5))
    motion = model.segment(path, stride=2, start=0.1, **QUICK)
    np.testing.assert_allclose(motion.timestamps, [0.1, 0.3], atol=1e-6)
    assert motion.meta["source"] == str(path) and motion.meta["names"] == ["frame 1", "frame 3"]


def test_the_array_that_was_given_is_not_modified(model):
    clip = moving_square()
    clip.setflags(write=False)
    masks = np.zeros(clip.shape[:3], bool)
    masks.setflags(write=False)
    result = model.reconstruct(clip, masks=masks, **QUICK)
    result.images[:] = 0  # the result is the user's own
    result.dynamic_mask[:] = True
    np.testing.assert_array_equal(clip, moving_square())
    assert not masks.any()


# --- meta


def test_meta_says_everything_that_is_needed_to_repeat_a_run(model, tmp_path):
    weights = write_checkpoint(tmp_path / "dust3r.pth")
    source = write_images(tmp_path / "images", moving_square(2, 67, 101))
    options = {"image_size": 64, "seed": 7, "window": 3, "alignment.iterations": 2}
    scene = Easi3R.from_pretrained(weights).reconstruct(source, **options)
    meta = scene.meta
    assert json.loads(json.dumps(meta, allow_nan=False)) is not None
    assert meta["settings"] == Settings().with_options(options).as_dict() and meta["seed"] == 7
    assert meta["checkpoint"]["name"] == str(weights)
    assert meta["checkpoint"]["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "CC BY-NC-SA" in meta["checkpoint"]["licence"]
    assert meta["versions"]["easi3r"] == easi3r.__version__ and meta["versions"]["torch"] == torch.__version__
    assert meta["versions"]["numpy"] == np.__version__ and meta["versions"]["python"] == platform.python_version()
    assert meta["source"] == str(source) and meta["names"] == ["frame_0.png", "frame_1.png"]
    crop = {"original": (101, 67), "resized": (64, 42), "offset": (0, 5), "size": (64, 32)}
    assert meta["crops"] == [crop, crop]
    assert meta["scale"] == "up to scale" and meta["device"] == "cpu"
    stages = {"frames", "encoder", "pass 1", "pass 2", "flow", "instances", "alignment"}
    assert stages == meta["timings_s"].keys()
    assert all(seconds >= 0 for seconds in meta["timings_s"].values())


def test_meta_is_the_same_after_saving_and_a_motion_has_no_scale(model, tmp_path):
    motion = model.segment(moving_square(), passes=1, **QUICK)
    stages = {"frames", "flow", "encoder", "pass 1", "instances"}
    assert "scale" not in motion.meta and motion.meta["timings_s"].keys() == stages
    loaded = Motion.load(motion.save(tmp_path / "out")).meta
    assert loaded == json.loads(json.dumps(motion.meta))
    assert motion.meta["checkpoint"]["licence"]


def test_the_settings_in_meta_repeat_the_run(model, scene, tmp_path):
    config = tmp_path / "again.yaml"
    config.write_text(json.dumps(scene.meta["settings"]))  # JSON is YAML
    assert_same_arrays(model.reconstruct(moving_square(), config=config), scene)


def test_original_intrinsics_are_those_of_the_source(model):
    large = model.reconstruct(moving_square(2, 96, 128), **QUICK | {"image_size": 64})
    focal = large.intrinsics[0, 0, 0]
    np.testing.assert_allclose(
        large.original_intrinsics[0], [[2 * focal, 0, 63.5], [0, 2 * focal, 47.5], [0, 0, 1]], rtol=1e-6
    )


# --- options


def test_settings_come_from_config_and_keywords_win(model, tmp_path):
    clip = moving_square(6)
    config = tmp_path / "my.yaml"
    config.write_text("frames: {max_frames: 3, image_size: native}\nseed: 4")
    as_object = Settings(frames=FrameSettings(max_frames=3, image_size="native"), seed=4)
    for given in (config, str(config), as_object):
        assert model.segment(clip, config=given).meta["settings"] == as_object.as_dict()
        meta = model.segment(clip, config=given, max_frames=2, **{"motion.clusters": 5}).meta
        assert (len(meta["names"]), meta["settings"]["motion"]["clusters"], meta["seed"]) == (2, 5, 4)
    assert as_object == Settings(frames=FrameSettings(max_frames=3, image_size="native"), seed=4)


def test_unknown_keywords_are_refused_with_the_nearest_right_name(model):
    for act in (model.reconstruct, model.segment):
        with pytest.raises(ConfigError, match=r"^'widnow' is not an option \(did you mean 'window'\?\)\.$"):
            act(moving_square(), widnow=3)
        with pytest.raises(ConfigError, match=r"did you mean 'alignment\.iterations'"):
            act(moving_square(), **{"alignment.iteration": 3})


def test_the_reference_frame_must_exist(model):
    with pytest.raises(ConfigError, match=r"pairs\.reference is 3, but the clip has 3 frames"):
        model.segment(moving_square(), **QUICK, **{"pairs.graph": "reference", "pairs.reference": 3})


@pytest.mark.parametrize("graph", ["window", "complete", "logarithmic", "reference"])
def test_every_graph_gives_a_scene(model, graph):
    assert_contract(model.reconstruct(moving_square(4), **QUICK, **{"pairs.graph": graph}), 4, 48, 64)


@pytest.mark.parametrize(
    "clip",
    [
        np.zeros((2, 48, 64, 3), np.float32),
        np.zeros((48, 64, 3), np.uint8),
        np.zeros((2, 48, 64), np.uint8),
        np.zeros((2, 48, 64, 4), np.uint8),
        np.zeros((0, 48, 64, 3), np.uint8),
        [],
        None,
        7,
    ],
    ids=["float", "one image", "grey", "alpha", "no frame", "no path", "None", "number"],
)
def test_what_is_no_clip_is_refused_in_one_sentence(model, clip):
    with pytest.raises(InputError, match="; expected ") as caught:
        model.segment(clip)
    assert "\n" not in str(caught.value)


def test_frames_smaller_than_a_patch_are_refused(model):
    with pytest.raises(InputError, match="holds no whole patch of 16"):
        model.segment(moving_square()[:, :15], **QUICK)


def test_a_device_that_is_not_there_is_refused(model):
    with pytest.raises(InputError, match="The device 'cuda:99' cannot be used"):
        model.segment(moving_square(), device="cuda:99")
    with pytest.raises(InputError, match="The device 'abacus' cannot be used"):
        Easi3R.from_pretrained("demo", device="abacus")


# --- what is left behind


def hooks_of(network):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")
    return [name for name, module in network.named_modules() for table in tables if getattr(module, table)]


def test_no_hook_stays_on_the_network_even_after_an_error(model, monkeypatch):
    state = {name: value.clone() for name, value in model.network.state_dict().items()}
    model.reconstruct(moving_square(), **QUICK)
    assert hooks_of(model.network) == []

    seen = []

    def break_off(statistics, *_):
        seen.extend(hooks_of(model.network))
        raise KeyboardInterrupt

    monkeypatch.setattr(AttentionStatistics, "update", break_off)
    with pytest.raises(KeyboardInterrupt):
        model.reconstruct(moving_square(), dtype="float32", **QUICK)  # on the network itself, not on a copy of it
    assert seen and hooks_of(model.network) == []
    assert [name for name, value in model.network.state_dict().items() if not torch.equal(value, state[name])] == []


def test_nothing_is_printed_unless_asked_for(model, capfd):
    model.reconstruct(moving_square(), **QUICK)
    assert capfd.readouterr() == ("", "")


def test_progress_names_every_stage(model, monkeypatch):
    labels = []

    def record(items, label):
        labels.append(label)
        return items

    monkeypatch.setattr("easi3r.model.bar", record)
    model.reconstruct(moving_square(), progress=True, **QUICK)
    assert labels == [
        "reading frames",
        "encoding frames",
        "optical flow",
        "epipolar geometry",
        "decoding pairs",
        "decoding pairs, movers cut off",
        "instances",
        "aligning",
    ]
