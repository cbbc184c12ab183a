"""Read attention: queries and keys as they meet, and of cross-attention the mean over queries of the logits,
without ever forming an N x N matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from hooks.sites import HookError, Site, find_sites


def mean_logits(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Mean over the queries of ``scale * q.k``, [B, Nk, heads] float32; q [B, heads, Nq, D], k [B, heads, Nk, D].

    The logits are linear in q, so their mean is (mean q).k.  One head after the other, since all heads at once would
    copy the keys, which is a tenth of the N x N maps at N = 576.
    """
    with torch.autocast(q.device.type, enabled=False):
        mean_q = (q.mean(dim=2, dtype=torch.float32) * scale).unsqueeze(-1)
        return torch.cat([torch.bmm(k[:, head].float(), mean_q[:, head]) for head in range(k.shape[1])], dim=2)


class _Decoder:
    """The maps of one decoder's layers, written side by side as the layers run."""

    def __init__(self, sites: list[Site]) -> None:
        self.sites = sites
        self.reached: set[int] = set()
        self.maps: Tensor | None = None  # [B, N, layers, heads]

    def observe(self, layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        means = mean_logits(q.detach(), k.detach(), scale)
        if self.maps is None or layer in self.reached:  # a new forward pass begins
            batch, tokens, heads = means.shape
            self.maps = means.new_empty(batch, tokens, len(self.sites), heads)
            self.reached.clear()
        self.maps[:, :, layer] = means
        self.reached.add(layer)

    def missed(self) -> list[str]:
        return [site.name for layer, site in enumerate(self.sites) if layer not in self.reached]

    def take(self) -> Tensor:
        assert self.maps is not None
        maps, self.maps = self.maps.flatten(2), None
        self.reached.clear()
        return maps


class CapturedAttention:
    """What the last forward pass attended to; ``take`` it before the next one."""

    def __init__(self, network: nn.Module) -> None:
        self.decoders = [_Decoder(find_sites(network, location)) for location in ("decoder1", "decoder2")]
        self.passes_taken = 0

    def check(self) -> None:
        """Raise HookError naming the sites that the last forward pass did not reach."""
        missed = [name for decoder in self.decoders for name in decoder.missed()]
        if missed:
            raise HookError(
                f"{len(missed)} attention sites to capture were never reached, the first {missed[0]!r}; run a whole "
                "forward pass of this network inside the block."
            )

    def take(self) -> tuple[Tensor, Tensor]:
        """Return and forget the maps of the last forward pass: source and reference.

        Each is [B, N, layers * heads] float32, one mean logit per token of the view that was attended to: source maps
        belong to the second view (decoder 1's keys), reference maps to the first (decoder 2's keys).
        Raises HookError naming the sites that were not reached.
        """
        self.check()
        self.passes_taken += 1
        source, reference = (decoder.take() for decoder in self.decoders)
        return source, reference


@contextmanager
def capture_attention(network: nn.Module) -> Iterator[CapturedAttention]:
    """Capture both decoders' cross-attention while the block runs.

    >>> with capture_attention(network) as captured:  # doctest: +SKIP
    ...     network(view1, view2)
    >>> source, reference = captured.take()  # doctest: +SKIP

    The network's output is untouched and the hooks are removed on exit, exceptions included.
    Raises HookError if the network has no such sites, or if no forward pass reached them inside the block.
    """
    captured = CapturedAttention(network)
    with ExitStack() as stack:
        for decoder in captured.decoders:
            for layer, site in enumerate(decoder.sites):
                stack.callback(site.observe(partial(decoder.observe, layer)).remove)
        yield captured
    if not captured.passes_taken:
        captured.check()


@contextmanager
def observe_attention(
    network: nn.Module, observer: Callable[[int, Tensor, Tensor], None], *, location: str, layers: frozenset[int]
) -> Iterator[None]:
    """Show ``observer`` each layer's index, queries and keys [B, heads, N, D] (after rotation) while the block runs.

    layers: those to look at, from 0.  The network's output is untouched and the hooks are removed on exit, exceptions
    included.  Raises HookError if the network has no such sites, or if a layer was not reached inside the block.
    """
    sites = find_sites(network, location)
    reached: set[int] = set()

    def observe(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        reached.add(layer)
        observer(layer, q.detach(), k.detach())

    with ExitStack() as stack:
        for layer in sorted(layers):
            stack.callback(sites[layer].observe(partial(observe, layer)).remove)
        yield
    if missed := sorted(layers - reached):
        raise HookError(
            f"{len(missed)} attention sites to capture were never reached, the first {sites[missed[0]].name!r}; run a "
            "whole forward pass of this network inside the block."
        )
