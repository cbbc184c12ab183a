"""Run the network over a clip: every frame encoded once, every pair decoded in batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r, Grid
from easi3r.precision import computing
from easi3r.progress import Progress
from easi3r.structures import Array, PairPredictions
from hooks import capture_attention, cut_attention, separate_attention

# Called per batch with pairs [B, 2], the source maps [B, N, C] of their second and the reference maps of their first
# views; whoever listens folds them in, so that no pair has to be kept.
AttentionListener = Callable[[Array, Tensor, Tensor], None]


def to_network_input(images: Array) -> Tensor:
    """[B, H, W, 3] uint8 RGB -> [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1


@torch.no_grad()
def encode_frames(
    network: Dust3r, images: Array, batch_size: int, progress: Progress, keep_on: torch.device | None = None
) -> Tensor:
    """[n, H, W, 3] uint8 -> encoder tokens [n, N, C] in the format of the network's matrices.

    keep_on: where the tokens are kept; None: on the network's device.
    """
    starts = range(0, len(images), batch_size)
    with computing(network):
        return torch.cat(
            [
                network.encode(to_network_input(images[start : start + batch_size])).to(keep_on, network.dtype)
                for start in progress(starts, "encoding frames")
            ]
        )


@torch.no_grad()
def observe_pairs(
    network: Dust3r,
    tokens: Tensor,
    pairs: Array,
    grid: Grid,
    listener: AttentionListener,
    progress: Progress,
    *,
    batch_size: int,
    dynamic_tokens: Array | None = None,
    predictions: PairPredictions | None = None,
) -> None:
    """One pass of the decoders over all pairs.

    tokens: [n, N, C] encoder tokens on any device; a batch's go to the network's.  pairs: [P, 2].
    dynamic_tokens: [n, h, w] bool, True = moves; given in the second pass, where static tokens of a pair's first view
        do not attend to dynamic tokens of its second (decoder 1 only; Easi3R section 3.2).
    predictions: filled in place by the heads; None: no head is run, and the decoders stop at their last logits.
    """
    moving = np.zeros((len(tokens), tokens.shape[1]), bool) if dynamic_tokens is None else dynamic_tokens
    dynamic = torch.from_numpy(moving).flatten(1).to(network.device)
    cut_pairs = changed_by_cut(pairs, moving)
    starts = range(0, len(pairs), batch_size)
    with capture_attention(network) as captured, computing(network):
        for start in progress(starts, "decoding pairs, movers cut off" if cut_pairs.any() else "decoding pairs"):
            part = slice(start, start + batch_size)
            first, second = pairs[part].T
            cuts = bool(cut_pairs[part].any())
            views = tokens[first].to(network.device), tokens[second].to(network.device)
            with cut_attention(network, ~dynamic[first], dynamic[second]) if cuts else nullcontext():
                if predictions is None:
                    network.attend(*views, grid)
                else:
                    decoded = network.decode(*views, grid)
            listener(pairs[part], *captured.take())
            if predictions is not None:
                for name, values in vars(network.predict(decoded)).items():
                    room = getattr(predictions, name)
                    room[part] = values.clamp(max=torch.finfo(room.dtype).max)  # a confidence may exceed half precision


@torch.no_grad()
def predict_movers(
    network: Dust3r,
    tokens: Tensor,
    pairs: Array,
    grid: Grid,
    progress: Progress,
    *,
    batch_size: int,
    dynamic_mask: Array,
    dynamic_tokens: Array,
    predictions: PairPredictions,
) -> None:
    """Predict moving pixels once more, with attention cut the other way round too; static pixels stay as they are.

    To the edit of the second pass its reverse is added: in decoder 1, *dynamic* tokens of a pair's first view do not
    attend to *static* tokens of its second either, so that a mover is matched with movers and not with the background
    that it hid or laid bare.  The cameras rest on static pixels, whose predictions remain.

    tokens, pairs, grid, batch_size: as for ``observe_pairs``.  dynamic_mask: [n, H, W] bool, True = moves.
    dynamic_tokens: [n, h, w] bool, the same by tokens.
    predictions: of the second pass, for all pairs; changed in place where a pixel moves.
    """
    dynamic = torch.from_numpy(dynamic_tokens).flatten(1).to(network.device)
    moving = torch.from_numpy(dynamic_mask)
    rows = np.flatnonzero(changed_by_cut(pairs, ~dynamic_tokens))
    with computing(network):
        for start in progress(range(0, len(rows), batch_size), "decoding pairs for what moves"):
            part = rows[start : start + batch_size]
            first, second = pairs[part].T
            with separate_attention(network, dynamic[first], dynamic[second]):
                decoded = network.decode(tokens[first].to(network.device), tokens[second].to(network.device), grid)
            for name, values in vars(network.predict(decoded)).items():
                room = getattr(predictions, name)
                chosen = moving[first if name.endswith("_first") else second]
                mixed = room[part]
                mixed[chosen] = values.to(room.device).clamp(max=torch.finfo(room.dtype).max).to(room.dtype)[chosen]
                room[part] = mixed


def changed_by_cut(pairs: Array, dynamic_tokens: Array) -> Array:
    """[P] bool: pairs for which the second pass differs: something moves in the second view, and not all of the first.

    dynamic_tokens: [n, ...] bool, True = moves.  Turned over, it says for which pairs the reversed edit differs.
    """
    moving = dynamic_tokens.reshape(len(dynamic_tokens), -1)
    some, all_of_it = np.asarray(moving.any(axis=1)), np.asarray(moving.all(axis=1))
    return ~all_of_it[pairs[:, 0]] & some[pairs[:, 1]]


def empty_predictions(pairs: Array, height: int, width: int, dtype: torch.dtype = torch.float16) -> PairPredictions:
    """Room for the heads' output of all pairs, on the CPU."""
    shape = (len(pairs), height, width)
    return PairPredictions(
        pairs=np.asarray(pairs),
        points_first=torch.empty(*shape, 3, dtype=dtype),
        points_second=torch.empty(*shape, 3, dtype=dtype),
        confidence_first=torch.empty(shape, dtype=dtype),
        confidence_second=torch.empty(shape, dtype=dtype),
    )
