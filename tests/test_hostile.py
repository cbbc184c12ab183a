"""Inputs made to harm end as inputs that are merely wrong do: exit code 1, one sentence, nothing left behind."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hostile_inputs import HOSTILE, Ground
from PIL import Image
from small_inputs import QUICK_FLAGS, moving_square, run_cli, write_checkpoint, write_images, write_video
from test_bad_input import assert_refused
from test_scene import make_scene

import easi3r
import evaluation
import hooks
from easi3r import Scene, cli, decoding, untrusted
from easi3r.array_files import read_npy, read_npz
from easi3r.config import FrameSettings
from easi3r.errors import InputError
from easi3r.frames import read_frames
from easi3r.viewer.live import Viewer

PACKAGES = [Path(package.__file__).parent for package in (easi3r, hooks, evaluation)]


@pytest.fixture(scope="module")
def goods(tmp_path_factory):
    folder = tmp_path_factory.mktemp("goods")
    write_checkpoint(folder / "good.pth")
    make_scene().save(folder / "scene")
    write_images(folder / "good", moving_square())
    return folder


@pytest.fixture
def ground(tmp_path, goods):
    for name in ("scene", "good"):
        shutil.copytree(goods / name, tmp_path / name)
    return Ground(tmp_path, tmp_path / "good", goods / "good.pth", tmp_path / "scene")


def test_there_are_forty_at_least():
    assert len(HOSTILE) >= 40


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_input_is_one_sentence_and_leaves_nothing(ground, capfd, name):
    arguments, pieces = HOSTILE[name](ground)
    assert_refused(capfd, ground.folder, arguments, *pieces, before_the_weights=False)


def test_the_ground_itself_is_good(ground):
    assert run_cli("segment", ground.clip, "-o", ground.folder / "out", "--checkpoint", ground.weights) == 0
    assert run_cli("show", ground.scene, "--html", ground.folder / "page.html") == 0


@pytest.mark.parametrize(
    "name", ["list of other files called video", "playlist called video", "video of 65535 x 65535"]
)
def test_opencv_refuses_them_too(ground, capfd, name, monkeypatch):
    monkeypatch.setattr(decoding, "find_av", lambda: None)
    arguments, pieces = HOSTILE[name](ground)
    before = dict(os.environ)
    assert_refused(capfd, ground.folder, arguments, *pieces, before_the_weights=False)
    assert {k: v for k, v in os.environ.items() if "CAPTURE" in k} == {
        k: v for k, v in before.items() if "CAPTURE" in k
    }


@pytest.mark.parametrize("reader", ["av", "opencv"])
def test_a_video_beyond_the_limit_is_refused_before_it_is_decoded(ground, capfd, monkeypatch, reader):
    if reader == "opencv":
        monkeypatch.setattr(decoding, "find_av", lambda: None)
    monkeypatch.setattr(untrusted, "MAX_PIXELS", 64 * 48 - 1)
    arguments = ["run", write_video(ground.folder / "a.avi", moving_square()), "-o", ground.folder / "out"]
    assert_refused(capfd, ground.folder, arguments, "a.avi", "64 x 48 px is beyond the limit")


def test_opencv_is_not_given_names_that_end_the_program(ground, capfd, monkeypatch):
    monkeypatch.setattr(decoding, "find_av", lambda: None)
    path = Path(os.fsdecode(os.fsencode(ground.folder) + b"/a\xff.avi"))
    write_video(ground.folder / "a.avi", moving_square()).rename(path)
    arguments = ["run", path, "-o", ground.folder / "out"]
    assert_refused(capfd, ground.folder, arguments, "a\\udcff.avi", "not UTF-8", "easi3r[video]")


# --- links


def test_links_within_the_folder_and_to_it_are_followed(tmp_path):
    images = write_images(tmp_path / "images", moving_square(2))
    (images / "frame_2.png").symlink_to("frame_0.png")
    (tmp_path / "named").symlink_to("images")
    frames = read_frames(tmp_path / "named", FrameSettings(image_size="native"), patch_size=16, trained_size=64)
    np.testing.assert_array_equal(frames.images[2], frames.images[0])


def test_files_that_are_named_themselves_may_be_links(tmp_path):
    image = write_images(tmp_path / "images", moving_square(1)) / "frame_0.png"
    (tmp_path / "link.png").symlink_to(image)
    paths = [tmp_path / "link.png"]
    assert read_frames(paths, FrameSettings(image_size="native"), patch_size=16, trained_size=64).num_frames == 1


def test_a_saved_scene_may_be_reached_by_a_link_and_hold_links_within(tmp_path):
    scene = make_scene()
    out = scene.save(tmp_path / "out")
    (tmp_path / "latest").symlink_to("out")
    (out / "depth").rename(out / "z")
    (out / "depth").symlink_to("z")
    np.testing.assert_array_equal(Scene.load(tmp_path / "latest").depth, scene.depth)


# --- names of files


NAMES = [
    b"with spaces",
    b"quotes ' and \"",
    b"two\nlines",
    b"no \xff utf-8 \x80",
    b"<b>&amp;",
    b"-o",
    b"%d",
    b"$(touch x)",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_any_name_goes_through_everything(tmp_path, goods, capfd, name):
    base = os.fsencode(tmp_path) + b"/"
    images, out = Path(os.fsdecode(base + b"in " + name)), Path(os.fsdecode(base + b"out " + name))
    for i, frame in enumerate(moving_square()):
        images.mkdir(exist_ok=True)
        Image.fromarray(frame).save(images / os.fsdecode(b"%d " % i + name.replace(b"/", b"") + b".png"))
    assert run_cli("run", images, "-o", out, "--checkpoint", goods / "good.pth", *QUICK_FLAGS) == 0
    assert run_cli("show", out, "--html", out / "page.html") == 0
    formats = "colmap,nerfstudio,ply,glb,npz,tum,monst3r,depth-png"
    assert run_cli("export", out, "--to", formats, "--original-images") == 0
    scene = Scene.load(out)
    assert scene.meta["source"] == str(images) and scene.meta["names"][0] == "0 " + os.fsdecode(name) + ".png"
    page = (out / "report.html").read_text("utf-8")
    assert "<b>&amp;" not in page.split("<body>")[1] or name != b"<b>&amp;"
    shown = capfd.readouterr()
    assert "Traceback" not in shown.err and not (tmp_path / "x").exists()


def test_what_terminals_obey_is_not_printed():
    assert cli.on_one_line("a\x1b[31m\nb\udcff\u202e ü 文") == "a\\x1b[31m b\\udcff\\u202e ü 文"


# --- arrays


def test_arrays_come_back_as_numpy_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    for i, array in enumerate(
        [rng.random((3, 4)), np.asfortranarray(rng.random((3, 4))), np.zeros((0, 5)), np.array(3)]
    ):
        np.save(tmp_path / f"{i}.npy", array)
        np.testing.assert_array_equal(read_npy(tmp_path / f"{i}.npy"), array, strict=True)
        for write in (np.savez, np.savez_compressed):
            write(tmp_path / "a.npz", a=array, b=array > 0)
            read = read_npz(tmp_path / "a.npz", ["a", "b", "c"])
            assert list(read) == ["a", "b"]
            np.testing.assert_array_equal(read["a"], array, strict=True)
            np.testing.assert_array_equal(read["b"], array > 0, strict=True)


def test_depth_may_be_as_large_as_its_frames(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", a=np.zeros(1000))
    assert read_npz(tmp_path / "a.npz", ["a"], most_bytes=8000)["a"].shape == (1000,)
    with pytest.raises(ValueError, match="more than the 0 MiB that can be right"):
        read_npz(tmp_path / "a.npz", ["a"], most_bytes=7999)


# --- frames that grow


def test_an_image_size_that_fills_the_memory_is_refused(tmp_path):
    images = write_images(tmp_path / "images", moving_square(1))
    with pytest.raises(InputError, match="choose a smaller image_size, at most 134 million pixels"):
        read_frames(images, FrameSettings(image_size=1_000_000), patch_size=16, trained_size=64)


# --- the package itself


FORBIDDEN = {  # whole names as they are called
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *("os.system", "os.popen", "os.startfile", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "np.load", "iio.imread", "imageio.imread"),
}
ALLOWED = {  # what a file may do that others may not, and why
    ("evaluation/datasets/dycheck.py", "np.load"),  # with allow_pickle=False, seen below
    ("easi3r/batches/local.py", "pickle.load"),  # from the pipe of a process that it has started itself
    ("easi3r/batches/process.py", "pickle.load"),  # from the pipe of the process that has started it
}


def calls():
    for package in PACKAGES:
        for file in sorted(package.rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    yield str(file.relative_to(package.parent)), ast.unparse(node.func), options, node


def test_no_shell_is_called_and_nothing_is_evaluated():
    found = list(calls())
    assert len(found) > 3000, "the package was not found"
    names = {
        (file, name) for file, name, _, _ in found if name in FORBIDDEN or name.startswith(("os.exec", "os.spawn"))
    }
    assert names - ALLOWED == set()
    for file, name, options, node in found:
        assert "shell" not in options, (file, name)
        if name.startswith("subprocess."):
            assert not isinstance(node.args[0], (ast.Constant, ast.JoinedStr)), f"{file}: a list, not a line of shell"
        if name == "torch.load":
            assert options.get("weights_only") == "True", file
        if name == "yaml.load":
            assert options.get("Loader") == "_PlainLoader", file
        if name == "np.load":
            assert options.get("allow_pickle") == "False", file
        if name == "Image.open":  # beside pixels by the gigabyte, Pillow would start Ghostscript for PostScript
            assert "formats" in options or file.startswith("evaluation/"), file


def test_the_viewer_listens_on_this_machine_alone_unless_told_otherwise():
    assert inspect.signature(Viewer).parameters["host"].default == "127.0.0.1"
    assert inspect.signature(Scene.show).parameters["host"].default == "127.0.0.1"
    assert cli.build_parser().parse_args(["show", "out"]).host == "127.0.0.1"
