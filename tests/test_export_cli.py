"""``easi3r export``: what is written and said, and what is refused."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from small_inputs import listing, run_cli
from test_bad_input import assert_one_sentence
from test_export import world_scene
from test_scene import make_motion

from easi3r.export import FORMATS, ply


@pytest.fixture
def saved(tmp_path):
    return world_scene(2).save(tmp_path / "saved")


def test_several_formats_become_folders_of_the_result(saved, capfd):
    assert run_cli("export", saved, "--to", "tum,ply", "--to", "npz,tum") == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == "" and len(lines) == 3
    for name, line in zip(("tum", "ply", "npz"), lines, strict=True):
        assert line == f"wrote {saved / name}: {FORMATS[name].summary}"
        assert (saved / name / "scene.json").is_file()


def test_flags_reach_the_export(saved, tmp_path, capfd):
    where = tmp_path / "where"
    arguments = ["export", saved, "--to", "npz", "-o", where, "--keep", "static", "--max-points", "70"]
    assert run_cli(*arguments, "--min-confidence", "2.5", "--quiet") == 0
    assert capfd.readouterr() == ("", "")
    with np.load(where / "npz" / "scene.npz") as arrays:
        assert len(arrays["points"]) == 70 and not arrays["dynamic"].any()
    assert run_cli(*arguments, "--min-confidence", "3.5") == 1
    assert "--overwrite" in capfd.readouterr().err
    assert run_cli(*arguments, "--min-confidence", "3.5", "--overwrite") == 0
    with np.load(where / "npz" / "scene.npz") as arrays:
        assert len(arrays["points"]) == 0  # all are of confidence 3


def test_how_many_points_are_left_out_is_said(saved, capfd):
    assert run_cli("export", saved, "--to", "ply", "--max-points", "70") == 0
    count = len(world_scene(2).points(edges=False).points)
    assert capfd.readouterr().err == f"easi3r: 70 of {count} points are exported; max_points sets how many\n"


def test_a_format_that_fails_is_named_and_the_others_are_kept(saved, tmp_path, capfd, monkeypatch):
    def write(scene, folder, options):
        (folder / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ply, "write", write)
    where = tmp_path / "where"
    arguments = ["export", saved, "--to", "ply,colmap,tum", "-o", where, "--original-images"]
    assert run_cli(*arguments) == 1
    out, err = capfd.readouterr()
    assert [line.split(": ")[0] for line in out.splitlines()] == [f"wrote {where / 'tum'}"]
    full, gone = err.splitlines()
    assert_one_sentence(full, "easi3r: ply was not exported:", "No space left on device", where / "ply")
    assert_one_sentence(gone, "easi3r: colmap was not exported:", "array", "original_images")
    assert listing(where) == ["tum", "tum/scene.json", "tum/trajectory.txt"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--to", "colmapp"], ["unknown format 'colmapp'", "did you mean 'colmap'?", "nerfstudio"]),
        (["--to", "ply,"], ["unknown format ''"]),
        ([], ["--to"]),
        (["--to", "ply", "--max-points", "0"], ["--max-points", "'0'"]),
        (["--to", "ply", "--max-points", "many"], ["--max-points", "'many'"]),
        (["--to", "ply", "--min-confidence", "high"], ["--min-confidence", "'high'"]),
        (["--to", "ply", "--keep", "moving"], ["--keep", "'moving'", "dynamic"]),
        (["--to", "ply", "--keeps", "all"], ["--keeps", "--keep"]),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, words, saved, capfd):
    before = listing(saved)
    assert run_cli("export", saved, *arguments) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert [word for word in words if word not in error] == []
    assert listing(saved) == before


def test_what_is_no_saved_scene_is_refused(tmp_path, capfd):
    make_motion().save(tmp_path / "motion")
    for path, words in ((tmp_path / "nothing", ["no saved result"]), (tmp_path / "motion", ["motion", "scene"])):
        assert run_cli("export", path, "--to", "ply") == 1
        assert_one_sentence(capfd.readouterr().err.rstrip("\n"), path, *words)
    assert run_cli("export", tmp_path / "motion", "--to", "ply", "--min-confidence", "nan") == 1
    assert_one_sentence(capfd.readouterr().err.rstrip("\n"), "min_confidence", "nan")
