"""What the pieces of a LoRA add to a weight, and the merge.

The sum is W + strength x scale x product of the factors, or what DoRA makes of it. Every addition
is relative to the model's own weight, so several stack in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from packforcing.checkpoints.quantized import DTYPES, StoredTensor
from packforcing.checkpoints.reading import Tensors
from packforcing.errors import CheckpointError

Reader = Callable[[StoredTensor], Tensor]
Pieces = Mapping[str, Tensor]


def _multiply_lora(pieces: Pieces) -> Tensor:
    return pieces["up"].flatten(1) @ pieces["down"].flatten(1)


def _multiply_loha(pieces: Pieces) -> Tensor:
    first = pieces["hada_w1_a"] @ pieces["hada_w1_b"]
    return first * (pieces["hada_w2_a"] @ pieces["hada_w2_b"])


def _multiply_lokr(pieces: Pieces) -> Tensor:
    first, second = (
        pieces[name] if name in pieces else pieces[f"{name}_a"] @ pieces[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - first.ndim)), second)


def _as_stored(kind: str) -> Callable[[Pieces], Tensor]:
    return lambda pieces: pieces[kind]


class Formula(NamedTuple):
    """How the pieces of one kind of addition make it."""

    multiply: Callable[[Pieces], Tensor]
    pieces: frozenset[str]
    is_scaled: bool  # by alpha over the rank

    def take(self, pieces: Tensors) -> Tensors:
        """Take the pieces that the formula uses, DoRA's magnitude with the factors."""
        used = self.pieces | ({"magnitude"} if self.is_scaled else set())
        return {kind: stored for kind, stored in pieces.items() if kind in used}


FORMULAS = (
    Formula(_multiply_lora, frozenset({"down", "up"}), True),
    Formula(_multiply_loha, frozenset(f"hada_w{i}_{j}" for i in "12" for j in "ab"), True),
    Formula(_multiply_lokr, frozenset({"lokr_w1", "lokr_w2"}), True),
    Formula(_multiply_lokr, frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"}), True),
    Formula(_multiply_lokr, frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}), True),
    Formula(_multiply_lokr, frozenset(f"lokr_w{i}_{j}" for i in "12" for j in "ab"), True),
    Formula(_as_stored("up_b"), frozenset({"up_b"}), True),
    *(Formula(_as_stored(kind), frozenset({kind}), False) for kind in ("diff", "diff_b", "diff_m")),
)
# The piece whose rows are the rank. A Kronecker product of two whole factors has none.
_RANK_ROWS = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")


def rank_of(pieces: Tensors) -> int | None:
    """Return the rank of the factors of a weight. None: they have none."""
    return next((pieces[kind].shape[0] for kind in _RANK_ROWS if kind in pieces), None)


@dataclass(frozen=True)
class Addition:
    """What one LoRA adds to one parameter."""

    formula: Formula
    pieces: Tensors  # by kind
    scale: float  # alpha over the rank, or 1
    strength: float

    @property
    def path(self) -> Path:
        """The LoRA's file."""
        return next(iter(self.pieces.values())).path

    def of(self, weight: Tensor, read: Reader) -> Tensor:
        """Return the addition to a weight, both in float32.

        With DoRA the sum becomes magnitude x sum / |sum|, over rows or columns. What is added is
        the difference to that.
        """
        pieces = {kind: read(stored).float() for kind, stored in self.pieces.items()}
        added = self.scale * self.formula.multiply(pieces).reshape(weight.shape)
        if "magnitude" in pieces:
            total, magnitude = weight + added, _shape_magnitude(pieces["magnitude"], weight.shape)
            over = [dim for dim in range(weight.ndim) if magnitude.shape[dim] == 1]
            added = magnitude * total / total.norm(dim=over, keepdim=True) - weight
        return self.strength * added


def _shape_magnitude(magnitude: Tensor, shape: Sequence[int]) -> Tensor:
    """Give DoRA's magnitude as many dimensions as the weight: one value per output, or per input.

    PEFT has [outputs], or [1, outputs, 1, ...] for convolutions; LyCORIS [outputs, 1, ...] or
    [1, inputs, 1, ...].
    """
    ones = [1] * (len(shape) - 2)
    if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == shape[1]:
        return magnitude.reshape(1, shape[1], *ones)
    return magnitude.reshape(shape[0], 1, *ones)


def fits(pieces: Tensors, formula: Formula, shape: Sequence[int]) -> bool:
    """Tell whether a product has a parameter's shape, by multiplying without values."""
    if not all(math.prod(stored.shape) for stored in formula.take(pieces).values()):
        return False  # a shard of DeepSpeed's
    empty = {
        kind: torch.empty(stored.shape, device="meta")
        for kind, stored in formula.take(pieces).items()
    }
    try:
        product = formula.multiply(empty)
        if "magnitude" in empty:
            _shape_magnitude(empty["magnitude"], shape)
    except (RuntimeError, IndexError):
        return False
    size = math.prod(shape)
    return product.ndim > 0 and product.shape[0] == shape[0] and product.numel() == size


def merge_loras(
    name: str,
    weight: Tensor,
    additions: Sequence[Addition],
    readers: Mapping[Path, Reader],
) -> Tensor:
    """Add what LoRAs add to a weight. The sum is in float32, the result in the weight's dtype.

    Args:
        name: The weight's checkpoint name.
        weight: The weight.
        additions: To it.
        readers: Of the LoRAs' files.

    Raises:
        CheckpointError: The result has a value that is not finite.
    """
    original = weight.float()
    merged = original + sum(one.of(original, readers[one.path]) for one in additions)
    merged = merged.to(weight.dtype)
    if not merged.isfinite().all():
        files = " and ".join(dict.fromkeys(str(one.path) for one in additions))
        raise CheckpointError(
            f"with the LoRA {files}, {name} has values that are not finite in "
            f"{DTYPES[weight.dtype]}: use a smaller strength or --lora-alpha, or other files"
        )
    return merged
