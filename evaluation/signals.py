"""Training-free signals of motion: one map per frame and signal, [n, h, w] over tokens, larger = rather moves.

What the network alone knows (attention, points, confidence, encoder tokens), and beside it what two classical
baselines see (optical flow, frame difference).  Nothing here is trained, and nothing is tuned per clip.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from easi3r.attention_maps import normalised_map, replace_sink
from easi3r.backbones.dust3r import Dust3r
from easi3r.backbones.interface import Grid
from easi3r.config import FlowSettings
from easi3r.demo.judgement import focal_of_pointmap, pose_of_pointmap
from easi3r.demo.static_pairs import token_centres
from easi3r.demo.worlds import transform
from easi3r.dynamic_masks import cluster_tokens, smooth_by_cluster
from easi3r.epipolar import epipolar_residual
from easi3r.flow import estimate_flow
from easi3r.inference import to_network_input
from easi3r.normalise import min_max_per_frame
from easi3r.progress import silent
from hooks import FrameStatistics
from hooks.sites import find_sites

Array = NDArray[Any]
MATCHING_HEADS = 4  # heads whose attention agrees best with the rigid prediction, per clip and decoder
PAIRS_AT_ONCE = 8


def _keep(kept: list[tuple[Tensor, Tensor, float]], q: Tensor, k: Tensor, scale: float) -> None:
    kept.append((q, k, scale))


class Reading:
    """Everything the signals need of one clip, folded in pair by pair."""

    def __init__(self, network: Dust3r, images: Array, pairs: Array) -> None:
        self.network, self.pairs = network, pairs
        self.n, self.grid = len(images), network.grid_of(*images.shape[1:3])
        self.patch = network.config.patch_size
        self.means = {name: FrameStatistics(self.n) for name in ("source", "reference")}
        self.maxima = {name: FrameStatistics(self.n) for name in ("source", "reference")}
        self.confidence = {name: FrameStatistics(self.n) for name in ("first", "second")}
        self.points_first: list[Tensor] = []  # [P, N, 3] at the tokens' centres, in the first view's frame
        self.points_second: list[Tensor] = []
        self.poses: list[Tensor] = []  # [P, 4, 4] second camera in the first's frame
        self.focal: list[Tensor] = []  # [P]
        self.matches: dict[str, list[Tensor]] = {"decoder1": [], "decoder2": []}  # [P, C, N, 2] pixels
        with torch.inference_mode():
            self.tokens = network.encode(to_network_input(images))
            for start in range(0, len(pairs), PAIRS_AT_ONCE):
                self._read(pairs[start : start + PAIRS_AT_ONCE])

    def _read(self, pairs: Array) -> None:
        first, second = pairs.T
        caught: dict[str, list[tuple[Tensor, Tensor, float]]] = {"decoder1": [], "decoder2": []}
        handles = [
            site.observe(partial(_keep, kept))
            for name, kept in caught.items()
            for site in find_sites(self.network, name)
        ]
        try:
            decoded = self.network.decode(self.tokens[first], self.tokens[second], self.grid)
        finally:
            for handle in handles:
                handle.remove()
        predicted = self.network.predict(decoded)
        for decoder, role, frames in (("decoder1", "source", second), ("decoder2", "reference", first)):
            logits = torch.cat([q @ k.mT * scale for q, k, scale in caught[decoder]], dim=1)  # [B, C, Nq, Nk]
            means, maxima = logits.mean(2).mT, logits.amax(2).mT
            self.means[role].update(frames.tolist(), replace_sink(means, self.grid))
            self.maxima[role].update(frames.tolist(), replace_sink(maxima, self.grid))
            self.matches[decoder].append(expected_position(logits, self.grid, self.patch))
        for role, frames, values in (
            ("first", first, predicted.confidence_first),
            ("second", second, predicted.confidence_second),
        ):
            self.confidence[role].update(frames.tolist(), over_tokens(values.log(), self.patch))
        focal = focal_of_pointmap(predicted.points_first)
        self.focal.append(focal)
        self.poses.append(pose_of_pointmap(predicted.points_second, focal))
        self.points_first.append(over_tokens(predicted.points_first, self.patch))
        self.points_second.append(over_tokens(predicted.points_second, self.patch))

    def centres(self) -> Tensor:
        """[N, 2] pixel coordinates of the tokens' centres."""
        height, width = self.grid
        return token_centres(height * self.patch, width * self.patch, self.patch)

    def rigid_positions(self) -> tuple[Tensor, Tensor]:
        """Where the rigid world puts each token in the other frame: of the first in the second, of the second in the
        first; [P, N, 2] pixels each."""
        height, width = (side * self.patch for side in self.grid)
        middle = torch.tensor([(width - 1) / 2, (height - 1) / 2])
        focal = torch.cat(self.focal)[:, None, None]
        to_second = torch.linalg.inv(torch.cat(self.poses))[:, None]

        def project(points: Tensor) -> Tensor:
            return points[..., :2] / points[..., 2:].clamp(min=1e-3) * focal + middle

        return project(transform(to_second, torch.cat(self.points_first))), project(torch.cat(self.points_second))


