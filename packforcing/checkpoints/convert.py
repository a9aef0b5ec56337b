"""Convert published checkpoints to model folders, which `packforcing export` reads.

Files are recognized, checked by name and shape, and copied. Nothing in a file is ever executed.
Tensors are copied one at a time from mapped files, file after file, so that memory stays near the
size of the largest tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
import torch

from packforcing.checkpoints.containers import container
from packforcing.checkpoints.lora import Lora, LoraSummary, read_lora, split_strength
from packforcing.checkpoints.lora_formulas import Addition, merge_loras
from packforcing.checkpoints.lora_scale import OPTION
from packforcing.checkpoints.published import (
    AUTOENCODER_PARTS,
    DESCRIPTION,
    WEIGHTS,
    ModelFolder,
    published,
    published_config,
)
from packforcing.checkpoints.quantized import BYTES, StoredTensor, check_numbers
from packforcing.checkpoints.reading import (
    Tensors,
    check_dtypes,
    check_shards,
    list_files,
    tensor_reader,
)
from packforcing.checkpoints.recognition import (
    PACK_COMPRESSOR,
    CheckpointPart,
    Records,
    describe_other_autoencoder,
    describe_other_wan,
    describe_part,
    has_diffusers_name,
    recognize_autoencoder,
    recognize_model,
    relative_hint,
    select_autoencoder,
    select_transformer,
    survey_file,
)
from packforcing.config import Config
from packforcing.errors import CheckpointError
from packforcing.files import new_folder, require_disk_space
from packforcing.model import describe_mismatch, weight_shapes
from packforcing.origins import UNKNOWN, Origin
from packforcing.presets import with_autoencoder


class ImportSummary(msgspec.Struct, frozen=True):
    """What `import_checkpoint` did."""

    folder: ModelFolder
    why: str  # the reason for the kind
    lines: list[str] = msgspec.field(name="said")  # what was used of each file
    tensors: int
    bytes: int
    loras: list[LoraSummary] = []


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

    Quantized weights that can be read are dequantized.

    Args:
        files: Torch checkpoints, safetensors and GGUF files, indices of sharded ones, or folders.
            One model, optionally with LoRAs to merge and an autoencoder's weights. A LoRA as
            FILE:STRENGTH is merged with another strength than 1.
        directory: The folder to write, new or empty.
        kind: A name in `PUBLISHED`. None: what `fetch` recorded of the file, or tensors that one
            model alone has.
        entry: Of a file with several sets of weights. None: the one that models of this kind are
            run with.
        vae: Which tiny autoencoder it is, "taehv" or "lighttae". None: what `fetch` recorded.
        lora_alpha: LoRAs that state no alpha are scaled by this over their rank, or by 1 if None.
        on_tensor: Called with the number of tensors written and of all tensors.

    Raises:
        CheckpointError: A file is missing, damaged, unsafe, of another model or not what `fetch`
            recorded, nothing tells which model it is, or a LoRA makes a weight overflow. Nothing is
            left behind.
        MissingDependency: A file is GGUF, and the gguf package is not installed.
        OutputError: The folder cannot be written.
    """
    if kind is not None:
        published(kind)  # raises for an unknown one
    strengths = _list_strengths(files)
    check_shards(strengths)
    surveyed = [part for path in strengths for part in survey_file(path)]
    records, names = Records(), ", ".join(map(str, files))
    _require_transformer(surveyed, names)
    kind, why = (kind, "by --model") if kind else recognize_model(surveyed, records)
    row, config = published(kind), published_config(kind)
    autoencoder = select_autoencoder(surveyed)
    if autoencoder:
        vae = recognize_autoencoder(autoencoder, vae, records)
        config = with_autoencoder(config, vae)
    elif vae is not None:
        raise CheckpointError(f"--vae {vae} has no effect: none of {names} is an autoencoder")
    if row.lora and not any(part.role == "LoRA" for part in surveyed):
        raise CheckpointError(
            f"{kind} is {row.files[0]} with {row.files[1]} merged into it: name both files, or "
            "import the base as another model with --model"
        )
    selected = _select_parts(surveyed, kind, entry, autoencoder)
    tensors = _join_tensors(selected)
    _check_weights(config, kind, tensors, names)
    loras = [
        read_lora(part.path, part.tensors, tensors, lora_alpha, strengths[part.path])
        for part in selected
        if part.role == "LoRA"
    ]
    _check_options(loras, lora_alpha, strengths)
    folder = ModelFolder(
        kind=kind,
        config=config,
        autoencoder=bool(autoencoder),
        made_from=[Path(file).name for file in files],
        origins=tuple(dict.fromkeys(_origin(part, records) for part in selected)),
    )
    copied = {name: stored for name, stored in tensors.items() if name not in PACK_COMPRESSOR}
    size_bytes = _write_folder(Path(directory), folder, copied, loras, on_tensor)
    lines = [_describe_file(path, surveyed, selected) for path in strengths]
    for path in strengths:
        if (what := relative_hint(path)) and why == "by --model":
            lines.append(f"the name {path.name} suggests {what}: imported as {kind} by --model")
    summaries = [lora.summary for lora in loras]
    lines += [summary.line for summary in summaries]
    if autoencoder and vae:
        lines.append(f"the autoencoder is {AUTOENCODER_PARTS[vae]}")
    if len(copied) < len(tensors):
        lines.append(
            "pack_compressor left out: it is not the paper's; the low branch is used alone"
        )
    return ImportSummary(folder, why, lines, len(copied), size_bytes, summaries)


