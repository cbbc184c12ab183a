"""How far an estimated trajectory and depth are from the truth, numpy only (test support)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def umeyama_sim3(source: Array, target: Array) -> tuple[float, Array, Array]:
    """Least-squares similarity of [n, 3] ``source`` onto [n, 3] ``target`` (Umeyama 1991).

    Returns scale, rotation [3, 3] and translation [3] with ``target ~ scale * source @ rotation.T + translation``.
    """
    source_mean, target_mean = source.mean(0), target.mean(0)
    source_centred, target_centred = source - source_mean, target - target_mean
    u, singular, vt = np.linalg.svd(target_centred.T @ source_centred / len(source))
    signs = np.array([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])  # a rotation, never a reflection
    rotation = u @ np.diag(signs) @ vt
    variance = (source_centred**2).sum(-1).mean()
    scale = float((singular * signs).sum() / variance) if variance > 0 else 1.0
    return scale, rotation, target_mean - scale * rotation @ source_mean


def ate(estimated_camera_to_world: Array, true_camera_to_world: Array) -> float:
    """RMSE of the camera positions after Sim(3) alignment, over the length of the true path; poses are [n, 4, 4]."""
    estimated = np.asarray(estimated_camera_to_world, dtype=np.float64)[:, :3, 3]
    true = np.asarray(true_camera_to_world, dtype=np.float64)[:, :3, 3]
    scale, rotation, translation = umeyama_sim3(estimated, true)
    error = scale * estimated @ rotation.T + translation - true
    path_length = np.linalg.norm(np.diff(true, axis=0), axis=-1).sum()
    return float(np.sqrt((error**2).sum(-1).mean()) / path_length)


def static_absrel(depth: Array, truth: Array, static_mask: Array) -> float:
    """Mean of |scale * depth - truth| / truth over ``static_mask`` [n, H, W]; the scale is median(truth / depth)."""
    depth, truth = np.asarray(depth, dtype=np.float64)[static_mask], np.asarray(truth, dtype=np.float64)[static_mask]
    scale = np.median(truth / depth)
    return float((np.abs(scale * depth - truth) / truth).mean())


def rpe_rotation_deg(estimated_camera_to_world: Array, true_camera_to_world: Array) -> float:
    """RMSE in degrees of the relative rotation between consecutive frames; poses are [n, 4, 4]."""
    estimated, true = (
        np.asarray(poses, dtype=np.float64)[:, :3, :3] for poses in (estimated_camera_to_world, true_camera_to_world)
    )
    estimated_step = estimated[:-1].swapaxes(1, 2) @ estimated[1:]
    true_step = true[:-1].swapaxes(1, 2) @ true[1:]
    # |R - R'|_F = 2 sqrt(2) sin(angle / 2) keeps its digits at small angles, where the trace loses them.
    chord = np.linalg.norm(estimated_step - true_step, axis=(1, 2))
    angle = 2 * np.arcsin(np.clip(chord / np.sqrt(8), 0, 1))
    return float(np.rad2deg(np.sqrt((angle**2).mean())))
