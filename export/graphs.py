"""Export the reference model as five ONNX graphs, by the contract in `runtime.bundle`.

Each wrapper has flat tensors as inputs and outputs, in the contract's order; the contract names
them and states which axes stay symbolic.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx_ir.passes import common
from onnxscript.rewriter.rules.common import (
    fuse_pad_into_conv_rule,
    materialize_reshape_shape_rule,
    max_min_rule,
    min_max_rule,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from packforcing.config import Config
from packforcing.export.lint import TRACE_SIZES, lint
from packforcing.model import Model, Weights, build_model
from packforcing.runtime.bundle import DTYPES, GraphSpec, contract
from packforcing.transformer import head_rows

OPSET = 24  # the first with Attention's nonpad_kv_seqlen, which carries kv_len


# Run on the host with every backend: once per prompt, and for a start clip. They compute in fp32;
# only their outputs are in the bundle's precision.
HOST_GRAPHS = ("prompt", "vae_encoder")


class Prompt(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.dtype = _compute_dtype(model.config)

    def forward(self, text: Tensor) -> list[Tensor]:
        cross = self.transformer.cross_kv(text)
        return [tensor.to(self.dtype) for pair in cross for tensor in pair]


class Denoiser(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.transformer = model.transformer
        self.layers = model.config.layers

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        tokens, extra, timestep, *rest = inputs
        cross, rest = rest[: 2 * self.layers], rest[2 * self.layers :]
        rope_cos, rope_sin, ctx_cos, ctx_sin, *context, kv_len = rest
        flow, new, q_pool, k_pool = self.transformer(
            tokens, extra, timestep, _pairs(cross),
            (rope_cos, rope_sin), _pairs(context), (ctx_cos, ctx_sin), kv_len,
        )  # fmt: skip
        return [flow, *(tensor for pair in new for tensor in pair), q_pool[0], k_pool[0]]


class Compressor(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.autoencoder, self.compressor = model.autoencoder, model.compressor

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        *latents, pixels = inputs  # without a high branch nothing reads the latents
        tokens, extra = self.compressor(latents[0].to(pixels.dtype) if latents else None, pixels)
        return tokens.float(), extra


class Decoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.autoencoder = model.autoencoder
        self.dtype = _compute_dtype(model.config)

    def forward(self, latent: Tensor, *state: Tensor) -> list[Tensor]:
        frames, after = self.autoencoder.decode_frame(latent.to(self.dtype), list(state))
        return [frames, *after]


class Encoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.autoencoder = model.autoencoder

    def forward(self, frames: Tensor, *state: Tensor) -> list[Tensor]:
        latent, after = self.autoencoder.encode_frame(frames, list(state))
        return [latent, *after]


WRAPPERS = {
    "prompt": Prompt,
    "denoiser": Denoiser,
    "compressor": Compressor,
    "vae_decoder": Decoder,
    "vae_encoder": Encoder,
}


def export_graph(config: Config, weights: Weights, name: str) -> ir.Model:
    """Export one graph of the contract; its weights are read when it is saved.

    Args:
        config: The model.
        weights: Tensors by checkpoint name.
        name: The graph's name, a key of `WRAPPERS`.

    Raises:
        ExportError: The graph breaks the contract.
    """
    spec = contract(config)[name]
    dtype = torch.float32 if name in HOST_GRAPHS else _compute_dtype(config)
    # Fake tensors: tracing a full-size model would need several times its memory
    with _quiet_exporter():
        with FakeTensorMode(allow_non_fake_inputs=True), _default(dtype):
            program = torch.onnx.export(
                WRAPPERS[name](build_model(config)).eval(),
                example_inputs(spec),
                dynamo=True,
                opset_version=OPSET,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=_dynamic_shapes(name, spec),
                optimize=False,  # see `simplify_graph`
                verbose=False,
            )
        assert program is not None
        model = program.model
        simplify_graph(model)
    attach_weights(model.graph, config, weights, dtype)
    if dtype == torch.float32:
        store_weights_in_fp16(model)
    lint(name, model, spec)
    return model


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter inside the block: it warns of its own insides, of absent torchvision ops
    and of each weight that is not read yet."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def simplify_graph(model: ir.Model) -> None:
    """Fold constant sizes, and lists that tracing packs and unpacks, in place.

    This is the part of the exporter's own optimizer that these graphs need; all of it takes three
    times as long as tracing, and reads every weight.
    """
    for value in model.graph.initializers.values():
        if isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            value.const_value = None
    rules = [
        materialize_reshape_shape_rule,
        min_max_rule,
        max_min_rule,
        fuse_pad_into_conv_rule,  # TensorRT-RTX would pad a copy
    ]
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        onnxscript.rewriter.rewrite(model, rules)
    for tidy in (
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        # stack traces: as large as the graph itself, and they name the exporting machine's folders
        common.ClearMetadataAndDocStringPass(),
    ):
        tidy(model)


def attach_weights(graph: ir.Graph, config: Config, weights: Weights, dtype: torch.dtype) -> None:
    """Attach to every initializer its weight, which is read when the graph is written.

    The weight of a linear layer is stored transposed, and the Transpose node removed.

    Args:
        graph: Changed in place.
        config: The model.
        weights: Tensors by checkpoint name.
        dtype: The dtype to store; values are rounded to the model's compute dtype first.
    """
    for value in list(graph.initializers.values()):
        name = str(value.name)
        if name not in weights:
            continue
        assert value.shape is not None and value.dtype is not None
        uses = value.consumers()
        transposed = len(uses) == 1 and uses[0].op_type == "Transpose"
        if transposed:
            value.shape = ir.Shape(value.shape[::-1])
            uses[0].outputs[0].replace_all_uses_with(value)
            graph.remove(uses[0], safe=True)

        def read(name: str = name, transposed: bool = transposed) -> ir.TensorProtocol:
            tensor = weights[name].to(_compute_dtype(config)).to(dtype)
            if name.startswith("transformer.head.head."):
                tensor = tensor[head_rows(config)]
            tensor = tensor.T if transposed else tensor
            return ir.tensor(tensor.contiguous().numpy(), name=name)

        value.const_value = ir.LazyTensor(read, value.dtype, value.shape, name=name)


def example_inputs(spec: GraphSpec) -> tuple[Tensor, ...]:
    """Return zeros as a graph's inputs, symbolic axes in `TRACE_SIZES`; they use no memory."""
    return tuple(
        torch.zeros((), dtype=getattr(torch, tensor.dtype)).expand(
            [TRACE_SIZES[n] if isinstance(n, str) else n for n in tensor.shape]
        )
        for tensor in spec.inputs
    )


