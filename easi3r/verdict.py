"""Whether a reconstruction can be trusted, without ground truth: what was measured of its pieces and path, judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from easi3r.quality import Measurements, quantile
from easi3r.structures import AlignedCameras, Array

SURE_FLOW = 0.7  # share of the pixels of a pair: where less flow is valid, much of the rest is wrong as well
FLOW_NOISE, LEAST_FLOW = 0.001, 0.005  # of the long side: what DIS is off by, and what is well above that
STEP_NOISE_DEG = 0.5  # of a camera: smaller steps count as this, an alignment is not surer


@dataclass(frozen=True)
class Check:
    """A number and the limits beyond which it is doubtful or bad."""

    number: str
    sentence: str  # with {value}, the {limit} that it exceeds, and whatever else is known; a capital is added
    doubtful: float = np.inf
    bad: float = np.inf
    least: bool = False  # values below the limits, not above, are what is wrong
    only_above: tuple[str, float] | None = None  # another number, without which this one says nothing

    def finds(self, numbers: dict[str, Any]) -> tuple[str, str] | None:
        """The verdict and a sentence; None where nothing is wrong, or nothing known."""
        value = numbers[self.number]
        if value is None or (self.only_above and (numbers[self.only_above[0]] or 0) <= self.only_above[1]):
            return None
        for verdict, limit in (("bad", self.bad), ("doubtful", self.doubtful)):
            if np.isfinite(limit) and (value < limit if self.least else value > limit):
                sentence = self.sentence.format(**numbers | {"value": value, "limit": limit})
                return verdict, sentence[0].upper() + sentence[1:]
        return None


# Limits are round numbers with a meaning, well between what was measured: "good" and "broken" are the development runs
# of evaluation/verdict.py, "demo" is the bundled network on six clips, most of whose paths are off by less than 1 %.
CHECKS = (
    Check(
        "flow_residual_of_long_side",
        "cameras and depth miss the optical flow of static pixels by {value:.2%} of the image's long side (limit "
        "{limit:.1%}): poses or masks are wrong; try other masks, a larger window or fewer frames.",
        doubtful=0.003,  # good 0.2 %, demo too but for one clip (0.6 %) whose depth is off by 10 %; DIS itself 0.15 %
        bad=0.008,  # a pixel of 128, and three times what motion.min_motion calls motion: static pixels move
    ),
    Check(
        "flow_residual_worst_frame_of_long_side",
        "at frame {flow_worst_frame} cameras and depth miss the optical flow by {value:.1%} of the image's long side "
        "(limit {limit:.1%}): the camera is lost there; leave such frames out, or enlarge the window.",
        doubtful=0.008,  # as for all frames; good 0.3 %
        bad=0.05,  # shaken cameras 1.3 %; runs of which a frame or two flew off 10 % and more
    ),
    Check(
        "flow_residual_of_flow",
        "cameras and depth leave {value:.0%} of the static pixels' flow unexplained (limit {limit:.0%}): poses or "
        "depth may be wrong; try a larger window.",
        doubtful=0.2,  # good 7 %; DIS itself is off by some 5 % of a small flow
    ),
    Check(
        "flow_residual_static_over_moving",
        "pixels called static miss their flow by {value:.0%} of what pixels called moving do (limit {limit:.0%}): the "
        "masks look inverted (255 or True is what moves), or poses are wrong.",
        bad=0.33,  # good 5 %, demo 14 %: what moves is what does not fit
        only_above=("flow_residual_of_long_side", 0.003),
    ),
    Check(
        "depth_disagreement",
        "frames disagree about the depth of static points by {value:.1%} (limit {limit:.0%}): depth is not to be "
        "trusted; try a larger window, or an alignment with optical flow.",
        doubtful=0.02,  # good 0.4 %, demo 1.8 % where its depth is off by 10 %
        bad=0.04,  # broken 5 % and more, where depth is off by 11 % and more
    ),
    Check(
        "parallax_deg",
        "the parallax of static points is {value:.2g} degrees at best (limit {limit:.2g}): depth rests on the network "
        "alone and the camera's way means little; move the camera sideways, or say camera='static'.",
        doubtful=1.0,  # flow that is off by 0.1 of 128 pixels turns a ray by 0.05 degrees: 5 % of such a depth
        least=True,
    ),
    Check(
        "moving_share",
        "{value:.0%} of the pixels are called moving (limit {limit:.0%}): little is left; look at the masks.",
        doubtful=0.6,
    ),
    Check(
        "moving_share",
        "{value:.0%} is called moving (limit {limit:.0%}) and the rest misses its flow: the masks look inverted.",
        bad=0.6,
        only_above=("flow_residual_of_long_side", 0.003),
    ),
    Check(
        "moving_share",
        "only {value:.2%} of the pixels are called moving (limit {limit:.1%}): if something does, it was missed.",
        doubtful=0.001,
        least=True,
    ),
    Check(
        "path_largest_step_over_typical",
        "the camera jumps by {path_largest_step_deg:.3g} degrees right after frame {path_largest_step_after_frame}, "
        "{value:.3g} times its typical step (limit {limit:.2g}): if there is a cut, reconstruct its sides apart.",
        doubtful=8.0,  # good, demo and shaken 3 at most
    ),
    Check(
        "path_over_shortest_tree",
        "the camera's path is {value:.2g} times as long as the shortest tree through the same cameras (limit "
        "{limit:.2g}): frames seem to be out of order, or poses are wrong; sort the frames by time.",
        doubtful=1.5,  # in order 1.1
        bad=2.1,  # a camera that is shaken anew at every frame 2; 12 frames in random order 2.1 and more, 3.4 mostly
        only_above=("path_change_over_typical_step", 1.0),  # or else it goes to and fro, smoothly
    ),
    Check(
        "focal_drift",
        "the focal length drifts by {value:.0%} (limit {limit:.0%}): unless the lens zoomed, say focal='shared'.",
        doubtful=0.1,
    ),
    Check(
        "seam_residual_largest",
        "joined pieces of the clip disagree by {value:.1%} of the depth (limit {limit:.0%}): raise pieces.overlap.",
        doubtful=0.05,  # what the networks' depth is off by
        bad=0.2,
    ),
)
NOT_CHECKED = {  # number that is None: what that means
    "flow_residual_of_long_side": "Optical flow says nothing: there is none, or too few static pixels have any.",
    "depth_disagreement": "No two frames show enough of the same static points to compare depth or measure parallax.",
    "path_over_shortest_tree": "The camera's path says nothing: it rests, or there are fewer than 4 frames.",
}


def judge(
    measured: Sequence[Measurements],
    cameras: AlignedCameras,
    dynamic_mask: Array,
    *,
    seams: Sequence[float] = (),
    ordered: bool = True,
) -> dict[str, Any]:
    """``meta["quality"]``: "verdict" (good, doubtful or bad), "reasons" and "not_checked" (sentences), every number.

    measured: of each piece; the worst one counts.  cameras and dynamic_mask [n, H, W]: of the whole clip.
    seams: how far pieces disagree where they were joined, over the depth.
    ordered: frames follow each other and share a lens; False: nothing is made of path and focal length.
    All values are plain JSON; None = unknown.
    """
    focal = cameras.intrinsics[:, 0, 0].astype(np.float64)
    per_frame = dynamic_mask.mean(axis=(1, 2))
    of_order = {
        **path_numbers(cameras.camera_to_world, quantile(cameras.depth[:, ::4, ::4])),
        "focal_drift": float(np.abs(focal / np.median(focal) - 1).max()),
    }
    measurements = {
        **worst_piece(measured),
        "moving_share": float(per_frame.mean()),
        **(of_order if ordered else dict.fromkeys(of_order, np.nan)),
        "seam_residual_largest": quantile(np.array(seams), 1.0),
    }
    numbers = {name: round(value, 6) if np.isfinite(value) else None for name, value in measurements.items()}
    residual = numbers["flow_residual_of_long_side"]
    found = [reason for check in CHECKS if (reason := check.finds(numbers)) is not None]
    if residual is None and numbers["depth_disagreement"] is None:
        found.append(("doubtful", "Neither flow nor a second look at the same points says whether this is right."))
    found.sort(key=lambda reason: reason[0] != "bad")
    return {
        "verdict": found[0][0] if found else "good",
        "reasons": [sentence for _, sentence in found],
        "not_checked": [sentence for name, sentence in NOT_CHECKED.items() if numbers[name] is None],
        "flow_residual_px": None if residual is None else round(residual * max(cameras.depth.shape[1:]), 4),
        "moving_share_per_frame": [round(float(share), 4) for share in per_frame],
        **numbers,
    }


def worst_piece(measured: Sequence[Measurements]) -> dict[str, float]:
    """Every number of :func:`piece_numbers`, of the piece where it is worst: the largest, but the least parallax."""
    pieces = [piece_numbers(one) for one in measured or [Measurements(*np.zeros((8, 0)))]]
    lost = max(pieces, key=lambda piece: np.nan_to_num(piece["flow_residual_worst_frame_of_long_side"]))
    worst = {name: quantile(np.array([p[name] for p in pieces]), float(name != "parallax_deg")) for name in pieces[0]}
    return worst | {"flow_worst_frame": lost["flow_worst_frame"]}


def piece_numbers(one: Measurements) -> dict[str, float]:
    """Medians over the pairs of a piece; NaN = unknown.

    Flow counts in the pairs where it is sure: where it fails, on large motion, good cameras disagree with it.
    """
    sure = one.valid >= min(SURE_FLOW, quantile(one.valid, 0.75))
    much = sure & (one.flow_amount > LEAST_FLOW)
    frames = np.unique(one.frame[sure]).astype(int)
    of_frames = np.array([quantile(one.flow[sure & (one.frame == frame)]) for frame in frames])
    return {
        "flow_residual_of_long_side": quantile(one.flow[sure]),
        "flow_residual_worst_frame_of_long_side": quantile(of_frames, 1.0),
        "flow_worst_frame": int(frames[np.nan_to_num(of_frames).argmax()]) if len(frames) else np.nan,
        "flow_residual_of_flow": quantile(one.flow[much] / one.flow_amount[much]),
        "flow_far_off_share": quantile(one.flow_far_off[sure]),
        "flow_residual_moving_of_long_side": quantile(one.flow_moving[sure]),
        "flow_residual_static_over_moving": quantile((one.flow / np.maximum(one.flow_moving, FLOW_NOISE))[sure]),
        "depth_disagreement": quantile(one.depth),
        "parallax_deg": quantile(one.parallax_deg, 0.9),  # of the tenth of the pairs that are best apart
    }


def path_numbers(camera_to_world: Array, unit: float) -> dict[str, float]:
    """How evenly the camera goes, in degrees: a turn, and a shift as the angle of a point at distance ``unit``.

    camera_to_world: [n, 4, 4].  NaN = unknown: too few frames, or a camera at rest.
    """
    n, poses = len(camera_to_world), camera_to_world.astype(np.float64)
    # chords between these are as long as turn and shift in radians together, up to half a radian or so
    places = np.rad2deg(np.concatenate([poses[:, :3, :3].reshape(n, 9) / np.sqrt(2), poses[:, :3, 3] / unit], axis=1))
    steps = np.diff(places, axis=0)
    sizes, changes = np.linalg.norm(steps, axis=1), np.linalg.norm(np.diff(steps, axis=0), axis=1)
    typical, largest, tree = max(quantile(sizes), STEP_NOISE_DEG), quantile(sizes, 1.0), tree_length(places)
    return {
        "path_typical_step_deg": quantile(sizes),
        "path_largest_step_deg": largest,
        "path_largest_step_after_frame": int(sizes.argmax()) if n > 1 else np.nan,
        "path_largest_step_over_typical": largest / typical,
        "path_change_over_typical_step": quantile(changes) / typical,
        "path_over_shortest_tree": float(sizes.sum()) / tree if n >= 4 and tree > STEP_NOISE_DEG else np.nan,
    }


def tree_length(places: Array) -> float:
    """Of the shortest tree that joins the places [n, d] (Prim)."""
    away, total = np.full(len(places), np.inf), 0.0
    outside, newest = np.ones(len(places), dtype=bool), 0
    for _ in range(len(places) - 1):
        outside[newest] = False
        away = np.minimum(away, np.linalg.norm(places - places[newest], axis=1))
        newest = int(np.where(outside, away, np.inf).argmin())
        total += float(away[newest])
    return total
