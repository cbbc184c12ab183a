"""How often the verdict without ground truth is right: generated clips, half of them broken on purpose.

Every clip is aligned as the pipeline does it, from the stand-in predictions of :mod:`evaluation.pair_predictions` and
DIS flow.  The limits of :mod:`easi3r.verdict` were set on the development seeds; the test seeds were looked at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from easi3r.alignment import align
from easi3r.config import AlignmentSettings, FlowSettings, PairSettings
from easi3r.demo.clip import geometry_errors
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import Family, make_world
from easi3r.flow import estimate_flow
from easi3r.pairs import make_pairs
from easi3r.progress import silent
from easi3r.quality import measure
from easi3r.structures import AlignedCameras, PairFlow, PairPredictions
from easi3r.verdict import judge
from evaluation.pair_predictions import synthetic_predictions

Array = NDArray[Any]
SEEDS = {"development": 2000, "test": 3000}
OTHER_WORLD = 7000  # added to a seed
FAMILY = Family(num_movers=3)
NUM_FRAMES = 12


@dataclass(frozen=True)
class Run:
    """One clip, what the alignment was given of it and what it made of that."""

    name: str
    broken: bool
    clip: Clip
    mask: Array  # [n, H, W] bool, as given
    flow: PairFlow
    cameras: AlignedCameras


# --- what is broken ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """What a run starts from."""

    clip: Clip
    mask: Array
    predictions: PairPredictions
    flow_used: bool = True  # by the alignment, which repairs most bad predictions with it


def inverted_masks(given: Given, seed: int) -> Given:
    """What moves is called static, and the other way round."""
    return dataclasses.replace(given, mask=~given.mask)


def wrong_order(given: Given, seed: int) -> Given:
    """A video whose frames come in random order; all else fits."""
    clip = reordered(given.clip, seed)
    return Given(clip, clip.dynamic_mask, synthetic_predictions(clip, given.predictions.pairs, hard=False, seed=seed))


def of_other_frames(given: Given, seed: int) -> Given:
    """Points that belong to other frames of the clip than images, masks and flow."""
    clip = reordered(given.clip, seed)
    predictions = synthetic_predictions(clip, given.predictions.pairs, hard=False, seed=seed)
    return dataclasses.replace(given, predictions=predictions)


def of_another_world(given: Given, seed: int) -> Given:
    """Half of the pairs show another world; no flow."""
    pairs = given.predictions.pairs
    other = synthetic_predictions(world(seed + OTHER_WORLD), pairs, hard=False, seed=seed)
    chosen = torch.from_numpy(np.random.default_rng(seed).permutation(len(pairs)) % 2 == 0)
    points = {
        name: torch.where(chosen[:, None, None, None], getattr(other, name), getattr(given.predictions, name))
        for name in ("points_first", "points_second")
    }
    return with_points(given, points)


def bent_points(given: Given, seed: int) -> Given:
    """Every pointmap times its own strong smooth noise, exp(0.5 n) on a grid of 4 x 3; no flow."""
    dice = torch.Generator().manual_seed(seed)
    bent = {}
    for name in ("points_first", "points_second"):
        points = getattr(given.predictions, name)
        grid = 0.5 * torch.randn((len(points), 1, 3, 4), generator=dice)
        smooth = torch.nn.functional.interpolate(grid, size=points.shape[1:3], mode="bicubic", align_corners=True)
        bent[name] = points * smooth[:, 0, ..., None].exp()
    return with_points(given, bent)


def wrong_poses(given: Given, seed: int) -> Given:
    """Every second view is turned by some 20 degrees and moved by half of the median depth; no flow."""
    dice = np.random.default_rng(seed)
    points = given.predictions.points_second.clone()
    for one in points:
        turn = torch.linalg.matrix_exp(torch.cross(torch.eye(3), 0.2 * axis(dice).expand(3, 3), dim=1))
        one.copy_(one @ turn.T + 0.3 * one[..., 2].median() * axis(dice))
    return with_points(given, {"points_second": points})


BREAKS: dict[str, Callable[[Given, int], Given]] = {
    "masks inverted": inverted_masks,
    "frames in random order": wrong_order,
    "points of other frames": of_other_frames,
    "half the pairs of another world": of_another_world,
    "points bent": bent_points,
    "wrong relative poses": wrong_poses,
}


def with_points(given: Given, points: dict[str, torch.Tensor]) -> Given:
    """Other pointmaps, [P, H, W, 3] each, and no flow that could repair them."""
    predictions = PairPredictions(**vars(given.predictions) | points)
    return dataclasses.replace(given, predictions=predictions, flow_used=False)


def axis(dice: np.random.Generator) -> torch.Tensor:
    """[3] float32 normal deviates."""
    return torch.from_numpy(dice.standard_normal(3)).float()


def reordered(clip: Clip, seed: int) -> Clip:
    """The clip with its frames in random order, truth and all."""
    order = np.random.default_rng(seed).permutation(len(clip.images))
    per_frame = {
        field.name: getattr(clip, field.name)[order] for field in dataclasses.fields(clip) if field.name != "world"
    }
    return dataclasses.replace(clip, **per_frame)


# --- runs ----------------------------------------------------------------------------------------------------------


def world(seed: int) -> Clip:
    """12 frames of 128 x 96 pixels with three movers."""
    return render(make_world(seed, FAMILY, num_frames=NUM_FRAMES))


def make_runs(first_seed: int, count: int) -> Iterator[Run]:
    """Good and broken in turn; the noise of the predictions is easy and hard in turn, the breaks follow each other."""
    names = list(BREAKS)
    for index in range(count):
        seed, broken, turn = first_seed + index, bool(index % 2), index // 2
        hard = bool((turn // len(names) if broken else turn) % 2)
        clip = world(seed)
        pairs = make_pairs(len(clip.images), PairSettings())
        given = Given(clip, clip.dynamic_mask, synthetic_predictions(clip, pairs, hard=hard, seed=seed))
        name = names[turn % len(names)] if broken else ("good, hard" if hard else "good")
        if broken:
            given = BREAKS[name](given, seed)
        flow = estimate_flow(given.clip.images, pairs, FlowSettings(), silent)
        cameras = align(
            given.predictions,
            len(clip.images),
            AlignmentSettings(),
            silent,
            dynamic_mask=given.mask,
            flow=flow if given.flow_used else None,
        )
        yield Run(name, broken, given.clip, given.mask, flow, cameras)


# --- the command ---------------------------------------------------------------------------------------------------

SHOWN = (  # of the numbers
    "flow_residual_of_long_side",
    "flow_residual_of_flow",
    "flow_far_off_share",
    "flow_residual_static_over_moving",
    "depth_disagreement",
    "parallax_deg",
    "path_largest_step_over_typical",
    "path_change_over_typical_step",
    "path_over_shortest_tree",
)


def judged(run: Run) -> dict[str, Any]:
    """The verdict on a run, with what it should be and how far the run is from the truth."""
    quality = judge([measure(run.cameras, run.mask, run.flow, run.flow.pairs)], run.cameras, run.mask)
    errors = geometry_errors(run.cameras, run.clip)
    truth = {"ATE %": errors.ate_percent, "AbsRel %": errors.depth_abs_rel_percent}
    return {"name": run.name, "broken": run.broken, **truth, **quality}


def summary(rows: Sequence[dict[str, Any]]) -> float:
    """Print which verdicts each kind of run got; return the share of right ones: bad where broken, else not bad."""
    print(f"\n  {'':34s}" + "".join(f"{verdict:>10s}" for verdict in ("good", "doubtful", "bad")))
    for name in sorted({row["name"] for row in rows}):
        counts = [sum(row["name"] == name and row["verdict"] == v for row in rows) for v in ("good", "doubtful", "bad")]
        print(f"  {name:34s}" + "".join(f"{count:10d}" for count in counts))
    for number in ("ATE %", "AbsRel %", *SHOWN):
        for broken in (False, True):
            values = [row[number] for row in rows if row["broken"] == broken and row[number] is not None]
            if values:
                spread = "".join(f"{value:10.4f}" for value in np.quantile(values, [0, 0.5, 1]))
                print(f"  {'broken' if broken else 'good':8s}{number:36s}{spread}  (least, median, largest)")
    accuracy = float(np.mean([(row["verdict"] == "bad") == row["broken"] for row in rows]))
    print(f"  bad or not is right on {accuracy:.1%} of {len(rows)} runs")
    return accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the verdict on every run, and tables; see the module's text."""
    parser = argparse.ArgumentParser(prog="python -m evaluation verdict", description=__doc__)
    add = parser.add_argument
    add("--part", choices=sorted(SEEDS), default="test", help="which seeds (default: test)")
    add("--clips", type=int, default=40, help="half of them are broken (default: 40)")
    add("--json", type=Path, help="also write every number to this file")
    options = parser.parse_args(arguments)
    rows = []
    for run in make_runs(SEEDS[options.part], options.clips):
        rows.append(judged(run))
        print("{name:34s}{verdict:10s}ATE {ATE %:6.2f} %  AbsRel {AbsRel %:5.2f} %".format(**rows[-1]), flush=True)
    result = {"accuracy": summary(rows), "runs": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
