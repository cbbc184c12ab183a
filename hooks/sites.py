"""Where attention can be read and changed.

A *site* is the spot in a network at which queries, keys and values meet.  Two kinds are known:

- ``FusedSite``: our own networks end every attention in one ``Attend`` module, called with (q, k, v) after
  projection and rotation, which runs the fused kernel; no weights matrix exists.
- ``ExplicitSite``: a cross-attention that somebody else built, with ``projq, projk, rope, num_heads, scale`` and a
  softmax written out, whose weights pass through ``attn_drop`` (in evaluation mode too).

``LOCATIONS`` says where a structure has its sites; nothing else here knows about models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

LOCATIONS = {  # name of a group of sites -> dotted path to a list of blocks, and the attention inside a block
    "decoder1": ("dec_blocks", "cross_attn"),  # queries of the first view, keys of the second
    "decoder2": ("dec_blocks2", "cross_attn"),  # queries of the second view, keys of the first
    "frame": ("aggregator.frame_blocks", "attn"),  # among the tokens of each frame, a frame being a row of the batch
    "global": ("aggregator.global_blocks", "attn"),  # among the tokens of all frames, frame after frame
}

# Called with q [B, heads, Nq, D], k [B, heads, Nk, D] (after rotation) and the softmax scale.
Observer = Callable[[Tensor, Tensor, float], None]


class HookError(RuntimeError):
    """A hook found nothing to attach to, or was never reached."""


class Attend(nn.Module):
    """Softmax attention by the fused kernel; has no parameters, exists so that hooks have a place to attach.

    q [B, heads, Nq, D], k and v [B, heads, Nk, D] -> [B, heads, Nq, D], scale D**-0.5.  Without values nothing is
    computed: queries and keys only meet, for the hooks to see.
    kept: [B, Nk] bool, the keys that take part, one at least in every row; the softmax is over those alone.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor | None, *, kept: Tensor | None = None) -> Tensor | None:
        if v is None:
            return None
        if kept is None:
            return F.scaled_dot_product_attention(q, k, v)
        if len(kept) == 1:  # fewer keys are less work than hidden ones, and leave the kernel its choice
            kept = kept[0].to(k.device)
            return F.scaled_dot_product_attention(q, k[:, :, kept], v[:, :, kept])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=kept[:, None, None].to(k.device))


class Site(Protocol):
    """One place in one layer; all methods register forward hooks and return handles that remove them."""

    @property
    def name(self) -> str:
        """Dotted path inside the network."""
        ...

    def observe(self, observer: Observer) -> RemovableHandle:
        """Call ``observer`` with queries and keys whenever this site runs."""
        ...

    def cut(self, query_mask: Tensor, key_mask: Tensor, reached: Callable[[], None]) -> RemovableHandle:
        """Zero the weights from masked queries [B, Nq] to masked keys [B, Nk]; ``reached`` is called each time."""
        ...

    def drop(self, kept: Tensor, reached: Callable[[], None]) -> RemovableHandle:
        """Leave keys and values outside ``kept`` [B, Nk] out of the softmax; ``reached`` is called each time."""
        ...


@dataclass(frozen=True)
class FusedSite:
    """The ``Attend`` module of one of our own layers."""

    name: str
    attend: Attend

    def observe(self, observer: Observer) -> RemovableHandle:
        def before(module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None]) -> None:
            q, k, _ = inputs
            observer(q, k, q.shape[-1] ** -0.5)

        return self.attend.register_forward_pre_hook(before)

    def cut(self, query_mask: Tensor, key_mask: Tensor, reached: Callable[[], None]) -> RemovableHandle:
        """Weights from queries in ``query_mask`` [B, Nq] to keys in ``key_mask`` [B, Nk] count as zero, exactly.

        Softmax rows are not renormalised, so a zeroed weight is the same as a zeroed value: ``P v`` with the keys'
        values set to zero.  Two fused calls replace the N x N matrix.
        """

        def after(
            module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor | None
        ) -> Tensor | None:
            q, k, v = inputs
            reached()
            if v is None:
                return None
            without = self.attend.forward(q, k, v.masked_fill(key_mask[:, None, :, None], 0))
            return torch.where(query_mask[:, None, :, None], without, output)  # type: ignore[arg-type]

        return self.attend.register_forward_hook(after)

    def drop(self, kept: Tensor, reached: Callable[[], None]) -> RemovableHandle:
        """What is left is softmaxed anew, in one fused call with fewer keys."""

        # by name, so that an observer of the same site sees queries, keys and values as they were
        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            reached()
            return inputs, {**named, "kept": kept}

        handle: RemovableHandle = self.attend.register_forward_pre_hook(before, with_kwargs=True)
        return handle


