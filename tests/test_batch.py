import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from batch_drills import FLAGS, arrays, rows, start_batch, temporaries, write_good
from small_inputs import listing, moving_square, run_cli, write_images, write_video

import easi3r
from easi3r.batches import supervisor
from easi3r.batches.clips import Clip, content, find_clips, result_name, stamp
from easi3r.batches.lock import locked
from easi3r.batches.messages import Event
from easi3r.batches.options import BatchOptions
from easi3r.batches.page import page
from easi3r.batches.records import Ledger, Record, settings_key
from easi3r.batches.remaining import Remaining
from easi3r.batches.size import count_frames, disk_bytes
from easi3r.batches.space import check_space
from easi3r.batches.summary import Summary
from easi3r.batches.worker import Worker
from easi3r.config import FrameSettings, Settings
from easi3r.errors import ConfigError, InputError, OutputError
from easi3r.storage import remove_stale, whole_file, whole_folder

OPTIONS = {"image_size": 64, "align": "none", "evidence": "attention"}


class InlineEngine:
    """One worker in this process, and what it was asked to work on."""

    worked: list[str] = []  # noqa: RUF012

    def __init__(self, order):
        self.order, self.stop_after = order, None

    def begin(self):
        self.worker = Worker(self.order, "cpu")
        return self.worker.info()

    def run(self, kind, clips):
        for clip in clips:
            if kind == "measure":
                yield Event("measured", clip, self.worker.measure(clip))
            else:
                self.worked.append(clip.relative)
                yield Event("begun", clip, None)
                yield Event("ended", clip, self.worker.finish(clip, self.worker.read(clip)))

    def stop(self):
        pass

    def close(self):
        pass


@pytest.fixture
def inline(monkeypatch):
    """Batches run in this process; yields the list of the clips that were worked on."""
    monkeypatch.setattr(supervisor, "_engine", lambda order, mine, lock: InlineEngine(order))
    monkeypatch.setattr(InlineEngine, "worked", worked := [])
    return worked


@pytest.fixture
def folder(tmp_path):
    """Three good clips and a broken one."""
    source = tmp_path / "in"
    write_images(source / "walk 10", moving_square(2, seed=1))
    write_images(source / "walk 9", moving_square(3, seed=2))
    write_video(source / "b.avi", moving_square(3, seed=3))
    (source / "deep").mkdir()
    (source / "deep" / "a.mp4").write_bytes(b"no video")
    return source


# --- which clips there are


def test_clips_are_videos_and_folders_of_images_in_natural_order(tmp_path):
    for name in (
        "walk 10/1.png",
        "walk 9/1.JPG",
        "b/c/2.mov",
        "b/c/10.MP4",
        "b/c/note.txt",
        ".hidden/1.png",
        "both/1.png",
    ):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    for name in ("both/deep/1.mp4", "out/clips/x/images/1.png", "earlier/images/1.png", "b/.a.mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in" / "earlier" / "scene.json").touch()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in", target_is_directory=True)
    found = find_clips(tmp_path / "in", tmp_path / "in" / "out")
    assert [clip.relative for clip in found] == [
        "b/c/2.mov",
        "b/c/10.MP4",
        "both",
        "both/deep/1.mp4",
        "walk 9",
        "walk 10",
    ]
    assert [clip.name for clip in found][:3] == ["b+c+2.mov", "b+c+10.MP4", "both"]


def test_the_folder_itself_may_be_a_clip(tmp_path):
    write_images(tmp_path / "photos", moving_square(1))
    (clip,) = find_clips(tmp_path / "photos", tmp_path / "out")
    assert (clip.relative, clip.name, clip.path) == (".", "photos+", tmp_path / "photos")


