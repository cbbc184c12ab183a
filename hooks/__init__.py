"""Observe and edit the attention of a network through forward hooks.  Imports torch alone."""

from hooks.capture import CapturedAttention, capture_attention, observe_attention
from hooks.edit import cut_attention, drop_keys, separate_attention
from hooks.sites import Attend, HookError, find_sites
from hooks.statistics import FrameStatistics

__all__ = [
    "Attend",
    "CapturedAttention",
    "FrameStatistics",
    "HookError",
    "capture_attention",
    "cut_attention",
    "drop_keys",
    "find_sites",
    "observe_attention",
    "separate_attention",
]
