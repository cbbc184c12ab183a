"""Tensor files in the safetensors format: a length, a JSON header, raw values.  No code can hide in them.

Read and written here so that training and the bundled weights need torch and NumPy alone.  The format:
https://huggingface.co/docs/safetensors, checked against its own package in the tests.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 1 << 24  # bytes: a hundred times what any network of these families needs
MAX_SIDES = 16


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, mapped into memory and read as they are used; writing to one leaves the file alone.

    Raises ValueError, saying what is wrong, for anything but a whole file of this format; OSError as usual.
    """
    content = np.memmap(path, dtype=np.uint8, mode="c") if path.stat().st_size else np.empty(0, np.uint8)
    if len(content) < 8:
        raise ValueError("the file ends within its first 8 bytes")
    (length,) = struct.unpack("<Q", content[:8].tobytes())
    if length > min(MAX_HEADER, len(content) - 8):
        raise ValueError(f"its header should take {length} bytes, the file has {len(content)}")
    try:
        header = json.loads(content[8 : 8 + length].tobytes())
    except (ValueError, RecursionError) as error:
        raise ValueError("its header is not JSON") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a table of tensors")
    values = torch.from_numpy(content[8 + length :])
    tensors = {name: _tensor(name, entry, values) for name, entry in header.items() if name != "__metadata__"}
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > len(values):
        raise ValueError("its tensors lie on top of each other")
    return tensors


def _tensor(name: str, entry: Any, values: Tensor) -> Tensor:
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = (*shape, begin, end)
        whole = len(shape) <= MAX_SIDES and all(type(number) is int and 0 <= number < 1 << 48 for number in numbers)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header does not say what {name[:80]!r} is") from error
    if not whole or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"shape and place of {name[:80]!r} do not agree")
    if end > len(values):
        raise ValueError(f"it ends before {name[:80]!r} does")
    raw = values[begin:end]
    if raw.data_ptr() % dtype.itemsize:  # not aligned, as the format allows
        raw = raw.clone()
    return raw.view(dtype).view(shape)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` to ``path``, which appears whole or not at all."""
    header: dict[str, Any] = {}
    offset = 0
    for name, value in tensors.items():
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # values begin on a multiple of 8 bytes
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for value in tensors.values():
            file.write(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    temporary.replace(path)