def test_folders_without_clips_are_refused_in_one_sentence(tmp_path, fails_with):
    (tmp_path / "empty").mkdir()
    with fails_with(InputError, "holds no video"):
        find_clips(tmp_path / "empty", tmp_path / "out")
    with fails_with(InputError, "is no folder"):
        find_clips(tmp_path / "nothing", tmp_path / "out")
    with fails_with(InputError, "is the folder of the clips itself"):
        find_clips(tmp_path / "empty", tmp_path / "empty")


def test_names_of_results_are_unique_and_safe():
    names = [
        "a/b",
        "a+b",
        "a%2Bb",
        "a\nb",
        "a'b",
        'a"b',
        "ä/ö",
        "x" * 300,
        "x" * 301,
        os.fsdecode(b"\xff"),
        "a;b",
        "~",
        "a b",
    ]
    results = [result_name(Path(name), Path("in")) for name in names]
    assert len(set(results)) == len(names)
    for result in results:
        assert len(os.fsencode(result)) <= 200 and not set(result) & set("/\n'\"\0;<>&\\")
    assert results[0] == "a+b" and results[6] == "ä+ö" and results[-1] == "a b"


def test_a_clip_is_known_by_its_content_and_watched_by_its_stamp(tmp_path):
    one, two = (write_images(tmp_path / name, moving_square(2)) for name in ("one", "two"))
    assert content(one) == content(two) and stamp(one) != stamp(two)
    before = stamp(one)
    file = one / "frame_0.png"
    status, data = file.stat(), file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # the same size, the same time
    assert stamp(one) != before and content(one) != content(two)
    file.write_bytes(data)
    (one / "frame_0.png").rename(one / "frame_9.png")  # another order
    assert content(one) != content(two)
    video = write_video(tmp_path / "a.avi", moving_square(2))
    shutil.copy(video, tmp_path / "b.AVI")
    assert content(video) == content(tmp_path / "b.AVI")


def test_the_key_knows_what_decides_a_result_and_nothing_else(tmp_path):
    key = settings_key(Settings(), "weights")
    assert key == settings_key(Settings(device="cpu", memory=3.0, batch_size=2, offload=True), "weights")
    intrinsics = tmp_path / "k.txt"
    changed = [{"fps": 3}, {"seed": 1}, {"align": "none"}, {"intrinsics": np.eye(3)}, {"intrinsics": 2 * np.eye(3)}]
    keys = [settings_key(Settings().with_options(options), "weights") for options in changed]
    for text in ("100", "200"):
        intrinsics.write_text(text)
        keys.append(settings_key(Settings().with_options({"intrinsics": str(intrinsics)}), "weights"))
    assert len({key, settings_key(Settings(), "others"), *keys}) == 9


def test_frames_are_counted_as_they_are_read(tmp_path):
    from easi3r.frames import read_frames

    video = write_video(tmp_path / "a.avi", moving_square(12))
    images = write_images(tmp_path / "b", moving_square(7))
    for options in (
        {},
        {"stride": 5},
        {"max_frames": 3},
        {"fps": 2.5},
        {"start": 0.3, "end": 5},
        {"end": 0.5, "stride": 2},
        {"fps": 5, "start": 0.2, "end": 0.9},
    ):
        settings = FrameSettings(**options)
        for path in (video, images):
            found = read_frames(str(path), settings, patch_size=16, trained_size=64)
            assert count_frames(path, settings) == (found.num_frames, found.crops[0].original), (path, options)


# --- what a batch leaves


