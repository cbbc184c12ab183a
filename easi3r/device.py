"""The device that a network works on, and how it says that its memory is full."""

from __future__ import annotations

import torch

from easi3r.errors import InputError


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU where there is one; raises InputError for a device that torch cannot use here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch raises either for what it was built without
        reason = str(error).splitlines()[0][:120]
        raise InputError(
            f"The device {name!r} cannot be used ({reason}); expected auto, cpu, cuda or cuda:1."
        ) from error
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch (on either device), NumPy or OpenCV ran out of memory."""
    words = str(error).lower()
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(
        sign in words for sign in ("not enough memory", "can't allocate memory", "out of memory", "insufficient memory")
    )
