"""A world that is known to the pixel: a blue wall, a red square that walks before it, cameras that step back."""

from __future__ import annotations

import numpy as np

from easi3r import Scene
from easi3r.structures import AttentionMaps

WALL, SQUARE = (40, 90, 160), (230, 40, 30)
WALL_Z, SQUARE_Z, HALF, FOCAL = 4.0, 2.0, 0.3, 60.0


def square_center(frame, num_frames=4):
    """[3] where the square is."""
    return np.array([-0.8 + 1.6 * frame / max(1, num_frames - 1), 0.0, SQUARE_Z])


def make_scene(num_frames=4, height=48, width=64, step_back=0.25):
    n = num_frames
    poses = np.tile(np.eye(4, dtype=np.float32), (n, 1, 1))
    poses[:, 2, 3] = -step_back * np.arange(n)
    intrinsics = np.tile(np.eye(3, dtype=np.float32), (n, 1, 1))
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = FOCAL
    intrinsics[:, :2, 2] = (width - 1) / 2, (height - 1) / 2
    y, x = np.mgrid[:height, :width]
    moves = np.empty((n, height, width), dtype=bool)
    depth = np.empty((n, height, width), dtype=np.float32)
    for i in range(n):
        z = SQUARE_Z - poses[i, 2, 3]
        center = square_center(i, n)
        moves[i] = np.abs((x - intrinsics[i, 0, 2]) / FOCAL * z - center[0]) <= HALF
        moves[i] &= np.abs((y - intrinsics[i, 1, 2]) / FOCAL * z - center[1]) <= HALF
        depth[i] = np.where(moves[i], z, WALL_Z - poses[i, 2, 3])
    crop = {"original": [width, height], "resized": [width, height], "offset": [0, 0], "size": [width, height]}
    return Scene(
        images=np.where(moves[..., None], np.uint8(SQUARE), np.uint8(WALL)),
        dynamic_score=moves.astype(np.float32),
        dynamic_mask=moves,
        attention=AttentionMaps(*[np.zeros((n, height // 16, width // 16), dtype=np.float32)] * 5),
        timestamps=np.arange(n) / 10,
        meta={"crops": [crop] * n, "source": "a <b> & </script>.mp4"},
        camera_to_world=poses,
        intrinsics=intrinsics,
        depth=depth,
        confidence=np.full((n, height, width), 2, dtype=np.float32),
        valid_mask=np.ones((n, height, width), dtype=bool),
    )


def project(scene, camera, point):
    """[2] (x, y): where the camera of a frame sees a world point, in pixels of the scene's images."""
    pose, k = scene.camera_to_world[camera].astype(np.float64), scene.intrinsics[camera].astype(np.float64)
    seen = k @ (pose[:3, :3].T @ (np.asarray(point) - pose[:3, 3]))
    return seen[:2] / seen[2]


def is_red(pixels):
    """Whether pixels [..., 3] show the square."""
    pixels = pixels.astype(int)
    return (pixels[..., 0] > 150) & (pixels[..., 1:].max(-1) < 110)


def is_blue(pixels):
    """Whether pixels [..., 3] show the wall."""
    pixels = pixels.astype(int)
    return (pixels[..., 2] > 110) & (pixels[..., 0] < 90)