def store_weights_in_fp16(model: ir.Model) -> None:
    """Store every weight that fp16 represents exactly in fp16, with a cast to fp32, in place.

    The arithmetic is the same: a runtime folds the casts when it loads the graph.
    """
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or tensor.size < 2:
            continue
        full = tensor.numpy()
        half = full.astype("float16")
        if not (half.astype("float32") == full).all():
            continue
        stored = ir.Value(
            name=f"{name}.fp16",
            shape=value.shape,
            type=ir.TensorType(ir.DataType.FLOAT16),
            const_value=ir.tensor(half, name=f"{name}.fp16"),
        )
        cast = ir.Node("", "Cast", [stored], [ir.AttrInt64("to", ir.DataType.FLOAT.value)])
        cast.outputs[0].name = f"{name}.fp32"
        cast.outputs[0].shape, cast.outputs[0].dtype = value.shape, ir.DataType.FLOAT
        value.replace_all_uses_with(cast.outputs[0])
        graph.insert_before(graph[0], cast)
        del graph.initializers[name]
        graph.register_initializer(stored)


def _compute_dtype(config: Config) -> torch.dtype:
    return getattr(torch, DTYPES[config.precision.compute])


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _dynamic_shapes(name: str, spec: GraphSpec) -> tuple | None:
    shapes = tuple(
        {axis: torch.export.Dim(n) for axis, n in enumerate(tensor.shape) if isinstance(n, str)}
        for tensor in spec.inputs
    )
    if not any(shapes):
        return None
    return (shapes,) if name == "denoiser" else shapes


def _pairs(flat: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(k, v) for k, v in zip(flat[::2], flat[1::2])]
