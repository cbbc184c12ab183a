"""What a clip will need, and how it is cut so that it fits: found from sizes alone, before any work."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from easi3r.config import Settings
from easi3r.cut import Cut, cut_clip
from easi3r.errors import InputError
from easi3r.pairs import make_pairs
from easi3r.passes import Passes

GIB = 1 << 30
SHARE = 0.7  # of the free memory that 'auto' allows itself
BASE_BYTES = 0.6 * GIB  # of a process that has imported torch and holds no clip
# Bytes per pixel, counted from the arrays that the stages hold at once.
CLIP_BYTES = 16  # images, score, mask, depth, confidence of every frame, whatever the pieces
PAIR_BYTES = 90  # of a directed pair: predictions in half precision, what the alignment makes of them, flow
FRAME_BYTES = 100  # of a frame that is being aligned: points, gradients, Adam's moments
DISK_BYTES = 12  # depth, confidence, score (float32 or 16 bit), PNGs
MAX_BATCH = {"cpu": 8, "cuda": 32}  # pairs, beyond which nothing gets faster
# Nanoseconds per pixel, about, as seen on two cores at 128 x 96: flow and residual per pair; the published objective
# per pair, iteration and core; the fast alignment per pair and core.
FLOW_NS, OBJECTIVE_NS, ALIGN_NS = 2000.0, 70.0, 2500.0
EFFICIENCY = 0.4  # of the rate of a large product that the network reaches, about (heads are not counted)


@dataclass(frozen=True)
class Plan(Cut):
    """How a clip is worked on, and what that costs, about."""

    device_bytes: float  # on the network's device, weights included
    host_bytes: float  # 0 where that device is the CPU
    disk_bytes: float
    seconds: float
    at_once: str  # in words, what goes through the network together

    @property
    def cut(self) -> Cut:
        """Without its costs."""
        return Cut(self.pieces, self.batch_size)

    def __str__(self) -> str:
        in_pieces = (
            f"{len(self.pieces)} pieces of {len(self.pieces[0])} frames" if len(self.pieces) > 1 else "one piece"
        )
        host = f" there and {self.host_bytes / GIB:.1f} GiB on the host" if self.host_bytes else ""
        return (
            f"needs about {self.device_bytes / GIB:.1f} GiB of memory{host}, {self.disk_bytes / GIB:.2f} GiB on disk "
            f"and {_duration(self.seconds)} ({in_pieces}, {self.at_once} at once)"
        )


def make_plan(passes: Passes, size: tuple[int, int, int], settings: Settings, *, masks_only: bool) -> Plan:
    """The longest pieces and the largest batches that stay within ``settings.memory``.

    size: frames, height and width of the clip.  Raises InputError if even the shortest pieces exceed a
    limit that was given.
    """
    num_frames, height, width = size
    network = passes.network
    device, divisible = network.device, settings.pairs.graph != "reference"  # which pairs one frame with all others
    limit = settings.pieces.frames if divisible else num_frames
    budget = allowed_bytes(settings.memory, device)
    overlap = settings.pieces.overlap
    rate = EFFICIENCY * product_rate(device, network.dtype)
    at_most = MAX_BATCH.get(device.type, 8)
    batch_size = at_most if settings.batch_size == "auto" else settings.batch_size
    while True:
        pieces = cut_clip(num_frames, limit, overlap)
        plan = _costs(passes, pieces, batch_size, size, settings, rate, masks_only=masks_only)
        if plan.device_bytes <= budget:
            return plan
        if settings.batch_size == "auto" and batch_size > 1:
            batch_size //= 2
        elif divisible and len(pieces[0]) > 2 * overlap:
            limit = max(2 * overlap, len(pieces[0]) * 3 // 4)
        elif settings.memory == "auto":
            return plan  # an estimate is no reason to refuse
        else:
            raise InputError(
                f"The memory was limited to {settings.memory:g} GiB, but {len(pieces[0])} frames of {width}x{height} "
                f"pixels need about {plan.device_bytes / GIB:.1f}; allow more, or choose a smaller image_size."
            )


def smaller(plan: Cut, settings: Settings) -> Settings:
    """Settings whose plan needs about half of what ``plan`` did."""
    frames = max(2 * settings.pieces.overlap, len(plan.pieces[0]) // 2)
    pieces = dataclasses.replace(settings.pieces, frames=frames)
    return dataclasses.replace(settings, pieces=pieces, batch_size=max(1, plan.batch_size // 2), offload=True)


def allowed_bytes(memory: float | str, device: torch.device) -> float:
    """Bytes on ``device`` that the work may take."""
    if memory != "auto":
        return float(memory) * GIB
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return SHARE * free + torch.cuda.memory_allocated(device)
    return SHARE * free_host_bytes()


def free_host_bytes() -> float:
    """What this process may still take: the machine's free memory, or what its control group leaves."""
    free = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    information = Path("/proc/meminfo")
    if information.is_file():
        lines = dict(line.split(":", 1) for line in information.read_text().splitlines())
        free = 1024.0 * int(lines["MemAvailable"].split()[0])
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        files = [Path("/sys/fs/cgroup") / name for name in (limit, used)]
        if all(file.is_file() for file in files):
            most, taken = (file.read_text().strip() for file in files)
            free = free if most == "max" else min(free, float(most) - float(taken))
    return free


def _costs(
    passes: Passes,
    pieces: tuple[range, ...],
    batch_size: int,
    size: tuple[int, int, int],
    settings: Settings,
    rate: float,
    *,
    masks_only: bool,
) -> Plan:
    """rate: floating-point operations per second."""
    num_frames, height, width = size
    pixels, length, network = height * width, len(pieces[0]), passes.network
    pairs = len(make_pairs(length, settings.pairs))
    weights = float(sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()))
    if network.device.type == "cuda":  # with whatever else is there already, the same weights in float32 above all
        weights = float(torch.cuda.memory_allocated(network.device))
    load = passes.load((length, height, width), pairs, batch_size, settings, masks_only=masks_only)
    aligning = 0 if masks_only else pixels * (PAIR_BYTES * pairs + FRAME_BYTES * length)
    clip = CLIP_BYTES * pixels * num_frames
    seconds = (num_frames * load.frame_flops + len(pieces) * load.pass_flops) / rate
    cores = max(1, torch.get_num_threads())
    seconds += len(pieces) * pairs * pixels * FLOW_NS * 1e-9
    if not masks_only and settings.alignment.method != "none":
        published = settings.alignment.iterations * OBJECTIVE_NS
        per_pixel = published if settings.alignment.method == "published" else ALIGN_NS
        seconds += len(pieces) * pairs * pixels * per_pixel * 1e-9 / cores
    on_device, on_host = weights + load.activation_bytes + load.kept_bytes, BASE_BYTES + clip + aligning
    if settings.alignment.method == "published" and network.device.type != "cpu":  # it works where the network does
        on_device += aligning
    if settings.offload:
        on_host += load.token_bytes
    else:
        on_device += load.token_bytes
    disk = DISK_BYTES * pixels * num_frames
    if network.device.type == "cpu":
        return Plan(pieces, batch_size, on_device + on_host, 0, disk, seconds, load.at_once)
    return Plan(pieces, batch_size, on_device, on_host, disk, seconds, load.at_once)


@functools.cache
def product_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations per second of a large matrix product, measured once (takes hundredths of a second)."""
    a = torch.ones(size, size, device=device, dtype=dtype)

    def seconds() -> float:
        begin = time.perf_counter()
        (a @ a).sum().item()
        return time.perf_counter() - begin

    seconds()
    return 2.0 * size**3 / min(seconds() for _ in range(3))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
