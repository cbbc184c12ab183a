"""Scores of a method on a data set in its official layout, under a protocol that has a name.

One sequence at a time; each is on the disk before the next begins, so a run that was killed goes on where it was when
it is started again.  A sequence that fails is a row of the table and no part of the mean.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import cv2
import numpy as np

from easi3r import __version__
from easi3r.config import Settings, load_settings
from easi3r.decoding import read_image
from easi3r.errors import ConfigError, Easi3RError, InputError, MissingExtraError, nearest_name
from easi3r.frames import apply_crop
from easi3r.metrics import Alignment
from easi3r.storage import whole_file
from evaluation.datasets import DATASETS
from evaluation.datasets.sequence import Dataset
from evaluation.datasets.sequence import Sequence as Clip
from evaluation.methods import METHODS, Estimate, Method
from evaluation.protocols import PROTOCOLS, Protocol, score, to_network
from evaluation.results import (
    Header,
    Record,
    file_name,
    means,
    open_run,
    read_record,
    write_comparison,
    write_record,
    write_tables,
)

MASKS_ALONE = {"davis"}  # data sets that know neither cameras nor depth: a method need not find them
logger = logging.getLogger("easi3r.evaluation")


def evaluate(
    dataset: Dataset,
    method: Method,
    protocol: Protocol,
    folder: Path,
    header: Header,
    *,
    retry_failed: bool = False,
    plots: bool = False,
    report: Callable[[Record, bool], None] = lambda record, fresh: None,
) -> list[Record]:
    """Score every sequence of ``header["sequences"]`` that has no record in the folder yet; return all records.

    plots: draw each sequence in ``folder/plots`` when it is scored.
    report: called with each record, and whether it was made now.
    Raises InputError if the folder holds a run with another header, OutputError if it cannot be written.
    """
    open_run(folder, header)
    records = []
    for name in header["sequences"]:
        record = read_record(folder, name)
        fresh = record is None or (retry_failed and record.reason is not None)
        if record is None or fresh:
            record = score_sequence(dataset, name, method, protocol, folder / "plots" if plots else None)
            write_record(folder, record)
        records.append(record)
        report(record, fresh)
    return records


def score_sequence(
    dataset: Dataset, name: str, method: Method, protocol: Protocol, plots: Path | None = None
) -> Record:
    """Read, estimate, score.  Whatever goes wrong with one sequence is its record, and no reason to lose the others.

    plots: the folder for pictures; None: none are drawn.
    """
    begin, count = time.perf_counter(), None
    try:
        sequence = dataset.read(name, protocol.frames_of(dataset.name))
        count = len(sequence.images)
        estimate = method(sequence.images)
        scores = score(sequence, estimate, protocol)
        if plots is not None:
            draw(plots, sequence, estimate)
    except Exception as error:  # of somebody's files, or of somebody's method: any type
        reason = " ".join(str(error).split())[:600]
        if not isinstance(error, Easi3RError):
            reason = f"{type(error).__name__}: {reason}"
        logger.info("%s failed: %s", name, reason)  # the command prints it, and its record keeps it
        failure: dict[str, Any] = {"reason": reason, "traceback": traceback.format_exc()}
        return Record(name, count, **failure, seconds=round(time.perf_counter() - begin, 3))
    return Record(name, count, scores, seconds=round(time.perf_counter() - begin, 3))


def draw(folder: Path, sequence: Clip, estimate: Estimate) -> None:
    """Write NAME-masks.png, a film strip in the network's crop, and NAME-trajectory.png, as far as truth goes.

    Raises OutputError where the folder cannot be written, MissingExtraError where matplotlib is absent.
    """
    from evaluation.plots import film_strip, plot_trajectories

    folder.mkdir(parents=True, exist_ok=True)
    crops, name = estimate.crops, file_name(sequence.name)
    if sequence.masks is not None and estimate.masks is not None:
        images = np.stack(
            [apply_crop(read_image(path), crop) for path, crop in zip(sequence.images, crops, strict=True)]
        )
        truth = np.stack([to_network(mask, crop) for mask, crop in zip(sequence.masks, crops, strict=True)])
        with whole_file(folder / f"{name}-masks.png") as partial:
            film_strip(partial, images, estimate.masks, truth, has_mask=sequence.has_mask, title=sequence.name)
    if sequence.camera_to_world is not None and estimate.camera_to_world is not None:
        with whole_file(folder / f"{name}-trajectory.png") as partial:
            plot_trajectories(partial, estimate.camera_to_world, sequence.camera_to_world, title=sequence.name)


def make_header(
    dataset: Dataset,
    variant: str,
    sequences: Sequence[str],
    protocol: Protocol,
    method: str,
    settings: Settings,
    checkpoint: dict[str, str | None] | None,
    masks_only: bool,
) -> Header:
    """All that decides a run's numbers; two runs with the same one give the same tables."""
    return {
        "dataset": dataset.name,
        "variant": variant,
        "whole_split": list(sequences) == dataset.names(),
        "protocol": dataclasses.asdict(protocol) | {"frames": str(protocol.frames_of(dataset.name))},
        **{name: protocol.describe(dataset.name)[name] for name in ("frames", "stride", "alignment")},
        "method": method,
        "masks_only": masks_only,
        "checkpoint": checkpoint,
        "seed": settings.seed,
        "versions": {
            "easi3r": __version__,
            "torch": importlib.metadata.version("torch"),
            "numpy": np.__version__,
            "opencv": cv2.__version__,
        },
        "settings": settings.as_dict(),
        "seen_on_real_files": dataset.seen_on_real_files,
        "sequences": list(sequences),
    }


