"""Masks on held-out worlds: J at 12, 16 and 2 frames, and what is called moving where nothing is, by rule and family.

A clip of two frames is two neighbouring frames of the 16-frame clip, at its spacing: that clip is cut into eight of
them, so that both figures are means over the same 16 frames.  False alarms are the share of pixels called moving in the
frozen twin of the 12-frame clip, which is a static world: the movers stand among the other objects.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import FAMILIES, Family, make_world
from easi3r.errors import Easi3RError
from easi3r.metrics import jaccard
from easi3r.model import Easi3R
from evaluation.checkpoint import mean_and_error
from evaluation.datasets.worlds import FIRST_SEED
from evaluation.results import markdown_table

Array = NDArray[Any]
RULES = ("both", "flow", "attention")  # motion.evidence
FRAMES, MORE_FRAMES = 12, 16
SIZE = (128, 96)
COLUMNS = ("J 12 frames", "J 16 frames", "J 2 frames", "twin called moving")  # all in percent


def scores(model: Easi3R, rule: str, family: Family, seed: int) -> dict[str, float]:
    """Of one seed; see COLUMNS."""
    world = make_world(seed, family, num_frames=FRAMES)
    clip, twin = render(world, *SIZE), render(world, *SIZE, frozen=True)
    longer = render(make_world(seed, family, num_frames=MORE_FRAMES), *SIZE)
    pairs = [longer.images[i : i + 2] for i in range(0, MORE_FRAMES, 2)]
    by_twos = np.concatenate([masks(model, rule, pair) for pair in pairs])
    values = (
        mean_j(masks(model, rule, clip.images), clip),
        mean_j(masks(model, rule, longer.images), longer),
        mean_j(by_twos, longer),
        float(masks(model, rule, twin.images).mean()),
    )
    return {name: 100 * value for name, value in zip(COLUMNS, values, strict=True)}


def masks(model: Easi3R, rule: str, images: Array) -> Array:
    """[n, H, W] bool of images [n, H, W, 3] uint8."""
    return model.segment(images, image_size="native", evidence=rule, instances=False).dynamic_mask


def mean_j(found: Array, clip: Clip) -> float:
    """Mean over the frames."""
    return float(jaccard(found, clip.dynamic_mask).mean())


def table(rows: dict[tuple[str, str], list[dict[str, float]]]) -> str:
    """Markdown of the scores of each rule and family: mean and standard error over clips."""
    lines = [["evidence", "family", *COLUMNS, "clips"]]
    for (rule, family), clips in rows.items():
        cells = ["{:.1f} ± {:.1f}".format(*mean_and_error([clip[name] for clip in clips])) for name in COLUMNS]
        lines.append([rule, family, *cells, str(len(clips))])
    return "\n".join(markdown_table(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation masks", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", default="demo")
    add("--rules", nargs="+", choices=RULES, default=RULES[:1], help="motion.evidence (default: both)")
    add("--families", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES), help="(default: all)")
    add("--clips", type=int, default=4, help="of each family (default: 4)")
    add("--first-seed", type=int, default=FIRST_SEED, help=f"(default: {FIRST_SEED}; rules were chosen on 3000 and up)")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.clips)
    try:
        model = Easi3R.from_pretrained(options.checkpoint)
        rows = {
            (rule, name): [scores(model, rule, FAMILIES[name], seed) for seed in seeds]
            for name in options.families
            for rule in options.rules
        }
    except Easi3RError as error:
        print("evaluation:", *str(error).splitlines(), file=sys.stderr)
        return 1
    width, height = SIZE
    print(f"Clips of {width}x{height}, seeds {seeds[0]} to {seeds[-1]}, all figures in percent\n\n{table(rows)}")
    return 0
