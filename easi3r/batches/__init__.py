"""Folders of clips: ``easi3r.batch`` and ``easi3r batch``, one result per clip, whatever happens on the way."""

from easi3r.batches.summary import Summary
from easi3r.batches.supervisor import BatchStopped, batch

__all__ = ["BatchStopped", "Summary", "batch"]
