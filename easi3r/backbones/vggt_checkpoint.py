"""From files to a Vggt: a bare table of tensors, whose names and shapes say everything about the network."""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from easi3r.backbones.checkpoint import CheckpointInfo, some_of
from easi3r.backbones.pickled import load_pickled, tensors_of, text_keys
from easi3r.backbones.safetensors import read_safetensors
from easi3r.backbones.vggt import LAYERS_READ, Vggt, VggtConfig
from easi3r.backbones.vggt_heads import DptConfig
from easi3r.backbones.vggt_tracker import TrackerConfig
from easi3r.errors import CheckpointError

logger = logging.getLogger("easi3r")

HEADS = ("camera_head", "depth_head", "point_head", "track_head")
UNUSED = re.compile(r"^aggregator\.patch_embed\.mask_token$")  # of training
LIMIT = 1 << 14  # of every width: far above any network of this family, keeps absurd ones from being built

COMMERCIAL_LICENCE = "VGGT License (Meta; commercial use under its acceptable-use policy)"
LICENCE = "as published by Meta: non-commercial (CC BY-NC 4.0), except for the weights of VGGT-1B-Commercial"


def load_vggt(name: str | Path) -> tuple[Vggt, CheckpointInfo]:
    """Load a ``.pt`` file, a ``.safetensors`` file or a folder with model.safetensors; float32, on the CPU.

    Heads that the file lacks are absent from the network; tensors that are not VGGT's are left out, and logged.
    Raises CheckpointError for a file that is missing, unsafe, of another model or incomplete.
    """
    path = Path(name)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"There is no checkpoint at {str(file)!r}; expected VGGT's model.pt, or a folder with model.safetensors."
        )
    network = build_vggt(read_tensors(file), f"the checkpoint {name}")
    return network.float(), CheckpointInfo(str(name), file, licence_of_vggt(str(name)))


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped into memory and read as they are used; CheckpointError for a file that holds more."""
    advice = "so see whether its download was complete"
    if file.suffix == ".safetensors":
        try:
            return read_safetensors(file)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors ({error}), {advice}.") from error
    try:
        content = load_pickled(file)
    except Exception as error:  # a damaged pickle raises nearly anything
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"The checkpoint {file} was not loaded, since it holds more than tensors and could run code; expected "
                "VGGT's model.pt, a bare table of tensors."
            ) from error
        raise CheckpointError(f"The checkpoint {file} cannot be read ({type(error).__name__}), {advice}.") from error
    if not isinstance(content, dict) or not is_vggt(content):
        raise CheckpointError(
            f"The checkpoint {file} is another model's (it holds {some_of(text_keys(content))}); expected a bare table "
            "of VGGT's tensors."
        )
    try:
        return tensors_of(content, file.stat().st_size)
    except ValueError as error:
        raise CheckpointError(f"The checkpoint {file} cannot be read ({error}), {advice}.") from error


def is_vggt(names: Mapping[str, object]) -> bool:
    """Whether tensors of these names can be VGGT's."""
    return "aggregator.camera_token" in names


def licence_of_vggt(name: str) -> str:
    """The licence of public weights, by the name of their file or folder; the stricter one where it is not told."""
    return COMMERCIAL_LICENCE if "vggt" in name.lower() and "commercial" in name.lower() else LICENCE


