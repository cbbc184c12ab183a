"""What moves, from the global attention of a network that sees all frames at once (VGGT4D, arXiv 2511.19971).

The method looks at products of queries and keys, ``G[x, t] = a(x) . b(t)``, of a patch x of one frame and the patches t
of frames a little before and after it.  Two statistics over t are read, and neither needs G:

- the mean over t is ``a(x) . mean(b)``;
- the standard deviation over t, of a sum over layers and heads, is the root of ``a(x)' Cov(b) a(x)``, with the layers'
  and heads' channels side by side.

So everything is taken while the layers run, and memory grows with the number of frames, not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from easi3r.backbones.heads import unrounded
from easi3r.backbones.interface import Grid
from easi3r.backbones.vggt import Vggt
from easi3r.backbones.vggt_sites import observe_patches
from easi3r.normalise import min_max_per_frame
from easi3r.structures import GramMaps

SOURCE_OFFSETS = (-6, -4, -2, 2, 4, 6)  # of the frames whose patches t are, in frames given to the network


@dataclass(frozen=True)
class Factor:
    """One of the maps whose product is the dynamic map."""

    name: str
    product: Literal["qq", "kk", "qk"]  # a of the frame itself, b of its source frames
    layers: tuple[int, ...]  # of the global attention, from 0
    statistic: Literal["mean", "std"]  # over t, after the mean over layers, heads and source frames
    inverted: bool  # the product takes 1 - the normalised map


FACTORS = (
    Factor("qq_mean_3_7", "qq", (3, 4, 5, 6, 7), "mean", inverted=True),
    Factor("qq_std_18_19", "qq", (18, 19), "std", inverted=True),
    Factor("qq_mean_17_21", "qq", (17, 18, 19, 20, 21), "mean", inverted=False),
    Factor("kk_mean_0", "kk", (0,), "mean", inverted=True),
    Factor("qk_std_0", "qk", (0,), "std", inverted=False),
)


class GramStatistics:
    """Folds queries and keys into the factors' maps, layer by layer; a pass begins at the first of the layers."""

    def __init__(self, num_frames: int, grid: Grid, factors: tuple[Factor, ...] = FACTORS) -> None:
        self.grid = grid
        self.factors = factors
        self.sources = [source_frames(frame, num_frames) for frame in range(num_frames)]
        self._maps: Tensor | None = None  # [factors, n, P] float32
        self._waiting: dict[str, list[tuple[Tensor, Tensor]]] = {}  # a and b of a deviation whose layers go on

    @property
    def layers(self) -> frozenset[int]:
        """Which layers are looked at."""
        return frozenset(layer for factor in self.factors for layer in factor.layers)

    def observe(self, layer: int, q: Tensor, k: Tensor) -> None:
        """q, k: [heads, n, P, D] of the patches at one layer, after norm and rotation, without softmax scale."""
        if self._maps is None or layer == min(self.layers):
            self._maps = torch.zeros(len(self.factors), *q.shape[1:3], device=q.device)
            self._waiting.clear()
        if not any(self.sources):
            return
        sides = {"q": q, "k": k}
        with unrounded(q):
            for values, factor in zip(self._maps, self.factors, strict=True):
                if layer not in factor.layers:
                    continue
                a, b = (sides[side] for side in factor.product)
                if factor.statistic == "mean":
                    values += mean_products(a, b, self.sources) / len(factor.layers)
                elif layer != factor.layers[-1]:  # as they are: in half precision the map would be off by 1e-4
                    self._waiting.setdefault(factor.name, []).append((a, b))
                else:
                    layers = [*self._waiting.pop(factor.name, []), (a, b)]
                    values += deviation_of_products(layers, self.sources)

    def raw_maps(self) -> Tensor:
        """[factors, n, P] float32, on the network's device."""
        if self._maps is None or self._waiting:
            raise ValueError("No whole forward pass was observed; run one inside capture_grams.")
        return self._maps

    def maps(self, *, nothing_varies: bool = False) -> GramMaps:
        """The method's five factors, and the dynamic map.

        The latter is zero for a single frame, and where all frames are the same one (``nothing_varies``): a method
        that asks how much a patch differs from others would call something moving all the same.
        """
        raw = self.raw_maps()
        moves = any(self.sources) and not nothing_varies
        dynamic = dynamic_product(raw, self.factors) if moves else torch.zeros_like(raw[0])
        shaped = torch.stack([min_max_per_frame(values) for values in raw]).unflatten(2, self.grid).cpu().numpy()
        factors = {factor.name: values for factor, values in zip(self.factors, shaped, strict=True)}
        return GramMaps(**factors, dynamic_map=dynamic.unflatten(1, self.grid).cpu().numpy())


