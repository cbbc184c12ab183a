"""Which moving pixels belong to one thing: components of the mask, linked over time by flow and by tokens.

Neither training nor prompts: two parts are of one thing unless their motions disagree where they meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from easi3r.common_motion import FrameMotion
from easi3r.progress import Progress
from easi3r.structures import Array, PairFlow

CARRIED = 0.5  # of what flow carries from one region into another frame's mask, from which on the two are linked
COMPATIBLE = 0.5  # of what two tracks show at the same time, that must move alike for them to be one
ALIKE = 0.5  # cosine of the mean tokens of two tracks, from which on they are one thing seen again
DIFFERENT = 0.004  # of two motions, in long sides of the image per frame, that make two things
MAX_IDS = 65535  # what a PNG of 16 bits can hold


Carried = list[dict[int, int]]  # region -> region of another frame -> pixels that flow carries there


@dataclass(frozen=True)
class Region:
    """Connected pixels of a frame that move as one, as far as can be seen."""

    frame: int
    pixels: Array  # [m] row-major
    cells: Array  # [h, w] bool, those of the frame's FrameMotion


def find_instances(
    mask: Array, flow: PairFlow | None, tokens: Array | None, min_motion: float, progress: Progress
) -> Array:
    """Ids [n, H, W] int32 of the things that move: 0 where nothing does, the rest from 1, the largest first.

    mask: [n, H, W] bool, True = moves.
    flow: optical flow of the pairs; without it regions are linked by their tokens alone.
    tokens: [n, h, w, C] of the encoder; without them what was out of sight is a new thing.
    min_motion: disagreement of two motions, in long sides of the image per frame, beyond which they are two things'.
    """
    if flow is None:
        nothing = np.zeros((0, *mask.shape[1:]))
        flow = PairFlow(np.zeros((0, 2), np.int64), np.zeros((*nothing.shape, 2), np.float32), nothing.astype(bool))
    motions = [FrameMotion(flow, frame) for frame in range(len(mask))]
    regions: list[Region] = []
    for frame in progress(range(len(mask)), "instances"):
        regions += split_components(mask[frame], frame, motions[frame], min_motion)
    tracks = Tracks(regions, motions, min_motion)
    carried = carry(regions, flow, mask.shape)
    for first, second in links(regions, carried):
        tracks.join(first, second)
    if tokens is not None:
        for first, second in alike(tracks, tokens, mask.shape[1:]):
            tracks.join_if_apart(first, second)
    absorb(tracks, carried)
    return largest_first(label(tracks, mask.shape))


def split_components(mask: Array, frame: int, motion: FrameMotion, min_motion: float) -> list[Region]:
    """The components of a frame's mask [H, W] bool, cut where two motions meet."""
    count, components = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    some = slice(None, None, motion.stride)
    regions = []
    for number in range(1, count):
        todo = [components == number]
        while todo:
            pixels = todo.pop()
            cells = pixels[some, some]
            part = motion.split(cells, min_motion)
            if part is None:
                regions.append(Region(frame, np.flatnonzero(pixels), cells))
            else:
                near = nearest_part(part, cells & ~part, motion.stride, pixels.shape)
                todo += [pixels & near, pixels & ~near]
    return regions


def arrivals(flow: PairFlow, frame: int) -> list[tuple[int, Array, Array]]:
    """For each pair of a frame with another: that frame, [H, W] int64 row-major pixels of arrival, [H, W] valid."""
    height, width = flow.valid.shape[1:]
    y, x = np.mgrid[:height, :width]
    found = []
    for k in np.flatnonzero((flow.pairs[:, 0] == frame) & (flow.pairs[:, 1] != frame)):
        column = np.rint(x + flow.flow[k, ..., 0]).clip(0, width - 1).astype(np.int64)
        row = np.rint(y + flow.flow[k, ..., 1]).clip(0, height - 1).astype(np.int64)
        found.append((int(flow.pairs[k, 1]), row * width + column, flow.valid[k]))
    return found


