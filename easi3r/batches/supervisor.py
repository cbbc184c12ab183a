"""A batch from beginning to end: find the clips, leave out what is done, work on the rest, say what became of each."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from easi3r.batches.clips import OURS, Clip, content, find_clips, stamp
from easi3r.batches.local import LocalEngine
from easi3r.batches.lock import locked
from easi3r.batches.messages import Info, Order, Size, now
from easi3r.batches.options import BatchOptions
from easi3r.batches.records import Ledger, Record
from easi3r.batches.remaining import Remaining
from easi3r.batches.space import free_bytes, size_text
from easi3r.batches.summary import Summary
from easi3r.config import Settings, load_settings
from easi3r.errors import OutputError
from easi3r.storage import remove_stale

if TYPE_CHECKING:
    from easi3r.batches.cluster import RayEngine

    Engine = LocalEngine | RayEngine

logger = logging.getLogger("easi3r")
RESTRICTED = "non-commercial"


class BatchStopped(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the batch; whatever was finished is kept, and the same call goes on from there."""

    def __init__(self, number: int, summary: Summary) -> None:
        counts = summary.counts
        super().__init__(
            f"the batch was stopped by {signal.Signals(number).name} with {counts['done']} clips done, "
            f"{counts['failed']} failed and {counts['waiting']} to do; start it again to go on."
        )
        self.exit_code, self.summary = 128 + number, summary


def batch(
    folder: str | Path,
    out: str | Path,
    *,
    checkpoint: str | Path = "demo",
    config: Settings | str | Path | None = None,
    progress: bool = False,
    **options: Any,
) -> Summary:
    """Reconstruct every video and every folder of images below ``folder``; what is done already is not done again.

    out: gets ``clips/NAME`` (a saved Scene each), ``summary.json``, ``summary.csv``, ``index.html`` and ``records``.
    checkpoint: as for ``Easi3R.from_pretrained``; each process loads it once.
    config: Settings, or a YAML file of overrides.
    progress: log a line per clip with the time that is left.
    options: those of ``Easi3R.reconstruct``, and ``jobs``, ``threads_per_job``, ``retry_failed``, ``engine``
        ('local' or 'ray'), ``address`` (``easi3r.batches.options``).

    A clip that fails is a row of the summary with its reason.  Raises Easi3RError where no clip at all can be worked
    on, BatchStopped after SIGINT or SIGTERM.
    """
    mine, others = BatchOptions.taken_from(options)
    settings = config if isinstance(config, Settings) else Settings() if config is None else load_settings(config)
    settings = settings.with_options(others)
    source, target = Path(folder), Path(out).absolute()
    clips = find_clips(source, target)
    _make_output(target)
    with locked(target / OURS) as lock, _logging(progress):
        for place in (target, target / "clips", target / "records"):
            remove_stale(place)
        try:
            return _run(Summary(source, target, clips), mine, settings, str(checkpoint), lock)
        finally:
            for place in (target, target / "clips", target / "records"):
                remove_stale(place)


def _make_output(out: Path) -> None:
    """Raises OutputError for a folder that is something else, or cannot be made or written."""
    try:
        if out.exists() and not (out / OURS).exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"The output {out} exists and is not that of a batch; choose another name.")
        for place in ("clips", "records"):
            (out / place).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The output {out} cannot be written: {error.strerror}; choose another place.") from error


