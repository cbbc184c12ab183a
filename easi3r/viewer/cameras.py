"""Cameras to look at a scene from: the recovered ones, and a smooth orbit about their path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter1d
from scipy.spatial.transform import Rotation, Slerp

from easi3r.structures import Array, Crop

if TYPE_CHECKING:
    from easi3r.scene import Scene

ORBIT_RADIUS = 0.12  # of the depth at its centre: about 7 degrees to each side
ORBIT_SECONDS = 6.0  # per turn, and no orbit video is shorter
SMOOTH_FPS = 20.0  # at least so many cameras per second


@dataclass(frozen=True)
class View:
    """A camera and the size of its picture, in pixels."""

    camera_to_world: Array  # [4, 4], OpenCV axes
    intrinsics: Array  # [3, 3], in pixels of this picture
    width: int
    height: int


class Shot(NamedTuple):
    """One picture of a video: which time of the scene, and from where."""

    frame: int
    view: View


def frame_rate(timestamps: Array) -> float:
    """Frames per second, on average; 10 where there is no clock."""
    seconds = float(timestamps[-1] - timestamps[0])
    return (len(timestamps) - 1) / seconds if seconds > 0 else 10.0


def recovered_views(scene: Scene, width: int, height: int) -> list[View]:
    """One per frame, K scaled to pictures of ``width`` x ``height`` pixels."""
    size = (scene.images.shape[2], scene.images.shape[1])
    scaled = Crop(original=size, resized=(width, height), offset=(0, 0), size=(width, height)).matrix()
    poses, intrinsics = scene.camera_to_world.astype(np.float64), scaled @ scene.intrinsics.astype(np.float64)
    return [View(pose, k, width, height) for pose, k in zip(poses, intrinsics, strict=True)]


def path_shots(views: list[View]) -> list[Shot]:
    """Every frame from its own camera, once."""
    return [Shot(frame, view) for frame, view in enumerate(views)]


def orbit_shots(views: list[View], depth: float, rate: float) -> tuple[list[Shot], float]:
    """A camera that circles about the smoothed path of ``views``, looking at what is ``depth`` in front of it.

    rate: of ``views``, per second.  The clip is shown again until a turn is complete; when it begins anew, the camera
    goes its way back.  Returns the shots and their rate, a multiple of ``rate`` that makes the movement smooth.
    """
    repeats = int(np.ceil(SMOOTH_FPS / rate))
    loops = int(np.ceil(ORBIT_SECONDS * rate / len(views)))
    steps = np.arange(loops * len(views) * repeats)
    turns = max(1, round(len(steps) / (rate * repeats) / ORBIT_SECONDS))
    angle = 2 * np.pi * turns * steps / len(steps)
    offset = ORBIT_RADIUS * depth * np.stack([np.sin(angle), 0.5 * np.cos(angle), np.zeros(len(steps))], axis=-1)
    path = _smooth_path(np.stack([view.camera_to_world for view in views]), steps / repeats)
    frames = steps // repeats % len(views)
    shots = [
        Shot(int(frame), _moved(views[frame], base, beside, depth))
        for frame, base, beside in zip(frames, path, offset, strict=True)
    ]
    return shots, rate * repeats


def _smooth_path(poses: Array, at: Array) -> Array:
    """[n, 4, 4] -> [k, 4, 4] float64: the path without its jitter, there and back again, at times in frames."""
    n = len(poses)
    sigma = max(1.0, n / 8)
    turns = Rotation.from_matrix(poses[:, :3, :3])
    quaternions = turns.as_quat()
    for i in range(1, n):  # q and -q are the same rotation: neighbours take the same side
        quaternions[i] *= 1 if quaternions[i] @ quaternions[i - 1] >= 0 else -1
    smooth = Rotation.from_quat(gaussian_filter1d(quaternions, sigma, axis=0, mode="nearest"))
    positions = gaussian_filter1d(poses[:, :3, 3], sigma, axis=0, mode="nearest")
    at = np.clip(np.where(at // n % 2 == 0, at % n, n - 1 - at % n), 0, n - 1)
    path = np.tile(np.eye(4), (len(at), 1, 1))
    path[:, :3, :3] = (Slerp(np.arange(n), smooth)(at) if n > 1 else smooth[[0] * len(at)]).as_matrix()
    path[:, :3, 3] = np.stack([np.interp(at, np.arange(n), axis) for axis in positions.T], axis=-1)
    return path


def _moved(view: View, base: Array, beside: Array, depth: float) -> View:
    """``view`` from ``beside`` (in the axes of ``base``), still looking at what is ``depth`` in front of ``base``."""
    forward = np.array([0, 0, depth]) - beside
    forward /= np.linalg.norm(forward)
    right = np.cross([0, 1, 0], forward)
    right /= np.linalg.norm(right)
    turn = np.eye(4)
    turn[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=-1)
    turn[:3, 3] = beside
    return View(base @ turn, view.intrinsics, view.width, view.height)