def network_signals(network: Dust3r, images: Array, pairs: Array, seed: int = 0) -> dict[str, Array]:
    """All signals that are read from the network alone."""
    reading = Reading(network, images, pairs)
    grid, n = reading.grid, reading.n
    labels = cluster_tokens(reading.tokens, 64, seed)

    def shaped(values: Tensor) -> Array:
        return np.asarray(values.reshape(n, *grid).float().numpy())

    source, reference = reading.means["source"], reading.means["reference"]
    source_max, reference_max = reading.maxima["source"], reading.maxima["reference"]
    maps = {
        "source_mean": 1 - normalised_map(source.mean),
        "source_std": normalised_map(source.std),
        "reference_mean": normalised_map(reference.mean),
        "reference_std": normalised_map(reference.std),
    }
    signals = {f"attention {name}": values for name, values in maps.items()}
    signals["attention published product"] = min_max_per_frame(
        maps["source_mean"] * maps["source_std"] * maps["reference_mean"] * (1 - maps["reference_std"])
    )
    signals["attention std product"] = maps["source_std"] * maps["reference_std"]
    signals["attention std product, maximum over queries"] = normalised_map(source_max.std) * normalised_map(
        reference_max.std
    )
    signals["low confidence"] = -reading.confidence["second"].mean
    signals["confidence varies"] = reading.confidence["second"].std
    signals["points: rigid inconsistency"] = rigid_inconsistency(reading)
    signals["points: depth varies"] = depth_variation(reading)
    signals |= match_signals(reading)
    found = {name: shaped(values) for name, values in signals.items()}
    clustered = {
        f"{name}, clustered": smooth_by_cluster(found[name], labels.reshape(n, *grid))
        for name in (
            "attention published product",
            "attention std product, maximum over queries",
            "matches: attention off the rigid place",
            "matches: tokens off the rigid place",
        )
    }
    return found | clustered


def match_signals(reading: Reading) -> dict[str, Tensor]:
    """Where attention or token similarity finds a token again, against where the rigid world would put it."""
    to_second, to_first = reading.rigid_positions()
    first, second = (torch.from_numpy(column) for column in reading.pairs.T)
    centres = reading.centres()
    size = torch.tensor(reading.grid).flip(0) * reading.patch
    inside = [((p > -0.5) & (p < size - 0.5)).all(-1) for p in (to_second, to_first)]

    residuals, frames = [], []
    for decoder, expected, seen, frame in (
        ("decoder1", to_second, inside[0], first),
        ("decoder2", to_first, inside[1], second),
    ):
        found = torch.cat(reading.matches[decoder])  # [P, C, N, 2]
        off = (found - expected[:, None]).square().sum(-1).sqrt()  # [P, C, N]
        typical = torch.stack([off[:, c][seen].median() for c in range(off.shape[1])])
        best = typical.topk(MATCHING_HEADS, largest=False).indices
        residual = off[:, best].mean(1)
        residuals.append(torch.where(seen, residual, torch.nan))
        frames.append(frame)
    attention_off = mean_over_pairs(torch.cat(residuals), torch.cat(frames), reading.n)

    normal = torch.nn.functional.normalize(reading.tokens - reading.tokens.mean((0, 1)), dim=-1)
    similarity = normal[first] @ normal[second].mT  # [P, N, N]
    token_residuals, warp = [], []
    for logits, expected, seen in (
        (similarity, to_second, inside[0]),
        (similarity.mT, to_first, inside[1]),
    ):
        found = expected_position(20 * logits[:, None], reading.grid, reading.patch)[:, 0]
        off = (found - expected).square().sum(-1).sqrt()
        token_residuals.append(torch.where(seen, off, torch.nan))
        near = torch.exp(-(expected[:, :, None] - centres).square().sum(-1) / (2 * (0.5 * reading.patch) ** 2))
        there = (near * logits).sum(-1) / near.sum(-1).clamp(min=1e-6)
        warp.append(torch.where(seen, 1 - there, torch.nan))
    both = torch.cat([first, second])
    return {
        "matches: attention off the rigid place": attention_off,
        "matches: tokens off the rigid place": mean_over_pairs(torch.cat(token_residuals), both, reading.n),
        "matches: tokens differ at the rigid place": mean_over_pairs(torch.cat(warp), both, reading.n),
    }


