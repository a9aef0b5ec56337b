"""Read the tensors of checkpoint files: torch checkpoints, safetensors, sharded folders.

Nothing in a file is ever executed. Files are mapped, so that a tensor is read when it is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from packforcing.errors import CheckpointError

# dtypes that weights may have: safetensors' names, and bytes per value
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BYTES = {"F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read."""

    path: Path
    entry: str  # of a torch checkpoint; "" where the file is not divided
    name: str  # in the file
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


Tensors = dict[str, StoredTensor]  # by checkpoint name


def list_files(path: Path) -> list[Path]:
    """List the files that a path stands for.

    Args:
        path: A file, the index of a sharded checkpoint, or a folder of safetensors files.

    Raises:
        CheckpointError: A file is missing, or the index is damaged.
    """
    if path.is_dir():
        entries = sorted(path.glob("*.safetensors.index.json"))
        entries = entries or sorted(path.glob("*.safetensors"))
        if not entries:
            raise CheckpointError(f"the folder {path} holds no .safetensors file: name a file")
        return [file for entry in entries for file in list_files(entry)]
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}")
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        names = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
        shards = [path.parent / name for name in names]
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError
    ) as error:  # fmt: skip
        raise CheckpointError(f"{path} is not the index of a sharded checkpoint") from error
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise CheckpointError(f"{path} lists files that are not beside it: {', '.join(missing)}")
    return shards


def list_tensors(path: Path) -> Iterator[StoredTensor]:
    """List the tensors of a file, in its order, without reading them.

    Raises:
        CheckpointError: The file is damaged, unsafe or of another format.
    """
    if is_torch(path):
        for entry, tensors in _load_torch(path).items():
            for name, tensor in tensors.items():
                dtype = DTYPES.get(tensor.dtype, str(tensor.dtype))
                yield StoredTensor(path, entry, name, tuple(tensor.shape), dtype)
        return
    file = _open_safetensors(path)
    for name in file.keys():  # noqa: SIM118
        tensor = file.get_slice(name)
        yield StoredTensor(path, "", name, tuple(tensor.get_shape()), tensor.get_dtype())


def tensor_reader(path: Path) -> Callable[[StoredTensor], Tensor]:
    """Return a function that reads tensors of one file. The file is mapped as long as it lives."""
    if is_torch(path):
        entries = _load_torch(path)
        return lambda stored: entries[stored.entry][stored.name]
    file = _open_safetensors(path)
    return lambda stored: file.get_tensor(stored.name)


def check_dtypes(tensors: Iterable[StoredTensor]) -> None:
    """Raise `CheckpointError` unless every tensor has one of `DTYPES`."""
    for stored in tensors:
        if stored.dtype not in BYTES:
            raise CheckpointError(
                f"{stored.path} holds {stored.name} as {stored.dtype}; only {', '.join(BYTES)} "
                "can be read: use the original weights"
            )


def is_torch(path: Path) -> bool:
    """Tell whether a file is a torch checkpoint in the zip format.

    Raises:
        CheckpointError: The file is a bare pickle, torch's old format, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    # safetensors begins with the length of its header, which may begin like a pickle
    if magic[:1] == b"\x80" and magic[8:] != b"{":
        raise CheckpointError(
            f"{path} is a bare pickle, which could run code and cannot be read in pieces: "
            "ask for safetensors, or save it with a current torch on a machine that trusts it"
        )
    return magic[:4] == b"PK\x03\x04"


def _load_torch(path: Path) -> dict[str, dict[str, Tensor]]:
    """Map the entries of a torch checkpoint; the entry is "" if the file is not divided."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if not unsafe:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # a damaged pickle calls torch's functions with any arguments
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot read {path}, which is damaged or not a torch checkpoint: {reason}"
        ) from error
    if unsafe:
        raise CheckpointError(
            f"{path} would run code when loaded ({', '.join(sorted(unsafe)[:3])}) and is "
            "refused: ask for safetensors"
        )
    if not isinstance(content, Mapping):
        content = {}
    entries = {
        str(entry): {
            name: value
            for name, value in values.items()
            if isinstance(name, str) and isinstance(value, Tensor) and not value.is_sparse
        }
        for entry, values in {"": content, **content}.items()
        if isinstance(values, Mapping)
    }
    entries = {entry: tensors for entry, tensors in entries.items() if tensors}
    if not entries:
        raise CheckpointError(f"{path} holds no named tensors")
    return entries


def _open_safetensors(path: Path) -> Any:
    """Map a safetensors file."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path}, which is damaged or neither safetensors nor a torch "
            f"checkpoint: {error}"
        ) from error
