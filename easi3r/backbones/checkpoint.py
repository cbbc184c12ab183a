"""From files to a network: DUSt3R, MonST3R and MASt3R weights, loaded safely and checked by name.

Two layouts exist: ``NAME.pth`` (``{"args": Namespace(model="Class(...)"), "model": tensors}``) and a Hugging Face
folder (``config.json``, ``model.safetensors``), local or by hub id.  The constructor's text is parsed, never run.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from easi3r.backbones.configuration import parse_config, parse_constructor
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.backbones.safetensors import read_safetensors
from easi3r.errors import CheckpointError, MissingExtraError

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
        status = self.path.stat()
        return _hash_file(self.path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _hash_file(path: Path, size: int, modified_ns: int) -> str:
    """Once for all clips, as long as the file stays as it is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def load_checkpoint(name: str | Path) -> tuple[Dust3r, CheckpointInfo]:
    """Load a ``.pth`` file, a Hugging Face folder or a hub id; the network is in float32 on the CPU.

    Raises CheckpointError for a file that is missing, unsafe, of another model or incomplete, MissingExtraError when
    a package for its format is absent.
    """
    path, what = Path(name), f"the checkpoint {name}"
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
    network = build_network(parse_config(arguments, what), tensors, what)
    licence = arguments.get("license") or licence_of(str(name))
    return network.float(), CheckpointInfo(str(name), file, str(licence))


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


def _scalar_of(module: str) -> Callable[[np.dtype[Any], bytes], Any]:
    rebuild: Any = np.float64(0).__reduce__()[0]

    def scalar(dtype: np.dtype[Any], data: bytes) -> Any:
        return rebuild(dtype, data)

    scalar.__module__, scalar.__qualname__ = module, "scalar"  # the name that torch looks up
    return scalar


# A training file keeps its best score as a NumPy scalar; these few names rebuild one and can do nothing else.
SAFE_GLOBALS: list[Any] = [
    argparse.Namespace,
    *map(_scalar_of, ("numpy.core.multiarray", "numpy._core.multiarray")),  # written by NumPy 1, by NumPy 2
    np.dtype,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
]


def _read_pth(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Path]:
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle raises nearly anything
        unsafe = re.search(r"(?:GLOBAL|Trying to call reduce for unrecognized function) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise CheckpointError(
                f"The checkpoint {path} was not loaded, since it holds more than tensors and plain values "
                f"({unsafe[1]}) and could run code; expected a DUSt3R, MonST3R or MASt3R .pth file."
            ) from error
        raise CheckpointError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}); expected a .pth file written by "
            "torch.save, so see whether its download was complete."
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict) or "args" not in content:
        names = [str(key) for key in content] if isinstance(content, dict) else [type(content).__name__]
        raise CheckpointError(
            f"The checkpoint {path} is another model's (it holds {some_of(names)}); expected 'args' and 'model', "
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
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{config_file} is not JSON ({error}); expected the constructor's arguments.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file} holds a {type(config).__name__}; expected the constructor's arguments.")
    try:
        return config, read_safetensors(tensor_file), tensor_file
    except (ValueError, OSError) as error:
        raise CheckpointError(
            f"{tensor_file} cannot be read as safetensors ({error}); see whether its download was complete."
        ) from error


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
            f"There is no file or folder {hub_id!r}, and fetching it as a hub id failed ({reason[:200].rstrip('.')})."
        ) from error


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
