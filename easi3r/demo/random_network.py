"""A small DUSt3R with seeded random weights: shows that everything runs; its geometry means nothing."""

from __future__ import annotations

import logging

import torch

from easi3r.backbones.checkpoint import CheckpointInfo
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig

logger = logging.getLogger("easi3r")

MEANS_NOTHING = "These are random weights, for trying things out: the geometry and the masks mean nothing."


def random_network(seed: int) -> tuple[Dust3r, CheckpointInfo]:
    """0.9 M parameters, the same for the same seed; its points lie in front of the camera."""
    config = Dust3rConfig(
        enc_embed_dim=96,
        enc_depth=2,
        enc_num_heads=4,
        dec_embed_dim=96,
        dec_depth=4,
        dec_num_heads=4,
        img_size=(128, 128),
        head_type="linear",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Dust3r(config).requires_grad_(False).eval()
    for head in (network.downstream_head1, network.downstream_head2):
        bias = head.get_parameter("proj.bias").view(4, -1)
        bias[:] = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None]
    logger.warning(MEANS_NOTHING)
    return network, CheckpointInfo("demo (random weights)", None, "Apache-2.0")
