"""The small checkpoint of VGGT's public format through the command line: a clip in, every output and export out."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from small_inputs import listing, moving_square, random_vggt_model, run_cli, write_checkpoint, write_images, write_video
from test_clip_passes import assert_contract, assert_invariant
from torch import nn
from vggt_parity import checkpoint_script, parity_figures

from easi3r import Easi3R, Motion, Scene
from easi3r.backbones.vggt import Vggt
from easi3r.config import Settings
from easi3r.errors import CheckpointError
from easi3r.export import FORMATS
from evaluation.evaluate import main as evaluate
from evaluation.methods import Easi3RMethod

TENSORS = Path("model.safetensors")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt as the public one is: a bare table of tensors."""
    path = tmp_path_factory.mktemp("vggt") / "model.pt"
    torch.save(checkpoint_script().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """The six frames of the published figures, [6, 140, 182, 3]."""
    return parity_figures()["frames"]


# --- what from_pretrained finds


def tensors_of_tiny() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in random_vggt_model().network.state_dict().items()}


@pytest.mark.parametrize("layout", ["weights.pt", "weights.safetensors", "folder", "folder with a .pt alone"])
def test_the_kind_of_network_is_found_from_the_file(tmp_path: Path, layout: str) -> None:
    tensors, path = tensors_of_tiny(), tmp_path / layout
    if layout.startswith("folder"):
        path.mkdir()
    file = path / ("model.safetensors" if layout == "folder" else "any_name.pt") if path.is_dir() else path
    save_file(tensors, file) if file.suffix == ".safetensors" else torch.save(tensors, file)
    model = Easi3R.from_pretrained(path)
    assert isinstance(model.network, Vggt) and model.checkpoint.path == file
    assert "non-commercial" in model.checkpoint.licence
    assert all(torch.equal(value, tensors[name]) for name, value in model.network.state_dict().items())
    pairs = Easi3R.from_pretrained(write_checkpoint(tmp_path / "pairs.pth"))
    assert pairs.network.gives.sees == "pairs" and model.network.gives.sees == "clip"


@pytest.mark.parametrize(("name", "files"), [("VGGT-1B", ["model.safetensors"]), ("VGGT_tracker_fixed", ["model.pt"])])
def test_hub_ids_are_fetched_with_as_little_as_possible(tmp_path: Path, monkeypatch, name: str, files) -> None:
    asked = []

    def fetch(hub_id: str, allow_patterns: list[str]) -> str:
        asked.append((hub_id, allow_patterns))
        (tmp_path / name).mkdir(exist_ok=True)
        for file in files:
            if any(Path(file).match(pattern) for pattern in allow_patterns):
                tensors = tensors_of_tiny()
                (save_file if file.endswith("safetensors") else torch.save)(tensors, tmp_path / name / file)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = Easi3R.from_pretrained(f"facebook/{name}")
    assert isinstance(model.network, Vggt) and model.checkpoint.name == f"facebook/{name}"
    patterns = [pattern for _, some in asked for pattern in some]
    assert ("*.pt" in patterns) == (files == ["model.pt"]), "five gigabytes once are enough"


def test_an_object_that_somebody_built_is_taken_over() -> None:
    class Theirs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in random_vggt_model().network.named_children():
                self.add_module(name, child)

    theirs = Theirs()
    model = Easi3R(theirs)
    ours = model.network.state_dict()
    assert isinstance(model.network, Vggt) and "non-commercial" in model.checkpoint.licence
    assert all(ours[name].data_ptr() == value.data_ptr() for name, value in theirs.state_dict().items())


def test_a_lonely_safetensors_file_of_another_model_is_refused(tmp_path: Path, fails_with) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / TENSORS)
    with fails_with(CheckpointError, "another model's", "weight"):
        Easi3R.from_pretrained(tmp_path / TENSORS)


# --- the command line


def flags(checkpoint: Path, *more: object) -> list[object]:
    evidence = [] if "--evidence" in more else ["--evidence", "attention"]  # optical flow takes most of the time
    return ["--checkpoint", checkpoint, "--image-size", "native", "--quiet", *evidence, *more]


def test_a_video_through_every_command(checkpoint: Path, clip: np.ndarray, tmp_path: Path, capfd) -> None:
    video = write_video(tmp_path / "clip.avi", clip[:3])
    out = tmp_path / "out"
    assert run_cli("run", video, "-o", out, *flags(checkpoint, "--tracks", "grid:3")) == 0
    scene = Scene.load(out)
    assert_contract(scene, 3, 140, 182)
    assert scene.meta["checkpoint"] == {
        "name": str(checkpoint),
        "sha256": scene.meta["checkpoint"]["sha256"],
        "licence": scene.meta["checkpoint"]["licence"],
        "network": "VGGT",
    }
    header = json.loads((out / "scene.json").read_text())
    assert "tracks.npz" in header["conventions"] and (out / "tracks.npz").is_file()
    assert {"report.html", "cameras.npz", "trajectory.txt", "depth", "images"} <= set(listing(out))
    assert run_cli("export", out, "--to", ",".join(FORMATS), "-o", tmp_path / "exports", "--quiet") == 0
    assert {path.name.split(".")[0] for path in (tmp_path / "exports").iterdir()} == set(FORMATS)
    assert run_cli("show", out, "--html", tmp_path / "player.html", "--quiet") == 0
    assert (tmp_path / "player.html").stat().st_size > 10_000
    assert run_cli("segment", video, "-o", tmp_path / "masks", *flags(checkpoint)) == 0
    assert_contract(Motion.load(tmp_path / "masks"), 3, 140, 182)
    capfd.readouterr()


