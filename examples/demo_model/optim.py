"""Muon for matrices, AdamW for the rest, and a warm-up and decay schedule.

Muon steps along the nearest orthogonal matrix of the momentum (Newton-Schulz). In runs as short
as these it needs about half the steps of AdamW. Matrices of one shape are orthogonalised as one
batch, which keeps its cost near a tenth of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import team
import torch
from torch import Tensor, nn

# Newton-Schulz coefficients that bring singular values near 1 in five steps (Keller Jordan's)
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest (semi-)orthogonal matrices of a batch [K, rows, columns]."""
    if not len(matrices):
        return matrices
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; kernels of convolutions count as [out, rest] matrices.

    Scaled so that one step changes a weight by 0.2 lr on average, as AdamW does.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            same_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is None:
                    continue
                velocity = self.state[p].setdefault("velocity", torch.zeros_like(p))
                velocity.lerp_(p.grad, 1 - group["momentum"])
                ahead = p.grad.lerp(velocity, group["momentum"]).flatten(1)  # Nesterov
                same_shape[tuple(ahead.shape)].append((p, ahead))
            directions = []
            for members in same_shape.values():
                ahead = torch.stack([ahead for _, ahead in members])
                share = slice(team.rank(), None, team.size())  # each process does some of them
                mine = orthogonalise(ahead[share])
                directions.append(ahead.zero_())
                ahead[share] = mine
            team.add_up(directions)
            for (shape, members), steps in zip(same_shape.items(), directions):
                size = group["lr"] * 0.2 * max(shape) ** 0.5
                for (p, _), step in zip(members, steps):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(step.reshape(p.shape), alpha=size)


def make_optimisers(
    matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, other_lr: float,
    weight_decay: float = 0.0,
) -> list[torch.optim.Optimizer]:  # fmt: skip
    """Muon over `matrices`, AdamW over `others`; each group remembers its peak rate."""
    optimisers = [
        Muon(matrices, lr, weight_decay=weight_decay),
        torch.optim.AdamW(others, other_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return optimisers


def set_rate(optimisers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * factor


def rate_factor(done: float, warmup: float = 0.03, decay: float = 0.4) -> float:
    """Share of the peak rate after this share of the run: linear up, flat, linear down to 0."""
    return max(0.0, min(done / warmup, 1.0, (1 - done) / decay))
