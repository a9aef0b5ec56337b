"""Low-rank additions (LoRAs) to a model's weights: recognized by name, checked, merged."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from packforcing.checkpoints.reading import (
    DTYPES,
    StoredTensor,
    Tensors,
    check_dtypes,
    tensor_reader,
)
from packforcing.errors import CheckpointError
from packforcing.model import describe_mismatch

LORA_NAME = re.compile(r"^(.+)\.(?:(?:lora_(A|B|down|up)(?:\.default)?\.weight)|alpha)$")
LONGLIVE_ENTRY = "generator_lora"  # of LongLive's torch checkpoint


@dataclass(frozen=True)
class Lora:
    """A low-rank addition to one weight: scale x up @ down."""

    up: StoredTensor  # [out, rank]
    down: StoredTensor  # [rank, in]
    scale: float


def read_lora(path: Path, lora: Tensors, model: Tensors, alpha: float | None) -> dict[str, Lora]:
    """Check that a LoRA fits a model, and read its scales.

    Args:
        path: The LoRA's file.
        lora: The LoRA's tensors, by their names in the file.
        model: The model's tensors, by checkpoint name.
        alpha: Scale by this over the rank where the file has no alpha. None: scale by 1.

    Returns:
        The additions, by the checkpoint name of the weight.

    Raises:
        CheckpointError: Shapes, names or dtypes do not fit.
    """
    pieces: Tensors = {}
    for name, stored in lora.items():
        match = LORA_NAME.match(name)
        piece = {"A": "A", "down": "A", "B": "B", "up": "B"}.get(match[2], "alpha") if match else ""
        pieces[f"{match[1]}.{piece}" if match else name] = stored
    expected: dict[str, tuple[int, ...]] = {}
    for module in {name.rpartition(".")[0] for name in pieces}:
        weight = model.get(f"transformer.{module}.weight")
        if weight and len(weight.shape) == 2:
            down = pieces.get(f"{module}.A")
            rank = max(1, down.shape[0]) if down and down.shape else 1
            expected[f"{module}.A"] = (rank, weight.shape[1])
            expected[f"{module}.B"] = (weight.shape[0], rank)
            if own_alpha := pieces.get(f"{module}.alpha"):
                scalar = math.prod(own_alpha.shape) == 1
                expected[f"{module}.alpha"] = own_alpha.shape if scalar else ()
    shapes = {name: stored.shape for name, stored in pieces.items()}
    if problems := describe_mismatch(shapes, expected):
        raise CheckpointError(f"the LoRA {path} does not fit the model {problems}")
    check_dtypes(stored for name, stored in pieces.items() if not name.endswith(".alpha"))
    read = tensor_reader(path)
    additions = {}
    for module in {name.removesuffix(".A") for name in expected if name.endswith(".A")}:
        down, up = pieces[f"{module}.A"], pieces[f"{module}.B"]
        stored_alpha = pieces.get(f"{module}.alpha")
        numerator = read(stored_alpha).item() if stored_alpha else alpha
        scale = 1.0 if numerator is None else numerator / down.shape[0]
        if not math.isfinite(scale):
            raise CheckpointError(f"the alpha of {module} in the LoRA {path} is {numerator}")
        additions[f"transformer.{module}.weight"] = Lora(up, down, scale)
    return additions


def merge_lora(
    name: str, weight: Tensor, lora: Lora, read: Callable[[StoredTensor], Tensor]
) -> Tensor:
    """Add a LoRA to a weight, W + scale B A. The sum is in float32, the result in W's dtype.

    Raises:
        CheckpointError: The result has a value that is not finite.
    """
    addition = lora.scale * (read(lora.up).float() @ read(lora.down).float())
    merged = (weight.float() + addition).to(weight.dtype)
    if not merged.isfinite().all():
        raise CheckpointError(
            f"with the LoRA {lora.up.path} at scale {lora.scale:g}, {name} has values that are "
            f"not finite in {DTYPES[weight.dtype]}: use a smaller --lora-alpha, or other files"
        )
    return merged
