"""Inputs made to harm: each writes what it needs into a folder and returns arguments and pieces of the one sentence."""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from small_inputs import moving_square, write_images


class Ground(NamedTuple):
    """What is good: every input spoils a copy of its own."""

    folder: Path
    clip: Path  # three images of 64 x 48
    weights: Path
    scene: Path


Hostile = Callable[[Ground], tuple[list[Any], list[Any]]]


def png(width: int, height: int, *, bits: int = 8, color: int = 2, data: bytes = b"") -> bytes:
    """A PNG whose header says what is wanted, whatever ``data`` holds."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def npy_header(shape: Any, dtype: str = "<f4") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


class Attack:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.mark,)


def run(ground: Ground, *arguments: Any, source: Path | None = None) -> list[Any]:
    return ["run", source or ground.clip, "-o", ground.folder / "out", "--checkpoint", ground.weights, *arguments]


def show(ground: Ground) -> list[Any]:
    return ["show", ground.scene, "--html", ground.folder / "page.html"]


# --- images


def image_of(name: str, content: bytes, *pieces: str) -> Hostile:
    def make(ground: Ground) -> tuple[list[Any], list[Any]]:
        (ground.folder / "images").mkdir()
        (ground.folder / "images" / name).write_bytes(content)
        return run(ground, source=ground.folder / "images"), [ground.folder / "images" / name, *pieces]

    return make


def packed_zeros(width: int, height: int) -> bytes:
    """A whole PNG: a megabyte for each gigabyte of black."""
    return png(width, height, bits=1, color=0, data=bytes((width // 8 + 1) * height))


def tiff_of(width: int, height: int) -> bytes:
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, height), (279, 10)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def bmp_of(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, *[0] * 6)


def link_to_an_image_elsewhere(ground: Ground) -> tuple[list[Any], list[Any]]:
    secret = write_images(ground.folder / "private", moving_square(1)) / "frame_0.png"
    images = write_images(ground.folder / "images", moving_square(2))
    (images / "frame_2.png").symlink_to(secret)
    return run(ground, source=images), [images / "frame_2.png", "is a link to", secret, "put the file itself there"]


def link_that_climbs_out(ground: Ground) -> tuple[list[Any], list[Any]]:
    images = write_images(ground.folder / "images", moving_square(2))
    (images / "frame_2.png").symlink_to("../private/../../x.png")
    return run(ground, source=images), [images / "frame_2.png", "is a link to"]


def link_in_circles(ground: Ground) -> tuple[list[Any], list[Any]]:
    images = write_images(ground.folder / "images", moving_square(2))
    (images / "frame_2.png").symlink_to("frame_2.png")
    return run(ground, source=images), [images / "frame_2.png", "is a link to"]


def pipe_called_video(ground: Ground) -> tuple[list[Any], list[Any]]:
    os.mkfifo(ground.folder / "clip.mp4")  # reading it would wait for ever
    return run(ground, source=ground.folder / "clip.mp4"), ["clip.mp4"]


# --- videos


def list_of_files_called_video(ground: Ground) -> tuple[list[Any], list[Any]]:
    (ground.folder / "clip.mp4").write_text("ffconcat version 1.0\nfile good/frame_0.png\nfile good/frame_1.png\n")
    return run(ground, source=ground.folder / "clip.mp4"), ["clip.mp4", "cannot be opened as a video"]


def playlist_called_video(ground: Ground) -> tuple[list[Any], list[Any]]:
    (ground.folder / "clip.mov").write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/secret\n#EXT-X-ENDLIST\n")
    return run(ground, source=ground.folder / "clip.mov"), ["clip.mov", "cannot be opened as a video"]


def video_of_absurd_size(ground: Ground) -> tuple[list[Any], list[Any]]:
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + bytes(6)
    gif += b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\x02\x02\x44\x01\x00;"
    (ground.folder / "clip.gif").write_bytes(gif)
    return run(ground, source=ground.folder / "clip.gif"), ["clip.gif", "get a whole copy"]


def name_of_many_kinds(ground: Ground) -> tuple[list[Any], list[Any]]:
    name = os.fsdecode(b"a 'b\" \xff;$(touch x)\x1b[31m.mp4")
    (ground.folder / name).write_bytes(b"no video")
    return run(ground, source=ground.folder / name), ["\\udcff;$(touch x)\\x1b[31m.mp4", "cannot be opened as a video"]


# --- configurations


def config_of(content: str | bytes, *pieces: str) -> Hostile:
    def make(ground: Ground) -> tuple[list[Any], list[Any]]:
        path = ground.folder / "my.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return run(ground, "--config", path), [path, *pieces]

    return make


def laughs() -> str:
    """Ten lines that stand for ten thousand million words."""
    lines = ["a: &a [" + ", ".join(["lol"] * 10) + "]"]
    lines += [f"{b}: &{b} [" + ", ".join([f"*{a}"] * 10) + "]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    return "\n".join([*lines, "device: *i"])


def config_that_is_a_pipe(ground: Ground) -> tuple[list[Any], list[Any]]:
    os.mkfifo(ground.folder / "my.yaml")
    return run(ground, "--config", ground.folder / "my.yaml"), ["my.yaml", "pipe"]


def config_without_end(ground: Ground) -> tuple[list[Any], list[Any]]:
    return run(ground, "--config", "/dev/zero"), ["/dev/zero", "device"]


# --- what is given beside the clip


def given(option: str, name: str, content: bytes, *pieces: str) -> Hostile:
    def make(ground: Ground) -> tuple[list[Any], list[Any]]:
        (ground.folder / name).write_bytes(content)
        return run(ground, option, ground.folder / name), [ground.folder / name, *pieces]

    return make


def npz_of(key: str, content: bytes, *, compression: int = zipfile.ZIP_DEFLATED, repeat: int = 0) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, archive.open(f"{key}.npy", "w") as entry:
        entry.write(content)
        for _ in range(repeat):
            entry.write(bytes(1 << 20))
    return file.getvalue()


def pickled_array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}]), allow_pickle=True)
    return file.getvalue()


def mask_beyond_any_size(ground: Ground) -> tuple[list[Any], list[Any]]:
    masks = ground.folder / "masks"
    masks.mkdir()
    for i in range(3):
        (masks / f"mask_{i}.png").write_bytes(png(60000, 60000, color=0))
    return run(ground, "--masks", masks), ["mask_0.png", "beyond the limit"]


def mask_that_is_a_link(ground: Ground) -> tuple[list[Any], list[Any]]:
    masks = ground.folder / "masks"
    masks.mkdir()
    (masks / "mask_0.png").symlink_to("/etc/passwd")
    return run(ground, "--masks", masks), [masks / "mask_0.png", "is a link to /etc/passwd"]


def depth_that_is_a_link(ground: Ground) -> tuple[list[Any], list[Any]]:
    depth = ground.folder / "depth"
    depth.mkdir()
    (depth / "d.npy").symlink_to("/dev/zero")
    return run(ground, "--depth", depth), [depth / "d.npy", "is a link to /dev/zero"]


# --- checkpoints


def checkpoint_of(content: Callable[[Ground], Any], *pieces: str) -> Hostile:
    def make(ground: Ground) -> tuple[list[Any], list[Any]]:
        path = ground.folder / "evil.pth"
        made = content(ground)
        if isinstance(made, bytes):
            path.write_bytes(made)
        else:
            torch.save(made, path)
        return run(ground, "--checkpoint", path), [path, *pieces]

    return make


def good_content(ground: Ground) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return dict(torch.load(ground.weights, weights_only=True))


def with_tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Ground], Any]:
    def make(ground: Ground) -> dict[str, Any]:
        content = good_content(ground)
        content["model"]["enc_norm.weight"] = change(content["model"]["enc_norm.weight"])
        return content

    return make


def repacked(ground: Ground) -> bytes:
    """The good weights as an archive whose parts are compressed, as those that unpack to gigabytes are."""
    file = io.BytesIO()
    with zipfile.ZipFile(ground.weights) as good, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in good.namelist():
            archive.writestr(name, good.read(name))
    return file.getvalue()


def nested_lists() -> Any:
    tree: list[Any] = ["lol"]
    for _ in range(60):
        tree = [tree, tree]
    return tree


def folder_of(config: str | bytes, tensors: bytes, *pieces: str) -> Hostile:
    def make(ground: Ground) -> tuple[list[Any], list[Any]]:
        folder = ground.folder / "hub"
        folder.mkdir()
        (folder / "config.json").write_bytes(config if isinstance(config, bytes) else config.encode())
        (folder / "model.safetensors").write_bytes(tensors)
        return run(ground, "--checkpoint", folder), [folder, *pieces]

    return make


def safetensors_of(header: Any, values: bytes = bytes(64)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


# --- saved scenes


def scene_with(change: Callable[[Path], Any], *pieces: str) -> Hostile:
    def make(ground: Ground) -> tuple[list[Any], list[Any]]:
        change(ground.scene)
        return show(ground), [ground.scene, *pieces]

    return make


def edit(**changes: Any) -> Callable[[Path], Any]:
    def change(scene: Path) -> None:
        header = json.loads((scene / "scene.json").read_text())
        header["meta"] |= changes
        (scene / "scene.json").write_text(json.dumps(header))

    return change


def link(name: str, target: str) -> Callable[[Path], Any]:
    def change(scene: Path) -> None:
        (scene / name).rename(scene.parent / "moved")
        (scene / name).symlink_to(target)

    return change


def pipe(name: str) -> Callable[[Path], Any]:
    def change(scene: Path) -> None:
        (scene / name).unlink()
        os.mkfifo(scene / name)

    return change


def names_that_climb(ground: Ground) -> tuple[list[Any], list[Any]]:
    secret = write_images(ground.folder / "private", moving_square(1)) / "frame_0.png"
    edit(source=str(ground.clip), names=[f"../private/{secret.name}"] * 3)(ground.scene)
    arguments = ["export", ground.scene, "--to", "colmap", "--original-images", "-o", ground.folder / "exports"]
    return arguments, [ground.scene, "names", "one file name per frame"]


GOOD_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
CROP = {"original": [96, 80], "resized": [48, 40], "offset": [0, 4], "size": [48, 32]}

HOSTILE: dict[str, Hostile] = {
    # images that unpack to gigabytes, sizes that no file has, other kinds under an image's name
    "PNG header of 2^31 x 2^31": image_of("a.png", png(2**31 - 1, 2**31 - 1), "beyond the limit of 134 million pixels"),
    "PNG header of 60000 x 60000": image_of("a.png", png(60000, 60000), "beyond the limit"),
    "PNG that unpacks to half a gigabyte": image_of("a.png", packed_zeros(30000, 5000), "30000 x 5000", "the limit"),
    "PNG of 0 x 0": image_of("a.png", png(0, 0), "cannot be read as an image"),
    "BMP header of 10^9 x 1": image_of("a.bmp", bmp_of(10**9, 1), "beyond the limit"),
    "BMP of negative size": image_of("a.bmp", bmp_of(-5, -5), "cannot be read as an image"),
    "TIFF header of 2^32 - 1": image_of("a.tif", tiff_of(2**32 - 1, 2**32 - 1), "cannot be read as an image"),
    "PPM header of 10^30": image_of("a.ppm", b"P6 " + b"9" * 30 + b" 9 255\n", "cannot be read as an image"),
    "PostScript called PNG": image_of("a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "identify"),
    "GIF called JPEG": image_of("a.jpg", b"GIF89a" + bytes(50), "cannot identify"),
    "link to an image elsewhere": link_to_an_image_elsewhere,
    "link that climbs out of the folder": link_that_climbs_out,
    "link in circles": link_in_circles,
    # videos
    "pipe called video": pipe_called_video,
    "list of other files called video": list_of_files_called_video,
    "playlist called video": playlist_called_video,
    "video of 65535 x 65535": video_of_absurd_size,
    "name with quotes, a line's worth of shell, an escape code and no UTF-8": name_of_many_kinds,
    # configurations
    "billion laughs": config_of(laughs(), "line 2", "aliases are not taken"),
    "YAML nested 30000 deep": config_of("a: " + "[" * 30000, "is not YAML"),
    "YAML of a megabyte": config_of("seed: 1\n" * 150_000, "larger than 64 KiB"),
    "YAML that calls a function": config_of("seed: !!python/object/apply:os.mkdir [it_ran]", "is not YAML"),
    "YAML's empty whole number": config_of("seed: !!int ''", "is not YAML"),
    "YAML's impossible truth": config_of("offload: !!bool perhaps", "is not YAML"),
    "number of 10000 digits": config_of("seed: 0x" + "f" * 10_000, "seed is a number of more than 38 digits"),
    "whole number beyond counting": config_of("stride: 100000000000000000000", "frames.stride", "2147483647"),
    "rate next to nothing": config_of("fps: 1.0e-320", "frames.fps", "from 1e-12"),
    "name of 30000 letters": config_of("? " + "x" * 30_000 + "\n: 1", "is not an option"),
    "name that is a number of 9000 digits": config_of("? 0x" + "f" * 9000 + "\n: 1", "is not an option"),
    "configuration that is a pipe": config_that_is_a_pipe,
    "configuration that never ends": config_without_end,
    # arrays and tables
    "npy header of 10^15 numbers": given("--depth", "d.npy", npy_header((10**5, 10**5, 10**5)), "promises"),
    "npy header of a negative size": given("--depth", "d.npy", npy_header((-1, 48, 64)), "promises"),
    "npy of Python objects": given("--camera-to-world", "p.npy", pickled_array(), "no plain numbers"),
    "npz that unpacks to a gigabyte": given(
        "--camera-to-world",
        "p.npz",
        npz_of("camera_to_world", npy_header((2**28,)), repeat=1024),
        "more than the 128 MiB",
    ),
    "npz compressed by another method": given(
        "--depth", "d.npz", npz_of("depth", npy_header((3, 4, 4)), compression=zipfile.ZIP_LZMA), "NumPy never does"
    ),
    "table of words": given("--intrinsics", "k.txt", b"\xff\xfe\0" * 40, "no table of numbers"),
    "TUM rows of NaN": given("--camera-to-world", "t.txt", b"nan " * 8, "not finite"),
    "COLMAP file that counts to 2^64": given("--intrinsics", "cameras.bin", b"\xff" * 8, "export it anew"),
    "masks of 60000 x 60000": mask_beyond_any_size,
    "mask that is a link": mask_that_is_a_link,
    "depth that is a link to a device": depth_that_is_a_link,
    # checkpoints
    "pickle that makes a folder": checkpoint_of(lambda g: {"args": Attack(g.folder / "ran"), "model": {}}, "run code"),
    "bare pickle that makes a folder": checkpoint_of(lambda g: pickle.dumps(Attack(g.folder / "ran")), "expected a"),
    "archive of compressed parts": checkpoint_of(repacked, "cannot be read"),
    "tensor that repeats one number": checkpoint_of(
        with_tensor(lambda _: torch.zeros(1).expand(10**9)), "larger than the file"
    ),
    "tensor without numbers": checkpoint_of(with_tensor(lambda t: t.to("meta")), "on meta"),
    "sparse tensor": checkpoint_of(with_tensor(lambda t: t.to_sparse()), "cannot be read"),
    "constructor of 2^60 lists": checkpoint_of(
        lambda g: {"args": nested_lists(), "model": {}}, "constructor is a list"
    ),
    "configuration of a megabyte": folder_of(" " * (1 << 21), safetensors_of({}), "larger than 1024 KiB"),
    "configuration nested 10^5 deep": folder_of("[" * 100_000, safetensors_of({}), "is not JSON"),
    "network of 10^9 layers": folder_of(
        '{"head_type": "dpt", "enc_depth": 1000000000}', safetensors_of({}), "enc_depth=1000000000"
    ),
    "safetensors header of 2^63 bytes": folder_of(
        "{}", struct.pack("<Q", 1 << 63) + bytes(9), "its header should take"
    ),
    "safetensors header nested deep": folder_of("{}", struct.pack("<Q", 90_000) + b"[" * 90_000, "not JSON"),
    "safetensors of unknown numbers": folder_of("{}", safetensors_of({"a": {**GOOD_ENTRY, "dtype": "F3"}}), "'a'"),
    "safetensors of negative places": folder_of(
        "{}", safetensors_of({"a": {**GOOD_ENTRY, "data_offsets": [-8, 0]}}), "do not agree"
    ),
    "safetensors on top of each other": folder_of(
        "{}", safetensors_of(dict.fromkeys("abcdefghij", GOOD_ENTRY), bytes(8)), "on top of each other"
    ),
    "safetensors of 2^62 x 0 numbers": folder_of(
        "{}", safetensors_of({"a": {"dtype": "F32", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}), "agree"
    ),
    # saved scenes
    "scene whose images lie elsewhere": scene_with(link("images", "/usr/share"), "is a link to", "outside"),
    "scene whose depth is a device": scene_with(link("depth/frame_00000.npy", "/dev/zero"), "is a link to /dev/zero"),
    "scene with a pipe": scene_with(pipe("depth/frame_00000.npy"), "pipe"),
    "scene with a huge picture": scene_with(
        lambda scene: (scene / "images" / "frame_00001.png").write_bytes(png(9000, 9000)), "9000 x 9000 px"
    ),
    "scene of one bit per pixel": scene_with(
        lambda scene: Image.new("1", (48, 32)).save(scene / "dynamic_mask" / "frame_00000.png"), "frame_00000.png"
    ),
    "scene of 10^12 numbers": scene_with(
        lambda scene: (scene / "depth" / "frame_00000.npy").write_bytes(npy_header((10**6, 10**6))), "promises"
    ),
    "scene whose cameras unpack to a gigabyte": scene_with(
        lambda scene: (scene / "cameras.npz").write_bytes(npz_of("camera_to_world", npy_header((2**28,)), repeat=1024)),
        "more than the 128 MiB",
    ),
    "scene with names that climb": names_that_climb,
    "scene with crops of 10^18 pixels": scene_with(
        edit(crops=[{**CROP, "original": [10**9, 10**9]}] * 3), "beyond the limit"
    ),
    "scene with crops of nothing": scene_with(edit(crops=[{**CROP, "original": [0, 80]}] * 3), "one crop per frame"),
    "scene whose source is a number": scene_with(edit(source=5), "meta['source'] is not text"),
    "scene nested 500 deep": scene_with(edit(more=json.loads("[" * 500 + "]" * 500)), "nested more than 32 levels"),
    "scene.json nested 10^5 deep": scene_with(lambda scene: (scene / "scene.json").write_text("[" * 10**5), "damaged"),
    "scene.json with a number of 5000 digits": scene_with(
        lambda scene: (scene / "scene.json").write_text('{"kind": ' + "9" * 5000 + "}"), "damaged"
    ),
    "scene whose focal length is NaN": scene_with(
        lambda scene: np.savez(
            scene / "cameras.npz",
            camera_to_world=np.tile(np.eye(4), (3, 1, 1)),
            intrinsics=np.full((3, 3, 3), np.nan),
            timestamps=np.arange(3.0),
        ),
        "cameras are not finite",
    ),
}
