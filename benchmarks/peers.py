"""Time the demo model's graphs and blocks in the runtime and in its peers, side by side.

    python -m benchmarks.peers [--json FILE] [--threads N] [--rounds N]

Every round calls each graph once in each of them, so that a busy machine slows all alike; ratios
are of the medians. The peers run the same weights on the same inputs, with a full context:

    runtime     the bundle's graphs in ONNX Runtime, bound to fixed buffers
    openvino    the same graphs in OpenVINO, where it is installed: it is no dependency
    eager       the PyTorch modules that the graphs are exported from
    compiled    the same through torch.compile

Outputs are compared before anything is timed. `blocks` makes a video in the runtime and in the
reference rollout, block by block in turn, and divides the runtime's time into parts. `roof` is this
machine's rate for a matrix product (NumPy, fp32), and what a block's products take at it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from packforcing import model_config
from packforcing.autoencoder import State
from packforcing.geometry import operations
from packforcing.machine import cpu_cores
from packforcing.model import Model, load_model
from packforcing.reference import rollout
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.bench import matrix_rate
from packforcing.runtime.bundle import GPU_CALLS, contract, graph_file
from packforcing.runtime.device import HostDevice
from packforcing.runtime.estimate import calls_per_block
from packforcing.sampler import draw_noise
from packforcing.words import encode_words

CONFIG = model_config("demo")
PROMPT = "a red star over navy stripes"
BLOCKS = 40
Inputs = dict[str, np.ndarray]
Call = Callable[[], np.ndarray]  # returns the first output


def draw_inputs(call: str) -> Inputs:
    """Draw what a call reads: standard normal numbers, and a context that is full."""
    rng = np.random.default_rng(0)
    new = CONFIG.compressed_tokens if call.endswith("compressed") else CONFIG.block_tokens
    axes = {"N": new, "C": CONFIG.context_tokens}
    inputs = {}
    for tensor in contract(CONFIG)[GPU_CALLS[call]].inputs:
        shape = [axes[n] if isinstance(n, str) else n for n in tensor.shape]
        inputs[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
    if "kv_len" in inputs:
        inputs["kv_len"][:] = new + CONFIG.context_tokens
    return inputs


def runtime_call(session: Session, call: str, inputs: Inputs) -> Call:
    """Bind a graph of the session to the inputs."""
    spec, device = contract(CONFIG)[GPU_CALLS[call]], HostDevice()
    new = inputs["tokens"].shape[1] if "tokens" in inputs else 0
    axes = {"N": new, "C": CONFIG.context_tokens}
    arrays = {}
    for tensor in (*spec.inputs, *spec.outputs):
        shape = tuple(axes[n] if isinstance(n, str) else n for n in tensor.shape)
        arrays[tensor.name] = device.allocate("peers", shape, tensor.dtype, host=True)
        if tensor.name in inputs:
            arrays[tensor.name].host[...] = inputs[tensor.name]
    graph = session.backend.graphs[GPU_CALLS[call]].bind(arrays)
    first = arrays[spec.outputs[0].name].host

    def run() -> np.ndarray:
        graph()
        return first

    return run


def openvino_call(core: Any, call: str, inputs: Inputs, threads: int) -> Call:
    """Compile a graph of the bundle with OpenVINO for exactly these shapes."""
    model = core.read_model(demo_bundle() / graph_file(GPU_CALLS[call]))
    model.reshape({name: list(array.shape) for name, array in inputs.items()})
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    for name, array in inputs.items():
        request.set_tensor(name, type(request.get_tensor(name))(array, shared_memory=True))

    def run() -> np.ndarray:
        request.infer()
        return request.get_output_tensor(0).data

    return run


def torch_call(model: Model, call: str, inputs: Inputs, compiled: bool) -> Call:
    """Call the module that a graph is exported from."""
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    wrap = torch.compile if compiled else lambda function: function
    if GPU_CALLS[call] == "denoiser":

        def pairs(name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
            layers = range(CONFIG.layers)
            return [(tensors[f"{name}k.{n}"], tensors[f"{name}v.{n}"]) for n in layers]

        cross = pairs("cross_")
        context = [
            (tensors[f"k_ctx.{layer}"], tensors[f"v_ctx.{layer}"]) for layer in range(CONFIG.layers)
        ]
        rope = tensors["rope_cos"], tensors["rope_sin"]
        context_rope = tensors["ctx_cos"], tensors["ctx_sin"]
        transformer = wrap(model.transformer)
        return lambda: transformer(
            tensors["tokens"],
            tensors["extra"],
            tensors["timestep"],
            cross,
            rope,
            context,
            context_rope,
        )[0].numpy()
    if call == "compressor":
        compressor = wrap(model.compressor)
        return lambda: compressor(tensors["latents"], tensors["pixels"])[0].numpy()
    state: State = [tensors[name] for name in tensors if name.startswith("state.")]
    decode = wrap(model.autoencoder.decode_frame)
    return lambda: decode(tensors["latent"], state)[0].numpy()


def time_graphs(session: Session, model: Model, threads: int, rounds: int) -> dict[str, Any]:
    """Return median milliseconds of each call in each peer, and ratios to the runtime."""
    core = None
    with suppress(ImportError):
        import openvino

        core = openvino.Core()
    result: dict[str, Any] = {}
    for call in GPU_CALLS:
        inputs = draw_inputs(call)
        calls = {"runtime": runtime_call(session, call, inputs)}
        if core is not None:
            calls["openvino"] = openvino_call(core, call, inputs, threads)
        calls["eager"] = torch_call(model, call, inputs, compiled=False)
        calls["compiled"] = torch_call(model, call, inputs, compiled=True)
        truth = calls["runtime"]().copy()
        difference = {
            name: float(np.abs(run().reshape(truth.shape) - truth).max())
            for name, run in calls.items()
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 3):
            for name, run in calls.items():
                began = time.perf_counter()
                run()
                if number >= 3:
                    times[name].append(1e3 * (time.perf_counter() - began))
        median = {name: statistics.median(values) for name, values in times.items()}
        result[call] = {
            "milliseconds": {name: round(value, 3) for name, value in median.items()},
            "over_runtime": _over_runtime(median),
            "largest_difference": difference,
        }
    return result


def time_blocks(session: Session, model: Model, blocks: int = BLOCKS) -> dict[str, Any]:
    """Return median milliseconds of a block, once every partition is full."""
    compiled = Model(
        CONFIG, torch.compile(model.transformer, dynamic=True),
        model.autoencoder, torch.compile(model.compressor),
    )  # fmt: skip
    text = torch.from_numpy(encode_words(PROMPT, CONFIG))

    def reference(model: Model) -> Iterator[object]:
        return rollout(model, text, blocks, lambda b, s: draw_noise(CONFIG, 0, b, s))

    frames = blocks * CONFIG.block_pixel_frames - CONFIG.trimmed_frames
    runs: dict[str, Iterator[object]] = {
        "runtime": session.stream(PROMPT, frames / CONFIG.fps),
        "eager": reference(model),
        "compiled": reference(compiled),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    inside: list[dict[str, float]] = []
    for block in range(blocks):
        for name, run in runs.items():
            graphs, began = session.graph_seconds(), time.perf_counter()
            next(run)
            seconds = time.perf_counter() - began
            if block >= min(CONFIG.policy.capacity + 2, blocks // 2):
                times[name].append(1e3 * seconds)
                if name == "runtime":
                    after = session.graph_seconds()
                    inside.append({graph: 1e3 * (after[graph] - graphs[graph]) for graph in after})
    median = {name: statistics.median(values) for name, values in times.items()}
    parts = {
        graph: round(statistics.median(one[graph] for one in inside), 2) for graph in inside[0]
    }
    outside = median["runtime"] - sum(parts.values())
    return {
        "milliseconds": {name: round(value, 2) for name, value in median.items()},
        "over_runtime": _over_runtime(median),
        "parts": {**parts, "between the calls": round(outside, 2)},
    }


def _over_runtime(median: dict[str, float]) -> dict[str, float]:
    return {
        name: round(value / median["runtime"], 2)
        for name, value in median.items()
        if name != "runtime"
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--threads", type=int, default=cpu_cores())
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(CONFIG, demo_bundle().parent / "model.safetensors")
    with torch.inference_mode(), Session.open(demo_bundle(), threads=args.threads) as session:
        rates = [matrix_rate(args.threads)]
        graphs = time_graphs(session, model, args.threads, args.rounds)
        blocks = time_blocks(session, model)
        rates.append(matrix_rate(args.threads))
    work = operations(CONFIG)
    total = sum(times * work[call] for call, times in calls_per_block(CONFIG).items())
    roof = {
        "gflops": round(max(rates) / 1e9, 1),
        "ms_per_block": round(1e3 * total / max(rates), 1),
    }
    result = {"graphs": graphs, "blocks": blocks, "roof": roof}
    print(text := json.dumps(result, indent=1))
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
