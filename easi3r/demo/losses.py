"""What training minimises: DUSt3R's loss, and an aid for the beginning."""

from __future__ import annotations

import torch
from torch import Tensor

from easi3r.backbones.dust3r import PointmapPair

ALPHA = 0.2  # DUSt3R's weight of the confidence's logarithm


def confidence_loss(prediction: PointmapPair, truth_first: Tensor, truth_second: Tensor) -> tuple[Tensor, Tensor]:
    """DUSt3R's loss and, detached, the mean error of both views; points [B, H, W, 3] in view 1's camera frame.

    Each pair's points are divided by their mean distance from view 1's camera; confidence C weighs the distance to
    the truth: C |x - x'| - alpha log C.
    """
    errors = []
    for first, second in ((prediction.points_first, prediction.points_second), (truth_first, truth_second)):
        both = torch.stack([first, second], dim=1)
        errors.append(both / both.square().sum(-1, keepdim=True).add(1e-12).sqrt().mean((1, 2, 3), keepdim=True))
    error = (errors[0] - errors[1]).square().sum(-1).add(1e-12).sqrt()
    confidence = torch.stack([prediction.confidence_first, prediction.confidence_second], dim=1)
    return (confidence * error - ALPHA * confidence.log()).mean(), error.detach().mean()


def matching_loss(logits: Tensor, place: Tensor, visible: Tensor, centres: Tensor, patch: int) -> Tensor:
    """Cross-entropy of attention with the true correspondence, over the tokens that the other view shows.

    logits: [B, N, N] of queries and keys.  place: [B, N, 2] pixels where the other view shows each query's token.
    visible: [B, N] bool.  centres: [N, 2] pixels of the keys; the target spreads bilinearly over the nearest four.
    """
    weight = (1 - (place[:, :, None] - centres).abs() / patch).clamp(min=0).prod(-1)  # [B, N, N]
    weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-6)
    loss = -(weight * logits.float().log_softmax(-1)).sum(-1)
    return (loss * visible).sum() / visible.sum().clamp(min=1)