def test_a_batch_is_whole_and_says_what_became_of_each_clip(folder, tmp_path, inline):
    summary = easi3r.batch(folder, tmp_path / "out", **OPTIONS)
    assert summary.counts == {"done": 3, "failed": 1, "waiting": 0} and not temporaries(tmp_path / "out")
    assert inline == ["b.avi", "deep/a.mp4", "walk 9", "walk 10"]
    found = rows(tmp_path / "out")
    assert list(found) == inline
    assert "cannot be opened as a video" in found["deep/a.mp4"]["error"] and found["deep/a.mp4"]["output"] is None
    for name, frames in (("b.avi", 3), ("walk 9", 3), ("walk 10", 2)):
        row = found[name]
        assert row["frames"] == frames and row["seconds"] > 0 and 0.1 < row["memory_gib"] < 10 and row["error"] is None
        scene = easi3r.Scene.load(tmp_path / "out" / row["output"])
        assert scene.num_frames == frames and scene.meta["quality"]["verdict"] == row["verdict"]
        assert scene.meta["source"] == str(folder / name) and scene.meta["settings"]["device"] == "auto"
        assert (tmp_path / "out" / row["output"] / "report.html").is_file()
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        table = {row["clip"]: row for row in csv.DictReader(file)}
    assert {name: row["status"] for name, row in table.items()} == {name: row["status"] for name, row in found.items()}
    index = (tmp_path / "out" / "index.html").read_text()
    assert index.count("data:image/jpeg") == 3 and 'href="clips/walk%2010/report.html"' in index
    assert "1 failed" in index and "http" not in index.replace("http-equiv", "")


def test_a_result_is_that_of_a_single_run(folder, tmp_path, inline):
    easi3r.batch(folder, tmp_path / "out", **OPTIONS)
    scene = easi3r.Easi3R.from_pretrained("demo", device="cpu").reconstruct(str(folder / "walk 9"), **OPTIONS)
    scene.save(tmp_path / "single" / "clips" / "walk 9")
    many = {name: data for name, data in arrays(tmp_path / "out").items() if name.startswith("clips/walk 9/")}
    assert many == arrays(tmp_path / "single")


def test_a_second_run_works_on_nothing_but_what_changed(folder, tmp_path, inline):
    out = tmp_path / "out"
    easi3r.batch(folder, out, **OPTIONS)
    before = arrays(out)
    inline.clear()
    assert easi3r.batch(folder, out, memory=2, **OPTIONS).counts == {"done": 3, "failed": 1, "waiting": 0}
    assert inline == [] and arrays(out) == before

    os.utime(folder / "b.avi")  # touched, not changed
    write_images(folder / "walk 9", moving_square(3, seed=8))
    (folder / "walk 10").rename(folder / "moved")
    assert easi3r.batch(folder, out, **OPTIONS).counts == {"done": 3, "failed": 1, "waiting": 0}
    assert inline == ["walk 9"]
    assert list(rows(out)) == ["b.avi", "deep/a.mp4", "moved", "walk 9"]
    assert sorted(listing(out / "clips"))[0] == "b.avi" and (out / "clips" / "moved").is_dir()
    assert not (out / "clips" / "walk 10").exists()

    inline.clear()
    easi3r.batch(folder, out, **OPTIONS | {"max_frames": 1})  # other settings: everything anew, failures too
    assert len(inline) == 4 and {row["frames"] for row in rows(out).values()} == {1, None}


def test_failed_clips_are_tried_again_on_demand_or_when_they_change(folder, tmp_path, inline):
    out = tmp_path / "out"
    easi3r.batch(folder, out, **OPTIONS)
    inline.clear()
    assert easi3r.batch(folder, out, retry_failed=True, **OPTIONS).counts["failed"] == 1
    assert inline == ["deep/a.mp4"]
    (folder / "deep" / "a.mp4").unlink()
    write_video(folder / "deep" / "a.avi", moving_square(2))
    inline.clear()
    assert easi3r.batch(folder, out, **OPTIONS).counts == {"done": 4, "failed": 0, "waiting": 0}
    assert inline == ["deep/a.avi"]


def test_results_and_records_that_are_damaged_or_gone_are_made_again(folder, tmp_path, inline):
    out = tmp_path / "out"
    easi3r.batch(folder, out, **OPTIONS)
    before = arrays(out)
    shutil.rmtree(out / "clips" / "b.avi")
    (out / "records" / "walk 9.json").write_text('{"clip": ')
    (out / "records" / "walk 10.json").unlink()
    inline.clear()
    easi3r.batch(folder, out, **OPTIONS)
    assert inline == ["b.avi", "walk 9", "walk 10"] and arrays(out) == before


