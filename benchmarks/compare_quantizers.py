"""Compare the error of our weight-only int8 and int4 with other tools', on the same matrices.

    python -m benchmarks.compare_quantizers [BUNDLE] [--modelopt PYTHON] [--prompts 2] [--seconds 5]

The inputs of a bundle's matrices are taken from rollouts through the runtime: of some prompts to
fit with, of others to measure with. Every matrix is a product in a graph of its own, in fp32, which
each tool quantizes; the error is that of its outputs, with activations as they are, against the
exact ones: sum of squares over sum of squares, in dB. All scales are symmetric, one per output
channel (int8) or per block of our width (int4).

- onnxruntime.quantization: `quantize_dynamic` per channel (int8; of which only the weights are
  taken), `MatMulNBitsQuantizer` by rounding to nearest (int4).
- NVIDIA ModelOpt, in an environment of its own (--modelopt names its interpreter):
  INT8_WEIGHT_ONLY_CFG of modelopt.torch (int8), `awq_clip` of modelopt.onnx (int4), on the CPU.
"""

from __future__ import annotations

import argparse
import logging
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from packforcing.calibration.matmuls import (
    SHARED_INPUTS,
    layer_matmuls,
    not_none,
    stored_weight,
)
from packforcing.calibration.weights import quantize_matmul
from packforcing.errors import ConfigError, PackForcingError
from packforcing.evaluation.prompt_sets import Prompt, draw_prompts
from packforcing.files import write_file
from packforcing.geometry import quantized_layers
from packforcing.prompts import encode_prompt
from packforcing.runtime import demo_bundle
from packforcing.runtime.backends import open_backend
from packforcing.runtime.backends.onnxruntime import OnnxGraph
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import (
    GraphSpec,
    TensorSpec,
    contract,
    graph_file,
    read_manifest,
)
from packforcing.runtime.device import HostDevice
from packforcing.runtime.estimate import INT4_BLOCK, weight_block
from packforcing.runtime.rollout import Rollout

ROWS = 8  # tokens that are taken of each call
Data = dict[str, np.ndarray]  # by matrix: its input [rows, inputs], its output, or itself

MODELOPT_INT4 = """
import sys
import numpy as np
import onnx
from modelopt.onnx.quantization.int4 import quantize
source, data, target, block = sys.argv[1:]
inputs = [dict(np.load(data))]
onnx.save(quantize(source, "awq_clip", inputs, ["cpu"], False, block_size=int(block)), target)
"""
MODELOPT_INT8 = """
import sys
import numpy as np
import torch
import modelopt.torch.quantization as mtq
source, target = sys.argv[1:]
weights = {}
for name, weight in np.load(source).items():
    linear = torch.nn.Linear(*weight.shape, bias=False)
    linear.weight.data = torch.from_numpy(weight.T.copy())
    model = mtq.quantize(torch.nn.Sequential(linear), mtq.INT8_WEIGHT_ONLY_CFG)
    weights[name] = model[0].weight_quantizer(model[0].weight).detach().numpy().T
np.savez(target, **weights)
"""


class ToolError(NamedTuple):
    """The error of a tool's quantized weights over all matrices.

    Attributes:
        mean: Signal-to-noise ratio of the outputs in dB, mean over the matrices.
        worst: The lowest of a matrix.
        matrix: The matrix that has it.
    """

    kind: str
    tool: str
    mean: float
    worst: float
    matrix: str


class RecordingDenoiser:
    """A denoiser that records `ROWS` tokens of each matrix's inputs in each call."""

    def __init__(self, bundle: Path, seed: int = 0) -> None:
        config, path = read_manifest(bundle).config, bundle / graph_file("denoiser")
        model, self.rng = ir.load(path), np.random.default_rng(seed)
        outputs, self.rows = [], {}
        for name, product in layer_matmuls(model.graph, config, quantized_layers(config)).items():
            _, _, matrix = name.split(".", 2)
            if matrix in SHARED_INPUTS:
                continue
            value, weight = not_none(product.inputs[0]), not_none(product.inputs[1])
            shape = (1, "N", not_none(weight.shape).numpy()[0])
            value.shape = ir.Shape(shape)
            model.graph.outputs.append(value)
            outputs.append(TensorSpec(str(value.name), shape, not_none(value.dtype).numpy().name))
            self.rows[outputs[-1].name] = name
        spec = contract(config)["denoiser"]
        self.seconds, self.outputs = 0.0, outputs
        self.inputs: dict[str, list[np.ndarray]] = {name: [] for name in self.rows.values()}
        self.graph = OnnxGraph(
            path,
            GraphSpec(spec.inputs, (*spec.outputs, *outputs)),
            None,
            model=ir.to_proto(model).SerializeToString(),
        )

    def bind(self, arrays: Arrays) -> Callable[[], None]:
        host, tokens = HostDevice(), arrays["tokens"].shape[1]
        values = {
            tensor.name: host.allocate(
                "inputs", (1, tokens, int(tensor.shape[2])), tensor.dtype, host=True
            )
            for tensor in self.outputs
        }
        call = self.graph.bind({**arrays, **values})

        def run() -> None:
            call()
            taken = self.rng.choice(tokens, min(ROWS, tokens), replace=False)
            for output, array in values.items():
                self.inputs[self.rows[output]].append(array.host[0, taken].astype(np.float32))

        return run


