"""The same network worked as the published code does, for the benchmark to be measured against, and nothing else."""

from __future__ import annotations

from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r
from easi3r.inference import to_network_input
from easi3r.precision import in_precision
from hooks import Attend, find_sites
from hooks.sites import FusedSite

Array = NDArray[Any]


class WrittenOut(Attend):
    """Attention as a matrix that is formed, copied, and, in the second pass, edited."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None
        self.cut: Tensor | None = None  # [B, Nq, Nk] bool

    def forward(self, q: Tensor, k: Tensor, v: Tensor | None, *, kept: Tensor | None = None) -> Tensor | None:
        assert v is not None and kept is None
        logits = q @ k.mT * q.shape[-1] ** -0.5
        self.kept = logits.clone()
        weights = logits.softmax(-1)
        if self.cut is not None:
            weights = weights.masked_fill(self.cut[:, None], 0)
        attended: Tensor = weights @ v
        return attended


def published_style(network: Dust3r) -> Dust3r:
    """The same tensors in float32, every attention written out."""
    network = in_precision(network, torch.float32)
    with torch.device("meta"):
        twin = Dust3r(network.config)
    twin.load_state_dict(network.state_dict(), assign=True)
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, Attend):
                module.add_module(name, WrittenOut())
    return twin.requires_grad_(False).eval()


def twin_pair(twin: Dust3r, images: Array, pair: tuple[int, int], cut: Tensor | None) -> list[Tensor]:
    """One pair of one pass, as published; returns the mean logits of every cross-attention."""
    first, second = (to_network_input(images[[frame]]).to(twin.device) for frame in pair)
    decoders = [
        [cast(WrittenOut, cast(FusedSite, site).attend) for site in find_sites(twin, name)]
        for name in ("decoder1", "decoder2")
    ]
    for attend in decoders[0]:
        attend.cut = cut
    twin(first, second)
    return [cast(Tensor, attend.kept).mean(2) for decoder in decoders for attend in decoder]
