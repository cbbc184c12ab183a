"""Where VGGT's attention is read and changed: the sites of its frame and global blocks, by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from easi3r.backbones.vggt import Vggt
from easi3r.backbones.vggt_layers import Block
from hooks import HookError
from hooks.sites import FusedSite

CUT_LAYERS = range(5)  # the blocks of the second pass that do not see dynamic patches (VGGT4D; the paper's 1 to 5)

# Called with the layer (from 0), and queries and keys [heads, S, P, D] of the patches, after norm and rotation.
PatchObserver = Callable[[int, Tensor, Tensor], None]


def global_sites(network: Vggt) -> list[FusedSite]:
    """Attention among the tokens of all frames, [1, heads, S * T, D], first layer first."""
    return _sites(network, "global_blocks")


def frame_sites(network: Vggt) -> list[FusedSite]:
    """Attention inside each frame, [S, heads, T, D], first layer first."""
    return _sites(network, "frame_blocks")


def _sites(network: Vggt, blocks: str) -> list[FusedSite]:
    attentions = [cast(Block, block).attn for block in network.aggregator.get_submodule(blocks).children()]
    return [FusedSite(f"aggregator.{blocks}.{i}.attn.attend", a.attend) for i, a in enumerate(attentions)]


@contextmanager
def observe_patches(network: Vggt, num_frames: int, layers: frozenset[int], observer: PatchObserver) -> Iterator[None]:
    """Show ``observer`` the patches' queries and keys at some layers of the global attention while the block runs.

    The network's output is untouched and the hooks are removed on exit, exceptions included.  Raises HookError if a
    layer was not reached inside the block.
    """
    reached: set[int] = set()

    def observe(layer: int, q: Tensor, k: Tensor, scale: float) -> None:
        reached.add(layer)
        q, k = (x.detach()[0].unflatten(1, (num_frames, -1))[:, :, network.num_special :] for x in (q, k))
        observer(layer, q, k)

    sites = global_sites(network)
    with ExitStack() as stack:
        for layer in sorted(layers):
            stack.callback(sites[layer].observe(partial(observe, layer)).remove)
        yield
    _check_reached([sites[layer] for layer in sorted(layers - reached)])


@contextmanager
def drop_patches(network: Vggt, dynamic: Tensor, layers: range = CUT_LAYERS) -> Iterator[None]:
    """While the block runs, ``dynamic`` patches take no part in keys and values of the first blocks.

    dynamic: [S, P] bool, True = nobody attends to this patch, in frame and global attention alike; the softmax is over
    what remains.  Its own query and the special tokens are untouched (VGGT4D, arXiv 2511.19971).

    The hooks are removed on exit, exceptions included.  Raises HookError if a site was not reached inside the block.
    """
    kept = nn.functional.pad(~dynamic.to(network.device), (network.num_special, 0), value=True)
    reached: set[str] = set()
    sites = [
        (site, rows)
        for group, rows in ((frame_sites(network), kept), (global_sites(network), kept.view(1, -1)))
        for site in group[layers.start : layers.stop]
    ]
    with ExitStack() as stack:
        for site, rows in sites:
            stack.callback(_keep(site, rows, reached).remove)
        yield
    _check_reached([site for site, _ in sites if site.name not in reached])


def _keep(site: FusedSite, kept: Tensor, reached: set[str]) -> RemovableHandle:
    # by name, so that an observer of the same site sees queries, keys and values as they were
    def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        reached.add(site.name)
        return inputs, {**named, "kept": kept}

    handle: RemovableHandle = site.attend.register_forward_pre_hook(before, with_kwargs=True)
    return handle


def _check_reached(missed: list[FusedSite]) -> None:
    if missed:
        raise HookError(
            f"{len(missed)} attention sites were never reached, the first {missed[0].name!r}; run a whole forward pass "
            "of this network inside the block."
        )
