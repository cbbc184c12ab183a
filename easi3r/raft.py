"""Optical flow by RAFT (Teed and Deng 2020) as torchvision implements it, which is imported only when it is used.

Without a file of weights, torchvision fetches its own once (raft_large, C_T_SKHT_V2) and keeps them in torch's cache.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from easi3r.backbones.pickled import load_pickled
from easi3r.errors import CheckpointError, MissingExtraError
from easi3r.structures import Array

STRIDE = 8  # pixels per feature: sides must be multiples
MIN_SIDE = 128  # pixels; the coarsest of the four levels of correlations needs two features
UPDATES = 12  # refinements of the flow, as many as RAFT was trained with


@dataclass(frozen=True)
class RaftFlow:
    """A network as a flow estimator, on whichever device it is."""

    network: nn.Module

    @torch.inference_mode()
    def __call__(self, first: Array, second: Array) -> Array:
        """Two images [H, W, 3] uint8 RGB of any size -> flow [H, W, 2] float32 in pixels, from first to second."""
        height, width = first.shape[:2]
        down, right = (-side % STRIDE if side > MIN_SIDE else MIN_SIDE - side for side in (height, width))
        device = next(self.network.parameters()).device
        images = torch.from_numpy(np.stack([first, second])).to(device).permute(0, 3, 1, 2) / 127.5 - 1
        images = pad(images, (0, right, 0, down), mode="replicate")
        flow = self.network(images[:1], images[1:], num_flow_updates=UPDATES)[-1][0]
        return np.asarray(flow[:, :height, :width].permute(1, 2, 0).contiguous().cpu().numpy())


def load_raft(weights: str | Path | None, device: torch.device | str | None = None) -> RaftFlow:
    """RAFT with the weights of a file, or with torchvision's own; on the CPU unless a device is given.

    weights: a state dict of torchvision's raft_large or raft_small, written by torch.save.
    Raises MissingExtraError without a torchvision that works here, CheckpointError for weights that cannot be had or
    that belong to another model.
    """
    models = torchvision_models()
    tensors = _download(models) if weights is None else _read(Path(weights))
    network = _fitting_network(models, tensors, "that torchvision fetched" if weights is None else str(weights))
    return RaftFlow(network.float().requires_grad_(False).eval().to(device))


def torchvision_models() -> ModuleType:
    """``torchvision.models.optical_flow``; MissingExtraError says why it cannot be imported."""
    name = "torchvision.models.optical_flow"
    try:
        try:
            return import_module(name)
        except RuntimeError as error:
            if "operator torchvision::nms does not exist" not in str(error):
                raise
            declare_detection_operators()
            return import_module(name)
    except Exception as error:  # beside another torch than its own, torchvision fails with errors of many kinds
        raise MissingExtraError(
            f"RAFT needs torchvision, which cannot be imported here ({_reason(error)}); install the one that goes with "
            f"torch {torch.__version__} (pip install 'easi3r[raft]'), or choose flow.method 'dis'."
        ) from error


@functools.cache
def declare_detection_operators() -> torch.library.Library:
    """Name two operators that torchvision cannot be imported without, unless its compiled part can be loaded.

    That part is built for one build of torch (CPU, or one CUDA) and only some detectors use it; RAFT is plain torch.
    The declarations last as long as what is returned, hence the cache.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _download(models: ModuleType) -> Mapping[str, Tensor]:
    try:
        tensors: Mapping[str, Tensor] = models.Raft_Large_Weights.C_T_SKHT_V2.get_state_dict(
            progress=False, check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:  # of the network, of the disk, of a proxy's page in place of the file
        raise CheckpointError(
            f"The weights of RAFT cannot be fetched ({_reason(error)}); give a file of them as flow.weights, or choose "
            "flow.method 'dis'."
        ) from error
    return tensors


def _read(path: Path) -> Any:
    try:
        return load_pickled(path)
    except Exception as error:  # a damaged file raises nearly anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        raise CheckpointError(
            f"The RAFT weights {path} cannot be read ({reason}); expected a state dict of torchvision's raft_large or "
            "raft_small, written by torch.save."
        ) from error


def _fitting_network(models: ModuleType, tensors: Any, what: str) -> nn.Module:
    """The one of torchvision's two networks whose names and shapes these are; CheckpointError if neither's."""
    given = _shapes(tensors)
    for build in (models.raft_large, models.raft_small):
        with torch.device("meta"):
            network: nn.Module = build(weights=None)
        if _shapes(network.state_dict()) == given:
            network.load_state_dict(tensors, assign=True)
            return network
    raise CheckpointError(
        f"The RAFT weights {what} are another model's ({len(given)} tensors, {', '.join(list(given)[:2]) or 'no names'}"
        "); expected a state dict of torchvision's raft_large or raft_small."
    )


def _shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    items = tensors.items() if isinstance(tensors, Mapping) else ()
    return {str(name): tuple(value.shape) for name, value in items if isinstance(value, Tensor)}


def _reason(error: Exception) -> str:
    """The first sentence of what it says, for use within one of ours."""
    text = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:160]}"
