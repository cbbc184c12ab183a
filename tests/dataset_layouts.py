"""Writes a rendered clip in each data set's official layout, as its documentation describes it."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation
from test_colmap import write_text

TAG = np.float32(202021.25)
T0 = 1341845688.5  # seconds since 1970, as TUM's stamps are
PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128, 128, 0, 128, 0, 128, 128]  # of DAVIS: RGB by index


def write_image(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(PALETTE)
    image.save(path)


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_bytes(path, *arrays):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))


def write_davis(root, names, clip):
    """Each mover has an index of its own."""
    for name in names:
        for i, (image, ids) in enumerate(zip(clip.images, clip.object_ids * clip.dynamic_mask, strict=True)):
            write_image(root / "JPEGImages" / "480p" / name / f"{i:05}.jpg", image)
            write_image(root / "Annotations" / "480p" / name / f"{i:05}.png", ids.astype(np.uint8), "P")
    return root


def write_sintel(root, names, clip):
    height, width = clip.depth.shape[1:]
    size, last = np.array([width, height], dtype="<i4"), len(clip.images)
    flows = [clip.flow(i, i + 1)[0].astype("<f4") for i in range(last - 1)]
    for name in names:
        folders = {
            part: root / "training" / part / name for part in ("final", "clean", "depth", "camdata_left", "flow")
        }
        for i in range(last):
            stem = f"frame_{i + 1:04}"
            write_image(folders["final"] / f"{stem}.png", clip.images[i])
            write_image(folders["clean"] / f"{stem}.png", clip.images[i])
            write_bytes(folders["depth"] / f"{stem}.dpt", TAG, size, clip.depth[i].astype("<f4"))
            extrinsics = np.linalg.inv(clip.camera_to_world[i])[:3].astype("<f8")
            write_bytes(folders["camdata_left"] / f"{stem}.cam", TAG, clip.intrinsics[i].astype("<f8"), extrinsics)
            if i + 1 < last:
                write_bytes(folders["flow"] / f"{stem}.flo", TAG, size, flows[i])
    return root


def write_tum(root, folders, clip, *, without_pose=(), without_depth=()):
    """30 images a second; their depth comes 4 ms later, their pose 3 ms, and a pose that is wrong 13 ms."""
    for folder in (root / name for name in folders):
        rgb, depth, poses = (["# comment", "# timestamp and more"] for _ in range(3))
        for i, (image, z, pose) in enumerate(zip(clip.images, clip.depth, clip.camera_to_world, strict=True)):
            time = T0 + i / 30
            write_image(folder / "rgb" / f"{time:.6f}.png", image)
            rgb.append(f"{time:.6f} rgb/{time:.6f}.png")
            if i not in without_depth:
                write_image(folder / "depth" / f"{time + 0.004:.6f}.png", np.round(5000 * z).astype(np.uint16))
                depth.append(f"{time + 0.004:.6f} depth/{time + 0.004:.6f}.png")
            if i not in without_pose:
                numbers = [*pose[:3, 3], *Rotation.from_matrix(pose[:3, :3]).as_quat()]
                poses.append(f"{time + 0.003:.6f} " + " ".join(f"{number:.9f}" for number in numbers))
                poses.append(f"{time + 0.013:.6f} 9 9 9 0 0 0 1")
        for name, lines in (("rgb", rgb), ("depth", depth), ("groundtruth", poses)):
            (folder / f"{name}.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return root


def write_dycheck(root, names, clip):
    """Frames of the train split are every second in time; the unit of the refined cameras is the metre, too."""
    (height, width), (focal, x, y) = clip.depth.shape[1:], clip.intrinsics[0][[0, 0, 1], [0, 2, 2]]
    frames = [f"0_{2 * i:05}" for i in range(len(clip.images))]
    for name in names:
        folder, processed = root / name, root / name / "flow3d_preprocessed"
        write_json(folder / "extra.json", {"factor": 1, "fps": 30})
        times = list(range(0, 2 * len(frames), 2))
        write_json(folder / "splits" / "train.json", {"frame_names": frames, "time_ids": times})
        images = []
        for i, frame in enumerate(frames):
            write_image(folder / "rgb" / "1x" / f"{frame}.png", clip.images[i])
            moving = (255 * clip.dynamic_mask[i]).astype(np.uint8)
            write_image(processed / "track_anything" / "1x" / f"{frame}.png", np.stack([moving, moving, moving], -1))
            write_array(folder / "depth" / "1x" / f"{frame}.npy", clip.depth[i, ..., None])
            write_array(processed / "aligned_depth_anything_colmap" / "1x" / f"{frame}.npy", 1 / clip.depth[i])
            world_to_camera = np.linalg.inv(clip.camera_to_world[i])
            camera = {
                "focal_length": focal,
                "principal_point": [x + 0.5, y + 0.5],
                "orientation": world_to_camera[:3, :3].tolist(),
                "position": clip.camera_to_world[i, :3, 3].tolist(),
            }
            write_json(folder / "camera" / f"{frame}.json", camera)
            quaternion = np.roll(Rotation.from_matrix(world_to_camera[:3, :3]).as_quat(), 1)
            images.append((i + 1, quaternion, world_to_camera[:3, 3], 1, f"{frame}.png"))
        (processed / "colmap").mkdir()
        cameras = [(1, "PINHOLE", width, height, (focal, focal, x + 0.5, y + 0.5))]
        write_text(processed / "colmap" / "sparse", cameras, images)
    return root


def write_array(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def write_adt(root, names, clip):
    for name in names:
        for i, (image, pose) in enumerate(zip(clip.images, clip.camera_to_world, strict=True)):
            write_image(root / name / "rgb" / f"{8 + i}.png", image)  # 8, 9, 10: natural order
            write_json(root / name / "camera" / f"{8 + i}.json", {"w2c": np.linalg.inv(pose).tolist()})
    return root