def rigid_inconsistency(reading: Reading) -> Tensor:
    """[n, N] how far a frame's points, seen as second view, are from its own first-view points after a rigid fit."""
    first, second = (torch.from_numpy(column) for column in reading.pairs.T)
    own_points, other_points = torch.cat(reading.points_first), torch.cat(reading.points_second)
    poses = torch.linalg.inv(torch.cat(reading.poses))
    depth = own_points[..., 2].log()
    own = torch.stack([depth[first == frame].mean(0) for frame in range(reading.n)])
    seen = transform(poses[:, None], other_points)[..., 2].clamp(min=1e-3).log()
    difference = seen - own[second]
    difference = (difference - difference.median(dim=1, keepdim=True).values).abs()
    return mean_over_pairs(difference, second, reading.n)


def depth_variation(reading: Reading) -> Tensor:
    """[n, N] deviation over partners of a first view's log-depth, each pair's scale removed."""
    first = torch.from_numpy(reading.pairs[:, 0])
    depth = torch.cat(reading.points_first)[..., 2].clamp(min=1e-3).log()
    depth = depth - depth.median(dim=1, keepdim=True).values
    return torch.stack([depth[first == frame].std(0, correction=0) for frame in range(reading.n)])


def mean_over_pairs(values: Tensor, frames: Tensor, n: int) -> Tensor:
    """[P, N], nan where nothing is known -> [n, N]: mean over a frame's pairs, the frame's median where none knows."""
    means = torch.stack([values[frames == frame].nanmean(0) for frame in range(n)])
    fallback = means.nanmedian(dim=1, keepdim=True).values
    return torch.where(means.isnan(), fallback, means)


def expected_position(logits: Tensor, grid: Grid, patch: int) -> Tensor:
    """[B, C, Nq, Nk] -> [B, C, Nq, 2] pixels: softmax-weighted position among the strongest key and its neighbours."""
    height, width = grid
    best = logits.argmax(-1)
    row, column = best // width, best % width
    steps = torch.tensor([-1, 0, 1])
    rows = row[..., None] + steps.repeat_interleave(3)
    columns = column[..., None] + steps.repeat(3)
    outside = (rows < 0) | (rows >= height) | (columns < 0) | (columns >= width)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    near = logits.gather(-1, rows * width + columns).masked_fill(outside, -torch.inf).softmax(-1)
    place = torch.stack([(near * columns).sum(-1), (near * rows).sum(-1)], dim=-1)
    return place * patch + (patch - 1) / 2


def over_tokens(values: Tensor, patch: int) -> Tensor:
    """[B, H, W, ...] -> [B, N, ...]: mean over each patch."""
    batch, height, width = values.shape[:3]
    parts = values.reshape(batch, height // patch, patch, width // patch, patch, *values.shape[3:])
    return parts.mean((2, 4)).flatten(1, 2)


# --- baselines that do not ask the network -------------------------------------------------------------------------


def flow_signals(images: Array, pairs: Array, patch: int) -> dict[str, Array]:
    """Optical flow against the epipolar geometry of each pair, and plain frame difference."""
    n, height, width = images.shape[:3]
    flow = estimate_flow(images, pairs, FlowSettings(), silent)
    residual = np.nan_to_num(epipolar_residual(flow, n, silent))
    difference = np.zeros(residual.shape)
    for frame in range(n):
        partners = pairs[pairs[:, 0] == frame, 1]
        difference[frame] = np.abs(images[partners].astype(np.float64) - images[frame]).mean((0, 3))

    def shaped(maps: Array) -> Array:
        tokens = over_tokens(torch.from_numpy(maps), patch)
        return np.asarray(tokens.reshape(n, height // patch, width // patch).numpy())

    return {"flow: epipolar residual": shaped(residual), "frame difference": shaped(difference)}
