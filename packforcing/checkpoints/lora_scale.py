"""The scale of a LoRA: what its trainer stored of alpha and rank, in tensors, metadata and configs.

These may state it, and those that do must agree: a tensor `.alpha` per module (kohya, musubi-tuner,
LyCORIS, OneTrainer), metadata inside the file (kohya's ss_network_alpha, diffusers'
lora_adapter_metadata, lora_alpha and rank one by one), numbers beside the tensors of a torch
checkpoint, and adapter_config.json beside the file (PEFT, diffusion-pipe). The scale is alpha over
the rank, or over its square root where a config says so (rank-stabilized).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import torch
from safetensors import safe_open

from packforcing.checkpoints.containers import container
from packforcing.checkpoints.lora_formulas import rank_of
from packforcing.checkpoints.lora_names import parse_piece
from packforcing.checkpoints.names import diffusers_name
from packforcing.checkpoints.reading import Tensors, tensor_reader
from packforcing.errors import CheckpointError

OPTION = "--lora-alpha"  # states the alpha of modules that have none

CONFIG_NAME = "adapter_config.json"
WEIGHT_NAMES = ("adapter_model.safetensors", "adapter_model.bin")  # the files that PEFT saves
TOLERANCE = 0.01  # relative: an alpha may have been stored in bfloat16

# The names under which trainers store the same two numbers, alone or in a dictionary
_SPELLINGS = {
    "lora_alpha": "lora_alpha", "alpha": "lora_alpha", "network_alpha": "lora_alpha",
    "ss_network_alpha": "lora_alpha", "linear_alpha": "lora_alpha",
    "r": "r", "rank": "r", "lora_rank": "r", "lora_dim": "r", "network_dim": "r",
    "ss_network_dim": "r", "linear_dim": "r",
}  # fmt: skip
# kohya's arguments that give modules alphas of their own, beside ss_network_alpha
_PER_MODULE = re.compile(r"alpha|block_dims|conv_dim|conv_block|reg_dims|rs_?lora|preset")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal")  # others change the weights that are added to
_UNMERGEABLE_SETTINGS = (
    "fan_in_fan_out", "modules_to_save", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora", "kasa_config",
)  # fmt: skip


class AdapterConfig(msgspec.Struct, frozen=True):
    """The settings of PEFT's LoRA, LoHa and LoKr that decide what is added. Others are ignored."""

    peft_type: str | None = "LORA"
    r: int | None = None
    lora_alpha: float | None = None
    use_rslora: bool | None = False
    rank_pattern: dict[str, int] | None = None  # regular expressions of modules
    alpha_pattern: dict[str, float] | None = None
    target_modules: list[str] | str | None = None
    use_dora: bool | None = False
    bias: str | None = "none"
    init_lora_weights: bool | str | None = True
    fan_in_fan_out: bool | None = False
    modules_to_save: Any = None
    layer_replication: Any = None
    target_parameters: Any = None
    trainable_token_indices: Any = None
    alora_invocation_tokens: Any = None
    use_qalora: Any = None
    use_bdlora: Any = None
    kasa_config: Any = None


@dataclass(frozen=True)
class Statement:
    """A config that is stored with a LoRA."""

    path: Path  # the LoRA's
    where: str  # the config is
    config: AdapterConfig

    def check(self) -> None:
        """Raise `CheckpointError` if the config is of an addition that cannot be merged exactly."""
        config = self.config
        if (config.peft_type or "LORA").upper() not in ("LORA", "LOHA", "LOKR"):
            self._refuse(f"peft_type {config.peft_type}")
        if config.bias not in (None, "none"):
            self._refuse(f"bias '{config.bias}', which replaces the model's biases")
        init = config.init_lora_weights
        if isinstance(init, str) and not init.startswith(_HARMLESS_INITS):
            self._refuse(
                f"init_lora_weights '{init}', which is added to weights that it changed; PEFT can "
                "save it as a plain LoRA"
            )
        for name in _UNMERGEABLE_SETTINGS:
            if value := getattr(config, name):
                self._refuse(f"{name} {value}")

    def _refuse(self, setting: str) -> NoReturn:
        raise CheckpointError(f"the LoRA {self.path} cannot be merged: {self.where} has {setting}")

    def scale(self, names: Sequence[str], rank: int | None) -> float | None:
        """Return the scale of a module, None where the config has no alpha.

        Args:
            names: The module's names, first the one in the file; patterns may be of any.
            rank: That the module's tensors have, None where they are not factored.

        Raises:
            CheckpointError: The config has another rank, or does not target the module.
        """
        config = self.config
        try:
            targeted = _targets(config.target_modules, names)
            config_rank = _matching(config.rank_pattern, names, config.r)
            alpha = _matching(config.alpha_pattern, names, config.lora_alpha)
        except re.error as error:
            raise CheckpointError(
                f"{self.where} of {self.path} has a pattern that is no regular expression: {error}"
            ) from error
        problem = "" if targeted else f"its target_modules leave out '{names[0]}'"
        if rank is not None and config_rank not in (None, rank):
            problem = f"it has rank {config_rank} for '{names[0]}', whose tensors have {rank}"
        if problem:
            raise CheckpointError(f"{self.where} is not of the LoRA {self.path}: {problem}")
        divisor = rank
        if divisor is None and (config.peft_type or "").upper() == "LOKR":
            divisor = config_rank  # PEFT divides by it where others take a scale of 1
        if alpha is None or not divisor:
            return None
        return alpha / (math.sqrt(divisor) if config.use_rslora else divisor)


