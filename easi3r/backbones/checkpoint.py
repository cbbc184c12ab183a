"""From files to a network: DUSt3R, MonST3R and MASt3R weights, loaded safely and checked by name.

Two layouts exist: ``NAME.pth`` (``{"args": Namespace(model="Class(...)"), "model": tensors}``) and a Hugging Face
folder (``config.json``, ``model.safetensors``), local or by hub id.  The constructor's text is parsed, never run.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.backbones.heads import HEADS
from easi3r.errors import CheckpointError, MissingExtraError

MODEL_CLASSES = ("AsymmetricCroCo3DStereo", "AsymmetricMASt3R")

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
UNKNOWN_LICENCE = "unknown: see where you got the weights from"


@dataclass(frozen=True)
class CheckpointInfo:
    """Where weights came from."""

    name: str  # as given by the user
    path: Path | None  # the file that holds the tensors; None for a network object
    licence: str

    def sha256(self) -> str | None:
        """Hash of the tensor file, None for a network object."""
        if self.path is None:
            return None
        digest = hashlib.sha256()
        with self.path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()


def load_checkpoint(name: str | Path) -> tuple[Dust3r, CheckpointInfo]:
    """Load a ``.pth`` file, a Hugging Face folder or a hub id; the network is in float32 on the CPU.

    Raises CheckpointError for a file that is missing, unsafe, of another model or incomplete, MissingExtraError when
    a package for its format is absent.
    """
    path = Path(name)
    if path.is_dir():
        arguments, tensors, file = _read_folder(path)
    elif path.is_file():
        arguments, tensors, file = _read_pth(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and path.suffix != ".pth" and not path.parent.is_dir():
        arguments, tensors, file = _read_folder(_download(str(name)))
    else:
        raise CheckpointError(
            f"There is no checkpoint at {str(name)!r}; expected a .pth file, a folder with config.json and "
            "model.safetensors, or a hub id such as naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt."
        )
    network = build_network(parse_config(arguments, str(name)), tensors, str(name))
    licence = arguments.get("license") or licence_of(str(name))
    return network.float(), CheckpointInfo(str(name), file, str(licence))


def licence_of(name: str) -> str:
    """The licence of public weights, recognised by their name."""
    lowered = name.lower()
    matches = [licence for key, licence in LICENCES.items() if key in lowered]
    return matches[0] if matches else UNKNOWN_LICENCE


def build_network(
    config: Dust3rConfig, tensors: Mapping[str, Tensor], name: str, *, extras_allowed: bool = False
) -> Dust3r:
    """Put ``tensors`` (public names) into a network without copying them; CheckpointError names what does not fit."""
    tensors = normalise_names(tensors)
    with torch.device("meta"):
        network = Dust3r(config)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys())
    unexpected = [] if extras_allowed else sorted(tensors.keys() - expected.keys())
    if len(missing) > len(expected) // 2:
        raise CheckpointError(
            f"{name} holds another model's weights (it has {some_of(unexpected)}, and {len(missing)} of DUSt3R's "
            f"{len(expected)} tensors are missing); expected a DUSt3R, MonST3R or MASt3R checkpoint."
        )
    misshapen = [
        f"{key} {tuple(tensors[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    problems = [("lacks tensors", missing), ("has unexpected tensors", unexpected), ("has wrong shapes", misshapen)]
    found = [f"{what}: {some_of(names)}" for what, names in problems if names]
    if found:
        raise CheckpointError(f"The checkpoint {name} {', and '.join(found)}; it does not fit its own configuration.")
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


def parse_constructor(text: str) -> dict[str, Any]:
    """Keyword arguments of ``Class(a=1, b=('exp', -inf, inf))`` as plain values; nothing is evaluated.

    >>> parse_constructor("AsymmetricMASt3R(depth_mode=('exp', -inf, inf), enc_depth=24)")["enc_depth"]
    24
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"The model's constructor text {text[:80]!r} is not a constructor call.") from error
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in MODEL_CLASSES:
        raise CheckpointError(
            f"The checkpoint is of another model ({text[:80]!r}); expected {' or '.join(MODEL_CLASSES)}."
        )
    return {keyword.arg: _literal(keyword.value) for keyword in call.keywords if keyword.arg}


