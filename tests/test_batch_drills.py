"""Long drills of ``easi3r batch``: many clips, kills, full disks, Ray, memory.  By hand: pytest -m slow -n 0 -s."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from batch_drills import (
    BROKEN,
    arrays,
    rows,
    run_batch,
    start_batch,
    temporaries,
    write_folder,
    write_good,
)
from small_inputs import moving_square, write_images, write_video

pytestmark = pytest.mark.slow

COUNT = int(os.environ.get("EASI3R_DRILL_CLIPS", "200"))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """With the clips, and ``one``: what an undisturbed batch makes of them."""
    folder = tmp_path_factory.mktemp("drill")
    write_folder(folder / "in", COUNT)
    begin = time.monotonic()
    code = run_batch(folder / "in", folder / "one", "--threads-per-job", 1, log=folder / "one.log")
    say(f"{COUNT} clips, one job: exit code {code}, {time.monotonic() - begin:.0f} s")
    assert code == 1
    return folder


def say(text):
    with Path(os.environ.get("EASI3R_DRILL_LOG", os.devnull)).open("a") as log:
        log.write(f"{text}\n")


def check_rows(out):
    found = rows(out)
    status = Counter(row["status"] for row in found.values())
    assert status == {"done": COUNT - COUNT // 10, "failed": COUNT // 10}
    reasons = {name: row["error"] for name, row in found.items() if row["status"] == "failed"}
    for name, text in reasons.items():
        way = re.sub(r" \d+(\.\w+)?$", "", Path(name).name)
        assert BROKEN[way] in text and text.endswith(".") and "\n" not in text, (name, text)
    assert not temporaries(out)
    return reasons


def test_every_good_clip_is_done_and_every_broken_one_has_its_reason(home):
    reasons = check_rows(home / "one")
    for name, text in sorted(reasons.items())[:20]:
        say(f"  {name}: {text}")


def test_two_jobs_make_the_same_arrays(home):
    begin = time.monotonic()
    code = run_batch(home / "in", home / "two", "--jobs", 2, "--threads-per-job", 1, log=home / "two.log")
    check_rows(home / "two")
    one, two = arrays(home / "one"), arrays(home / "two")
    assert code == 1 and one.keys() == two.keys()
    different = [name for name in one if one[name] != two[name]]
    say(f"two jobs: exit code {code}, {time.monotonic() - begin:.0f} s, {len(one)} files, {len(different)} differ")
    assert not different


def test_twenty_kills_lose_nothing_but_the_clip_in_progress(home):
    out, log, chance = home / "killed", home / "killed.log", random.Random(0)
    kills, progress = 0, []
    while kills < 20:
        batch = start_batch(home / "in", out, "--threads-per-job", 1, log=log)
        begun = log.read_text().count("begun: ") if log.exists() else 0
        goal = begun + chance.randint(0, max(1, COUNT // 25))
        while batch.poll() is None and log.read_text().count("begun: ") < goal:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.6))
        if batch.poll() is not None:
            break
        batch.send_signal(signal.SIGKILL)
        batch.wait()
        kills += 1
        progress.append(len(list((out / "records").glob("*.json"))) if out.exists() else 0)
    code = run_batch(home / "in", out, "--threads-per-job", 1, log=log)
    begun = Counter(re.findall(r"begun: (.*)", log.read_text()))
    again = sum(begun.values()) - COUNT
    say(f"{kills} kills -9, records after each {progress}; then exit code {code}; begun {sum(begun.values())} times")
    assert kills == 20 and code == 1
    check_rows(out)
    assert arrays(out) == arrays(home / "one")
    assert set(begun) == set(rows(out)) and 0 <= again <= kills  # at most the one in progress, each time


def descendants(process):
    """Process id -> command line, of all below one."""
    listed = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    table = [line.split(None, 2) for line in listed.splitlines()]
    found, parents = {}, {str(process)}
    while parents:
        below = {pid: args for pid, parent, args in table if parent in parents}
        found |= below
        parents = set(below)
    return {int(pid): args for pid, args in found.items()}


def test_ray_makes_the_same_and_survives_a_killed_worker(tmp_path):
    pytest.importorskip("ray")
    write_folder(tmp_path / "in", 10)
    assert run_batch(tmp_path / "in", tmp_path / "one", "--threads-per-job", 1) == 1
    log = tmp_path / "log"
    flags = ["--engine", "ray", "--threads-per-job", 1]
    batch = start_batch(tmp_path / "in", tmp_path / "ray", *flags, log=log)
    killed = []
    while batch.poll() is None:
        working = [pid for pid, args in descendants(batch.pid).items() if args.startswith("ray::_work")]
        if working and not killed and log.read_text().count("frames in") >= 2:
            os.kill(working[0], signal.SIGKILL)
            killed.append(len(working))
        time.sleep(0.02)
    found = Counter(row["status"] for row in rows(tmp_path / "ray").values())
    same = arrays(tmp_path / "one") == arrays(tmp_path / "ray")
    say(
        f"Ray: exit code {batch.returncode}, {dict(found)}, killed one of {killed} workers at work, same arrays: {same}"
    )
    assert batch.returncode == 1 and killed and same and found == {"done": 9, "failed": 1}
    assert not temporaries(tmp_path / "ray")


@contextlib.contextmanager
def small_disk(place, megabytes):
    """A file system of that size; skips where nobody may mount one."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(place)], check=False)
    if done.returncode:
        pytest.skip("a small tmpfs cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_costs_rows_and_nothing_else(tmp_path):
    for number in range(12):
        write_good(tmp_path / "in", number)
    with small_disk(tmp_path / "disk", 9) as disk:
        log = tmp_path / "log"
        batch = start_batch(tmp_path / "in", disk / "out", log=log)
        while batch.poll() is None and log.read_text().count("frames in") < 3:
            time.sleep(0.01)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free))  # by somebody else, to the last byte
        code = batch.wait()
        text = log.read_text()
        say(f"full disk: exit code {code}\n" + "\n".join(line for line in text.splitlines() if "begun" not in line))
        assert code == 1 and "Traceback" not in text and not temporaries(disk)
        (disk / "filler").unlink()
        code = run_batch(tmp_path / "in", disk / "out", log=log)
        found = Counter(row["status"] for row in rows(disk / "out").values())
        say(f"after room was made: exit code {code}, {dict(found)}")
        (tmp_path / "more").mkdir()
    assert found["done"] >= 3 and "waiting" not in found