def test_what_killed_writers_left_is_removed_at_the_next_start(folder, tmp_path, inline):
    out = tmp_path / "out"
    easi3r.batch(folder, out, **OPTIONS)
    before = listing(out)
    for place, name in (("clips", ".walk 9.0123abcd.partial"), ("clips", ".b.avi.0123abcd.old")):
        (out / place / name / "depth").mkdir(parents=True)
    (out / "records" / ".walk 9.json.0123abcd.json").touch()
    (out / ".index.html.0123abcd.html").touch()
    easi3r.batch(folder, out, **OPTIONS)
    assert listing(out) == before


def test_stale_names_are_those_that_writers_make(tmp_path):
    kept = tmp_path / ".config.json"
    kept.touch()
    for name in ("a.json", "walk 1", "x" * 100, "b.tar.gz", "day 1+clip.avi"):
        with whole_file(tmp_path / name) as partial:
            partial.touch()
            remove_stale(tmp_path)
            assert not partial.exists()
            partial.touch()
        (tmp_path / name).unlink()
        with whole_folder(tmp_path / name, overwrite=False) as partial:
            (partial / "depth").mkdir()
            remove_stale(tmp_path)
            assert not partial.exists()
            partial.mkdir()
        (tmp_path / name).rmdir()
    assert listing(tmp_path) == [kept.name]


def test_a_clip_that_changes_while_it_is_read_is_a_row(folder, tmp_path, inline, monkeypatch):
    stamps = iter(range(10**6))
    monkeypatch.setattr("easi3r.batches.worker.stamp", lambda path: str(next(stamps)))
    assert easi3r.batch(folder, tmp_path / "out", **OPTIONS).counts["failed"] == 4
    assert "was changed while it was read" in rows(tmp_path / "out")["b.avi"]["error"]


def test_an_error_that_nobody_foresaw_is_a_row_with_its_traceback_in_the_record(folder, tmp_path, inline, monkeypatch):
    def fail(*arguments, **options):
        raise (MemoryError() if fail.memory else KeyError("surprise"))

    fail.memory = False
    monkeypatch.setattr("easi3r.batches.worker.run", fail)
    assert easi3r.batch(folder, tmp_path / "out", **OPTIONS).counts == {"done": 0, "failed": 4, "waiting": 0}
    assert "failed with KeyError" in rows(tmp_path / "out")["b.avi"]["error"]
    assert "Traceback" in json.loads((tmp_path / "out" / "records" / "b.avi.json").read_text())["traceback"]
    fail.memory = True
    easi3r.batch(folder, tmp_path / "out", retry_failed=True, **OPTIONS)
    assert "The memory does not suffice" in rows(tmp_path / "out")["b.avi"]["error"]


def test_too_little_memory_and_too_little_disk_are_rows(folder, tmp_path, inline, monkeypatch):
    easi3r.batch(folder, tmp_path / "out", memory=0.001, **OPTIONS)
    assert "The memory was limited to 0.001 GiB" in rows(tmp_path / "out")["b.avi"]["error"]
    monkeypatch.setattr("easi3r.batches.space.free_bytes", lambda out: 1 << 20)
    easi3r.batch(folder, tmp_path / "out", retry_failed=True, **OPTIONS)
    assert "which has 1.0 MiB left for results" in rows(tmp_path / "out")["b.avi"]["error"]