@pytest.mark.parametrize("num_frames", [1, 2])
def test_few_portrait_frames_make_a_scene(checkpoint: Path, clip: np.ndarray, tmp_path: Path, num_frames: int) -> None:
    portrait = np.ascontiguousarray(clip[:num_frames].transpose(0, 2, 1, 3))
    folder = write_images(tmp_path / "clip", portrait)
    assert run_cli("run", folder, "-o", tmp_path / "out", *flags(checkpoint)) == 0
    assert_contract(Scene.load(tmp_path / "out"), num_frames, 182, 140)
    assert run_cli("export", tmp_path / "out", "--to", "colmap,ply,tum", "--quiet") == 0


@pytest.mark.parametrize("options", [("--align", "fast"), ("--points", "head"), ("--evidence", "both")])
def test_options_of_a_scene(checkpoint: Path, clip: np.ndarray, tmp_path: Path, options) -> None:
    folder = write_images(tmp_path / "clip", clip[:2])
    assert run_cli("run", folder, "-o", tmp_path / "out", *flags(checkpoint, *options)) == 0
    assert_invariant(Scene.load(tmp_path / "out"))


@pytest.mark.slow
def test_fifty_frames(checkpoint: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "clip", moving_square(50, 140, 182))
    assert run_cli("run", folder, "-o", tmp_path / "out", *flags(checkpoint)) == 0
    scene = Scene.load(tmp_path / "out")
    assert_contract(scene, 50, 140, 182)
    assert len(scene.meta["pieces"]) == 1
    assert run_cli("run", folder, "-o", tmp_path / "cut", *flags(checkpoint, "--set", "pieces.frames=30")) == 0
    assert len(Scene.load(tmp_path / "cut").meta["pieces"]) == 2


# --- evaluation


@pytest.fixture
def davis(tmp_path: Path) -> Path:
    """One clip of four frames in DAVIS's layout, 56 x 42 px."""
    folders = [tmp_path / "DAVIS" / kind / "480p" / "bear" for kind in ("JPEGImages", "Annotations")]
    for folder, frames in zip(folders, (moving_square(4, 42, 56), moving_square(4, 42, 56)[..., 0]), strict=True):
        folder.mkdir(parents=True)
        for i, frame in enumerate(frames):
            if folder is folders[0]:
                Image.fromarray(frame).save(folder / f"{i:05}.jpg", quality=95)
            else:
                Image.fromarray((frame > 149).astype(np.uint8), mode="P").save(folder / f"{i:05}.png")
    return tmp_path / "DAVIS"


@pytest.mark.slow
def test_both_kinds_of_networks_stand_side_by_side(davis: Path, tmp_path: Path, capsys) -> None:
    torch.save(tensors_of_tiny(), tmp_path / "tiny.pt")
    pairs = write_checkpoint(tmp_path / "pairs.pth")
    arguments = ["davis", "--root", davis, "--variant", "all", "--protocol", "vggt4d", "--sequences", "bear"]
    arguments += ["--set", "image_size=native", "--set", "evidence=attention", "--out", tmp_path / "out"]
    arguments += ["--checkpoint", pairs, "--checkpoint", tmp_path / "tiny.pt"]
    assert evaluate([str(argument) for argument in arguments]) == 0
    table = (tmp_path / "out" / "side_by_side.md").read_text()
    assert "pairs.pth" in table and "tiny.pt" in table and "JM %" in table and table in capsys.readouterr().out
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*/results.json"))]
    assert len(results) == 2 and results[0]["head"]["checkpoint"] != results[1]["head"]["checkpoint"]
    with pytest.raises(SystemExit):
        evaluate([str(argument) for argument in (*arguments, "--method", "all-static")])
    assert "no weights" in capsys.readouterr().err


def test_a_method_of_the_evaluation_says_everything_of_either_network(davis: Path) -> None:
    images = tuple(sorted((davis / "JPEGImages" / "480p" / "bear").iterdir()))
    settings = Settings().with_options({"image_size": "native", "evidence": "attention"})
    found = Easi3RMethod(random_vggt_model(), settings)(images)
    assert found.masks.shape == found.depth.shape == found.confidence.shape == (4, 42, 56)
    assert found.camera_to_world.shape == (4, 4, 4) and found.intrinsics.shape == (4, 3, 3)
    assert found.crops[0].size == (56, 42)
