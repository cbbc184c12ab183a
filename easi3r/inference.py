"""Run the network over a clip: every frame encoded once, every pair decoded in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from easi3r.backbones.dust3r import Dust3r, PointmapPair
from easi3r.backbones.interface import Backbone, Grid
from easi3r.canvas import Box, batches, placed, taken
from easi3r.precision import computing
from easi3r.progress import Progress
from easi3r.structures import Array, PairPredictions
from hooks import capture_attention, cut_attention, separate_attention

# Called per batch with pairs [B, 2], the source maps [B, N, C] of their second and the reference maps of their first
# views; whoever listens folds them in, so that no pair has to be kept.
AttentionListener = Callable[[Array, Tensor, Tensor], None]
Boxes = Sequence[Box]


def to_network_input(images: Array, input_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    """[B, H, W, 3] uint8 RGB -> [B, 3, H, W] float32 in ``input_range``."""
    low, high = input_range
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 * (high - low) + low


@torch.no_grad()
def encode_frames(
    network: Backbone,
    images: Array,
    batch_size: int,
    progress: Progress,
    keep_on: torch.device | None = None,
    boxes: Boxes | None = None,
    only: range | None = None,
) -> Tensor:
    """[n, H, W, 3] uint8 -> encoder tokens [n, N, C] in the format of the network's matrices.

    keep_on: where the tokens are kept; None: on the network's device.
    boxes: [n] where each image lies, if they are of unequal size: the network sees nothing of the padding, whose tokens
        are 0.
    only: consecutive frames whose tokens are wanted, as they come out when all are encoded: in the same batches.
    """
    grid, boxes = network.grid_of(*images.shape[1:3]), boxes or [Box(0, 0, *images.shape[1:3])] * len(images)
    wanted = np.isin(np.arange(len(images)), range(len(images)) if only is None else only)
    order = [rows for rows in batches(boxes, batch_size) if wanted[rows].any()]
    parts = []
    with computing(network):
        for rows in progress(order, "encoding frames"):
            box = boxes[rows[0]]
            seen = to_network_input(images[rows][:, box.rows, box.columns], network.input_range)
            parts.append(placed(network.encode(seen).to(keep_on, network.dtype), box.tokens(network.patch_size), grid))
    tokens, rows = torch.cat(parts), np.concatenate(order)
    if (np.diff(rows) > 0).all() and wanted[rows].all():
        return tokens
    in_order = np.argsort(rows)
    return tokens[torch.from_numpy(in_order[wanted[rows[in_order]]])]


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
    boxes: Boxes | None = None,
) -> None:
    """One pass of the decoders over all pairs.

    tokens: [n, N, C] encoder tokens on any device; a batch's go to the network's.  pairs: [P, 2].
    dynamic_tokens: [n, h, w] bool, True = moves; given in the second pass, where static tokens of a pair's first view
        do not attend to dynamic tokens of its second (decoder 1 only; Easi3R section 3.2).
    predictions: filled in place by the heads; None: no head is run, and the decoders stop at their last logits.
    boxes: [n] where each image lies on the canvas, in pixels, if they are of unequal size.  The network sees
        nothing of the padding, whose predictions stay as they are; maps are of the tokens in each box.
    """
    moving = np.zeros((len(tokens), tokens.shape[1]), bool) if dynamic_tokens is None else dynamic_tokens
    dynamic = torch.from_numpy(moving).flatten(1).to(network.device)
    cut_pairs = changed_by_cut(pairs, moving)
    patch = network.config.patch_size
    inner = [box.tokens(patch) for box in boxes] if boxes else [Box(0, 0, *grid)] * len(tokens)
    order = batches([(inner[a], inner[b]) for a, b in pairs.tolist()], batch_size)
    with capture_attention(network) as captured, computing(network):
        for rows in progress(order, "decoding pairs, movers cut off" if cut_pairs.any() else "decoding pairs"):
            frames = first, second = pairs[rows].T
            both = box1, box2 = inner[first[0]], inner[second[0]]
            views = [taken(tokens[f].to(network.device), box, grid) for f, box in zip(frames, both, strict=True)]
            still, moves = taken(~dynamic[first], box1, grid), taken(dynamic[second], box2, grid)
            with cut_attention(network, still, moves) if cut_pairs[rows].any() else nullcontext():
                if predictions is None:
                    network.attend(views[0], views[1], box1.size, box2.size)
                else:
                    decoded = network.decode(views[0], views[1], box1.size, box2.size)
            listener(pairs[rows], *captured.take())
            if predictions is not None:
                write_predictions(network.predict(decoded), predictions, rows, [box.pixels(patch) for box in both])


def write_predictions(
    predicted: PointmapPair,
    predictions: PairPredictions,
    rows: Array,
    boxes: Sequence[Box],
    only: Array | None = None,
) -> None:
    """rows: of ``predictions``.  boxes: where the first and the second view lie on the canvas, in pixels.

    only: [n, H, W] bool of all frames; the rest stays as it is.
    """
    for view, box, frames in zip(("first", "second"), boxes, predictions.pairs[rows].T, strict=True):
        window = torch.from_numpy(rows), box.rows, box.columns
        for name in (f"points_{view}", f"confidence_{view}"):
            room = getattr(predictions, name)
            values = getattr(predicted, name).clamp(max=torch.finfo(room.dtype).max).to(room)  # it may exceed float16
            if only is not None:
                chosen = torch.from_numpy(only[frames, box.rows, box.columns])
                values = torch.where(chosen[..., None] if values.ndim == 4 else chosen, values, room[window])
            room[window] = values


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
    boxes: Boxes | None = None,
) -> None:
    """Predict moving pixels once more, with attention cut the other way round too; static pixels stay as they are.

    To the edit of the second pass its reverse is added: in decoder 1, *dynamic* tokens of a pair's first view do not
    attend to *static* tokens of its second either, so that a mover is matched with movers and not with the background
    that it hid or laid bare.  The cameras rest on static pixels, whose predictions remain.

    tokens, pairs, grid, batch_size, boxes: as for ``observe_pairs``.  dynamic_mask: [n, H, W] bool, True = moves.
    dynamic_tokens: [n, h, w] bool, the same by tokens.
    predictions: of the second pass, for all pairs; changed in place where a pixel moves.
    """
    dynamic = torch.from_numpy(dynamic_tokens).flatten(1).to(network.device)
    patch, changed = network.config.patch_size, np.flatnonzero(changed_by_cut(pairs, ~dynamic_tokens))
    inner = [box.tokens(patch) for box in boxes] if boxes else [Box(0, 0, *grid)] * len(tokens)
    order = batches([(inner[a], inner[b]) for a, b in pairs[changed].tolist()], batch_size)
    with computing(network):
        for some in progress(order, "decoding pairs for what moves"):
            rows = changed[some]
            frames = first, second = pairs[rows].T
            both = box1, box2 = inner[first[0]], inner[second[0]]
            views = [taken(tokens[f].to(network.device), box, grid) for f, box in zip(frames, both, strict=True)]
            with separate_attention(network, taken(dynamic[first], box1, grid), taken(dynamic[second], box2, grid)):
                decoded = network.decode(views[0], views[1], box1.size, box2.size)
            pixels = [box.pixels(patch) for box in both]
            write_predictions(network.predict(decoded), predictions, rows, pixels, only=dynamic_mask)


def changed_by_cut(pairs: Array, dynamic_tokens: Array) -> Array:
    """[P] bool: pairs for which the second pass differs: something moves in the second view, and not all of the first.

    dynamic_tokens: [n, ...] bool, True = moves.  Turned over, it says for which pairs the reversed edit differs.
    """
    moving = dynamic_tokens.reshape(len(dynamic_tokens), -1)
    some, all_of_it = np.asarray(moving.any(axis=1)), np.asarray(moving.all(axis=1))
    return ~all_of_it[pairs[:, 0]] & some[pairs[:, 1]]


def empty_predictions(pairs: Array, height: int, width: int, dtype: torch.dtype = torch.float16) -> PairPredictions:
    """Room for the heads' output of all pairs, on the CPU; NaN and 1 where nothing is written, which weighs nothing."""
    shape = (len(pairs), height, width)
    return PairPredictions(
        pairs=np.asarray(pairs),
        points_first=torch.full((*shape, 3), torch.nan, dtype=dtype),
        points_second=torch.full((*shape, 3), torch.nan, dtype=dtype),
        confidence_first=torch.ones(shape, dtype=dtype),
        confidence_second=torch.ones(shape, dtype=dtype),
    )