def test_a_record_that_cannot_be_written_fails_its_clip_and_not_the_batch(folder, tmp_path, inline, monkeypatch):
    write = Ledger.write

    def refuse(ledger, record):
        if record.name == "walk 9":
            raise OutputError("The disk is full.")
        write(ledger, record)

    monkeypatch.setattr(Ledger, "write", refuse)
    assert easi3r.batch(folder, tmp_path / "out", **OPTIONS).counts == {"done": 2, "failed": 2, "waiting": 0}
    assert rows(tmp_path / "out")["walk 9"]["error"] == "The disk is full."
    monkeypatch.undo()
    monkeypatch.setattr(supervisor, "_engine", lambda order, mine, lock: InlineEngine(order))
    InlineEngine.worked.clear()
    easi3r.batch(folder, tmp_path / "out", **OPTIONS)
    assert InlineEngine.worked == ["walk 9"]
    InlineEngine.worked.clear()


def test_the_forecast_is_more_than_the_result_and_not_by_much(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 288, 512, 3), dtype=np.uint8)
    bound, pixels = disk_bytes(8, 512, 288), 512 * 288
    floats = 8 * 3 * 4 * pixels
    assert floats + images.nbytes <= bound < 1.5 * (floats + images.nbytes)


def test_a_place_that_cannot_be_written_is_noticed_before_a_clip_is_computed(tmp_path, fails_with):
    check_space(tmp_path, 1)
    with fails_with(OutputError, "on the disk of", "retry_failed"):
        check_space(tmp_path, 1 << 60)
    with fails_with(OutputError, "cannot be written any more"):
        check_space(tmp_path / "gone", 1)


# --- outputs, locks, options


def test_an_output_of_something_else_is_refused(folder, tmp_path, inline, fails_with):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with fails_with(OutputError, "is not that of a batch"):
        easi3r.batch(folder, tmp_path / "mine")
    (tmp_path / "file").touch()
    with fails_with(OutputError, "is not that of a batch"):
        easi3r.batch(folder, tmp_path / "file")
    assert listing(tmp_path / "mine") == ["thesis.tex"]


