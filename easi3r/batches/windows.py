"""A long clip as many tasks: one that cuts it, one for each of its windows, and one that joins what they found.

Each reads the clip itself, so that nothing but results travels between them.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from easi3r.batches.clips import Clip
from easi3r.batches.memory import forget_peak, peak_gib
from easi3r.batches.messages import Windows
from easi3r.batches.records import Record
from easi3r.batches.worker import Reading, Worker, reason
from easi3r.clock import Clock
from easi3r.device import is_out_of_memory
from easi3r.errors import Easi3RError, InputError
from easi3r.piece_result import Earlier, PieceResult
from easi3r.pipeline import Prepared, make_job, prepare, run
from easi3r.plan import smaller
from easi3r.scene import Motion
from easi3r.structures import Frames

logger = logging.getLogger("easi3r")


@dataclass(frozen=True)
class Failure:
    """Why there is nothing of a window."""

    reason: str  # one sentence
    traceback: str | None = None  # of an error that nobody foresaw
    out_of_memory: bool = False


@dataclass(frozen=True)
class Part:
    """What became of a window."""

    found: PieceResult | Failure
    seconds: float
    memory_gib: float
    gpu_memory_gib: float | None
    timings: Mapping[str, float] = field(default_factory=dict)  # of its stages


def open_clip(worker: Worker, clip: Clip) -> Record | Windows:
    """Where a clip is to be cut; one that is a single piece, or cannot be read, is done with at once."""
    reading = worker.read(clip)
    windows = cut_up(worker, reading)
    return worker.finish(clip, reading) if windows is None else windows


def cut_up(worker: Worker, reading: Reading) -> Windows | None:
    """None for a clip that is one piece, or that no plan can be made for."""
    if reading.frames is None:
        return None
    try:
        job = make_job(worker.model.network, worker.settings, worker.go_on, Clock(), masks_only=False)
        cut = job.plan(reading.frames).cut
    except Exception as error:  # whoever works on the clip as a whole meets it again, and records it
        logger.info("no plan can be made: %s", error)
        return None
    count = len(cut.pieces)
    return Windows(cut, tuple(job.rests_on(k) for k in range(count)), reading.content) if count > 1 else None


def work_on_window(
    worker: Worker, clip: Clip, windows: Windows, number: int, earlier: Earlier | None
) -> tuple[Part, Earlier | None]:
    """What is found of one window, and what it hands on: None if it failed.

    earlier: what the window that ``windows.rests_on`` names has handed on.
    """
    begin, device, clock, handed = time.perf_counter(), worker.model.network.device, {}, None
    forget_peak(device)
    found: PieceResult | Failure
    try:
        if windows.rests_on[number] is not None and earlier is None:
            raise Easi3RError("The window that this one rests on has failed.")
        ready = prepared(worker, clip, windows, taken(worker.read(clip)))
        found, handed = ready.job.work_on_window(ready.frames, ready.given, windows.cut, number, earlier or Earlier())
        clock = ready.job.clock.seconds
    except Exception as error:  # as in a clip of one piece: it is for the record
        expected = isinstance(error, Easi3RError)
        text = None if expected else "".join(traceback.format_exception(error))
        found = Failure(reason(error), text, is_out_of_memory(error))
    return Part(found, time.perf_counter() - begin, *peak_gib(device), clock), handed


def join_windows(worker: Worker, clip: Clip, windows: Windows, parts: Sequence[Part]) -> Record:
    """Judge and save the clip, and write its record.

    Where the memory of a window did not suffice, the clip is worked on once more as a whole, in less.
    """
    failures = [part.found for part in parts if isinstance(part.found, Failure)]
    in_less = any(failure.out_of_memory for failure in failures)

    def join(frames: Frames) -> Motion:
        if in_less:
            settings, model = smaller(windows.cut, worker.settings), worker.model
            return run(model.network, model.checkpoint, frames, settings, worker.go_on, masks_only=False)
        if failures:
            raise Easi3RError(failures[0].reason)
        ready = prepared(worker, clip, windows, reading)
        whole = ready.job.nothing_of(frames)
        for number, part in enumerate(parts):
            assert isinstance(part.found, PieceResult)
            whole.write(part.found, windows.cut.pieces[number], windows.cut.shared(number))
            ready.job.clock.add(part.timings)
        return ready.finished(whole)

    reading = worker.read(clip)
    record = worker.attempt(clip, reading, join)
    gpus = [share for share in (record.gpu_memory_gib, *(part.gpu_memory_gib for part in parts)) if share is not None]
    record = dataclasses.replace(
        record,
        seconds=round((record.seconds or 0.0) + sum(part.seconds for part in parts), 3),
        memory_gib=round(max(record.memory_gib or 0.0, *(part.memory_gib for part in parts)), 3),
        gpu_memory_gib=max(gpus, default=None),
    )
    if failures and record.error == failures[0].reason:
        record = dataclasses.replace(record, traceback=failures[0].traceback)
    return worker.keep(record)


def prepared(worker: Worker, clip: Clip, windows: Windows, reading: Reading) -> Prepared:
    """Raises InputError for a clip that is not the one that was cut."""
    if reading.content != windows.content:
        raise InputError(f"{clip.path} was changed while it was worked on; start again when it is whole.")
    model, frames = worker.model, taken(reading).frames
    return prepare(model.network, model.checkpoint, frames, worker.settings, worker.go_on, masks_only=False)


def taken(reading: Reading) -> Reading:
    """Raises what kept the clip from being read."""
    if reading.error is not None:
        raise reading.error
    return reading
