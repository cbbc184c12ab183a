"""The windows of a long clip as tasks: found by themselves, pickled, in any order, they make what one run makes."""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_inputs import QUICK, moving_square, random_model, random_vggt_model, write_images

from easi3r import Easi3R, Scene, Settings
from easi3r.batches import windows as tasks
from easi3r.batches.clips import find_clips
from easi3r.batches.messages import Order, Windows
from easi3r.batches.records import Record
from easi3r.batches.worker import Worker
from easi3r.inference import encode_frames
from easi3r.job import Job
from easi3r.piece_result import Earlier
from easi3r.pipeline import prepare
from easi3r.progress import silent

# 7 frames in three windows, which share 2 and 3; the second one takes a part of the first batch of the first
CUT = {**QUICK, "pieces.frames": 4, "pieces.overlap": 2, "window": 1, "batch_size": 3}
POSES = np.tile(np.eye(4), (7, 1, 1))
POSES[:, 0, 3] = 0.1 * np.arange(7)
ATTENTION = {"evidence": "attention"}  # quicker
START = {**ATTENTION, "align": "none"}
TIED = {
    "one lens": ("pairs", {}, (None, 0, 0)),
    "a lens per frame": ("pairs", {"focal": "per-frame", **START}, (None, None, None)),
    "a tripod": ("pairs", {"camera": "static", **ATTENTION}, (None, 0, 1)),
    "known poses": ("pairs", {"camera_to_world": POSES, **ATTENTION}, (None, 0, 1)),
    "poses as a start": ("pairs", {"camera_to_world": POSES, "known.poses_use": "init", **ATTENTION}, (None, 0, 0)),
    "instances": ("pairs", {"instances": True, "align": "none"}, (None, 0, 0)),
    "what moves": ("pairs", {"keep": "dynamic", **START}, (None, 0, 0)),
    "all at once": ("clip", ATTENTION, (None, None, None)),
    "tracks": ("clip", {"tracks": "grid:2", **ATTENTION}, (None, 0, 1)),
    "aligned": ("clip", {"align": "fast", **ATTENTION}, (None, 0, 0)),
}


@functools.cache
def model_of(kind: str) -> Easi3R:
    return random_model() if kind == "pairs" else random_vggt_model()


def passed_on(value: Any) -> Any:
    """As a task receives what another one returned: from bytes, and not to be written to."""
    received = pickle.loads(pickle.dumps(value))  # noqa: S301 (our own bytes)
    for part in vars(received).values() if isinstance(received, Earlier) else ():
        if part is not None:
            part.flags.writeable = False
    return received


def assert_same_scenes(one: Scene, other: Scene) -> None:
    for name in ("depth", "camera_to_world", "intrinsics", "confidence", "dynamic_score", "dynamic_mask"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True, err_msg=name)
    parts = [(one.attention.arrays(), other.attention.arrays())]
    for name in ("tracks", "instances"):
        assert (getattr(one, name) is None) == (getattr(other, name) is None)
        if getattr(one, name) is not None:
            parts.append((vars(getattr(one, name)), vars(getattr(other, name))))
    for ours, theirs in parts:
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            np.testing.assert_array_equal(values, theirs[name], strict=True, err_msg=name)
    assert (one.meta.keys(), one.meta["timings_s"].keys()) == (other.meta.keys(), other.meta["timings_s"].keys())
    for name in set(one.meta) - {"timings_s"}:
        assert repr(one.meta[name]) == repr(other.meta[name]), name


