"""The process that a batch starts for each job: reads tasks from stdin, answers on stdout, both pickled.

While one clip is being computed, a thread decodes the next.  It ends with whoever started it, since stdin ends then.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import signal
import sys
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from easi3r.batches.clips import Clip
from easi3r.batches.worker import Reading, Stopped, Worker
from easi3r.errors import Easi3RError

logger = logging.getLogger("easi3r")


def main() -> None:
    """First message: (Order, device).  Then ("measure" | "work", Clip), and ("stop", None).

    Answers: ("ready", Info) or ("unusable", sentence); ("measured", (name, Size)); ("begun", name) and ("ended",
    Record); ("stopped", None).
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the batch says when to stop
        signal.signal(number, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get among the answers
    logging.basicConfig(format="easi3r: %(message)s", level=logging.WARNING)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    order, device = receive(requests)
    logger.setLevel(logging.ERROR)  # the batch itself names the licence, once
    try:
        worker = Worker(order, device)
    except Easi3RError as error:
        send(answers, "unusable", str(error))
        return
    logger.setLevel(logging.WARNING)
    send(answers, "ready", worker.info())
    try:
        _serve(worker, requests, answers)
    except Stopped:
        send(answers, "stopped", None)
        os._exit(0)  # without waiting for the thread that decodes what nobody will compute


def _serve(worker: Worker, requests: BinaryIO, answers: BinaryIO) -> None:
    tasks: queue.SimpleQueue[tuple[Clip, Future[Reading] | None] | None] = queue.SimpleQueue()
    decoder = ThreadPoolExecutor(1)

    def listen() -> None:
        while True:
            try:
                kind, clip = receive(requests)
            except (EOFError, pickle.UnpicklingError):  # the batch has ended, maybe in the middle of a word
                os._exit(0)
            if kind == "stop":
                worker.stopping.set()
                tasks.put(None)
            else:
                tasks.put((clip, decoder.submit(worker.read, clip) if kind == "work" else None))

    threading.Thread(target=listen, daemon=True).start()
    while (task := tasks.get()) is not None:
        clip, reading = task
        if worker.stopping.is_set():
            break
        if reading is None:
            send(answers, "measured", (clip.name, worker.measure(clip)))
        else:
            send(answers, "begun", clip.name)
            send(answers, "ended", worker.finish(clip, reading.result()))
        del task, reading
    raise Stopped


def send(stream: BinaryIO, kind: Any, value: Any) -> None:
    """One message."""
    pickle.dump((kind, value), stream)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """The next message.  Raises EOFError where there will be none."""
    return pickle.load(stream)  # noqa: S301 (a pipe between a batch and the process that it started itself)