@dataclass(frozen=True)
class ExplicitSite:
    """A cross-attention module of the public structure, called as ``(query, key, value, qpos, kpos)``."""

    name: str
    attention: Any  # nn.Module with projq, projk, attn_drop, num_heads, scale and, optionally, rope

    def observe(self, observer: Observer) -> RemovableHandle:
        attention = self.attention

        def heads(tokens: Tensor, position: Tensor | None) -> Tensor:
            split = tokens.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
            rope = getattr(attention, "rope", None)
            return split if rope is None else rope(split, position)  # type: ignore[no-any-return]

        def before(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            names = ("query", "key", "value", "qpos", "kpos")
            call = {**dict(zip(names, inputs, strict=False)), **named}
            q = heads(attention.projq(call["query"]), call.get("qpos"))
            k = heads(attention.projk(call["key"]), call.get("kpos"))
            observer(q, k, float(attention.scale))

        handle: RemovableHandle = attention.register_forward_pre_hook(before, with_kwargs=True)
        return handle

    def cut(self, query_mask: Tensor, key_mask: Tensor, reached: Callable[[], None]) -> RemovableHandle:
        """As ``FusedSite.cut``, on the weights [B, heads, Nq, Nk] that this network forms anyway."""
        pairs = query_mask[:, None, :, None] & key_mask[:, None, None, :]

        def after(module: nn.Module, inputs: tuple[Tensor], weights: Tensor) -> Tensor:
            reached()
            return weights.masked_fill(pairs, 0)

        handle: RemovableHandle = self.attention.attn_drop.register_forward_hook(after)
        return handle

    def drop(self, kept: Tensor, reached: Callable[[], None]) -> RemovableHandle:
        """As ``FusedSite.drop``: the weights that stay, divided by their sum, are the softmax over them alone."""

        def after(module: nn.Module, inputs: tuple[Tensor], weights: Tensor) -> Tensor:
            reached()
            weights = weights * kept[:, None, None]
            return weights / weights.sum(dim=-1, keepdim=True)

        handle: RemovableHandle = self.attention.attn_drop.register_forward_hook(after)
        return handle


def find_sites(network: nn.Module, location: str) -> list[Site]:
    """Return the sites of ``network`` at ``location`` (a key of ``LOCATIONS``), one per layer, first layer first.

    Raises HookError, naming what was looked for, when the network has none there.
    """
    if location not in LOCATIONS:
        raise HookError(f"No location is called {location!r}; known are {', '.join(sorted(LOCATIONS))}.")
    blocks_name, attention_name = LOCATIONS[location]
    blocks = _blocks(network, blocks_name)
    if not blocks:
        raise HookError(f"{type(network).__name__} has no {blocks_name!r}; expected a list of blocks there.")
    return [
        _site(f"{blocks_name}.{i}.{attention_name}", getattr(b, attention_name, None)) for i, b in enumerate(blocks)
    ]


def _blocks(network: nn.Module, path: str) -> list[nn.Module]:
    found: Any = network
    for part in path.split("."):
        found = getattr(found, part, ())
    return list(found)


def _site(name: str, attention: Any) -> Site:
    attend = getattr(attention, "attend", None)
    if isinstance(attend, Attend):
        return FusedSite(f"{name}.attend", attend)
    missing = [part for part in ("projq", "projk", "num_heads", "scale", "attn_drop") if not hasattr(attention, part)]
    if missing:
        raise HookError(f"No attention to hook at {name!r}: {type(attention).__name__} lacks {', '.join(missing)}.")
    return ExplicitSite(name, attention)
