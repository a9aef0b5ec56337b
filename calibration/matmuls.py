"""The products of a denoiser's layers with their matrices: where they stand in its graph."""

from __future__ import annotations

from typing import TypeVar

import onnx_ir as ir

from packforcing.config import Config
from packforcing.errors import BundleError
from packforcing.geometry import layer_matrices

T = TypeVar("T")
# a layer's matrices, as `layer_matrices` lists their shapes
NAMES = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.o",
    "ffn.0", "ffn.2",
)  # fmt: skip
SHARED = {"self_attn.k": "self_attn.q", "self_attn.v": "self_attn.q"}  # these read what that reads


def matrices(graph: ir.Graph, config: Config, layers: range) -> dict[str, ir.Node]:
    """The products of these layers by their matrix's name in a checkpoint, blocks.3.ffn.0.

    Told by their order: the layers' matrices come last but for the head's. Raises `BundleError`
    where shapes say otherwise.
    """
    products = [
        node
        for node in graph
        if node.op_type == "MatMul" and stored(known(node.inputs[1])).const_value is not None
    ]
    shapes = layer_matrices(config) * config.layers
    products = products[-len(shapes) - 1 : -1]
    weights = [stored(known(node.inputs[1])) for node in products]
    if [tuple(known(weight.shape)) for weight in weights] != shapes:
        raise BundleError(
            f"the denoiser's matrices are not those of {config.name}; export the bundle anew"
        )
    return {
        f"blocks.{layer}.{name}": products[layer * len(NAMES) + number]
        for layer in layers
        for number, name in enumerate(NAMES)
    }


def stored(value: ir.Value) -> ir.Value:
    """What a weight is read from: itself, or what is cast to it."""
    cast = value.producer()
    return known(cast.inputs[0]) if cast is not None and cast.op_type == "Cast" else value


def known(value: T | None) -> T:
    """What a finished graph has, though the library's types leave it open."""
    assert value is not None
    return value


def initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A constant of this name in a graph."""
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    tensor.name = name
    graph.register_initializer(value)
    return value
