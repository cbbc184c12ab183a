"""Weights on disk or on the hub, read safely: what a file holds, before anybody asks what network it is for."""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from easi3r.backbones.pickled import load_pickled, tensors_of
from easi3r.backbones.safetensors import read_safetensors
from easi3r.errors import CheckpointError, MissingExtraError
from easi3r.untrusted import read_bytes

CONFIG, TENSORS = "config.json", "model.safetensors"
MAX_CONFIG = 1 << 20  # bytes


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

    def describe(self) -> dict[str, str | None]:
        """For ``meta`` of a result."""
        return {"name": self.name, "sha256": self.sha256(), "licence": self.licence}


@functools.lru_cache(maxsize=8)
def _hash_file(path: Path, size: int, modified_ns: int) -> str:
    """Once for all clips, as long as the file stays as it is."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Weights:
    """What was found under a name."""

    table: Mapping[str, Any]  # of a file of torch: whatever it holds; else tensors by name
    file: Path  # that holds the tensors
    folder: Path | None = None  # a Hugging Face folder, whose config.json may say more


def read_weights(name: str | Path) -> Weights:
    """Of a ``.pth``, ``.pt`` or ``.safetensors`` file, a folder, or a hub id; tensors are mapped, and read when used.

    Raises CheckpointError for what is missing, damaged or unsafe, MissingExtraError where a package is absent.
    """
    path = Path(name)
    if path.is_file():
        return Weights(_read_file(path), path)
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) or path.suffix in SUFFIXES or path.parent.is_dir():
            raise CheckpointError(
                f"There is no checkpoint at {str(name)!r}; expected a .pth, .pt or .safetensors file, a folder with "
                "model.safetensors, or a hub id such as naver/DUSt3R_ViTLarge_BaseDecoder_512_dpt or facebook/VGGT-1B."
            )
        path = _download(str(name))
    found = [path / TENSORS] if (path / TENSORS).is_file() else sorted(path.glob("*.pt"))
    if not found:
        for lacking in (CONFIG, TENSORS):
            if not (path / lacking).is_file():
                raise CheckpointError(f"The folder {path} has no {lacking}; expected {CONFIG} and {TENSORS}.")
    return Weights(_read_file(found[0]), found[0], path)


def read_config_json(folder: Path) -> dict[str, Any]:
    """The constructor's arguments; CheckpointError where there are none."""
    config_file = folder / CONFIG
    if not config_file.is_file():
        raise CheckpointError(f"The folder {folder} has no {CONFIG}; expected {CONFIG} and {TENSORS}.")
    try:
        config = json.loads(read_bytes(config_file, MAX_CONFIG))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{config_file} is not JSON ({str(error)[:120]}); expected the constructor's arguments."
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{config_file} holds a {type(config).__name__}; expected the constructor's arguments.")
    return config


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    shown = ", ".join(name[:100] for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


SUFFIXES = (".pth", ".pt", ".safetensors")


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


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        try:
            return read_safetensors(path)
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({error}); see whether its download was complete."
            ) from error
    try:
        content = load_pickled(path, SAFE_GLOBALS)
    except Exception as error:  # a damaged pickle raises nearly anything
        unsafe = re.search(r"(?:GLOBAL|Trying to call reduce for unrecognized function) (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise CheckpointError(
                f"The checkpoint {path} was not loaded, since it holds more than tensors and plain values "
                f"({unsafe[1]}) and could run code; expected weights of DUSt3R, MonST3R, MASt3R or VGGT."
            ) from error
        raise CheckpointError(_unreadable(path, type(error).__name__)) from error
    return content if isinstance(content, dict) else {type(content).__name__: content}


def plain_tensors(table: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The tensors of a table by name; CheckpointError where they are no plain numbers, or larger than their file."""
    try:
        return tensors_of(table, file.stat().st_size)
    except ValueError as error:
        raise CheckpointError(_unreadable(file, str(error))) from error


def _unreadable(path: Path, reason: str) -> str:
    return (
        f"The checkpoint {path} cannot be read ({reason}); expected a file written by torch.save, so see whether its "
        "download was complete."
    )


def _download(hub_id: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingExtraError(
            f"Fetching {hub_id} needs the package huggingface_hub: pip install 'easi3r[hub]'."
        ) from error
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=[CONFIG, TENSORS]))
        if (folder / TENSORS).is_file():
            return folder
        return Path(snapshot_download(hub_id, allow_patterns=["*.pt"]))  # some of VGGT's have nothing else
    except Exception as error:  # the hub's client raises errors of several libraries: network, authorisation, cache
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"There is no file or folder {hub_id!r}, and fetching it as a hub id failed ({reason[:200].rstrip('.')})."
        ) from error