def _list_strengths(files: Sequence[str | os.PathLike[str]]) -> dict[Path, float | None]:
    """List all files that are read, with the strengths that are stated for them."""
    strengths: dict[Path, float | None] = {}
    for file in files:
        path, strength = split_strength(os.fspath(file))
        for part in list_files(Path(path)):
            if part in strengths:
                raise CheckpointError(f"{part} is named twice")
            strengths[part] = strength
    return strengths


def _check_options(
    loras: list[Lora], lora_alpha: float | None, strengths: dict[Path, float | None]
) -> None:
    """Raise `CheckpointError` if an alpha, or the strength of another file, has no effect."""
    for path, strength in strengths.items():
        if strength is not None and path not in [lora.path for lora in loras]:
            raise CheckpointError(f"{path} is no LoRA: leave out its strength :{strength:g}")
    sources = [source for lora in loras for source in lora.summary.sources]
    if lora_alpha is not None and OPTION not in sources:
        stated = f"states its own alpha in {' and '.join(sources)}" if sources else "has no rank"
        raise CheckpointError(
            f"{OPTION} has no effect: "
            + (f"the LoRA {stated}" if loras else "no FILE is a LoRA")
            + ". Leave it out; FILE:STRENGTH changes how much a LoRA adds"
        )


def _require_transformer(parts: list[CheckpointPart], files: str) -> None:
    """Raise `CheckpointError` unless a transformer is there, and nothing that has no place."""
    useful = {part.path for part in parts if part.role in ("transformer", "autoencoder", "LoRA")}
    for part in parts:
        if part.path in useful:
            continue
        remedy = "name the transformer's file"
        if part.role == "text encoder":
            remedy = "'packforcing encode-prompt --encoder' reads it; leave it out here"
        raise CheckpointError(f"{part.path} holds {describe_part(part)}: {remedy}")
    if not any(part.role == "transformer" for part in parts):
        kinds = " and ".join(dict.fromkeys(map(describe_part, parts)))
        raise CheckpointError(
            f"none of {files} holds a transformer: name its checkpoint too (this is {kinds})"
        )


def _select_parts(
    parts: list[CheckpointPart], kind: str, entry: str | None, autoencoder: CheckpointPart | None
) -> list[CheckpointPart]:
    """Select what is used of each file."""
    selected = []
    for path in dict.fromkeys(part.path for part in parts):
        of_file = [part for part in parts if part.path == path]
        if transformers := [part for part in of_file if part.role == "transformer"]:
            selected.append(select_transformer(transformers, kind, entry))
        selected += [part for part in of_file if part.role == "LoRA"]
        if autoencoder in of_file:
            selected.append(autoencoder)
    return selected


