"""Reading, choosing and cropping frames: known answers, properties, and files that are broken in the usual ways."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from easi3r import decoding, frames
from easi3r.config import FrameSettings
from easi3r.decoding import SourceFrame
from easi3r.errors import InputError
from easi3r.frames import apply_crop, plan_crop

RNG = np.random.default_rng(7)
NATIVE = FrameSettings(image_size="native")


def read(source, settings=NATIVE, patch_size=8, trained_size=512, **options):
    settings = FrameSettings(image_size="native", **options) if options else settings
    return frames.read_frames(source, settings, patch_size=patch_size, trained_size=trained_size)


@pytest.fixture(params=["av", "opencv"])
def reader(request, monkeypatch):
    """Every video test runs through both readers."""
    if request.param == "opencv":
        monkeypatch.setattr(decoding, "find_av", lambda: None)
    return request.param


def write_video(path, pictures, *, codec="libx264", rate=25, stamps=None, pixels="yuv420p", encoder=None, **muxer):
    """Write [n, H, W, 3] uint8; ``stamps`` in milliseconds for a variable frame rate."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w", options=muxer) as container:
        stream = container.add_stream(codec, rate=1000 if stamps else rate, options=encoder or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.bit_rate = pixels, 4_000_000
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = (stamps[i], Fraction(1, 1000)) if stamps else (i, Fraction(1, rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbered(n, height=48, width=64):
    """Pictures whose grey level tells their number."""
    return [np.full((height, width, 3), 20 + 5 * i, np.uint8) for i in range(n)]


def numbers(images):
    return [round((float(image.mean()) - 20) / 5) for image in images]


def textured(n, height=96, width=160):
    """Pictures with so much content that frames take up room in the file."""
    noise = RNG.integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.roll(noise, 3 * i, axis=1) for i in range(n)]


def cut(path, share):
    data = path.read_bytes()
    copy = path.with_name("cut_" + path.name)
    copy.write_bytes(data[: int(share * len(data))])
    return copy


def patched(path, box, at, value):
    """A copy with ``value`` written ``at`` bytes behind the name of a box."""
    data = bytearray(path.read_bytes())
    begin = data.index(box) + len(box) + at
    data[begin : begin + len(value)] = value
    copy = path.with_name("patched_" + path.name)
    copy.write_bytes(data)
    return copy


# --- video


@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mp4", {}),
        ("a.mov", {"codec": "mpeg4", "movflags": "faststart"}),
        ("a.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
        ("a.mkv", {}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.m4v", {"movflags": "frag_keyframe+empty_moov", "encoder": {"g": "4"}}),
        ("a.ts", {"codec": "mpeg2video"}),
        ("A.GIF", {"codec": "gif", "pixels": "rgb8"}),
    ],
)
def test_video_gives_every_frame_with_its_time(tmp_path, reader, name, options):
    path = write_video(tmp_path / name, numbered(12), **options)
    clip = read(path)
    assert clip.images.shape == (12, 48, 64, 3) and clip.images.dtype == np.uint8
    if name == "A.GIF":
        assert np.all(np.diff(clip.images.mean(axis=(1, 2, 3))) >= 0)  # 256 colours only
    else:
        assert numbers(clip.images) == list(range(12))
    assert clip.timestamps == pytest.approx(np.arange(12) / 25, abs=1e-6) and clip.timestamps.dtype == np.float64
    assert clip.names == tuple(f"frame {i}" for i in range(12))
    assert clip.source == str(path) and {crop.original for crop in clip.crops} == {(64, 48)}


@pytest.mark.parametrize("n", [1, 2])
def test_short_videos(tmp_path, reader, n):
    assert numbers(read(write_video(tmp_path / "a.mp4", numbered(n))).images) == list(range(n))


def test_variable_frame_rate_keeps_its_clock(tmp_path, reader):
    stamps = [0, 40, 100, 400, 440, 1000]
    path = write_video(tmp_path / "a.mp4", numbered(6), codec="mpeg4", stamps=stamps)
    assert read(path).timestamps == pytest.approx(np.array(stamps) / 1000, abs=1e-9)
    kept = read(path, fps=5)  # multiples at 0, 0.2, 0.4, 0.6, 0.8, 1.0 s
    assert kept.timestamps == pytest.approx([0, 0.4, 1.0]) and numbers(kept.images) == [0, 3, 5]


def test_the_clock_starts_at_the_first_frame(tmp_path, reader):
    path = write_video(tmp_path / "a.mkv", numbered(4), stamps=[500, 540, 580, 620])
    assert read(path).timestamps == pytest.approx([0, 0.04, 0.08, 0.12])


def test_clock_never_goes_back_where_b_frames_have_no_stamp(tmp_path, reader):
    clip = read(write_video(tmp_path / "a.avi", numbered(12)))
    assert numbers(clip.images) == list(range(12))
    assert clip.timestamps[0] == 0 and np.all(np.diff(clip.timestamps) > 0.01)


@pytest.mark.parametrize(
    "turns, matrix",
    [
        (1, (0, -65536, 0, 65536, 0)),
        (2, (-65536, 0, 0, 0, -65536)),
        (3, (0, 65536, 0, -65536, 0)),
    ],
)
def test_rotation_of_the_track_header_is_applied(tmp_path, reader, turns, matrix):
    picture = np.full((48, 64, 3), 30, np.uint8)
    picture[:16, :24] = 220  # top left, longer than high
    path = write_video(tmp_path / "a.mp4", [picture] * 2)
    turned = patched(path, b"tkhd", 40, struct.pack(">9i", *matrix, 0, 0, 0, 1 << 30))
    clip = read(turned)
    expected = np.rot90(picture, turns)  # counterclockwise
    assert clip.images.shape[1:] == expected.shape
    assert np.abs(clip.images[0].astype(int) - expected).max() < 30
    assert clip.crops[0].original == (expected.shape[1], expected.shape[0])


def test_without_av_opencv_reads(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered(3))
    monkeypatch.setitem(sys.modules, "av", None)
    assert decoding.find_av() is None and read(path).num_frames == 3


def test_readers_agree_to_the_pixel(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", textured(5), codec="mpeg4")
    settings = FrameSettings(image_size=64)
    with_av = read(path, settings)
    monkeypatch.setattr(decoding, "find_av", lambda: None)
    with_opencv = read(path, settings)
    assert np.abs(with_av.images.astype(int) - with_opencv.images).max() <= 1
    assert with_av.timestamps == pytest.approx(with_opencv.timestamps)


# --- broken video


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_truncated_video_says_how_much_can_be_read(tmp_path, reader, codec):
    whole = write_video(tmp_path / "a.mp4", textured(40), codec=codec, movflags="faststart")
    broken = cut(whole, 0.6)
    with pytest.raises(InputError, match=r"Only (\d+) of 40 frames .*max_frames.*end") as caught:
        read(broken)
    advice = re.search(r"Only (\d+) .*max_frames \(at most (\d+)\) or end \(at most ([\d.]+) s\)", str(caught.value))
    readable, most, end = int(advice[1]), int(advice[2]), float(advice[3])
    assert 5 < readable < 38 and most == readable - 1 and end == pytest.approx(most / 25)
    for part in (read(broken, max_frames=most), read(broken, end=end)):
        assert np.array_equal(part.images, read(whole, max_frames=most).images)


def test_a_hole_in_a_video_is_an_error(tmp_path, reader):
    path = write_video(tmp_path / "a.mp4", textured(40), movflags="faststart")
    data = bytearray(path.read_bytes())
    begin, end = len(data) // 2, len(data) * 6 // 10
    data[begin:end] = bytes(end - begin)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"Only \d+ of 40 frames"):
        read(path)
    assert read(path, max_frames=5).num_frames == 5


def test_a_truncated_avi_is_an_error_and_a_truncated_matroska_is_not_judged(tmp_path, reader):
    with pytest.raises(InputError, match=r"Only \d+ of 40 frames"):
        read(cut(write_video(tmp_path / "a.avi", textured(40), codec="mpeg4"), 0.6))
    assert 5 < read(cut(write_video(tmp_path / "a.mkv", textured(40)), 0.6)).num_frames < 40


def test_a_video_cut_off_before_its_index_cannot_be_opened(tmp_path, reader):
    with pytest.raises(InputError, match=r"cut_a\.mp4 cannot be opened as a video"):
        read(cut(write_video(tmp_path / "a.mp4", textured(10)), 0.6))


@pytest.mark.parametrize("skipped", [10, 35])
def test_an_edit_list_is_no_damage(tmp_path, reader, skipped):
    """Cut without encoding anew, the file keeps all frames since the last key frame and hides those before the cut."""
    av = pytest.importorskip("av")
    whole = write_video(tmp_path / "whole.mp4", numbered(40), encoder={"g": "20"})
    with av.open(str(whole)) as original, av.open(str(tmp_path / "trimmed.mp4"), "w") as copy:
        stream = original.streams.video[0]
        target, shift = copy.add_stream_from_template(stream), int(skipped / 25 / stream.time_base)
        original.seek(shift, stream=stream)
        for packet in original.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, target
                copy.mux(packet)
    clip = read(tmp_path / "trimmed.mp4")
    assert numbers(clip.images) == list(range(skipped, 40))
    assert clip.timestamps == pytest.approx(np.arange(40 - skipped) / 25)


def test_opencv_stays_silent_and_nothing_happens_at_import(tmp_path):
    unreadable = cut(write_video(tmp_path / "a.mp4", textured(10)), 0.6)
    broken = cut(write_video(tmp_path / "b.mp4", textured(40), movflags="faststart"), 0.6)
    script = """
import os, sys
from easi3r import decoding, frames
from easi3r.config import FrameSettings
from easi3r.errors import InputError
assert "OPENCV_FFMPEG_LOGLEVEL" not in os.environ and "av" not in sys.modules
for find in (lambda: None, decoding.find_av):
    decoding.find_av = find
    for path in sys.argv[1:]:
        try:
            frames.read_frames(path, FrameSettings(), patch_size=16, trained_size=512)
        except InputError as error:
            print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "OPENCV_FFMPEG_LOGLEVEL"}
    command = [sys.executable, "-c", script, str(unreadable), str(broken)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 4


def test_frames_that_change_size_midway(tmp_path):
    first = write_video(tmp_path / "1.ts", numbered(3), encoder={"bf": "0"})
    second = write_video(tmp_path / "2.ts", numbered(3, 64, 64), encoder={"bf": "0"})
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(InputError, match=r"frame 3 .*64 x 64 px.*frame 0 is 64 x 48 px.*collection"):
        read(both)
    assert read(both, max_frames=3).num_frames == 3


def test_a_splice_of_transport_streams_is_no_damage(tmp_path, reader):
    part = write_video(tmp_path / "1.ts", numbered(6), codec="mpeg2video")
    both = tmp_path / "both.ts"
    both.write_bytes(2 * part.read_bytes())
    clip = read(both)
    assert numbers(clip.images) == 2 * [0, 1, 2, 3, 4, 5]
    assert np.all(np.diff(clip.timestamps) > 0.03)


# --- images


def picture(height=24, width=32):
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_folder_in_natural_order_without_other_files(tmp_path):
    for i in (10, 2, 1):
        Image.fromarray(np.full((16, 24, 3), i, np.uint8)).save(tmp_path / f"frame_{i}.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "sub").mkdir()
    Image.fromarray(picture()).save(tmp_path / "sub" / "frame_3.png")
    clip = read(tmp_path)
    assert clip.names == ("frame_1.png", "frame_2.png", "frame_10.png")
    assert clip.images[:, 0, 0, 0].tolist() == [1, 2, 10]
    assert clip.timestamps.tolist() == [0, 1, 2] and clip.source == str(tmp_path)
    clip = read(str(tmp_path), fps=10)  # sets the clock, drops nothing
    assert clip.timestamps == pytest.approx([0, 0.1, 0.2])


def test_list_keeps_its_order_and_single_file_is_one_frame(tmp_path):
    paths = [tmp_path / "b.png", tmp_path / "a.JPG"]
    Image.fromarray(picture()).save(paths[0])
    Image.fromarray(picture()).save(paths[1], format="jpeg")
    clip = read([str(paths[0]), paths[1]])
    assert clip.names == ("b.png", "a.JPG") and clip.source == str(tmp_path)
    assert read(paths[0]).names == ("b.png",) and read(paths[0]).source == str(paths[0])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, mode):
    """Against Pillow's own transposition of the three-channel image."""
    image = Image.fromarray(picture()).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    clip = read(tmp_path / "a.png")
    upright = image.convert("RGB")
    upright.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(upright))
    assert np.array_equal(clip.images[0], expected)
    assert clip.crops[0].original == ((24, 32) if orientation >= 5 else (32, 24))


def test_exif_orientation_of_a_jpeg(tmp_path):
    shown = np.zeros((24, 32, 3), np.uint8)
    shown[:8, :8] = 255  # top left when upright
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: turn clockwise to view
    Image.fromarray(np.rot90(shown)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert np.abs(read(tmp_path / "a.jpg").images[0].astype(int) - shown).max() < 40


def test_kinds_of_images(tmp_path):
    color = picture()
    alpha = np.dstack([color, np.arange(768, dtype=np.uint8).reshape(24, 32)])
    deep = RNG.integers(0, 65536, (24, 32, 4), dtype=np.uint16)
    rounded = np.round(deep / 257).astype(np.uint8)
    grey = np.repeat(color[..., :1], 3, axis=2)
    palette = Image.fromarray(color).quantize(16)
    see_through = tmp_path / "palette_alpha.png"
    palette.save(see_through, transparency=bytes(range(16)))

    def written(name, image, **options):
        Image.fromarray(image).save(tmp_path / name, **options)
        return tmp_path / name

    def deeply(name, image):
        assert cv2.imwrite(str(tmp_path / name), image)
        return tmp_path / name

    bgr = [2, 1, 0]
    cases = [
        (written("rgb.webp", color, lossless=True), color),
        (written("alpha.png", alpha), color),
        (written("grey.png", color[..., 0]), grey),
        (written("grey_alpha.png", alpha[..., [0, 3]]), grey),
        (written("bool.png", color[..., 0] > 100), np.repeat(np.where(color[..., :1] > 100, 255, 0), 3, axis=2)),
        (see_through, np.asarray(palette.convert("RGB"))),
        (deeply("deep_grey.png", deep[..., 0]), np.repeat(rounded[..., :1], 3, axis=2)),
        (deeply("deep_grey.tif", deep[..., 0]), np.repeat(rounded[..., :1], 3, axis=2)),
        (deeply("deep_grey.pgm", deep[..., 0]), np.repeat(rounded[..., :1], 3, axis=2)),
        (deeply("deep.png", deep[..., :3]), rounded[..., bgr]),
        (deeply("deep_alpha.png", deep), rounded[..., bgr]),
        (deeply("deep.tif", deep[..., :3]), rounded[..., bgr]),
        (deeply("deep.ppm", deep[..., :3]), rounded[..., bgr]),
    ]
    for path, expected in cases:
        assert np.array_equal(read(path).images[0], expected), path.name


def test_deep_image_is_turned_upright(tmp_path):
    deep = RNG.integers(0, 65536, (24, 32), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(deep).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read(tmp_path / "a.png").images[0, ..., 0], np.round(np.rot90(deep, 3) / 257))


def test_cmyk_is_converted_not_cut_to_three_channels(tmp_path):
    Image.new("RGB", (32, 24), (200, 30, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    assert np.abs(read(tmp_path / "a.jpg").images[0].astype(int) - (200, 30, 60)).max() < 8


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
def test_a_half_image_among_good_ones_is_named(tmp_path, suffix):
    for i in range(3):
        Image.fromarray(picture(240, 320)).save(tmp_path / f"{i}{suffix}")
    bad = tmp_path / f"1{suffix}"
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"1\{suffix} cannot be read as an image"):
        read(tmp_path)
    assert read(tmp_path, max_frames=1).num_frames == 1  # and nothing is read ahead


def test_values_that_are_no_colors(tmp_path):
    Image.fromarray(np.zeros((24, 32), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.zeros((24, 32), np.int32)).save(tmp_path / "long.tif")
    with pytest.raises(InputError, match=r"float\.tif holds floating-point values"):
        read(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"long\.tif holds 32-bit values"):
        read(tmp_path / "long.tif")


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(picture()).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(InputError, match=r"a\.png cannot be read as an image .*beyond the limit"):
        read(tmp_path / "a.png")


def test_images_of_unequal_size(tmp_path):
    for i, size in enumerate([(32, 24), (32, 24), (24, 32)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    with pytest.raises(InputError, match=r"2\.png .*is 24 x 32 px, but 0\.png is 32 x 24 px.*collection=True"):
        read(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6  # upright it has the size of the others
    Image.new("RGB", (24, 32)).save(tmp_path / "2.png", exif=exif)
    assert read(tmp_path).num_frames == 3


# --- what cannot be a clip


def test_paths_that_hold_no_clip(tmp_path):
    empty, texts = tmp_path / "empty", tmp_path / "texts"
    empty.mkdir()
    texts.mkdir()
    for name in ("notes.txt", "other.txt"):
        (texts / name).write_text("hello")
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "zero.png").touch()
    (tmp_path / "hello.png").write_text("hello")
    (tmp_path / "hello.mp4").write_text("hello")
    Image.new("RGB", (32, 24)).save(tmp_path / "good.png")
    cases = [
        (tmp_path / "absent.mp4", "absent.mp4 does not exist"),
        ([tmp_path / "absent.png"], "absent.png does not exist"),
        (empty, "empty is empty; expected images"),
        (texts, "texts holds no image, only notes.txt"),
        (texts / "notes.txt", "notes.txt is no image by its name"),
        (tmp_path / "zero.mp4", r"zero.mp4 is empty \(0 bytes\)"),
        (tmp_path / "zero.png", r"zero.png is empty \(0 bytes\)"),
        (tmp_path / "hello.png", "hello.png cannot be read as an image"),
        (tmp_path / "hello.mp4", "hello.mp4 cannot be opened as a video"),
        ([tmp_path / "good.png", tmp_path / "zero.mp4"], "zero.mp4 is empty"),
        ([tmp_path / "good.png", tmp_path / "hello.mp4"], "hello.mp4 is no image by its name"),
        ([tmp_path / "good.png", texts], "texts is a folder"),
        ([], "list of images is empty"),
        (None, "The source is a NoneType; expected a video file"),
        ([np.zeros((8, 8, 3), np.uint8)], "The source is a list; expected"),
    ]
    for source, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            read(source)
        assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 16, 16, 3), np.float32),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((2, 16, 16, 4), np.uint8),
        np.zeros((2, 3, 16, 16), np.uint8),
        np.zeros((0, 16, 16, 3), np.uint8),
    ],
)
def test_arrays_that_are_no_frames(array):
    with pytest.raises(InputError, match=r"array of frames is .*expected uint8 \[n, H, W, 3\]"):
        read(array)


def test_sound_alone_is_no_video(tmp_path, reader):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    with pytest.raises(InputError, match="cannot be opened as a video"):
        read(tmp_path / "a.mp4")


# --- selection


def chosen(n=30, clock=30.0, **options):
    """Indices of the frames that are left of n frames at ``clock`` Hz."""
    array = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 8, 8, 3))
    stream = decoding.array_stream(array, clock)
    return [int(frame.name.split()[1]) for frame in frames._select(stream, FrameSettings(**options), "clip")]


def test_selection_known_answers():
    assert chosen(6) == [0, 1, 2, 3, 4, 5]
    assert chosen(fps=10) == list(range(0, 30, 3))
    assert chosen(6, fps=30) == chosen(6, fps=1000) == chosen(6, fps=29.97)[:6] == list(range(6))
    assert chosen(9, clock=29.97, fps=30) == list(range(9))
    assert chosen(start=0.1, end=0.3) == [3, 4, 5, 6, 7, 8]
    assert chosen(start=0.1, fps=10, end=0.5) == [3, 6, 9, 12]
    assert chosen(start=0.11, fps=10, end=0.5) == [4, 7, 10, 13]  # counted from the first frame of the stretch
    assert chosen(fps=10, stride=2) == [0, 6, 12, 18, 24]
    assert chosen(start=0.5, fps=10, stride=2, max_frames=2) == [15, 21]
    assert chosen(max_frames=100) == list(range(30))


@pytest.mark.parametrize("fps", [0.7, 3.0, 12.5, 24.0, 60.0, 240.0])
def test_fps_against_the_slow_twin(fps):
    """Frame by frame over all multiples: who is the first to reach k / fps?"""
    for trial in range(20):
        times = np.cumsum(np.random.default_rng(trial).exponential(1 / 30, 60))
        stream = (SourceFrame(str(i), t, lambda: np.zeros(0)) for i, t in enumerate(times))
        kept = [int(frame.name) for frame in frames._thin(stream, fps)]
        slack = min(0.0015, 0.25 / fps)
        reached = [np.flatnonzero(times - times[0] + slack >= k / fps) for k in range(int(times[-1] * fps) + 2)]
        assert kept == sorted({int(indices[0]) for indices in reached if len(indices)})


