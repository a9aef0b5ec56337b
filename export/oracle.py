"""The oracle that a bundle is verified with, and the inputs that it is verified on.

The oracle of a graph is the same graph in fp32 on ONNX Runtime's CPU provider, without
optimizations: in the graphs of an fp16 bundle every tensor is widened, and weights have the same
values. The oracles of a bundle roll out a short video. The inputs of their calls are recorded at a
block whose context is partly filled and at the first block whose context is full.

The CPU provider stores all attention scores of a layer. Where that needs too much memory, the
denoiser, whose token counts are symbolic, is rolled out on the smallest grid, with a context of one
block of each kind and every other step. Graphs of a fixed size get those inputs repeated to their
size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import onnx_ir as ir

from packforcing.config import Config, Precision
from packforcing.errors import BackendError
from packforcing.export.attention import Softmax, write_out_attention
from packforcing.machine import cpu_cores
from packforcing.runtime.backends import Backend
from packforcing.runtime.backends.onnxruntime import FP8, import_onnxruntime
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import DTYPES, GraphSpec, Shape
from packforcing.runtime.device import HostDevice, view
from packforcing.runtime.rollout import Rollout
from packforcing.words import encode_words

FP16, FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
PROMPT, SEED = "a red star over navy stripes", 0
SCORE_BYTES = 1 << 28  # of attention scores that a layer may need
SMALLEST_SIDE = 4  # tokens along an axis that the compressor needs at least
GARBAGE = 16  # times the largest valid magnitude; finite, since 0 * NaN is NaN

Tensors = dict[str, np.ndarray]
Index = tuple[slice, ...]


class RecordedCall(msgspec.Struct, frozen=True):
    """A call of a graph: its name, and the inputs by name."""

    name: str
    inputs: Tensors


class Oracle:
    """A graph in fp32 on ONNX Runtime's CPU provider, without optimizations."""

    def __init__(
        self,
        path: Path,
        spec: GraphSpec,
        round_to_fp16: bool = False,
        softmax: Softmax | None = None,
    ) -> None:
        """Load a graph.

        Args:
            path: The ONNX file.
            spec: Its inputs and outputs in fp32; a quantized cache keeps its dtype.
            round_to_fp16: Round the result of every operation that is fp16 in the file to fp16.
            softmax: Round the softmax of attention over the context to fp8, as
                `write_out_attention` does.

        Raises:
            BackendError: ONNX Runtime cannot load it.
        """
        ort = import_onnxruntime()
        model = ir.load(path)
        if softmax:
            write_out_attention(model.graph, softmax)
        widen_graph(model, round_to_fp16)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = cpu_cores()
        options.add_session_config_entry("session.force_spinning_stop", "1")  # graphs take turns
        options.enable_cpu_mem_arena = False  # it would retain what the largest call needed
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        proto = ir.to_proto(model).SerializeToString()
        try:
            self._session = ort.InferenceSession(
                proto, options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # the library raises its own unrelated types
            raise BackendError(f"ONNX Runtime cannot load {path} in fp32: {error}") from error
        self.spec = spec

    def run(self, inputs: Tensors) -> Tensors:
        """Run the graph once.

        Args:
            inputs: Arrays by name, in any dtype; they are cast to that of the spec.

        Returns:
            Outputs by name, in the dtypes of the spec.
        """
        values = import_onnxruntime().OrtValue

        def ort_value(array: np.ndarray) -> Any:
            if array.dtype == DTYPES["fp8"]:  # the library takes its bytes alone
                return values.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), FP8)
            return values.ortvalue_from_numpy(array)

        feeds = {
            tensor.name: ort_value(np.ascontiguousarray(inputs[tensor.name], tensor.dtype))
            for tensor in self.spec.inputs
        }
        names = [tensor.name for tensor in self.spec.outputs]
        results = self._session.run_with_ort_values(names, feeds)
        return {t.name: out.numpy().view(t.dtype) for t, out in zip(self.spec.outputs, results)}