def _origin(part: CheckpointPart, records: Records) -> Origin:
    """Return where weights are from and their license, as far as `fetch` recorded it."""
    name = f"LoRA {part.path.name}" if part.role == "LoRA" else part.role
    if record := records[part.path]:
        return Origin(name, record[1].source, record[1].license)
    return Origin(name, "", UNKNOWN)


def _join_tensors(selected: list[CheckpointPart]) -> Tensors:
    """Collect the tensors of the model and the autoencoder, by checkpoint name."""
    joined: Tensors = {}
    for part in selected:
        for name, stored in part.tensors.items() if part.role != "LoRA" else ():
            if other := joined.get(f"{part.role}.{name}"):
                raise CheckpointError(
                    f"both {other.path} and {part.path} hold {name}: name the files of one model"
                )
            joined[f"{part.role}.{name}"] = stored
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
        of_part: dict[str, Tensors] = {"transformer": {}, "autoencoder": {}}
        for name, stored in tensors.items():
            part, _, rest = name.partition(".")
            of_part[part][rest] = stored
        other = describe_other_wan(of_part["transformer"], config) or describe_other_autoencoder(
            of_part["autoencoder"], config
        )
        what = f" holds {other}, which is none of the models here: it" if other else ""
        raise CheckpointError(f"{files}{what} does not hold the weights of {kind} {problems}")
    check_dtypes(tensors.values())


def _describe_file(
    path: Path, surveyed: list[CheckpointPart], selected: list[CheckpointPart]
) -> str:
    """Say in a line what of a file was used, and how it is stored."""
    used = [part for part in selected if part.path == path]
    unused = [
        part.entry or part.role for part in surveyed if part.path == path and part not in used
    ]
    tensors = [stored for part in used for stored in part.tensors.values()]
    stored_as = sorted({stored.storage for stored in tensors if stored.storage})
    parts = ", ".join(
        f"{part.role}, {len(part.tensors)} tensors" + (f" of '{part.entry}'" if part.entry else "")
        for part in used
    )
    containers = {"torch": "torch checkpoint", "gguf": "GGUF"}
    kind = container(path)
    return (
        f"{path.name}: {parts or 'not used'}"
        + (f" (not {', '.join(unused)})" if unused else "")
        + f", {containers.get(kind, kind)}"
        + (", diffusers' names" if any(map(has_diffusers_name, tensors)) else "")
        + (f", dequantized from {', '.join(stored_as)}" if stored_as else "")
    )


def _write_folder(
    directory: Path,
    folder: ModelFolder,
    tensors: Tensors,
    loras: list[Lora],
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
    loras: list[Lora],
    on_tensor: Callable[[int, int], None] | None,
) -> None:
    """Copy tensors into one safetensors file, file after file, and merge the LoRAs.

    The library's writer would need all of them in memory. Wider dtypes come first, which aligns
    every tensor.
    """
    order = sorted(tensors.items(), key=lambda item: (-BYTES[item[1].dtype], str(item[1].path)))
    metadata = {"format": "pt", "model": kind}
    if loras:
        metadata["loras"] = "\n".join(lora.summary.line for lora in loras)
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, stored in order:
        begin, end = end, end + _tensor_bytes(stored)
        header[name] = {
            "dtype": stored.dtype, "shape": stored.shape, "data_offsets": (begin, end)
        }  # fmt: skip
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    additions: dict[str, list[Addition]] = defaultdict(list)
    for lora in loras:
        for name, added in lora.additions.items():
            additions[name] += added
    lora_readers = {lora.path: tensor_reader(lora.path) for lora in loras}
    written = 0
    with path.open("wb") as out:
        out.write(len(encoded).to_bytes(8, "little") + encoded)
        for file, group in groupby(order, key=lambda item: item[1].path):
            read = tensor_reader(file)
            for name, stored in group:
                tensor = read(stored)
                check_numbers(stored, tensor)
                if name in additions:
                    tensor = merge_loras(name, tensor, additions[name], lora_readers)
                out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                written += 1
                if on_tensor:
                    on_tensor(written, len(order))