def _matching(patterns: Mapping[str, Any] | None, names: Sequence[str], default: Any) -> Any:
    """Return the value of the first pattern that matches a name, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            return value
    return default


def _targets(targets: list[str] | str | None, names: Sequence[str]) -> bool:
    """Tell whether PEFT's target_modules include a module."""
    if targets is None or targets == "all-linear":
        return True
    if isinstance(targets, str):
        return any(re.fullmatch(rf"(.*\.)?({targets})", name) for name in names)
    return any(name == one or name.endswith(f".{one}") for name in names for one in targets)


def find_statements(path: Path, metadata: Mapping[str, Any]) -> list[Statement]:
    """Read every config that is stored with a LoRA.

    Args:
        path: The LoRA's file.
        metadata: Of a safetensors file, or what a torch checkpoint holds beside tensors.

    Raises:
        CheckpointError: A config is damaged, or of an addition that cannot be merged exactly.
    """
    contents = [*_from_metadata(metadata)]
    beside = path.parent / CONFIG_NAME
    if beside.is_file() and not _is_of_another_file(path):
        try:
            content = json.loads(beside.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"cannot read {beside}, beside the LoRA {path}: {error}"
            ) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{beside}, beside the LoRA {path}, is no PEFT config")
        contents.append((CONFIG_NAME, content))
    statements = [_statement(path, where, content) for where, content in contents]
    for statement in statements:
        statement.check()
    return statements


def _is_of_another_file(path: Path) -> bool:
    """Tell whether a config beside a file belongs to the file that PEFT saved with it."""
    return path.name not in WEIGHT_NAMES and any(
        (path.parent / name).is_file() for name in WEIGHT_NAMES
    )


def per_module_settings(metadata: Mapping[str, Any]) -> str:
    """Return kohya's arguments that give modules alphas of their own, "" for none."""
    settings = str(metadata.get("ss_network_args", ""))
    return settings if _PER_MODULE.search(settings) else ""


