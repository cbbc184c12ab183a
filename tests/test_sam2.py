"""Masks refined by SAM 2, which really runs here: its tiny video predictor at 64 pixels, with random weights."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_inputs import QUICK, QUICK_FLAGS, moving_square, random_model, run_cli, write_checkpoint, write_images

import easi3r
from easi3r import Scene
from easi3r.config import Sam2Settings, Settings
from easi3r.errors import CheckpointError, ConfigError, MissingExtraError
from easi3r.progress import silent
from easi3r.sam2_refinement import build_predictor, check_sam2, config_of, load_refiner, refine_masks

ROOT = Path(easi3r.__file__).parents[1]
TINY = "configs/sam2.1/sam2.1_hiera_t.yaml"
SIDE = 64  # pixels
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sam2() -> Any:
    try:
        return import_module("sam2")
    except ImportError:
        pytest.skip("The package sam2 is absent (the README says how to install it), so SAM 2 cannot run here.")


@pytest.fixture(scope="module")
def predictor(sam2: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return build_predictor(TINY, SIDE)


@pytest.fixture(scope="module")
def weights(predictor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": predictor.state_dict()}, path)
    return path


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package sam2 cannot be found."""
    for name in ("sam2", "sam2.build_sam"):
        monkeypatch.setitem(sys.modules, name, None)


def square_masks(num_frames: int) -> np.ndarray:
    """[n, H, W] bool: the square of ``moving_square``."""
    return moving_square(num_frames, seed=1).min(axis=-1) >= 150


def refine(predictor: Any, instances: np.ndarray, **settings: Any) -> np.ndarray:
    return refine_masks(predictor, moving_square(len(instances)), instances, Sam2Settings(**settings), silent)


def asking_for(weights: Path | str, **changes: Any) -> Settings:
    given = {"refine": "sam2", "sam2.checkpoint": str(weights), "sam2.image_size": SIDE}
    return Settings().with_options(given | changes)


# --- the scheme


def test_even_frames_prompt_odd_ones_and_the_reverse(predictor: Any, tmp_path: Path) -> None:
    """Equal to what SAM 2's own calls give, each half by itself, one propagation through the clip."""
    images, masks = moving_square(3), square_masks(3)
    expected = masks.copy()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i:05d}.jpg", quality=95, subsampling=0)
    for parity in (0, 1):
        with torch.autocast("cpu", torch.bfloat16):
            state = predictor.init_state(str(tmp_path))
            for i in range(parity, 3, 2):
                predictor.add_new_mask(state, i, 1, masks[i])
            for i, _, logits in predictor.propagate_in_video(state, start_frame_idx=0):
                if i % 2 != parity:
                    expected[i] |= logits[0, 0].float().numpy() > 0
    refined = refine(predictor, masks)
    np.testing.assert_array_equal(refined, expected)
    assert refined.dtype == bool and ((refined & ~masks).sum(axis=(1, 2)) > 0).all() and not refined.all()


def test_a_frame_does_not_depend_on_the_masks_of_its_own_half(predictor: Any) -> None:
    masks = square_masks(3)
    changed = masks.copy()
    changed[0] = False
    changed[0, :, :24] = True
    first, second = refine(predictor, masks), refine(predictor, changed)
    neither = ~(masks[0] | changed[0])
    np.testing.assert_array_equal(first[0][neither], second[0][neither])  # but for its own mask, which is united
    np.testing.assert_array_equal(first[2], second[2])
    assert (first[1] != second[1]).any()