@pytest.mark.parametrize("tied", TIED)
def test_windows_found_by_themselves_make_the_same_scene(tied: str) -> None:
    kind, options, expected = TIED[tied]
    model = model_of(kind)
    clip = moving_square(7, *((140, 140) if tied == "tracks" else (70, 70) if kind == "clip" else (32, 48)))
    settings = Settings().with_options({**CUT, **options})
    whole = model.reconstruct(clip, config=settings)
    assert isinstance(whole, Scene) and [note["frames"] for note in whole.meta["pieces"]] == [[0, 4], [2, 6], [3, 7]]
    fresh = functools.partial(
        prepare, model.network, model.checkpoint, clip, settings, progress=silent, masks_only=False
    )
    job: Job = fresh().job
    cut = passed_on(job.plan(fresh().frames).cut)
    rests_on = tuple(job.rests_on(number) for number in range(3))
    assert rests_on == expected
    results: dict[int, bytes] = {}
    handed: dict[int | None, Earlier] = {None: Earlier()}
    seconds = []
    while len(results) < 3:  # of those that can be worked on, always the last
        number = max(k for k in range(3) if k not in results and rests_on[k] in handed)
        ready = fresh()
        earlier = passed_on(handed[rests_on[number]])
        found, handed[number] = ready.job.work_on_window(ready.frames, ready.given, cut, number, earlier)
        results[number] = pickle.dumps(found)
        seconds.append(ready.job.clock.seconds)
    assert next(iter(results)) == (2 if expected[2] is None else 0)
    ready = fresh()
    joined = ready.job.nothing_of(ready.frames)
    for number, piece in enumerate(cut.pieces):
        joined.write(pickle.loads(results[number]), piece, cut.shared(number))  # noqa: S301 (our own bytes)
    for more in seconds:
        ready.job.clock.add(more)
    assert_same_scenes(ready.finished(joined), whole)


def test_a_window_takes_what_the_one_before_found() -> None:
    """Nothing but the truth will do: with another lens the next window is another."""
    model, settings = model_of("pairs"), Settings().with_options(CUT)
    ready = prepare(model.network, model.checkpoint, moving_square(7), settings, silent, masks_only=False)
    cut = ready.job.plan(ready.frames).cut
    work = functools.partial(ready.job.work_on_window, ready.frames, ready.given, cut)
    _, handed = work(0, Earlier())
    assert handed.lens is not None
    other = Earlier(handed.lens * np.float32([[2], [2], [1]]), handed.camera_to_world)
    (one, _), (two, _) = work(1, handed), work(1, other)
    assert one.placed is not None and two.placed is not None
    np.testing.assert_array_equal(one.placed.cameras.intrinsics[2], handed.lens)
    assert (one.placed.cameras.depth != two.placed.cameras.depth).any()


@pytest.mark.parametrize("only", [range(7), range(2, 5), range(6, 7)])
def test_tokens_of_some_frames_come_from_the_same_batches(only: range) -> None:
    network, images, sizes = model_of("pairs").network, moving_square(7), []
    encode = network.encode
    try:
        network.encode = lambda seen: (sizes.append(len(seen)), encode(seen))[1]
        some = encode_frames(network, images, 2, silent, only=only)
    finally:
        del network.encode
    assert torch.equal(some, encode_frames(network, images, 2, silent)[only.start : only.stop])
    assert sizes == {7: [2, 2, 2, 1], 3: [2, 2], 1: [1]}[len(only)]


# --- as tasks of a batch


@pytest.fixture
def batch(tmp_path: Path) -> tuple[Worker, Any]:
    write_images(tmp_path / "in" / "walk", moving_square(7))
    for place in ("clips", "records"):
        (tmp_path / "out" / place).mkdir(parents=True)
    (clip,) = find_clips(tmp_path / "in", tmp_path / "out")
    settings = Settings().with_options({**CUT, **START, "image_size": 64})
    return Worker(Order(tmp_path / "out", "demo", settings, threads=1), "cpu"), clip


def all_windows(worker: Worker, clip: Any, windows: Windows) -> list[tasks.Part]:
    parts, handed = [], []
    for number, before in enumerate(windows.rests_on):
        part, hands_on = tasks.work_on_window(worker, clip, windows, number, None if before is None else handed[before])
        parts.append(pickle.loads(pickle.dumps(part)))  # noqa: S301 (our own bytes)
        handed.append(hands_on)
    return parts


