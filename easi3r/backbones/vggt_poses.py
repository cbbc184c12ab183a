"""VGGT's encoding of cameras, and cameras as everybody else here writes them (numpy, OpenCV axes).

An encoding is ``[tx, ty, tz, qx, qy, qz, qw, fov_h, fov_w]``: a world-to-camera motion, its quaternion with the scalar
last and of any length, and the fields of view in radians, the HEIGHT's first.
"""

from __future__ import annotations

import numpy as np
import roma
import torch

from easi3r.geometry import invert_rigid
from easi3r.structures import Array

MIN_FOV = 0.01  # radians; a smaller one gives no focal length


def decode_poses(encodings: Array, height: int, width: int) -> tuple[Array, Array]:
    """[S, 9] -> camera_to_world [S, 4, 4] and intrinsics [S, 3, 3], both float64, for images of this size in pixels.

    The principal point is (W / 2, H / 2), as in VGGT, whose depth is meant for it with whole-numbered pixel centres.
    A field of view outside (0, pi) is brought to its nearest edge.
    """
    encodings = np.asarray(encodings, dtype=np.float64)
    quaternions = encodings[:, 3:7] / np.maximum(np.linalg.norm(encodings[:, 3:7], axis=1, keepdims=True), 1e-12)
    world_to_camera = np.tile(np.eye(4), (len(encodings), 1, 1))
    world_to_camera[:, :3, :3] = roma.unitquat_to_rotmat(torch.from_numpy(quaternions)).numpy()
    world_to_camera[:, :3, 3] = encodings[:, :3]
    half_angles = np.clip(encodings[:, 7:], MIN_FOV, np.pi - MIN_FOV) / 2
    intrinsics = np.tile(np.array([[0, 0, width / 2], [0, 0, height / 2], [0, 0, 1]]), (len(encodings), 1, 1))
    intrinsics[:, 1, 1] = height / 2 / np.tan(half_angles[:, 0])
    intrinsics[:, 0, 0] = width / 2 / np.tan(half_angles[:, 1])
    return invert_rigid(world_to_camera), intrinsics


def encode_poses(camera_to_world: Array, intrinsics: Array, height: int, width: int) -> Array:
    """The reverse of ``decode_poses``, float64 [S, 9], quaternions of unit length with qw >= 0."""
    world_to_camera = invert_rigid(np.asarray(camera_to_world, dtype=np.float64))
    quaternions = roma.rotmat_to_unitquat(torch.from_numpy(world_to_camera[:, :3, :3])).numpy()
    quaternions = np.where(quaternions[:, 3:] < 0, -quaternions, quaternions)
    fov_height = 2 * np.arctan(height / 2 / intrinsics[:, 1, 1])
    fov_width = 2 * np.arctan(width / 2 / intrinsics[:, 0, 0])
    return np.concatenate([world_to_camera[:, :3, 3], quaternions, np.stack([fov_height, fov_width], axis=1)], axis=1)
