"""What a checkpoint knows: static pairs, signals of motion, and reconstructions by kind of mask, on synthetic worlds.

Worlds come from seeds that training never uses; every table says how many and from which family.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from easi3r.alignment import align
from easi3r.backbones.dust3r import Dust3r, seeing_pairs
from easi3r.config import Settings
from easi3r.demo.clip import geometry_errors
from easi3r.demo.judgement import judge_pairs
from easi3r.demo.rendering import Clip, render
from easi3r.demo.static_pairs import held_out_pairs
from easi3r.demo.train import image_size
from easi3r.demo.worlds import FAMILIES, make_world
from easi3r.flow import estimate_flow
from easi3r.inference import empty_predictions, encode_frames, observe_pairs
from easi3r.metrics import auc, average_precision, jaccard
from easi3r.model import Easi3R
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.structures import DynamicMasks
from evaluation.datasets.worlds import FIRST_SEED
from evaluation.signals import flow_signals, network_signals

Array = NDArray[Any]
BATCH_SIZE = 8
MOVING_SHARE = 0.5  # of a token's pixels, from which on it counts as moving (as an object)
logger = logging.getLogger("easi3r.evaluation")


@dataclass(frozen=True)
class Labels:
    """Truth on tokens, each [n, h, w] bool."""

    moving: Array  # belongs to a mover (frozen or not)
    object: Array  # belongs to a mover or to a static object

    @classmethod
    def of(cls, clip: Clip, patch: int) -> Labels:
        n, height, width = clip.object_ids.shape

        def share(mask: Array) -> Array:
            parts = mask.reshape(n, height // patch, patch, width // patch, patch)
            return np.asarray(parts.mean((2, 4)) >= MOVING_SHARE)

        return cls(share(clip.mover_mask), share(clip.object_ids > 0))


def clips(family: str, count: int, num_frames: int, size: tuple[int, int]) -> Iterator[tuple[Clip, Clip]]:
    """Held-out clips and their frozen twins; ``size`` is (width, height)."""
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        world = make_world(seed, FAMILIES[family], num_frames=num_frames)
        yield render(world, *size), render(world, *size, frozen=True)


# --- motion --------------------------------------------------------------------------------------------------------


def signal_scores(network: Dust3r, clip: Clip, twin: Clip) -> dict[str, dict[str, float]]:
    """For each signal: AUC, AP and IoU (best threshold) over all tokens, AUC among objects (objAUC), and how much of
    the two AUCs is gone in the frozen twin, where nothing moves (gap, objGap)."""
    pairs, patch = make_pairs(len(clip.images), Settings().pairs), network.config.patch_size
    found = []
    for one in (clip, twin):
        maps = network_signals(network, one.images, pairs) | flow_signals(one.images, pairs, patch)
        found.append((maps, Labels.of(one, patch)))
    (maps, labels), (twin_maps, twin_labels) = found
    scores = {}
    for name, values in maps.items():
        whole, among = separate(values, labels)
        twin_whole, twin_among = separate(twin_maps[name], twin_labels)
        scores[name] = {
            "AUC": whole,
            "AP": average_precision(values, labels.moving),
            "IoU": best_iou(values, labels.moving),
            "objAUC": among,
            "gap": whole - twin_whole,
            "objGap": among - twin_among,
        }
    return scores


def separate(values: Array, labels: Labels) -> tuple[float, float]:
    """AUC of moving against all other tokens, and against those of static objects alone."""
    return auc(values, labels.moving), auc(values[labels.object], labels.moving[labels.object])


def best_iou(values: Array, truth: Array) -> float:
    """The largest intersection over union that one threshold for the clip can reach: an upper bound."""
    order = np.argsort(-values, axis=None, kind="stable")
    hits = np.cumsum(truth.reshape(-1)[order])
    return float((hits / (np.arange(1, len(order) + 1) + truth.sum() - hits)).max())


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over clips."""
    array = np.asarray(values, dtype=np.float64)
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array))) if len(array) > 1 else float("nan")


# --- cameras and points --------------------------------------------------------------------------------------------

RECONSTRUCTIONS = {  # name: masks that cut the second pass, masks that the alignment leaves out
    "no masks": (None, None),
    "our masks, alignment only": (None, "ours"),
    "our masks, both": ("ours", "ours"),
    "true masks, alignment only": (None, "true"),
    "true masks, both": ("true", "true"),
}


