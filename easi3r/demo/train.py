"""Train the bundled network from nothing on static pairs rendered on the fly: ``python -m easi3r.demo.train -o DIR``.

DUSt3R's loss (arXiv 2312.14132, section 3.3).  Needs torch and NumPy alone; the same command runs on a CPU (bf16 where
the processor is fast at it) and on a GPU.  Interrupted at any moment and started again, it goes on from its last save.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from easi3r.demo.judgement import judge_pairs
from easi3r.demo.static_pairs import held_out_pairs
from easi3r.demo.trainer import WARM_UP, Options, Trainer
from easi3r.demo.training_state import load_state, save_state, write_weights
from easi3r.demo.worlds import FAMILIES

logger = logging.getLogger("easi3r.train")


def train(rank: int, options: Options, meeting_place: str) -> None:
    """The work of one process."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    parent = os.getppid()
    if options.device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // options.processes))
    if options.processes > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=options.processes
        )
    trainer = Trainer(options, rank)
    state = load_state(options.output / "state")
    if state is not None:
        trainer.restore(state)
    begun, first_step = time.monotonic(), trainer.step
    curve = Curve(options) if rank == 0 else None
    losses: deque[tuple[float, float]] = deque(maxlen=200)  # of the last steps
    saved = judged = begun
    was_cooling = False
    while True:
        now = time.monotonic()
        left = options.max_minutes - (now - begun) / 60
        done, cooling, due, judge = agree(
            left <= 0 or 0 < options.max_steps <= trainer.step,
            left < options.cooldown_minutes,
            now - saved > 60 * options.save_minutes,
            now - judged > 60 * options.judge_minutes,
            processes=options.processes,
        )
        if (due or done or cooling) and not was_cooling:  # a state to go on from has not been cooled
            saved = now
            if rank == 0:
                save_state(trainer.state(), options.output / "state", options.shard_mb)
        was_cooling = cooling
        if judge or done:
            judged = now
            if curve is not None:
                curve.judge(trainer, (now - begun) / 60, losses, cooling=cooling)
        if done:
            break
        warm = min(1.0, (trainer.step - first_step + 1) / WARM_UP)
        losses.append(trainer.advance(warm * (max(0.0, left / options.cooldown_minutes) if cooling else 1.0)))
        if rank == 0 and (trainer.step <= 100 or trainer.step % 50 == 0):
            recent = [sum(x[-50:]) / len(x[-50:]) for x in zip(*losses, strict=True)]
            speed = (trainer.step - first_step) * trainer.pairs_per_step / (time.monotonic() - begun)
            logger.info(
                "step %d, %d pairs, loss %.6f, error %.4f (mean of 50: %.4f, %.4f), %.1f pairs/s",
                *(trainer.step, trainer.pairs_seen, *losses[-1], *recent, speed),
            )
        if rank and os.getppid() != parent:  # the first process is gone
            break
    if options.processes > 1:
        torch.distributed.destroy_process_group()


class Curve:
    """Looks at held-out pairs now and then, adds a line to the curve, and keeps the best weights."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.pairs = held_out_pairs(FAMILIES[options.family], options.held_out, options.size)
        about = options.output / "config.json"
        self.best = float("inf")
        if about.is_file():
            self.best = json.loads(about.read_text(encoding="utf-8")).get("held_out_second_view", self.best)

    def judge(self, trainer: Trainer, minutes: float, losses: deque[tuple[float, float]], *, cooling: bool) -> None:
        """Weights are averaged while the rate is high; once it falls, they settle by themselves."""
        network = trainer.snapshot(averaged=not cooling)
        errors = judge_pairs(network, self.pairs)
        logger.info("held out after %d pairs: %s", trainer.pairs_seen, errors.line())
        loss, error = (sum(x) / len(x) for x in zip(*losses, strict=True)) if losses else (None, None)
        row: dict[str, Any] = {"step": trainer.step, "pairs_seen": trainer.pairs_seen, "minutes": round(minutes, 2)}
        row |= {"size": "x".join(map(str, self.options.size)), "train_loss": loss, "train_error": error}
        with (self.options.output / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | asdict(errors)) + "\n")
        if errors.second_view < self.best:
            self.best = errors.second_view
            about: dict[str, Any] = {
                "pairs_seen": trainer.pairs_seen,
                "seed": self.options.seed,
                "held_out_second_view": self.best,
            }
            about |= {"img_size": self.options.size[::-1]}
            write_weights(network, self.options.output, about)


def agree(*decisions: bool, processes: int) -> Iterator[bool]:
    """Process 0's clock decides for all."""
    values = torch.tensor(decisions, dtype=torch.uint8)
    if processes > 1:
        torch.distributed.broadcast(values, 0)
    return (bool(value) for value in values)


def parse(arguments: Sequence[str] | None) -> Options:
    """Read the command line; exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m easi3r.demo.train", description=__doc__)
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, help="folder for weights, curve and state; goes on if it has one")
    add("--start", type=Path, help="folder with model.safetensors to go on from, where the output holds no state")
    add("--family", choices=sorted(FAMILIES), default="sharp", help="the worlds (default: sharp)")
    add("--size", type=image_size, default=(128, 96), help="of the images, WIDTHxHEIGHT (default: 128x96)")
    add("--worlds", type=int, default=4, help="per step and process, six pairs each (default: 4)")
    add("--processes", type=int, default=1, help="single-threaded where there is one core for each (default: 1)")
    add("--seed", type=int, default=0)
    add("--rate", type=float, default=1.0, help="factor of the learning rates")
    add(
        "--guidance", type=float, default=0.0, help="weight of an aid for the beginning: attention towards true matches"
    )
    add("--max-minutes", type=float, default=60.0)
    add("--max-steps", type=int, default=0, help="stop after so many steps in all (default: time decides)")
    add("--cooldown-minutes", type=float, default=0.0, help="the last minutes, in which the rate falls to zero")
    add("--save-minutes", type=float, default=2.0)
    add("--judge-minutes", type=float, default=5.0, help="between looks at the held-out pairs")
    add("--held-out", type=int, default=96, help="how many pairs that is (default: 96)")
    add("--shard-mb", type=float, default=0.0, help="split the saved state into files of at most so many megabytes")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compile", action="store_true", help="torch.compile the network: pays on GPUs")
    return Options(**vars(parser.parse_args(arguments)))


def image_size(text: str) -> tuple[int, int]:
    """'128x96' -> (128, 96)."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} was given; expected WIDTHxHEIGHT, as in 128x96")
    return int(width), int(height)


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the processes and be the first of them."""
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        meeting_place = str(Path(folder) / "store")
        if options.processes == 1:
            train(0, options, meeting_place)
            return
        context = torch.multiprocessing.get_context("spawn")
        others = [
            context.Process(target=train, args=(rank, options, meeting_place), daemon=True)
            for rank in range(1, options.processes)
        ]
        for process in others:
            process.start()
        train(0, options, meeting_place)
        for process in others:
            process.join()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
