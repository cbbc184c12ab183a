"""What several tests need: the parity checkpoints and figures, small random networks, and how an error must read."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from numpy.lib.npyio import NpzFile
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r, Dust3rConfig

PARITY = Path(__file__).parents[2] / "shared" / "parity"


def pytest_configure() -> None:
    """Give each pytest-xdist worker, and what it starts, its share of the cores: more threads are ten times slower."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1 and "OMP_NUM_THREADS" not in os.environ:
        share = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(share)
        torch.set_num_threads(share)


@pytest.fixture(scope="session")
def make_checkpoint() -> ModuleType:
    """The script that writes the parity checkpoints, as a module."""
    script = PARITY / "make_checkpoint.py"
    if not script.is_file():
        pytest.skip(f"{PARITY} is absent: the published figures cannot be compared here.")
    spec = importlib.util.spec_from_file_location("make_checkpoint", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.state_dict = functools.cache(module.state_dict)
    return module


@pytest.fixture(scope="session")
def parity_file(make_checkpoint: ModuleType) -> Iterator[Callable[[str, str], Path]]:
    """``parity_file(kind, layout)``: the checkpoint, kind 'dpt' or 'linear', layout 'pth' or 'folder', written once."""
    with tempfile.TemporaryDirectory() as home:

        def write(kind: str, layout: str) -> Path:
            path = Path(home) / (f"{kind}.pth" if layout == "pth" else kind)
            if not path.exists():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("sys.argv", ["make_checkpoint.py", kind, str(path)])
                    make_checkpoint.main()
            return path

        yield write


@pytest.fixture(scope="session")
def parity_figures(make_checkpoint: ModuleType) -> Callable[[str], NpzFile]:
    """``parity_figures(kind)``: what the published implementation computes with that checkpoint."""
    return lambda kind: np.load(PARITY / f"easi3r_{kind}.npz")


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Dust3r]:
    """``make_network(dec_depth=3, ...)``: a small Dust3r with the same random weights each time, attention peaked."""

    def make(**changes: object) -> Dust3r:
        small = {
            "enc_embed_dim": 32,
            "enc_depth": 2,
            "enc_num_heads": 2,
            "dec_embed_dim": 48,
            "dec_depth": 4,
            "dec_num_heads": 3,
            "patch_size": 8,
            "img_size": (64, 64),
            "head_type": "linear",
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Dust3r(Dust3rConfig(**{**small, **changes})).requires_grad_(False).eval()
        for name, weight in network.named_parameters():
            if "projq" in name or "projk" in name:
                weight.mul_(4)
        return network

    return make


@pytest.fixture
def tiny_network(make_network: Callable[..., Dust3r]) -> Dust3r:
    return make_network()


@pytest.fixture(scope="session")
def random_images() -> Callable[..., Tensor]:
    """``random_images(count, height, width)``: [count, 3, H, W] in [-1, 1], the same each time."""
    return lambda *size, seed=0: (
        torch.rand(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(seed)) * 2 - 1
    )


@pytest.fixture(scope="session")
def fails_with() -> Callable[..., AbstractContextManager[None]]:
    """``with fails_with(Error, "part", ...)``: the block raises Error, in one sentence that holds all parts."""

    @contextmanager
    def check(kind: type[Exception], *parts: str) -> Iterator[None]:
        with pytest.raises(kind) as caught:
            yield
        text = str(caught.value)
        assert text.endswith(".") and "\n" not in text and not re.search(r"[.!?] [A-Z]", text), text
        assert 20 < len(text) < 600, text
        assert not [part for part in parts if part not in text], text

    return check