def reconstruction_scores(model: Easi3R, clip: Clip) -> dict[str, dict[str, float]]:
    """ATE in percent of the path and AbsRel of the static pixels, for every choice of masks."""
    network, settings, n = seeing_pairs(model.network), Settings(), len(clip.images)
    pairs = make_pairs(n, settings.pairs)
    height, width = clip.images.shape[1:3]
    grid = network.grid_of(height, width)
    masks = {"true": clip.dynamic_mask, "ours": model.segment(clip.images, image_size="native").dynamic_mask}
    flow = estimate_flow(clip.images, pairs, settings.flow, silent)
    tokens = encode_frames(network, clip.images, BATCH_SIZE, silent)
    predicted = {}
    for cut in {cut for cut, _ in RECONSTRUCTIONS.values()}:
        cut_tokens = None
        if cut is not None and masks[cut].any():
            cut_tokens = DynamicMasks(masks[cut].astype(np.float32), masks[cut], None).tokens(network.config.patch_size)
        predicted[cut] = empty_predictions(pairs, height, width)
        observe_pairs(
            *(network, tokens, pairs, grid, lambda *_: None, silent),
            batch_size=BATCH_SIZE,
            dynamic_tokens=cut_tokens,
            predictions=predicted[cut],
        )
    scores = {}
    for name, (cut, left_out) in RECONSTRUCTIONS.items():
        mask = np.zeros(clip.dynamic_mask.shape, dtype=bool) if left_out is None else masks[left_out]
        cameras = align(predicted[cut], n, settings.alignment, silent, flow=flow, dynamic_mask=mask)
        errors = geometry_errors(cameras, clip)
        scores[name] = {
            "ATE %": errors.ate_percent,
            "AbsRel %": errors.depth_abs_rel_percent,
            "focal %": errors.focal_percent,
        }
    return scores


def mask_scores(model: Easi3R, clip: Clip, twin: Clip) -> dict[str, float]:
    """What the product's own masks do: J on the clip, share of pixels called moving there and in the frozen twin."""
    found, still = (model.segment(one.images, image_size="native").dynamic_mask for one in (clip, twin))
    return {
        "J": float(jaccard(found, clip.dynamic_mask).mean()),
        "moving %": 100 * float(clip.dynamic_mask.mean()),
        "called moving %": 100 * float(found.mean()),
        "called moving in the frozen twin %": 100 * float(still.mean()),
    }


# --- the command ---------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Print every table; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m evaluation checkpoint", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", default="demo")
    add("--family", choices=sorted(FAMILIES), default="sharp")
    add("--pairs", type=int, default=500, help="held-out static pairs (default: 500)")
    add("--clips", type=int, default=80, help="clips for the signals; the even half develops, the odd half tests")
    add("--reconstructions", type=int, default=20, help="clips that are reconstructed five times each (default: 20)")
    add("--frames", type=int, default=12, help="of a clip (default: 12)")
    add("--size", type=image_size, default=(128, 96), help="of pairs and clips (default: 128x96)")
    add("--json", type=Path, help="also write every number to this file")
    options = parser.parse_args(arguments)
    model = Easi3R.from_pretrained(options.checkpoint)
    torch.manual_seed(0)
    result: dict[str, Any] = {"checkpoint": options.checkpoint, "family": options.family}

    if options.pairs:
        errors = judge_pairs(
            seeing_pairs(model.network), held_out_pairs(FAMILIES[options.family], options.pairs, options.size)
        )
        result["static pairs"] = dataclasses.asdict(errors)
        print(f"\n{options.pairs} held-out static pairs, family {options.family}")
        for name, value in result["static pairs"].items():
            print(f"  {name:28s}{value:10.4f}")

    signals: list[dict[str, dict[str, float]]] = []
    masks: list[dict[str, float]] = []
    poses: list[dict[str, dict[str, float]]] = []
    for index, (clip, twin) in enumerate(
        clips(options.family, max(options.clips, options.reconstructions), options.frames, options.size)
    ):
        if index < options.clips:
            signals.append(signal_scores(seeing_pairs(model.network), clip, twin))
            masks.append(mask_scores(model, clip, twin))
        if index < options.reconstructions:
            poses.append(reconstruction_scores(model, clip))
    if signals:
        for title, part in (("development", signals[::2]), ("test", signals[1::2])):
            if part:
                result[f"signals, {title}"] = table(f"Signals of motion, {len(part)} {title} clips", part)
        result["masks"] = table(f"The product's masks, {len(masks)} clips", [{"default": row} for row in masks])
    if poses:
        result["reconstruction"] = table(f"Reconstruction, {len(poses)} clips", poses)
        better = np.mean([row["true masks, both"]["ATE %"] < row["no masks"]["ATE %"] for row in poses])
        result["true masks better"] = float(better)
        print(f"  ATE with true masks is lower than without masks on {better:.0%} of the clips")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def table(title: str, rows: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, tuple[float, float]]]:
    """Print mean and standard error over clips of every score, and return them."""
    means = {
        name: {score: mean_and_error([row[name][score] for row in rows]) for score in rows[0][name]} for name in rows[0]
    }
    columns = list(next(iter(means.values())))
    print(f"\n{title} (mean, standard error)\n  {'':52s}" + "".join(f"{column:>17s}" for column in columns))
    for name, scores in means.items():
        print(f"  {name:52s}" + "".join(f"{m:10.3f} ±{e:5.3f}" for m, e in scores.values()))
    return means
