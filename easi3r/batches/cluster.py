"""The engine for many machines: every clip is a task of Ray, with its own resources and retries.

So is every window of a long clip: a first task says where it is cut, a last one joins what the windows' tasks found.

Ray schedules, restarts and reports; nothing of that is done here.  All nodes must see input and output under the same
paths, and have easi3r installed.
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from easi3r.batches.clips import Clip
from easi3r.batches.messages import Event, Info, Kind, Order, Size, Windows
from easi3r.errors import Easi3RError, InputError, MissingExtraError

if TYPE_CHECKING:
    from easi3r.batches.records import Record
    from easi3r.batches.windows import Part
    from easi3r.batches.worker import Worker
    from easi3r.piece_result import Earlier

RETRIES = 1  # of a task whose process or machine died
AHEAD = 2  # tasks that wait for each job, so that none is idle


class RayEngine:
    """Tasks on a Ray cluster: ``jobs`` clips at once if that is more than 1, else as many as there is room for."""

    def __init__(self, order: Order, jobs: int, device: str, address: str | None) -> None:
        """address: of a cluster; None: the one that runs on this machine, else a new one that ends with the batch."""
        self.order, self.jobs, self.device, self.address = order, jobs, device, address
        self.waiting: dict[Any, Clip] = {}  # reference of a running task -> clip
        self.windows: dict[Any, list[Any]] = {}  # reference of a task that joins windows -> references of these
        self.stopping = False
        self.ray = find_ray()

    def begin(self) -> Info:
        """Connect, and load the model once.  Raises Easi3RError if either fails."""
        self._connect()
        total = self.ray.cluster_resources()
        gpus = 0 if self.device == "cpu" else min(1.0, total.get("GPU", 0.0))
        if total.get("CPU", 0.0) < self.order.threads:
            raise InputError(
                f"The Ray cluster has {total.get('CPU', 0.0):g} CPUs, fewer than the {self.order.threads} threads of "
                "one job; choose fewer with threads_per_job."
            )
        needs = {"num_cpus": self.order.threads, "num_gpus": gpus, "max_retries": RETRIES}
        tasks = {"info": _info, "measure": _measure, "work": _work, "join": _join}
        self.remote = {name: self.ray.remote(**needs)(function) for name, function in tasks.items()}
        self.remote["window"] = self.ray.remote(**needs, num_returns=2)(_window)
        slots = max(1, int(total["CPU"] / self.order.threads), int(total.get("GPU", 0) if gpus else 0))
        self.at_once = self.jobs if self.jobs > 1 else AHEAD * slots
        self.common = secrets.token_hex(8), self.ray.put(self.order), self.device
        try:
            info: Info = self.ray.get(self.remote["info"].remote(*self.common))
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, Easi3RError):
                raise error.cause from error
            raise
        except self.ray.exceptions.RayError as error:
            raise Easi3RError(
                f"No worker of Ray could load the model ({_first_line(error)}); see Ray's log."
            ) from error
        return info

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self.ray.is_initialized():
            return
        before, place = signal.getsignal(signal.SIGTERM), {} if self.address else {"dashboard_host": "127.0.0.1"}
        try:
            self.ray.init(self.address, log_to_driver=False, logging_level=logging.ERROR, **place)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"Ray cannot be reached at {self.address or 'this machine'} ({_first_line(error)}); start it with "
                "'ray start --head', and give its address, such as 10.0.0.1:6379."
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # Ray puts its own in place, which ends the process at once

    def run(self, kind: Kind, clips: Sequence[Clip]) -> Iterator[Event]:
        """Events of all clips; after ``stop`` no more."""
        left = list(reversed(clips))
        while (left or self.waiting) and not self.stopping:
            while left and len(self.waiting) < self.at_once:
                clip = left.pop()
                self.waiting[self.remote[kind].remote(*self.common, clip)] = clip
                yield Event("begun", clip, None)
            ready, _ = self.ray.wait(list(self.waiting), num_returns=1, timeout=0.5)
            for reference in ready:
                event = self._event(kind, reference, self.waiting.pop(reference))
                self.windows.pop(reference, None)
                if isinstance(event.value, Windows):
                    self._spread(clip=event.clip, windows=event.value)
                else:
                    yield event
        self._cancel()

    def _event(self, kind: Kind, reference: Any, clip: Clip) -> Event:
        try:
            value: Record | Windows | Size = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            lost = error.cause if isinstance(error, self.ray.exceptions.RayTaskError) else error
            if not isinstance(lost, self.ray.exceptions.RayError):
                return Event("lost", clip, f"Its task failed with {_first_line(lost)}; see Ray's log.")
            words = f"{type(lost).__name__}: {_first_line(lost)}"  # process or machine are gone, the memory is full
            return Event("lost", clip, f"Its worker died {RETRIES + 1} times ({words}); see whether memory suffices.")
        return Event("measured" if kind == "measure" else "ended", clip, value)

    def _spread(self, clip: Clip, windows: Windows) -> None:
        """Tasks for all windows, and one that joins them; each begins when those are done that it rests on."""
        parts: list[Any] = []
        handed: list[Any] = []
        for number, before in enumerate(windows.rests_on):
            earlier = None if before is None else handed[before]
            part, hands_on = self.remote["window"].remote(*self.common, clip, windows, number, earlier)
            parts.append(part)
            handed.append(hands_on)
        joined = self.remote["join"].remote(*self.common, clip, windows, *parts)
        self.waiting[joined], self.windows[joined] = clip, parts

    def _cancel(self, *, force: bool = False) -> None:
        for reference in self.waiting:
            for task in (reference, *self.windows.get(reference, ())):
                self.ray.cancel(task, force=force)

    def stop(self) -> None:
        """Interrupt what runs: its result appears whole or not at all, and is computed again."""
        self.stopping = True

    def close(self) -> None:
        """Disconnect; a cluster that was started here ends, another goes on without us."""
        self.stopping = True
        if self.ray.is_initialized():
            self._cancel(force=True)
            self.ray.shutdown()


def find_ray() -> Any:
    """The package.  Raises MissingExtraError."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("engine='ray' needs the package ray: pip install 'easi3r[ray]'.") from error
    return ray


_WORKERS: dict[str, Worker] = {}  # batch -> of this process of Ray, which serves one task after another


def _worker(batch: str, order: Order, device: str) -> Worker:
    """Loaded once; with another batch comes another model."""
    from easi3r.batches.worker import Worker

    if batch not in _WORKERS:
        _WORKERS.clear()
        logging.getLogger("easi3r").setLevel(logging.ERROR)
        _WORKERS[batch] = Worker(order, device)
    return _WORKERS[batch]


def _info(batch: str, order: Order, device: str) -> Info:
    return _worker(batch, order, device).info()


def _measure(batch: str, order: Order, device: str, clip: Clip) -> Size:
    return _worker(batch, order, device).measure(clip)


def _work(batch: str, order: Order, device: str, clip: Clip) -> Record | Windows:
    from easi3r.batches.windows import open_clip

    return open_clip(_worker(batch, order, device), clip)


def _window(
    batch: str, order: Order, device: str, clip: Clip, windows: Windows, number: int, earlier: Earlier | None
) -> tuple[Part, Earlier | None]:
    from easi3r.batches.windows import work_on_window

    return work_on_window(_worker(batch, order, device), clip, windows, number, earlier)


def _join(batch: str, order: Order, device: str, clip: Clip, windows: Windows, *parts: Part) -> Record:
    from easi3r.batches.windows import join_windows

    return join_windows(_worker(batch, order, device), clip, windows, parts)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200]