def test_a_file_size_limit_costs_rows_and_nothing_else(tmp_path):
    for number in range(1, 5):
        write_good(tmp_path / "in", number)
    write_images(tmp_path / "in" / "large", moving_square(3, 192, 256))
    limit = 160_000  # bytes of a file: more than any of a small clip has, less than a depth map of the large one

    def restrict():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    log = tmp_path / "log"
    code = run_batch(tmp_path / "in", tmp_path / "out", "--image-size", "native", log=log, preexec_fn=restrict)
    say(f"file size limit: exit code {code}\n{log.read_text()}")
    assert code == 1 and "Traceback" not in log.read_text() and not temporaries(tmp_path / "out")
    found = rows(tmp_path / "out")
    assert Counter(row["status"] for row in found.values()) == {"done": 4, "failed": 1}
    assert "File too large" in found["large"]["error"] and not (tmp_path / "out" / "clips" / "large").exists()


def test_an_output_that_cannot_be_written_is_one_sentence(tmp_path):
    write_good(tmp_path / "in", 1)
    with small_disk(tmp_path / "disk", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        log = tmp_path / "log"
        code = run_batch(tmp_path / "in", disk / "out", log=log)
    say(f"read-only disk: exit code {code}: {log.read_text().strip()}")
    assert code == 1 and len(log.read_text().splitlines()) == 1 and "Read-only" in log.read_text()


def test_fifty_clips_need_the_memory_of_the_largest(tmp_path):
    for number in range(49):
        size = (4 + number % 5, 96, 128)
        write = write_video if number % 2 else write_images
        (tmp_path / "in").mkdir(exist_ok=True)
        write(tmp_path / "in" / (f"c{number}.avi" if number % 2 else f"c{number}"), moving_square(*size, seed=number))
    write_images(tmp_path / "in" / "c24 largest", moving_square(16, 192, 256))
    shutil.copytree(tmp_path / "in" / "c24 largest", tmp_path / "alone" / "c24 largest")
    flags = ["--image-size", "native"]
    assert run_batch(tmp_path / "alone", tmp_path / "alone out", *flags) == 0
    assert run_batch(tmp_path / "in", tmp_path / "out", *flags, log=tmp_path / "log") == 0
    (alone,) = [row["memory_gib"] for row in rows(tmp_path / "alone out").values()]
    all_of_them = {name: row["memory_gib"] for name, row in rows(tmp_path / "out").items()}
    small = [value for name, value in all_of_them.items() if "largest" not in name]
    say(
        f"50 clips: peak {max(all_of_them.values()):.3f} GiB, the largest alone {alone:.3f} GiB; the small ones first "
        f"{small[0]:.3f}, last {small[-1]:.3f} GiB"
    )
    assert max(all_of_them.values()) <= 1.1 * alone


def test_ray_makes_a_long_clip_in_windows_and_survives_a_killed_worker(tmp_path):
    """One clip, three windows, two workers: one that has a window in hand is killed, and its window is tried again."""
    pytest.importorskip("ray")
    write_images(tmp_path / "in" / "walk", moving_square(36))
    config = tmp_path / "pieces.yaml"
    config.write_text("pieces:\n  frames: 16\n  overlap: 6\n")
    flags = ["--threads-per-job", 1, "--config", config]
    assert run_batch(tmp_path / "in", tmp_path / "one", *flags) == 0
    log, seen, killed = tmp_path / "log", set(), []
    batch = start_batch(tmp_path / "in", tmp_path / "ray", *flags, "--engine", "ray", "--jobs", 2, log=log)
    while batch.poll() is None:
        working = [pid for pid, args in descendants(batch.pid).items() if args.startswith("ray::_window")]
        seen.update(working)
        if len(working) == 2 and not killed:  # the first window is done, the others are in the making
            os.kill(working[0], signal.SIGKILL)
            killed.append(working[0])
        time.sleep(0.02)
    pieces = json.loads((tmp_path / "ray" / "clips" / "walk" / "scene.json").read_text())["meta"]["pieces"]
    same = arrays(tmp_path / "one") == arrays(tmp_path / "ray")
    say(
        f"Ray: exit code {batch.returncode}, {len(pieces)} windows, of {len(seen)} processes at them killed "
        f"{len(killed)}, same arrays: {same}"
    )
    assert batch.returncode == 0 and len(pieces) == 3 and killed and same
    assert len(seen) > 1 and not temporaries(tmp_path / "ray")