# --- the commands --------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table and return the exit code: 0, 1 if a sequence failed, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    _add_dataset(parser)
    add("--protocol", choices=list(PROTOCOLS), default="easi3r", help="by which rules (default: easi3r)")
    add("--depth-alignment", choices=get_args(Alignment), help="instead of the protocol's")
    add("--method", choices=list(METHODS), default="easi3r", help="what is scored (default: easi3r)")
    add("--masks-only", action="store_true", help=f"no cameras, no depth; {', '.join(MASKS_ALONE)} never has them")
    add(
        "--checkpoint",
        action="append",
        help="'demo', a file of weights, a folder or a hub id (default: demo); several are shown side by side",
    )
    add("--sequences", metavar="A,B", help="some of the split's sequences (default: all)")
    add("--out", type=Path, metavar="DIR", help="of records and tables (default: evaluation_results/...)")
    add("--config", metavar="FILE.yaml", help="a YAML file of overrides")
    add("--set", metavar="A.B=C", action="append", default=[], help="one setting, such as pairs.graph=complete")
    add("--plots", action="store_true", help="draw masks and trajectories of each sequence (extra plots)")
    add("--retry-failed", action="store_true", help="compute again what failed before")
    options = parser.parse_args(arguments)
    try:
        return _run(options, parser.error)
    except KeyboardInterrupt:
        print("evaluation: interrupted; what is finished stays, and the same command goes on", file=sys.stderr)
        return 130
    except Easi3RError as error:
        print("evaluation:", *str(error).splitlines(), file=sys.stderr)
        return 1


