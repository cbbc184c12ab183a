"""Transformer layers of DUSt3R (arXiv 2312.14132) and CroCo v2 (arXiv 2211.10408), with their tensor names.

Shapes: B batch, N tokens in row-major order, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hooks import Attend

LAYER_NORM_EPS = 1e-6
_QUARTER_TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])


class RotaryTable:
    """RoPE in two dimensions for a grid of tokens: half of a head's channels turn with the row, half with the column.

    ``cos`` and ``sin`` are [N, head_dim] float32.  In a half of width D the frequencies are ``base**(-2i/D)``,
    i = 0 .. D/2 - 1, and channel i turns together with channel i + D/2.
    """

    def __init__(self, grid: tuple[int, int], head_dim: int, base: float, device: torch.device) -> None:
        if head_dim % 4:
            raise ValueError(f"A head has {head_dim} channels; rotary positions need a multiple of 4.")
        half = head_dim // 2
        frequencies = base ** (-torch.arange(0, half, 2, dtype=torch.float32, device=device) / half)
        rows, columns = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
        by_row = torch.outer(rows.flatten().float(), frequencies).repeat(1, 2)
        by_column = torch.outer(columns.flatten().float(), frequencies).repeat(1, 2)
        angles = torch.cat([by_row, by_column], dim=1)
        self.cos, self.sin = angles.cos(), angles.sin()
        # x @ partner puts each channel's partner in its place, negated where a rotation has its minus: one product
        # with a permutation is cheaper than slicing and stacking, above all backwards.
        quarter = torch.eye(half // 2, device=device)
        self.partner = torch.kron(torch.eye(2, device=device), torch.kron(_QUARTER_TURN.to(device), quarter))

    def rotate(self, x: Tensor) -> Tensor:
        """[B, heads, N, head_dim] -> the same, rotated by each token's position."""
        cos, sin, partner = (table.to(x.dtype) for table in (self.cos, self.sin, self.partner))
        return torch.addcmul(x * cos, x @ partner, sin)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]."""
    return x.view(*x.shape[:2], num_heads, -1).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, heads, N, D] -> [B, N, heads * D]."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Multi-head attention of tokens x [B, N, C] to themselves."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.attend = Attend()

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(merge_heads(self.attend(rotary.rotate(q), rotary.rotate(k), v)))  # type: ignore[no-any-return]


class CrossAttention(nn.Module):
    """Queries from x [B, N, C], keys and values from the other view's y [B, M, C], each on a grid of its own."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projq = nn.Linear(dim, dim)
        self.projk = nn.Linear(dim, dim)
        self.projv = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.attend = Attend()

    def forward(self, x: Tensor, y: Tensor, rotary: RotaryTable, rotary_y: RotaryTable) -> Tensor:
        v = split_heads(self.projv(y), self.num_heads)
        return self.proj(merge_heads(self.attend(*self._queries_and_keys(x, y, rotary, rotary_y), v)))  # type: ignore[no-any-return]

    def meet(self, x: Tensor, y: Tensor, rotary: RotaryTable, rotary_y: RotaryTable) -> None:
        """As far as the logits: queries and keys meet, for the hooks to see, and nothing comes of it."""
        self.attend(*self._queries_and_keys(x, y, rotary, rotary_y), None)

    def _queries_and_keys(
        self, x: Tensor, y: Tensor, rotary: RotaryTable, rotary_y: RotaryTable
    ) -> tuple[Tensor, Tensor]:
        q, k = split_heads(self.projq(x), self.num_heads), split_heads(self.projk(y), self.num_heads)
        return rotary.rotate(q), rotary_y.rotate(k)


class Mlp(nn.Module):
    """Two layers, exact GELU, four times the width between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """Self-attention and MLP, each behind a LayerNorm and around a skip connection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, rotary: RotaryTable) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """Self-attention in x, cross-attention from x to the other view's tokens y, MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = SelfAttention(dim, num_heads)
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.norm_y = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor, y: Tensor, rotary: RotaryTable, rotary_y: RotaryTable) -> Tensor:
        x = x + self.attn(self.norm1(x), rotary)
        x = x + self.cross_attn(self.norm2(x), self.norm_y(y), rotary, rotary_y)
        return x + self.mlp(self.norm3(x))  # type: ignore[no-any-return]

    def meet(self, x: Tensor, y: Tensor, rotary: RotaryTable, rotary_y: RotaryTable) -> None:
        """The block as far as the logits of its cross-attention."""
        x = x + self.attn(self.norm1(x), rotary)
        self.cross_attn.meet(self.norm2(x), self.norm_y(y), rotary, rotary_y)
