"""From files to a network: DUSt3R, MonST3R, MASt3R and VGGT weights, loaded safely and checked by name.

The kind of network is found from what the file holds.  Two layouts of DUSt3R's family exist: ``NAME.pth`` (``{"args":
Namespace(model="Class(...)"), "model": tensors}``) and a Hugging Face folder (``config.json``, ``model.safetensors``),
local or by hub id.  The constructor's text is parsed, never run.  VGGT's: :mod:`easi3r.backbones.vggt_checkpoint`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easi3r.backbones.configuration import parse_config, parse_constructor
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.backbones.files import CheckpointInfo, Weights, plain_tensors, read_config_json, read_weights, some_of
from easi3r.backbones.interface import Backbone
from easi3r.backbones.pickled import text_keys
from easi3r.backbones.vggt_checkpoint import build_vggt, is_vggt, licence_of_vggt
from easi3r.errors import CheckpointError

# What a checkpoint may hold that the method never reads: training's mask token, the local features of MASt3R, the
# second name of four convolutions, and a unit of the coarsest fusion that has no input.
UNUSED = re.compile(
    r"^(mask_token|prediction_head\..*|downstream_head[12]\.(head_local_features\..*"
    r"|dpt\.scratch\.refinenet4\.resConfUnit1\..*))$"
)
ALIAS = re.compile(r"^(downstream_head[12]\.dpt\.scratch\.)layer_rn\.(\d)\.(weight)$")

LICENCES = {  # by a piece of the public names
    "dust3r": "CC BY-NC-SA 4.0 (non-commercial; Naver)",
    "mast3r": "CC BY-NC-SA 4.0 (non-commercial; Naver, and the terms of its training data)",
    "monst3r": "CC BY-NC-SA 4.0 (non-commercial; as published by its authors)",
}
MAX_CONFIG = 1 << 20  # bytes of config.json
UNKNOWN_LICENCE = "unknown: see where you got the weights from"


def load_checkpoint(name: str | Path) -> tuple[Backbone, CheckpointInfo]:
    """Load a file, a Hugging Face folder or a hub id of any known network; it is in float32 on the CPU.

    Raises CheckpointError for a file that is missing, unsafe, of another model or incomplete, MissingExtraError when
    a package for its format is absent.
    """
    weights, what = read_weights(name), f"the checkpoint {name}"
    network: Backbone
    if is_vggt(weights.table):
        network = build_vggt(plain_tensors(weights.table, weights.file), what)
        licence = licence_of_vggt(str(name))
    else:
        arguments, tensors = _dust3r_of(weights)
        network = build_network(parse_config(arguments, what), tensors, what)
        said = arguments.get("license")
        licence = (" ".join(said.split())[:200] if isinstance(said, str) else "") or licence_of(str(name))
    return network.float(), CheckpointInfo(str(name), weights.file, licence)


def _dust3r_of(weights: Weights) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """The constructor's arguments, and the tensors."""
    table = weights.table
    if weights.folder is not None:
        return read_config_json(weights.folder), table
    if not isinstance(table.get("model"), dict) or "args" not in table:
        raise CheckpointError(
            f"The checkpoint {weights.file} is another model's (it holds {some_of(text_keys(table))}); "
            "expected 'args' and 'model', as in DUSt3R, MonST3R and MASt3R files, or VGGT's tensors."
        )
    constructor = getattr(table["args"], "model", table["args"])
    if not isinstance(constructor, str):  # nor turned into text: a few nested lists may stand for gigabytes of it
        raise CheckpointError(
            f"The checkpoint {weights.file} is another model's (its constructor is a {type(constructor).__name__}); "
            "expected text, as in DUSt3R, MonST3R and MASt3R files."
        )
    return parse_constructor(constructor), plain_tensors(table["model"], weights.file)


def licence_of(name: str) -> str:
    """The licence of public weights, recognised by their name (in a path, the piece nearest to its end)."""
    last = max(LICENCES, key=name.lower().rfind)
    return LICENCES[last] if last in name.lower() else UNKNOWN_LICENCE


def build_network(
    config: Dust3rConfig, tensors: Mapping[str, Tensor], what: str, *, extras_allowed: bool = False
) -> Dust3r:
    """Put ``tensors`` (public names) into a network without copying them; CheckpointError names what does not fit.

    what: whose tensors they are, for the message: 'the checkpoint x.pth'.
    """
    tensors = normalise_names(tensors)
    with torch.device("meta"):
        network = Dust3r(config)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = [] if extras_allowed else sorted(tensors.keys() - expected.keys())
    if len(missing) > len(expected) // 2:
        raise CheckpointError(
            f"The weights of {what} are another model's ({some_of(sorted(tensors)) or 'none'}; {len(missing)} of the "
            f"{len(expected)} that were expected are missing); give weights of DUSt3R, MonST3R or MASt3R."
        )
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of the wrong shape": misshapen}
    found = [f"{problem}: {some_of(names)}" for problem, names in problems.items() if names]
    if found:
        raise CheckpointError(f"The weights of {what} do not fit its configuration ({'; '.join(found)}).")
    network.load_state_dict({key: tensors[key] for key in expected}, assign=True)
    return network.requires_grad_(False).eval()


def normalise_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop what is never read, resolve double names, and copy decoder 1 to decoder 2 where the file has one only."""
    named = {key: value for key, value in tensors.items() if not UNUSED.match(key) and not ALIAS.match(key)}
    for key, value in tensors.items():
        if alias := ALIAS.match(key):
            named.setdefault(f"{alias[1]}layer{int(alias[2]) + 1}_rn.{alias[3]}", value)
    if not any(key.startswith("dec_blocks2.") for key in named):
        prefix = "dec_blocks."
        named |= {"dec_blocks2." + k[len(prefix) :]: v for k, v in named.items() if k.startswith(prefix)}
    return named
