"""LoRA files: matched with a model by name, checked by shape, summed up in a line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from packforcing.checkpoints.lora_formulas import FORMULAS, Addition, Formula, fits
from packforcing.checkpoints.lora_names import (
    ParameterIndex,
    describe_other_model,
    is_text_encoder,
    parse_piece,
    unmergeable,
)
from packforcing.checkpoints.lora_scale import OPTION, Scales
from packforcing.checkpoints.reading import Tensors
from packforcing.errors import CheckpointError

LONGLIVE_ENTRY = "generator_lora"  # of LongLive's torch checkpoint
_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"} | {
    f"torch.{name}" for name in ("float64", "float8_e4m3fn", "float8_e5m2")
}


class LoraSummary(msgspec.Struct, frozen=True):
    """How a LoRA file was merged."""

    file: str
    parameters: int  # that it was added to
    strength: float
    scales: list[float]  # alpha over the rank, each once; empty if it has differences alone
    sources: list[str]  # where alpha is stated
    assumed: int  # number of modules whose alpha is stated nowhere, so that their scale is 1
    unused: list[str]  # tensors that were not applied: of a text encoder, of another entry

    @property
    def line(self) -> str:
        """The summary in a line."""
        words = f"{self.file}: LoRA merged into {self.parameters} weights"
        if self.scales:
            ends = [f"{scale:g}" for scale in self.scales]
            words += " at scale " + (
                ", ".join(ends) if len(ends) < 5 else f"{ends[0]} to {ends[-1]}"
            )
        if self.strength != 1:
            words += f", strength {self.strength:g}"
        if self.sources:
            words += f"; alpha is from {' and '.join(self.sources)}"
        if self.assumed:
            words += (
                f"; assumed for {self.assumed} modules: they have no alpha, so it is taken to be "
                f"the rank ({OPTION} states another)"
            )
        if self.unused:
            words += f"; not applied: {len(self.unused)} tensors like {self.unused[0]}"
        return words


@dataclass(frozen=True)
class Lora:
    """A LoRA file that fits a model."""

    path: Path
    additions: dict[str, list[Addition]]  # by checkpoint name
    summary: LoraSummary


def split_strength(file: str) -> tuple[str, float | None]:
    """Split FILE:STRENGTH. A file of the whole name goes first, and C:\\x.safetensors is a path.

    Returns:
        The path, and the strength or None.

    Raises:
        CheckpointError: The strength of an existing file is not a finite number.
    """
    path, colon, number = file.rpartition(":")
    if not colon or Path(file).exists():
        return file, None
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        if Path(path).exists() and path:
            raise CheckpointError(f"'{number}' is not a strength for {path}: use a number like 0.8")
        return file, None
    is_drive = len(path) == 1 and not Path(path).exists()
    return (file, None) if is_drive or not path else (path, strength)


def read_lora(
    path: Path, tensors: Tensors, model: Tensors, alpha: float | None, strength: float | None
) -> Lora:
    """Check that a LoRA fits a model, and read its scales.

    Args:
        path: The LoRA's file.
        tensors: The LoRA's tensors, by their names in the file.
        model: The model's tensors, by checkpoint name.
        alpha: Scale modules without an alpha by this over their rank. None: by 1.
        strength: Multiplies whatever is added. None: 1.

    Raises:
        CheckpointError: Names, shapes or dtypes do not fit, the addition is of a kind that is not
            merged, or places that state its scale do not agree.
    """
    shapes = {
        name.removeprefix("transformer."): stored.shape
        for name, stored in model.items()
        if name.startswith("transformer.")
    }
    strength = 1.0 if strength is None else strength
    names, unused = _match_names(path, tensors, shapes)
    pieces = {
        parameter: {kind: tensors[name] for kind, name in by_kind.items()}
        for parameter, by_kind in names.items()
    }
    formulas = {parameter: _select_formulas(path, by_kind) for parameter, by_kind in names.items()}
    _check_shapes(path, pieces, formulas, shapes)
    scales = Scales(path, alpha)
    additions: dict[str, list[Addition]] = {}
    for parameter, chosen in formulas.items():
        module, _, _ = parameter.rpartition(".")
        for formula in chosen:
            scale = 1.0
            if formula.is_scaled:
                if f"{module}.weight" not in pieces:
                    name = names[parameter]["up_b"]
                    raise CheckpointError(f"the LoRA {path} has a bias without factors: {name}")
                scale = scales.of(module, pieces[f"{module}.weight"])
            addition = Addition(formula, formula.take(pieces[parameter]), scale, strength)
            additions.setdefault(f"transformer.{parameter}", []).append(addition)
    summary = LoraSummary(
        path.name, len(additions), strength, sorted(set(scales.by_module.values())),
        list(scales.sources), scales.assumed, unused,
    )  # fmt: skip
    return Lora(path, additions, summary)


def _match_names(
    path: Path, tensors: Iterable[str], parameters: Iterable[str]
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Match a LoRA's names with a model's parameters.

    Returns:
        For each parameter its pieces' names by kind, and the names of what is not applied.
    """
    index = ParameterIndex(parameters)
    by_entry: dict[str, dict[str, dict[str, str]]] = {}
    unknown, unused = [], []
    for name in tensors:
        if is_text_encoder(name):
            unused.append(name)
            continue
        piece = None if unmergeable(name) else parse_piece(name)
        match = index.find(piece) if piece else None
        if piece is None or match is None:
            unknown.append(name)
            continue
        by_kind = by_entry.setdefault(match[0], {}).setdefault(match[1], {})
        if other := by_kind.get(piece.kind):
            raise CheckpointError(
                f"the LoRA {path} holds both {other} and {name}: keep one adapter"
            )
        by_kind[piece.kind] = name
    if unknown:
        _refuse_names(path, unknown, len(unknown) + sum(map(_count, by_entry.values())))
    if not by_entry:
        raise CheckpointError(
            f"the LoRA {path} is for a text encoder alone, which is not changed here: {unused[0]}"
        )
    entry = LONGLIVE_ENTRY if LONGLIVE_ENTRY in by_entry else next(iter(by_entry))
    left_out = [one for one in by_entry if one != entry]
    if left_out and entry != LONGLIVE_ENTRY:
        raise CheckpointError(
            f"the LoRA {path} holds several: {', '.join(map(repr, by_entry))}; save the one for "
            "this model into a file of its own"
        )
    unused += [
        name for one in left_out for by_kind in by_entry[one].values() for name in by_kind.values()
    ]
    return by_entry[entry], unused


