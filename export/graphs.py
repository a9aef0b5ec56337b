"""The reference model as five ONNX graphs, with the I/O table of `packforcing.runtime.bundle`.

Each wrapper takes and gives flat tensors in the contract's order; the contract itself names
them and says which axes stay symbolic.
"""

from __future__ import annotations

import warnings

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from packforcing.export.lint import TRACE_SIZES, lint
from packforcing.model import Model
from packforcing.runtime.bundle import GraphSpec, contract

OPSET = 24  # the first with Attention's nonpad_kv_seqlen, which carries kv_len


class Prompt(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.transformer = model.transformer

    def forward(self, text: Tensor) -> list[Tensor]:
        return [tensor for pair in self.transformer.cross_kv(text) for tensor in pair]


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
        return self.compressor(latents[0] if latents else None, pixels)


class Decoder(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.autoencoder = model.autoencoder

    def forward(self, latent: Tensor, *state: Tensor) -> list[Tensor]:
        frames, after = self.autoencoder.decode_frame(latent, list(state))
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


def export_graph(model: Model, name: str) -> ir.Model:
    """One graph of the contract as an ONNX model in memory, linted.

    Raises `ExportError` if the graph breaks the contract.
    """
    spec = contract(model.config)[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own insides
        program = torch.onnx.export(
            WRAPPERS[name](model).eval(),
            example_inputs(spec),
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            dynamic_shapes=_dynamic_shapes(name, spec),
            verbose=False,
        )
    assert program is not None
    halve_weights(program.model)
    # stack traces: as large as the graph itself, and they name the exporting machine's folders
    ClearMetadataAndDocStringPass()(program.model)
    lint(name, program.model, spec)
    return program.model


def example_inputs(spec: GraphSpec) -> tuple[Tensor, ...]:
    """Zeros of the graph's shapes, open axes at their tracing sizes; they take no memory."""
    return tuple(
        torch.zeros((), dtype=getattr(torch, tensor.dtype)).expand(
            [TRACE_SIZES[n] if isinstance(n, str) else n for n in tensor.shape]
        )
        for tensor in spec.inputs
    )


def halve_weights(model: ir.Model) -> None:
    """Stores every weight that float16 holds exactly as float16, cast back where it is read.

    Nothing changes in the arithmetic: a runtime folds the casts when it loads the graph.
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