def widen_graph(model: ir.Model, round_to_fp16: bool = False) -> None:
    """Turn every fp16 tensor of a graph into fp32, in place; weights stay stored as they are.

    Args:
        model: The graph.
        round_to_fp16: Round each result that was fp16 to fp16, stored as fp32.
    """
    graph = model.graph
    nodes = list(graph)
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in ("to", "dtype", "output_dtype"):
                if attribute.as_int() == FP16:
                    node.attributes[name] = ir.AttrInt64(name, FP32)
            elif attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype == FP16:
                    wide = ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
                    node.attributes[name] = ir.AttrTensor(name, wide)
        for value in node.outputs:
            if value.dtype == FP16:
                value.dtype = FP32
                if round_to_fp16:
                    graph.insert_after(node, _cast(graph, value, FP16, FP32))
    for value in graph.inputs:
        if value.dtype == FP16:
            value.dtype = FP32
    for value in list(graph.initializers.values()):
        if value.dtype == FP16:
            graph.insert_before(nodes[0], _cast(graph, value, FP32))


def _cast(graph: ir.Graph, value: ir.Value, *types: ir.DataType) -> list[ir.Node]:
    """Cast a value to one dtype after the other; all its readers read the last one."""
    casts, last = [], value
    for dtype in types:
        cast = ir.Node("", "Cast", [last], [ir.AttrInt64("to", dtype)])
        last = cast.outputs[0]
        last.name, last.shape, last.dtype = f"{value.name}.{dtype.name}", value.shape, dtype
        casts.append(cast)
    for node, index in list(value.uses()):
        if node is not casts[0]:
            node.replace_input_with(index, last)
    for index, output in enumerate(graph.outputs):
        if output is value:
            value.name, last.name = f"{value.name}.exact", value.name
            graph.outputs[index] = last
    return casts


def oracle_config(config: Config) -> Config:
    """Return a model's config in fp32, but for a cache that the graph itself quantizes."""
    cache = config.precision.cache
    precision = Precision() if cache == config.precision.compute else Precision(cache=cache)
    return msgspec.structs.replace(config, precision=precision)


def rehearsal_config(config: Config) -> Config:
    """Return the config of the recorded rollout: in fp32, and small enough for its scores."""
    exact = oracle_config(config)
    new, context = config.block_tokens, config.context_tokens
    if config.heads * new * (new + context) * np.dtype(np.float32).itemsize <= SCORE_BYTES:
        return exact
    side = SMALLEST_SIDE * config.spatial_factor * config.patch
    policy = config.policy
    one_each = {name: min(getattr(policy, name), 1) for name in ("sink", "mid", "recent")}
    policy = msgspec.structs.replace(policy, **one_each)
    return msgspec.structs.replace(
        exact, height=side, width=side, policy=policy, timesteps=config.timesteps[::2]
    )


def describe_inputs(small: Config, config: Config) -> str:
    """Describe the recorded inputs, and how they differ from the model's own.

    Args:
        small: The config of the recorded rollout.
        config: The model's.
    """

    def sizes(config: Config) -> str:
        return (
            f"{config.block_tokens:,} and {config.compressed_tokens:,} new tokens with "
            f"{config.context_tokens:,} of context"
        )

    text = f"recorded from a rollout with {sizes(small)}"
    if small.context_tokens != config.context_tokens:
        text += (
            f", since a CPU stores all attention scores of a layer; the model's own are "
            f"{sizes(config)}"
        )
    if config.text_encoder != "words":
        text += "; the prompt's embedding is random"
    return text


