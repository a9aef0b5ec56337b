"""Find the matrices of a denoiser's layers in its graph."""

from __future__ import annotations

from typing import TypeVar

import onnx_ir as ir

from packforcing.config import Config
from packforcing.errors import BundleError
from packforcing.geometry import layer_matrices

T = TypeVar("T")
# Matrices of a layer, in the order in which `layer_matrices` lists their shapes
MATRIX_NAMES = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o",
    "ffn.0", "ffn.2",
)  # fmt: skip
SHARED_INPUTS = {"self_attn.k": "self_attn.q", "self_attn.v": "self_attn.q"}


def layer_matmuls(graph: ir.Graph, config: Config, layers: range) -> dict[str, ir.Node]:
    """Find the MatMul nodes of layers.

    They are identified by their order: those of the layers come last but for the head's.

    Args:
        graph: A denoiser that is not quantized.
        config: Its model.
        layers: Indices of layers.

    Returns:
        Nodes by the name of their matrix in a checkpoint, like "blocks.3.ffn.0".

    Raises:
        BundleError: The shapes are not those of the model.
    """
    nodes = [
        node
        for node in graph
        if node.op_type == "MatMul" and stored_weight(node).const_value is not None
    ]
    shapes = layer_matrices(config) * config.layers
    nodes = nodes[-len(shapes) - 1 : -1]
    if [tuple(not_none(stored_weight(node).shape)) for node in nodes] != shapes:
        raise BundleError(
            f"the denoiser's matrices are not those of {config.name}; export the bundle again"
        )
    return {
        f"blocks.{layer}.{name}": nodes[layer * len(MATRIX_NAMES) + index]
        for layer in layers
        for index, name in enumerate(MATRIX_NAMES)
    }


def stored_weight(matmul: ir.Node) -> ir.Value:
    """Return the second input of a MatMul as the file stores it, before a cast."""
    return cast_source(not_none(matmul.inputs[1]))


def cast_source(value: ir.Value) -> ir.Value:
    """Return what a value is cast from, or the value itself where nothing casts it."""
    cast = value.producer()
    return not_none(cast.inputs[0]) if cast is not None and cast.op_type == "Cast" else value


def not_none(value: T | None) -> T:
    """Assert that a finished graph has what the library's types leave open."""
    assert value is not None
    return value


def add_initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a constant to a graph and return it."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    tensor.name = name
    graph.register_initializer(value)
    return value
