"""The oracle that a bundle is verified with, and the inputs that it is verified on.

The oracle of a graph is the same graph in fp32 on ONNX Runtime's CPU provider with nothing
optimised: where a bundle computes in fp16, every tensor is widened and the weights keep their
values. The oracles of a bundle roll out a short video, and the inputs of their calls are recorded
at a block whose context is partly filled and at the first one whose context is full.

Attention scores are stored in full on the CPU. Where that takes too much, the denoiser, whose
token counts are open, is rolled out on the smallest grid with a context of one block of each
kind and every other step; graphs of a fixed size are given those inputs repeated to their size.
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
from packforcing.runtime.backends import Backend
from packforcing.runtime.backends.onnxruntime import FP8
from packforcing.runtime.buffers import Arrays
from packforcing.runtime.bundle import DTYPES, GraphSpec, Shape
from packforcing.runtime.device import HostDevice, view
from packforcing.runtime.rollout import Rollout
from packforcing.words import encode_words

HALF, FULL = ir.DataType.FLOAT16, ir.DataType.FLOAT
PROMPT, SEED = "a red star over navy stripes", 0
SCORES = 1 << 28  # bytes of attention scores that a layer may take
SMALLEST = 4  # tokens along an axis that the compressor takes at least
GARBAGE = 16  # times the largest valid magnitude; finite, since 0 * NaN is NaN anywhere

Tensors = dict[str, np.ndarray]
Index = tuple[slice, ...]


class Call(msgspec.Struct, frozen=True):
    """A recorded call of a graph."""

    name: str
    inputs: Tensors


class Oracle:
    """A graph in fp32, nothing optimised; `rounded` as in `widen`."""

    def __init__(self, path: Path, spec: GraphSpec, rounded: bool = False) -> None:
        import onnxruntime as ort

        model = ir.load(path)
        widen(model, rounded)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.force_spinning_stop", "1")  # graphs take turns
        options.enable_cpu_mem_arena = False  # or what the largest call took would be kept
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
        """Outputs by name, fp32; inputs may be in another precision."""
        from onnxruntime import OrtValue

        def value(array: np.ndarray) -> OrtValue:
            if array.dtype == DTYPES["fp8"]:  # the library takes it by its bytes alone
                return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), FP8)
            return OrtValue.ortvalue_from_numpy(array)

        given = {
            tensor.name: value(np.ascontiguousarray(inputs[tensor.name], tensor.dtype))
            for tensor in self.spec.inputs
        }
        names = [tensor.name for tensor in self.spec.outputs]
        found = self._session.run_with_ort_values(names, given)
        return {t.name: out.numpy().view(t.dtype) for t, out in zip(self.spec.outputs, found)}


def widen(model: ir.Model, rounded: bool = False) -> None:
    """Turns every float16 of a graph into float32; a weight keeps its value and its storage.

    rounded: what an operation gave in float16 is rounded to that, as a float32.
    """
    graph = model.graph
    nodes = list(graph)
    for node in nodes:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.INT and name in ("to", "dtype", "output_dtype"):
                if attribute.as_int() == HALF:
                    node.attributes[name] = ir.AttrInt64(name, FULL)
            elif attribute.type == ir.AttributeType.TENSOR:
                tensor = attribute.as_tensor()
                if tensor.dtype == HALF:
                    wide = ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
                    node.attributes[name] = ir.AttrTensor(name, wide)
        for value in node.outputs:
            if value.dtype == HALF:
                value.dtype = FULL
                if rounded:
                    graph.insert_after(node, _cast(graph, value, HALF, FULL))
    for value in graph.inputs:
        if value.dtype == HALF:
            value.dtype = FULL
    for value in list(graph.initializers.values()):
        if value.dtype == HALF:
            graph.insert_before(nodes[0], _cast(graph, value, FULL))


def _cast(graph: ir.Graph, value: ir.Value, *types: ir.DataType) -> list[ir.Node]:
    """Casts of a value, one after the other, that all of its readers read from then on."""
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


def in_full(config: Config) -> Config:
    """What the oracles are of: all in fp32, but for a cache that the graph itself quantises."""
    cache = config.precision.cache
    kept = Precision() if cache == config.precision.compute else Precision(cache=cache)
    return msgspec.structs.replace(config, precision=kept)


def rehearsal(config: Config) -> Config:
    """The rollout that is recorded: in fp32, and small where a layer's scores would not be."""
    plain = in_full(config)
    new, context = config.block_tokens, config.context_tokens
    if config.heads * new * (new + context) * np.dtype(np.float32).itemsize <= SCORES:
        return plain
    side = SMALLEST * config.spatial_factor * config.patch
    policy = config.policy
    one_each = {name: min(getattr(policy, name), 1) for name in ("sink", "mid", "recent")}
    policy = msgspec.structs.replace(policy, **one_each)
    return msgspec.structs.replace(
        plain, height=side, width=side, policy=policy, timesteps=config.timesteps[::2]
    )


