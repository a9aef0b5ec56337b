"""Map torch checkpoints: a zip file of a pickle and of every tensor's bytes.

Of the pickle, only what torch itself calls to rebuild tensors is followed.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packforcing.checkpoints.containers import AGAIN, one_line
from packforcing.checkpoints.quantized import DTYPES, FP8, ORIGINAL
from packforcing.errors import CheckpointError

MAX_DEPTH, MAX_ENTRIES = 8, 100_000  # of nested dictionaries
CHUNK = 1 << 22  # bytes read at a time

# Packages whose classes a pickle may name instead of torch's, and what such a file is
_FOREIGN_CLASSES = {
    "torch.distributed": "holds one process's share of a distributed model: save it gathered",
    "torchao": f"is quantized with torchao: {ORIGINAL}",
    "bitsandbytes": f"is quantized with bitsandbytes: {ORIGINAL}",
    "optimum.quanto": f"is quantized with optimum-quanto: {ORIGINAL}",
}


def load_torch(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a torch checkpoint.

    Args:
        path: A file that `container` takes for one.

    Returns:
        The tensors by the keys of its nested dictionaries, joined with dots.

    Raises:
        CheckpointError: The file is damaged, holds no tensors, or would run code.
    """
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        if b"bytearray" in _pickle_bytes(path):  # torch allows it, and so memory of any size
            unsafe.append("builtins.bytearray")
        _refuse_code(path, sorted(unsafe))
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle calls torch's functions with any arguments
        reason = one_line(str(error).partition("\n")[0])
        raise CheckpointError(
            f"cannot read {path}, which is damaged or not a torch checkpoint: {reason}"
        ) from error
    tensors: dict[str, Tensor] = {}
    _collect(path, content, tensors)
    if not tensors:
        raise CheckpointError(f"{path} holds no named tensors")
    with zipfile.ZipFile(path) as archive:
        sizes = {entry.file_size for entry in archive.infolist()}
    for name, tensor in tensors.items():
        if _has_values(tensor) and tensor.untyped_storage().nbytes() not in sizes:
            raise CheckpointError(f"{path} is damaged: {name} is not as long as its data: {AGAIN}")
    return tensors


def check_torch_file(path: Path) -> None:
    """Compare what a torch checkpoint holds with its checksums, which torch itself does not.

    Raises:
        CheckpointError: A checksum differs.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                with archive.open(entry) as stream:
                    while entry.CRC and stream.read(CHUNK):  # 0 where torch was told to omit it
                        pass
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)}): {AGAIN}") from error


def torch_dtype(tensor: Tensor) -> str:
    """Name a tensor's dtype as safetensors does, or say why it cannot be read."""
    if not _has_values(tensor):
        return f"a tensor of layout {tensor.layout} on {tensor.device.type}"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        return "a repeated view of fewer values"  # which may claim any size
    integers = {torch.int8: "I8", torch.uint8: "U8"}
    return {**DTYPES, **FP8, **integers}.get(tensor.dtype, str(tensor.dtype))


def _has_values(tensor: Tensor) -> bool:
    """Tell whether a tensor is a plain one in memory."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    return plain and tensor.device.type == "cpu"


def _refuse_code(path: Path, unsafe: list[str]) -> None:
    """Raise `CheckpointError` if a pickle names what torch does not rebuild tensors with."""
    for name in unsafe:
        for package, what in _FOREIGN_CLASSES.items():
            if name.startswith(package):
                raise CheckpointError(f"{path} {what} (its pickle names {one_line(name)})")
    if unsafe:
        names = one_line(", ".join(unsafe[:3]))
        raise CheckpointError(
            f"{path} would run code when loaded ({names}) and is refused: ask for safetensors"
        )
    if path.suffix == ".safetensors":  # torch.load goes by the name
        raise CheckpointError(
            f"{path} is a torch checkpoint by its content: rename it to end in .pt"
        )


def _pickle_bytes(path: Path) -> bytes:
    """Return the pickle in a torch checkpoint, without its checksum, which torch may omit."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        [entry] = [one for one in archive.infolist() if one.filename.endswith("data.pkl")]
        file.seek(entry.header_offset + 26)
        name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        return file.read(entry.file_size)


def _collect(path: Path, content: Any, tensors: dict[str, Tensor]) -> None:
    """Add the tensors in nested dictionaries by their keys, joined with dots."""
    pending: list[tuple[tuple[str, ...], Any]] = [((), content)]
    entries = 0
    while pending:
        keys, values = pending.pop()
        if not isinstance(values, Mapping) or len(keys) > MAX_DEPTH:
            continue
        nested = []
        for key, value in values.items():
            entries += 1
            if entries > MAX_ENTRIES:  # one dictionary may stand in many places
                raise CheckpointError(f"{path} holds more than {MAX_ENTRIES} entries")
            if not isinstance(key, str):
                continue
            if not isinstance(value, Tensor):
                nested.append(((*keys, key), value))
                continue
            name = ".".join((*keys, key))
            if name in tensors:
                raise CheckpointError(f"{path} holds {name} twice: {AGAIN}")
            tensors[name] = value.detach()
        pending += reversed(nested)
