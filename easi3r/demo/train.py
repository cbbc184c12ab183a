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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from easi3r.backbones.dust3r import Dust3r, Dust3rConfig, PointmapPair
from easi3r.demo.judgement import judge_pairs
from easi3r.demo.muon import Muon
from easi3r.demo.static_pairs import StaticViews, held_out_pairs, static_views
from easi3r.demo.training_state import load_state, read_weights, save_state, write_weights
from easi3r.demo.worlds import FAMILIES
from hooks import Attend
from hooks.sites import find_sites

logger = logging.getLogger("easi3r.train")

CONFIG = Dust3rConfig(
    enc_embed_dim=192,
    enc_depth=4,
    enc_num_heads=3,
    dec_embed_dim=192,
    dec_depth=5,
    dec_num_heads=3,
    patch_size=8,
    img_size=(96, 128),
    head_type="linear",
)
ALPHA = 0.2  # DUSt3R's weight of the confidence's logarithm
VIEWS = 3  # of each world: both ends of a walk and a place between, so that two pairs in three are like video
GUIDED_LAYERS = (1, 3)  # of the decoders; the first head of each
MUON_RATE, ADAM_RATE = 0.01, 1.5e-3
WARM_UP = 100  # steps
AVERAGE = 2000  # steps over which the saved weights are averaged, at most a fifth of those taken


@dataclass(frozen=True)
class Options:
    """The command line."""

    output: Path
    start: Path | None
    family: str
    size: tuple[int, int]
    worlds: int
    processes: int
    seed: int
    rate: float
    guidance: float
    max_minutes: float
    max_steps: int
    cooldown_minutes: float
    save_minutes: float
    judge_minutes: float
    held_out: int
    shard_mb: float
    device: str
    compile: bool


class MatrixAttention(Attend):
    """The same attention as plain products: the fused kernel of CPUs takes several times as long backwards."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights: Tensor = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1)
        return weights @ v


def new_network(seed: int) -> Dust3r:
    """Fresh weights, with two aids from which the comparison of views starts sooner: every cross-attention begins as
    similarity of appearance (W_q = W_k), and both decoders begin equal."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Dust3r(CONFIG)
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear):
                gain = (2 * CONFIG.dec_depth) ** -0.5 if name.endswith(("attn.proj", "fc2")) else 1.0
                nn.init.xavier_uniform_(module.weight, gain)
                nn.init.zeros_(module.bias)
    with torch.no_grad():
        for name, keys in network.named_parameters():
            if name.endswith("cross_attn.projk.weight"):
                network.get_parameter(name.replace("projk", "projq")).copy_(keys)
        network.dec_blocks2.load_state_dict(network.dec_blocks.state_dict())
        network.downstream_head2.load_state_dict(network.downstream_head1.state_dict())
        for head in (network.downstream_head1, network.downstream_head2):
            head.get_parameter("proj.bias").view(4, -1)[2] = 0.5  # points begin in front of the camera
    return network


def confidence_loss(prediction: PointmapPair, truth_first: Tensor, truth_second: Tensor) -> tuple[Tensor, Tensor]:
    """DUSt3R's loss and, detached, the mean error of both views; points [B, H, W, 3] in view 1's camera frame.

    Each pair's points are divided by their mean distance from view 1's camera; confidence C weighs the distance to
    the truth: C |x - x'| - alpha log C.
    """
    errors = []
    for first, second in ((prediction.points_first, prediction.points_second), (truth_first, truth_second)):
        both = torch.stack([first, second], dim=1)
        errors.append(both / both.square().sum(-1, keepdim=True).add(1e-12).sqrt().mean((1, 2, 3), keepdim=True))
    error = (errors[0] - errors[1]).square().sum(-1).add(1e-12).sqrt()
    confidence = torch.stack([prediction.confidence_first, prediction.confidence_second], dim=1)
    return (confidence * error - ALPHA * confidence.log()).mean(), error.detach().mean()