def parse_config(arguments: Mapping[str, Any], name: str) -> Dust3rConfig:
    """Turn constructor arguments (or config.json) into a Dust3rConfig; CheckpointError says what is unsupported."""
    known = {field.name for field in fields(Dust3rConfig)}
    values = {key: value for key, value in arguments.items() if key in known}
    try:
        size = arguments.get("img_size", (512, 512))
        height, width = (size, size) if isinstance(size, int) else size
        values["img_size"] = (int(height), int(width))
        values["rope_base"] = float(_matched(r"RoPE([\d.]+)", arguments.get("pos_embed", "RoPE100")))
        values["head_type"] = _matched(r"(linear|dpt)", str(arguments.get("head_type", "")).replace("catmlp+", ""))
        _matched(r"(pts3d)", str(arguments.get("output_mode", "pts3d")).partition("+")[0])
        _matched(r"(PatchEmbedDust3R|ManyAR_PatchEmbed)", arguments.get("patch_embed_cls", "PatchEmbedDust3R"))
        depth_mode = _range_mode(arguments.get("depth_mode", ("exp", -math.inf, math.inf)))
        if depth_mode != (-math.inf, math.inf):
            raise ValueError(f"depth_mode with limits {depth_mode}")
        values["conf_range"] = _range_mode(arguments.get("conf_mode", ("exp", 1, math.inf)))
        for key in known & values.keys() - {"img_size", "rope_base", "head_type", "conf_range"}:
            if type(values[key]) is not int or not 0 < values[key] <= 1 << 16:
                raise ValueError(f"{key}={values[key]!r}")
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The configuration of {name} is not one this network has: {error}.") from error
    if values["head_type"] not in HEADS:
        raise CheckpointError(f"The configuration of {name} names the head {values['head_type']!r}.")
    return Dust3rConfig(**values)


def _matched(pattern: str, text: Any) -> str:
    match = re.fullmatch(pattern, str(text))
    if match is None:
        raise ValueError(f"{text!r} where {pattern} was expected")
    return match[1]


def _range_mode(mode: Any) -> tuple[float, float]:
    kind, low, high = mode
    if kind != "exp":
        raise ValueError(f"mode {kind!r} where 'exp' was expected")
    return float(low), float(high)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_literal(node.operand)
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_literal(item) for item in node.elts)
    if isinstance(node, ast.Constant):
        return node.value
    raise CheckpointError(f"The model's constructor text holds {ast.unparse(node)[:60]!r}; expected plain values.")


def _read_pth(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    # a training file keeps its best score as a NumPy scalar; these few names rebuild one and can do nothing else
    scalar = np.float64(0).__reduce__()[0]
    safe: list[Any] = [argparse.Namespace, scalar, np.dtype, type(np.dtype(np.float64)), type(np.dtype(np.float32))]
    try:
        with torch.serialization.safe_globals(safe):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"The checkpoint {path} holds more than tensors and plain values and was not loaded, since unpickling it "
            "could run code; expected a DUSt3R, MonST3R or MASt3R .pth file."
        ) from error
    except (RuntimeError, OSError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({str(error).splitlines()[0][:120]}); "
            "expected a .pth file written by torch.save."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "args" not in content:
        names = [str(key) for key in content] if isinstance(content, dict) else [type(content).__name__]
        raise CheckpointError(
            f"{path} is another model's checkpoint (it holds {some_of(names)}); expected 'args' and 'model', "
            "as in DUSt3R, MonST3R and MASt3R files."
        )
    tensors = {str(k): v for k, v in content["model"].items() if isinstance(v, Tensor)}
    return parse_constructor(str(getattr(content["args"], "model", content["args"]))), tensors, path


def _read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    config_file, tensor_file = folder / "config.json", folder / "model.safetensors"
    for file in (config_file, tensor_file):
        if not file.is_file():
            raise CheckpointError(
                f"The folder {folder} has no {file.name}; expected config.json and model.safetensors."
            )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file} holds a {type(config).__name__}; expected the constructor's arguments.")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingExtraError(
            "Reading model.safetensors needs the package safetensors: pip install 'easi3r[hub]'."
        ) from error
    try:
        return config, load_file(tensor_file), tensor_file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{tensor_file} cannot be read as safetensors: {error}.") from error


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"Fetching {hub_id} needs the package huggingface_hub: pip install 'easi3r[hub]'."
        ) from error
    try:
        return Path(snapshot_download(hub_id, allow_patterns=["config.json", "model.safetensors"]))
    except Exception as error:  # the hub's client raises errors of several libraries: network, authorisation, cache
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"There is no file or folder {hub_id!r}, and fetching it as a hub id failed: {reason[:200]}"
        ) from error


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
