"""The self-contained page: what it holds is the scene, nothing comes from outside, and a browser shows it."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re

import numpy as np
import pytest
from chromium import open_page
from PIL import Image
from viewer_scenes import is_blue, is_red, make_scene, project, square_center

from easi3r.viewer.player import POINT, player_page, quantisation_box, write_player


def read_page(page):
    """The JSON header and the records of the points."""
    header, points = (
        re.search(f'<script type="[a-z/]+" id="{name}">(.*?)</script>', page, re.DOTALL)[1]
        for name in ("scene", "points")
    )
    return json.loads(header), np.frombuffer(base64.b64decode(points), dtype=POINT)


def test_the_page_holds_the_points_of_the_scene():
    scene = make_scene()
    header, records = read_page(player_page(scene))
    step = np.array(header["step"])
    found = np.array(header["low"]) + records["position"] * step
    static, starts = header["starts"][0], header["starts"]
    assert header["count"] == len(records) == starts[-1]
    for keep, frames, rows in [("static", None, slice(0, static))] + [
        ("dynamic", [i], slice(starts[i], starts[i + 1])) for i in range(scene.num_frames)
    ]:
        cloud = scene.points(frames, keep, edges=False)
        assert len(cloud.points) == rows.stop - rows.start > 0
        assert (np.abs(found[rows] - cloud.points) <= step / 2 + 1e-6).all()
        np.testing.assert_array_equal(records["color"][rows], cloud.colors)
        np.testing.assert_array_equal(records["time"][rows], np.rint(cloud.frame_index * 85))
    np.testing.assert_array_equal(records["score"] == 255, np.arange(len(records)) >= static)
    np.testing.assert_allclose(np.reshape(header["cameraToWorld"], (-1, 4, 4)), scene.camera_to_world)
    np.testing.assert_allclose(np.reshape(header["intrinsics"], (-1, 3, 3)), scene.intrinsics)
    np.testing.assert_allclose(header["seconds"], scene.timestamps)
    for text, image in zip(header["images"], scene.images, strict=True):
        thumbnail = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
        assert thumbnail.shape == image.shape and np.abs(thumbnail[:8].astype(int) - image[:8]).max() < 8


@pytest.mark.parametrize("count", [0, 1, 1000])
def test_the_grid_holds_all_points_and_is_fine(count):
    points = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32) * (1, 100, 0)
    low, step = quantisation_box(points)
    cells = np.rint((points - low) / step)
    assert ((cells >= 0) & (cells <= 65535)).all()
    assert (np.abs(low + cells * step - points) <= step / 2 + 1e-9).all()
    if count == 1000:
        np.testing.assert_allclose(step[:2], np.ptp(points, axis=0)[:2] / 65535)


def test_the_budget_is_kept_and_said():
    scene = make_scene()
    total = len(scene.points(edges=False).points)
    header, records = read_page(player_page(scene, max_points=500))
    assert len(records) == 500 and header["summary"] == f"500 of {total:,} points"
    assert len(read_page(player_page(scene))[1]) == total


def test_nothing_comes_from_outside_and_names_cannot_break_the_page():
    page = player_page(make_scene())
    rest = re.sub(r'(<script type="text/plain" id="points">).*?</script>', "", page, flags=re.DOTALL)
    header = read_page(page)[0]
    assert header["source"] == "a <b> & </script>.mp4"
    assert "<title>a &lt;b&gt; &amp; &lt;/script&gt;.mp4 - easi3r</title>" in page
    assert "http:" not in page and "https:" not in page
    assert not re.search(r"\b(src|href)=|@import|url\(|fetch\(|import\(|XMLHttpRequest|WebSocket", rest)
    assert rest.count("</script>") == 2 and "@@" not in rest


def test_one_frame_and_nothing_to_see(tmp_path):
    write_player(make_scene(1), tmp_path / "page.html")
    scene = make_scene(2)
    scene = dataclasses.replace(scene, valid_mask=np.zeros_like(scene.valid_mask))
    header, records = read_page(player_page(scene))
    assert header["starts"] == [0, 0, 0] and len(records) == 0


# --- in a browser

SCALE, CAMERA = 8, 3  # the window is 8 times the image, and looked through is the last camera, which sees the others


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Screenshots at the first and the last frame, from the same camera."""
    folder = tmp_path_factory.mktemp("page")
    address = write_player(make_scene(), folder / "page.html").as_uri()
    found = []
    with open_page(f"{address}#paused&panel=off&view={CAMERA}&frame=0", folder, 64 * SCALE, 48 * SCALE) as page:
        for frame in (0, 3):
            page.wait_for(f"document.readyState === 'complete' && textured >= 0 && (show({frame}), true)")
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
            found.append(page.screenshot())
        page.evaluate("($('showCameras').checked = false, draw())")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        found.append(page.screenshot())
        assert page.problems == []
    return found


def at(picture, pixel):
    x, y = np.rint((np.asarray(pixel) + 0.5) * SCALE - 0.5).astype(int)
    return picture[y, x]


def test_the_browser_shows_the_moving_object_where_it_is_at_two_times(pictures):
    scene = make_scene()
    first, last = (project(scene, CAMERA, square_center(i)) for i in (0, 3))
    assert is_red(at(pictures[0], first)) and not is_red(at(pictures[0], last))
    assert is_red(at(pictures[1], last)) and not is_red(at(pictures[1], first))
    found = np.argwhere(is_red(pictures[2])).mean(axis=0)[::-1]
    np.testing.assert_allclose(found, (last + 0.5) * SCALE - 0.5, atol=SCALE)


def test_the_browser_shows_the_wall_and_the_cameras(pictures):
    assert is_blue(at(pictures[1], (32, 6))) and is_blue(at(pictures[2], (32, 6)))
    scene = make_scene()
    header, _ = read_page(player_page(scene))
    drawn = (pictures[1].astype(int) != pictures[2]).any(-1)
    for frame in (1, 2):
        edge = np.array([-0.5, -0.5, 1]) @ np.linalg.inv(scene.intrinsics[frame]).T * header["frustumDepth"]
        for share in (0.5, 0.9):  # along the edge from the camera to its upper left corner
            point = scene.camera_to_world[frame, :3, 3] + share * edge
            x, y = np.rint((project(scene, CAMERA, point) + 0.5) * SCALE - 0.5).astype(int)
            assert drawn[y - 1 : y + 2, x - 1 : x + 2].any(), (frame, share)
    assert 0.001 < drawn.mean() < 0.2
