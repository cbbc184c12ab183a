"""report.html: self-contained, the right pictures at the right places, and no name or value that breaks it."""

from __future__ import annotations

import base64
import dataclasses
import doctest
import re
import subprocess
import sys
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from easi3r import Motion, Scene
from easi3r.backbones.checkpoint import LICENCES, UNKNOWN_LICENCE
from easi3r.config import Settings
from easi3r.errors import OutputError
from easi3r.report import charts, markup, pictures, write_report
from easi3r.report.measurements import medians, share_moving, steps_of
from easi3r.report.page import page
from easi3r.structures import AttentionMaps
from easi3r.verdict import judge

VOID = {"meta", "img", "br", "hr", "input", "link"}
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"
RESTRICTED = "licence restricted"


def make_motion_values(num_frames=3, height=48, width=64, seed=0):
    rng = np.random.default_rng(seed)
    pixels = (num_frames, height, width)
    maps = [rng.random((num_frames, height // 16, width // 16), dtype=np.float32) for _ in range(5)]
    return {
        "images": rng.integers(0, 256, (*pixels, 3), dtype=np.uint8),
        "dynamic_score": rng.random(pixels, dtype=np.float32),
        "dynamic_mask": rng.random(pixels) < 0.3,
        "attention": AttentionMaps(*maps),
        "timestamps": np.arange(num_frames) / 4,
        "meta": {
            "source": "clips/walk.mp4",
            "names": [f"frame {i}" for i in range(num_frames)],
            "crops": [{"original": [96, 80], "resized": [64, 53], "offset": [0, 2], "size": [width, height]}]
            * num_frames,
            "settings": Settings().as_dict(),
            "seed": 0,
            "checkpoint": {"name": "demo", "sha256": "ab" * 32, "licence": "Apache-2.0"},
            "device": "cpu",
            "dtype": "float32",
            "versions": {"easi3r": "0.1.0", "numpy": "2.0"},
            "timings_s": {"frames": 0.5, "pass 1": 2.0},
            "pieces": [{"frames": [0, num_frames], "threshold": 0.5}],
        },
    }


def make_scene(num_frames=3, height=48, width=64, seed=0):
    rng = np.random.default_rng(seed + 1)
    pixels = (num_frames, height, width)
    poses = np.tile(np.eye(4, dtype=np.float32), (num_frames, 1, 1))
    poses[:, :3, :3] = Rotation.from_rotvec(np.deg2rad([0.0, 2, 0]) * np.arange(num_frames)[:, None]).as_matrix()
    poses[:, 0, 3] = 0.1 * np.arange(num_frames)
    scene = Scene(
        **make_motion_values(num_frames, height, width, seed),
        camera_to_world=poses,
        intrinsics=np.tile(np.diag([50.0, 50, 1]).astype(np.float32), (num_frames, 1, 1)),
        depth=rng.uniform(0.5, 9, pixels).astype(np.float32),
        confidence=rng.uniform(1, 9, pixels).astype(np.float32),
        valid_mask=np.ones(pixels, dtype=bool),
    )
    scene.meta["scale"] = "up to scale"
    scene.meta["quality"] = judge([], scene, scene.dynamic_mask)
    return scene


class Page(HTMLParser):
    """Everything a test asks of a page; parsing fails where tags do not close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text, self.drawings = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes), tuple(tag for tag, _ in self.open)))
        if "svg" in (name, *(tag for tag, _ in self.open)):
            self.drawings.append(dict(attributes))
        if name not in VOID:
            self.open.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert name not in VOID
        assert self.open.pop()[0] == name

    def handle_data(self, data):
        if self.open and self.open[-1][0] != "style":
            self.text.append((data, tuple(tag for tag, _ in self.open)))

    def words(self, *, folded=None):
        """The text; of what is folded alone, or of what is not."""
        return "\n".join(t for t, inside in self.text if folded is None or ("details" in inside) == folded)

    def all(self, name):
        return [attributes for tag, attributes, _ in self.elements if tag == name]

    def pictures(self, start):
        """RGB pictures whose description starts like this."""
        return [decode(img) for img in self.all("img") if img["alt"].startswith(start)]


def decode(img):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,([\w+/=]+)", img["src"]).groups()
    data = base64.b64decode(data, validate=True)
    assert data.startswith(b"\x89PNG" if kind == "png" else b"\xff\xd8")
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert found.shape == (int(img["height"]), int(img["width"]), 3)
    return found[..., ::-1].astype(int)


def check(result):
    """The page of a result, after what must be true of every page."""
    text = page(result)
    assert text.startswith("<!doctype html>\n<html") and text.count("</html>") == 1
    read = Page(text)
    for img in read.all("img"):
        decode(img)
        assert img["alt"]
    for _, attributes, _ in read.elements:
        assert not {"href", "srcset", "data", "action"} & attributes.keys()
        assert attributes.get("src", "data:image/").startswith("data:image/")
        assert not [name for name in attributes if name.startswith("on")]
    assert not {"script", "link", "iframe", "object", "base"} & {name for name, _, _ in read.elements}
    assert not re.search(r"url\(|@import", text) and len(read.all("h1")) == 1
    for attributes in read.drawings:
        for name, value in attributes.items():
            if name in ("x", "y", "cx", "cy", "r", "x1", "x2", "y1", "y2", "width", "height"):
                assert np.isfinite(float(value)), (name, value)
            if name == "d":
                assert re.fullmatch(r"([ML]-?[\d.]+ -?[\d.]+)*", value), value
                assert len(re.findall("[ML]", value)) <= charts.MOST_POINTS
    return read


def path_points(drawn):
    """[m, 2] of the d of a path without gaps."""
    return np.array([pair.split(" ") for pair in re.split("[ML]", drawn)[1:]], dtype=float)


# --- whole and harmless


def test_a_scene_has_every_section_and_no_address():
    scene = make_scene()
    read = check(scene)
    for heading in (
        "What was found",
        "attention",
        "Where the camera went",
        "Numbers",
        "How it was made",
        "read the files",
    ):
        assert heading in read.words()
    for known in ("walk.mp4", "ab" * 32, "Apache-2.0", "numpy 2.0", "pass 1", "96x80", "cut to 64x48 at 0, 2"):
        assert known in read.words()
    assert not re.search("https?:", page(scene)) and all(text in read.words() for text in scene.conventions.values())


def test_a_motion_shows_what_moves_and_no_cameras():
    read = check(Motion(**make_motion_values()))
    assert "Masks alone" in read.words() and "Where the camera went" not in read.words()
    assert len(read.pictures("dynamic score")) == 3 and not read.pictures("depth") and "Focal" not in read.words()


def test_a_result_of_which_nothing_else_is_known_has_a_page():
    read = check(dataclasses.replace(make_scene(), meta={}))
    assert "No verdict" in read.words() and "A clip from an array" in read.words()


def test_what_files_and_meta_say_is_shown_and_never_run():
    scene = make_scene()
    scene.meta["source"] = f"clips\\{EVIL}"
    scene.meta["names"] = [EVIL] * 3
    scene.meta["checkpoint"] = {"name": EVIL, "sha256": EVIL, "licence": EVIL}
    scene.meta["settings"]["flow"]["weights"] = scene.meta["settings"][EVIL] = EVIL
    scene.meta["timings_s"] = {EVIL: 1.0}
    scene.meta["versions"] = scene.meta[EVIL] = {EVIL: EVIL}
    scene.meta["quality"] |= {"verdict": EVIL, "reasons": [EVIL], "not_checked": [EVIL], EVIL: 1.0}
    scene.meta |= {"scale": EVIL, "device": EVIL}
    read = check(scene)  # no script, no handler, no image but ours
    assert read.words().count(EVIL) >= 12
    assert [img["alt"] for img in read.all("img")].count(f"frame 0: {EVIL}") == 2
    (policy,) = [m["content"] for m in read.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script" not in policy


def test_the_file_is_written_whole_and_replaced(tmp_path, monkeypatch):
    scene = make_scene()
    scene.meta["names"][0] = "not UTF-8: \udcff"
    path = write_report(scene, tmp_path)
    assert path == tmp_path / "report.html" and "not UTF-8: \\udcff" in path.read_text(encoding="utf-8")
    before = path.read_bytes()
    assert write_report(scene, tmp_path).read_bytes() == before  # nothing in it depends on when it is written
    monkeypatch.setattr("easi3r.report.page", lambda result: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(scene, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"] and path.read_bytes() == before


def test_a_folder_that_is_not_there_is_told(tmp_path, fails_with):
    with fails_with(OutputError, str(tmp_path / "no")):
        write_report(make_scene(), tmp_path / "no")


def test_the_report_needs_no_torch():
    program = "import sys, easi3r.report; print({'torch', 'roma', 'matplotlib'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


# --- pictures


def test_the_film_strip_shows_frames_spread_over_the_clip():
    motion = Motion(**make_motion_values(20))
    motion.images[:] = 12 * np.arange(20, dtype=np.uint8)[:, None, None, None]
    motion.dynamic_score[:] = np.arange(20)[:, None, None] / 19
    frames = [0, 3, 5, 8, 11, 14, 16, 19]
    read = check(motion)
    strip = [img for img in read.all("img") if re.match(r"frame \d", img["alt"])][:8]
    assert [img["alt"] for img in strip] == [f"frame {i}: frame {i}" for i in frames]
    np.testing.assert_allclose([decode(img).mean() for img in strip], [12 * i for i in frames], atol=2)
    brightness = [image.mean() for image in read.pictures("dynamic score")]
    assert len(brightness) == 8 and (np.diff(brightness) > 3).all()
    heads = [text for text, inside in read.text if inside[-3:] == ("thead", "tr", "th") and text.startswith("frame")]
    assert heads == [f"frame {i}" for i in frames]
    assert "4.75 s" in read.words()  # the last one's


@pytest.mark.parametrize(("num_frames", "shown"), [(1, 1), (2, 2), (8, 8), (9, 8), (500, 8)])
def test_sampled_frames_are_distinct_and_hold_both_ends(num_frames, shown):
    frames = pictures.sample(num_frames, 8)
    assert len(set(frames)) == shown and frames == sorted(frames) and (frames[0], frames[-1]) == (0, num_frames - 1)


def test_depth_is_bright_near_dark_far_and_grey_where_there_is_none():
    scene = make_scene(1)
    scene.depth[:, :, :32], scene.depth[:, :, 32:] = 1.0, 4.0
    scene.depth[:, :16, :16], scene.depth[:, :16, 48:] = np.nan, 0.0
    scene.valid_mask[:, 32:, :16] = False
    (depth,), (confidence,) = check(scene).pictures("depth"), check(scene).pictures("confidence")
    assert depth[24, 16].sum() > depth[24, 48].sum() + 150
    np.testing.assert_allclose(depth[24, 16], [253, 231, 37], atol=12)  # the bright end of viridis
    for grey in (depth[8, 8], depth[8, 56], depth[40, 8], confidence[40, 8]):
        np.testing.assert_allclose(grey, 128, atol=6)
    assert "far 4 to near 1, up to scale" in check(scene).words()


def test_movers_are_red_in_the_overlay_and_the_rest_is_pale():
    motion = Motion(**make_motion_values(1))
    motion.images[:] = 100
    motion.dynamic_mask[:] = False
    motion.dynamic_mask[:, 16:32, 16:32] = True
    (shown, again) = check(motion).pictures("dynamic mask")
    np.testing.assert_array_equal(shown, again)  # of the strip, and of the attention's figure
    assert shown[24, 24, 0] > shown[24, 24, 2] + 50
    assert np.ptp(shown[40, 48]) < 8


def test_attention_maps_are_shown_token_for_token():
    motion = Motion(**make_motion_values())
    read = check(motion)
    for name, values in motion.attention.arrays().items():
        shown = read.pictures(f"{name} of frame")
        assert len(shown) == 3
        for picture, expected in zip(shown, values, strict=True):
            np.testing.assert_array_equal(picture, pictures.colour(expected, 0, 1, pictures.MAGMA))  # PNG: exactly


def test_values_without_a_range_are_coloured_without_a_warning():
    values = np.array([[1.0, np.nan, np.inf]])
    np.testing.assert_array_equal(pictures.colour(values, np.nan, np.nan, pictures.MAGMA), np.full((1, 3, 3), 128))
    same = pictures.colour(values, 1.0, 1.0, pictures.MAGMA)
    assert (same[0, 0] < 10).all() and (same[0, 1:] == 128).all()


# --- what may be odd in a result


@pytest.mark.parametrize("num_frames", [1, 2])
def test_clips_of_a_frame_or_two(num_frames):
    read = check(make_scene(num_frames))
    assert f"{num_frames} frame{'s' * (num_frames > 1)} of 64x48" in read.words()
    assert len(read.pictures("depth")) == num_frames


def test_a_camera_at_rest_is_drawn_at_rest():
    scene = make_scene(6)
    scene.camera_to_world[:] = np.eye(4)
    scene.camera_to_world[:, :3, 3] += np.random.default_rng(0).normal(0, 1e-5, (6, 3))
    read = check(scene)
    for path in read.all("path")[:3]:
        assert np.ptp(path_points(path["d"]), axis=0).max() < 2  # of 300 pixels


@pytest.mark.parametrize(
    "broken", ["poses", "one pose", "depth", "confidence", "focal", "all masked", "no padding left"]
)
def test_what_is_not_finite_leaves_gaps(broken):
    scene = make_scene(7)
    if broken == "poses":
        scene.camera_to_world[:] = np.nan
    elif broken == "one pose":
        scene.camera_to_world[3] = np.nan
    elif broken == "depth":
        scene.depth[:3], scene.depth[3:5], scene.depth[5:] = np.nan, 0, np.inf
    elif broken == "confidence":
        scene.confidence[:] = np.nan
    elif broken == "focal":
        scene.intrinsics[2:4, 0, 0] = np.inf
    elif broken == "all masked":
        scene.dynamic_mask[:] = True
    else:
        scene.valid_mask[:] = False
    read = check(scene)
    words = read.words(folded=False).lower().replace("unknown", "")
    assert not re.search(r"\b(nan|inf)\b", words)
    if broken == "one pose":
        assert read.all("path")[0]["d"].count("M") == 2


def test_a_verdict_of_which_nothing_is_known():
    scene = make_scene()
    scene.meta["quality"] = {"verdict": "doubtful", "flow_residual_px": None, "path_largest_step_after_frame": None}
    read = check(scene)
    assert "Doubtful" in read.words() and "unknown" in read.words(folded=True)


def test_a_thousand_frames_stay_small():
    scene = make_scene(1000, 32, 48)
    assert len(page(scene).encode()) < 5e6
    check(scene)


def test_large_frames_of_noise_stay_small():
    assert len(page(make_scene(24, 288, 512)).encode()) < 2e6  # noise is what compresses least


# --- verdict, licence, settings


@pytest.mark.parametrize("verdict", ["good", "doubtful", "bad"])
def test_the_verdict_stands_first_with_its_reasons(verdict):
    scene = make_scene()
    scene.meta["quality"] |= {"verdict": verdict, "reasons": ["Because of this."], "not_checked": ["Not that."]}
    read = check(scene)
    assert read.all("div")[0]["class"] == f"verdict {verdict}"
    words = read.words()
    order = [words.index(part) for part in (verdict.capitalize(), "Because of this.", "Not that.", "What was found")]
    assert order == sorted(order)


def test_every_number_of_the_verdict_is_listed_with_its_limits():
    scene = make_scene()
    read = check(scene)
    numbers = [k for k, v in scene.meta["quality"].items() if v is None or isinstance(v, (int, float))]
    assert len(numbers) > 10 and all(name in read.words(folded=True) for name in numbers)
    assert "doubtful > 0.003; bad > 0.008" in read.words(folded=True) and "doubtful < 1" in read.words(folded=True)


@pytest.mark.parametrize("terms", [*LICENCES.values(), UNKNOWN_LICENCE, "cc-by-nc-4.0", "Noncommercial use only"])
def test_a_restricting_licence_is_seen_at_the_top(terms):
    scene = make_scene()
    scene.meta["checkpoint"]["licence"] = terms
    read = check(scene)
    assert RESTRICTED in [span.get("class") for span in read.all("span")]
    assert read.words().index(terms) < read.words().index("What was found")


@pytest.mark.parametrize("terms", ["Apache-2.0", "MIT", "CC BY 4.0", "Vincent's own"])
def test_a_free_licence_is_not_set_in_red(terms):
    scene = make_scene()
    scene.meta["checkpoint"]["licence"] = terms
    assert RESTRICTED not in [span.get("class") for span in check(scene).all("span")]


def test_settings_that_differ_come_first_and_the_others_are_folded():
    scene = make_scene()
    scene.meta["settings"] = Settings().with_options({"window": 3, "focal": 640.0}).as_dict()
    read = check(scene)
    open_words, folded = read.words(folded=False), read.words(folded=True)
    assert "pairs.window\n3 (default: 5)" in open_words and "alignment.focal\n640.0 (default: shared)" in open_words
    assert "pairs.stride" in folded and "pairs.stride" not in open_words and "pairs.window" not in folded
    assert "All as they are by default" in check(make_scene()).words(folded=False)


def test_pieces_and_what_else_is_known_are_told():
    scene = make_scene(30)
    scene.meta["pieces"] = [
        {"frames": [0, 20], "threshold": 0.25},
        {"frames": [10, 30], "threshold": None, "seam_residual": 0.031},
    ]
    scene.meta["plan"] = "needs about 3.2 GiB"
    words = check(scene).words()
    assert "frames 0 to 19" in words and "frames 10 to 29" in words and "off by 3.1% of the depth" in words
    assert "needs about 3.2 GiB" in words


# --- curves and the path


def test_numbers_of_frames():
    scene = make_scene(3)
    turns, shifts = steps_of(scene.camera_to_world)
    np.testing.assert_allclose(turns, 2, atol=1e-4)
    np.testing.assert_allclose(shifts, 0.1, atol=1e-6)
    scene.valid_mask[0, :, :32] = False
    scene.dynamic_mask[0, :, :32], scene.dynamic_mask[0, :, 32:] = True, False
    scene.dynamic_mask[0, 0, 32:48] = True
    assert share_moving(scene)[0] == pytest.approx(16 / (48 * 32))
    scene.depth[0, :, :32], scene.depth[0, :, 32:] = 7, 3
    assert medians(scene, scene.depth)[0] == 3  # padding does not count


def test_the_path_keeps_its_shape_in_all_views():
    places = np.array([[0, 0, 0], [2, 0, 0], [2, -1, 0], [2, -1, 4.0]])  # 2 right, 1 up, 4 forward
    poses = np.tile(np.eye(4), (4, 1, 1))
    poses[:, :3, 3] = places
    panels, step = charts.camera_path(poses, least=0.1)
    drawn = [path_points(panel.find(".//path").get("d")) for panel in panels]
    starts = [panel.find(".//circle[@class='start']") for panel in panels]
    unit = np.linalg.norm(drawn[0][1] - drawn[0][0]) / 2
    for points, start, columns, signs in zip(
        drawn, starts, [(0, 2), (2, 1), (0, 1)], [(1, -1), (1, 1), (1, 1)], strict=True
    ):
        expected = unit * np.array(signs) * (places - places[0])[:, columns]
        np.testing.assert_allclose(points - points[0], expected, atol=0.02)
        assert (points > 0).all() and (points < charts.PANEL).all()
        np.testing.assert_allclose([float(start.get("cx")), float(start.get("cy"))], points[0])
    lines = sorted({float(line.get("x1")) for line in panels[0].findall(".//line[@class='grid']")} - {0.0})
    np.testing.assert_allclose(np.diff(lines), step * unit, atol=0.05)
    ahead = panels[0].find(".//line[@class='direction']")  # forward is up, seen from above
    assert float(ahead.get("x1")) == float(ahead.get("x2")) and float(ahead.get("y2")) < float(ahead.get("y1")) - 10


def test_a_curve_is_drawn_to_scale_with_round_ticks():
    svg = charts.line_chart({"share": np.array([0.0, 10.0, 5.0])}, unit=" %")
    points = path_points(svg.find("path").get("d"))
    np.testing.assert_allclose(points[:, 0], [charts.LEFT, (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2, 390])
    np.testing.assert_allclose((points[0, 1] - points[:, 1]) / (points[0, 1] - points[1, 1]), [0, 1, 0.5], atol=1e-3)
    assert [text.text for text in svg.findall("text")][:3] == ["0 %", "5 %", "10 %"]


@pytest.mark.parametrize("values", [[3.0], [0.0, 0.0], [117.5] * 4, [-1e-9, 1e-9], [np.nan, 2, np.nan], [1e9, 2e9]])
def test_odd_curves_stay_within_their_chart(values):
    svg = charts.line_chart({"": np.array(values)})
    for point in path_points(svg.find("path").get("d")):
        assert 0 <= point[0] <= charts.WIDTH and charts.TOP - 1 <= point[1] <= charts.HEIGHT - charts.BOTTOM + 1
    assert 2 <= len(svg.findall("line")) <= 8


def test_a_curve_of_which_nothing_is_known_says_so():
    assert "Nothing is known" in charts.line_chart({"": np.full(4, np.nan)}).text
    assert "Nothing is known" in charts.line_chart({"": np.zeros(0)}).text


def test_long_curves_are_thinned_and_keep_every_jump():
    curve = np.random.default_rng(0).normal(size=5000)
    curve[[617, 4001]] = 99, -99
    curve[1000:1200] = np.nan
    chosen = charts.telling(curve)
    assert len(chosen) <= charts.MOST_POINTS and chosen == sorted(chosen) and {617, 4001} <= {*chosen}
    assert np.isnan(curve[chosen]).any()  # the gap is seen


@pytest.mark.parametrize("module", [charts, markup, pictures])
def test_examples(module):
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted
