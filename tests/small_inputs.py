"""Tiny clips as arrays, folders and videos, a checkpoint, and the command line called in process."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from easi3r import Easi3R, cli
from easi3r.backbones.dust3r import Dust3r, Dust3rConfig
from easi3r.backbones.files import CheckpointInfo
from easi3r.backbones.vggt import Vggt, VggtConfig
from easi3r.backbones.vggt_heads import DptConfig
from easi3r.backbones.vggt_tracker import TrackerConfig

QUICK = {"image_size": "native", "alignment.iterations": 3}  # options that keep a reconstruction below half a second
QUICK_FLAGS = ["--image-size", "native", "--set", "alignment.iterations=3"]


def moving_square(num_frames=3, height=48, width=64, seed=0):
    """[n, H, W, 3] uint8: a bright square walks over a still, textured background."""
    rng = np.random.default_rng(seed)
    frames = np.tile(rng.integers(0, 120, (height, width, 3), dtype=np.uint8), (num_frames, 1, 1, 1))
    square = rng.integers(150, 255, (16, 16, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):
        left = 6 * i % (width - 16)
        frame[16:32, left : left + 16] = square
    return frames


def write_images(folder, frames, suffix="png"):
    """frame_0.png, frame_1.png, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{i}.{suffix}")
    return folder


def write_video(path, frames):
    """An AVI of JPEG frames, written without FFmpeg, whose first use in a process settles how much it prints."""
    fourcc, size = cv2.VideoWriter_fourcc(*"MJPG"), frames.shape[2:0:-1]
    writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, fourcc, 10.0, size)
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame[..., ::-1])
    writer.release()
    return path


def random_model():
    """A tiny network with seeded random weights, patches of 16 pixels and points in front of the camera."""
    sizes = {"enc_embed_dim": 96, "enc_depth": 2, "enc_num_heads": 4}
    sizes |= {"dec_embed_dim": 96, "dec_depth": 4, "dec_num_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Dust3r(Dust3rConfig(**sizes, img_size=(128, 128), head_type="linear")).requires_grad_(False).eval()
    for head in (network.downstream_head1, network.downstream_head2):
        head.proj.bias.view(4, -1)[:] = torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None]
    model = Easi3R.__new__(Easi3R)
    model.network, model.checkpoint = network, CheckpointInfo("random", None, "Apache-2.0")
    return model


def write_checkpoint(path, *, without=(), model_class="AsymmetricCroCo3DStereo"):
    """A .pth file with tiny random weights, in the layout of the public ones."""
    network = random_model().network
    sizes = {key: value for key, value in vars(network.config).items() if key not in ("rope_base", "conf_range")}
    arguments = ", ".join(f"{key}={value!r}" for key, value in sizes.items())
    tensors = {name: value for name, value in network.state_dict().items() if name not in without}
    torch.save({"args": argparse.Namespace(model=f"{model_class}({arguments})"), "model": tensors}, path)
    return path


def run_cli(*arguments):
    """The exit code of ``easi3r ARGUMENTS``, in this process."""
    try:
        return cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse leaves like this
        return stop.code


def listing(folder):
    """Everything below a folder, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def random_vggt_model():
    """A tiny VGGT with seeded random weights, all heads and all 24 pairs of blocks."""
    dpt = DptConfig((8, 8, 8, 8), 8, 8, 2)
    config = VggtConfig(
        embed_dim=16,
        num_heads=2,
        position_side=5,
        encoder_depth=1,
        camera_depth=1,
        depth_head=dpt,
        point_head=dataclasses.replace(dpt, outputs=4),
        track_head=TrackerConfig(dataclasses.replace(dpt, outputs=None), 16, 1, 16, 4),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Vggt(config).requires_grad_(False).eval()
        for name, weight in network.named_parameters():
            if name.endswith(("token", "tokens", "tracks", "embed")):
                weight.normal_(std=0.5)
    network.point_head.scratch.output_conv2[2].bias[:] = torch.tensor([0.0, 0.0, 1.0, 0.0])  # in front of the camera
    network.camera_head.pose_branch.fc2.weight.mul_(0.1)
    network.camera_head.pose_branch.fc2.bias[:] = torch.tensor([0, 0, 0, 0, 0, 0, 0.3, 0.2, 0.25])
    model = Easi3R.__new__(Easi3R)
    model.network, model.checkpoint = network, CheckpointInfo("random", None, "Apache-2.0")
    return model
