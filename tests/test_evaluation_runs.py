"""Runs of the evaluation: killed and gone on, failed sequences, other headers, tables, exit codes."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image
from small_inputs import write_checkpoint

from easi3r import Settings
from easi3r.errors import InputError, OutputError
from easi3r.frames import read_frames
from evaluation import evaluate, methods, results
from evaluation.datasets.sequence import Sequence
from evaluation.methods import AllStatic, Estimate, Kind
from evaluation.protocols import PROTOCOLS, Scores
from evaluation.results import Record, open_run, read_record, write_record, write_tables

ROOT = Path(__file__).parents[1]
LENGTHS = {"ant": 4, "bee": 5, "cat": 3, "dog": 4, "eel": 6}
BROKEN = "bee"
HEADER = {"protocol": {"name": "easi3r", "pooling": "frames"}, "seed": 0, "sequences": ["a"]}


class Bright:
    """What is bright moves; every call leaves a line, and may be told to take its time."""

    name = "bright"

    def __init__(self, log: Path, sleep_at: str = "", settings: object = None) -> None:
        self.log, self.sleep_at, self.settings = log, sleep_at, settings

    def __call__(self, images: tuple[Path, ...]) -> Estimate:
        self.write(f"begin {images[0].parent.name}")
        if images[0].parent.name == self.sleep_at:
            time.sleep(60)
        frames = read_frames(list(images), self.settings.frames, patch_size=16, trained_size=512)
        self.write(f"end {images[0].parent.name}")
        return Estimate(frames.crops, frames.images.mean(axis=-1) > 128)

    def write(self, line: str) -> None:
        with self.log.open("a") as file:
            file.write(line + "\n")


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_evaluation_runs import Bright
from evaluation import evaluate
from evaluation.methods import METHODS, Kind
log, sleep_at, *arguments = sys.argv[1:]
METHODS["bright"] = Kind(lambda settings, masks_only, model: Bright(Path(log), sleep_at, settings))
sys.exit(evaluate.main(arguments))
"""


@pytest.fixture(scope="module")
def davis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DAVIS's layout, 64 x 48 px; a mask of BROKEN is no image."""
    root, rng = tmp_path_factory.mktemp("davis"), np.random.default_rng(0)
    for name, length in LENGTHS.items():
        images, masks = (root / kind / "480p" / name for kind in ("JPEGImages", "Annotations"))
        images.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(length):
            mask = np.zeros((48, 64), np.uint8)
            mask[10:30, 5 * i : 5 * i + 20] = 1
            pixels = rng.integers(0, 100, (48, 64, 3)) + 150 * mask[..., None]
            pixels[:12] = 0  # some of it is not seen
            Image.fromarray(pixels.astype(np.uint8)).save(images / f"{i:05}.jpg", quality=95)
            palette = Image.fromarray(mask, mode="P")
            palette.putpalette([0, 0, 0, 128, 0, 0])
            palette.save(masks / f"{i:05}.png")
    (root / "Annotations" / "480p" / BROKEN / "00002.png").write_bytes(b"no image")
    return root