def _count(by_parameter: dict[str, dict[str, str]]) -> int:
    return sum(map(len, by_parameter.values()))


def _refuse_names(path: Path, unknown: list[str], total: int) -> NoReturn:
    for name in unknown:
        if words := unmergeable(name):
            raise CheckpointError(f"the LoRA {path} cannot be merged: it has {words}: {name}")
    other = describe_other_model(unknown)
    raise CheckpointError(
        f"the LoRA {path} does not fit the model"
        + (f", it is for {other}" if other else "")
        + f": {len(unknown)} of its {total} tensors have no place in it: {_shorten(unknown)}"
    )


def _shorten(problems: list[str]) -> str:
    more = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
    return "; ".join(problems[:10]) + more


def _select_formulas(path: Path, names: dict[str, str]) -> list[Formula]:
    """Select the formulas that use all pieces of a parameter."""
    formulas = [formula for formula in FORMULAS if formula.pieces <= names.keys()]
    used = set[str]().union(*(formula.pieces for formula in formulas))
    if any(formula.is_scaled for formula in formulas):
        used |= {"alpha", "magnitude"}
    if missing := [name for kind, name in names.items() if kind not in used]:
        raise CheckpointError(
            f"the LoRA {path} is incomplete: {missing[0]} needs its other factors beside it"
        )
    return formulas


def _check_shapes(
    path: Path,
    pieces: Mapping[str, Tensors],
    formulas: Mapping[str, list[Formula]],
    shapes: Mapping[str, Sequence[int]],
) -> None:
    """Raise `CheckpointError` unless all products have the shapes of what they are added to."""
    problems, width = [], None
    for parameter, chosen in formulas.items():
        for stored in pieces[parameter].values():
            if stored.dtype not in _FLOATS and math.prod(stored.shape) > 1:
                raise CheckpointError(
                    f"{path} holds {stored.name} as {stored.dtype}; only floats can be merged: use "
                    "the original LoRA"
                )
        for formula in chosen:
            if not fits(pieces[parameter], formula, shapes[parameter]):
                taken = formula.take(pieces[parameter])
                parts = " and ".join(f"{one.name} {one.shape}" for one in taken.values())
                problems.append(f"{parts} do not make {tuple(shapes[parameter])}")
                down = pieces[parameter].get("down")
                if down and parameter.endswith("_attn.q.weight") and len(down.shape) > 1:
                    width = down.shape[1]
    if problems:
        other = describe_other_model([], width)
        raise CheckpointError(
            f"the LoRA {path} does not fit the model"
            + (f", it is for {other}" if other else "")
            + f": {_shorten(problems)}"
        )