def test_tasks_make_the_record_and_the_result_of_one_task(batch: tuple[Worker, Any]) -> None:
    worker, clip = batch
    alone = worker.finish(clip, worker.read(clip))
    kept = Scene.load(worker.ledger.result(clip.name))
    windows = tasks.open_clip(worker, clip)
    assert isinstance(windows, Windows) and windows.rests_on == (None, 0, 0)
    record = tasks.join_windows(worker, clip, windows, all_windows(worker, clip, windows))
    assert record.status == "done" and record == worker.ledger.read(clip.name)
    assert_same_scenes(Scene.load(worker.ledger.result(clip.name)), kept)
    vary = {"seconds", "memory_gib", "finished"}
    assert {k: v for k, v in vars(record).items() if k not in vary} == {
        k: v for k, v in vars(alone).items() if k not in vary
    }


def test_a_clip_of_one_piece_or_none_is_done_with_at_once(batch: tuple[Worker, Any]) -> None:
    worker, clip = batch
    (clip.path / "frame_3.png").write_bytes(b"")
    broken = tasks.open_clip(worker, clip)
    assert isinstance(broken, Record) and broken.status == "failed" and "is empty (0 bytes)" in str(broken.error)
    for number in range(3, 7):
        (clip.path / f"frame_{number}.png").unlink()
    short = tasks.open_clip(worker, clip)
    assert isinstance(short, Record) and (short.status, short.frames) == ("done", 3)


def test_a_window_that_fails_is_the_row_of_its_clip(batch: tuple[Worker, Any], monkeypatch: Any) -> None:
    worker, clip = batch
    windows = tasks.open_clip(worker, clip)
    assert isinstance(windows, Windows)
    work_on = Job.work_on

    def fail(self: Job, frames: Any, tokens: Any, given: Any, cut: Any, number: int, earlier: Any) -> Any:
        if number == 0:
            raise ValueError("something else")
        return work_on(self, frames, tokens, given, cut, number, earlier)

    monkeypatch.setattr(Job, "work_on", fail)
    record = tasks.join_windows(worker, clip, windows, all_windows(worker, clip, windows))
    assert record.status == "failed" and "ValueError (something else)" in str(record.error)
    assert "in fail" in str(record.traceback) and record == worker.ledger.read(clip.name)
    assert not worker.ledger.result(clip.name).exists()


def test_a_window_short_of_memory_lets_the_clip_be_done_in_less(batch: tuple[Worker, Any], monkeypatch: Any) -> None:
    worker, clip = batch
    windows = tasks.open_clip(worker, clip)
    assert isinstance(windows, Windows)

    def fail(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Job, "work_on", fail)
        parts = all_windows(worker, clip, windows)
    run, tried = tasks.run, []
    monkeypatch.setattr(tasks, "run", lambda *given, **more: (tried.append(given[3]), run(*given, **more))[1])
    record = tasks.join_windows(worker, clip, windows, parts)
    assert record.status == "done" and record.error is None and record.traceback is None
    assert [(settings.batch_size, settings.offload) for settings in tried] == [(1, True)]


def test_a_clip_that_changes_between_its_tasks_is_not_mixed(batch: tuple[Worker, Any]) -> None:
    worker, clip = batch
    windows = tasks.open_clip(worker, clip)
    assert isinstance(windows, Windows)
    parts = all_windows(worker, clip, windows)
    write_images(clip.path, moving_square(7, seed=1))
    late, _ = tasks.work_on_window(worker, clip, windows, 0, None)
    assert isinstance(late.found, tasks.Failure) and "was changed while it was worked on" in late.found.reason
    record = tasks.join_windows(worker, clip, windows, parts)
    assert record.status == "failed" and "was changed while it was worked on" in str(record.error)