def record_calls(config: Config, oracles: dict[str, Oracle]) -> dict[str, list[RecordedCall]]:
    """Record inputs of every graph in a rollout of the oracles.

    The partly filled block gives its first call of each kind, the full one its last: a noisy step
    and a commit.

    Args:
        config: Of the rollout, from `rehearsal_config`.
        oracles: By graph. A graph of another size than the rollout gets inputs repeated to its own
            size, in these two blocks alone, and its outputs are cut.

    Returns:
        Calls by graph.
    """
    partly_filled, full = recorded_blocks(config)
    calls: dict[str, dict[str, RecordedCall]] = {name: {} for name in oracles}

    def on_call(name: str, block: int, inputs: Tensors, outputs: Tensors) -> None:
        label = f"block {block}"
        if name == "denoiser" and inputs["tokens"].shape[1] != config.block_tokens:
            label += ", mid pass"
        is_first = block == partly_filled and label not in calls[name]
        if name == "prompt" or block == full or is_first:
            copies = {tensor: array.copy() for tensor, array in inputs.items()}
            calls[name][label] = RecordedCall(label, copies)

    pixels = roll_out_oracles(config, oracles, on_call)
    recorded = {name: list(by_label.values()) for name, by_label in calls.items()}
    return {**recorded, "vae_encoder": record_encoder_calls(oracles["vae_encoder"], pixels)}


def roll_out_oracles(
    config: Config,
    oracles: dict[str, Oracle],
    on_call: Callable[[str, int, Tensors, Tensors], None],
) -> np.ndarray:
    """Roll the oracles out up to the first block whose context is full.

    Args:
        config: Of the rollout.
        oracles: By graph; of another size than the rollout as in `record_calls`.
        on_call: Called after every call with its graph, block, inputs and outputs. The arrays are
            overwritten by the next call.

    Returns:
        The frames of the last block, [4 B_f, 3, H, W].
    """
    blocks = recorded_blocks(config)

    def bind(name: str, arrays: Arrays) -> Callable[[], None]:
        def call() -> None:
            block, spec = rollout.cache.committed, oracles[name].spec
            inputs = {t.name: _repeated(view(arrays[t.name]), t.shape) for t in spec.inputs}
            resized = any(inputs[tensor].shape != arrays[tensor].shape for tensor in inputs)
            if resized and block not in blocks:
                return
            outputs = oracles[name].run(inputs)
            on_call(name, block, inputs, outputs)
            for output, result in outputs.items():
                target = view(arrays[output])
                target[...] = result[tuple(map(slice, target.shape))]

        return call

    graphs: Any = {name: SimpleNamespace(bind=partial(bind, name)) for name in oracles}
    rollout = Rollout(config, Backend(HostDevice(), graphs, lambda: None))
    count = blocks[-1] + 1
    rollout.begin(prompt_embedding(config), count, SEED)
    for _ in range(count):
        rollout.next_block()
    return view(rollout.buffers.pixels)[0]


