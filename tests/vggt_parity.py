"""The small VGGT of the parity figures, and the figures; tests that ask for them are skipped where they are absent."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import PARITY
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from easi3r.backbones.vggt import Vggt
from easi3r.backbones.vggt_checkpoint import build_vggt


@functools.cache
def checkpoint_script() -> ModuleType:
    """The script that writes the checkpoint, as a module; its tensors are made once."""
    script = PARITY / "make_checkpoint_vggt.py"
    if not script.is_file():
        pytest.skip(f"{PARITY} is absent: the published figures cannot be compared here.")
    spec = importlib.util.spec_from_file_location("make_checkpoint_vggt", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.state_dict = functools.cache(module.state_dict)
    return module


@functools.cache
def parity_network() -> Vggt:
    return build_vggt(checkpoint_script().state_dict(), "the parity checkpoint")


@functools.cache
def parity_figures() -> NpzFile:
    checkpoint_script()
    return np.load(PARITY / "vggt.npz")


def input_of(frames: NDArray[np.uint8]) -> Tensor:
    """[n, H, W, 3] uint8 -> [n, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def relative(ours: Tensor | NDArray[np.floating], published: NDArray[np.floating]) -> float:
    """Largest difference, relative to the published array's mean magnitude."""
    assert ours.shape == published.shape
    return float(np.abs(np.asarray(ours) - published).max() / np.abs(published).mean())
