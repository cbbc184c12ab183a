"""Run the network over a clip: every frame encoded once, every pair decoded in batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r, Grid
from easi3r.progress import Progress
from easi3r.structures import Array, PairPredictions
from hooks import capture_attention, cut_attention

# Called per batch with pairs [B, 2], the source maps [B, N, C] of their second and the reference maps of their first
# views; whoever listens folds them in, so that no pair has to be kept.
AttentionListener = Callable[[Array, Tensor, Tensor], None]


def to_network_input(images: Array) -> Tensor:
    """[B, H, W, 3] uint8 RGB -> [B, 3, H, W] float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * 2 - 1


@torch.no_grad()
def encode_frames(network: Dust3r, images: Array, batch_size: int, progress: Progress) -> Tensor:
    """[n, H, W, 3] uint8 -> encoder tokens [n, N, C] on the network's device."""
    starts = range(0, len(images), batch_size)
    return torch.cat(
        [
            network.encode(to_network_input(images[start : start + batch_size]))
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

    tokens: [n, N, C] encoder tokens.  pairs: [P, 2].
    dynamic_tokens: [n, h, w] bool, True = moves; given in the second pass, where static tokens of a pair's first view
        do not attend to dynamic tokens of its second (decoder 1 only; Easi3R section 3.2).
    predictions: filled in place by the heads; None: no head is run.
    """
    dynamic = None if dynamic_tokens is None else torch.from_numpy(dynamic_tokens).flatten(1).to(tokens.device)
    starts = range(0, len(pairs), batch_size)
    with capture_attention(network) as captured:
        for start in progress(starts, "decoding pairs" if dynamic is None else "decoding pairs, movers cut off"):
            part = slice(start, start + batch_size)
            first, second = pairs[part].T
            cut = nullcontext() if dynamic is None else cut_attention(network, ~dynamic[first], dynamic[second])
            with cut:
                decoded = network.decode(tokens[first], tokens[second], grid)
            listener(pairs[part], *captured.take())
            if predictions is not None:
                pointmaps = network.predict(decoded)
                for name, values in vars(pointmaps).items():
                    getattr(predictions, name)[part] = values.to("cpu")


def empty_predictions(pairs: Array, height: int, width: int) -> PairPredictions:
    """Room for the heads' output of all pairs, on the CPU."""
    shape = (len(pairs), height, width)
    return PairPredictions(
        pairs=np.asarray(pairs),
        points_first=torch.empty(*shape, 3),
        points_second=torch.empty(*shape, 3),
        confidence_first=torch.empty(shape),
        confidence_second=torch.empty(shape),
    )
