"""Convert published checkpoints to model folders, which `packforcing export` reads.

Files are recognized, checked by name and shape, and copied. Nothing in a file is ever executed.
Tensors are copied one at a time from mapped files, file after file, so that memory stays near the
size of the largest tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch

from packforcing.checkpoints.fetch import recorded_file
from packforcing.checkpoints.lora import Lora, merge_lora, read_lora
from packforcing.checkpoints.published import (
    AUTOENCODER_PARTS,
    DESCRIPTION,
    PARTS,
    WEIGHTS,
    ModelFolder,
    published,
    published_config,
)
from packforcing.checkpoints.reading import (
    BYTES,
    StoredTensor,
    Tensors,
    check_dtypes,
    is_torch,
    list_files,
    tensor_reader,
)
from packforcing.checkpoints.recognition import (
    PACK_COMPRESSOR,
    CheckpointFile,
    has_diffusers_name,
    recognize_autoencoder,
    recognize_model,
    select_entry,
    survey_file,
)
from packforcing.config import Config
from packforcing.errors import CheckpointError
from packforcing.files import new_folder, require_disk_space
from packforcing.model import describe_mismatch, weight_shapes
from packforcing.presets import with_autoencoder


class ImportSummary(msgspec.Struct, frozen=True):
    """What `import_checkpoint` did."""

    folder: ModelFolder
    why: str  # the reason for the kind
    lines: list[str] = msgspec.field(name="said")  # what was used of each file
    tensors: int
    bytes: int


def import_checkpoint(
    files: Sequence[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    kind: str | None = None,
    entry: str | None = None,
    vae: str | None = None,
    lora_alpha: float | None = None,
    on_tensor: Callable[[int, int], None] | None = None,
) -> ImportSummary:
    """Convert a published checkpoint to a model folder. Weights keep their dtypes.

    Args:
        files: Torch checkpoints, safetensors files, indices of sharded ones, or folders of the
            latter two. One model, optionally with LoRAs to merge and an autoencoder's weights.
        directory: The folder to write, new or empty.
        kind: A name in `PUBLISHED`. None: recognized.
        entry: Of a torch checkpoint. None: the one that models of this kind are run with.
        vae: Which tiny autoencoder it is, "taehv" or "lighttae". None: by the file's name.
        lora_alpha: LoRAs without an alpha are scaled by this over their rank, or by 1 if None.
        on_tensor: Called with the number of tensors written and of all tensors.

    Raises:
        CheckpointError: A file is missing, damaged, unsafe, of another model or not what `fetch`
            recorded, or a LoRA makes a weight overflow. Nothing is left behind.
        OutputError: The folder cannot be written.
    """
    if kind is not None:
        published(kind)  # raises for an unknown one
    surveyed = [survey_file(part) for file in files for part in list_files(Path(file))]
    names, roles = ", ".join(map(str, files)), [file.role for file in surveyed]
    if "transformer" not in roles:
        raise CheckpointError(f"none of {names} holds a transformer: name its checkpoint too")
    kind, why = (kind, "by --model") if kind else recognize_model(surveyed)
    row, config = published(kind), published_config(kind)
    autoencoders = [file for file in surveyed if file.role == "autoencoder"]
    if autoencoders:
        vae = recognize_autoencoder(autoencoders, vae)
        config = with_autoencoder(config, vae)
    if row.lora and "LoRA" not in roles:
        raise CheckpointError(
            f"{kind} is {row.files[0]} with {row.files[1]} merged into it: name both files, or "
            "import the base as another model with --model"
        )
    selected = [(file, select_entry(file, kind, entry)) for file in surveyed]
    tensors = _join_tensors(selected)
    _check_weights(config, kind, tensors, names)
    loras = [
        read_lora(file.path, part, tensors, lora_alpha)
        for file, part in selected
        if file.role == "LoRA"
    ]
    records = {file.role: record for file in surveyed if (record := recorded_file(file.path))}
    folder = ModelFolder(
        kind=kind,
        config=config,
        autoencoder=bool(autoencoders),
        made_from=[Path(file).name for file in files],
        source=row.source,
        license=records["transformer"].license if "transformer" in records else row.license,
    )
    copied = {name: stored for name, stored in tensors.items() if name not in PACK_COMPRESSOR}
    size_bytes = _write_folder(Path(directory), folder, copied, loras, on_tensor)
    lines = [_describe_file(file, part) for file, part in selected]
    for lora in loras:
        scales = ", ".join(f"{scale:g}" for scale in sorted({one.scale for one in lora.values()}))
        lines.append(f"LoRA merged into {len(lora)} weights at scale {scales}")
    if autoencoders and vae:
        name = AUTOENCODER_PARTS[vae]
        lines.append(f"the autoencoder is {name}, license of its weights: {PARTS[name].license}")
    if len(copied) < len(tensors):
        lines.append(
            "pack_compressor left out: it is not the paper's; the low branch is used alone"
        )
    return ImportSummary(folder, why, lines, len(copied), size_bytes)


def _join_tensors(selected: list[tuple[CheckpointFile, Tensors]]) -> Tensors:
    """Collect the tensors of the model and the autoencoder, by checkpoint name."""
    joined: Tensors = {}
    for file, tensors in selected:
        for name, stored in tensors.items() if file.role != "LoRA" else ():
            if other := joined.get(f"{file.role}.{name}"):
                raise CheckpointError(
                    f"both {other.path} and {file.path} hold {name}: name the files of one model"
                )
            joined[f"{file.role}.{name}"] = stored
    return joined


def _check_weights(config: Config, kind: str, tensors: Tensors, files: str) -> None:
    """Raise `CheckpointError` unless these are the weights of a model, in a supported dtype."""
    shapes = {name: stored.shape for name, stored in tensors.items()}
    expected = dict(weight_shapes(config))
    if not any(name.startswith("autoencoder.") for name in shapes):
        expected = {
            name: shape for name, shape in expected.items() if name.startswith("transformer.")
        }
    if kind == "packforcing-unofficial":
        expected |= {name: shapes.get(name, ()) for name in PACK_COMPRESSOR}
    if problems := describe_mismatch(shapes, expected):
        raise CheckpointError(f"{files} does not hold the weights of {kind} {problems}")
    check_dtypes(tensors.values())


def _describe_file(file: CheckpointFile, tensors: Tensors) -> str:
    """Say in a line what of a file was used, and how it is stored."""
    first = next(iter(tensors.values()))
    unused = [entry for entry in file.entries if entry != first.entry]
    return (
        f"{file.path.name}: {file.role}, {len(tensors)} tensors"
        + (f" of '{first.entry}'" if first.entry else "")
        + (f" (not {', '.join(unused)})" if unused else "")
        + (", torch checkpoint" if is_torch(file.path) else ", safetensors")
        + (", diffusers' names" if any(map(has_diffusers_name, tensors.values())) else "")
    )


def _write_folder(
    directory: Path,
    folder: ModelFolder,
    tensors: Tensors,
    loras: list[dict[str, Lora]],
    on_tensor: Callable[[int, int], None] | None,
) -> int:
    """Write weights and description; return the bytes of the weights."""
    size_bytes = sum(map(_tensor_bytes, tensors.values()))
    with new_folder(directory) as partial:
        remedy = "make room or choose a folder on another disk"
        require_disk_space(partial, size_bytes, "the model", remedy)
        _write_weights(partial / WEIGHTS, folder.kind, tensors, loras, on_tensor)
        description = msgspec.json.format(msgspec.json.encode(folder), indent=1)
        (partial / DESCRIPTION).write_bytes(description)
    return size_bytes


def _tensor_bytes(stored: StoredTensor) -> int:
    return BYTES[stored.dtype] * math.prod(stored.shape)


def _write_weights(
    path: Path,
    kind: str,
    tensors: Tensors,
    loras: list[dict[str, Lora]],
    on_tensor: Callable[[int, int], None] | None,
) -> None:
    """Copy tensors into one safetensors file, file after file, and merge the LoRAs.

    The library's writer would need all of them in memory. Wider dtypes come first, which aligns
    every tensor.
    """
    order = sorted(tensors.items(), key=lambda item: (-BYTES[item[1].dtype], str(item[1].path)))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "model": kind}}
    end = 0
    for name, stored in order:
        begin, end = end, end + _tensor_bytes(stored)
        header[name] = {
            "dtype": stored.dtype, "shape": stored.shape, "data_offsets": (begin, end)
        }  # fmt: skip
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    lora_readers = {
        file: tensor_reader(file)
        for file in {one.up.path for lora in loras for one in lora.values()}
    }
    written = 0
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for file, group in groupby(order, key=lambda item: item[1].path):
            read = tensor_reader(file)
            for name, stored in group:
                tensor = read(stored)
                for lora in loras:
                    if one := lora.get(name):
                        tensor = merge_lora(name, tensor, one, lora_readers[one.up.path])
                out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                written += 1
                if on_tensor:
                    on_tensor(written, len(order))
