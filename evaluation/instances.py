"""Are things that move told apart and followed?  On held-out synthetic worlds with two and three movers.

A mover is right if one id covers more than half of its pixels over the clip, and is no other mover's majority id.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from easi3r.config import Settings
from easi3r.demo.rendering import Clip, render
from easi3r.demo.worlds import FAMILIES, make_world
from easi3r.errors import Easi3RError
from easi3r.model import Easi3R
from easi3r.structures import Array
from evaluation.datasets.worlds import FIRST_SEED
from evaluation.results import markdown_table

FAMILY_CHOICES = ("sharp", "crowd")  # two movers, three movers
MASKS = ("true", "own")


def true_instances(clip: Clip) -> Array:
    """[n, H, W] int64: which mover of a rendered world is seen, 0 = none."""
    moves = clip.world.moves[0].cpu().numpy()
    return np.where(moves[clip.object_ids] & clip.dynamic_mask, clip.object_ids, 0)


def objects_right(labels: Array, truth: Array) -> dict[int, bool]:
    """Of each mover that is seen anywhere in the clip, whether it is right; ids [n, H, W] with 0 = none, both."""
    numbers = np.unique(truth[truth > 0]).tolist()
    majority, share = {}, {}
    for number in numbers:
        counts = np.bincount(labels[truth == number])
        counts[0] = 0
        majority[number] = int(counts.argmax())
        share[number] = counts.max() / (truth == number).sum()
    ids = list(majority.values())
    return {number: bool(share[number] > 0.5 and ids.count(majority[number]) == 1) for number in numbers}


def touching_frames(truth: Array) -> int:
    """In how many frames two movers touch: they are one component of the mask there."""
    found = 0
    for frame in truth:
        beside = [(frame[:, 1:], frame[:, :-1]), (frame[1:], frame[:-1])]
        beside += [(frame[1:, 1:], frame[:-1, :-1]), (frame[1:, :-1], frame[:-1, 1:])]
        found += any(((a != b) & (a > 0) & (b > 0)).any() for a, b in beside)
    return found


def rows(
    model: Easi3R, families: Sequence[str], seeds: range, kinds: Sequence[str], settings: Settings
) -> Iterator[dict[str, Any]]:
    """Of each clip and kind of masks: which they are, and the counts ``right``, ``movers``, ``touching``, ``ids``."""
    for family in families:
        for seed in seeds:
            clip = render(make_world(seed, FAMILIES[family]))
            truth = true_instances(clip)
            for masks in kinds:
                given: dict[str, Any] = {"motion.masks": clip.dynamic_mask} if masks == "true" else {}
                found = model.segment(clip.images, config=settings.with_options(given)).instances
                assert found is not None
                right = objects_right(found.labels, truth)
                yield {
                    "family": family,
                    "seed": seed,
                    "masks": masks,
                    "right": sum(right.values()),
                    "movers": len(right),
                    "touching": touching_frames(truth),
                    "ids": len(found),
                }


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: the share of movers that are right, per family and kind of masks, and over all families."""
    lines = [
        ["masks", "family", "clips", "movers", "right", "right %", "ids per clip", "frames in which movers touch %"]
    ]
    kinds = dict.fromkeys(row["masks"] for row in found)
    families = [*dict.fromkeys(row["family"] for row in found), "all"]
    for masks in kinds:
        for family in families:
            some = [row for row in found if row["masks"] == masks and family in (row["family"], "all")]
            right, movers = sum(row["right"] for row in some), sum(row["movers"] for row in some)
            touching = 100 * np.mean([row["touching"] / 12 for row in some])
            ids = np.mean([row["ids"] for row in some])
            share = 100 * right / max(movers, 1)
            line = [masks, family, len(some), movers, right, f"{share:.1f}", f"{ids:.1f}", f"{touching:.0f}"]
            lines.append([str(cell) for cell in line])
    return "\n".join(markdown_table(lines))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per clip, then the table, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation instances", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", default="demo")
    add("--families", nargs="+", choices=sorted(FAMILIES), default=FAMILY_CHOICES)
    add("--clips", type=int, default=12, help="of each family (default: 12), of 12 frames of 128x96")
    add("--first-seed", type=int, default=FIRST_SEED, help=f"{FIRST_SEED} and up are held out (default: {FIRST_SEED})")
    add("--masks", nargs="+", choices=MASKS, default=MASKS, help="the exact ones, and those that the tool finds")
    options = parser.parse_args(arguments)
    found = []
    try:
        model = Easi3R.from_pretrained(options.checkpoint)
        settings = Settings().with_options({"image_size": "native"})
        seeds = range(options.first_seed, options.first_seed + options.clips)
        for row in rows(model, options.families, seeds, options.masks, settings):
            found.append(row)
            print(" ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr, flush=True)
    except Easi3RError as error:
        print("evaluation:", *str(error).splitlines(), file=sys.stderr)
        return 1
    print(table(found))
    return 0