def test_two_batches_on_one_output_refuse_each_other(folder, tmp_path, inline, fails_with):
    easi3r.batch(folder, tmp_path / "out", **OPTIONS)
    before = (tmp_path / "out" / "summary.json").read_bytes()
    with (
        locked(tmp_path / "out" / "batch.lock"),
        fails_with(OutputError, f"process {os.getpid()} on", "wait until it has ended"),
    ):
        easi3r.batch(folder, tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out" / "summary.json").read_bytes() == before
    easi3r.batch(folder, tmp_path / "out", **OPTIONS)


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path):
    program = f"""
import time
from pathlib import Path
from easi3r.batches.lock import locked
with locked(Path({str(tmp_path / "lock")!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match=f"process {holder.pid} on"), locked(tmp_path / "lock"):
            pass
        holder.kill()
    with locked(tmp_path / "lock"):
        pass


def test_a_wrong_checkpoint_ends_the_batch_and_keeps_the_summary(folder, tmp_path, inline):
    easi3r.batch(folder, tmp_path / "out", **OPTIONS)
    before = (tmp_path / "out" / "summary.json").read_bytes()
    with pytest.raises(easi3r.Easi3RError, match="There is no checkpoint"):
        easi3r.batch(folder, tmp_path / "out", checkpoint="no/such/place.pth", **OPTIONS)
    assert (tmp_path / "out" / "summary.json").read_bytes() == before


def test_options_of_a_batch(fails_with, monkeypatch):
    mine, others = BatchOptions.taken_from({"jobs": "2", "threads_per_job": "3", "fps": 2})
    assert (mine.jobs, mine.threads, mine.engine, others) == (2, 3, "local", {"fps": 2})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    assert [BatchOptions(jobs=jobs).threads for jobs in (1, 2, 3, 20)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert BatchOptions(jobs=2).threads == 5
    for options, parts in (
        ({"jobs": 0}, ["jobs is 0"]),
        ({"jobs": "many"}, ["jobs is 'many'", "whole number"]),
        ({"engine": "slurm"}, ["'local' or 'ray'"]),
        ({"address": "10.0.0.1:6379"}, ["engine='ray' alone"]),
    ):
        with fails_with(ConfigError, *parts):
            BatchOptions.taken_from(options)


def test_the_command_line(folder, tmp_path, inline, capsys):
    assert run_cli("batch", folder, "-o", tmp_path / "out", *FLAGS) == 1
    printed = capsys.readouterr()
    assert "3 clips done, 1 failed" in printed.out and "index.html" in printed.out
    assert "deep/a.mp4: " in printed.err and "(4 of 4 clips, 1 failed)" in printed.err
    shutil.rmtree(folder / "deep")
    assert run_cli("batch", folder, "-o", tmp_path / "out", *FLAGS, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert run_cli("batch", folder, "-o", tmp_path / "out", "--jobs", "none") == 2
    assert run_cli("batch", folder, "-o", tmp_path / "out", "--windoww", "3") == 2
    assert run_cli("batch", tmp_path / "nothing", "-o", tmp_path / "out") == 1
    assert "is no folder" in capsys.readouterr().err


# --- time left, the page


def test_the_time_left_goes_by_frames(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    remaining = Remaining({"short": 10, "long": 80, "unknown": 0, "broken": 30}, begin=0.0)
    assert remaining.seconds() is None and str(remaining) == ""
    clock[0] = 20.0
    remaining.finish("short", 10)  # two seconds a frame
    assert remaining.seconds() == 2 * (80 + 40 + 30)
    remaining.finish("broken", None)
    assert remaining.seconds() == 2 * (80 + 40) and str(remaining) == "about 4 min left"
    remaining.finish("long", 80)
    remaining.finish("unknown", 10)
    assert str(remaining) == ""


def test_names_cannot_escape_their_place_on_the_page():
    evil = '<script>alert("1")</script>&\'\n'
    clip = Clip(Path(evil), evil, result_name(Path(evil), Path("in")))
    failed = Record(evil, clip.name, "failed", "key", error=evil)
    done = Record(evil, clip.name, "done", "key", verdict="good", reasons=(evil,), picture="data:image/png;base64,")
    for record in (failed, done):
        text = page(Path(evil), [clip], {clip.name: record}, {"done": 1})
        assert "<script" not in text and "default-src 'none'" in text


def test_a_summary_that_cannot_be_written_is_said_once_and_the_batch_goes_on(tmp_path, caplog):
    summary = Summary(tmp_path, tmp_path / "gone", [])
    for _ in range(3):
        summary.write(at_once=True)
    assert isinstance(summary.trouble, OutputError) and len(caplog.records) == 1


# --- processes


def test_processes_finish_what_one_of_them_dies_of(tmp_path):
    """Two jobs; one is killed with a clip in hand, which is tried again; then SIGTERM, and the same call goes on."""
    for number in range(1, 7):
        write_good(tmp_path / "in", number)
    log, out = tmp_path / "log", tmp_path / "out"
    batch = start_batch(tmp_path / "in", out, "--jobs", 2, "--threads-per-job", 1, log=log)
    wait_for(lambda: "begun: " in log.read_text(), batch)
    worker = children(batch.pid)[0]
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: log.read_text().count("frames in") >= 3, batch)
    batch.send_signal(signal.SIGTERM)
    assert batch.wait(300) == 143
    assert "stopped by SIGTERM" in log.read_text() and "Traceback" not in log.read_text()
    assert not temporaries(out)
    counts = json.loads((out / "summary.json").read_text())
    assert counts["failed"] == 0 and counts["done"] >= 3
    done = start_batch(tmp_path / "in", out, log=log)
    assert done.wait(300) == 0, log.read_text()
    assert {row["status"] for row in rows(out).values()} == {"done"}


def children(process):
    """Process ids."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process)], capture_output=True, text=True, check=True)
    return [int(line) for line in listed.stdout.split()]


def wait_for(condition, process):
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, "the batch ended, or hangs"
        time.sleep(0.02)