def test_each_instance_is_an_object_of_its_own(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = np.where(square_masks(3), 7, 0).astype(np.int32)
    instances[:2, 36:46, 40:60] = 3  # gone in the last frame
    encoded, encode = [], predictor.forward_image
    monkeypatch.setattr(predictor, "forward_image", lambda image: encoded.append(1) or encode(image))
    refined = refine(predictor, instances)
    assert len(encoded) == 5  # each frame once per half, whatever the number of objects; frame 1 ends one, begins one
    assert refined.shape == instances.shape and refined.dtype == np.int32
    np.testing.assert_array_equal(refined[instances > 0], instances[instances > 0])
    gained = refined[instances == 0]
    assert set(np.unique(gained)) == {0, 3, 7}
    alone = [refine(predictor, np.where(instances == number, number, 0)) == number for number in (3, 7)]
    np.testing.assert_array_equal((refined > 0), (alone[0] | alone[1] | (instances > 0)))
    claimed_by_one = (instances == 0) & (alone[0] != alone[1])
    np.testing.assert_array_equal(refined[claimed_by_one], np.where(alone[0], 3, 7)[claimed_by_one])


def test_a_chunk_is_a_clip_of_its_own(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    images, masks = moving_square(5), square_masks(5)
    settings = Sam2Settings()
    apart = [refine_masks(predictor, images[s], masks[s], settings, silent) for s in (slice(0, 3), slice(3, 5))]
    lengths, open_clip = [], predictor.init_state

    def init_state(folder: str, **options: Any) -> Any:
        lengths.append((len(list(Path(folder).iterdir())), set(options.values())))
        return open_clip(folder, **options)

    monkeypatch.setattr(predictor, "init_state", init_state)
    np.testing.assert_array_equal(refine(predictor, masks, chunk=3, offload=True), np.concatenate(apart))
    assert lengths == [(3, {True}), (2, {True})]


# --- no more than is needed


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_sam2_is_not_called_where_nothing_can_be_predicted(num_frames: int) -> None:
    """A bare object as the predictor: every call would fail."""
    masks = square_masks(num_frames) & (num_frames == 1)
    np.testing.assert_array_equal(refine(object(), masks, chunk=2), masks)


def test_one_mask_in_two_frames_prompts_the_other_frame_alone(predictor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    masks = square_masks(2)
    masks[1] = False
    predicted, propagate = [], predictor.propagate_in_video

    def propagate_in_video(state: Any, start_frame_idx: int, max_frame_num_to_track: int) -> Any:
        predicted.append((start_frame_idx, max_frame_num_to_track))
        return propagate(state, start_frame_idx, max_frame_num_to_track)

    monkeypatch.setattr(predictor, "propagate_in_video", propagate_in_video)
    refined = refine(predictor, masks)
    assert predicted == [(1, 0)] and refined[1].any()
    np.testing.assert_array_equal(refined[0], masks[0])


def test_nothing_is_left_behind_and_nothing_printed(
    predictor: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    refine(predictor, square_masks(2))
    assert list(tmp_path.iterdir()) == []

    def init_state(folder: str, **_: Any) -> None:
        assert [path.parent for path in tmp_path.rglob("*.jpg")] == [Path(folder)] * 2
        raise RuntimeError("no memory")

    monkeypatch.setattr(predictor, "init_state", init_state)
    with pytest.raises(RuntimeError, match="no memory"):
        refine(predictor, square_masks(2))
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


# --- the whole tool


def test_the_tool_unites_its_masks_with_those_of_sam2(predictor: Any, weights: Path) -> None:
    model, clip = random_model(), moving_square(3)
    plain = model.reconstruct(clip, **QUICK, instances=False)
    asked = {"instances": False, "refine": "sam2", "sam2.checkpoint": str(weights), "sam2.image_size": SIDE}
    refined = model.reconstruct(clip, **QUICK, **asked)
    expected = refine(predictor, plain.dynamic_mask)
    np.testing.assert_array_equal(plain.images, clip)
    np.testing.assert_array_equal(refined.dynamic_mask, expected)
    np.testing.assert_array_equal(refined.dynamic_score, plain.dynamic_score)
    assert (expected != plain.dynamic_mask).any()
    assert refined.meta["sam2"]["name"] == str(weights) and refined.meta["sam2"]["licence"] == "Apache-2.0 (Meta)"
    assert len(refined.meta["sam2"]["sha256"]) == 64
    assert refined.meta["settings"]["motion"]["refine"] == "sam2" and refined.meta["timings_s"]["sam2"] > 0
    assert "sam2" not in plain.meta and "sam2" not in plain.meta["timings_s"]
    given = model.segment(clip, **QUICK, **asked, masks=square_masks(3))
    np.testing.assert_array_equal(given.dynamic_mask, square_masks(3))
    assert "sam2" not in given.meta


def test_the_command_line_refines(weights: Path, tmp_path: Path) -> None:
    folder, checkpoint = write_images(tmp_path / "images", moving_square(2)), write_checkpoint(tmp_path / "small.pth")
    flags = ["--refine", "sam2", "--set", f"sam2.checkpoint={weights}", "--set", f"sam2.image_size={SIDE}"]
    command = ("run", folder, "-o", tmp_path / "out", "--checkpoint", checkpoint, *QUICK_FLAGS, *flags)
    assert run_cli(*command) == 0
    scene = Scene.load(tmp_path / "out")
    assert scene.meta["settings"]["motion"]["refine"] == "sam2" and scene.meta["timings_s"]["sam2"] > 0


# --- what may be absent


def test_without_the_extra_the_command_line_says_how_to_install_it_before_any_work(
    absent: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("run", tmp_path / "no clip", "-o", tmp_path / "out", "--refine", "sam2") == 1
    said = capsys.readouterr().err
    assert "pip install 'easi3r[sam2]'" in said and len(said.splitlines()) == 1


def test_without_the_extra_python_says_so_before_frames_are_read(absent: None, tmp_path: Path, fails_with) -> None:
    with fails_with(MissingExtraError, "sam2", "ModuleNotFoundError", "pip install 'easi3r[sam2]'"):
        random_model().segment(tmp_path / "no clip", refine="sam2")


def test_masks_that_are_given_need_no_sam2(absent: None) -> None:
    assert not check_sam2(Settings().with_options({"refine": "sam2", "masks": "none"}))


def test_a_torchvision_that_cannot_be_imported_is_not_needed(sam2: Any, tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import numpy as np, torch; torch.manual_seed(1)\n"
        "from easi3r.config import Sam2Settings; from easi3r.progress import silent\n"
        "from easi3r.sam2_refinement import build_predictor, refine_masks\n"
        "images, masks = np.zeros((2, 48, 64, 3), np.uint8), np.zeros((2, 48, 64), bool); masks[0, 20:, 20:] = True\n"
        f"refined = refine_masks(build_predictor({TINY!r}, {SIDE}), images, masks, Sam2Settings(), silent)\n"
        "print(refined.shape, refined[1].any())\n"
        "import torchvision"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["(2, 48, 64) True"], done.stderr
    assert done.stderr.strip().endswith("RuntimeError: operator torchvision::nms does not exist")


# --- weights


def test_every_configuration_of_sam2_is_told_by_its_weights(sam2: Any) -> None:
    configs = Path(sam2.__path__[0]) / "configs"
    files = [*configs.glob("sam2/*.yaml"), *configs.glob("sam2.1/*.yaml")]
    assert len(files) == 8
    for file in files:
        model = yaml.safe_load(file.read_text())["model"]
        blocks = sum(model["image_encoder"]["trunk"].get("stages", [2, 3, 16, 3]))
        names = ["maskmem_tpos_enc", *(f"image_encoder.trunk.blocks.{i}.norm1.weight" for i in range(blocks))]
        names += ["no_obj_embed_spatial"] if model.get("no_obj_embed_spatial") else []
        name = config_of(dict.fromkeys(names, torch.zeros(1)), Path("x.pt"))
        assert name == f"configs/{file.relative_to(configs)}"


def test_public_weights_are_fetched_by_their_name(
    weights: Path, monkeypatch: pytest.MonkeyPatch, fails_with, tmp_path: Path
) -> None:
    asked = []

    def hf_hub_download(hub_id: str, name: str) -> str:
        asked.append((hub_id, name))
        if "large" in name:
            raise OSError("no connection. Try again")
        return str(weights)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    random_state = torch.random.get_rng_state()
    found = load_refiner(asking_for("facebook/sam2.1-hiera-base-plus", **{"sam2.config": TINY}), CPU)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert found.checkpoint.licence == "Apache-2.0 (Meta)" and found.checkpoint.path == weights
    assert not found.predictor.training and not any(tensor.requires_grad for tensor in found.predictor.parameters())
    with fails_with(CheckpointError, "facebook/sam2.1-hiera-large", "OSError: no connection", "sam2.checkpoint"):
        load_refiner(Settings().with_options({"refine": "sam2"}), CPU)
    assert asked[0] == ("facebook/sam2.1-hiera-base-plus", "sam2.1_hiera_base_plus.pt")
    assert asked[-1] == ("facebook/sam2.1-hiera-large", "sam2.1_hiera_large.pt")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with fails_with(MissingExtraError, "easi3r[hub]"):
        load_refiner(asking_for("facebook/sam2.1-hiera-base-plus"), CPU)


def test_weights_that_do_not_fit_are_one_sentence(sam2: Any, predictor: Any, tmp_path: Path, fails_with) -> None:
    path, tensors = tmp_path / "x.pt", dict(predictor.state_dict())
    with fails_with(CheckpointError, "There are no SAM 2 weights", "x.pt", "facebook/sam2.1-hiera-large"):
        load_refiner(asking_for(path), CPU)
    path.write_bytes(b"no weights")
    with fails_with(CheckpointError, "x.pt cannot be read"):
        load_refiner(asking_for(path), CPU)
    other = write_checkpoint(tmp_path / "dust3r.pt")
    with fails_with(CheckpointError, "dust3r.pt"):
        load_refiner(asking_for(other), CPU)
    torch.save({"model": {"encoder.weight": torch.zeros(1)}}, path)
    with fails_with(CheckpointError, "another model's (encoder.weight)"):
        load_refiner(asking_for(path), CPU)
    few = {name: torch.zeros(()) for name in tensors} | {"surplus": torch.zeros(1)}
    torch.save({"model": few}, path)
    with fails_with(CheckpointError, "do not fit", "sam2.1_hiera_t.yaml", "more"):
        load_refiner(asking_for(path), CPU)
    with fails_with(CheckpointError, "configuration 'nonsense'"):
        load_refiner(asking_for(path, **{"sam2.config": "nonsense"}), CPU)


@pytest.mark.parametrize("name, value", [("sam2.chunk", 1), ("sam2.image_size", 100)])
def test_impossible_settings_are_refused(name: str, value: int, fails_with) -> None:
    with fails_with(ConfigError, name, str(value)):
        Settings().with_options({name: value})
