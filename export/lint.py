"""Check an exported graph against the contract: silent faults of exporters become errors."""

from __future__ import annotations

import onnx_ir as ir

from packforcing.errors import ExportError
from packforcing.runtime.bundle import GraphSpec, Shape, TensorSpec

# Sizes of the symbolic axes while tracing: primes that no model size equals, so one of them (or
# their sum) in a finished graph is a size that became a constant.
TRACE_SIZES = {"N": 1009, "C": 2003}

# The ops of the five graphs. ONNX Runtime's CPU provider runs all of them, and TensorRT-RTX's
# parser (1.7) accepts them; try a new one with both before it joins the list.
OPS = frozenset({
    "Add", "Attention", "AveragePool", "Cast", "Clip", "Concat", "ConstantOfShape", "Conv", "Cos",
    "DepthToSpace", "DequantizeLinear", "Div", "Gather", "Gelu", "LayerNormalization", "MatMul",
    "Mul", "Pad", "QuantizeLinear", "RMSNormalization", "Reciprocal", "ReduceL2", "ReduceMean",
    "Relu", "Reshape", "Resize", "RotaryEmbedding", "Sigmoid", "Sin", "Slice", "Softmax", "Split",
    "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip


def lint(name: str, model: ir.Model, spec: GraphSpec) -> None:
    """Check a graph against the contract.

    Names, order, shapes and dtypes of inputs and outputs are the contract's, with its symbolic
    axes; every input is read; every op is in `OPS` or a function of the model; no size of a
    symbolic axis is a constant.

    Args:
        name: The graph's name in the contract.
        model: The graph.
        spec: Its inputs and outputs by the contract.

    Raises:
        ExportError: The graph breaks the contract.
    """
    graph = model.graph
    _check_tensors(name, "input", graph.inputs, spec.inputs)
    _check_tensors(name, "output", graph.outputs, spec.outputs)
    unread = [str(value.name) for value in graph.inputs if not value.uses()]
    if unread:
        raise ExportError(f"graph '{name}': nothing reads input {', '.join(unread)}")
    foreign = sorted({f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                      for node in graph if node.op_identifier() not in model.functions
                      and (node.domain or node.op_type not in OPS)})  # fmt: skip
    if foreign:
        raise ExportError(f"graph '{name}' uses ops outside the list: {', '.join(foreign)}")
    constant_sizes = _constant_sizes(graph)
    if constant_sizes:
        raise ExportError(
            f"graph '{name}' bakes in a size the contract leaves open: {constant_sizes[0]}"
        )


def _constant_sizes(graph: ir.Graph) -> list[str]:
    """List the values in which a size of the trace, or their sum, is a constant."""
    sizes = {*TRACE_SIZES.values(), sum(TRACE_SIZES.values())}
    places = []
    for node in graph:
        for value in node.inputs:
            constant = None if value is None else ir.convenience.get_const_tensor(value)
            if constant is None or constant.dtype != ir.DataType.INT64:
                continue
            if sizes & set(constant.numpy().ravel().tolist()):
                places.append(f"an input of {node.op_type} {node.name}")
        for value in node.outputs:
            if value.shape is not None and sizes & set(value.shape.dims):
                places.append(f"the shape of {value.name}")
    return places


def _check_tensors(name: str, kind: str, values, specs: tuple[TensorSpec, ...]) -> None:
    names = [value.name for value in values]
    expected = [spec.name for spec in specs]
    if names != expected:
        raise ExportError(f"graph '{name}': {kind}s are {names}, the contract has {expected}")
    for value, spec in zip(values, specs):
        shape: Shape = tuple(n if isinstance(n, int) else str(n.value) for n in value.shape)
        dtype = value.dtype.numpy().name
        if shape != spec.shape or dtype != spec.dtype:
            raise ExportError(
                f"graph '{name}': {kind} {spec.name} is {dtype} {list(shape)}, "
                f"the contract has {spec.dtype} {list(spec.shape)}"
            )
