"""Transformer layers of VGGT (arXiv 2503.11651), with the tensor names of its public checkpoints.

Shapes: S frames, T tokens of a frame, B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easi3r.backbones.layers import Mlp, RotaryTable, merge_heads, split_heads
from hooks import Attend

EPS = 1e-5  # of every LayerNorm outside the patch embedding


class FrameRotary(RotaryTable):
    """Rotary positions of a frame's tokens: ``num_special`` that are not turned, then the patches of ``grid``.

    Patches are at (row + 1, column + 1), which keeps them apart from the special tokens' (0, 0).
    """

    def __init__(
        self, grid: tuple[int, int], num_special: int, head_dim: int, base: float, device: torch.device
    ) -> None:
        height, width = grid
        super().__init__((height + 1, width + 1), head_dim, base, device)
        places = torch.arange((height + 1) * (width + 1), device=device).view(height + 1, width + 1)
        order = torch.cat([places.new_zeros(num_special), places[1:, 1:].flatten()])
        self.cos, self.sin = self.cos[order], self.sin[order]

    def rotate(self, x: Tensor) -> Tensor:
        """[B, heads, N, head_dim], N a number of whole frames -> the same, rotated; no frame index takes part."""
        frames = x.unflatten(2, (-1, len(self.cos)))
        return super().rotate(frames).flatten(2, 3)


class Attention(nn.Module):
    """Multi-head attention of tokens x [B, N, C] to themselves, queries and keys normalised or not."""

    def __init__(self, dim: int, num_heads: int, *, normalised: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.LayerNorm(dim // num_heads, eps=EPS) if normalised else nn.Identity()
        self.k_norm = nn.LayerNorm(dim // num_heads, eps=EPS) if normalised else nn.Identity()
        self.proj = nn.Linear(dim, dim)
        self.attend = Attend()

    def forward(self, x: Tensor, rotary: FrameRotary | None = None) -> Tensor:
        return self.proj(merge_heads(self.attend(*self._project(x, rotary))))  # type: ignore[no-any-return]

    def meet(self, x: Tensor, rotary: FrameRotary | None = None) -> None:
        """As far as the logits: queries and keys meet, for the hooks to see, and nothing comes of it."""
        q, k, _ = self._project(x, rotary)
        self.attend(q, k, None)

    def _project(self, x: Tensor, rotary: FrameRotary | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = rotary.rotate(q), rotary.rotate(k)
        return q.to(v.dtype), k.to(v.dtype), v  # norms are finer than matrices where precision is low


class LayerScale(nn.Module):
    """A learned factor per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """Self-attention and MLP, each behind a LayerNorm, scaled, and around a skip connection."""

    def __init__(self, dim: int, num_heads: int, *, normalised: bool = False, eps: float = EPS) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, normalised=normalised)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, rotary: FrameRotary | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), rotary))
        return x + self.ls2(self.mlp(self.norm2(x)))  # type: ignore[no-any-return]

    def meet(self, x: Tensor, rotary: FrameRotary | None = None) -> None:
        """The block as far as its logits."""
        self.attn.meet(self.norm1(x), rotary)


class TwoLayers(nn.Module):
    """Two layers with exact GELU between, of any widths."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]
