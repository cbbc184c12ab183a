"""Change attention: cut chosen queries off from chosen keys, or leave keys out for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hooks.sites import HookError, Site, find_sites


@contextmanager
def cut_attention(
    network: nn.Module, query_mask: Tensor, key_mask: Tensor, *, location: str = "decoder1"
) -> Iterator[None]:
    """While the block runs, weights from queries in ``query_mask`` to keys in ``key_mask`` are zero after softmax.

    query_mask: [B, Nq] bool, True = this query is cut off (the method: static tokens of the first view).
    key_mask: [B, Nk] bool, True = this key is hidden from them (the method: dynamic tokens of the second view).
    The remaining weights are not renormalised (Easi3R, section 3.2).  All other pairs are untouched.

    The hooks are removed on exit, exceptions included.  Raises HookError if the network has no such sites, or if
    one of them was not reached inside the block.
    """
    with _edited(find_sites(network, location), lambda site, reached: site.cut(query_mask, key_mask, reached)):
        yield


@contextmanager
def drop_keys(network: nn.Module, kept: Tensor, *, location: str, layers: range | None = None) -> Iterator[None]:
    """While the block runs, keys outside ``kept`` and their values take no part; the softmax is over what remains.

    kept: [B, Nk] bool, one key at least in every row.  layers: those to change, from 0; None: all.
    Queries are untouched.  (VGGT4D, arXiv 2511.19971, hides what moves like this.)

    The hooks are removed on exit, exceptions included.  Raises HookError if the network has no such sites, or if
    one of them was not reached inside the block.
    """
    sites = find_sites(network, location)
    some = sites if layers is None else sites[layers.start : layers.stop]
    with _edited(some, lambda site, reached: site.drop(kept, reached)):
        yield


@contextmanager
def _edited(sites: list[Site], edit: Callable[[Site, Callable[[], None]], RemovableHandle]) -> Iterator[None]:
    reached: set[str] = set()
    with ExitStack() as stack:
        for site in sites:
            stack.callback(edit(site, partial(reached.add, site.name)).remove)
        yield
    missed = [site.name for site in sites if site.name not in reached]
    if missed:
        raise HookError(
            f"{len(missed)} attention sites to edit were never reached, the first {missed[0]!r}; run a whole forward "
            "pass of this network inside the block."
        )


@contextmanager
def separate_attention(network: nn.Module, dynamic_first: Tensor, dynamic_second: Tensor) -> Iterator[None]:
    """While the block runs, static tokens of the first view see static ones of the second alone, dynamic ones dynamic.

    dynamic_first, dynamic_second: [B, N] bool, True = this token of the pair's first or second view moves.
    The method's edit of decoder 1 and the same the other way round, together; nothing is renormalised there either.
    Errors as of ``cut_attention``.
    """
    with (
        cut_attention(network, ~dynamic_first, dynamic_second),
        cut_attention(network, dynamic_first, ~dynamic_second),  # other queries than above: the two do not meet
    ):
        yield