@pytest.fixture
def bright(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The method ``bright``, and where it leaves its lines."""
    log = tmp_path / "log"
    make = Kind(lambda settings, masks_only, model: Bright(log, settings=settings))
    monkeypatch.setitem(methods.METHODS, "bright", make)
    return log


def run(davis: Path, out: Path, *more: str) -> int:
    flags = ["davis", "--root", davis, "--variant", "all", "--method", "bright", "--set", "image_size=native"]
    return evaluate.main([str(flag) for flag in (*flags, "--out", out, *more)])


def tables(out: Path) -> dict[str, str]:
    return {kind: (out / f"results.{kind}").read_text() for kind in ("json", "md", "csv")}


# --- going on


def test_a_killed_run_goes_on_where_it_was(davis: Path, tmp_path: Path, bright: Path) -> None:
    log, out = tmp_path / "lines", tmp_path / "out"
    script = RUN.format(tests=str(Path(__file__).parent))
    flags = ["davis", "--root", str(davis), "--variant", "all", "--method", "bright", "--set", "image_size=native"]
    command = [sys.executable, "-c", script, str(log)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "dog", *flags, "--out", str(out)], env=environment, cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while "begin dog" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not list(out.glob("results.*")) and len(list((out / "sequences").glob("*.json"))) == 3
    (out / "sequences" / ".dog.0123abcd.json").write_text('{"half": ')  # as a kill in the middle of writing leaves it

    again = subprocess.run(
        [*command, "", *flags, "--out", str(out)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 1, again.stderr  # one sequence is broken
    lines = log.read_text().split("\n")[:-1]
    assert lines == ["begin ant", "end ant", "begin cat", "end cat", "begin dog"] + [
        f"{what} {name}" for name in ("dog", "eel") for what in ("begin", "end")
    ]
    assert run(davis, tmp_path / "at once") == 1
    assert tables(out) == tables(tmp_path / "at once")
    assert again.stdout.strip() == tables(out)["md"].strip()


def test_a_finished_run_is_not_computed_again(davis: Path, tmp_path: Path, bright: Path) -> None:
    assert run(davis, tmp_path / "out") == 1
    before, lines = tables(tmp_path / "out"), bright.read_text()
    (tmp_path / "out" / "results.md").unlink()
    assert run(davis, tmp_path / "out") == 1
    assert tables(tmp_path / "out") == before and bright.read_text() == lines


def test_failed_sequences_are_tried_again_when_asked(davis: Path, tmp_path: Path, bright: Path) -> None:
    out, mask = tmp_path / "out", davis / "Annotations" / "480p" / BROKEN / "00002.png"
    assert run(davis, out) == 1
    damaged, lines = mask.read_bytes(), bright.read_text()
    mask.write_bytes(mask.with_name("00001.png").read_bytes())
    try:
        assert run(davis, out) == 1 and bright.read_text() == lines
        assert run(davis, out, "--retry-failed") == 0
    finally:
        mask.write_bytes(damaged)
    assert bright.read_text() == f"{lines}begin {BROKEN}\nend {BROKEN}\n"
    assert "0 of 5 sequences" in tables(out)["md"]


OTHER_RUNS = {
    "protocol": (["--protocol", "davis"], ["protocol, name", '"easi3r" there', '"davis" here']),
    "seed": (["--set", "seed=3"], ["seed (0 there, 3 here)", "settings"]),
    "settings": (["--set", "pairs.window=2"], ["settings, pairs, window (5 there, 2 here)"]),
    "sequences": (["--sequences", "ant,dog"], ["whole_split", "sequences"]),
    "alignment": (["--depth-alignment", "none"], ["depth_alignment", '"scale" there']),
}


@pytest.mark.parametrize("case", OTHER_RUNS)
def test_a_folder_holds_one_run(
    case: str, davis: Path, tmp_path: Path, bright: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(davis, tmp_path / "out") == 1
    before, lines = tables(tmp_path / "out"), bright.read_text()
    capsys.readouterr()
    flags, parts = OTHER_RUNS[case]
    assert run(davis, tmp_path / "out", *flags) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and not [part for part in [*parts, "--out"] if part not in message], message
    assert tables(tmp_path / "out") == before and bright.read_text() == lines


def test_headers_that_lack_or_add_something(
    tmp_path: Path, fails_with: Callable[..., AbstractContextManager[None]]
) -> None:
    open_run(tmp_path, HEADER)
    open_run(tmp_path, dict(reversed(HEADER.items())))
    for other in ({**HEADER, "new": 1}, {name: value for name, value in HEADER.items() if name != "seed"}):
        with fails_with(InputError, "null", str(tmp_path)):
            open_run(tmp_path, other)


def test_the_reader_is_asked_for_the_protocols_frames() -> None:
    asked = []

    class Reader:
        name = "tum"

        def read(self, name: str, frames: slice) -> Sequence:
            asked.append((name, frames))
            raise InputError("That is all.")

    for protocol in ("easi3r", "monst3r"):
        record = evaluate.score_sequence(Reader(), "walking", lambda images: None, PROTOCOLS[protocol])
        assert record.reason == "That is all." and record.num_frames is None
    assert asked == [("walking", slice(0, None, 30)), ("walking", slice(0, 270, 3))]


# --- records


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    scores = Scores(np.array([0, 2]), np.array([0.1, 1 / 3]), np.array([1e-17, 1.0]), {"ATE": 0.1 + 0.2})
    for name in ("plain", "two words", "a/b\\c:d", "../up", ".hidden", "über", "%2F"):
        for record in (Record(name, 3, scores, seconds=1.5), Record(name, None, None, "lost", "Traceback\n ...")):
            write_record(tmp_path, record)
            found = read_record(tmp_path, name)
            assert results.dataclasses.replace(found, scores=None) == results.dataclasses.replace(record, scores=None)
            assert found.row() == record.row()
            assert (found.scores is None) == (record.scores is None)
    assert len(list((tmp_path / "sequences").iterdir())) == 7 and len(list(tmp_path.iterdir())) == 1
    assert found.scores is None and read_record(tmp_path, "absent") is None


def test_damaged_records_are_named(tmp_path: Path, fails_with: Callable[..., AbstractContextManager[None]]) -> None:
    write_record(tmp_path, Record("a", 1))
    path = tmp_path / "sequences" / "a.json"
    for text in ("", "[1]", '{"sequence": "a"}', path.read_text().replace('"reason"', '"other"'), "\udcff"):
        path.write_text(text, errors="surrogateescape")
        with fails_with(OutputError, str(path), "delete it"):
            read_record(tmp_path, "a")


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, fails_with: Callable[..., AbstractContextManager[None]]
) -> None:
    (tmp_path / "file").write_text("")
    with fails_with(OutputError, "file"):
        open_run(tmp_path / "file" / "out", HEADER)


# --- tables


def test_tables_say_how_and_over_how_many(davis: Path, tmp_path: Path, bright: Path) -> None:
    assert run(davis, tmp_path / "out") == 1
    text = tables(tmp_path / "out")
    result = json.loads(text["json"])
    assert [row["sequence"] for row in result["sequences"]] == list(LENGTHS)
    j = [row["scores"]["jaccard"] for row in result["sequences"] if row["scores"]]
    assert [len(values) for values in j] == [4, 3, 4, 6] and 0.5 < np.mean(j[0]) < 1
    assert np.isclose(result["mean"]["JM %"]["value"], 100 * np.mean(np.concatenate(j)))
    assert result["mean"]["JM %"]["count"] == 4
    for name in ("protocol", "split", "frames", "stride", "alignment", "checkpoint", "seed", "versions", "failures"):
        assert f"- {name}: {result['head'][name]}\n" in text["md"]
        assert f"# {name}: {result['head'][name]}\n" in text["csv"]
    assert "1 of 5 sequences" in result["head"]["failures"] and result["head"]["checkpoint"] == "none"
    assert "never met the real files" in text["md"] and "never met the real files" in text["csv"]
    rows = list(csv.reader(line for line in text["csv"].splitlines() if not line.startswith("#")))
    assert len({len(row) for row in rows}) == 1 and [row[0] for row in rows[1:6]] == list(LENGTHS)
    of = dict(zip(rows[0], rows[2], strict=True))
    assert of["JM %"] == "" and "00002.png" in of["failed because"]
    assert float(dict(zip(rows[0], rows[6], strict=True))["JM %"]) == result["mean"]["JM %"]["value"]
    assert dict(zip(rows[0], rows[7], strict=True))["JM %"] == "4"
    assert "| Easi3R, MonST3R weights |" in text["md"], "the published figures of this split and protocol"
    failed = json.loads((tmp_path / "out" / "sequences" / f"{BROKEN}.json").read_text())
    assert "Traceback" in failed["traceback"] and "\n" not in failed["reason"]
    assert "Traceback" not in "".join(text.values())


def test_part_of_a_split_is_not_compared_with_the_whole(davis: Path, tmp_path: Path, bright: Path) -> None:
    assert run(davis, tmp_path / "out", "--sequences", "dog,ant") == 0
    text = tables(tmp_path / "out")["md"]
    assert text.index("| ant |") < text.index("| dog |") and "weights |" not in text
    assert "all, 2 sequences of it" in text


def test_a_method_that_fails_everywhere(
    davis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Hopeless:
        name = "bright"

        def __call__(self, images: tuple[Path, ...]) -> Estimate:
            raise RuntimeError("out of\n  luck | and memory")

    monkeypatch.setitem(methods.METHODS, "bright", Kind(lambda *_: Hopeless()))
    assert run(davis, tmp_path / "out") == 1
    text = tables(tmp_path / "out")
    assert "5 of 5 sequences; the mean is over the other 0" in text["md"]
    assert text["md"].count("RuntimeError: out of luck \\| and memory |") == 4
    assert json.loads(text["json"])["mean"] == {}
    assert "5 of 5 sequences failed" in capsys.readouterr().err


def test_plots_of_a_run(davis: Path, tmp_path: Path, bright: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra plots, is not installed")
    assert run(davis, tmp_path / "out", "--plots") == 1
    pictures = sorted((tmp_path / "out" / "plots").iterdir())
    assert [path.name for path in pictures] == [f"{name}-masks.png" for name in LENGTHS if name != BROKEN]
    assert all(iio.imread(path).ndim == 3 for path in pictures)


def test_pictures_of_masks_and_poses(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra plots, is not installed")
    images = tuple(tmp_path / f"{i}.png" for i in range(3))
    for path in images:
        Image.new("RGB", (70, 53)).save(path)
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = range(3)
    clip = Sequence("a/b", images, np.arange(3.0), np.ones((3, 53, 70), bool), None, poses)
    estimate = AllStatic(Settings().with_options({"image_size": "native"}).frames)(images)
    evaluate.draw(tmp_path / "plots", clip, estimate)
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["a%2Fb-masks.png", "a%2Fb-trajectory.png"]


def test_weights_are_named_by_their_hash(davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_checkpoint(tmp_path / "tiny.pth")
    flags = ["davis", "--root", davis, "--variant", "all", "--sequences", "ant", "--set", "image_size=native"]
    flags += ["--out", tmp_path / "out", "--checkpoint", checkpoint]
    assert exit_code(*flags) == 0
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    head = json.loads(tables(tmp_path / "out")["json"])["head"]
    assert head["checkpoint"] == f"{checkpoint}, sha256 {digest}" and head["method"] == "easi3r"
    stored = json.loads((tmp_path / "out" / "run.json").read_text())
    assert stored["checkpoint"]["sha256"] == digest and stored["masks_only"], "DAVIS knows no cameras"
    capsys.readouterr()
    assert exit_code(*flags, "--method", "frame-difference") == 1
    assert "checkpoint" in capsys.readouterr().err
    assert exit_code(*flags, "--method", "flow-homography", "--out", tmp_path / "homography") == 0


def test_a_reader_that_knows_real_files_says_nothing(tmp_path: Path) -> None:
    header = {"dataset": "sintel", "variant": "final", "whole_split": True, "method": "m", "checkpoint": None}
    header |= {"seed": 0, "versions": {}, "seen_on_real_files": True}
    records = [Record("alley_1", 3, Scores(None, None, None, {"ATE": 0.25}))]
    text = write_tables(tmp_path, header, PROTOCOLS["monst3r"], records)
    assert "real files" not in text and "| alley_1 | 3 | 0.2500 |" in text


# --- the command line


def exit_code(*arguments: object) -> int:
    try:
        return evaluate.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code


def test_wrong_usage_is_exit_code_2(davis: Path, tmp_path: Path, bright: Path, capsys) -> None:
    flags = ["davis", "--root", davis, "--variant", "all", "--method", "bright", "--out", tmp_path / "out"]
    for more, part in [
        (["--protocol", "nobody"], "easi3r"),
        (["--variant", "2018"], "2016, 2017, all"),
        (["--sequences", "ant,dig"], "did you mean 'dog'"),
        (["--set", "seed"], "name=value"),
        (["--set", "sead=1"], "did you mean 'seed'"),
        (["--method", "nothing"], "all-static"),
        (["--depth-alignment", "shift"], "scale+shift"),
    ]:
        assert exit_code(*flags, *more) == 2, more
        assert part in capsys.readouterr().err
    assert exit_code("nothing", "--root", davis) == exit_code("davis") == 2
    assert not (tmp_path / "out").exists()


def test_work_that_cannot_begin_is_exit_code_1(davis: Path, tmp_path: Path, bright: Path, capsys) -> None:
    flags = ["davis", "--root", davis, "--variant", "all", "--method", "bright", "--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    for more in (
        ["--root", tmp_path / "empty"],
        ["--config", tmp_path / "absent.yaml"],
        ["--method", "easi3r", "--checkpoint", "absent.pth"],
    ):
        assert exit_code(*flags, *more) == 1, more
        assert capsys.readouterr().err.startswith("evaluation: ")


def test_check_says_what_is_missing(davis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.check(["davis", "--root", str(davis), "--variant", "all"]) == 0
    assert capsys.readouterr().out == "davis all: all is there\n"
    assert evaluate.check(["davis", "--root", str(tmp_path), "--variant", "2016"]) == 1
    *sentences, last = capsys.readouterr().out.splitlines()
    assert last == f"davis 2016: {len(sentences)} missing" and sentences


def test_the_module_knows_its_commands(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "evaluation", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    unknown = call("nothing")
    assert unknown.returncode == 2 and "davis" in unknown.stderr and "benchmark" in unknown.stderr
    assert call("check", "davis", "--root", str(tmp_path)).returncode == 1
    assert call("davis", "--root", str(tmp_path), "--protocol", "x").returncode == 2