def nearest_part(first: Array, second: Array, stride: int, size: tuple[int, ...]) -> Array:
    """size bool: the pixels whose cells are nearer to the first part [h, w] bool than to the second."""
    near, far = (cv2.distanceTransform((~part).astype(np.uint8), cv2.DIST_L2, 5) for part in (first, second))
    nearer = (near < far).repeat(stride, axis=0).repeat(stride, axis=1)
    return np.asarray(nearer[: size[0], : size[1]])


@dataclass
class Tracks:
    """Regions, joined into things: a forest in which every tree is a thing."""

    regions: list[Region]
    motions: list[FrameMotion]
    min_motion: float
    parent: list[int] = field(init=False)
    members: list[dict[int, list[int]]] = field(init=False)  # of roots: frame -> regions
    known: dict[tuple[int, int], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parent = list(range(len(self.regions)))
        self.members = [{region.frame: [i]} for i, region in enumerate(self.regions)]

    def root(self, region: int) -> int:
        """The region that stands for the thing that a region belongs to."""
        while self.parent[region] != region:
            self.parent[region] = region = self.parent[self.parent[region]]
        return region

    def join(self, first: int, second: int) -> None:
        """Make one thing of two regions' things, unless too much of what both show at the same time moves apart."""
        first, second = self.root(first), self.root(second)
        if first == second:
            return
        if len(self.members[first]) < len(self.members[second]):
            first, second = second, first
        together = alike_then = 0
        for frame, others in self.members[second].items():
            for a in self.members[first].get(frame, ()):
                for b in others:
                    size = min(len(self.regions[a].pixels), len(self.regions[b].pixels))
                    together += size
                    alike_then += size * self.moves_alike(a, b)
        if together and alike_then <= COMPATIBLE * together:
            return
        self.unite(first, second)

    def unite(self, first: int, second: int) -> None:
        """Make one thing of two roots' things, whatever speaks against it; the first stays a root."""
        self.parent[second] = first
        for frame, others in self.members[second].items():
            self.members[first].setdefault(frame, []).extend(others)

    def join_if_apart(self, first: int, second: int) -> None:
        """Make one thing of two regions' things, if no frame shows both."""
        first, second = self.root(first), self.root(second)
        if not self.members[first].keys() & self.members[second].keys():
            self.join(first, second)

    def moves_alike(self, first: int, second: int) -> bool:
        """Whether the motions of two regions of a frame agree where they come closest; no if it cannot be seen."""
        key = min(first, second), max(first, second)
        if key not in self.known:
            a, b = (self.regions[i] for i in key)
            self.known[key] = self.motions[a.frame].disagreement(a.cells, b.cells) <= self.min_motion
        return self.known[key]

    def size(self, members: list[int]) -> int:
        """Pixels of some regions."""
        return sum(len(self.regions[i].pixels) for i in members)

    def things(self) -> dict[int, list[int]]:
        """Root -> its regions."""
        return {
            root: [i for regions in self.members[root].values() for i in regions]
            for root in range(len(self.regions))
            if self.parent[root] == root
        }


def carry(regions: list[Region], flow: PairFlow, shape: tuple[int, ...]) -> Carried:
    """How many pixels of each region flow carries into which regions of other frames."""
    labels = np.full((shape[0], shape[1] * shape[2]), -1, dtype=np.int64)
    for i, region in enumerate(regions):
        labels[region.frame, region.pixels] = i
    carried: Carried = [{} for _ in regions]
    for frame in range(shape[0]):
        for other, target, valid in arrivals(flow, frame):
            there = np.where(valid.reshape(-1), labels[other, target.reshape(-1)], -1)
            both = (labels[frame] >= 0) & (there >= 0)
            keys, counts = np.unique(labels[frame, both] * len(regions) + there[both], return_counts=True)
            for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
                source, arrived = divmod(key, len(regions))
                carried[source][arrived] = count
    return carried


def links(regions: list[Region], carried: Carried) -> list[tuple[int, int]]:
    """Pairs of regions of different frames that flow carries into each other, those with most pixels first."""
    found: dict[tuple[int, int], int] = {}
    for source, arrivals_of in enumerate(carried):
        landed: dict[int, int] = {}
        for arrived, count in arrivals_of.items():
            landed[regions[arrived].frame] = landed.get(regions[arrived].frame, 0) + count
        for arrived, count in arrivals_of.items():
            if count > CARRIED * landed[regions[arrived].frame]:
                key = min(source, arrived), max(source, arrived)
                found[key] = count + carried[arrived].get(source, 0)
    return sorted(found, key=lambda pair: (-found[pair], pair))


def absorb(tracks: Tracks, carried: Carried) -> None:
    """Give what flow carries into another thing rather than into itself to that thing, the small ones first.

    It is a part that stood apart in a few frames: a speck of the mask, or a split for which other frames see no reason.
    """
    things = tracks.things()
    for root in sorted(things, key=lambda root: (tracks.size(things[root]), root)):
        shares: dict[int, int] = {}
        for i in things[root]:
            for arrived, count in carried[i].items():
                other = tracks.root(arrived)
                shares[other] = shares.get(other, 0) + count
        best = max(shares, key=lambda other: (shares[other], -other), default=root)
        if best != tracks.root(root) and shares[best] > shares.get(tracks.root(root), 0):
            tracks.unite(best, tracks.root(root))


def alike(tracks: Tracks, tokens: Array, size: tuple[int, ...]) -> list[tuple[int, int]]:
    """Pairs of things whose mean tokens are alike, the most alike first; things of less than a token are left out.

    tokens: [n, h, w, C].  What all tokens of the clip have in common is taken off beforehand.
    """
    patch = size[0] // tokens.shape[1]
    centred = (tokens - tokens.mean(axis=(0, 1, 2))).reshape(len(tokens), -1, tokens.shape[-1])
    roots, means = [], []
    for root, members in tracks.things().items():
        if tracks.size(members) < patch**2:
            continue
        mean = np.zeros(tokens.shape[-1])
        for region in (tracks.regions[i] for i in members):
            row, column = np.divmod(region.pixels, size[1])
            share = np.bincount(row // patch * tokens.shape[2] + column // patch, minlength=centred.shape[1])
            mean += share @ centred[region.frame]
        roots.append(root)
        means.append(mean / max(float(np.linalg.norm(mean)), 1e-12))
    if not roots:
        return []
    cosine = np.triu(np.stack(means) @ np.stack(means).T, k=1)
    first, second = np.nonzero(cosine > ALIKE)
    order = np.argsort(-cosine[first, second], kind="stable")
    return [(roots[first[i]], roots[second[i]]) for i in order]


def label(tracks: Tracks, shape: tuple[int, ...]) -> Array:
    """Ids [n, H, W] int32 of the things, 0 = static."""
    labels = np.zeros((shape[0], shape[1] * shape[2]), dtype=np.int32)
    for number, members in enumerate(tracks.things().values(), start=1):
        for i in members:
            labels[tracks.regions[i].frame, tracks.regions[i].pixels] = number
    return labels.reshape(shape)


def largest_first(labels: Array) -> Array:
    """Number ids [n, H, W] anew from 1, the one with most pixels first; beyond ``MAX_IDS`` all share the last."""
    counts = np.bincount(labels.reshape(-1))
    order = 1 + np.argsort(-counts[1:], kind="stable")
    numbers = np.zeros(len(counts), dtype=np.int32)
    numbers[order] = np.minimum(np.arange(1, len(counts)), MAX_IDS)
    return numbers[labels]


def continue_ids(before: Array, labels: Array, largest: int) -> Array:
    """Give the things of ``labels`` [n, H, W] the ids of those that they cover most of in ``before`` [s, H, W].

    before: ids of the first s of the frames, from another piece of the clip.  Ids are passed on one to one, those with
    most pixels in common first; the rest get new ones, from ``largest`` + 1.
    """
    count = int(labels.max(initial=0)) + 1
    both = (before > 0) & (labels[: len(before)] > 0)
    keys, common = np.unique(before[both].astype(np.int64) * count + labels[: len(before)][both], return_counts=True)
    numbers, taken = np.zeros(count, dtype=np.int32), set()
    for key in keys[np.argsort(-common, kind="stable")].tolist():
        old, new = divmod(key, count)
        if not numbers[new] and old not in taken:
            numbers[new] = old
            taken.add(old)
    fresh = np.flatnonzero(numbers[1:] == 0) + 1
    numbers[fresh] = largest + 1 + np.arange(len(fresh))
    return numbers[labels]
