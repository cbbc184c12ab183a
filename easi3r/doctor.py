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
    "hub": ({"huggingface_hub": "huggingface_hub"}, "checkpoints from Hugging Face"),
    "video": ({"av": "av"}, "every video codec, exact time stamps (without it: OpenCV)"),
    "ray": ({"ray": "ray"}, "batches on a cluster (batch --engine ray)"),
    "raft": ({"torchvision": "torchvision"}, "optical flow by RAFT (flow=raft)"),
    "sam2": ({"sam2": "sam2"}, "masks refined by SAM 2 (refine=sam2)"),
}


def report() -> str:
    """A text of a few lines: versions, device, extras."""
    lines = [
        f"easi3r {__version__}, Python {platform.python_version()} on {platform.platform()}",
        f"  {sys.executable}",
    ]
    lines.append("required:")
    lines += [
        f"  {_state(distribution, module, f'pip install {distribution}')}" for distribution, module in REQUIRED.items()
    ]
    lines.append("extras:")
    for extra, (packages, purpose) in EXTRAS.items():
        lines.append(f"  {extra}: {purpose}")
        remedy = f"pip install 'easi3r[{extra}]'"
        lines += [f"    {_state(distribution, module, remedy)}" for distribution, module in packages.items()]
    lines += ["device:", *(f"  {line}" for line in _device())]
    return "\n".join(lines)


def _state(distribution: str, module: str, remedy: str) -> str:
    """'name version', or why it cannot be used and what to do."""
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # some packages fail at import with errors of their own kind
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            return f"{distribution}: missing; {remedy}"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        hint = (
            "; on a bare server: apt install libgl1, or pip install opencv-python-headless" if "libGL" in reason else ""
        )
        return f"{distribution}: installed, but cannot be imported ({reason}){hint}"
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:  # another distribution of the same module: opencv-python-headless
        return f"{distribution} {getattr(imported, '__version__', '(version unknown)')}"


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
