"""Quantized weights in checkpoints: fp8 with its scales is read, other kinds are named.

fp8 comes with one scale per tensor, per output channel or per block, under several names; a weight
is its value times its scale, in float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from packforcing.checkpoints.names import split_names
from packforcing.errors import CheckpointError

# dtypes that weights may have: safetensors' names, and bytes per value
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BYTES = {"F32": 4, "F16": 2, "BF16": 2}
# Their values are exact in float16
FP8 = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read."""

    path: Path
    name: str  # in the file; the keys of nested dictionaries come first, joined with dots
    shape: tuple[int, ...]
    dtype: str  # as it is read: safetensors' name
    storage: str = ""  # how it is stored, where that differs: "F8_E4M3", "Q4_K"
    scale: StoredTensor | None = None  # of the stored values


# A weight's scale has the name of its layer and one of these: ComfyUI's old and new, lightx2v and
# compressed-tensors (as ComfyUI's new), DeepSeek
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
# Beside scaled weights, and not needed for them: scales of activations, ComfyUI's markers
_MARKER = re.compile(r"(?:^|\.)(?:scaled_fp8|comfy_quant|scale_input|input_scale|input_scale_inv)$")
_CLAIM = re.compile(r"(?:^|\.)(?:scaled_fp8|comfy_quant)$")
COMFY_QUANT, COMFY_METADATA = ".comfy_quant", "_quantization_metadata"
COMFY_FP8 = {"float8_e4m3fn", "float8_e5m2"}

# Other kinds of quantization by the ends of names that they alone have
_FOREIGN = [
    (re.compile(pattern), kind)
    for pattern, kind in (
        (r"\.quant_state\.bitsandbytes__nf4$", "bitsandbytes nf4"),
        (r"\.quant_state\.bitsandbytes__fp4$", "bitsandbytes fp4"),
        (r"\.(absmax|quant_map|nested_absmax|nested_quant_map)$", "bitsandbytes 4-bit"),
        (r"\.(SCB|weight_format)$", "bitsandbytes int8"),
        (r"\.weight\._(data|scale|shift)$", "optimum-quanto"),
        (r"\.(wscales|wcscales|smooth_orig|proj_down)$", "SVDQuant (Nunchaku)"),
        (r"\.(qzeros|g_idx)$", "GPTQ or AWQ"),
        (r"\.(qweight|scales)$", "GPTQ, AWQ or SVDQuant"),
        (r"\.(W_q|W_q\.packing)$", "HQQ"),
        (r"\.weight_(scale_2|global_scale)$", "NVFP4"),
        (r"\.weight_(packed|shape)$", "compressed-tensors, packed"),
        (r"\.(weight_s_rel|weight_s_channel|weight_codebook)$", "ComfyUI's 4-bit"),
        (r"\.(pre_quant_scale)$", "smoothed (ModelOpt)"),
    )
]  # fmt: skip
ORIGINAL = "use the original weights, in float32, float16, bfloat16 or fp8"


