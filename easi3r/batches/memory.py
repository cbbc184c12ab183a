"""The peak of what a process has held in memory, clip by clip."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_GIB = 1 << 30


def forget_peak(device: torch.device) -> None:
    """Measure anew from here on.  But on Linux, the peak stays that of the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if _RESET.exists():
        _RESET.write_text("5")


def peak_gib(device: torch.device) -> tuple[float, float | None]:
    """GiB on the host, and on the GPU (None without one)."""
    gpu = torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else None
    return _host_peak_gib(), gpu


def _host_peak_gib() -> float:
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
