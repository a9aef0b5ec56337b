"""Read GGUF files: names, shapes and dtypes here, dequantization by the `gguf` package.

The package's own reader believes the counts and lengths in a header, which may claim anything;
here each is compared with the size of the file first.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from packforcing.checkpoints.containers import AGAIN, one_line
from packforcing.errors import CheckpointError
from packforcing.extras import optional_imports

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DIMS = 8
_BLOCKS_AT_ONCE = 1 << 15  # dequantized together: what that takes in memory beside the result
# What ComfyUI-GGUF writes where it reshaped a tensor to whole blocks
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
# dtypes that are read as they are; every other is dequantized to float32
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor in a GGUF file."""

    name: str
    shape: tuple[int, ...]  # as torch has it: GGUF's dimensions backwards
    dtype: str  # ggml's name, like "Q4_K"
    offset: int  # of its bytes in the file
    bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file."""

    metadata: dict[str, Any]  # single values, and short arrays
    tensors: list[GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file.

    Raises:
        CheckpointError: The file is damaged, of another version, or one part of several.
        MissingDependency: The gguf package is not installed.
    """
    with optional_imports(f"reading {path.name}", "gguf"):
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        cursor = _Cursor(path, content)
        cursor.skip(4)
        version, tensor_count, entry_count = (cursor.scalar(kind) for kind in "IQQ")
        if version not in (2, 3):
            raise CheckpointError(
                f"{path} is GGUF of version {version}; 2 and 3 can be read: convert it again"
            )
        metadata = {}
        for _ in range(entry_count):
            key = cursor.text()
            metadata[key] = cursor.value(cursor.scalar("I"))
        parts = metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise CheckpointError(
                f"{path} is one of {parts} parts of a GGUF file: join them with "
                "'llama-gguf-split --merge'"
            )
        infos = []
        for _ in range(tensor_count):
            name, rank = cursor.text(), cursor.scalar("I")
            if rank > _MAX_DIMS:
                cursor.fail(f"{name} has {rank} dimensions")
            sizes = [cursor.scalar("Q") for _ in range(rank)]
            infos.append((name, sizes, cursor.scalar("I"), cursor.scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            cursor.fail(f"its alignment is {alignment}")
        start = -(-cursor.position // alignment) * alignment
        tensors, expected_offset = [], 0
        for name, sizes, number, offset in infos:
            try:
                kind = GGMLQuantizationType(number)
            except ValueError:
                raise CheckpointError(
                    f"{path} holds {one_line(name)} in quantization type {number}, which the "
                    "installed gguf package does not know: update it, or use another quantization"
                ) from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            count = math.prod(sizes)
            if count % block or (sizes and sizes[0] % block):
                cursor.fail(f"{name} has rows of {sizes[0]} values in blocks of {block}")
            size_bytes = count // block * block_bytes
            if offset != expected_offset:
                cursor.fail(f"{name} begins at {offset}, not at {expected_offset}")
            if start + offset + size_bytes > len(content):
                cursor.fail(f"{name} ends behind the end of the file")
            expected_offset += -(-size_bytes // alignment) * alignment
            shape = tuple(reversed(sizes))
            if (original := metadata.get(_ORIGINAL_SHAPE + name)) is not None:
                if not isinstance(original, list) or math.prod(original) != count:
                    cursor.fail(f"the original shape of {name} is {original}, its shape {shape}")
                shape = tuple(original)
            tensors.append(GgufTensor(name, shape, kind.name, start + offset, size_bytes))
        if start + expected_offset < len(content):
            cursor.fail(f"{len(content) - start - expected_offset} bytes behind the last tensor")
    return GgufFile(metadata, tensors)


def gguf_reader(path: Path) -> Callable[[str], Tensor]:
    """Return a function that reads tensors of a file by name, dequantized to float32.

    float32, float16 and bfloat16 stay as they are.
    """
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    tensors = {tensor.name: tensor for tensor in read_gguf(path).tensors}
    content = np.memmap(path, np.uint8, "r")

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        packed = content[tensor.offset : tensor.offset + tensor.bytes]
        if dtype := FLOATS.get(tensor.dtype):
            return torch.from_numpy(packed.copy()).view(dtype).reshape(tensor.shape)
        kind = GGMLQuantizationType[tensor.dtype]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        values = np.empty(math.prod(tensor.shape), np.float32)
        for begin in range(0, len(values) // block, _BLOCKS_AT_ONCE):
            end = begin + _BLOCKS_AT_ONCE
            blocks = packed[begin * block_bytes : end * block_bytes].copy()
            values[begin * block : end * block] = dequantize(blocks, kind)
        return torch.from_numpy(values).reshape(tensor.shape)

    return read


def check_gguf_dtypes(path: Path, tensors: list[GgufTensor]) -> None:
    """Raise `CheckpointError` if the installed package cannot dequantize a tensor."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for dtype, tensor in {tensor.dtype: tensor for tensor in reversed(tensors)}.items():
        if dtype in FLOATS:
            continue
        kind = GGMLQuantizationType[dtype]
        try:
            dequantize(np.zeros(GGML_QUANT_SIZES[kind][1], np.uint8), kind)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{path} holds {tensor.name} as {dtype}, which the gguf package cannot "
                "dequantize: use another quantization, or the original weights"
            ) from error


class _Cursor:
    """Reads a header's fields in order, never behind the end of the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.position = path, content, 0

    def fail(self, problem: str) -> NoReturn:
        raise CheckpointError(f"{self.path} is damaged or cut off ({one_line(problem)}): {AGAIN}")

    def skip(self, size_bytes: int) -> int:
        """Go on by some bytes; return where they begin."""
        begin = self.position
        if size_bytes > len(self.content) - begin:
            self.fail(f"{size_bytes} bytes at {begin} of {len(self.content)}")
        self.position += size_bytes
        return begin

    def scalar(self, kind: str) -> Any:
        begin = self.skip(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self.content, begin)[0]

    def text(self) -> str:
        length = self.scalar("Q")
        begin = self.skip(length)
        try:
            return self.content[begin : begin + length].decode()
        except UnicodeDecodeError:
            self.fail(f"a name at {begin} is not UTF-8")

    def value(self, kind: int, depth: int = 0) -> Any:
        """Read a value; of arrays of numbers the first 16, of others nothing."""
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY or depth > 2:
            self.fail(f"a value of type {kind}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if inner in _SCALARS:
            begin = self.skip(count * struct.calcsize(f"<{_SCALARS[inner]}"))
            first = min(count, 16)
            return list(struct.unpack_from(f"<{first}{_SCALARS[inner]}", self.content, begin))
        for _ in range(count):
            if inner == _STRING:
                self.skip(self.scalar("Q"))
            else:
                self.value(inner, depth + 1)
        return None