def record(config: Config, oracles: dict[str, Oracle]) -> dict[str, list[Call]]:
    """Inputs of every graph, from a rollout of the oracles.

    The partly filled block gives its first call of each kind, the full one its last: a noisy step
    and a commit. A graph of another size than the rollout is given inputs repeated to its own, in
    these two blocks alone, and what it gives is cut.
    """
    partly, full = recorded_blocks(config)
    calls: dict[str, dict[str, Call]] = {name: {} for name in oracles}

    def keep(name: str, block: int, inputs: Tensors, outputs: Tensors) -> None:
        label = f"block {block}"
        if name == "denoiser" and inputs["tokens"].shape[1] != config.block_tokens:
            label += ", mid pass"
        if name == "prompt" or block == full or (block == partly and label not in calls[name]):
            copies = {tensor: array.copy() for tensor, array in inputs.items()}
            calls[name][label] = Call(label, copies)

    pixels = roll_out(config, oracles, keep)
    found = {name: list(by_label.values()) for name, by_label in calls.items()}
    return {**found, "vae_encoder": encoder_calls(oracles["vae_encoder"], pixels)}


def roll_out(
    config: Config,
    oracles: dict[str, Oracle],
    on_call: Callable[[str, int, Tensors, Tensors], None],
) -> np.ndarray:
    """A rollout of the oracles up to the first block whose context is full; returns that block's
    frames, [4 B_f, 3, H, W].

    on_call is told of every call which graph, in which block, and its inputs and outputs, which the
    next call overwrites; a graph of another size than the rollout is called as `record` says.
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
    rollout.begin(embedding(config), count, SEED)
    for _ in range(count):
        rollout.next_block()
    return view(rollout.buffers.pixels)[0]


def recorded_blocks(config: Config) -> tuple[int, int]:
    """A block whose context is partly filled and that is compressed, and the first full one."""
    full = config.policy.capacity
    return max(config.policy.sink, full // 2), full


def embedding(config: Config) -> np.ndarray:
    """A prompt's, float32 [1, T, text_dim]; a seeded draw where its encoder is not at hand."""
    if config.text_encoder == "words":
        return encode_words(PROMPT, config)
    rng = np.random.default_rng(SEED)
    return rng.standard_normal((1, config.text_len, config.text_dim), dtype=np.float32)


def encoder_calls(oracle: Oracle, pixels: np.ndarray) -> list[Call]:
    """The first call of a clip and the one after it, on decoded frames [n, 3, H, W]."""
    frames, *states = oracle.spec.inputs
    inputs = {state.name: np.zeros([int(n) for n in state.shape], state.dtype) for state in states}
    calls = []
    for index in range(2):
        inputs["frames"] = _repeated(pixels[index * len(pixels) // 2 :], frames.shape)
        calls.append(Call(f"frame {index}", inputs))
        after = oracle.run(inputs)
        inputs = {state.name: after[f"new_{state.name}"] for state in states}
    return calls


def as_stored(spec: GraphSpec, inputs: Tensors) -> Tensors:
    """Inputs in the types that the bundle's graph takes; the oracle is given the rounded ones."""
    return {tensor.name: inputs[tensor.name].astype(tensor.dtype) for tensor in spec.inputs}


def sized(spec: GraphSpec, call: Call, small: Config, config: Config) -> Call:
    """A call recorded under `small`, with inputs repeated to the sizes that engines are for.

    A context of so many blocks stays one of so many blocks.
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
    blocks = full_size.get(valid, valid // small.block_tokens * config.block_tokens)
    sizes = {"N": full_size[new], "C": config.context_tokens}
    inputs = {
        tensor.name: _repeated(
            call.inputs[tensor.name], tuple(sizes.get(str(n), n) for n in tensor.shape)
        )
        for tensor in spec.inputs
    }
    inputs["kv_len"] = np.array([sizes["N"] + blocks], np.int64)
    return Call(call.name, inputs)


def without_rest(spec: GraphSpec, inputs: Tensors) -> Tensors:
    """The inputs with a context that ends at `kv_len`."""
    return {**inputs, **{name: inputs[name][valid] for name, valid, _ in context(spec, inputs)}}


def with_garbage(spec: GraphSpec, inputs: Tensors, seed: int) -> Tensors:
    """The inputs with large finite values wherever the context lies beyond `kv_len`."""
    rng = np.random.default_rng(seed)
    changed = dict(inputs)
    for name, valid, rest in context(spec, inputs):
        array = changed[name] = inputs[name].copy()
        limits = np.iinfo if array.dtype.kind == "i" else ml_dtypes.finfo
        largest = GARBAGE * float(np.abs(array[valid], dtype=np.float64).max(initial=1))
        largest = min(largest, float(limits(array.dtype).max))
        array[rest] = rng.uniform(-largest, largest, array[rest].shape)
    return changed


def has_rest(spec: GraphSpec, inputs: Tensors) -> bool:
    """Whether any of the context lies beyond `kv_len`."""
    return any(inputs[name][rest].size for name, _, rest in context(spec, inputs))


def context(spec: GraphSpec, inputs: Tensors) -> Iterator[tuple[str, Index, Index]]:
    """Every input along the context, with what indexes its valid part and the rest."""
    for tensor in spec.inputs:
        if "C" in tensor.shape:
            valid = int(inputs["kv_len"][0]) - inputs["tokens"].shape[1]
            before = (slice(None),) * tensor.shape.index("C")
            yield tensor.name, (*before, slice(valid)), (*before, slice(valid, None))


def _repeated(array: np.ndarray, shape: Shape) -> np.ndarray:
    """An array tiled, or cut, to a shape; an axis that is open stays as it is."""
    for axis, size in enumerate(shape):
        if isinstance(size, int) and size != array.shape[axis]:
            array = array.take(np.arange(size) % array.shape[axis], axis)
    return array
