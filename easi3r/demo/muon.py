"""Muon: momentum whose every step is turned into the nearest orthogonal matrix (Jordan et al., 2024).

For the hidden matrices of a network; what is left (biases, norms, first and last layers) is AdamW's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a quintic whose iteration takes every singular value near 1


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[B, m, n] -> roughly U V^T of each singular value decomposition, by a Newton-Schulz iteration in bf16."""
    x = matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.square().sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """``lr`` is the spectral norm of a step of a square matrix; matrices of one shape are treated together.

    A matrix whose rows are three of its width (queries, keys and values in one) is treated as three matrices.  Where
    several processes hold the same weights and gradients, each does its share of the work.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float = 0.01, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["momentum"], group["momentum"])  # Nesterov's
                rows, columns = parameter.shape
                parts = 3 if rows == 3 * columns else 1
                for value, change in zip(parameter.chunk(parts), update.chunk(parts), strict=True):
                    by_shape[value.shape].append((value, change))
            stacks = [torch.stack([change for _, change in members]) for members in by_shape.values()]
            for members, steps in zip(by_shape.values(), orthogonalise_together(stacks), strict=True):
                rows, columns = steps.shape[1:]
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for (value, _), change in zip(members, steps, strict=True):
                    value.mul_(1 - group["lr"] * group["weight_decay"]).sub_(change, alpha=scale)


def orthogonalise_together(stacks: list[Tensor]) -> list[Tensor]:
    """``orthogonalise`` each [B, m, n]; process k of K takes every K-th matrix, from the k-th on."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [orthogonalise(stack) for stack in stacks]
    own = slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size())
    flat = torch.zeros(sum(stack.numel() for stack in stacks), dtype=stacks[0].dtype, device=stacks[0].device)
    results = [part.view_as(stack) for part, stack in zip(flat.split([s.numel() for s in stacks]), stacks, strict=True)]
    for result, stack in zip(results, stacks, strict=True):
        if len(stack[own]):
            result[own] = orthogonalise(stack[own])
    torch.distributed.all_reduce(flat)
    return results
