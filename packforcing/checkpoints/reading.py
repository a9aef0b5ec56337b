"""Read the tensors of checkpoint files: torch checkpoints, safetensors, GGUF, sharded folders.

Nothing in a file is ever executed. Files are mapped, so that a tensor is read when it is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from packforcing.checkpoints.containers import AGAIN, check_json, container, one_line
from packforcing.checkpoints.gguf_file import FLOATS, check_gguf_dtypes, gguf_reader, read_gguf
from packforcing.checkpoints.quantized import (
    DTYPES,
    StoredTensor,
    apply_scale,
    join_scales,
)
from packforcing.checkpoints.torch_file import check_torch_file, load_torch, torch_dtype
from packforcing.errors import CheckpointError

Tensors = dict[str, StoredTensor]  # by checkpoint name

SHARD = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.(\w+)$")
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".pt", ".pth", ".bin", ".ckpt")


def list_files(path: Path) -> list[Path]:
    """List the files that a path stands for.

    Args:
        path: A file, the index of a sharded checkpoint, or a folder with either. Of a diffusers
            pipeline's folder, its transformer.

    Raises:
        CheckpointError: A file is missing, or the index is damaged.
    """
    if path.is_dir():
        return list_files_of_folder(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if path.name.endswith(".index.json") or container(path) == "json":
        return _shards(path)
    return [path]


def list_files_of_folder(folder: Path) -> list[Path]:
    """List the weights in a folder: those of its index, else its safetensors, else its only file.

    Raises:
        CheckpointError: There are none, or several models.
    """
    if (folder / "model_index.json").is_file():
        if (folder / "transformer").is_dir():
            return list_files_of_folder(folder / "transformer")
        raise CheckpointError(
            f"{folder} is a diffusers pipeline without its 'transformer' folder: download that too"
        )
    if (folder / "model.json").is_file():
        raise CheckpointError(
            f"{folder} is a model folder already: pass it to 'packforcing export --weights'"
        )
    if (folder / ".metadata").is_file() or any(folder.glob("*.distcp")):
        raise CheckpointError(
            f"{folder} is a distributed checkpoint: convert it with "
            "'python -m torch.distributed.checkpoint.format_utils dcp_to_torch'"
        )
    indices = sorted(folder.glob("*.index.json"))
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(f"the folder {folder} holds several checkpoints: name one of {names}")
    if indices:
        return _shards(indices[0])
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    safetensors = [file for file in files if file.suffix == ".safetensors"]
    if len(files) > 1 and not safetensors:
        names = ", ".join(file.name for file in files)
        raise CheckpointError(f"the folder {folder} holds several files: name one of {names}")
    if not files:
        inside = [file for file in sorted(folder.glob("*/*")) if file.suffix in WEIGHT_SUFFIXES]
        where = f" ({', '.join(sorted({file.parent.name for file in inside}))} in it do)"
        raise CheckpointError(
            f"the folder {folder} holds no .safetensors file{where if inside else ''}: name a file"
        )
    return safetensors or files


def _shards(index: Path) -> list[Path]:
    """List the shards that an index names, all of which have to be there."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        shards = [index.parent / name for name in names]
        if not names or any(Path(name).name != name or not name.isprintable() for name in names):
            raise ValueError("no names of files")
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        check_json(index)  # a pointer, or a server's page
        raise CheckpointError(f"{index} is not the index of a sharded checkpoint") from error
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(
            f"{index} lists files that are not beside it: {', '.join(missing)}: download them too"
        )
    return shards


def check_shards(files: Iterable[Path]) -> None:
    """Raise `CheckpointError` if files are shards by their names, and some are missing."""
    numbers: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if match := SHARD.match(file.name):
            key = file.parent, match[1], int(match[3])
            numbers.setdefault(key, set()).add(int(match[2]))
    for (folder, stem, count), present in numbers.items():
        if missing := sorted(set(range(1, count + 1)) - present):
            raise CheckpointError(
                f"{folder / stem} comes in {count} shards, and these are missing: "
                f"{', '.join(f'{number:05}' for number in missing[:5])}: name the folder, or all"
            )


def list_tensors(path: Path) -> list[StoredTensor]:
    """List the tensors of a file, in its order, without reading them.

    Raises:
        CheckpointError: The file is damaged, unsafe, of another format or quantized in a way that
            is not read.
    """
    kind = container(path)
    metadata: dict[str, str] = {}
    get: Callable[[str], Tensor] | None = None
    if kind == "gguf":
        tensors = read_gguf(path).tensors
        check_gguf_dtypes(path, tensors)
        listed = [
            StoredTensor(path, one.name, one.shape, one.dtype)
            if one.dtype in FLOATS
            else StoredTensor(path, one.name, one.shape, "F32", one.dtype)
            for one in tensors
        ]
    elif kind == "torch":
        check_torch_file(path)
        entries = load_torch(path)
        listed = [
            StoredTensor(path, name, tuple(tensor.shape), torch_dtype(tensor))
            for name, tensor in entries.items()
        ]
        get = entries.__getitem__
    else:
        file = _open_safetensors(path)
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        listed = [
            StoredTensor(path, name, tuple(one.get_shape()), one.get_dtype())
            for name, one in slices.items()
        ]
        metadata, get = file.metadata() or {}, file.get_tensor
    for stored in listed:
        if not stored.name.isprintable():  # messages name tensors
            raise CheckpointError(
                f"{path} is damaged: it holds a tensor named {one_line(stored.name)!r}: {AGAIN}"
            )
    return join_scales(path, listed, metadata, get) if get else listed


def tensor_reader(path: Path) -> Callable[[StoredTensor], Tensor]:
    """Return a function that reads tensors of one file, dequantized to their dtype.

    The file is mapped as long as the function lives.
    """
    kind = container(path)
    if kind == "gguf":
        read = gguf_reader(path)
        return lambda stored: read(stored.name)
    if kind == "torch":
        entries = load_torch(path)
        get: Callable[[str], Tensor] = entries.__getitem__
    else:
        get = _open_safetensors(path).get_tensor

    def read_scaled(stored: StoredTensor) -> Tensor:
        tensor = get(stored.name)
        if stored.scale:
            return apply_scale(stored, tensor, get(stored.scale.name))
        return tensor.half() if stored.storage else tensor

    return read_scaled


def check_dtypes(tensors: Iterable[StoredTensor]) -> None:
    """Raise `CheckpointError` unless every tensor has one of `DTYPES`."""
    for stored in tensors:
        if stored.dtype not in DTYPES.values():
            raise CheckpointError(
                f"{stored.path} holds {stored.name} as {stored.dtype}; only "
                f"{', '.join(DTYPES.values())} can be read: use the original weights"
            )


def _open_safetensors(path: Path) -> Any:
    """Map a safetensors file."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path}, which is damaged: {_missing_bytes(path) or one_line(error)}: "
            f"{AGAIN}"
        ) from error


def _missing_bytes(path: Path) -> str:
    """Say how much of a safetensors file is missing, "" if nothing is or its header is damaged."""
    size_bytes = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size_bytes - 8:
                return f"its header of {length} bytes is cut off"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name[:2] != "__"]
        announced = 8 + length + max(ends)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError):
        return ""
    return f"cut off after {size_bytes:,} of {announced:,} bytes" if announced > size_bytes else ""
