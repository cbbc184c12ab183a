"""Folders of clips: ``easi3r.batch`` and ``easi3r batch``, one result per clip, whatever happens on the way."""

from easi3r.batches.batch import BatchStopped, batch
from easi3r.batches.summary import Summary

__all__ = ["BatchStopped", "Summary", "batch"]
