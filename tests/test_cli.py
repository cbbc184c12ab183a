"""The command line as people use it: folders that are whole, words that help, exit codes that are true."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
import types
import warnings

import imageio.v3 as iio
import numpy as np
import pytest
from small_inputs import QUICK, QUICK_FLAGS, listing, moving_square, run_cli, write_images, write_video

import easi3r
from easi3r import Easi3R, Motion, Scene, cli, doctor, job, pipeline, progress
from easi3r.config import OPTIONS
from easi3r.demo.clip import FPS, geometry_errors
from easi3r.demo.rendering import render
from easi3r.demo.worlds import make_world
from easi3r.metrics import jaccard

COMMANDS = ("run", "segment", "batch", "show", "export", "demo", "doctor")
SCENE = {"scene.json", "trajectory.txt", "cameras.npz", "attention.npz", "depth", "confidence", "dynamic_mask"}
SCENE |= {"dynamic_score", "images", "instances", "report.html"}
MOTION = {"scene.json", "attention.npz", "timestamps.npz", "dynamic_mask", "dynamic_score", "images", "report.html"}
MOTION |= {"instances"}


@pytest.fixture
def clip(tmp_path):
    return write_images(tmp_path / "clip", moving_square())


def settings_of(folder):
    return json.loads((folder / "scene.json").read_text())["meta"]["settings"]


# --- run and segment


@pytest.mark.parametrize("command, kind, entries", [("run", Scene, SCENE), ("segment", Motion, MOTION)])
def test_a_folder_of_images_becomes_a_whole_folder(tmp_path, capfd, clip, command, kind, entries):
    out = tmp_path / "made" / "out"
    assert run_cli(command, clip, "-o", out, *QUICK_FLAGS) == 0
    assert {path.name for path in out.iterdir()} == entries
    assert [name for name in listing(tmp_path) if "/." in f"/{name}"] == []  # no hidden rest
    result = kind.load(out)
    screen = capfd.readouterr()
    assert "3 frames of 64x48 pixels" in screen.out and str(out) in screen.out
    assert f"{result.dynamic_mask.mean():.1%} of the pixels move" in screen.out
    assert ("cameras and depth are up to scale" in screen.out) == (kind is Scene)
    assert "licence: " in screen.err


def test_the_command_line_gives_what_python_gives(tmp_path, clip):
    assert run_cli("run", clip, "-o", tmp_path / "out", *QUICK_FLAGS, "--passes", "1") == 0
    loaded, scene = Scene.load(tmp_path / "out"), Easi3R.from_pretrained("demo").reconstruct(clip, passes=1, **QUICK)
    for name in ("images", "depth", "confidence", "camera_to_world", "intrinsics", "dynamic_mask", "timestamps"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(scene, name), strict=True)


def test_a_video_is_taken_as_the_flags_say(tmp_path):
    video = write_video(tmp_path / "clip.avi", moving_square(10))
    flags = ["--start", "0.2", "--end", "0.8", "--stride", "2", "--max-frames", "2"]
    assert run_cli("segment", video, "-o", tmp_path / "out", *flags, *QUICK_FLAGS) == 0
    np.testing.assert_allclose(Motion.load(tmp_path / "out").timestamps, [0.2, 0.4], atol=1e-6)


@pytest.mark.parametrize("command", ["run", "segment"])
def test_quiet_prints_warnings_and_nothing_else(tmp_path, capfd, clip, command, monkeypatch):
    seen = []
    for name in ("reconstruct", "segment"):
        act = getattr(Easi3R, name)
        monkeypatch.setattr(
            Easi3R, name, lambda *a, act=act, **options: seen.append(options["progress"]) or act(*a, **options)
        )
    assert run_cli(command, clip, "-o", tmp_path / "out", "--quiet", *QUICK_FLAGS) == 0
    screen = capfd.readouterr()
    assert screen.out == ""
    assert screen.err == ""
    assert run_cli(command, clip, "-o", tmp_path / "out", "--overwrite", *QUICK_FLAGS) == 0
    assert seen == [False, True]  # bars


def test_overwrite_replaces_an_earlier_result(tmp_path, capfd, clip):
    out = tmp_path / "out"
    assert run_cli("run", clip, "-o", out, *QUICK_FLAGS) == 0
    (out / "report.html").touch()
    assert run_cli("segment", clip, "-o", out, *QUICK_FLAGS) == 1
    assert "--overwrite" in capfd.readouterr().err
    assert Scene.load(out).num_frames == 3
    assert run_cli("segment", clip, "-o", out, "--overwrite", "--max-frames", "2", *QUICK_FLAGS) == 0
    assert Motion.load(out).num_frames == 2
    assert {path.name for path in out.iterdir()} == MOTION


def test_flags_win_over_set_which_wins_over_the_file_which_wins_over_defaults(tmp_path, clip):
    config = tmp_path / "my.yaml"
    config.write_text("seed: 1\nwindow: 2\npairs: {stride: 3}\nmotion: {clusters: 5, passes: 1}\n")
    flags = ["--config", config, "--set", "window=3", "--set", "pairs.stride=4", "--window", "4", "--passes", "2"]
    assert run_cli("segment", clip, "-o", tmp_path / "out", *flags, *QUICK_FLAGS) == 0
    settings = settings_of(tmp_path / "out")
    assert settings["seed"] == 1 and settings["motion"]["clusters"] == 5  # the file
    assert settings["pairs"]["stride"] == 4  # --set
    assert settings["pairs"]["window"] == 4 and settings["motion"]["passes"] == 2  # flags
    assert settings["pairs"]["graph"] == "window"  # default


def test_every_option_arrives_through_its_flag(tmp_path, clip, monkeypatch):
    masks = write_images(tmp_path / "masks", np.zeros((3, 48, 64), np.uint8))
    poses, depth = tmp_path / "poses.npy", tmp_path / "depth.npy"
    np.save(poses, np.stack([np.eye(4), np.eye(4) + 0.1 * np.eye(4, k=3)]))
    np.save(depth, np.full((2, 48, 64), 2.0))
    values = {
        "fps": 2.0,
        "stride": 1,
        "start": 0.5,
        "end": 9.0,
        "max_frames": 2,
        "image_size": 64,
        "window": 3,
        "passes": 1,
        "mask_polarity": "static",
        "evidence": "attention",
        "collection": False,
        "refine": "sam2",  # which leaves given masks alone
        "threshold": "otsu",
        "clusters": 32,
        "smoothing": 3,
        "min_area": 0.01,
        "fill_holes": 0.02,
        "instances": False,
        "keep": "all",
        "points": "depth",
        "masks": str(masks),
        "intrinsics": "60",
        "camera_to_world": str(poses),
        "depth": str(depth),
        "scale_from": "depth",
        "flow": "dis",
        "align": "fast",
        "focal": "per-frame",
        "camera": "moving",
        "seed": 3,
        "device": "cpu",
        "dtype": "float32",
        "batch_size": 3,
        "memory": 8.0,
    }
    assert values.keys() == OPTIONS.keys() - {
        "world_to_camera",
        "tracks",
    }  # poses are given one way; tracks are not DUSt3R's
    (masks / "frame_2.png").unlink()  # one mask per frame that is taken
    flags = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    assert run_cli("run", clip, "-o", tmp_path / "out", *flags) == 0
    settings = settings_of(tmp_path / "out")
    for name, value in values.items():
        group, _, key = OPTIONS[name].rpartition(".")
        assert (settings[group] if group else settings)[key] == value


# --- words


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_exits_with_0_and_names_every_flag(capsys, command):
    assert run_cli(*([command] if command else []), "--help") == 0
    screen = capsys.readouterr()
    assert screen.err == "" and screen.out.startswith(f"usage: easi3r{f' {command}' if command else ''} ")
    parsers = cli.build_parser()._subparsers._group_actions[0].choices
    if command is None:
        expected = [*COMMANDS, "--version"]
        assert parsers.keys() == set(COMMANDS)
    else:
        expected = [flag for action in parsers[command]._actions for flag in action.option_strings]
        assert "--quiet" in expected
        unexplained = [action.dest for action in parsers[command]._actions if not action.help]
        assert unexplained == []
    assert [word for word in expected if word not in screen.out] == []


def test_version(capsys):
    assert run_cli("--version") == 0
    assert capsys.readouterr().out == f"easi3r {easi3r.__version__}\n"


def test_what_libraries_warn_of_is_not_shown_to_users(tmp_path, capfd, clip, monkeypatch):
    def describe(*arguments, describe=pipeline.describe):
        warnings.warn("some argument of some function will change its name", FutureWarning, stacklevel=1)
        return describe(*arguments)

    monkeypatch.setattr(pipeline, "describe", describe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_cli("segment", clip, "-o", tmp_path / "out", *QUICK_FLAGS) == 0
    assert "some argument" not in capfd.readouterr().err


def test_the_logger_is_left_as_it_was(tmp_path, clip, monkeypatch):
    logger = logging.getLogger("easi3r")
    monkeypatch.setattr(logger, "level", logging.CRITICAL)
    before = list(logger.handlers), logger.level
    run_cli("segment", clip, "-o", tmp_path / "out", "--quiet", *QUICK_FLAGS)
    run_cli("segment", "nowhere", "-o", tmp_path / "out")
    assert (list(logger.handlers), logger.level) == before


def test_a_bar_appears_after_two_seconds_and_not_before(capsys):
    assert list(progress.bar(range(50), "short work")) == list(range(50))
    assert capsys.readouterr().err == ""
    for _ in progress.bar(range(3), "long work"):
        time.sleep(1.05)
    assert "long work" in capsys.readouterr().err


# --- doctor


def test_doctor_lists_versions_device_and_extras(capsys):
    assert run_cli("doctor") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"easi3r {easi3r.__version__}, Python {sys.version.split()[0]}")
    expected = [f"  {name} {module_version}" for name, module_version in (("numpy", np.__version__),)]
    expected += ["torch ", "opencv-python ", "pyyaml ", "  hub: ", "  video: ", "device:", "  cpu: "]
    assert [word for word in expected if word not in text] == []
    assert "missing" not in text.partition("extras:")[0]


def test_doctor_says_what_is_missing_and_how_to_get_it(capsys, monkeypatch):
    for name in ("av", "huggingface_hub", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)  # import raises ModuleNotFoundError
    assert run_cli("doctor") == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "av: missing; pip install 'easi3r[video]'" in lines
    assert "huggingface_hub: missing; pip install 'easi3r[hub]'" in lines
    assert "tqdm: missing; pip install tqdm" in lines


@pytest.mark.parametrize(
    "error, expected",
    [
        (ImportError("libGL.so.1: cannot open shared object file\nmore"), ["libGL.so.1", "apt install libgl1"]),
        (RuntimeError("operator torchvision::nms does not exist"), ["RuntimeError: operator torchvision::nms"]),
        (ModuleNotFoundError("No module named 'bz2'", name="bz2"), ["No module named 'bz2'"]),
        (OSError(), ["OSError"]),
    ],
    ids=["libGL", "RuntimeError", "its own dependency", "no text"],
)
def test_doctor_says_why_what_is_installed_cannot_be_imported(capsys, monkeypatch, error, expected):
    def import_module(name):
        if name == "cv2":
            raise error
        return types.ModuleType(name)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    assert run_cli("doctor") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "opencv-python" in line]
    assert "opencv-python: installed, but cannot be imported (" in line
    assert [words for words in expected if words not in line] == []


def test_doctor_works_without_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_cli("doctor") == 0
    text = capsys.readouterr().out
    assert "torch: missing; pip install torch" in text and "unknown: torch cannot be imported" in text


# --- demo


@pytest.fixture
def small_clip(monkeypatch):
    clip = render(make_world(0, num_frames=2))
    monkeypatch.setattr("easi3r.demo.clip.demo_clip", lambda: clip)
    return clip


def test_the_demo_measures_itself_against_the_truth(tmp_path, capfd, small_clip):
    assert run_cli("demo", "-o", tmp_path / "out") == 0
    screen = capfd.readouterr()
    scene = Scene.load(tmp_path / "out")
    found = geometry_errors(scene, small_clip)
    mask_j = jaccard(scene.dynamic_mask, small_clip.dynamic_mask).mean()
    assert f"J {mask_j:.2f}" in screen.out and f"ATE {found.ate_percent:.1f} %" in screen.out
    assert f"depth   {found.depth_abs_rel_percent:.1f} %" in screen.out
    assert f"wrote {tmp_path / 'out'}" in screen.out and "overview.png" in screen.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == SCENE | {"overview.png"}
    assert iio.imread(tmp_path / "out" / "overview.png").shape == (5 * 2 * 96, 4 * 2 * 128, 3)
    assert settings_of(tmp_path / "out") == easi3r.Settings().with_options({"fps": FPS}).as_dict()
    assert run_cli("demo", "-o", tmp_path / "quiet", "--quiet") == 0
    assert capfd.readouterr().out == ""


def test_the_truth_compared_with_itself_is_perfect(small_clip):
    truth = types.SimpleNamespace(
        camera_to_world=small_clip.camera_to_world,
        depth=2 * small_clip.depth,  # up to one scale
        intrinsics=small_clip.intrinsics,
    )
    truth.camera_to_world = truth.camera_to_world.copy()
    truth.camera_to_world[:, :3, 3] *= 2
    found = geometry_errors(truth, small_clip)
    assert found.ate_percent < 1e-6 and found.focal_percent < 1e-9
    assert found.depth_abs_rel_percent < 1e-4 and found.depth_abs_rel_percent_moving < 1e-4


def test_the_demos_clip_is_the_same_every_time_and_has_truth():
    from easi3r.demo.clip import demo_clip

    clip = demo_clip()
    assert clip.images.shape == (12, 96, 128, 3) and clip.dynamic_mask.any()
    np.testing.assert_array_equal(clip.images, demo_clip().images)


@pytest.mark.slow
def test_the_demo_as_it_is(tmp_path):
    assert run_cli("demo", "-o", tmp_path / "out") == 0
    assert Scene.load(tmp_path / "out").images.shape == (12, 96, 128, 3)


# --- interruptions


@pytest.mark.parametrize(
    "owner, name", [(job, "align"), (Scene, "trajectory")], ids=["while aligning", "while writing"]
)
def test_an_interruption_is_130_and_leaves_nothing(tmp_path, capfd, clip, monkeypatch, owner, name):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupt)
    before = listing(tmp_path)
    assert run_cli("run", clip, "-o", tmp_path / "a" / "out", *QUICK_FLAGS) == 130
    assert capfd.readouterr().err.splitlines()[-1] == "easi3r: interrupted; nothing was written"
    assert listing(tmp_path) == before


def test_an_interruption_while_overwriting_keeps_the_old_result(tmp_path, clip, monkeypatch):
    assert run_cli("run", clip, "-o", tmp_path / "out", *QUICK_FLAGS) == 0
    before = listing(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Scene, "trajectory", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_cli("run", clip, "-o", tmp_path / "out", "--overwrite", "--seed", "9", *QUICK_FLAGS) == 130
    assert listing(tmp_path) == before and settings_of(tmp_path / "out")["seed"] == 0


@pytest.mark.slow
def test_control_c_in_the_middle_of_the_work(tmp_path, clip):
    command = [
        sys.executable,
        "-m",
        "easi3r",
        "run",
        clip,
        "-o",
        tmp_path / "out",
        "--set",
        "alignment.iterations=100000",
    ]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as process:
        while "aligning" not in process.stderr.read(40):
            pass
        os.kill(process.pid, signal.SIGINT)
        rest = process.stderr.read()
    assert process.returncode == 130 and rest.splitlines()[-1].endswith("easi3r: interrupted; nothing was written")
    assert "Traceback" not in rest and [path.name for path in tmp_path.iterdir()] == ["clip"]
