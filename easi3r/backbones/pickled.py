"""Tensors in the files of ``torch.save``: nothing in them is run, and a small file does not fill the memory."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from easi3r.backbones.safetensors import NAMES
from easi3r.untrusted import check_regular

MAX_PICKLE = 1 << 26  # bytes of the part of an archive that is no tensor: names, shapes, plain values
_SHARED = 4  # times that the same bytes may be used: some tensors have two names


def load_pickled(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """What the file holds, tensors mapped into memory; of other objects only plain values and those ``allowed``.

    A damaged or unsafe file makes torch raise nearly anything.  Raises ValueError, saying why, for an archive that
    unpacks to more than it is, and for tensors that are not plain numbers in this file.
    """
    check_regular(path)
    zipped = zipfile.is_zipfile(path)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("its parts are compressed, as torch never does")
                if entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE:
                    raise ValueError(f"{entry.filename} is larger than {MAX_PICKLE >> 20} MiB")
    with torch.serialization.safe_globals(list(allowed)):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def tensors_of(table: Mapping[Any, Any], size: int) -> dict[str, Tensor]:
    """The tensors in ``table`` by name; ValueError unless they are plain numbers that fit in a file of ``size`` bytes.

    Tensors may claim to be larger than what they are made from: steps of 0 repeat one number for ever.
    """
    tensors = {key: value for key, value in table.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for name, value in tensors.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in NAMES:
            raise ValueError(f"{name[:80]} is {value.dtype} on {value.device.type}, no dense table of numbers")
    if sum(value.numel() * value.element_size() for value in tensors.values()) > _SHARED * size:
        raise ValueError("its tensors are larger than the file")
    return tensors


def text_keys(content: Any) -> list[str]:
    """What to name of something that is no such table: its keys that are text, else its type."""
    return [key for key in content if isinstance(key, str)] if isinstance(content, dict) else [type(content).__name__]
