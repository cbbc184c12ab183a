"""A fuzzer of every reader, a program of its own: what ends it, prints or hangs is seen from outside.

    python tests/fuzzing.py COUNT [READER ...]

Each reader gets COUNT mutations of a good input, the same ones every time.  Only our own errors may come out, within
``MOST_SECONDS`` each, and the process may grow by ``MOST_GROWTH``.  Exit code 1 if anything else happens.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import logging
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from small_inputs import moving_square, random_model, write_checkpoint, write_images, write_video
from test_scene import make_motion, make_scene

from easi3r import Motion, Scene, decoding
from easi3r.backbones.checkpoint import load_checkpoint
from easi3r.backbones.safetensors import write_safetensors
from easi3r.colmap import read_colmap_cameras, read_colmap_images
from easi3r.config import FrameSettings, Settings, load_settings
from easi3r.errors import Easi3RError
from easi3r.export import export_scene
from easi3r.frames import read_frames
from easi3r.given_intrinsics import read_intrinsics
from easi3r.given_masks import read_masks
from easi3r.given_poses import read_poses
from easi3r.known import read_depth
from easi3r.report.page import page
from easi3r.viewer.player import player_page

MOST_SECONDS, MOST_GROWTH = 10, 1 << 30  # of the processor's time: a busy machine takes longer
HANGS = 120  # seconds by the clock
ADDRESS_SPACE = 12 << 30  # bytes; memory that is promised by a header and never touched counts here
TOKENS = [
    *(b"", b"\0", b"\xff" * 4, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\0" * 8, b"\x80", b"\xc0\x80", b"\xed\xa0\x80"),
    *(b"nan", b"-inf", b"1e999", b"-1", b"0", b"9" * 40, b"9" * 5000, b"0x" + b"f" * 5000, b"1e-320", b"-0.0", b"true"),
    *(
        b"null",
        b"{",
        b"}",
        b"[" * 2000,
        b"]",
        b"{}",
        b'"',
        b"'",
        b",",
        b":",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"#",
        b"\\",
        b"%",
    ),
    *(
        b"&a ",
        b"*a",
        b"<<: ",
        b"!!int ",
        b"!!bool ",
        b"!!float ",
        b"!!timestamp ",
        b"!!binary ",
        b"!!set ",
        b"? ",
        b"- ",
    ),
    *(
        b"../",
        b"/etc/passwd",
        b"\\ud800",
        b"NaN",
        b"Infinity",
        b"__class__",
        b"\xef\xbb\xbf",
        b"cos\nsystem\n",
        b"PK\3\4",
    ),
]
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 1 << 31, -(1 << 63), 1 << 70, 10**400, 0.5, -0.0, 1e-320, 1e308, 1e999, "", "x"),
    *(
        "\ud800",
        "../../x",
        "\0",
        "nan",
        "1",
        "9" * 5000,
        [],
        [[]],
        {},
        [1, 2],
        [1, 2, 3],
        {"a": 1},
        [None],
        ["a", "b", "c"],
    ),
    *([{}], [[1, 2]] * 3, [[[[[[]]]]]], "a" * 3000, {"": {"": {}}}, 3, 3.5, "none", "static", "exif", [0] * 500),
]


# --- mutations


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 2, 4])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 16, 100])
        kind = rng.randrange(8)
        if kind == 0 and data:
            at = rng.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + rng.randbytes(length) + data[at + length :]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + data[at + length :]
        elif kind == 4:
            data = data[:at] + rng.choice(TOKENS) + data[at:]
        elif kind == 5:
            token = rng.choice(TOKENS)
            data = data[:at] + token + data[at + len(token) :]
        elif kind == 6:
            source = rng.randrange(len(data) + 1)
            data = data[:at] + data[source : source + length * 4] + data[at:]
        else:
            number = rng.choice([0, 1, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, 1 << 63, (1 << 64) - 1])
            text = struct.pack(rng.choice("<>") + "Q", number)
            text = text[: rng.choice([1, 2, 4, 8])] if rng.random() < 0.5 else text[-rng.choice([1, 2, 4, 8]) :]
            data = data[:at] + text + data[at + len(text) :]
    return data


def with_changed_value(tree: Any, rng: random.Random) -> Any:
    """A copy in which one value anywhere is another, gone, or twice there."""
    if isinstance(tree, (dict, list)) and tree and rng.random() < 0.85:
        copy = dict(tree) if isinstance(tree, dict) else list(tree)
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        kind = rng.random()
        if kind < 0.1:
            del copy[key]
        elif kind < 0.2 and isinstance(copy, list):
            copy.append(copy[key])
        elif kind < 0.2:
            copy[str(rng.choice(VALUES))[:50]] = copy[key]
        else:
            copy[key] = with_changed_value(copy[key], rng)
        return copy
    return rng.choice(VALUES)


def mutated_json(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.3:
        return mutated(data, rng)
    tree = with_changed_value(json.loads(data), rng)
    return json.dumps(tree).encode()


def mutated_yaml(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return mutated(data, rng)
    try:
        return yaml.safe_dump(with_changed_value(yaml.safe_load(data), rng), allow_unicode=rng.random() < 0.5).encode()
    except (UnicodeEncodeError, ValueError):  # lone surrogates, numbers that Python does not write
        return mutated(data, rng)


def mutated_png(data: bytes, rng: random.Random) -> bytes:
    """Half of them with sums that are right again, lest all that is tested is the sum."""
    data = mutated(data, rng)
    if rng.random() < 0.3:
        return data
    at, chunks = 8, [data[:8]]
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        content = data[at + 4 : at + 8 + length]
        chunks.append(data[at : at + 4] + content + struct.pack(">I", zlib.crc32(content)))
        at += 12 + length
    return b"".join(chunks)


def mutated_zip(data: bytes, rng: random.Random) -> bytes:
    """Half of them whole archives with one part changed."""
    if rng.random() < 0.3:
        return mutated(data, rng)
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as good:
        method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
        with zipfile.ZipFile(file, "w", method) as archive:
            names = good.namelist()
            chosen = rng.choice([name for name in names if name.endswith(".pkl")] * 3 + names)
            for name in names:
                part = good.read(name)
                # most of an array is numbers; its header is what lies
                head = 128 if rng.random() < 0.7 and not name.endswith(".pkl") else len(part)
                archive.writestr(name, mutated(part[:head], rng) + part[head:] if name == chosen else part)
    return file.getvalue()


def mutated_start(data: bytes, rng: random.Random, length: int = 2000) -> bytes:
    """Mostly the beginning, where headers are."""
    if rng.random() < 0.2:
        return mutated(data, rng)
    return mutated(data[:length], rng) + data[length:]


def mutated_safetensors(data: bytes, rng: random.Random) -> bytes:
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.3:
        return mutated_start(data, rng)
    text = mutated_json(data[8 : 8 + length], rng)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


# --- readers


@dataclass
class Reader:
    """Files that may be changed, how, and who reads them."""

    files: list[Path]
    change: Callable[[bytes, random.Random], bytes]
    read: Callable[[], Any]
    good: list[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.good = [file.read_bytes() for file in self.files]
        self.read()  # what is to be spoilt is good


def frames_of(source: Any) -> Any:
    return read_frames(source, FrameSettings(image_size="native"), patch_size=16, trained_size=64)


def configuration(home: Path) -> Reader:
    tree = Settings().as_dict() | {"window": 3, "known": {"scale_from": "0,1,1,2,2,3"}, "offload": True, "seed": 5}
    (home / "my.yaml").write_text(yaml.safe_dump(tree))
    short = home / "short.yaml"
    short.write_text("fps: 5\nalign: published\nmotion: {clusters: 12}\n# comment\nfocal: 500.0\nimage_size: native\n")

    def read() -> None:
        for file in (home / "my.yaml", short):
            json.dumps(load_settings(file).as_dict())

    return Reader([home / "my.yaml", short], mutated_yaml, read)


def touch(scene: Motion) -> None:
    """Everything that is computed from a loaded result when it is asked for."""
    page(scene)
    if isinstance(scene, Scene):
        scene.points(), scene.trajectory(), player_page(scene)
        if scene.meta.get("crops"):
            assert scene.original_intrinsics.shape == scene.intrinsics.shape


def full_meta(home: Path) -> dict[str, Any]:
    crop = {"original": [64, 48], "resized": [64, 48], "offset": [8, 8], "size": [48, 32]}
    return {
        "source": str(write_images(home / "clip", moving_square())),
        "names": [f"frame_{i}.png" for i in range(3)],
        "crops": [crop] * 3,
        "settings": Settings().as_dict(),
        "seed": 0,
        "checkpoint": {"name": "x.pth", "sha256": None, "licence": "Apache-2.0"},
        "device": "cpu",
        "versions": {"easi3r": "1", "torch": "2"},
        "timings_s": {"frames": 0.5, "alignment": 1.5},
        "scale": "up to scale",
        "pieces": [{"frames": [0, 3], "threshold": 0.5}, {"frames": [1, 3], "threshold": None, "seam_residual": 0.01}],
        "quality": {"verdict": "good", "reasons": ["a"], "not_checked": [], "flow": 0.5, "jump": None},
    }


def saved(
    home: Path, names: list[str], change: Callable[[bytes, random.Random], bytes], *, export: bool = False
) -> Reader:
    scene = make_scene()
    scene.meta = full_meta(home)
    out = scene.save(home / "out")

    def read() -> None:
        loaded = Scene.load(out)
        touch(loaded)
        if export:
            try:
                for name in ("tum", "colmap"):
                    export_scene(loaded, home / "export" / name, name, None)
            finally:
                shutil.rmtree(home / "export", ignore_errors=True)

    return Reader([out / name for name in names], change, read)


def motion_json(home: Path) -> Reader:
    motion = make_motion()
    motion.meta = full_meta(home)
    out = motion.save(home / "out")
    return Reader([out / "scene.json"], mutated_json, lambda: touch(Motion.load(out)))


def masks(home: Path) -> Reader:
    clip = frames_of(moving_square())
    (home / "masks").mkdir()
    for i, mode in enumerate(("L", "RGB", "P")):
        Image.fromarray(np.full((48, 64), 255, np.uint8)).convert(mode).save(home / "masks" / f"m_{i}.png")
    files = sorted((home / "masks").iterdir())
    files[2].write_bytes(files[0].read_bytes())
    return Reader(files, mutated_png, lambda: read_masks(home / "masks", clip))


def images(home: Path) -> Reader:
    folder = write_images(home / "clip", moving_square(1))
    for suffix in ("jpg", "bmp", "ppm", "tif", "webp"):
        Image.fromarray(moving_square(1)[0]).save(folder / f"a.{suffix}", exif=Image.Exif())
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(folder / "deep.png")
    files = sorted(folder.iterdir())

    def read() -> None:
        for file in files:
            frames_of(file)

    return Reader(
        files, lambda data, rng: mutated_png(data, rng) if data[1:4] == b"PNG" else mutated_start(data, rng), read
    )


def safetensors(home: Path) -> Reader:
    small = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16), "c": torch.zeros(0, 3)}
    write_safetensors(home / "model.safetensors", small | {"enc_norm.weight": torch.ones(8)})
    (home / "config.json").write_text('{"head_type": "linear", "enc_depth": 2, "dec_depth": 2}')

    def read() -> None:
        try:
            load_checkpoint(home)
        except Easi3RError as error:
            if "another model's" not in str(error):  # which the good one is too
                raise

    return Reader([home / "model.safetensors"], mutated_safetensors, read)


def config_json(home: Path) -> Reader:
    network = random_model().network
    config = {key: value for key, value in vars(network.config).items() if key not in ("rope_base", "conf_range")}
    config |= {
        "pos_embed": "RoPE100",
        "conf_mode": ["exp", 1, "inf"],
        "license": "x",
        "depth_mode": ["exp", "-inf", "inf"],
    }
    (home / "config.json").write_text(json.dumps(config))
    write_safetensors(home / "model.safetensors", dict(network.state_dict()))
    return Reader([home / "config.json"], mutated_json, lambda: load_checkpoint(home))


def pth(home: Path, *, zipped: bool) -> Reader:
    good = write_checkpoint(home / "zip.pth")
    if not zipped:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(good, weights_only=True)
        torch.save(content, good, _use_new_zipfile_serialization=False)

    def read() -> None:
        network, _ = load_checkpoint(good)
        assert all(value.is_contiguous() or value.numel() for value in network.state_dict().values())

    def change(data: bytes, rng: random.Random) -> bytes:
        return mutated_zip(data, rng) if zipped else mutated_start(data, rng, 20_000)

    return Reader([good], change, read)


def vggt_pt(home: Path) -> Reader:
    torch.save({"aggregator.camera_token": torch.ones(1, 2, 1, 64), "x": torch.zeros(3)}, home / "model.pt")

    def read() -> None:
        try:
            load_checkpoint(home / "model.pt")
        except Easi3RError as error:
            if "do not say what network" not in str(error):
                raise

    return Reader([home / "model.pt"], mutated_zip, read)


def tables(home: Path) -> Reader:
    clip = frames_of(moving_square())
    (home / "k.txt").write_text("60.5 60.5 31.5 23.5\n# comment\n60.5, 60.5, 31.5, 23.5\n61 61 31.5 23.5\n")
    (home / "t.txt").write_text("".join(f"{i} 0 0 {i} 0 0 0 1\n" for i in range(3)))

    def read() -> None:
        read_intrinsics(home / "k.txt", clip)
        read_poses(home / "t.txt", clip, "camera_to_world")

    return Reader([home / "k.txt", home / "t.txt"], mutated, read)


def colmap(home: Path, suffix: str) -> Reader:
    clip = frames_of(write_images(home / "clip", moving_square()))
    if suffix == "txt":
        (home / "cameras.txt").write_text("# x\n1 PINHOLE 64 48 60 60 32 24\n2 SIMPLE_RADIAL 64 48 60 32 24 0.1\n")
        rows = "".join(f"{i + 1} 1 0 0 0 0 0 {i} {i % 2 + 1} frame_{i}.png\n1 2 -1\n" for i in range(3))
        (home / "images.txt").write_text(rows)
    else:
        cameras = struct.pack("<Q", 2) + struct.pack("<iiQQ4d", 1, 1, 64, 48, 60, 60, 32, 24)
        (home / "cameras.bin").write_bytes(cameras + struct.pack("<iiQQ4d", 2, 2, 64, 48, 60, 32, 24, 0.1))
        rows_binary = b"".join(
            struct.pack("<I7dI", i + 1, 1, 0, 0, 0, 0, 0, i, i % 2 + 1)
            + b"frame_%d.png\0" % i
            + struct.pack("<Q", 1)
            + bytes(24)
            for i in range(3)
        )
        (home / "images.bin").write_bytes(struct.pack("<Q", 3) + rows_binary)

    def read() -> None:
        read_colmap_cameras(home), read_colmap_images(home)
        read_intrinsics(home, clip)
        read_poses(home, clip, "world_to_camera")

    return Reader([home / f"cameras.{suffix}", home / f"images.{suffix}"], mutated, read)


def npz(home: Path) -> Reader:
    clip = frames_of(moving_square())
    np.savez(home / "p.npz", camera_to_world=np.tile(np.eye(4), (2, 1, 1)), frames=np.array([0, 2]))
    np.savez_compressed(home / "d.npz", depth=np.ones((3, 48, 64), np.float32))

    def read() -> None:
        read_poses(home / "p.npz", clip, "camera_to_world")
        read_depth(home / "d.npz", clip)

    return Reader([home / "p.npz", home / "d.npz"], mutated_zip, read)


def npy(home: Path) -> Reader:
    clip = frames_of(moving_square())
    np.save(
        home / "k.npy", np.tile(np.diag([60.0, 60, 1]), (3, 1, 1)) + np.array([[0, 0, 31.5], [0, 0, 23.5], [0, 0, 0]])
    )
    np.save(home / "d.npy", np.ones((3, 48, 64), np.float32))

    def read() -> None:
        read_intrinsics(home / "k.npy", clip)
        read_depth(home / "d.npy", clip)

    return Reader([home / "k.npy", home / "d.npy"], lambda data, rng: mutated_start(data, rng, 128), read)


def video(home: Path, *, opencv: bool) -> Reader:
    path = write_video(home / "a.avi", moving_square(4))
    files = [path]
    if av := decoding.find_av():
        files.append(home / "a.mp4")
        with av.open(str(files[1]), "w") as container:
            stream = container.add_stream("mpeg4", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for frame in moving_square(4):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())

    def read() -> None:
        find = decoding.find_av
        decoding.find_av = (lambda: None) if opencv else find
        try:
            for file in files:
                frames_of(file)
        finally:
            decoding.find_av = find

    return Reader(files, lambda data, rng: mutated_start(data, rng, len(data)), read)


READERS: dict[str, Callable[[Path], Reader]] = {
    "configuration": configuration,
    "scene.json": lambda home: saved(home, ["scene.json"], mutated_json),
    "scene.json and exports": lambda home: saved(home, ["scene.json"], mutated_json, export=True),
    "motion's scene.json": motion_json,
    "scene's npz": lambda home: saved(home, ["cameras.npz", "attention.npz"], mutated_zip),
    "scene's npy": lambda home: saved(
        home, ["depth/frame_00001.npy", "dynamic_score/frame_00000.npy"], lambda d, rng: mutated_start(d, rng, 128)
    ),
    "scene's png": lambda home: saved(home, ["images/frame_00001.png", "dynamic_mask/frame_00000.png"], mutated_png),
    "masks": masks,
    "images": images,
    "safetensors": safetensors,
    "config.json": config_json,
    "pth": lambda home: pth(home, zipped=True),
    "pth, legacy": lambda home: pth(home, zipped=False),
    "vggt's pt": vggt_pt,
    "tables": tables,
    "colmap, text": lambda home: colmap(home, "txt"),
    "colmap, binary": lambda home: colmap(home, "bin"),
    "npz": npz,
    "npy": npy,
    "video by PyAV": lambda home: video(home, opencv=False),
    "video by OpenCV": lambda home: video(home, opencv=True),
}


class SlowError(Exception):
    """A mutation took too long."""


def too_slow(*_: object) -> None:
    raise SlowError(f"more than {HANGS} s")


def fuzz(name: str, count: int, home: Path) -> tuple[str, list[str]]:
    """A line on how it went, and what went wrong."""
    reader = READERS[name](home)
    before, slowest, refused, wrong = peak(), 0.0, 0, []
    for number in range(count):
        rng = random.Random(f"{name} {number}")
        which = rng.randrange(len(reader.files))
        reader.files[which].write_bytes(reader.change(reader.good[which], rng))
        start = time.process_time()
        signal.alarm(HANGS)
        try:
            reader.read()
        except Easi3RError as error:
            refused += 1
            if not str(error).endswith(".") or len(str(error)) > 1500:
                wrong.append(f"{name} {number}: no sentence: {str(error)[:300]!r}")
        except Exception:
            wrong.append(f"{name} {number}: {traceback.format_exc(limit=-4)}")
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.process_time() - start)
        reader.files[which].write_bytes(reader.good[which])
    if slowest > MOST_SECONDS:
        wrong.append(f"{name}: {slowest:.1f} s for one")
    growth = peak() - before
    if growth > MOST_GROWTH:
        wrong.append(f"{name}: {growth >> 20} MiB more than before")
    line = f"{name}: {count} mutations, {refused} refused, {count - refused} read; slowest {slowest:.2f} s"
    return f"{line}, {growth >> 20} MiB more; {len(wrong)} wrong", wrong


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def main() -> int:
    faulthandler.enable()
    signal.signal(signal.SIGALRM, too_slow)
    warnings.simplefilter("ignore")  # as the command line does
    logging.getLogger("easi3r").setLevel(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)
    count, *names = sys.argv[1:]
    failed = False
    for name in names or READERS:
        with tempfile.TemporaryDirectory() as home:
            line, wrong = fuzz(name, int(count), Path(home))
        sys.stdout.write("\n".join([line, *wrong[:20], ""]))
        sys.stdout.flush()
        failed |= bool(wrong)
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