def check(arguments: Sequence[str] | None = None) -> int:
    """Print what a data set lacks and return the exit code: 0, 1 if anything is missing, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m evaluation check", description=check.__doc__, allow_abbrev=False)
    _add_dataset(parser)
    options = parser.parse_args(arguments)
    try:
        dataset, variant = _open(options, parser.error)
        missing = dataset.missing()
    except Easi3RError as error:
        print("evaluation:", *str(error).splitlines(), file=sys.stderr)
        return 1
    for sentence in missing:
        print(sentence)
    print(f"{dataset.name} {variant}: " + (f"{len(missing)} missing" if missing else "all is there"))
    return 1 if missing else 0


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", choices=sorted(DATASETS), metavar="DATASET", help=", ".join(sorted(DATASETS)))
    parser.add_argument("--root", type=Path, metavar="PATH", required=True, help="the folder that holds the data set")
    parser.add_argument("--variant", help="of the data set: its split, pass, ... (default: its first)")


def _open(options: argparse.Namespace, wrong_usage: Callable[[str], NoReturn]) -> tuple[Dataset, str]:
    """The data set and the name of its variant."""
    kind = DATASETS[options.dataset]
    variant = kind.variants[0] if options.variant is None else options.variant
    if variant not in kind.variants:
        wrong_usage(f"--variant {variant!r} is none of {options.dataset}: expected one of {', '.join(kind.variants)}")
    return kind(options.root, variant), variant


def _run(options: argparse.Namespace, wrong_usage: Callable[[str], NoReturn]) -> int:
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("--plots needs the package matplotlib: pip install 'easi3r[plots]'.")
    settings = _settings(options, wrong_usage)
    dataset, variant = _open(options, wrong_usage)
    names = dataset.names()
    if options.sequences is not None:
        names = _chosen(options.sequences.split(","), names, wrong_usage)
    if not names:
        raise InputError(f"{dataset.name} {variant} at {options.root} has no sequences; give another root or variant.")
    protocol = PROTOCOLS[options.protocol]
    if options.depth_alignment is not None:
        protocol = dataclasses.replace(protocol, depth_alignment=options.depth_alignment)
    kind, checkpoints = METHODS[options.method], options.checkpoint or ["demo"]
    if len(checkpoints) > 1 and not kind.needs_checkpoint:
        wrong_usage(f"--method {options.method} has no weights; expected one --checkpoint at most")
    default = Path("evaluation_results") / "-".join([dataset.name, variant, protocol.name, options.method])
    folder = default if options.out is None else options.out
    found, code = {}, 0
    for number, name in enumerate(checkpoints):
        own = folder if len(checkpoints) == 1 else folder / f"{number}_{file_name(Path(name).name)}"
        records = _score(options, settings, dataset, variant, names, protocol, name, own)
        code |= any(record.reason is not None for record in records)
        found[f"{number + 1}: {name}"] = means(records, protocol.pooling)
    if len(checkpoints) > 1:
        print(write_comparison(folder, found))
        print(f"wrote {folder.absolute()}: side_by_side.md", file=sys.stderr)
    return code


def _score(
    options: argparse.Namespace,
    settings: Settings,
    dataset: Dataset,
    variant: str,
    names: list[str],
    protocol: Protocol,
    weights: str,
    folder: Path,
) -> list[Record]:
    """One method with one checkpoint; its table is printed and written."""
    kind, masks_only = METHODS[options.method], options.masks_only or dataset.name in MASKS_ALONE
    model, checkpoint = None, None
    if kind.needs_checkpoint:
        from easi3r.model import Easi3R

        model = Easi3R.from_pretrained(weights, device=settings.device)
        checkpoint = {"name": model.checkpoint.name, "sha256": model.checkpoint.sha256()}
    method = kind.make(settings, masks_only, model)
    header = make_header(dataset, variant, names, protocol, method.name, settings, checkpoint, masks_only)
    done = 0

    def report(record: Record, fresh: bool) -> None:
        nonlocal done
        done += 1
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in record.row().items())
        how = f"{record.seconds:.1f} s" if fresh else "done before"
        print(f"{done}/{len(names)} {record.sequence} ({how}): {record.reason or numbers}", file=sys.stderr, flush=True)

    what = dataset, method, protocol, folder, header
    records = evaluate(*what, retry_failed=options.retry_failed, plots=options.plots, report=report)
    print(write_tables(folder, header, protocol, records))
    print(f"wrote {folder.absolute()}: results.json, results.md and results.csv", file=sys.stderr)
    if failed := sum(record.reason is not None for record in records):
        print(f"evaluation: {failed} of {len(records)} sequences failed; --retry-failed tries again", file=sys.stderr)
    return records


def _settings(options: argparse.Namespace, wrong_usage: Callable[[str], NoReturn]) -> Settings:
    """Defaults, then --config (mistakes there are exit code 1), then --set (wrong usage, exit code 2)."""
    settings = load_settings(options.config) if options.config else Settings()
    assignments = [assignment.partition("=") for assignment in options.set]
    for name, equals, _ in assignments:
        if not equals:
            wrong_usage(f"--set takes name=value, such as pairs.graph=complete, not {name!r}")
    try:
        return settings.with_options({name.strip(): value for name, _, value in assignments})
    except ConfigError as error:
        wrong_usage(str(error))


def _chosen(wanted: Iterable[str], names: list[str], wrong_usage: Callable[[str], NoReturn]) -> list[str]:
    """Some of the names, in the order of the official list."""
    some = {name.strip() for name in wanted}
    for name in sorted(some - set(names)):
        wrong_usage(f"--sequences names {name!r}, which is not of this split{nearest_name(name, names)}")
    return [name for name in names if name in some]