def join_scales(
    path: Path,
    tensors: list[StoredTensor],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> list[StoredTensor]:
    """Give each fp8 weight of a file its scale, and leave out what is no weight.

    Args:
        path: The file.
        tensors: As they are stored.
        metadata: Of a safetensors file.
        read: Reads one of the tensors by name, as it is stored.

    Returns:
        The weights: with the dtype that they are read in, and how they are stored.

    Raises:
        CheckpointError: Another kind of quantization, or a weight's scale is missing.
    """
    by_name = {stored.name: stored for stored in tensors}
    _refuse_foreign(path, by_name, metadata, read)
    scales: dict[str, StoredTensor] = {}
    for name, stored in by_name.items():
        if _is_scale(name):
            weight = _partner(name)
            if weight in scales:
                raise CheckpointError(
                    f"{path} holds two scales of {weight}, {scales[weight].name} and {name}: "
                    f"{ORIGINAL}"
                )
            scales[weight] = stored
    names = split_names(by_name)  # one entry may be scaled and another cast
    scaled_entries = {names[name][0] for name in by_name if _is_scale(name) or _CLAIM.search(name)}
    weights = []
    for name, stored in by_name.items():
        partner = by_name.get(_partner(name)) if _is_scale(name) else None
        if _MARKER.search(name) or (partner and partner.dtype in FP8.values()):
            continue
        if stored.dtype not in FP8.values():
            weights.append(stored)
            continue
        scale = scales.get(name)
        if scale is None and names[name][0] in scaled_entries and len(stored.shape) == 2:
            raise CheckpointError(
                f"{path} holds {name} in fp8 without its scale, and other weights with one: "
                f"the file is incomplete; {ORIGINAL}"
            )
        if scale is not None:
            _check_scale(stored, scale)
        dtype = "F32" if scale else "F16"
        weights.append(replace(stored, dtype=dtype, storage=stored.dtype, scale=scale))
    return weights


def apply_scale(stored: StoredTensor, values: Tensor, scale: Tensor) -> Tensor:
    """Multiply stored values [out, in] with a scale per tensor, channel or block, in float32.

    Raises:
        CheckpointError: A scale is not finite.
    """
    scale = scale.float()
    if not scale.isfinite().all():
        raise CheckpointError(
            f"{stored.path} holds a scale of {stored.name} that is not finite: download it again"
        )
    values = values.float()
    if scale.numel() == 1:
        return values.mul_(scale.reshape(()))
    rows, columns = scale.shape if scale.ndim == 2 else (len(scale), 1)
    blocks = values.view(rows, values.shape[0] // rows, columns, values.shape[1] // columns)
    return blocks.mul_(scale.view(rows, 1, columns, 1)).view(values.shape)


def check_numbers(stored: StoredTensor, values: Tensor) -> None:
    """Raise `CheckpointError` if a weight has values that are not finite."""
    if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
        raise CheckpointError(
            f"{stored.path} holds {stored.name} with values that are not finite: it is damaged, "
            "download it again"
        )


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in _SCALES


def _partner(scale_name: str) -> str:
    """Name the weight that a scale belongs to."""
    layer = scale_name.rpartition(".")[0]
    return f"{layer}.weight" if layer else "weight"


def _check_scale(stored: StoredTensor, scale: StoredTensor) -> None:
    """Raise `CheckpointError` unless a scale is a float per tensor, channel or block."""
    shape, sizes = scale.shape, stored.shape
    fits = all(size == 1 for size in shape)
    if len(sizes) == 2 and len(shape) in (1, 2) and all(shape):
        rows, columns = shape if len(shape) == 2 else (*shape, 1)
        fits |= sizes[0] % rows == 0 and sizes[1] % columns == 0
        fits &= len(shape) == 2 or rows in (1, sizes[0])
    if not fits or scale.dtype not in BYTES:
        raise CheckpointError(
            f"{stored.path} holds {stored.name} {stored.shape} in fp8 with a scale {shape} as "
            f"{scale.dtype}, which is none per tensor, channel or block: {ORIGINAL}"
        )


def _refuse_foreign(
    path: Path,
    by_name: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> None:
    """Raise `CheckpointError` for quantization of another kind than fp8, by its name."""
    kinds = [(kind, name) for pattern, kind in _FOREIGN for name in by_name if pattern.search(name)]
    for layer, settings in _comfy_layers(path, by_name, metadata, read):
        kind = str(settings.get("format"))
        if kind not in COMFY_FP8:
            kinds.append((f"ComfyUI's {kind}", f"{layer}.weight"))
        elif settings.get("convrot"):
            kinds.append(("rotated fp8", f"{layer}.weight"))
        elif not any(f"{layer}.{scale}" in by_name for scale in _SCALES):
            raise CheckpointError(
                f"{path} is incomplete: it lists {layer} as {kind} and lacks its scale: {ORIGINAL}"
            )
    integers = {"I8": "int8", "U8": "8-bit or packed", "F4": "fp4", "I4": "int4", "U4": "int4"}
    for name, stored in by_name.items():
        if stored.dtype in integers and name.endswith(".weight"):
            kinds.append((f"{integers[stored.dtype]}", name))
    if kinds:
        kind, name = kinds[0]
        raise CheckpointError(
            f"{path} is quantized as {kind} ({name}), which is not read here: {ORIGINAL}"
        )


def _comfy_layers(
    path: Path,
    by_name: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    read: Callable[[str], Tensor],
) -> list[tuple[str, dict]]:
    """List the layers that ComfyUI's metadata or markers call quantized, and how."""
    layers: dict[str, dict] = {}
    try:
        if COMFY_METADATA in metadata:
            for layer, settings in json.loads(metadata[COMFY_METADATA])["layers"].items():
                layers[layer] = settings if isinstance(settings, dict) else {"format": settings}
        for name, stored in by_name.items():
            if name.endswith(COMFY_QUANT) and len(stored.shape) == 1 and stored.shape[0] < 4096:
                text = bytes(read(name).to(torch.uint8).tolist())
                layers[name.removesuffix(COMFY_QUANT)] = dict(json.loads(text))
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} says in a damaged way how it is quantized: {ORIGINAL}"
        ) from error
    # some converters write the names without the prefix of the model
    names = {name.removesuffix(".weight") for name in by_name}
    complete = {}
    for layer, settings in layers.items():
        matches = [name for name in names if name == layer or name.endswith(f".{layer}")]
        complete[matches[0] if len(matches) == 1 else layer] = settings
    return list(complete.items())