def inputs_of(bundle: Path, prompts: list[Prompt], seconds: float) -> Data:
    """Return the inputs of each matrix in rollouts."""
    manifest = read_manifest(bundle)
    config = manifest.config
    backend = open_backend("onnxruntime", bundle, manifest, config, None)
    recorder = RecordingDenoiser(bundle)
    backend.graphs["denoiser"] = recorder
    rollout, blocks = Rollout(config, backend), config.blocks(config.frames(seconds))
    for prompt in prompts:
        rollout.begin(encode_prompt(prompt.content, config), blocks, prompt.seed)
        for _ in range(blocks):
            rollout.next_block()
    backend.close()
    inputs = {name: np.concatenate(rows) for name, rows in recorder.inputs.items()}
    for name in list(inputs):
        layer, _, matrix = name.partition(".")[2].partition(".")
        for other, first in SHARED_INPUTS.items():
            if matrix == first:
                inputs[f"blocks.{layer}.{other}"] = inputs[name]
    return inputs


def products(weights: Data) -> ir.Model:
    """Return a graph of one product for each matrix: x.NAME times it gives y.NAME."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="products")
    for name, weight in weights.items():
        rows = ir.Value(
            name=f"x.{name}",
            shape=ir.Shape(["rows", weight.shape[0]]),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        matrix = ir.Value(
            name=name,
            shape=ir.Shape(weight.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(weight, name=name),
        )
        graph.register_initializer(matrix)
        node = ir.node("MatMul", [rows, matrix], name=name)
        out = node.outputs[0]
        out.name, out.dtype, out.shape = (
            f"y.{name}",
            rows.dtype,
            ir.Shape(["rows", weight.shape[1]]),
        )
        graph.append(node)
        graph.inputs.append(rows)
        graph.outputs.append(out)
    return ir.Model(graph, ir_version=10)


def outputs_of(model: bytes, inputs: Data) -> Data:
    """Return the outputs of a graph of products, computed without optimizations."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    outputs = session.run(names, {v.name: inputs[v.name[2:]] for v in session.get_inputs()})
    return {name[2:]: output for name, output in zip(names, outputs)}


def ours(weights: Data, fit: Data, inputs: Data, kind: str, block: int) -> Data:
    """Return the outputs of our quantized weights."""
    model = products(weights)
    for node in list(model.graph):
        rows = fit[str(node.name)]
        parts = rows.reshape(len(rows), -1, math.gcd(rows.shape[1], INT4_BLOCK))
        together = np.einsum("nib,nic->ibc", parts, parts, optimize=True) / np.float32(len(rows))
        quantize_matmul(node, str(node.name), kind, together)
    model.graph.opset_imports[""] = 24
    return outputs_of(ir.to_proto(model).SerializeToString(), inputs)


