"""A network as other people's code builds it: DUSt3R's public modules and calls, slow and explicit.

Written from the facts in shared/spec/dust3r.md.  It shares no line with ``easi3r.backbones``, so agreement between
the two means something: attention forms its N x N weights, rotary positions turn complex numbers, and every frame is
encoded once per pair.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rope(nn.Module):
    """Channels i and i + D/2 of a half of width D are the real and imaginary part of one turning number."""

    def __init__(self, base: float) -> None:
        super().__init__()
        self.base = base

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        halves = tokens.chunk(2, dim=-1)
        turned = [self.turn(half, positions[:, None, :, axis]) for axis, half in enumerate(halves)]
        return torch.cat(turned, dim=-1)

    def turn(self, half: Tensor, position: Tensor) -> Tensor:
        width = half.shape[-1]
        speed = torch.tensor([self.base ** (-2 * i / width) for i in range(width // 2)])
        angle = position[..., None] * speed
        number = torch.complex(*half.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([number.real, number.imag], dim=-1)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: Rope) -> None:
        super().__init__()
        self.num_heads, self.scale, self.rope = num_heads, (dim // num_heads) ** -0.5, rope
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        batch, count, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, count, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (self.rope(q, position) @ self.rope(k, position).transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((self.attn_drop(weights) @ v).transpose(1, 2).reshape(batch, count, dim))


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: Rope) -> None:
        super().__init__()
        self.num_heads, self.scale, self.rope = num_heads, (dim // num_heads) ** -0.5, rope
        self.projq, self.projk, self.projv = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, qpos: Tensor, kpos: Tensor) -> Tensor:
        q, k, v = (
            project(x).reshape(len(x), -1, self.num_heads, x.shape[-1] // self.num_heads).transpose(1, 2)
            for project, x in ((self.projq, query), (self.projk, key), (self.projv, value))
        )
        weights = (self.rope(q, qpos) @ self.rope(k, kpos).transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((self.attn_drop(weights) @ v).transpose(1, 2).reshape(query.shape))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: Rope) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, num_heads, rope), Mlp(dim)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), position)
        return x + self.mlp(self.norm2(x))


class DecoderBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: Rope) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3, self.norm_y = (nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.attn, self.mlp = Attention(dim, num_heads, rope), Mlp(dim)
        self.cross_attn = CrossAttention(dim, num_heads, rope)

    def forward(self, x: Tensor, y: Tensor, pos_x: Tensor, pos_y: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.attn(self.norm1(x), pos_x)
        other = self.norm_y(y)
        x = x + self.cross_attn(self.norm2(x), other, other, pos_x, pos_y)
        return x + self.mlp(self.norm3(x)), y


class PatchEmbed(nn.Module):
    def __init__(self, img_size: tuple[int, int], patch_size: int, dim: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, img: Tensor, true_shape: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.proj(img)
        rows, columns = tokens.shape[-2:]
        position = torch.tensor([(row, column) for row in range(rows) for column in range(columns)])
        return tokens.flatten(2).transpose(1, 2), position.expand(len(img), -1, -1)


class LinearPts3d(nn.Module):
    def __init__(self, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(dim, 4 * patch_size**2)

    def forward(self, tokens: list[Tensor], img_shape: tuple[int, int]) -> dict[str, Tensor]:
        p, (height, width) = self.patch_size, img_shape
        patches = self.proj(tokens[-1]).reshape(-1, height // p, width // p, 4, p, p)
        raw = patches.permute(0, 1, 4, 2, 5, 3).reshape(-1, height, width, 4)  # [B, h, p, w, p, 4]
        xyz, c = raw[..., :3], raw[..., 3]
        length = xyz.norm(dim=-1, keepdim=True).clip(min=1e-8)
        return {"pts3d": xyz / length * torch.expm1(length), "conf": 1 + c.exp()}


class AsymmetricCroCo3DStereo(nn.Module):
    """Constructor arguments, attributes, tensor names and calls of the public class; linear heads."""

    def __init__(
        self,
        *,
        enc_embed_dim: int,
        enc_depth: int,
        enc_num_heads: int,
        dec_embed_dim: int,
        dec_depth: int,
        dec_num_heads: int,
        img_size: tuple[int, int] = (512, 512),
        patch_size: int = 16,
        **public_defaults: object,
    ) -> None:
        super().__init__()
        self.rope = Rope(100.0)
        self.depth_mode = ("exp", -float("inf"), float("inf"))
        self.conf_mode = ("exp", 1, float("inf"))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dec_embed_dim))
        self.patch_embed = PatchEmbed(tuple(img_size), patch_size, enc_embed_dim)
        self.enc_blocks = nn.ModuleList(Block(enc_embed_dim, enc_num_heads, self.rope) for _ in range(enc_depth))
        self.enc_norm = nn.LayerNorm(enc_embed_dim, eps=1e-6)
        self.decoder_embed = nn.Linear(enc_embed_dim, dec_embed_dim)
        self.dec_blocks, self.dec_blocks2 = (
            nn.ModuleList(DecoderBlock(dec_embed_dim, dec_num_heads, self.rope) for _ in range(dec_depth))
            for _ in range(2)
        )
        self.dec_norm = nn.LayerNorm(dec_embed_dim, eps=1e-6)
        self.downstream_head1 = LinearPts3d(dec_embed_dim, patch_size)
        self.downstream_head2 = LinearPts3d(dec_embed_dim, patch_size)

    def _encode_image(self, img: Tensor, true_shape: Tensor) -> tuple[Tensor, Tensor, None]:
        x, position = self.patch_embed(img, true_shape=true_shape)
        for block in self.enc_blocks:
            x = block(x, position)
        return self.enc_norm(x), position, None

    def _decoder(self, f1: Tensor, pos1: Tensor, f2: Tensor, pos2: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        first, second = [f1], [f2]
        x, y = self.decoder_embed(f1), self.decoder_embed(f2)
        for block1, block2 in zip(self.dec_blocks, self.dec_blocks2, strict=True):
            (new_x, _), (new_y, _) = block1(x, y, pos1, pos2), block2(y, x, pos2, pos1)
            x, y = new_x, new_y
            first.append(x)
            second.append(y)
        first[-1], second[-1] = self.dec_norm(x), self.dec_norm(y)
        return first, second

    def forward(
        self, view1: dict[str, Tensor], view2: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        (f1, pos1, _), (f2, pos2, _) = (self._encode_image(view["img"], view["true_shape"]) for view in (view1, view2))
        first, second = self._decoder(f1, pos1, f2, pos2)
        size = tuple(view1["img"].shape[-2:])
        answer1, answer2 = self.downstream_head1(first, size), self.downstream_head2(second, size)
        answer2["pts3d_in_other_view"] = answer2.pop("pts3d")
        return answer1, answer2


def view(images: Tensor) -> dict[str, Tensor]:
    """[B, 3, H, W] -> the dictionary that the public networks are called with."""
    return {"img": images, "true_shape": torch.tensor(images.shape[-2:]).expand(len(images), 2)}
