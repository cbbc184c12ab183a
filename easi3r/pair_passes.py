"""The passes of a network that sees two frames at a time (Easi3R, arXiv 2503.24391, on DUSt3R, arXiv 2312.14132)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from easi3r.attention_maps import AttentionStatistics
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.clock import Clock
from easi3r.config import HeadSettings, Settings
from easi3r.dynamic_masks import cluster_tokens, masks_of
from easi3r.errors import InputError
from easi3r.inference import changed_by_cut, empty_predictions, observe_pairs, predict_movers
from easi3r.passes import Found, Load, Piece
from easi3r.progress import Progress
from easi3r.structures import DynamicMasks, PairPredictions


@dataclass(frozen=True)
class PairPasses:
    """Every pair decoded; attention as mean logits over the queries, folded in while the pairs stream by."""

    network: Dust3r
    progress: Progress
    clock: Clock

    def settled(self, settings: Settings, *, masks_only: bool) -> Settings:
        """``auto`` alignment is the fast one; InputError for what the heads of pairs do not give."""
        if settings.heads != HeadSettings():
            raise InputError(
                "points and tracks choose among the heads of a network that sees all frames at once, but this one sees "
                "pairs; expected weights of VGGT, or leave them out."
            )
        if settings.alignment.method != "auto":
            return settings
        return replace(settings, alignment=replace(settings.alignment, method="fast"))

    def load(
        self, size: tuple[int, int, int], num_pairs: int, batch_size: int, settings: Settings, *, masks_only: bool
    ) -> Load:
        """For a piece of this size (frames, height, width)."""
        config, (length, height, width) = self.network.config, size
        pixels = height * width
        tokens = pixels // config.patch_size**2
        element = self.network.decoder_embed.weight.element_size()
        activations = batch_size * 2 * tokens * 40 * config.enc_embed_dim * element
        if not masks_only and config.head_type == "dpt":
            activations += batch_size * pixels * 256 * 3 * element
        passes: int = settings.motion.passes if settings.motion.masks is None else 1
        passes += settings.keep == "dynamic" and not masks_only
        return Load(
            activation_bytes=activations,
            kept_bytes=length * tokens * 16 * config.dec_depth * config.dec_num_heads,
            token_bytes=length * tokens * element * config.enc_embed_dim,
            frame_flops=encoder_flops(config, tokens),
            pass_flops=num_pairs * passes * decoder_flops(config, tokens),
            at_once=f"{batch_size} pairs",
        )

    def look(self, piece: Piece, settings: Settings, *, masks_only: bool) -> Found:
        """Decoders once or twice: masks of one pass cut the attention of the next.

        Masks, maps and points are those of the last pass; given masks need a single one.
        """
        network, clock, pairs = self.network, self.clock, piece.pairs
        n, height, width = piece.images.shape[:3]
        grid, patch_size = network.grid_of(height, width), network.patch_size
        with clock("encoder"):
            labels = cluster_tokens(piece.tokens, settings.motion.clusters, settings.seed).reshape(n, *grid)
        masks, passes = piece.masks, 1 if piece.masks is not None else settings.motion.passes
        boxes = None if piece.boxes is None else [box.tokens(patch_size) for box in piece.boxes]
        statistics = AttentionStatistics(n, grid, boxes)
        for number in range(1, passes + 1):
            with clock(f"pass {number}"):
                dynamic_tokens = None if masks is None else masks.tokens(patch_size)
                points_wanted = not masks_only and number == passes
                predictions = empty_predictions(pairs, height, width) if points_wanted else None
                seen = np.ones(len(pairs), dtype=bool)
                if number > 1:  # where no points are wanted, most pairs without a moving token need no second look
                    assert dynamic_tokens is not None
                    statistics, again = statistics.reopened(pairs, changed_by_cut(pairs, dynamic_tokens))
                    seen = seen if points_wanted else again
                if seen.any():
                    observe_pairs(
                        network,
                        piece.tokens,
                        pairs[seen],
                        grid,
                        statistics.update,
                        self.progress,
                        batch_size=piece.batch_size,
                        dynamic_tokens=dynamic_tokens,
                        predictions=predictions,
                        boxes=piece.boxes,
                    )
                attention = statistics.maps()
                if piece.masks is None:
                    masks = masks_of(attention.dynamic_map, labels, piece.images, piece.excess, settings.motion)
        assert masks is not None
        return Found(masks, attention, predictions)

    def look_at_movers(self, piece: Piece, masks: DynamicMasks, predictions: PairPredictions) -> None:
        """Decoders once more, with what moves and what rests kept apart in both directions."""
        predict_movers(
            self.network,
            piece.tokens,
            piece.pairs,
            self.network.grid_of(*piece.images.shape[1:3]),
            self.progress,
            batch_size=piece.batch_size,
            dynamic_mask=masks.mask,
            dynamic_tokens=masks.tokens(self.network.patch_size),
            predictions=predictions,
            boxes=piece.boxes,
        )


def encoder_flops(config: Dust3rConfig, tokens: int) -> float:
    """Of one frame."""
    width = config.enc_embed_dim
    return config.enc_depth * (24.0 * tokens * width**2 + 4.0 * tokens**2 * width)


def decoder_flops(config: Dust3rConfig, tokens: int) -> float:
    """Of one directed pair, both decoders, without heads."""
    width = config.dec_embed_dim
    return 2 * config.dec_depth * (32.0 * tokens * width**2 + 8.0 * tokens**2 * width)
