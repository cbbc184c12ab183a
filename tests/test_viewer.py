"""What is shown is what the scene holds, within its budget; and the live viewer, in a browser where there is one."""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from chromium import open_page
from viewer_scenes import SQUARE, is_blue, is_red, make_scene, project, square_center

from easi3r.errors import InputError, MissingExtraError
from easi3r.viewer import live
from easi3r.viewer.shown import shown_points

# --- what is shown


def test_without_a_budget_every_point_of_the_scene_is_shown():
    scene = make_scene()
    shown = shown_points(scene, 10**6)
    assert shown.available == len(shown.points) == len(scene.points(edges=False).points)
    parts = [(shown.static, scene.points(keep="static", edges=False))]
    parts += [(shown.moving(i), scene.points([i], "dynamic", edges=False)) for i in range(scene.num_frames)]
    for rows, cloud in parts:
        np.testing.assert_allclose(shown.points[rows], cloud.points, atol=1e-6)
        np.testing.assert_array_equal(shown.colors[rows], cloud.colors)
        np.testing.assert_array_equal(shown.frame_index[rows], cloud.frame_index)
        np.testing.assert_array_equal(shown.score[rows], cloud.dynamic)


@pytest.mark.parametrize("budget", [1, 7, 100, 1000, 5000])
def test_the_budget_is_used_up_and_shared(budget):
    scene = make_scene()
    whole, shown = shown_points(scene, 10**6), shown_points(scene, budget)
    assert len(shown.points) == budget and shown.available == whole.available
    moving = budget - shown.starts[0]
    assert moving == min(whole.available - whole.starts[0], max(budget // 2, budget - int(whole.starts[0])))
    if budget >= 1000:  # spread evenly over the frames
        static_share = np.bincount(shown.frame_index[shown.static]) / np.bincount(whole.frame_index[whole.static])
        assert np.ptp(static_share) < 0.01
    known = {tuple(point) for point in whole.points.tolist()}
    assert all(tuple(point) in known for point in shown.points.tolist())
    assert len(np.unique(np.column_stack([shown.points, shown.frame_index]), axis=0)) == budget  # none twice
    again = shown_points(scene, budget)
    np.testing.assert_array_equal(shown.points, again.points)


def test_fewer_points_are_drawn_larger():
    scene = make_scene()
    assert np.median(shown_points(scene, 500).size) > 2 * np.median(shown_points(scene, 10**6).size)
    whole = shown_points(scene, 10**6)
    near, far = whole.size[whole.moving(0)].mean(), whole.size[whole.static].mean()
    assert near == pytest.approx(2 / 60, rel=1e-5) and far > near


def test_padding_depth_that_is_none_and_points_without_confidence_are_left_out():
    scene = make_scene(2)
    total = len(shown_points(scene, 10**6).points)
    scene.valid_mask[:, :4] = False
    scene.depth[:, -1] = np.nan
    scene.confidence[:, 10] = 1
    shown = shown_points(scene, 10**6)
    assert np.isfinite(shown.points).all() and len(shown.points) <= total - 2 * 64 * 5
    rows = project_rows(scene, shown)
    assert not np.isin(rows, [0, 1, 2, 3, 10, 47]).any() and np.isin([5, 9, 11, 40], rows).all()
    scene.confidence[:] = 1  # nothing is known of any of them: all are shown
    assert np.isin(10, project_rows(scene, shown_points(scene, 10**6)))


def project_rows(scene, shown):
    rows = [project(scene, frame, point)[1] for frame, point in zip(shown.frame_index, shown.points, strict=True)]
    return np.unique(np.rint(rows))


def test_colors_by_time_and_score_tell_what_differs():
    shown = shown_points(make_scene(), 10**6)
    time_colors, score_colors = shown.colored_by("time"), shown.colored_by("dynamic score")
    assert len(np.unique(time_colors, axis=0)) == 4
    assert time_colors[shown.moving(0)][0, 2] > time_colors[shown.moving(3)][0, 2]  # blue first
    assert score_colors[shown.static].mean() < 20 < 150 < score_colors[shown.moving(1)].mean()
    np.testing.assert_array_equal(shown.colored_by("time", shown.moving(2)), time_colors[shown.moving(2)])
    with pytest.raises(InputError, match="'speed'"):
        shown.colored_by("speed")


def test_the_confidence_rank_is_the_share_that_is_no_better():
    scene = make_scene()
    assert (shown_points(scene, 10**6).confidence_rank == 255).all()  # equal ones stay together
    scene.confidence[:] = np.random.default_rng(0).uniform(1.5, 9, scene.confidence.shape)
    ranks = shown_points(scene, 10**6).confidence_rank / 255
    np.testing.assert_allclose(np.quantile(ranks, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.01)


def test_an_impossible_budget_is_refused(fails_with):
    with fails_with(InputError, "max_points", "0"):
        shown_points(make_scene(1), 0)


def test_nothing_to_show_is_no_error():
    scene = make_scene(2)
    shown = shown_points(dataclasses.replace(scene, valid_mask=np.zeros_like(scene.valid_mask)), 100)
    assert shown.starts.tolist() == [0, 0, 0] and shown.summary == "0 of 0 points"


def test_saved_scenes_are_shown_without_torch(tmp_path):
    make_scene(2).save(tmp_path / "scene")
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from easi3r import Scene; from easi3r.viewer import live, player, video\n"
        f"scene = Scene.load({str(tmp_path / 'scene')!r})\n"
        f"player.write_player(scene, {str(tmp_path / 'page.html')!r})\n"
        f"video.write_scene_video(scene, {str(tmp_path / 'scene.mp4')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").stat().st_size > 10_000 and (tmp_path / "scene.mp4").stat().st_size > 500


# --- live


@pytest.fixture
def viewer():
    pytest.importorskip("viser")
    with live.Viewer(make_scene(), port=0) as viewer:
        yield viewer


def visible(viewer):
    return [i for i, node in enumerate(viewer._moving) if node.visible]


def test_the_viewer_answers_at_its_address_on_this_machine_alone(viewer, capfd):
    assert viewer.server.get_host() == "127.0.0.1"
    assert viewer.address == f"http://localhost:{viewer.port}"
    assert viewer.ssh_command == f"ssh -L {viewer.port}:localhost:{viewer.port} {socket.gethostname()}"
    with urllib.request.urlopen(f"http://127.0.0.1:{viewer.port}", timeout=10) as answer:
        assert answer.status == 200
    viewer.close()
    viewer.close()  # again is no error
    viewer.wait()  # and there is nothing left to wait for
    assert capfd.readouterr().out == ""


def test_the_slider_shows_one_time_step_with_its_camera(viewer):
    assert visible(viewer) == [0]
    viewer._time.value = 2
    wait_until(lambda: visible(viewer) == [2])
    viewer.show_frame(-1)
    assert visible(viewer) == [3] and viewer._time.value == 3
    viewer._show_cameras.value = "current"
    wait_until(lambda: [i for i, frustum in enumerate(viewer._frusta) if frustum.visible] == [3])
    viewer._show_moving.value = False
    wait_until(lambda: visible(viewer) == [])
    assert viewer._static.visible


def test_playing_goes_round(viewer):
    viewer._speed.value = 60
    viewer._playing.value = True
    seen = set()
    wait_until(lambda: seen.add(tuple(visible(viewer))) or seen >= {(0,), (1,), (2,), (3,)})
    viewer._playing.value = False


def test_colour_and_confidence_reach_every_time_step(viewer):
    before = len(viewer._moving[2].points)
    viewer._color_by.value = "dynamic score"
    wait_until(lambda: viewer._moving[0].colors.mean() > 150)
    viewer.show_frame(2)
    assert viewer._moving[2].colors.mean() > 150 and len(viewer._moving[2].points) == before
    viewer.shown.confidence_rank[viewer.shown.moving(1)] = 100
    viewer._least_rank.value = 50
    wait_until(lambda: 1 in viewer._outdated)
    viewer.show_frame(1)
    assert len(viewer._moving[1].points) == 0 and len(viewer._static.points) > 0


def wait_until(true):
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_frame_can_be_viewed():
    pytest.importorskip("viser")
    with live.Viewer(make_scene(1), port=0) as viewer:
        assert visible(viewer) == [0]
        viewer.show_frame(1)
        assert visible(viewer) == [0]


def test_a_browser_shows_the_moving_object_where_it_is_at_two_times(tmp_path):
    pytest.importorskip("viser")
    scene = make_scene(step_back=0.0)
    with live.Viewer(scene, port=0) as viewer, open_page(viewer.address, tmp_path, 320, 240) as page:
        viewer._show_cameras.value = "none"
        deadline = time.monotonic() + 60
        while not viewer.server.get_clients():
            assert time.monotonic() < deadline, "the page never connected"
            page.evaluate("1")
            time.sleep(0.2)
        (client,) = viewer.server.get_clients().values()
        for frame in (0, 3):
            viewer.show_frame(frame)
            picture = np.zeros((192, 256, 3))
            while not is_blue(picture[20, 128]):  # until the wall has reached the page
                assert time.monotonic() < deadline, "the wall never appeared"
                picture = client.get_render(
                    192, 256, wxyz=(1.0, 0.0, 0.0, 0.0), position=(0.0, 0.0, 0.0), fov=float(viewer._fov[0])
                )[..., :3]
            x, y = (project(scene, frame, square_center(frame)) + 0.5) * 4 - 0.5
            found = np.argwhere(is_red(picture)).mean(axis=0)[::-1]
            np.testing.assert_allclose(found, (x, y), atol=4)
            assert np.abs(picture[round(y), round(x)].astype(int) - SQUARE).max() < 30


def test_without_viser_it_is_said_how_to_get_it(monkeypatch, fails_with):
    monkeypatch.setitem(sys.modules, "viser", None)
    with fails_with(MissingExtraError, "pip install 'easi3r[viewer]'"):
        live.Viewer(make_scene(1))


@pytest.mark.parametrize(("address", "part"), [(("192.0.2.1", 8080), "192.0.2.1"), (("127.0.0.1", 70000), "70000")])
def test_an_address_that_is_not_ours_is_refused(address, part, fails_with):
    pytest.importorskip("viser")
    with fails_with(InputError, part):
        live.Viewer(make_scene(1), host=address[0], port=address[1])