def build_vggt(tensors: Mapping[str, Tensor], what: str) -> Vggt:
    """Put ``tensors`` into a network without copying them; CheckpointError names what is missing or misshapen.

    what: whose tensors they are, for the message: 'the checkpoint model.pt'.
    """
    config = read_config(tensors, what)
    with torch.device("meta"):
        network = Vggt(config)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    problems = {
        "missing": sorted(expected.keys() - tensors.keys()),
        "of the wrong shape": [
            f"{key} {tuple(tensors[key].shape)} instead of {shape}"
            for key, shape in expected.items()
            if key in tensors and tuple(tensors[key].shape) != shape
        ],
    }
    found = [f"{problem}: {some_of(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointError(f"The weights of {what} do not make a whole VGGT ({'; '.join(found)}).")
    if extra := sorted(key for key in tensors.keys() - expected.keys() if not UNUSED.match(key)):
        logger.info("%s holds tensors that VGGT does not know, which are left out: %s", what, some_of(extra))
    if absent := [head for head in HEADS if head not in network._modules]:
        logger.info("%s holds no %s", what, ", ".join(absent))
    network.load_state_dict({key: tensors[key] for key in expected}, assign=True)
    return network.requires_grad_(False).eval()


def read_config(tensors: Mapping[str, Tensor], what: str) -> VggtConfig:
    """Sizes of a network from the names and shapes of its tensors."""
    try:
        return _config_of(_Shapes(tensors))
    except (KeyError, IndexError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"The weights of {what} do not say what network they are for ({reason}).") from error


class _Shapes:
    """Shapes by tensor name, and how many of a kind there are."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def size(self, name: str, axis: int = 0) -> int:
        size = self.tensors[name].shape[axis]
        if not 0 < size <= LIMIT:
            raise ValueError(f"{name} has a side of {size}")
        return size

    def count(self, prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
        return len({found[1] for name in self.tensors if (found := pattern.match(name))})

    def has(self, head: str) -> bool:
        return any(name.startswith(f"{head}.") for name in self.tensors)

    def dpt(self, head: str, outputs: int | None) -> DptConfig:
        a, b, c, d = (self.size(f"{head}.projects.{level}.weight") for level in range(4))
        features, hidden = (self.size(f"{head}.scratch.output_conv1.weight", axis) for axis in (1, 0))
        if outputs is not None and any(width % 4 for width in (a, b, c, d, hidden)):
            raise ValueError(f"{head} has widths that are no multiples of 4")
        return DptConfig((a, b, c, d), features, hidden, outputs)

    def tracker(self, head: str) -> TrackerConfig:
        former = f"{head}.tracker.updateformer"
        return TrackerConfig(
            dpt=self.dpt(f"{head}.feature_extractor", None),
            hidden=self.size(f"{former}.input_transform.weight"),
            depth=self.count(f"{former}.time_blocks"),
            correlation_hidden=self.size(f"{head}.tracker.corr_mlp.fc1.weight"),
            num_virtual=self.size(f"{former}.virual_tracks", 1),
        )


def _config_of(shapes: _Shapes) -> VggtConfig:
    trunk, encoder = "aggregator", "aggregator.patch_embed"
    dim = shapes.size(f"{trunk}.camera_token", -1)
    head_dim = shapes.size(f"{trunk}.frame_blocks.0.attn.q_norm.weight")
    depth = shapes.count(f"{trunk}.frame_blocks")
    positions = shapes.size(f"{encoder}.pos_embed", 1) - 1
    side = round(positions**0.5)
    if depth != LAYERS_READ[-1] + 1:
        raise ValueError(f"{depth} frame blocks, where {LAYERS_READ[-1] + 1} were expected")
    if dim % head_dim or head_dim % 4:
        raise ValueError(f"{dim} channels in heads of {head_dim}")
    if side * side != positions:
        raise ValueError(f"{positions} learned positions, which make no square")
    return VggtConfig(
        embed_dim=dim,
        num_heads=dim // head_dim,
        depth=depth,
        patch_size=shapes.size(f"{encoder}.patch_embed.proj.weight", -1),
        position_side=side,
        num_registers=shapes.size(f"{trunk}.register_token", 2),
        encoder_depth=shapes.count(f"{encoder}.blocks"),
        encoder_registers=shapes.size(f"{encoder}.register_tokens", 1),
        camera_depth=shapes.count("camera_head.trunk") if shapes.has("camera_head") else None,
        depth_head=shapes.dpt("depth_head", 2) if shapes.has("depth_head") else None,
        point_head=shapes.dpt("point_head", 4) if shapes.has("point_head") else None,
        track_head=shapes.tracker("track_head") if shapes.has("track_head") else None,
    )
