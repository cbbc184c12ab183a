"""What users get wrong: exit code, one sentence that helps, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_inputs import (
    QUICK_FLAGS,
    listing,
    moving_square,
    run_cli,
    write_checkpoint,
    write_images,
    write_video,
)

from easi3r import decoding

LOG_LINE = re.compile(r"easi3r: weights: .*; licence: ")


@pytest.fixture
def clip(tmp_path):
    """A folder of images with which nothing is wrong."""
    return write_images(tmp_path / "good", moving_square())


def assert_one_sentence(line, *pieces):
    assert line.startswith("easi3r: ") and line.endswith("."), line
    assert not re.search(r"[.!?] +[A-Z]", line), f"more than one sentence: {line}"
    missing = [piece for piece in pieces if str(piece) not in line]
    assert missing == [], line


def assert_refused(capfd, folder, arguments, *pieces, before_the_weights=True):
    """Exit code 1, one sentence with all ``pieces``, nothing else on the screen, and ``folder`` as it was.

    before_the_weights: not even the log lines about the weights come first.
    """
    before = listing(folder)
    capfd.readouterr()
    code = run_cli(*arguments)
    out, err = capfd.readouterr()  # file descriptors: what C libraries print would be seen too
    assert (code, out) == (1, ""), err
    *log, sentence = err.splitlines()
    assert_one_sentence(sentence, *pieces)
    assert [line for line in log if before_the_weights or not LOG_LINE.match(line)] == []
    assert listing(folder) == before


def assert_wrong_usage(capfd, folder, arguments, *pieces):
    before = listing(folder)
    capfd.readouterr()
    code = run_cli(*arguments)
    out, err = capfd.readouterr()
    assert (code, out) == (2, ""), err
    *usage, message = err.splitlines()
    assert usage[0].startswith("usage: easi3r") and re.match("easi3r( run)?: error: ", message), err
    assert [piece for piece in pieces if piece not in message] == [], message
    assert listing(folder) == before


# --- the input


def no_such_file(folder):
    return folder / "nowhere.mp4", "does not exist"


def empty_folder(folder):
    (folder / "empty").mkdir()
    return folder / "empty", "is empty"


def folder_of_text_files(folder):
    (folder / "texts").mkdir()
    for i in range(3):
        (folder / "texts" / f"note_{i}.txt").write_text("no picture")
    return folder / "texts", "holds no image"


def zero_byte_video(folder):
    (folder / "zero.mp4").touch()
    return folder / "zero.mp4", "0 bytes"


def zero_byte_image(folder):
    images = write_images(folder / "images", moving_square())
    (images / "frame_0.png").write_bytes(b"")
    return images / "frame_0.png", "0 bytes"


def video_cut_before_its_index(folder):
    path = folder / "cut.mp4"  # an MP4 file keeps its index at the end
    pictures = np.random.default_rng(0).bytes(5000)
    path.write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + (90000).to_bytes(4, "big") + b"mdat" + pictures)
    return path, "cannot be opened as a video"


def text_file_called_video(folder):
    (folder / "letter.mp4").write_text("no video")
    return folder / "letter.mp4", "cannot be opened as a video"


def unknown_kind_of_file(folder):
    (folder / "clip.docx").write_bytes(b"PK")
    return folder / "clip.docx", "no image by its name"


@pytest.fixture(params=["av", "opencv"])
def reader(request, monkeypatch):
    """Videos are read by PyAV where it is installed, else by OpenCV."""
    if request.param == "opencv":
        monkeypatch.setattr(decoding, "find_av", lambda: None)
    return request.param


@pytest.mark.parametrize("command", ["run", "segment"])
@pytest.mark.parametrize(
    "make",
    [no_such_file, empty_folder, folder_of_text_files, zero_byte_video, zero_byte_image, unknown_kind_of_file],
    ids=lambda make: make.__name__,
)
def test_unusable_input_is_refused_before_the_weights_are_loaded(tmp_path, capfd, command, make):
    path, reason = make(tmp_path)
    source = path.parent if path.suffix == ".png" else path
    assert_refused(capfd, tmp_path, [command, source, "-o", tmp_path / "out"], path, reason)


@pytest.mark.parametrize("make", [video_cut_before_its_index, text_file_called_video], ids=lambda make: make.__name__)
def test_what_is_no_video_is_refused_before_the_weights_are_loaded(tmp_path, capfd, make, reader):
    path, reason = make(tmp_path)
    assert_refused(capfd, tmp_path, ["run", path, "-o", tmp_path / "out"], path, reason, "give a whole video")


@pytest.mark.parametrize("command", ["run", "segment"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_corrupt_image_among_good_ones(tmp_path, capfd, command, suffix):
    bad = write_images(tmp_path / "images", moving_square(4), suffix) / f"frame_2.{suffix}"
    data = bytearray(bad.read_bytes())
    bad.write_bytes(data[: len(data) // 2])
    arguments = [command, bad.parent, "-o", tmp_path / "out"]
    assert_refused(capfd, tmp_path, arguments, bad, "cannot be read", "replace it", before_the_weights=False)


def test_video_that_breaks_off(tmp_path, capfd, reader):
    path = write_video(tmp_path / "cut.avi", moving_square(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    arguments = ["run", path, "-o", tmp_path / "out"]
    assert_refused(capfd, tmp_path, arguments, path, "frames", "get a whole copy", before_the_weights=False)


@pytest.mark.parametrize("command", ["run", "segment"])
def test_frames_that_change_size_name_the_option_for_collections(tmp_path, capfd, command):
    images = write_images(tmp_path / "images", moving_square(4))
    Image.fromarray(moving_square(1, 64, 48)[0]).save(images / "frame_2.png")
    arguments = [command, images, "-o", tmp_path / "out"]
    pieces = ["frame_2.png", "48 x 64", "64 x 48", "collection"]
    assert_refused(capfd, tmp_path, arguments, *pieces, before_the_weights=False)


# --- the checkpoint


def test_the_checkpoint_that_the_next_tests_spoil_is_good(tmp_path, capfd, clip):
    weights = write_checkpoint(tmp_path / "dust3r.pth")
    assert run_cli("segment", clip, "-o", tmp_path / "out", "--checkpoint", weights) == 0
    assert str(weights) in (tmp_path / "out" / "scene.json").read_text()
    assert "licence: CC BY-NC-SA" in capfd.readouterr().err


def test_checkpoint_of_another_model(tmp_path, capfd, clip):
    weights = tmp_path / "resnet.pth"
    torch.save({"state_dict": {"layer1.weight": torch.zeros(3)}, "epoch": 5}, weights)
    arguments = ["run", clip, "-o", tmp_path / "out", "--checkpoint", weights]
    assert_refused(capfd, tmp_path, arguments, weights, "another model", "state_dict", "expected")


def test_checkpoint_of_another_class(tmp_path, capfd, clip):
    weights = write_checkpoint(tmp_path / "croco.pth", model_class="CroCoNet")
    arguments = ["run", clip, "-o", tmp_path / "out", "--checkpoint", weights]
    assert_refused(capfd, tmp_path, arguments, "another model", "CroCoNet", "expected AsymmetricCroCo3DStereo")


def test_checkpoint_with_missing_tensors_names_them(tmp_path, capfd, clip):
    weights = write_checkpoint(tmp_path / "w.pth", without=("dec_norm.weight", "enc_blocks.1.attn.qkv.bias"))
    arguments = ["run", clip, "-o", tmp_path / "out", "--checkpoint", weights]
    assert_refused(capfd, tmp_path, arguments, weights, "dec_norm.weight", "enc_blocks.1.attn.qkv.bias")


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("layout", ["torch zip", "torch legacy", "plain pickle"])
def test_checkpoint_that_would_run_code_does_not(tmp_path, capfd, clip, layout):
    weights, mark = tmp_path / "evil.pth", tmp_path / "it_ran"
    content = {"args": Attack(mark), "model": {}}
    if layout == "plain pickle":
        weights.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, weights, _use_new_zipfile_serialization=layout == "torch zip")
    arguments = ["run", clip, "-o", tmp_path / "out", "--checkpoint", weights]
    assert_refused(capfd, tmp_path, arguments, weights, "expected")
    assert not mark.exists()
    pickle.loads(pickle.dumps(content))  # noqa: S301 - the attack itself works
    assert mark.exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + bytes(100)], ids=["empty", "text", "broken zip"])
def test_file_that_is_no_checkpoint(tmp_path, capfd, clip, content):
    weights = tmp_path / "w.pth"
    weights.write_bytes(content)
    arguments = ["run", clip, "-o", tmp_path / "out", "--checkpoint", weights]
    assert_refused(capfd, tmp_path, arguments, weights, "expected a")


def test_checkpoint_that_is_not_there(tmp_path, capfd, clip):
    arguments = ["run", clip, "-o", tmp_path / "out", "--checkpoint", tmp_path / "nowhere.pth"]
    assert_refused(capfd, tmp_path, arguments, tmp_path / "nowhere.pth", "There is no checkpoint", "expected a .pth")


# --- the output


def test_output_below_a_file(tmp_path, capfd, clip):
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "deep" / "out"
    assert_refused(capfd, tmp_path, ["run", clip, "-o", out], out, "is a file; expected a folder")


def test_output_that_exists(tmp_path, capfd, clip):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("two years of work")
    assert_refused(capfd, tmp_path, ["run", clip, "-o", out], out, "exists", "--overwrite")
    assert_refused(capfd, tmp_path, ["run", clip, "-o", out, "--overwrite"], out, "scene.json", "remove it first")
    assert (out / "thesis.tex").read_text() == "two years of work"


def test_output_name_that_is_too_long(tmp_path, capfd, clip):
    assert_refused(capfd, tmp_path, ["run", clip, "-o", tmp_path / ("x" * 300)], "cannot be written", "too long")


def test_demo_does_not_replace_a_folder_either(tmp_path, capfd):
    assert_refused(capfd, tmp_path, ["demo", "-o", tmp_path], tmp_path, "exists", "--overwrite")


# --- the options


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("widnow: 3", ["'widnow' is not an option", "did you mean 'window'?"]),
        ("alignment: {iteration: 3}", ["'alignment.iteration'", "did you mean 'alignment.iterations'?"]),
        ("window: lots", ["window is 'lots'", "expected a whole number"]),
        ("align: quick", ["align is 'quick'", "expected 'auto', 'fast', 'published' or 'none'"]),
        ("stride: 0", ["frames.stride is 0", "greater than 0"]),
        ("frames: {start: 5, end: 3}", ["frames.end is 3", "after frames.start (5"]),
        ("pairs: {window: [1, 2", ["is not YAML", "line 1"]),
        ("- window\n- stride", ["holds a list", "expected 'name: value' lines"]),
        ("just words", ["holds a str", "expected 'name: value' lines"]),
        ("seed: !!python/object/apply:os.mkdir [it_ran]", ["is not YAML", "line 1"]),
        ("start: 2020-13-45", ["is not YAML", "month"]),
        ("a: " + "[" * 500, ["is not YAML"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_bad_configuration_file(tmp_path, capfd, monkeypatch, clip, text, pieces):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "my.yaml"
    config.write_text(text)
    assert_refused(capfd, tmp_path, ["run", clip, "-o", tmp_path / "out", "--config", config], config, *pieces)


def test_configuration_file_that_cannot_be_read(tmp_path, capfd, clip):
    for config in (tmp_path / "nowhere.yaml", clip):
        assert_refused(capfd, tmp_path, ["run", clip, "-o", tmp_path / "out", "--config", config], config, "read")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00\x81")
    assert_refused(capfd, tmp_path, ["run", clip, "-o", tmp_path / "out", "--config", binary], binary, "not YAML")


@pytest.mark.parametrize(
    "flags, pieces",
    [
        (["--widnow", "3"], ["--widnow", "did you mean '--window'?"]),
        (["--image_size", "64"], ["--image_size", "did you mean '--image-size'?"]),
        (["--checkpont=x"], ["--checkpont", "did you mean '--checkpoint'?"]),
        (["another.mp4", "--stirde", "2"], ["did you mean '--stride'?"]),
        (["--set", "alignment.iteration=5"], ["'alignment.iteration'", "did you mean 'alignment.iterations'?"]),
        (["--set", "alignment=5"], ["'alignment' is a group", "alignment.iterations"]),
        (["--set", "window"], ["name=value", "'window'"]),
        (["--fps", "fast"], ["fps is 'fast'", "expected a number or none"]),
        (["--fps", "nan"], ["fps is 'nan'"]),
        (["--fps", "-3"], ["frames.fps is -3.0", "greater than 0"]),
        (["--passes", "3"], ["passes is '3'", "expected 1 or 2"]),
        (["--image-size", "big"], ["image_size is 'big'", "expected a whole number, 'native' or none"]),
        (["--align", "publish"], ["align is 'publish'", "'published' or 'none'"]),
        (["--set", "motion.clusters=1.5"], ["motion.clusters is '1.5'", "a whole number"]),
        (["--fps"], ["--fps", "expected one argument"]),
    ],
    ids=lambda value: " ".join(value)[:30],
)
def test_wrong_usage_is_exit_code_2_and_names_the_right_option(tmp_path, capfd, clip, flags, pieces):
    assert_wrong_usage(capfd, tmp_path, ["run", clip, "-o", tmp_path / "out", *flags], *pieces)


def test_missing_arguments_and_unknown_commands_are_wrong_usage(tmp_path, capfd, clip):
    for arguments, piece in (([], "COMMAND"), (["rnu", clip], "'rnu'"), (["run", clip], "-o/--output")):
        before = listing(tmp_path)
        assert run_cli(*arguments) == 2
        assert piece in capfd.readouterr().err.splitlines()[-1]
        assert listing(tmp_path) == before


@pytest.mark.parametrize("device", ["cuda", "cuda:99", "gpu", "cpu:one"])
def test_device_that_is_not_there(tmp_path, capfd, clip, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    arguments = ["run", clip, "-o", tmp_path / "out", "--device", device]
    assert_refused(capfd, tmp_path, arguments, f"The device {device!r} cannot be used", "expected auto, cpu, cuda")


# --- given masks


def write_masks(folder, num=3, size=(64, 48), value=255):
    folder.mkdir()
    for i in range(num):
        Image.fromarray(np.full(size[::-1], value, np.uint8)).save(folder / f"mask_{i}.png")
    return folder


@pytest.mark.parametrize(
    "spoil, pieces",
    [
        ({"num": 2}, ["2 masks", "3 frames", "one mask per frame"]),
        ({"num": 0}, ["holds no PNG file"]),
        ({"size": (32, 48)}, ["32x48", "64x48"]),
        ({"value": 1}, ["Mask 0", "values 1", "0 and 255"]),
        ({"value": 128}, ["Mask 0", "values 128", "0 and 255"]),
    ],
    ids=["too few", "none", "another size", "zeros and ones", "grey"],
)
def test_folder_of_masks_that_does_not_fit(tmp_path, capfd, clip, spoil, pieces):
    masks = write_masks(tmp_path / "masks", **spoil)
    arguments = ["run", clip, "-o", tmp_path / "out", "--masks", masks, *QUICK_FLAGS]
    assert_refused(capfd, tmp_path, arguments, *pieces, before_the_weights=False)


def test_folder_of_masks_with_a_broken_file(tmp_path, capfd, clip):
    bad = write_masks(tmp_path / "masks") / "mask_1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    arguments = ["run", clip, "-o", tmp_path / "out", "--masks", bad.parent, *QUICK_FLAGS]
    assert_refused(capfd, tmp_path, arguments, bad, before_the_weights=False)


def test_folder_of_masks_that_is_not_there(tmp_path, capfd, clip):
    arguments = ["segment", clip, "-o", tmp_path / "out", "--masks", "nowhere", *QUICK_FLAGS]
    assert_refused(capfd, tmp_path, arguments, "'nowhere'", "a folder of PNG files", before_the_weights=False)


# --- as a program of its own


def start(module, *arguments):
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["easi3r", "easi3r.cli"])
def test_the_program_ends_with_the_exit_code_and_one_line(tmp_path, module):
    done = start(module, "run", tmp_path / "nowhere.mp4", "-o", tmp_path / "out")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert_one_sentence(done.stderr.strip(), tmp_path / "nowhere.mp4")
    assert start(module, "run", "x", "-o", tmp_path / "out", "--sed", "1").returncode == 2
    assert listing(tmp_path) == []


def test_the_program_prints_no_traceback_and_no_chatter_of_libraries(tmp_path):
    path = write_video(tmp_path / "cut.avi", moving_square(20))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done = start("easi3r", "run", path, "-o", tmp_path / "out", "--quiet")
    (sentence,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert_one_sentence(sentence, path)
    assert listing(tmp_path) == ["cut.avi"]


def test_file_names_that_break_lines_still_give_one_line(tmp_path, capfd):
    assert_refused(capfd, tmp_path, ["run", tmp_path / "two\nlines.mp4", "-o", tmp_path / "out"], "two lines.mp4")


def test_file_names_that_are_not_utf8_are_shown_and_written(tmp_path, capfd, clip):
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out_\xff"))
    assert run_cli("segment", clip, "-o", out, *QUICK_FLAGS) == 0
    assert "out_\\udcff" in capfd.readouterr().out
    assert (out / "scene.json").is_file()