@contextlib.contextmanager
def _logging(progress: bool) -> Iterator[None]:
    """Lines about clips where they are wanted, warnings in any case."""
    before = logger.level
    logger.setLevel(logging.INFO if progress else logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def _run(summary: Summary, mine: BatchOptions, settings: Settings, checkpoint: str, lock: int) -> Summary:
    order = Order(summary.out, checkpoint, settings, mine.threads)
    engine = _engine(order, mine, lock)
    asked: list[int] = []  # signals
    try:
        with _signals(engine, asked):
            info = engine.begin()
            level = logging.WARNING if RESTRICTED in info.licence else logging.INFO
            logger.log(level, "weights: %s; licence: %s", checkpoint, info.licence)
            left = _what_is_left(summary, info, retry_failed=mine.retry_failed)
            summary.write(at_once=True)
            if left and not asked:
                sizes = _measure(engine, left)
                _forecast(summary.out, left, sizes)
                _work(engine, summary, info, left, sizes)
    finally:
        engine.close()
        if summary.begun:
            summary.write(at_once=True)
    if asked:
        raise BatchStopped(asked[0], summary)
    if summary.trouble is not None:
        raise summary.trouble
    return summary


def _engine(order: Order, mine: BatchOptions, lock: int) -> Engine:
    if mine.engine == "local":
        return LocalEngine(order, mine.jobs, order.settings.device, lock)
    from easi3r.batches.cluster import RayEngine

    return RayEngine(order, mine.jobs, order.settings.device, mine.address)


def _what_is_left(summary: Summary, info: Info, *, retry_failed: bool) -> list[Clip]:
    """The clips to work on; the records of the others go into the summary."""
    ledger, left = Ledger(summary.out), []
    orphans = _orphans(ledger, summary.clips, info.key)
    for clip in summary.clips:
        record = ledger.read(clip.name)
        if record is None and orphans:
            record = _adopt(ledger, clip, orphans)
        if record is None or not record.is_of(clip, info.key) or (record.status == "failed" and retry_failed):
            left.append(clip)
        else:
            summary.records[clip.name] = record
            summary.old.add(clip.name)
    if summary.old:
        logger.info("%d of %d clips were worked on before and have not changed", len(summary.old), len(summary.clips))
    return left


def _orphans(ledger: Ledger, clips: Sequence[Clip], key: str) -> dict[str, Record]:
    """Content -> record of clips that are done and no longer where they were."""
    gone = (ledger.read(name) for name in sorted(ledger.names() - {clip.name for clip in clips}))
    records = (record for record in gone if record and record.status == "done" and record.settings == key)
    return {record.content: record for record in records if record.content is not None}


def _adopt(ledger: Ledger, clip: Clip, orphans: dict[str, Record]) -> Record | None:
    """The record of the same clip under another name, which is then no orphan any more."""
    if ledger.result(clip.name).exists():
        return None
    try:
        orphan = orphans.pop(content(clip.path), None)
    except OSError:  # whoever works on it finds out why
        return None
    if orphan is None:
        return None
    logger.info("%s is %s under another name", clip.relative, orphan.clip)
    return ledger.adopt(clip, orphan)


def _measure(engine: Engine, clips: Sequence[Clip]) -> dict[str, Size]:
    return {event.clip.name: event.value for event in engine.run("measure", clips) if event.kind == "measured"}


def _forecast(out: Path, clips: Sequence[Clip], sizes: dict[str, Size]) -> None:
    """Say what the batch will need on the disk, and whether there is room: an estimate is no reason to refuse."""
    frames, needed = (sum(getattr(size, name) for size in sizes.values()) for name in ("frames", "disk_bytes"))
    free, count = free_bytes(out), len(clips)
    words = f"{count} clip{'s' * (count != 1)} of about {frames} frames need about {size_text(needed)} on disk"
    if needed > free:
        logger.warning("%s, but %s are free: the last clips will fail, unless room is made", words, size_text(free))
    else:
        logger.info("%s, of %s", words, size_text(free))


def _work(engine: Engine, summary: Summary, info: Info, clips: Sequence[Clip], sizes: dict[str, Size]) -> None:
    remaining = Remaining({clip.name: sizes[clip.name].frames if clip.name in sizes else 0 for clip in clips})
    for kind, clip, value in engine.run("work", clips):
        if kind == "begun":
            logger.info("begun: %s", clip.relative)
            continue
        record = value if kind == "ended" else _lost(summary.out, clip, info, value)
        summary.records[clip.name] = record
        remaining.finish(clip.name, record.frames if record.status == "done" else None)
        counts = summary.counts
        logger.log(
            logging.INFO if record.status == "done" else logging.WARNING,
            "%s: %s (%d of %d clips, %d failed%s)",
            clip.relative,
            f"{record.verdict}, {record.frames} frames in {record.seconds:.1f} s"
            if record.status == "done"
            else record.error,
            len(summary.clips) - counts["waiting"],
            len(summary.clips),
            counts["failed"],
            f", {remaining}" if str(remaining) else "",
        )
        summary.write()


def _lost(out: Path, clip: Clip, info: Info, sentence: str) -> Record:
    """The record of a clip whose worker could not write one."""
    try:
        seen = stamp(clip.path)
    except OSError:
        seen = None
    record = Record(clip.relative, clip.name, "failed", info.key, seen, error=sentence, finished=now())
    try:
        Ledger(out).write(record)
    except OutputError as error:  # it will be tried again at the next start, having no record
        logger.warning("%s", error)
    return record


@contextlib.contextmanager
def _signals(engine: Engine, asked: list[int]) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops after the current stage, the second at once.

    Only the main thread can be asked like this; elsewhere signals go their usual way.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            raise KeyboardInterrupt
        logger.warning("stopping after this stage; once more stops at once")
        engine.stop()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        if not asked:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