@contextmanager
def capture_grams(network: Vggt, num_frames: int, grid: Grid) -> Iterator[GramStatistics]:
    """Collect the statistics while the block runs one forward pass of ``num_frames`` frames of ``grid`` patches.

    >>> with capture_grams(network, len(tokens), grid) as statistics:  # doctest: +SKIP
    ...     read_outs = network.aggregate(tokens, grid)
    >>> maps = statistics.maps()  # doctest: +SKIP

    Where no head follows, ``network.attend(tokens, grid, max(statistics.layers))`` is enough.
    """
    statistics = GramStatistics(num_frames, grid)
    with observe_patches(network, num_frames, statistics.layers, statistics.observe):
        yield statistics


def source_frames(frame: int, num_frames: int) -> list[int]:
    """The frames that ``frame`` is compared with: those at the method's offsets, else its neighbours, if any."""
    for offsets in (SOURCE_OFFSETS, (-1, 1)):
        if found := [frame + offset for offset in offsets if 0 <= frame + offset < num_frames]:
            return found
    return []


def mean_products(a: Tensor, b: Tensor, sources: list[list[int]]) -> Tensor:
    """Mean over heads, source frames s and patches t of ``a(x) . b_s(t)``; a, b [heads, n, P, D] -> [n, P] float32."""
    means = b.mean(dim=2, dtype=torch.float32)
    around = torch.stack([means[:, some].mean(dim=1) for some in sources], dim=1)[..., None]  # [heads, n, D, 1]
    total = a.new_zeros(a.shape[1:3], dtype=torch.float32)
    for head in range(len(a)):  # one after the other, since all at once would copy a
        total += torch.bmm(a[head].float(), around[head])[..., 0]
    return total / len(a)


def deviation_of_products(layers: list[tuple[Tensor, Tensor]], sources: list[list[int]]) -> Tensor:
    """Unbiased deviation over t of the mean over layers, heads and source frames of ``a(x) . b_s(t)``.

    layers: (a, b), each [heads, n, P, D] -> [n, P] float32.
    """
    rows = []
    for frame, some in enumerate(sources):
        a = _side_by_side([a[:, frame] for a, _ in layers])
        b = _side_by_side([torch.stack([b[:, s] for s in some]).mean(dim=0, dtype=torch.float32) for _, b in layers])
        b = b - b.mean(dim=0)
        covariance = b.T @ b / max(len(b) - 1, 1)
        rows.append(((a @ covariance) * a).sum(dim=1).clamp(min=0).sqrt())
    return torch.stack(rows) / sum(len(a) for a, _ in layers)


def _side_by_side(layers: list[Tensor]) -> Tensor:
    """[heads, P, D] each -> [P, layers * heads * D] float32."""
    return torch.cat([layer.float().transpose(0, 1).flatten(1) for layer in layers], dim=1)


def dynamic_product(raw: Tensor, factors: tuple[Factor, ...] = FACTORS) -> Tensor:
    """[factors, n, P] -> [n, P]: each map min-max per frame, as it is or inverted; their product min-max per frame."""
    product = torch.ones_like(raw[0])
    for values, factor in zip(raw, factors, strict=True):
        normalised = min_max_per_frame(values)
        product *= 1 - normalised if factor.inverted else normalised
    return min_max_per_frame(product)
