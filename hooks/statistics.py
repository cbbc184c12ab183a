"""Mean and standard deviation per frame, folded in while pairs stream by; no pair is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FrameStatistics:
    """Running mean and unbiased standard deviation of maps, one set per frame (Welford's update, float32)."""

    def __init__(self, num_frames: int) -> None:
        self.counts = torch.zeros(num_frames, dtype=torch.int64)
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None  # sum of squared deviations from the mean
        self._final = torch.zeros(num_frames, dtype=torch.bool)

    def update(self, frame_indices: Sequence[int], values: Tensor) -> None:
        """Fold in ``values`` [B, ...], where ``values[i]`` is a map of frame ``frame_indices[i]``."""
        if self._mean is None or self._squares is None:
            shape = (len(self.counts), *values.shape[1:])
            self._mean = torch.zeros(shape, dtype=torch.float32, device=values.device)
            self._squares = torch.zeros_like(self._mean)
        for frame, value in zip(frame_indices, values, strict=True):
            if self._final[frame]:
                continue
            self.counts[frame] += 1
            deviation = value - self._mean[frame]
            self._mean[frame] += deviation / int(self.counts[frame])
            self._squares[frame] += deviation * (value - self._mean[frame])

    def reopened(self, frames: Tensor) -> FrameStatistics:
        """A copy in which ``frames`` [n] bool start anew and all others are final: updates pass them by."""
        again = FrameStatistics(len(self.counts))
        again.counts = self.counts.masked_fill(frames, 0)
        again._final = ~frames
        if self._mean is not None and self._squares is not None:
            again._mean, again._squares = self._mean.clone(), self._squares.clone()
            again._mean[frames], again._squares[frames] = 0, 0
        return again

    @property
    def mean(self) -> Tensor:
        """[n, ...] float32; zero for a frame that was never seen."""
        if self._mean is None:
            raise ValueError("No map was folded in yet; call update first.")
        return self._mean

    @property
    def std(self) -> Tensor:
        """[n, ...] float32, unbiased; zero for a frame seen fewer than twice, where no deviation exists."""
        if self._squares is None:
            raise ValueError("No map was folded in yet; call update first.")
        degrees = (self.counts - 1).clamp(min=1).to(self._squares.device)
        return (self._squares / degrees.view(-1, *[1] * (self._squares.ndim - 1))).sqrt()

    def pooled_std(self) -> Tensor:
        """[...] float32: deviation over all maps of all frames together, which exists even where ``std`` does not."""
        counts = self.counts.to(self.mean.device, torch.float32).view(-1, *[1] * (self.mean.ndim - 1))
        total = counts.sum().clamp(min=1)
        centre = (counts * self.mean).sum(0) / total
        assert self._squares is not None
        squares = self._squares.sum(0) + (counts * (self.mean - centre) ** 2).sum(0)
        return (squares / (total - 1).clamp(min=1)).sqrt()
