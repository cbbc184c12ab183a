"""The network that is trained, and one process's part in training it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from easi3r.backbones.dust3r import Dust3r, Dust3rConfig, PointmapPair
from easi3r.demo.losses import confidence_loss, matching_loss
from easi3r.demo.muon import Muon
from easi3r.demo.static_pairs import StaticViews, static_views
from easi3r.demo.training_state import read_weights
from easi3r.demo.worlds import FAMILIES
from easi3r.precision import fast_bf16
from hooks import Attend
from hooks.sites import find_sites

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

    def forward(self, q: Tensor, k: Tensor, v: Tensor | None, *, kept: Tensor | None = None) -> Tensor | None:
        assert kept is None  # nothing is dropped in training
        if v is None:
            return None
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
        fewer = int(torch.randint(3, (1,), generator=dice))  # objects than the family has in its clips, but four
        objects = max(4, family.num_movers + family.num_static - fewer)
        family = replace(family, num_movers=0, num_static=objects)
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
