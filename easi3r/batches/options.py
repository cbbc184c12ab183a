"""How a batch is spread over processors: options of ``easi3r batch`` beside those of a single clip."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

from easi3r.config import convert
from easi3r.errors import ConfigError


@dataclass(frozen=True)
class BatchOptions:
    """Everything about a batch that changes no result."""

    jobs: int = 1  # clips at once: one process each, and one GPU each where there are GPUs
    threads_per_job: int | None = None  # None: the cores, shared out among the jobs
    retry_failed: bool = False  # work on the clips again that failed before
    engine: Literal["local", "ray"] = "local"
    address: str | None = None  # engine='ray': of a running cluster; None: the one that runs here, or a new one

    def __post_init__(self) -> None:
        for name in ("jobs", "threads_per_job"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} is {value}, but it must be 1 or more.")
        if self.address is not None and self.engine != "ray":
            raise ConfigError(f"address is {self.address!r}, which engine='ray' alone uses; leave it out.")

    @property
    def threads(self) -> int:
        """Of each job; OMP_NUM_THREADS has a say where nothing else was asked for."""
        if self.threads_per_job is not None:
            return self.threads_per_job
        wish = os.environ.get("OMP_NUM_THREADS", "")
        if wish.isdecimal() and int(wish) > 0:
            return int(wish)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, cores // self.jobs)

    @classmethod
    def taken_from(cls, options: Mapping[str, Any]) -> tuple[BatchOptions, dict[str, Any]]:
        """Those of ``options`` that are ours, converted from text where need be, and the others as they are."""
        kinds = get_type_hints(cls)
        mine = {field.name for field in fields(cls)} & options.keys()
        found = {name: convert(options[name], kinds[name], name) for name in mine}
        return cls(**found), {name: value for name, value in options.items() if name not in mine}
