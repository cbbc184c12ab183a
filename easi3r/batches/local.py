"""The engine for one machine: a process for each job, each held by a thread that hands it clips and hears its answers.

A process that dies takes nothing with it: its clips are tried once more, alone, by a fresh one.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from easi3r.batches.clips import Clip
from easi3r.batches.messages import Event, Info, Kind, Order
from easi3r.errors import Easi3RError

STOP = "stop"  # among the events


@dataclass
class Task:
    """A clip to be worked on."""

    kind: Kind
    clip: Clip
    deaths: int = 0  # of processes that had it in hand; it is alone with the next one


class LocalEngine:
    """``jobs`` processes.  ``begin`` first; then ``run`` yields events, in the order in which they happen."""

    def __init__(self, order: Order, jobs: int, device: str, lock: int) -> None:
        """device: 'auto' gives each job a GPU of its own.  lock: descriptor that the processes inherit."""
        self.order, self.jobs, self.device, self.lock = order, jobs, device, lock
        self.events: queue.SimpleQueue[Event | Easi3RError | str | None] = queue.SimpleQueue()
        self.tasks: deque[Task] = deque()
        self.stopping = threading.Event()
        self.lanes: list[Lane] = []

    def begin(self) -> Info:
        """Start the first process; what it says decides how many others there can be.  Raises Easi3RError."""
        lane = Lane(self, self.device)
        self.lanes = [lane]
        info = lane.start()
        if info.gpus and self.device in ("auto", "cuda"):
            self.jobs = min(self.jobs, info.gpus)
            self.lanes += [Lane(self, f"cuda:{number}") for number in range(1, self.jobs)]
        else:
            self.jobs = self.jobs if self.device in ("auto", "cpu") else 1
            self.lanes += [Lane(self, self.device) for _ in range(1, self.jobs)]
        return info

    def run(self, kind: Kind, clips: Sequence[Clip]) -> Iterator[Event]:
        """Events of all clips; after ``stop`` those of the clips that were finished meanwhile.

        Raises Easi3RError where no process can be started any more.
        """
        self.tasks.extend(Task(kind, clip) for clip in clips)
        threads = [threading.Thread(target=lane.run, daemon=True) for lane in self.lanes[: max(1, len(clips))]]
        for thread in threads:
            thread.start()
        running, trouble = len(threads), None
        while running:
            event = self.events.get()
            if isinstance(event, Event):
                yield event
            elif isinstance(event, Easi3RError):
                trouble = event
            elif event == STOP:
                for lane in self.lanes:
                    lane.tell("stop", None)
            else:
                running -= 1
        if trouble and self.tasks and not self.stopping.is_set():
            raise trouble

    def stop(self) -> None:
        """Let every process finish its stage, and no clip more.  Safe in a signal handler: whoever runs does it."""
        self.stopping.set()
        self.events.put(STOP)

    def close(self) -> None:
        """End all processes, whatever they do."""
        self.stopping.set()
        for lane in self.lanes:
            lane.kill()


@dataclass
class Lane:
    """One process after another, one at a time."""

    engine: LocalEngine
    device: str
    process: subprocess.Popen[bytes] | None = None
    in_hand: deque[Task] = field(default_factory=deque)
    speaking: threading.Lock = field(default_factory=threading.Lock)  # main thread and lane's thread both write

    def start(self) -> Info:
        """A fresh process, its model loaded.  Raises Easi3RError if it says that this cannot be, or dies."""
        order = self.engine.order
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(order.threads))
        # with our own path: the current folder, which -c puts first, may hold anything
        program = f"import sys; sys.path[:] = {sys.path!r}; from easi3r.batches.process import main; main()"
        inherited = () if sys.platform == "win32" else (self.engine.lock,)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | threads,
            pass_fds=inherited,
            start_new_session=True,  # signals to the group of the batch are the batch's affair
        )
        self.tell(dataclasses.replace(order, jobs_per_host=self.engine.jobs), self.device)
        answer = self.hear()
        if answer is None:
            raise Easi3RError(f"A worker died while it loaded the model ({self.last_words()}); see what the log says.")
        kind, value = answer
        if kind == "unusable":
            raise Easi3RError(value)
        info: Info = value
        return info

    def tell(self, kind: Any, value: Any) -> None:
        """One message; a process that is gone is noticed by whoever listens."""
        process = self.process
        if process is None or process.stdin is None:
            return
        try:
            with self.speaking:
                pickle.dump((kind, value), process.stdin)
                process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return

    def hear(self) -> tuple[str, Any] | None:
        """The next answer, None from a process that is gone."""
        assert self.process is not None and self.process.stdout is not None
        try:
            answer: tuple[str, Any] = pickle.load(self.process.stdout)  # noqa: S301 (from the process started above)
        except (EOFError, pickle.UnpicklingError):
            return None
        return answer

    def last_words(self) -> str:
        """How the process ended."""
        assert self.process is not None
        code = self.process.wait()
        if code >= 0:
            return f"exit code {code}"
        cause = ", as the system does when memory is short" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{cause}"

    def kill(self) -> None:
        """End the process, if there is one, and wait until it is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def run(self) -> None:
        """Work until no task is left; in a thread of its own."""
        engine = self.engine
        try:
            while not engine.stopping.is_set() and (engine.tasks or self.in_hand):
                if self.process is None or self.process.poll() is not None:
                    self.start()
                    if engine.stopping.is_set():  # asked for while the model was loaded
                        break
                self._hand_over()
                if not self.in_hand:  # another lane took the last one
                    break
                self._listen()
        except Easi3RError as error:
            engine.events.put(error)
        finally:
            engine.events.put(None)

    def _hand_over(self) -> None:
        """One clip to compute and one to decode meanwhile; a clip that somebody died of comes alone."""
        tasks, in_hand = self.engine.tasks, self.in_hand
        while len(in_hand) < 2:
            try:
                task = tasks.popleft()
            except IndexError:
                return
            if in_hand and (task.deaths or in_hand[0].deaths):
                tasks.appendleft(task)
                return
            in_hand.append(task)
            self.tell(task.kind, task.clip)

    def _listen(self) -> None:
        answer, events = self.hear(), self.engine.events
        if answer is None or answer[0] == "stopped":
            self._bury(stopped=answer is not None)
        elif answer[0] == "begun":
            events.put(Event("begun", self.in_hand[0].clip, None))
        else:
            kind, value = answer
            events.put(Event(kind, self.in_hand.popleft().clip, value[1] if kind == "measured" else value))

    def _bury(self, *, stopped: bool) -> None:
        """The process is gone: what it had in hand is tried again, or given up."""
        words = self.last_words()
        for task in reversed(self.in_hand):
            task.deaths += not (stopped or self.engine.stopping.is_set())
            if task.deaths < 2:
                self.engine.tasks.appendleft(task)
            else:
                sentence = f"The worker died of it twice ({words}); see whether its memory suffices for this clip."
                self.engine.events.put(Event("lost", task.clip, sentence))
        self.in_hand.clear()
