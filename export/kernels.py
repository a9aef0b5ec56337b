"""What the builder says that an engine runs: the types of attention and of products.

A builder that has no kernel for a type may use another one without a warning. Its detailed layer
list, one message of its log, has every kernel with its operands, and is the only place that tells:

    Name: _gemm_mha_v2_myl0_26, LayerType: kgen, Inputs: [ { Name: ..., Dimensions: [12,6240,128],
    Strides: ..., Datatype: Half, ... }, ...], Constants: [...], Outputs: [...], TacticName: ...

Attention has "mha" in its name. Products are of type "gemm", or fusions with "Fc" in their names;
their matrix is a constant, or an operand that another kernel dequantized. The number after "myl" is
the optimization profile. TensorRT-RTX lists the kernels of an engine once for all of its targets.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from packforcing.errors import BackendError
from packforcing.runtime.engine_records import Kernels

LIST = "Layers:"  # how the message begins
DTYPES = {  # by TensorRT's names
    "Float": "fp32",
    "Half": "fp16",
    "FP8": "fp8",
    "Int8": "int8",
    "Int4": "int4",
    "FP4E2M1": "nvfp4",
}
BITS = {"fp32": 32, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "nvfp4": 4}
_KERNEL = re.compile(
    r"Name: (?P<name>[^,]+), LayerType: (?P<type>[^,]+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName:"
)
_TENSOR = re.compile(r"Dimensions: \[([\d,]*)\][^{}]*?Datatype: (\w+)")
_PROFILE = re.compile(r"_myl(\d+)_\d+$")


class KernelTypes(msgspec.Struct, frozen=True):
    """What a recipe expects of the kernels of one kind, in every call of an engine.

    Attributes:
        kind: As `Kernels.kind`.
        dtype: Of all operands.
        amount: At least so many kernels of attention, or weights of the products' matrices.
    """

    kind: Literal["attention", "product"]
    dtype: str
    amount: int


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def read_kernels(text: str, calls: Sequence[str]) -> tuple[Kernels, ...]:
    """Read the kernels of attention and of products from the builder's layer list.

    Args:
        text: The message.
        calls: Of the engine, in the order of its optimization profiles.
    """
    counts: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
    weights: Counter[tuple[str, str, tuple[str, ...]]] = Counter()
    for match in _KERNEL.finditer(text):
        name, kind = match["name"], match["type"]
        profile = _PROFILE.search(name)
        call = calls[min(int(profile[1]), len(calls) - 1)] if profile else calls[0]
        inputs, constants, outputs = (
            [
                _Tensor(tuple(map(int, filter(None, shape.split(",")))), DTYPES[dtype])
                for shape, dtype in _TENSOR.findall(match[part])
                if dtype in DTYPES
            ]
            for part in ("inputs", "constants", "outputs")
        )
        if "mha" in name:
            key = (call, "attention", tuple(tensor.dtype for tensor in inputs[:3]))
        elif kind == "gemm" or (kind == "runtime_fusion" and re.search("Fc(?![a-z])", name)):
            operands = _product(inputs, constants, outputs)
            if operands is None:
                continue
            activations, matrix = operands
            key = (call, "product", (activations.dtype, matrix.dtype))
            weights[key] += math.prod(matrix.shape)  # several of one input may be a batch
        else:
            continue
        counts[key] += 1
    return tuple(
        Kernels(call, kind, operands, count, weights[call, kind, operands])  # type: ignore[arg-type]
        for (call, kind, operands), count in sorted(counts.items())
    )


def _product(
    inputs: list[_Tensor], constants: list[_Tensor], outputs: list[_Tensor]
) -> tuple[_Tensor, _Tensor] | None:
    """Return activations and matrix of a product; None where it has no matrix.

    The matrix is the largest constant that is no vector, or else an input of the size that the
    product's inner and outer sizes give. Of several activations, like what is added to the result,
    those of the fewest bits count that have the matrix's inner size.
    """
    matrices = [tensor for tensor in constants if len(tensor.shape) > 1 and tensor.shape[-2] > 1]
    if not matrices:
        matrices = [
            tensor
            for tensor in inputs[1:]
            if outputs and len(tensor.shape) > 1 and tensor.shape[-1] == outputs[0].shape[-1]
            and any(other.shape[-1:] == tensor.shape[-2:-1] for other in inputs)
        ]  # fmt: skip
    if not matrices:
        return None
    matrix = max(matrices, key=lambda tensor: math.prod(tensor.shape))
    read = [t for t in inputs if t is not matrix and t.shape[-1:] == matrix.shape[-2:-1]] or inputs
    return min(read, key=lambda tensor: BITS[tensor.dtype]), matrix


def check_kernels(
    kernels: Iterable[Kernels], expected: Iterable[KernelTypes], calls: Iterable[str]
) -> None:
    """Check that an engine runs in the types that its recipe names.

    Args:
        kernels: Of the engine.
        expected: What the recipe names, for every call.
        calls: Of the engine.

    Raises:
        BackendError: Fewer kernels than expected have the expected dtype.
    """
    kernels = list(kernels)
    for call in calls:
        for types in expected:
            of_kind = [k for k in kernels if (k.call, k.kind) == (call, types.kind)]
            amounts: Counter[str] = Counter()
            for entry in of_kind:
                amounts[" x ".join(entry.operands)] += entry.weights or entry.count
            amount = sum(
                entry.weights or entry.count
                for entry in of_kind
                if {*entry.operands} == {types.dtype}
            )
            if amount < types.amount:
                unit = {"attention": "kernels", "product": "weights"}[types.kind]
                listed = ", ".join(f"{n:,} {unit} in {dtypes}" for dtypes, n in amounts.items())
                raise BackendError(
                    f"the {types.kind} of {call} was to run in {types.dtype} "
                    f"({types.amount:,} {unit}), but the builder lists {listed or 'none'}: this "
                    "version of it has no such kernel; use one that pyproject.toml allows, or "
                    "another precision"
                )
