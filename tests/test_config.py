"""Options by every way that leads to them: keywords, dotted names, text, YAML, flags."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from easi3r import Settings
from easi3r.cli import build_parser
from easi3r.config import (
    OPTIONS,
    ZERO_ALLOWED,
    AlignmentSettings,
    FrameSettings,
    MotionSettings,
    PairSettings,
    convert,
    get_setting,
    load_settings,
    setting_kinds,
)
from easi3r.errors import ConfigError, InputError
from easi3r.model import Easi3R

OTHER_VALUES = {  # one value per setting that is not its default
    "frames.fps": 12.5,
    "frames.stride": 3,
    "frames.start": 1.5,
    "frames.end": 9.0,
    "frames.max_frames": 7,
    "frames.image_size": "native",
    "frames.collection": True,
    "pairs.graph": "complete",
    "pairs.window": 2,
    "pairs.stride": 4,
    "pairs.reference": 1,
    "motion.passes": 1,
    "motion.masks": "none",
    "motion.mask_polarity": "static",
    "motion.clusters": 9,
    "motion.evidence": "flow",
    "motion.reprojection": False,
    "motion.min_motion": 0.02,
    "motion.refine": "sam2",
    "sam2.checkpoint": "facebook/sam2.1-hiera-tiny",
    "sam2.config": "configs/sam2/sam2_hiera_t.yaml",
    "sam2.image_size": 512,
    "sam2.chunk": 8,
    "sam2.offload": True,
    "motion.instances": False,
    "motion.threshold": 0.35,
    "motion.threshold_per": "frame",
    "motion.percentile": 75.0,
    "motion.smoothing": 5,
    "motion.min_area": 0.002,
    "motion.fill_holes": 0.01,
    "flow.method": "raft",
    "flow.weights": "raft_small.pth",
    "flow.max_inconsistency_px": 1.5,
    "heads.points": "head",
    "heads.tracks": "grid:8",
    "known.intrinsics": "exif",
    "known.intrinsics_use": "init",
    "known.intrinsics_weight": 3.0,
    "known.camera_to_world": "poses.txt",
    "known.world_to_camera": "sparse",
    "known.poses_use": "prior",
    "known.poses_weight": 0.5,
    "known.depth": "depth.npy",
    "known.depth_use": "prior",
    "known.depth_weight": 2.5,
    "known.scale_from": "poses",
    "alignment.method": "none",
    "alignment.focal": "per-frame",
    "alignment.principal_point": "solve",
    "alignment.camera": "static",
    "alignment.smoothness_weight": 0.5,
    "alignment.flow_weight": 0.0,
    "alignment.flow_ignore_px": 40.0,
    "alignment.iterations": 17,
    "alignment.learning_rate": 0.02,
    "alignment.final_learning_rate": 2e-4,
    "alignment.flow_start": 0.25,
    "alignment.flow_drop_px": 20.0,
    "pieces.frames": 60,
    "pieces.overlap": 12,
    "keep": "dynamic",
    "seed": 5,
    "device": "cuda:1",
    "dtype": "float32",
    "batch_size": 2,
    "memory": 3.5,
    "offload": True,
}


def read_yaml(folder, text):
    path = folder / "my.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return load_settings(path)


def test_the_table_above_knows_every_setting():
    assert set(OTHER_VALUES) == set(setting_kinds())
    assert [name for name, value in OTHER_VALUES.items() if value == get_setting(Settings(), name)] == []


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_setting_is_reached_by_dotted_name_and_by_text(name):
    value = OTHER_VALUES[name]
    for given in (value, str(value)):
        settings = Settings().with_options({name: given})
        assert get_setting(settings, name) == value and type(get_setting(settings, name)) is type(value)
        changed = [other for other in setting_kinds() if get_setting(settings, other) != get_setting(Settings(), other)]
        assert changed == [name]


def test_every_setting_survives_a_yaml_round_trip(tmp_path):
    settings = Settings().with_options(OTHER_VALUES)
    assert read_yaml(tmp_path, settings.as_dict()) == settings
    assert read_yaml(tmp_path, OTHER_VALUES) == settings  # dotted names at the top level
    assert read_yaml(tmp_path, Settings().as_dict()) == Settings()


def test_short_names_stand_for_their_dotted_names():
    for short, dotted in OPTIONS.items():
        value = OTHER_VALUES[dotted]
        assert Settings().with_options({short: value}) == Settings().with_options({dotted: value})


def test_every_short_option_is_a_flag_with_a_text(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["run", "--help"])
    text = capsys.readouterr().out
    words = {name: "" if setting_kinds()[path] is bool else f" {name.upper()}" for name, path in OPTIONS.items()}
    assert [name for name, word in words.items() if f"--{name.replace('_', '-')}{word}" not in text] == []


def test_every_short_option_is_a_keyword_of_reconstruct_and_segment():
    model = Easi3R.from_pretrained("demo")
    for act in (model.reconstruct, model.segment):
        for name in OPTIONS:
            if name in ("points", "tracks"):  # of VGGT alone, and refused before the clip is read
                continue
            value = "cpu" if name == "device" else OTHER_VALUES[OPTIONS[name]]
            with pytest.raises(InputError, match="does not exist"):  # so the option had been taken
                act("nowhere.mp4", **{"masks": "none", name: value})  # given masks need no SAM 2


# --- conversion


@pytest.mark.parametrize("given, expected", [("false", False), ("No", False), ("true", True), (np.False_, False)])
def test_truth_has_many_spellings(given, expected):
    assert convert(given, bool, "x") is expected
    for wrong in ("maybe", 2):
        with pytest.raises(ConfigError, match="expected true or false"):
            convert(wrong, bool, "x")


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("fps", "7.5", 7.5),
        ("fps", 7, 7.0),
        ("fps", " 7 ", 7.0),
        ("fps", np.float32(7.5), 7.5),
        ("fps", None, None),
        ("fps", "none", None),
        ("fps", "None", None),
        ("max_frames", "none", None),
        ("max_frames", 3.0, 3),
        ("max_frames", np.int64(3), 3),
        ("image_size", "128", 128),
        ("image_size", "native", "native"),
        ("image_size", "Native", "native"),
        ("image_size", None, None),
        ("image_size", "none", None),
        ("passes", "1", 1),
        ("passes", np.int64(1), 1),
        ("align", "none", "none"),
        ("align", "None", "none"),
        ("focal", "per-frame", "per-frame"),
        ("focal", "812.5", 812.5),
        ("alignment.learning_rate", "1e-3", 0.001),
        ("seed", "0", 0),
        ("masks", "none", "none"),
        ("masks", None, None),
        ("masks", Path("folder"), Path("folder")),
    ],
)
def test_values_become_the_type_of_their_setting(name, given, expected):
    start = Settings(  # where nothing has the expected value already
        frames=FrameSettings(fps=1.0, max_frames=1, image_size=1),
        motion=MotionSettings(masks="else"),
        alignment=AlignmentSettings(learning_rate=0.5),
        seed=9,
    )
    value = get_setting(start.with_options({name: given}), OPTIONS.get(name, name))
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "name, given, expected",
    [
        ("fps", "fast", "a number or none"),
        ("fps", True, "a number or none"),
        ("fps", float("nan"), "a number or none"),
        ("fps", float("inf"), "a number or none"),
        ("fps", "inf", "a number or none"),
        ("fps", 10**400, "a number or none"),
        ("fps", "", "a number or none"),
        ("window", None, "a whole number"),
        ("window", 1.5, "a whole number"),
        ("window", "1.5", "a whole number"),
        ("window", True, "a whole number"),
        ("window", [3], "a whole number"),
        ("window", float("nan"), "a whole number"),
        ("image_size", "large", "a whole number, 'native' or none"),
        ("image_size", False, "a whole number, 'native' or none"),
        ("passes", 3, "1 or 2"),
        ("passes", True, "1 or 2"),
        ("align", "quick", "'auto', 'fast', 'published' or 'none'"),
        ("align", "", "'auto', 'fast', 'published' or 'none'"),
        ("pairs.graph", np.arange(9), "'window', 'complete', 'logarithmic' or 'reference'"),
        ("device", None, "text"),
    ],
)
def test_values_of_another_type_are_refused_in_one_line(name, given, expected):
    with pytest.raises(ConfigError) as caught:
        Settings().with_options({name: given})
    message = str(caught.value)
    assert message.startswith(f"{name} is ") and message.endswith(f"; expected {expected}.")
    assert "\n" not in message and len(message) < 250


NUMBERS = [name for name, value in OTHER_VALUES.items() if type(value) in (int, float) and name != "motion.passes"]


@pytest.mark.parametrize("name", NUMBERS)
def test_negative_numbers_are_refused(name):
    bound = "0 or greater" if name in ZERO_ALLOWED else "greater than 0"
    with pytest.raises(ConfigError, match=f"{name} is -1(.0)?, but it must be {bound}"):
        Settings().with_options({name: -1})


@pytest.mark.parametrize("name", [name for name in NUMBERS if name != "frames.end"])
def test_zero_is_refused_where_it_makes_no_sense(name):
    if name in ZERO_ALLOWED:
        assert get_setting(Settings().with_options({name: 0}), name) == 0
    else:
        with pytest.raises(ConfigError, match=f"{name} is 0(.0)?, but it must be greater than 0"):
            Settings().with_options({name: 0})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_settings_built_by_hand_are_checked_too(bad):
    for build in (
        lambda: FrameSettings(fps=bad),
        lambda: AlignmentSettings(learning_rate=bad),
        lambda: AlignmentSettings(flow_weight=bad),
    ):
        group = build()
        name = "frames" if isinstance(group, FrameSettings) else "alignment"
        with pytest.raises(ConfigError, match=name):
            Settings(**{name: group})


def test_end_lies_after_start_whatever_the_order_they_are_given_in():
    with pytest.raises(ConfigError, match=r"frames.end is 3.0 s, but it must lie after frames.start \(5.0 s\)"):
        Settings().with_options({"start": 5, "end": 3})
    early = Settings().with_options({"start": 1, "end": 3})
    for later in ({"start": 10, "end": 20}, {"end": 20, "start": 10}):  # only the outcome counts
        frames = early.with_options(later).frames
        assert (frames.start, frames.end) == (10, 20)


# --- names


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("windw", "window"),
        ("image-size", "image_size"),
        ("maxframes", "max_frames"),
        ("iterations", "alignment.iterations"),
        ("alignment.learningrate", "alignment.learning_rate"),
        ("motion.cluster", "motion.clusters"),
        ("frame.fps", "frames.fps"),
        ("window.stride", "pairs.stride"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_right_one(wrong, right):
    with pytest.raises(ConfigError) as caught:
        Settings().with_options({wrong: 1})
    assert str(caught.value) == f"{wrong!r} is not an option (did you mean {right!r}?)."


def test_names_like_no_option_get_no_guess():
    with pytest.raises(ConfigError, match=r"^'xyzzy' is not an option\.$"):
        Settings().with_options({"xyzzy": 1})


@pytest.mark.parametrize("name", ["frames", "pairs", "motion", "known", "alignment"])
def test_groups_are_not_options(name):
    with pytest.raises(ConfigError, match=f"^'{name}' is a group of options.*{name}\\."):
        Settings().with_options({name: 1})


@pytest.mark.parametrize("name", ["seed.x", "frames.fps.x", "with_options", "__class__", "frames.__doc__", "", "."])
def test_nothing_but_settings_can_be_set(name):
    with pytest.raises(ConfigError, match="is not an option"):
        Settings().with_options({name: 1})


# --- YAML


def test_yaml_takes_groups_and_flat_names_together(tmp_path):
    text = """
    window: 3                # short
    alignment.iterations: 50 # dotted
    frames:                  # nested
      fps: 10
      image_size: native
    pairs: {graph: complete}
    align: none
    flow:                    # a group whose lines are all commented out
    #  method: dis
    """
    expected = Settings(
        frames=FrameSettings(fps=10.0, image_size="native"),
        pairs=PairSettings(graph="complete", window=3),
        alignment=AlignmentSettings(method="none", iterations=50),
    )
    assert read_yaml(tmp_path, text) == expected


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n", "---\n", "{}", "null"])
def test_empty_yaml_changes_nothing(tmp_path, text):
    assert read_yaml(tmp_path, text) == Settings()


@pytest.mark.parametrize(
    "text, reason",
    [
        ("- window", "holds a list"),
        ("word", "holds a str"),
        ("5", "holds a int"),
        ("a: 1\n---\nb: 2", "is not YAML"),
        ("seed: [1", r"is not YAML \(line 1: "),
        ("seed: 1\nwindow: }", r"is not YAML \(line 2: "),
        ("seed: !!python/object/apply:os.mkdir [it_ran]", "is not YAML .*python/object/apply:os.mkdir"),
        ("seed: !!python/name:os.mkdir ''", "is not YAML"),
        ("frames: 5", "'frames' is a group"),
        ("frames: {fsp: 5}", r"'frames.fsp' is not an option \(did you mean 'frames.fps'"),
        ("alignment: {iterations: {a: 1}}", "alignment.iterations is {'a': 1}; expected a whole number"),
        ("5: 6", "'5' is not an option"),
        ("seed: 1_" + "0" * 5000, "my.yaml"),
    ],
)
def test_bad_yaml_is_refused_in_one_line_that_names_the_file(tmp_path, monkeypatch, text, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=reason) as caught:
        read_yaml(tmp_path, text)
    assert str(tmp_path / "my.yaml") in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 + len(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


# --- the object


def test_with_options_does_not_modify():
    settings = Settings()
    before = settings.as_dict()
    changed = settings.with_options({"window": 3, "frames.fps": 5, "seed": 2})
    assert settings.as_dict() == before and changed is not settings and changed != settings
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3


@pytest.mark.parametrize(
    "masks, named",
    [(None, None), ("none", "none"), (Path("some/folder"), "some/folder"), (np.zeros((2, 4, 4), bool), "given")],
    ids=["find", "none", "folder", "array"],
)
def test_as_dict_is_plain_json_and_names_given_masks(masks, named):
    tree = Settings(motion=MotionSettings(masks=masks)).as_dict()
    assert json.loads(json.dumps(tree, allow_nan=False)) == tree
    assert tree["motion"]["masks"] == named
    assert tree["alignment"]["learning_rate"] == 0.01 and tree["seed"] == 0
