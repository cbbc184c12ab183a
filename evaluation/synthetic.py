"""All methods side by side on held-out synthetic worlds: masks, cameras and depth, in one table.

Clips come from seeds that no training uses, and are scored by the protocol 'easi3r'; a run that was killed goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from easi3r.config import Settings
from easi3r.demo.worlds import FAMILIES
from easi3r.errors import Easi3RError
from easi3r.model import Easi3R
from evaluation.datasets.worlds import DEFAULT_FAMILY, FIRST_SEED, Worlds
from evaluation.evaluate import evaluate, make_header
from evaluation.methods import METHODS
from evaluation.protocols import PROTOCOLS
from evaluation.results import Mean, markdown_table, means, rounded

ROWS = {  # name in the table: method, and what is not its default
    "easi3r": ("easi3r", {}),
    "easi3r, published rule for masks": ("easi3r", {"motion.evidence": "attention"}),
    "easi3r, no masks (plain network)": ("easi3r", {"motion.masks": "none"}),
    "flow-ego-motion": ("flow-ego-motion", {}),
    "flow-homography": ("flow-homography", {}),
    "frame-difference": ("frame-difference", {}),
    "all-static": ("all-static", {}),
}
COLUMNS = ("JM %", "JR %", "FM %", "FR %", "ATE", "RTE", "RRE deg", "AbsRel", "delta 1.25")
PROTOCOL = replace(PROTOCOLS["easi3r"], point_clouds=False)  # which take longer than all the rest, and say the same


def compare(worlds: Worlds, model: Easi3R, folder: Path, settings: Settings) -> dict[str, dict[str, Mean]]:
    """Score every method on every clip, and return the mean of each one's columns."""
    found = {}
    for number, (row, (name, changes)) in enumerate(ROWS.items()):
        kind, own = METHODS[name], settings.with_options(changes)
        method = kind.make(own, False, model if kind.needs_checkpoint else None)
        weights = {"name": model.checkpoint.name, "sha256": model.checkpoint.sha256()}
        checkpoint = weights if kind.needs_checkpoint else None
        header = make_header(worlds, worlds.variant, worlds.names(), PROTOCOL, method.name, own, checkpoint, False)
        out = folder / f"{number}_{name}"
        records = evaluate(worlds, method, PROTOCOL, out, header)
        for record in records:
            if record.reason is not None:
                print(f"{row}: {record.sequence} failed: {record.reason}", file=sys.stderr)
        found[row] = means(records, PROTOCOL.pooling)
    return found


def table(found: dict[str, dict[str, Mean]]) -> str:
    """Markdown; a method that does not say something has an empty cell."""
    rows = [["method", *COLUMNS, "clips"]]
    for name, mean in found.items():
        cells = [rounded(column, mean[column].value) if column in mean else "" for column in COLUMNS]
        rows.append([name, *cells, str(max((one.count for one in mean.values()), default=0))])
    return "\n".join(markdown_table(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m evaluation synthetic", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", default="demo")
    add("--family", choices=sorted(FAMILIES), default=DEFAULT_FAMILY)
    add("--clips", type=int, default=8, help=f"seeds {FIRST_SEED}, {FIRST_SEED + 1}, ... (default: 8)")
    add("--frames", type=int, default=12, help="of a clip (default: 12)")
    add("--out", type=Path, default=Path("evaluation_results/synthetic"), help="of frames, records and the table")
    options = parser.parse_args(arguments)
    folder = options.out / f"{options.family}-{options.clips}x{options.frames}"
    worlds = Worlds(folder / "clips", options.family, options.clips, options.frames)
    try:
        model = Easi3R.from_pretrained(options.checkpoint)
        text = table(compare(worlds, model, folder, Settings().with_options({"image_size": "native"})))
        (folder / "table.md").write_text(text + "\n", encoding="utf-8")
    except Easi3RError as error:
        print("evaluation:", *str(error).splitlines(), file=sys.stderr)
        return 1
    width, height = worlds.size
    print(
        f"{options.clips} held-out clips of {options.frames} frames of {width}x{height}, family {options.family!r}; "
        f"J and F of all frames together, ATE and RTE in metres after Sim(3), depth after one scale per clip\n\n{text}"
    )
    return 0