def recorded_blocks(config: Config) -> tuple[int, int]:
    """Return a block whose context is partly filled and that is compressed, and the first one
    whose context is full."""
    full = config.policy.capacity
    return max(config.policy.sink, full // 2), full


def prompt_embedding(config: Config) -> np.ndarray:
    """Return an embedding, float32 [1, T, text_dim]: random where the encoder is not installed."""
    if config.text_encoder == "words":
        return encode_words(PROMPT, config)
    rng = np.random.default_rng(SEED)
    return rng.standard_normal((1, config.text_len, config.text_dim), dtype=np.float32)


def record_encoder_calls(oracle: Oracle, pixels: np.ndarray) -> list[RecordedCall]:
    """Return the first two calls of a start clip.

    Args:
        oracle: Of the encoder.
        pixels: Decoded frames to encode, [n, 3, H, W].
    """
    frames, *states = oracle.spec.inputs
    inputs = {state.name: np.zeros([int(n) for n in state.shape], state.dtype) for state in states}
    calls = []
    for index in range(2):
        inputs["frames"] = _repeated(pixels[index * len(pixels) // 2 :], frames.shape)
        calls.append(RecordedCall(f"frame {index}", inputs))
        outputs = oracle.run(inputs)
        inputs = {state.name: outputs[f"new_{state.name}"] for state in states}
    return calls


def cast_inputs(spec: GraphSpec, inputs: Tensors) -> Tensors:
    """Cast inputs to the dtypes of a graph; the oracle gets the rounded ones as well."""
    return {tensor.name: inputs[tensor.name].astype(tensor.dtype) for tensor in spec.inputs}


def resize_call(spec: GraphSpec, call: RecordedCall, small: Config, config: Config) -> RecordedCall:
    """Repeat the inputs of a recorded call to the shapes that engines are built for.

    Args:
        spec: The graph's.
        call: Recorded with `small`.
        small: The config of the rollout.
        config: The model's. A context of so many blocks stays one of so many blocks.
    """
    if "kv_len" not in call.inputs or small.context_tokens == config.context_tokens:
        return call
    new = call.inputs["tokens"].shape[1]
    full_size = {
        small.block_tokens: config.block_tokens,
        small.compressed_tokens: config.compressed_tokens,
        small.context_tokens: config.context_tokens,
    }
    valid = int(call.inputs["kv_len"][0]) - new
    valid = full_size.get(valid, valid // small.block_tokens * config.block_tokens)
    sizes = {"N": full_size[new], "C": config.context_tokens}
    inputs = {
        tensor.name: _repeated(
            call.inputs[tensor.name], tuple(sizes.get(str(n), n) for n in tensor.shape)
        )
        for tensor in spec.inputs
    }
    inputs["kv_len"] = np.array([sizes["N"] + valid], np.int64)
    return RecordedCall(call.name, inputs)


def score_bytes(config: Config, call: RecordedCall) -> int:
    """Estimate the bytes that an oracle needs for the attention scores of a layer.

    They are stored before and after softmax, in fp32.
    """
    if "kv_len" not in call.inputs:
        return 0
    new, keys = call.inputs["tokens"].shape[1], int(call.inputs["kv_len"][0])
    return 2 * np.dtype(np.float32).itemsize * config.heads * new * keys


def truncate_context(spec: GraphSpec, inputs: Tensors) -> Tensors:
    """Cut the context of a call's inputs at `kv_len`."""
    slices = context_slices(spec, inputs)
    return {**inputs, **{name: inputs[name][valid] for name, valid, _ in slices}}


def add_garbage(spec: GraphSpec, inputs: Tensors, seed: int) -> Tensors:
    """Fill the context beyond `kv_len` with large finite random values."""
    rng = np.random.default_rng(seed)
    result = dict(inputs)
    for name, valid, unused in context_slices(spec, inputs):
        array = result[name] = inputs[name].copy()
        limits = np.iinfo if array.dtype.kind == "i" else ml_dtypes.finfo
        largest = GARBAGE * float(np.abs(array[valid], dtype=np.float64).max(initial=1))
        largest = min(largest, float(limits(array.dtype).max))
        array[unused] = rng.uniform(-largest, largest, array[unused].shape)
    return result


def has_unused_context(spec: GraphSpec, inputs: Tensors) -> bool:
    """Tell whether any of the context is beyond `kv_len`."""
    return any(inputs[name][unused].size for name, _, unused in context_slices(spec, inputs))


def context_slices(spec: GraphSpec, inputs: Tensors) -> Iterator[tuple[str, Index, Index]]:
    """Yield every input along the context with the indices of its valid and of its unused part."""
    for tensor in spec.inputs:
        if "C" in tensor.shape:
            valid = int(inputs["kv_len"][0]) - inputs["tokens"].shape[1]
            before = (slice(None),) * tensor.shape.index("C")
            yield tensor.name, (*before, slice(valid)), (*before, slice(valid, None))


def _repeated(array: np.ndarray, shape: Shape) -> np.ndarray:
    """Tile or cut an array to a shape; symbolic axes stay as they are."""
    for axis, size in enumerate(shape):
        if isinstance(size, int) and size != array.shape[axis]:
            array = array.take(np.arange(size) % array.shape[axis], axis)
    return array
