"""``easi3r show``: a page and videos from a saved scene, and what is refused."""

import imageio.v3 as iio
import pytest
from viewer_scenes import make_scene

from easi3r import cli


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return str(make_scene().save(tmp_path_factory.mktemp("show") / "out"))


def test_a_page_and_both_videos_in_one_call(saved, tmp_path, capfd) -> None:
    files = {
        flag: tmp_path / name for flag, name in (("--html", "a.html"), ("--video", "b.mp4"), ("--overlay", "c.mp4"))
    }
    assert cli.main(["show", saved, *(str(word) for pair in files.items() for word in pair)]) == 0
    assert "a.html" in capfd.readouterr().out
    assert files["--html"].read_text("utf-8").lower().startswith("<!doctype html")
    for flag in ("--video", "--overlay"):
        assert iio.imread(files[flag]).ndim == 4


def test_what_cannot_be_shown_is_one_sentence(saved, tmp_path, capfd) -> None:
    assert cli.main(["show", str(tmp_path / "nothing")]) == 1
    assert cli.main(["show", saved, "--video", str(tmp_path / "a.gif")]) == 1
    assert cli.main(["show", saved, "--host", "no.such.host.invalid"]) == 1
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.startswith("easi3r: ") for line in lines)
    with pytest.raises(SystemExit) as usage:
        cli.main(["show", saved, "--orbit"])
    assert usage.value.code == 2
