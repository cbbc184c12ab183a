"""The errors a user can cause.  Each message is one sentence: what was given, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class Easi3RError(Exception):
    """Root of every error that easi3r raises on purpose; the command line turns it into exit code 1."""


class InputError(Easi3RError):
    """The frames, masks or cameras that were handed in cannot be used."""


class CheckpointError(Easi3RError):
    """The weights cannot be loaded, or belong to another model."""


class ConfigError(Easi3RError):
    """An option has an unknown name or an impossible value."""


class OutputError(Easi3RError):
    """The result cannot be written where it was asked for, or a saved result cannot be read."""


class QualityError(Easi3RError):
    """--strict: the result is written, but its verdict is 'bad'."""


class MissingExtraError(Easi3RError):
    """An optional package is needed and absent; the message says how to install it."""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the closest known name, or '' when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