def test_rounded_clocks_lose_no_frames():
    for rate in (24, 25, 29.97, 30, 50, 59.94, 60, 120, 240):
        times = np.round(np.arange(300) / rate, 3)  # as Matroska writes them
        for phase in range(3):
            stream = (SourceFrame("", t, lambda: np.zeros(0)) for t in times[phase:])
            assert len(list(frames._thin(stream, rate))) == 300 - phase


def test_nothing_is_read_beyond_the_last_frame():
    def endless():
        for i in range(1000):
            assert i <= 12
            yield SourceFrame(str(i), i / 10, lambda: np.zeros(0))

    assert len(list(frames._select(endless(), FrameSettings(stride=3, max_frames=5), "clip"))) == 5
    assert len(list(frames._select(endless(), FrameSettings(end=1.2), "clip"))) == 12


def test_nothing_left_says_why():
    array = np.zeros((4, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match="start is 10 s, but the last frame of array is at 3 s"):
        read(array, start=10.0)
    with pytest.raises(InputError, match=r"between start \(1.2 s\) and end \(1.8 s, exclusive\).*next one is at 2 s"):
        read(array, start=1.2, end=1.8)
    with pytest.raises(InputError, match=r"between start \(0 s\) and end \(0 s, exclusive\)"):
        read(array, end=0.0)


def test_array_frames():
    array = RNG.integers(0, 256, (5, 17, 30, 3), dtype=np.uint8)
    clip = read(array, start=0.1, fps=10)
    assert clip.names == ("frame 1", "frame 2", "frame 3", "frame 4") and clip.source == "array"
    assert clip.timestamps == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert np.array_equal(clip.images, array[1:, :16, 3:27])  # 30 -> 24 about the centre 15


# --- patch grid


@pytest.mark.parametrize(
    "size, options, resized, offset, cropped",
    [
        ((1280, 720), {}, (512, 288), (0, 0), (512, 288)),
        ((720, 1280), {}, (288, 512), (0, 0), (288, 512)),
        ((854, 480), {}, (512, 288), (0, 0), (512, 288)),
        ((640, 480), {}, (512, 384), (0, 0), (512, 384)),
        ((1000, 1000), {}, (512, 512), (0, 64), (512, 384)),
        ((2000, 1999), {}, (512, 512), (0, 64), (512, 384)),  # square once it is resized
        ((100, 67), {}, (512, 343), (0, 3), (512, 336)),
        ((1280, 720), {"image_size": 500}, (500, 281), (2, 4), (496, 272)),
        ((1280, 720), {"patch_size": 14, "image_size": 518}, (518, 291), (0, 5), (518, 280)),
        ((101, 67), {"patch_size": 7, "image_size": "native"}, (101, 67), (1, 2), (98, 63)),
        ((100, 100), {"image_size": "native"}, (100, 100), (2, 2), (96, 96)),
        ((100, 100), {"image_size": "native", "trained_size": 224}, (100, 100), (2, 2), (96, 96)),
        ((1280, 720), {"trained_size": 224}, (398, 224), (87, 0), (224, 224)),
        ((720, 1280), {"trained_size": 224, "image_size": 224}, (224, 398), (0, 87), (224, 224)),
        ((100, 50), {"trained_size": 224}, (448, 224), (112, 0), (224, 224)),
        ((1280, 720), {"trained_size": 224, "image_size": 512}, (512, 288), (0, 0), (512, 288)),
        ((1280, 720), {"image_size": 224}, (224, 126), (0, 7), (224, 112)),
    ],
)
def test_crop_known_answers(size, options, resized, offset, cropped):
    crop = plan_crop(size, **{"image_size": None, "patch_size": 16, "trained_size": 512, **options})
    assert (crop.original, crop.resized, crop.offset, crop.size) == (size, resized, offset, cropped)


def test_crop_against_the_published_rule():
    """The half-width arithmetic of the description, for even patches."""
    for width, height in RNG.integers(64, 4000, (500, 2)).tolist():
        for side, patch in ((512, 16), (384, 8), (256, 32)):
            scale = side / max(width, height)
            w, h = round(width * scale), round(height * scale)
            half_w, half_h = (2 * (w // 2) // patch) * patch / 2, (2 * (h // 2) // patch) * patch / 2
            if w == h:
                half_h = 3 * half_w / 4
            if half_h < patch / 2 or half_w < patch / 2:
                continue
            crop = plan_crop((width, height), None, patch_size=patch, trained_size=side)
            assert crop.offset == (w // 2 - half_w, h // 2 - half_h) and crop.size == (2 * half_w, 2 * half_h)


def test_crop_properties():
    for width, height in RNG.integers(20, 900, (300, 2)).tolist():
        for image_size in ("native", 100, 224, 513):
            for patch in (3, 7, 14, 16):
                try:
                    crop = plan_crop((width, height), image_size, patch_size=patch, trained_size=224)
                except InputError:
                    continue
                assert crop.size[0] % patch == crop.size[1] % patch == 0
                for start, kept, whole in zip(crop.offset, crop.size, crop.resized, strict=True):
                    assert start >= 0 and start + kept <= whole and abs(whole - kept - 2 * start) <= 2


@pytest.mark.parametrize("size, image_size", [((1000, 10), None), ((15, 400), "native"), ((1000, 1), 64)])
def test_less_than_one_patch(size, image_size):
    with pytest.raises(InputError, match="holds no whole patch of 16 x 16 px"):
        plan_crop(size, image_size, patch_size=16, trained_size=512)


@pytest.mark.parametrize(
    "size, options",
    [
        ((900, 600), {}),
        ((601, 905), {}),
        ((300, 181), {}),
        ((500, 500), {}),
        ((640, 481), {"trained_size": 224}),
        ((333, 251), {"image_size": "native"}),
    ],
)
def test_a_point_lands_where_the_crop_says(size, options):
    """The centroid of a bright blob, in source pixels and in network pixels."""
    width, height = size
    spot = 0.47 * width, 0.54 * height
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    blob = 255 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / (2 * 12**2))
    crop = plan_crop(size, **{"image_size": None, "patch_size": 16, "trained_size": 512, **options})
    image = apply_crop(np.repeat(blob[..., None], 3, axis=2).round().astype(np.uint8), crop)
    assert image.shape == (crop.size[1], crop.size[0], 3)
    weights = image[..., 0].astype(float)
    found = [float((weights * axis).sum() / weights.sum()) for axis in np.meshgrid(*map(np.arange, crop.size))]
    assert found == pytest.approx((crop.matrix() @ [*spot, 1])[:2].tolist(), abs=0.03)


def test_filters():
    """Lanczos where it shrinks, bicubic where it grows, nothing where the size is right."""
    image = picture(48, 64)
    for side, method in ((32, Image.Resampling.LANCZOS), (128, Image.Resampling.BICUBIC), (64, None)):
        crop = plan_crop((64, 48), side, patch_size=8, trained_size=512)
        expected = image if method is None else np.asarray(Image.fromarray(image).resize((side, side * 3 // 4), method))
        assert np.array_equal(apply_crop(image, crop), expected)


def test_real_sized_frames_end_to_end(tmp_path, reader):
    path = write_video(tmp_path / "a.mp4", textured(4, 360, 640), codec="mpeg4")
    clip = frames.read_frames(Path(path), FrameSettings(stride=2), patch_size=16, trained_size=128)
    assert clip.images.shape == (2, 64, 128, 3) and clip.names == ("frame 0", "frame 2")
    assert clip.crops[0].resized == (128, 72) and clip.crops[0].offset == (0, 4)
