"""The fast alignment against its published twin: worlds with known truth, pair predictions spoilt in a known way.

Both solve the same predictions with the same optical flow (DIS, on the rendered images) and true masks, one after the
other, world by world; the time is that of the alignment alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from easi3r.alignment import align
from easi3r.config import AlignmentSettings, FlowSettings, PairSettings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import Family, make_world
from easi3r.flow import estimate_flow
from easi3r.metrics import absolute_trajectory_error, depth_errors, path_length, relative_pose_errors
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import AlignedCameras
from evaluation.pair_predictions import synthetic_predictions

FAMILY = Family(num_movers=3)
Method = Literal["fast", "published"]
COLUMNS = ("seconds", "ATE %", "RPE deg", "AbsRel %")


def scores(found: AlignedCameras, clip: Clip) -> tuple[float, float, float]:
    """ATE in percent of the path, RMSE of the relative rotations in degrees, AbsRel of the static pixels in percent."""
    return (
        100
        * absolute_trajectory_error(found.camera_to_world, clip.camera_to_world)
        / path_length(clip.camera_to_world),
        relative_pose_errors(found.camera_to_world, clip.camera_to_world).rotation_deg,
        100 * depth_errors(found.depth, clip.depth, ~clip.dynamic_mask, "scale").abs_rel,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row per world and method, medians, and ratios."""
    parser = argparse.ArgumentParser(prog="python -m evaluation alignment", description=__doc__)
    parser.add_argument("--frames", type=int, default=12)
    parser.add_argument("--worlds", type=int, default=10, help="seeds 0, 1, ... (default: 10)")
    parser.add_argument("--noise", choices=("easy", "hard"), default="hard")
    parser.add_argument("--flow", choices=("dis", "none"), default="dis")
    parser.add_argument("--only", choices=("fast", "published"), help="one method instead of both")
    parser.add_argument("--json", type=Path, help="also write every number to this file")
    options = parser.parse_args(arguments)
    methods: tuple[Method, ...] = (options.only,) if options.only else ("published", "fast")
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {options.frames} frames, "
        f"{options.noise} noise, flow: {options.flow}"
    )
    rows: dict[Method, list[tuple[float, ...]]] = {method: [] for method in methods}
    for seed in range(options.worlds):
        clip = render(make_world(seed, FAMILY, num_frames=options.frames))
        pairs = make_pairs(options.frames, PairSettings())
        predictions = synthetic_predictions(clip, pairs, hard=options.noise == "hard", seed=seed)
        flow = estimate_flow(clip.images, pairs, FlowSettings(), silent) if options.flow == "dis" else None
        for method in methods:
            settings = AlignmentSettings(method=method)
            begin = time.perf_counter()
            found = align(predictions, options.frames, settings, silent, dynamic_mask=clip.dynamic_mask, flow=flow)
            rows[method].append((time.perf_counter() - begin, *scores(found, clip)))
            print(f"  world {seed}  {method:10s}" + "".join(f"{x:10.3f}" for x in rows[method][-1]), flush=True)
    print(f"{'medians':19s}" + "".join(f"{name:>10s}" for name in COLUMNS))
    for method in methods:
        print(f"  {method:17s}" + "".join(f"{x:10.3f}" for x in np.median(rows[method], axis=0)))
    if len(methods) == 2:
        ratio = np.array(rows["fast"]) / np.array(rows["published"])
        print("  fast / published " + "".join(f"{x:10.3f}" for x in np.median(ratio, axis=0)))
        print("  its largest      " + "".join(f"{x:10.3f}" for x in ratio.max(axis=0)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak memory {peak:.2f} GiB, predictions and optical flow included")
    if options.json:
        options.json.write_text(
            json.dumps({"options": str(options), "columns": COLUMNS, "rows": rows}, indent=1) + "\n"
        )