def _from_metadata(metadata: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find dictionaries with an alpha in metadata, and numbers that lie there one by one."""
    single = {}
    for name, value in sorted(metadata.items()):  # safetensors keeps no order
        if name.startswith("ss_") and (name not in _SPELLINGS or per_module_settings(metadata)):
            continue  # kohya's: data sets, arguments
        content = _decode(value)
        if isinstance(content, dict):
            yield from _configs(f"its metadata {name}", content)
        elif content is not None:
            single[name] = content
    plain = _without_prefix(single)
    if any(_SPELLINGS.get(name) == "lora_alpha" for name in plain):
        yield "its metadata", plain


def _configs(where: str, content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Find the dictionaries that have a LoRA's alpha, at any depth."""
    plain = _without_prefix(content)
    if "lora_alpha" in plain or {"lora_alpha", "r"} <= {_SPELLINGS.get(name) for name in plain}:
        yield where, plain
    for name, value in content.items():
        if isinstance(value, dict) and "text" not in str(name):
            yield from _configs(f"{where} {name}", value)


def _without_prefix(content: Mapping[str, Any]) -> dict[str, Any]:
    """Name settings as PEFT does: diffusers puts the component before them."""
    return {
        str(name).removeprefix("transformer.").removeprefix("unet."): value
        for name, value in content.items()
    }


def _decode(value: Any) -> Any:
    """Decode JSON in a string; a string that is none, like kohya's "None", is no setting."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _statement(path: Path, where: str, content: Mapping[str, Any]) -> Statement:
    settings: dict[str, Any] = {}
    for name, value in content.items():
        key = _SPELLINGS.get(name, name)
        if settings.get(key) not in (None, value):
            raise CheckpointError(
                f"{where} of the LoRA {path} has two values of {key}: {settings[key]} and {value}"
            )
        settings[key] = value
    try:
        return Statement(path, where, msgspec.convert(settings, AdapterConfig, strict=False))
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where} of the LoRA {path} is damaged: {error}") from error


class Scales:
    """The scales of a LoRA's modules, and where they are stated."""

    def __init__(self, path: Path, alpha: float | None) -> None:
        """Read what is stored with a LoRA.

        Args:
            path: The LoRA's file.
            alpha: Of modules without one.
        """
        metadata = _read_metadata(path)
        self._path, self._alpha, self._read = path, alpha, tensor_reader(path)
        self._statements = find_statements(path, metadata)
        self._per_module = per_module_settings(metadata)
        self.by_module: dict[str, float] = {}
        self.sources: dict[str, None] = {}
        self.assumed = 0

    def of(self, module: str, pieces: Tensors) -> float:
        """Return the scale of a module.

        Args:
            module: Wan's name of it.
            pieces: Of its weight, by kind.

        Raises:
            CheckpointError: The places that state it do not agree, or have no finite number.
        """
        if module not in self.by_module:
            scales = list(self._stated(module, pieces))
            for where, scale in scales:
                self._check(scale, where, scales[0], pieces)
            self.sources.update(dict.fromkeys(where for where, _ in scales))
            self.assumed += not scales
            self.by_module[module] = scales[0][1] if scales else 1.0
        return self.by_module[module]

    def _stated(self, module: str, pieces: Tensors) -> Iterator[tuple[str, float]]:
        """List the scales that are stated for a module, each with where."""
        rank, first = rank_of(pieces), _first_name(pieces)
        piece = parse_piece(first)
        names = [piece.module if piece else first, module, diffusers_name(module)]
        stated = False
        if stored := pieces.get("alpha"):
            if math.prod(stored.shape) != 1:
                raise CheckpointError(
                    f"{stored.name} in {self._path} is not one number, but {stored.shape}"
                )
            stated, alpha = True, float(self._read(stored).item())
            yield "its .alpha tensors", alpha / rank if rank else 1.0
        for statement in self._statements:
            if statement.config.use_dora and "magnitude" not in pieces:
                raise CheckpointError(
                    f"the LoRA {self._path} is incomplete: {statement.where} says DoRA, and no "
                    f"magnitude is beside {first}"
                )
            scale = statement.scale(names, rank)
            if scale is not None:
                stated = True
                yield statement.where, scale
        if not stated and self._per_module:
            raise CheckpointError(
                f"the LoRA {self._path} has no .alpha for {first}, and its metadata set alpha per "
                f"module: {self._per_module}"
            )
        if not stated and rank and self._alpha is not None:
            yield OPTION, self._alpha / rank

    def _check(self, scale: float, where: str, other: tuple[str, float], pieces: Tensors) -> None:
        """Raise `CheckpointError` unless a scale is a number and agrees with another."""
        problem = ""
        if not math.isfinite(scale) or scale == 0:
            problem = f"has a scale of {scale:g} by {where}"
        elif not math.isclose(scale, other[1], rel_tol=TOLERANCE):
            problem = f"has a scale of {other[1]:g} by {other[0]} and of {scale:g} by {where}"
        if problem:
            raise CheckpointError(f"{_first_name(pieces)} in the LoRA {self._path} {problem}")


def _first_name(pieces: Tensors) -> str:
    """Name one of a weight's factors as the file does."""
    return next(stored.name for kind, stored in pieces.items() if kind != "alpha")


def _read_metadata(path: Path) -> Mapping[str, Any]:
    """Read what a file holds beside tensors: safetensors' metadata, or entries of a checkpoint."""
    kind = container(path)
    if kind == "safetensors":
        with safe_open(path, "pt") as tensors:
            return tensors.metadata() or {}
    if kind != "torch":
        return {}
    content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return {
        str(name): value
        for name, value in content.items()
        if isinstance(value, int | float | str | dict)
    }
