"""What is installed, what is missing and why: the first thing to look at when something does not work."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from importlib import metadata

from easi3r._version import __version__

REQUIRED = {  # distribution -> module
    "torch": "torch",
    "numpy": "numpy",
    "opencv-python": "cv2",
    "scipy": "scipy",
    "roma": "roma",
    "imageio": "imageio",
    "pillow": "PIL",
    "pyyaml": "yaml",
    "tqdm": "tqdm",
}
EXTRAS = {  # extra -> (distribution -> module, what it is for)
    "hub": ({"huggingface_hub": "huggingface_hub", "safetensors": "safetensors"}, "checkpoints from Hugging Face"),
    "video": ({"av": "av"}, "every video codec, exact time stamps (without it: OpenCV)"),
}


def report() -> str:
    """A text of a few lines: versions, device, extras."""
    lines = [
        f"easi3r {__version__}, Python {platform.python_version()} on {platform.platform()}",
        f"  {sys.executable}",
    ]
    lines.append("required:")
    lines += [f"  {_state(distribution, module)}" for distribution, module in REQUIRED.items()]
    lines.append("extras:")
    for extra, (packages, purpose) in EXTRAS.items():
        lines.append(f"  {extra}: {purpose}")
        for distribution, module in packages.items():
            state = _state(distribution, module)
            hint = f"; pip install 'easi3r[{extra}]'" if "missing" in state else ""
            lines.append(f"    {state}{hint}")
    lines += ["device:", *(f"  {line}" for line in _device())]
    return "\n".join(lines)


def _state(distribution: str, module: str) -> str:
    """'name version', or why it cannot be used; some packages fail at import with errors of every kind."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        return f"{distribution}: missing"
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        hint = (
            " (on a bare server: apt install libgl1, or pip install opencv-python-headless)"
            if "libGL" in reason
            else ""
        )
        return f"{distribution}: installed, but its import fails with {type(error).__name__}: {reason}{hint}"
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:
        return f"{distribution} {getattr(importlib.import_module(module), '__version__', '(version unknown)')}"


def _device() -> list[str]:
    try:
        import torch
    except Exception as error:
        return [f"unknown: torch cannot be imported ({type(error).__name__})"]
    lines = [f"cpu: {torch.get_num_threads()} threads on {os.cpu_count()} cores"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    else:
        built = torch.version.cuda
        lines.append(
            f"no GPU: this torch is built {f'for CUDA {built}, which finds no device' if built else 'for the CPU'}"
        )
    return lines
