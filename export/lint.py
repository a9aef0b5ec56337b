"""What an exported graph must not contain: the silent faults of exporters, made loud."""

from __future__ import annotations

import onnx_ir as ir

from packforcing.errors import ExportError
from packforcing.runtime.bundle import GraphSpec, Shape, TensorSpec

# The symbolic axes' sizes while tracing: primes that no model size equals, so that finding
# one of them (or their sum) in a finished graph means that it was baked in.
TRACE_SIZES = {"N": 1009, "C": 2003}

# What the five graphs are made of. All of it runs on ONNX Runtime's CPU provider and is taken by
# TensorRT-RTX's parser (1.7); anything new has to be tried on both before it joins the list.
OPS = frozenset({
    "Add", "Attention", "AveragePool", "Cast", "Clip", "Concat", "ConstantOfShape", "Conv", "Cos",
    "DepthToSpace", "DequantizeLinear", "Div", "Gather", "Gelu", "LayerNormalization", "MatMul",
    "Mul", "Pad", "QuantizeLinear", "RMSNormalization", "Reciprocal", "ReduceL2", "ReduceMean",
    "Relu", "Reshape", "Resize", "RotaryEmbedding", "Sigmoid", "Sin", "Slice", "Softmax", "Split",
    "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze",
})  # fmt: skip


def lint(name: str, model: ir.Model, spec: GraphSpec) -> None:
    """Raises `ExportError` unless the graph is what the contract says and nothing else.

    Checked: names, order, shapes and dtypes of inputs and outputs (an axis the contract leaves
    open must be symbolic), every input is read, every op is on the list, every operation works
    at any size of the open axes.
    """
    graph = model.graph
    _compare(name, "input", graph.inputs, spec.inputs)
    _compare(name, "output", graph.outputs, spec.outputs)
    unread = [str(value.name) for value in graph.inputs if not value.uses()]
    if unread:
        raise ExportError(f"graph '{name}': nothing reads input {', '.join(unread)}")
    foreign = sorted({f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                      for node in graph if node.domain or node.op_type not in OPS})  # fmt: skip
    if foreign:
        raise ExportError(f"graph '{name}' uses ops outside the list: {', '.join(foreign)}")
    baked = _baked(graph)
    if baked:
        raise ExportError(f"graph '{name}' bakes in a size the contract leaves open: {baked[0]}")


def _baked(graph: ir.Graph) -> list[str]:
    """Values in which a size of the tracing run, or their sum, has become a constant."""
    sizes = {*TRACE_SIZES.values(), sum(TRACE_SIZES.values())}
    found = []
    for node in graph:
        for value in node.inputs:
            constant = None if value is None else ir.convenience.get_const_tensor(value)
            if constant is None or constant.dtype != ir.DataType.INT64:
                continue
            if sizes & set(constant.numpy().ravel().tolist()):
                found.append(f"an input of {node.op_type} {node.name}")
        for value in node.outputs:
            if value.shape is not None and sizes & set(value.shape.dims):
                found.append(f"the shape of {value.name}")
    return found


def _compare(name: str, kind: str, values, specs: tuple[TensorSpec, ...]) -> None:
    found = [value.name for value in values]
    wanted = [spec.name for spec in specs]
    if found != wanted:
        raise ExportError(f"graph '{name}': {kind}s are {found}, the contract has {wanted}")
    for value, spec in zip(values, specs):
        shape: Shape = tuple(n if isinstance(n, int) else str(n.value) for n in value.shape)
        dtype = value.dtype.numpy().name
        if shape != spec.shape or dtype != spec.dtype:
            raise ExportError(
                f"graph '{name}': {kind} {spec.name} is {dtype} {list(shape)}, "
                f"the contract has {spec.dtype} {list(spec.shape)}"
            )