def matching_loss(logits: Tensor, place: Tensor, visible: Tensor, centres: Tensor, patch: int) -> Tensor:
    """Cross-entropy of attention with the true correspondence, over the tokens that the other view shows.

    logits: [B, N, N] of queries and keys.  place: [B, N, 2] pixels where the other view shows each query's token.
    visible: [B, N] bool.  centres: [N, 2] pixels of the keys; the target spreads bilinearly over the nearest four.
    """
    weight = (1 - (place[:, :, None] - centres).abs() / patch).clamp(min=0).prod(-1)  # [B, N, N]
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    loss = -(weight * logits.float().log_softmax(-1)).sum(-1)
    return (loss * visible).sum() / visible.sum().clamp(min=1)


class Trainer:
    """One process's share: every process holds the same weights, renders its own worlds, and gradients are averaged."""

    def __init__(self, options: Options, rank: int) -> None:
        self.options, self.rank = options, rank
        self.device = torch.device(options.device)
        self.low = self.device.type == "cuda" or fast_bf16()
        self.network = new_network(options.seed)
        self.pairs_seen = 0
        if options.start is not None:
            tensors, config = read_weights(options.start)
            self.network.load_state_dict(tensors)
            self.pairs_seen = int(config.get("pairs_seen", 0))
        self.network.to(self.device)
        self.average = {name: value.detach().clone() for name, value in self.network.state_dict().items()}
        if self.device.type == "cpu":
            for module in list(self.network.modules()):
                for name, child in module.named_children():
                    if isinstance(child, Attend):
                        module.add_module(name, MatrixAttention())
        self.optimisers = self._optimisers()
        self.step = self.averaged = 0
        self.guided: dict[str, list[Tensor]] = {"decoder1": [], "decoder2": []}  # logits of the guided heads
        if options.guidance > 0:
            for decoder in self.guided:
                for layer in GUIDED_LAYERS:
                    find_sites(self.network, decoder)[layer].observe(partial(self._keep_logits, decoder))
        self.run = torch.compile(self._predict) if options.compile else self._predict
        first, second = zip(*((i, j) for i in range(VIEWS) for j in range(VIEWS) if i != j), strict=True)
        self.first, self.second = torch.tensor(first), torch.tensor(second)

    def _optimisers(self) -> list[torch.optim.Optimizer]:
        hidden: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in self.network.named_parameters():
            is_hidden = "_blocks" in name and parameter.ndim == 2
            (hidden if is_hidden else rest).append(parameter)
        return [Muon(hidden, lr=MUON_RATE), torch.optim.Adam(rest, lr=ADAM_RATE, betas=(0.9, 0.95))]

    @property
    def pairs_per_step(self) -> int:
        return self.options.processes * self.options.worlds * len(self.first)

    def batch(self) -> StaticViews:
        """New worlds: which ones depends on the seed, the pairs seen so far and the process alone."""
        size = self.options.worlds
        worlds_seen = self.pairs_seen // len(self.first)
        first_seed = (self.options.seed + 1 << 32) + worlds_seen + self.rank * size
        dice = torch.Generator().manual_seed(first_seed)
        between = float(torch.rand(1, generator=dice)) * 0.84 + 0.08
        family = FAMILIES[self.options.family]
        objects = family.num_static + int(torch.randint(3, (1,), generator=dice)) - 1
        family = type(family)(**{**asdict(family), "num_static": max(4 - family.num_movers, objects - 1)})
        seeds = range(first_seed, first_seed + size)
        return static_views(seeds, family, (0.0, between, 1.0), self.options.size, self.device)

    def _keep_logits(self, decoder: str, q: Tensor, k: Tensor, scale: float) -> None:
        self.guided[decoder].append(q[:, 0] @ k[:, 0].mT * scale)

    def _guidance(self, views: StaticViews) -> Tensor:
        """How far the guided heads are from the true correspondence, mean over layers and decoders."""
        patch = CONFIG.patch_size
        centres, place, visible = views.correspondence(patch)
        losses = []
        for decoder, queries, keys in (("decoder1", self.first, self.second), ("decoder2", self.second, self.first)):
            target, seen = (value[:, queries, keys].flatten(0, 1) for value in (place, visible))
            losses += [matching_loss(logits, target, seen, centres, patch) for logits in self.guided[decoder]]
            self.guided[decoder].clear()
        return torch.stack(losses).mean()

    def _predict(self, images: Tensor) -> PointmapPair:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            tokens = self.network.encode(images.flatten(0, 1)).unflatten(0, images.shape[:2])
            first, second = (tokens[:, view].flatten(0, 1) for view in (self.first, self.second))
            decoded = self.network.decode(first, second, self.network.grid_of(*images.shape[-2:]))
        decoded.first[-1], decoded.second[-1] = decoded.first[-1].float(), decoded.second[-1].float()
        return self.network.predict(decoded)

    def advance(self, rate: float) -> tuple[float, float]:
        """One step at ``rate`` times the full learning rate; returns loss and error of this process's pairs."""
        views = self.batch()
        first = views.points[:, self.first].flatten(0, 1)
        second = views.points_in(self.first, self.second).flatten(0, 1)
        loss, error = confidence_loss(self.run(views.images), first, second)
        if self.options.guidance > 0:
            guidance = self._guidance(views)
            loss = loss + self.options.guidance * guidance
        loss.backward()
        self._share_gradients()
        for optimiser, full in zip(self.optimisers, (MUON_RATE, ADAM_RATE), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = full * rate * self.options.rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.averaged += 1
        self.pairs_seen += self.pairs_per_step
        keep = 1 - 1 / min(self.averaged, max(10, min(AVERAGE, self.averaged // 5)))
        with torch.no_grad():
            state = self.network.state_dict()
            torch._foreach_lerp_(list(self.average.values()), [state[name] for name in self.average], 1 - keep)
        return float(loss.detach()), float(error)

    def _share_gradients(self) -> None:
        if self.options.processes == 1:
            return
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(together)
        together /= self.options.processes
        for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def snapshot(self, *, averaged: bool) -> Dust3r:
        """A copy to judge and to ship: the average of the last steps, or the weights as they are."""
        network = Dust3r(CONFIG).to(self.device)
        network.load_state_dict(self.average if averaged else self.network.state_dict())
        return network.requires_grad_(False).eval()

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "averaged": self.averaged,
            "pairs_seen": self.pairs_seen,
            "network": self.network.state_dict(),
            "average": self.average,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.step, self.averaged, self.pairs_seen = state["step"], state["averaged"], state["pairs_seen"]
        self.network.load_state_dict(state["network"])
        self.average = {name: value.to(self.device) for name, value in state["average"].items()}
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)


def fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


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
    losses: list[tuple[float, float]] = []
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
            recent = [sum(x) / len(x) for x in zip(*losses[-50:], strict=True)]
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

    def judge(self, trainer: Trainer, minutes: float, losses: Sequence[tuple[float, float]], *, cooling: bool) -> None:
        """Weights are averaged while the rate is high; once it falls, they settle by themselves."""
        network = trainer.snapshot(averaged=not cooling)
        errors = judge_pairs(network, self.pairs)
        logger.info("held out after %d pairs: %s", trainer.pairs_seen, errors.line())
        loss, error = (sum(x) / len(x) for x in zip(*losses[-200:], strict=True)) if losses else (None, None)
        row: dict[str, Any] = {"step": trainer.step, "pairs_seen": trainer.pairs_seen, "minutes": round(minutes, 2)}
        row |= {"size": "x".join(map(str, self.options.size)), "train_loss": loss, "train_error": error}
        with (self.options.output / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | asdict(errors)) + "\n")
        if errors.second_view < self.best:
            self.best = errors.second_view
            about = {"pairs_seen": trainer.pairs_seen, "seed": self.options.seed, "held_out_second_view": self.best}
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
