"""What quantising costs each output of a denoiser, on what a rollout gives it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from packforcing.calibration.matmuls import known
from packforcing.calibration.recipes import Loss
from packforcing.export.oracle import Oracle, Tensors, in_full, rehearsal, roll_out
from packforcing.export.verify import check_memory
from packforcing.runtime.bundle import DTYPES, GraphSpec, contract, graph_file, read_manifest

DENOISER = graph_file("denoiser")


def output_losses(exact: Path, quantised: Mapping[str, Path]) -> dict[str, dict[str, Loss]]:
    """The loss of each output of the denoiser in quantised bundles, against that in `exact`.

    The rollout is the one that `verify` records, of `exact` up to the first full context. In each
    of its calls every quantised denoiser is given the same inputs, a context in 8 bits where it
    reads one. All graphs are computed in fp32, so what differs is what they hold, not how they are
    run. Counted is what a rollout reads: flow in the steps, all else at t = 0. An output that is
    zero throughout in `exact` has no ratio and is left out. Raises `BackendError` where memory is
    missing.
    """
    check_memory(exact, *quantised.values())
    config = read_manifest(exact).config
    oracles = {
        name: Oracle(exact / graph_file(name), spec)
        for name, spec in contract(in_full(config)).items()
    }
    own = cache_steps_of(exact)
    others = {name: (_oracle(path), cache_steps_of(path)) for name, path in quantised.items()}
    signal: dict[str, float] = {}
    noise: dict[str, dict[str, float]] = {name: {} for name in others}

    def on_call(graph: str, block: int, inputs: Tensors, outputs: Tensors) -> None:
        if graph != "denoiser":
            return
        step = inputs["timestep"][0] > 0
        given, wanted = opened(inputs, own), opened(outputs, own)
        wanted = {name: array for name, array in wanted.items() if (name == "flow") == step}
        for name, array in wanted.items():
            signal[name] = signal.get(name, 0) + np.square(array, dtype=np.float64).sum()
        for bundle, (oracle, steps) in others.items():
            found = opened(oracle.run(stored(given, steps, oracle.spec)), steps)
            for name, array in wanted.items():
                error = np.square(found[name] - array, dtype=np.float64).sum()
                noise[bundle][name] = noise[bundle].get(name, 0) + error

    roll_out(rehearsal(config), oracles, on_call)
    return {
        bundle: {
            name: Loss(
                10 * math.log10(signal[name] / error) if error else None,
                math.sqrt(error / signal[name]) if error else 0.0,
            )
            for name, error in by_output.items()
            if signal[name]
        }
        for bundle, by_output in noise.items()
    }


def _oracle(bundle: Path) -> Oracle:
    spec = contract(in_full(read_manifest(bundle).config))["denoiser"]
    return Oracle(bundle / DENOISER, spec)


def cache_steps_of(bundle: Path) -> dict[str, np.ndarray]:
    """The steps of a cache in 8 bits, float32 [1, H, 1, d], by each tensor that is in such steps;
    none where the cache is in the precision that is computed."""
    held = ir.load(bundle / DENOISER).graph.initializers
    return {
        f"{kind}_{part}.{layer}": known(held[name].const_value).numpy().astype(np.float32)
        for layer in range(read_manifest(bundle).config.layers)
        for kind in "kv"
        for name in [f"{kind}_ctx.{layer}.step"]
        if name in held
        for part in ("ctx", "new")
    }


def opened(tensors: Tensors, steps: Mapping[str, np.ndarray]) -> Tensors:
    """What tensors stand for, in fp32 where they are in steps."""
    return {
        name: array.astype(np.float32) * steps[name] if name in steps else array
        for name, array in tensors.items()
    }


def stored(tensors: Tensors, steps: Mapping[str, np.ndarray], spec: GraphSpec) -> Tensors:
    """Inputs as a graph takes them: in 8 bits where it has steps, as QuantizeLinear rounds."""
    found = dict(tensors)
    for tensor in spec.inputs:
        if tensor.name in steps:
            whole = tensor.dtype == DTYPES["int8"]
            limits = np.iinfo if whole else ml_dtypes.finfo
            least, most = (float(getattr(limits(tensor.dtype), end)) for end in ("min", "max"))
            value = np.clip(tensors[tensor.name] / steps[tensor.name], least, most)
            found[tensor.name] = (np.rint(value) if whole else value).astype(tensor.dtype)
    return found
