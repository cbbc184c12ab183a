"""RAFT through torchvision: the call, the weights, and what is said when either is not to be had."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import easi3r
from easi3r import raft
from easi3r.config import FlowSettings
from easi3r.errors import CheckpointError, MissingExtraError
from easi3r.flow import estimate_flow, make_estimator
from easi3r.progress import silent
from easi3r.raft import RaftFlow, load_raft

ROOT = Path(easi3r.__file__).parents[1]


@pytest.fixture(scope="module")
def models() -> ModuleType:
    try:
        return raft.torchvision_models()
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def random_raft(models: ModuleType) -> Callable[[str], torch.nn.Module]:
    """``random_raft("raft_small")``: the same random weights each time."""

    def make(name: str) -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return getattr(models, name)(weights=None).eval()

    return make


@pytest.fixture(scope="module")
def small(random_raft: Callable[[str], torch.nn.Module]) -> torch.nn.Module:
    return random_raft("raft_small")


@pytest.fixture
def weights(tmp_path: Path, small: torch.nn.Module) -> Path:
    torch.save(small.state_dict(), tmp_path / "small.pth")
    return tmp_path / "small.pth"


def two_images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)


def by_torchvision(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    first, second = torch.from_numpy(images).permute(0, 3, 1, 2)[:, None].float() / 127.5 - 1
    with torch.no_grad():
        return network(first, second)[-1][0].permute(1, 2, 0).numpy()


# --- the call


@pytest.mark.parametrize("shape", [(128, 136), (131, 150), (48, 160), (7, 5), (1, 1)])
def test_flow_has_the_size_of_the_images(small: torch.nn.Module, shape: tuple[int, int]) -> None:
    flow = RaftFlow(small)(*two_images(*shape))
    assert flow.shape == (*shape, 2) and flow.dtype == np.float32 and np.isfinite(flow).all()


def test_flow_is_the_last_that_torchvision_computes(small: torch.nn.Module) -> None:
    images = two_images(136, 128)
    np.testing.assert_allclose(RaftFlow(small)(*images), by_torchvision(small, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("shape", "padded"), [((130, 141), (136, 144)), ((40, 128), (128, 128))])
def test_padding_does_not_move_the_flow(
    small: torch.nn.Module, shape: tuple[int, int], padded: tuple[int, int]
) -> None:
    images = two_images(*shape)
    down, right = padded[0] - shape[0], padded[1] - shape[1]
    larger = np.pad(images, ((0, 0), (0, down), (0, right), (0, 0)), mode="edge")
    expected = by_torchvision(small, larger)[: shape[0], : shape[1]]
    np.testing.assert_allclose(RaftFlow(small)(*images), expected, rtol=1e-4, atol=1e-4)


def test_raft_is_chosen_by_name(weights: Path, small: torch.nn.Module) -> None:
    settings = FlowSettings(method="raft", weights=str(weights))
    images = two_images(64, 96)
    found = estimate_flow(images, np.array([[0, 1], [1, 0]]), settings, silent, torch.device("cpu"))
    np.testing.assert_array_equal(found.flow[0], RaftFlow(small)(*images))
    np.testing.assert_array_equal(found.flow[1], make_estimator(settings)(*images[::-1]))


# --- weights


@pytest.mark.parametrize("name", ["raft_small", "raft_large"])
def test_weights_of_either_size_are_read_from_a_file(
    random_raft: Callable[[str], torch.nn.Module], tmp_path: Path, name: str
) -> None:
    network = random_raft(name)
    torch.save(network.state_dict(), tmp_path / "raft.pth")
    images = two_images(128, 128)
    loaded = load_raft(tmp_path / "raft.pth", "cpu")
    np.testing.assert_array_equal(loaded(*images), RaftFlow(network)(*images))
    assert not loaded.network.training and not any(p.requires_grad for p in loaded.network.parameters())


def test_weights_in_half_precision_are_brought_to_float32(small: torch.nn.Module, tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in small.state_dict().items()}, tmp_path / "half.pth")
    assert load_raft(tmp_path / "half.pth")(*two_images(128, 128)).dtype == np.float32


def test_torchvisions_own_weights_are_fetched_once(
    random_raft: Callable[[str], torch.nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, fetched = random_raft("raft_large"), []

    def fetch(url: str, to: str, *_: object, **__: object) -> None:
        fetched.append(url)
        torch.save(network.state_dict(), to)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", fetch)
    for _ in range(2):
        parameter = next(load_raft(None).network.parameters())
        torch.testing.assert_close(parameter, next(network.parameters()), check_stride=False, rtol=0, atol=0)
    assert len(fetched) == 1 and "raft_large_C_T_SKHT_V2" in fetched[0]


def test_no_network_is_one_sentence(models, tmp_path, monkeypatch, fails_with) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError(OSError(-3, "Temporary failure. Try again"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with fails_with(CheckpointError, "cannot be fetched", "URLError", "flow.weights", "'dis'"):
        load_raft(None)


def test_a_file_that_is_absent_or_unreadable_or_unsafe(models, tmp_path, fails_with) -> None:
    with fails_with(CheckpointError, "none.pth", "No such file", "raft_small"):
        load_raft(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("not weights")
    torch.save({"weights": Path("could/run/code")}, tmp_path / "unsafe.pth")
    for name in ("text.pth", "unsafe.pth"):
        with fails_with(CheckpointError, name, "cannot be read", "torch.save"):
            load_raft(tmp_path / name)
    with fails_with(CheckpointError, "cannot be read"):
        load_raft(tmp_path)


def test_weights_of_another_model(small, models, tmp_path, fails_with) -> None:
    tensors = small.state_dict()
    first = next(iter(tensors))
    others = {
        "names": {f"module.{name}": value for name, value in tensors.items()},
        "fewer": {name: value for name, value in tensors.items() if name != first},
        "shapes": tensors | {first: tensors[first][:1]},
        "training": {"model": tensors, "epoch": 3},
        "empty": {},
        "list": [1, 2, 3],
    }
    for name, content in others.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with fails_with(CheckpointError, f"{name}.pth", "another model's", "raft_large or raft_small"):
            load_raft(tmp_path / f"{name}.pth")


# --- torchvision


def test_an_absent_torchvision_is_named_with_its_extra(monkeypatch, fails_with) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with fails_with(MissingExtraError, "torchvision", "ModuleNotFoundError", "easi3r[raft]", "'dis'"):
        load_raft(None)


@pytest.mark.parametrize("message", ["operator torchvision::roi_align does not exist", "Built for CUDA. Not here."])
def test_a_torchvision_that_fails_otherwise_is_not_repaired(monkeypatch, fails_with, message) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError(message)

    monkeypatch.setattr(raft, "import_module", fail)
    monkeypatch.setattr(raft, "declare_detection_operators", lambda: pytest.fail("declared"))
    with fails_with(MissingExtraError, f"RuntimeError: {message.partition('.')[0]}", torch.__version__):
        load_raft(None)


def test_a_torchvision_that_fails_again_once_repaired(monkeypatch, fails_with) -> None:
    def fail(name: str) -> ModuleType:
        raise RuntimeError("operator torchvision::nms does not exist")

    declared = []
    monkeypatch.setattr(raft, "import_module", fail)
    monkeypatch.setattr(raft, "declare_detection_operators", lambda: declared.append(True))
    with fails_with(MissingExtraError, "torchvision::nms", "easi3r[raft]"):
        load_raft(None)
    assert declared == [True]


def test_a_torchvision_without_its_compiled_part_is_imported_when_used(tmp_path: Path) -> None:
    package = tmp_path / "torchvision" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text(
        "import torch\n"
        "for name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda dets, scores, iou_threshold: scores)\n"
    )
    (package / "__init__.py").touch()
    (package / "optical_flow.py").touch()
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "from easi3r.config import FlowSettings; from easi3r.flow import make_estimator\n"
        "make_estimator(FlowSettings()); print('torchvision' in sys.modules)\n"
        "from easi3r.raft import torchvision_models; print(torchvision_models().__file__)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["False", str(package / "optical_flow.py")], done.stderr
