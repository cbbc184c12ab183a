"""What the work costs on this machine: operations, bytes, seconds, beside a twin that works as the published code does.

The twin (``published_twin.py``) encodes both frames of every pair anew in both passes, writes every N x N attention
matrix out (self and cross) and keeps a copy, runs both heads in both passes, and takes the pairs one at a time in
float32.  Weights are random unless a checkpoint is given: the cost does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from easi3r.attention_maps import AttentionStatistics
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig, seeing_pairs
from easi3r.config import PairSettings, Settings
from easi3r.demo.rendering import render
from easi3r.demo.worlds import FAMILIES, make_world
from easi3r.dynamic_masks import AT_THE_LIMIT, cluster_tokens, in_close_calls, make_masks, motion_score
from easi3r.epipolar import epipolar_excess
from easi3r.flow import estimate_flow
from easi3r.inference import empty_predictions, encode_frames, observe_pairs
from easi3r.model import Easi3R
from easi3r.pairs import make_pairs
from easi3r.plan import MAX_BATCH, product_rate
from easi3r.precision import choose_dtype, in_precision
from easi3r.progress import silent
from easi3r.structures import DynamicMasks
from evaluation.published_twin import published_style, twin_pair

Array = NDArray[Any]
CLIP_SEED = 2000
SECTIONS = ("counts", "time", "precision", "memory")


def ours(network: Dust3r, images: Array, pairs: Array, moving: Array, batch_size: int) -> None:
    """Both passes with heads in the second, as ``Easi3R.reconstruct`` runs them; the masks are given."""
    n, height, width = images.shape[:3]
    grid = network.grid_of(height, width)
    tokens = encode_frames(network, images, batch_size, silent)
    for cut, predictions in ((None, None), (moving, empty_predictions(pairs, height, width))):
        folded = AttentionStatistics(n, grid)
        observe_pairs(
            *(network, tokens, pairs, grid, folded.update, silent),
            batch_size=batch_size,
            dynamic_tokens=cut,
            predictions=predictions,
        )
        folded.maps()


# --- the sections --------------------------------------------------------------------------------------------------


def counts(config: Dust3rConfig, size: tuple[int, int], frames: int) -> dict[str, float]:
    """Exact, on tensors without content."""
    (width, height), pairs = size, make_pairs(frames, PairSettings())
    with torch.device("meta"):
        network = Dust3r(config).requires_grad_(False)
    grid = network.grid_of(height, width)
    n_tokens = math.prod(grid)
    image = torch.empty(1, 3, height, width, device="meta")
    tokens = torch.empty(1, n_tokens, config.enc_embed_dim, device="meta")
    decoded = network.decode(tokens, tokens, grid)

    def flop(work: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        return float(counter.get_total_flops())

    encode, attend = flop(lambda: network.encode(image)), flop(lambda: network.attend(tokens, tokens, grid))
    decode, predict = flop(lambda: network.decode(tokens, tokens, grid)), flop(lambda: network.predict(decoded))
    cut = 4.0 * config.dec_depth * n_tokens**2 * config.dec_embed_dim  # decoder 1 attends twice
    published = 2 * len(pairs) * flop(lambda: network(image, image))
    both = frames * encode + len(pairs) * (attend + decode + cut + predict)
    masks = frames * encode + len(pairs) * (2 * attend + cut)
    channels = config.dec_depth * config.dec_num_heads
    kept = 2 * 2 * 4.0 * frames * n_tokens * channels  # mean and squares, source and reference, float32
    return {
        f"TFLOP of both passes, {frames} frames, {len(pairs)} pairs": both / 1e12,
        "... over the published way": both / published,
        "TFLOP of pass 1 per directed pair, without the encoder": attend / 1e12,
        "masks alone over both passes with heads": masks / both,
        "statistics per pair over the cross-attention's N x N maps": kept / len(pairs) / (8.0 * channels * n_tokens**2),
    }


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds, by the device's own clock where it has one."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize(device)
        return float(begin.elapsed_time(end)) / 1e3
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def times(
    network: Dust3r, size: tuple[int, int], frames: int, runs: int, twin_pairs: int, dtypes: Sequence[torch.dtype]
) -> dict[str, float]:
    """Both passes, interleaved with the twin on ``twin_pairs`` random pairs per pass, scaled to all of them."""
    (width, height), device, dice = size, network.device, np.random.default_rng(0)
    images = dice.integers(0, 255, (frames, height, width, 3), dtype=np.uint8)
    pairs, grid = make_pairs(frames, PairSettings()), network.grid_of(height, width)
    moving = dice.random((frames, *grid)) < 0.1
    twin, batch = published_style(network), MAX_BATCH.get(device.type, 8)
    networks = {dtype: in_precision(network, dtype) for dtype in dtypes}
    chosen = pairs[dice.choice(len(pairs), min(twin_pairs, len(pairs)), replace=False)]
    flat = torch.from_numpy(moving).flatten(1).to(device)

    def run_twin() -> None:
        for a, b in chosen.tolist():
            twin_pair(twin, images, (a, b), None)
            twin_pair(twin, images, (a, b), ~flat[a][None, :, None] & flat[b][None, None])

    seconds: dict[str, list[float]] = {name: [] for name in ("twin", *map(str, dtypes))}
    if device.type == "cuda":  # warm-up
        run_twin()
        for same in networks.values():
            ours(same, images, pairs, moving, batch)
    result: dict[str, float] = {}
    for _ in range(runs):
        seconds["twin"].append(timed(run_twin, device) * len(pairs) / len(chosen))
        for dtype, same in networks.items():
            seconds[str(dtype)].append(timed(lambda same=same: ours(same, images, pairs, moving, batch), device))  # type: ignore[misc]
    published = statistics.median(seconds["twin"])
    result[f"seconds of both passes, {frames} frames, {len(pairs)} pairs: twin (float32)"] = published
    flop = counts(network.config, size, frames)[f"TFLOP of both passes, {frames} frames, {len(pairs)} pairs"] * 1e12
    for dtype in dtypes:
        mine, name = statistics.median(seconds[str(dtype)]), str(dtype).removeprefix("torch.")
        rate = product_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
        result[f"seconds, ours in {name}"] = mine
        result[f"... times faster than the twin, {name}"] = published / mine
        result[f"... frames per second, {name}"] = frames / mine
        result[f"... of this machine's rate for large products, {name}"] = flop / mine / rate
    if device.type == "cuda":
        result |= peak_on_gpu(networks[dtypes[0]], twin, size, chosen[0].tolist())
    return result


def peak_on_gpu(network: Dust3r, twin: Dust3r, size: tuple[int, int], pair: list[int]) -> dict[str, float]:
    """GiB at most, weights included: 60 and 300 frames with the pairs around one of them; one pair of the twin."""
    (width, height), device, result = size, network.device, {}
    for frames in (60, 300):
        images = np.zeros((frames, height, width, 3), np.uint8)
        pairs = make_pairs(frames, PairSettings())
        torch.cuda.reset_peak_memory_stats(device)
        ours(network, images, pairs, np.ones((frames, *network.grid_of(height, width)), bool), MAX_BATCH["cuda"])
        result[f"GiB of GPU memory at most, {frames} frames"] = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    twin_pair(twin, np.zeros((max(pair) + 1, height, width, 3), np.uint8), (pair[0], pair[1]), None)
    result["GiB of GPU memory at most, twin, one pair, nothing kept"] = torch.cuda.max_memory_allocated(device) / 2**30
    return result


def two_passes(network: Dust3r, images: Array, labels: Array, excess: Array | None) -> tuple[Array, Tensor]:
    """Masks [n, H, W] and points of both passes, clusters given; without excess by the published rule."""
    n, height, width = images.shape[:3]
    pairs, patch = make_pairs(n, PairSettings()), network.config.patch_size
    predictions = empty_predictions(pairs, height, width, torch.float32)
    tokens, moving = encode_frames(network, images, 8, silent), None
    for number in (1, 2):
        folded = AttentionStatistics(n, labels.shape[1:])
        observe_pairs(
            *(network, tokens, pairs, labels.shape[1:], folded.update, silent),
            batch_size=8,
            dynamic_tokens=moving,
            predictions=predictions if number == 2 else None,
        )
        masks = make_masks(folded.maps().dynamic_map, labels, patch)
        if excess is not None:
            score = in_close_calls(motion_score(excess, images), masks.score)
            masks = DynamicMasks(score, score > AT_THE_LIMIT, AT_THE_LIMIT)
        moving = masks.tokens(patch)
    return masks.mask, torch.cat([predictions.points_first, predictions.points_second])


@torch.inference_mode()
def precision(checkpoint: str, clips: int, frames: int, dtype: torch.dtype) -> dict[str, float]:
    """Masks and points in low precision against float32 on held-out clips, the clusters of float32 given."""
    model = Easi3R.from_pretrained(checkpoint, device="cpu")
    exact, rounded = (in_precision(seeing_pairs(model.network), kind) for kind in (torch.float32, dtype))
    overlaps: dict[str, list[float]] = {"default": [], "published rule": []}
    errors = []
    for seed in range(CLIP_SEED, CLIP_SEED + clips):
        images = render(make_world(seed, FAMILIES["sharp"], num_frames=frames)).images
        grid, pairs = exact.grid_of(*images.shape[1:3]), make_pairs(frames, PairSettings())
        tokens = encode_frames(exact, images, 8, silent)
        labels = cluster_tokens(tokens, Settings().motion.clusters, 0).reshape(-1, *grid)
        least = Settings().motion.min_motion * max(images.shape[1:3])
        flow = estimate_flow(images, pairs, Settings().flow, silent)
        excess = epipolar_excess(flow, frames, least, silent)
        for name, evidence in (("published rule", None), ("default", excess)):
            (mask, points), (low_mask, low_points) = (
                two_passes(network, images, labels, evidence) for network in (exact, rounded)
            )
            union = (mask | low_mask).sum()
            overlaps[name].append(float((mask & low_mask).sum() / union) if union else 1.0)
        errors.append(float(((points - low_points).norm(dim=-1) / points.norm(dim=-1)).median()))
    result = {}
    for name, values in overlaps.items():
        result[f"mask IoU, {dtype} against float32, {name}: mean of {clips} clips"] = statistics.mean(values)
        result[f"... {name}: median"], result[f"... {name}: lowest"] = statistics.median(values), min(values)
    return result | {"relative error of the points, median, mean of the clips": statistics.mean(errors)}


MEMORY_RUN = """
import resource, sys
import numpy as np
from easi3r import Easi3R
frames, iterations = int(sys.argv[1]), int(sys.argv[2])
dice = np.random.default_rng(0)
still = dice.integers(0, 255, (96, 128 + frames, 3), dtype=np.uint8)
clip = np.stack([still[:, i : i + 128] for i in range(frames)])
scene = Easi3R.from_pretrained("demo", device="cpu").reconstruct(clip, **{"alignment.iterations": iterations})
assert scene.num_frames == frames and np.isfinite(scene.depth).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(lengths: Sequence[int], iterations: int) -> dict[str, float]:
    """Peak GiB of a process of its own that reconstructs so many frames with the bundled checkpoint on the CPU."""
    result = {}
    for frames in lengths:
        command = [sys.executable, "-c", MEMORY_RUN, str(frames), str(iterations)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        kib = int(done.stdout.split()[-1]) / (1024 if sys.platform == "darwin" else 1)
        result[f"GiB of host memory at most, bundled checkpoint, {frames} frames"] = kib / 2**20
    values = list(result.values())
    if len(values) > 1:
        result[f"... growth from {lengths[0]} to {lengths[-1]} frames"] = values[-1] / values[0] - 1
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m evaluation benchmark", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", help="weights for counts and times (default: the large public shape, random)")
    add("--size", default="512x288", help="of the frames for counts and times (default: 512x288)")
    add("--frames", type=int, default=12, help="of the timed clip, and of those for precision (default: 12)")
    add("--runs", type=int, default=3, help="interleaved; the median counts (default: 3)")
    add("--twin-pairs", type=int, default=6, help="on which the twin is timed, per pass (default: 6)")
    add("--dtypes", default="auto,float32", help="of our runs (default: auto,float32)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--clips", type=int, default=20, help="for the comparison of precisions (default: 20)")
    add("--lengths", default="300,1000", help="of the clips whose peak memory is measured (default: 300,1000)")
    add("--iterations", type=int, default=3, help="of their alignment, which take no memory (default: 3)")
    add("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    add("--json", type=Path, help="also write every number to this file")
    options = parser.parse_args(arguments)
    if unknown := set(options.only.split(",")) - set(SECTIONS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; expected some of {', '.join(SECTIONS)}")
    width, height = (int(side) for side in options.size.split("x"))
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    result: dict[str, dict[str, float]] = {}

    def section(name: str, measure: Callable[[], dict[str, float]]) -> None:
        if name in options.only.split(","):
            result[name] = measure()
            print(f"\n{name}")
            for what, value in result[name].items():
                print(f"  {what:84s}{value:12.4f}", flush=True)

    def network() -> Dust3r:
        if options.checkpoint:
            return seeing_pairs(Easi3R.from_pretrained(options.checkpoint, device=options.device).network)
        torch.manual_seed(0)
        with device:
            return Dust3r(Dust3rConfig()).requires_grad_(False).eval()

    def measure_times() -> dict[str, float]:
        one = network()
        dtypes = list(dict.fromkeys(choose_dtype(name, one) for name in options.dtypes.split(",")))
        return times(one, (width, height), options.frames, options.runs, options.twin_pairs, dtypes)

    config = Easi3R.from_pretrained(options.checkpoint).network.config if options.checkpoint else Dust3rConfig()
    section("counts", lambda: counts(config, (width, height), 30))
    section("time", measure_times)
    section("precision", lambda: precision("demo", options.clips, options.frames, torch.bfloat16))
    section("memory", lambda: memory([int(length) for length in options.lengths.split(",")], options.iterations))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