def onnxruntime_int8(weights: Data, fit: Data, inputs: Data, kind: str, block: int) -> Data:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.disable(logging.WARNING)  # it advises to prepare a graph that has one operation
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.onnx"), Path(folder, "b.onnx")
        ir.save(products(weights), source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        constants = ir.load(target).graph.initializers
        parts = {
            name: tuple(
                not_none(constants[f"{name}_{part}"].const_value).numpy().astype(np.float32)
                for part in ("quantized", "zero_point", "scale")
            )
            for name in weights
        }
    return {
        name: inputs[name] @ ((whole - zero) * scale)
        for name, (whole, zero, scale) in parts.items()
    }


def onnxruntime_int4(weights: Data, fit: Data, inputs: Data, kind: str, block: int) -> Data:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    how = nbits.DefaultWeightOnlyQuantConfig(block, is_symmetric=True, accuracy_level=1)
    quantizer = nbits.MatMulNBitsQuantizer(ir.to_proto(products(weights)), algo_config=how)
    quantizer.process()
    return outputs_of(quantizer.model.model.SerializeToString(), inputs)


def modelopt(interpreter: str) -> Callable[[Data, Data, Data, str, int], Data]:
    def quantized(weights: Data, fit: Data, inputs: Data, kind: str, block: int) -> Data:
        with tempfile.TemporaryDirectory() as folder:
            source, data, target = (Path(folder, name) for name in ("a.onnx", "a.npz", "b.onnx"))
            if kind == "int8":
                np.savez(data, **weights)
                target = target.with_suffix(".npz")
                command = [MODELOPT_INT8, str(data), str(target)]
            else:
                ir.save(products(weights), source)
                np.savez(data, **{f"x.{name}": rows for name, rows in fit.items()})
                command = [MODELOPT_INT4, str(source), str(data), str(target), str(block)]
            done = subprocess.run([interpreter, "-c", *command], capture_output=True, text=True)
            if done.returncode:
                raise ConfigError(f"ModelOpt does not run: {done.stderr.strip().splitlines()[-1]}")
            if kind == "int4":
                return outputs_of(target.read_bytes(), inputs)
            return {name: inputs[name] @ weight for name, weight in np.load(target).items()}

    return quantized


def measure_tools(
    bundle: Path, prompts: int = 2, seconds: float = 5.0, interpreter: str | None = None
) -> Iterator[ToolError]:
    """Yield the error of every tool, first ours, in int8 and then in int4.

    Args:
        bundle: A bundle whose weights are not quantized.
        prompts: Prompts to fit with; as many others are measured with.
        seconds: Length of every rollout.
        interpreter: Python of an environment that has ModelOpt.
    """
    config = read_manifest(bundle).config
    drawn = draw_prompts(config, 2 * prompts, seed=0)
    fit = inputs_of(bundle, drawn[:prompts], seconds)
    inputs = inputs_of(bundle, drawn[prompts:], seconds)
    graph = ir.load(bundle / graph_file("denoiser")).graph
    weights = {
        name: not_none(stored_weight(node).const_value).numpy().astype(np.float32)
        for name, node in layer_matmuls(graph, config, quantized_layers(config)).items()
    }
    exact = {name: inputs[name] @ weight for name, weight in weights.items()}
    tools = {
        "int8": {"ours": ours, "onnxruntime": onnxruntime_int8},
        "int4": {"ours": ours, "onnxruntime": onnxruntime_int4},
    }
    if interpreter:
        for by_name in tools.values():
            by_name["modelopt"] = modelopt(interpreter)
    for kind, by_name in tools.items():
        for tool, quantized in by_name.items():
            ratios = {}
            by_block: dict[int, Data] = {}
            for name, weight in weights.items():  # int8 has a scale per output, all at once
                block = weight_block(kind, *weight.shape) if kind == "int4" else 0
                by_block.setdefault(block, {})[name] = weight
            for block, part in by_block.items():
                some = ({name: data[name] for name in part} for data in (fit, inputs))
                for name, output in quantized(part, *some, kind, block).items():
                    noise = np.square(output - exact[name], dtype=np.float64).sum()
                    signal = np.square(exact[name], dtype=np.float64).sum()
                    ratios[name] = 10 * math.log10(signal / noise)
            worst = min(ratios, key=lambda name: ratios[name])
            yield ToolError(kind, tool, float(np.mean(list(ratios.values()))), ratios[worst], worst)


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    options.add_argument("--modelopt", metavar="PYTHON", help="of an environment that has it")
    options.add_argument("--prompts", type=int, default=2, help="as many again to measure with")
    options.add_argument("--seconds", type=float, default=5.0)
    options.add_argument("--json", type=Path, help="also write the results here")
    args = options.parse_args()
    print("output error of each matrix, dB (more is better)")
    print(f"{'':6}{'':14}{'mean':>8}{'worst':>8}   worst matrix")
    errors = []
    for error in measure_tools(args.bundle, args.prompts, args.seconds, args.modelopt):
        line = f"{error.kind:6}{error.tool:14}{error.mean:8.2f}{error.worst:8.2f}   {error.matrix}"
        print(line, flush=True)
        errors.append(error._asdict())
    if args.json:
        write_file(args.json, msgspec.json.encode(errors))


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
