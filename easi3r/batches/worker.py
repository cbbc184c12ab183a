"""One clip after the other with one model: what every engine does on a processor, and nothing of how it is reached."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import cv2
import numpy as np
import torch

from easi3r.batches.clips import Clip, content, stamp
from easi3r.batches.memory import forget_peak, peak_gib
from easi3r.batches.messages import Info, Order, Size, now
from easi3r.batches.records import Ledger, Record, settings_key
from easi3r.batches.size import count_frames, disk_bytes
from easi3r.batches.space import check_space
from easi3r.device import is_out_of_memory
from easi3r.errors import Easi3RError, InputError, OutputError
from easi3r.model import Easi3R
from easi3r.pipeline import crop_of, load_frames, run
from easi3r.plan import GIB, allowed_bytes
from easi3r.scene import Motion, Scene
from easi3r.structures import Frames

T = TypeVar("T")
logger = logging.getLogger("easi3r")


@dataclass(frozen=True)
class Reading:
    """A clip that was read, or the reason why it could not be."""

    frames: Frames | None
    error: Exception | None
    stamp: str | None
    content: str | None
    seconds: float


class Stopped(BaseException):
    """The batch was asked to stop, and the stage that was being worked on is done."""


class Worker:
    """A model and a way to work on clips.  Raises Easi3RError where the model cannot be loaded."""

    def __init__(self, order: Order, device: str) -> None:
        torch.set_num_threads(order.threads)
        cv2.setNumThreads(order.threads)
        self.ledger, self.stopping = Ledger(order.out), threading.Event()
        self.model = Easi3R.from_pretrained(order.checkpoint, device=device)
        self.key = settings_key(order.settings, self.model.checkpoint.sha256())
        self.settings = dataclasses.replace(order.settings, device="auto")  # where the network is
        if order.jobs_per_host > 1 and self.settings.memory == "auto" and self.model.network.device.type == "cpu":
            share = allowed_bytes("auto", self.model.network.device) / order.jobs_per_host / GIB
            self.settings = dataclasses.replace(self.settings, memory=share)

    def info(self) -> Info:
        """For the batch, which has neither model nor torch."""
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return Info(self.key, self.model.checkpoint.licence, gpus)

    def measure(self, clip: Clip) -> Size:
        """From its headers, without decoding it."""
        try:
            frames, size = count_frames(clip.path, self.settings.frames)
            crop = crop_of(self.model.network, size, self.settings)
        except Exception as error:  # broken files make their readers raise anything; the reason comes with the attempt
            logger.info("%s cannot be measured: %s", clip.relative, error)
            return Size()
        return Size(frames, disk_bytes(frames, *crop.size))

    def read(self, clip: Clip) -> Reading:
        """Decode it.  Meant for a thread of its own, while the clip before is being computed; never raises."""
        begin, before, frames, hashed = time.perf_counter(), None, None, None
        failure: Exception | None = None
        try:
            before = stamp(clip.path)
            hashed = content(clip.path)
            frames = load_frames(self.model.network, os.fspath(clip.path), self.settings, self.go_on)
            if stamp(clip.path) != before:
                raise InputError(f"{clip.path} was changed while it was read; start again when it is whole.")
        except OSError as error:
            failure = InputError(f"{clip.path} cannot be read ({error.strerror}); check it and its permissions.")
        except Exception as error:  # a clip that cannot be read is a row, whatever its decoder raised
            failure = error
        return Reading(frames, failure, before, hashed, time.perf_counter() - begin)

    def finish(self, clip: Clip, reading: Reading) -> Record:
        """Compute and write its result, then its record; a failure is a record too.

        Raises Stopped if ``stopping`` was set meanwhile.
        """
        return self.keep(self.attempt(clip, reading))

    def keep(self, record: Record) -> Record:
        """Write it."""
        try:
            self.ledger.write(record)
        except OutputError as error:  # without it the result does not count
            record = dataclasses.replace(record, status="failed", error=record.error or str(error))
        return record

    def attempt(self, clip: Clip, reading: Reading, work: Callable[[Frames], Motion] | None = None) -> Record:
        """Compute and write the result alone.  work: what makes a scene of frames; None: the pipeline, as it is."""
        begin = time.perf_counter()
        device = self.model.network.device
        forget_peak(device)
        record = Record(clip.relative, clip.name, "failed", self.key, reading.stamp, reading.content)
        try:
            found = self._found(self._compute(clip, reading, work or self._reconstruct))
            record = dataclasses.replace(record, status="done", **found)
        except Exception as error:  # one clip's failure is never the end of the batch, and its reason is its row
            expected = isinstance(error, Easi3RError)
            record = dataclasses.replace(
                record,
                frames=None if reading.frames is None else reading.frames.num_frames,
                error=reason(error),
                traceback=None if expected else "".join(traceback.format_exception(error)),
            )
        seconds, (host, gpu) = reading.seconds + time.perf_counter() - begin, peak_gib(device)
        return dataclasses.replace(
            record, seconds=round(seconds, 3), memory_gib=round(host, 3), gpu_memory_gib=gpu, finished=now()
        )

    def _reconstruct(self, frames: Frames) -> Motion:
        model = self.model
        return run(model.network, model.checkpoint, frames, self.settings, self.go_on, masks_only=False)

    def _compute(self, clip: Clip, reading: Reading, work: Callable[[Frames], Motion]) -> Scene:
        if reading.error is not None:
            raise reading.error
        assert reading.frames is not None
        frames, height, width = reading.frames.images.shape[:3]
        check_space(self.ledger.out, disk_bytes(frames, width, height))
        scene = work(reading.frames)
        assert isinstance(scene, Scene)
        scene.save(self.ledger.result(clip.name), overwrite=True)
        return scene

    @staticmethod
    def _found(scene: Scene) -> dict[str, Any]:
        """What the record says of a result."""
        from easi3r.report.pictures import overlay, picture

        quality = scene.meta["quality"]
        most = int(scene.dynamic_mask.mean(axis=(1, 2)).argmax())
        image = overlay(scene.images[most], scene.dynamic_mask[most])
        factor = min(1.0, 160 / max(image.shape[:2]))
        small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        return {
            "frames": scene.num_frames,
            "verdict": quality["verdict"],
            "reasons": tuple(quality["reasons"]),
            "moving_share": round(float(np.mean(scene.dynamic_mask)), 4),
            "picture": picture(small, "").get("src"),
        }

    def go_on(self, items: Iterable[T], label: str) -> Iterable[T]:
        """As progress of the pipeline: asked at the beginning of every loop, so that stages end before work stops."""
        if self.stopping.is_set():
            raise Stopped
        return items


def reason(error: BaseException) -> str:
    """One sentence for the row of a clip."""
    text = " ".join(str(error).split())
    if isinstance(error, Easi3RError):
        return text
    if is_out_of_memory(error):
        return f"The memory does not suffice ({text or 'MemoryError'}); choose a smaller image_size or fewer frames."
    return (
        f"easi3r failed with {type(error).__name__} ({text[:300]}); its record holds the traceback, please report it."
    )
