"""The denoiser with a mask in place of a length, for a parser that drops the length.

ONNX Runtime's TensorRT-RTX plugin hands graphs to TensorRT's ONNX parser, which leaves out
`Attention`'s `nonpad_kv_seqlen` without an error: attention would read context that was never
written. A mask it keeps. ONNX Runtime's own CPU kernel takes no mask of a single row, so the
bundle has the length, and the graph is rewritten when it is loaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from packforcing.errors import BackendError

LENGTH = 6  # Attention's input `nonpad_kv_seqlen`; the mask is input 3


def with_mask(path: Path) -> bytes:
    """A denoiser's graph whose attention is given a mask, bool [1, 1, 1, N + C]: true below
    `kv_len`. Weights beside the file stay there.

    Raises `BackendError` if onnx-ir is not installed or no attention reads a length.
    """
    try:
        import onnx_ir as ir
    except ModuleNotFoundError as error:
        raise BackendError(
            "onnxruntime-rtx needs onnx-ir, which is not installed: pip install onnx-ir"
        ) from error
    model = ir.load(path)
    graph = model.graph
    values = {value.name: value for value in graph.inputs}
    reading = [n for n in graph if n.op_type == "Attention" and len(n.inputs) > LENGTH]
    if not reading:
        raise BackendError(f"{path} has no attention that reads kv_len: export the bundle anew")
    nodes: list[ir.Node] = []

    def add(op: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        nodes.append(ir.node(op, inputs, attributes))
        return nodes[-1].outputs[0]

    new, context = (add("Shape", values[name]) for name in ("rope_cos", "ctx_cos"))
    zero, one, axes = (
        add("Constant", value=ir.tensor(value, dtype=ir.DataType.INT64))
        for value in (0, 1, [0, 1, 2])
    )
    keys = add("Gather", add("Add", new, context), zero)  # of [N, d/2] + [C, d/2], the first
    places = add("Range", zero, keys, one)
    mask = add("Unsqueeze", add("Less", places, values["kv_len"]), axes)
    graph.insert_before(graph[0], nodes)
    for node in reading:
        node.resize_inputs(4)
        node.replace_input_with(3, mask)
    return ir.to_proto(model).SerializeToString()
