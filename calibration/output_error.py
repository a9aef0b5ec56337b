"""Measure what quantization costs each output of a denoiser, on the inputs of a rollout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from packforcing.calibration.matmuls import not_none
from packforcing.calibration.quantizer import DENOISER
from packforcing.calibration.recipes import OutputLoss
from packforcing.export.oracle import (
    Oracle,
    Tensors,
    oracle_config,
    rehearsal_config,
    roll_out_oracles,
)
from packforcing.export.verify import require_memory
from packforcing.runtime.bundle import DTYPES, GraphSpec, contract, graph_file, read_manifest


def measure_output_losses(
    exact: Path, quantized: Mapping[str, Path]
) -> dict[str, dict[str, OutputLoss]]:
    """Measure the loss of each output of quantized denoisers.

    `exact` is rolled out as `verify` does, up to the first full context. In each call every
    quantized denoiser gets the same inputs, with a quantized context where it reads one. All
    graphs compute in fp32, so the loss is that of the quantized values, not of the arithmetic.
    Counted is what a rollout reads: "flow" in the steps, all other outputs at t = 0.

    Args:
        exact: The bundle to compare with.
        quantized: Bundles by a name.

    Returns:
        By bundle and output. An output that is zero throughout in `exact` has no ratio and is
        left out.

    Raises:
        BackendError: Memory is missing.
    """
    require_memory(exact, *quantized.values())
    config = read_manifest(exact).config
    oracles = {
        name: Oracle(exact / graph_file(name), spec)
        for name, spec in contract(oracle_config(config)).items()
    }
    exact_scales = read_cache_scales(exact)
    denoisers = {name: (_oracle(path), read_cache_scales(path)) for name, path in quantized.items()}
    signal: dict[str, float] = {}
    noise: dict[str, dict[str, float]] = {name: {} for name in denoisers}

    def on_call(graph: str, block: int, inputs: Tensors, outputs: Tensors) -> None:
        if graph != "denoiser":
            return
        is_step = inputs["timestep"][0] > 0
        inputs = dequantize_cache(inputs, exact_scales)
        outputs = dequantize_cache(outputs, exact_scales)
        outputs = {name: array for name, array in outputs.items() if (name == "flow") == is_step}
        for name, array in outputs.items():
            signal[name] = signal.get(name, 0) + np.square(array, dtype=np.float64).sum()
        for bundle, (oracle, scales) in denoisers.items():
            results = oracle.run(quantize_context(inputs, scales, oracle.spec))
            results = dequantize_cache(results, scales)
            for name, array in outputs.items():
                error = np.square(results[name] - array, dtype=np.float64).sum()
                noise[bundle][name] = noise[bundle].get(name, 0) + error

    roll_out_oracles(rehearsal_config(config), oracles, on_call)
    return {
        bundle: {
            name: OutputLoss(
                10 * math.log10(signal[name] / error) if error else None,
                math.sqrt(error / signal[name]) if error else 0.0,
            )
            for name, error in by_output.items()
            if signal[name]
        }
        for bundle, by_output in noise.items()
    }


def _oracle(bundle: Path) -> Oracle:
    spec = contract(oracle_config(read_manifest(bundle).config))["denoiser"]
    return Oracle(bundle / DENOISER, spec)


def read_cache_scales(bundle: Path) -> dict[str, np.ndarray]:
    """Read the scales of a bundle's cache from its denoiser.

    Returns:
        float32 [1, H, 1, d] by the name of each quantized input and output, like "k_ctx.3" and
        "k_new.3"; empty where the cache is not quantized.
    """
    initializers = ir.load(bundle / DENOISER).graph.initializers
    return {
        f"{kind}_{part}.{layer}": not_none(initializers[name].const_value)
        .numpy()
        .astype(np.float32)
        for layer in range(read_manifest(bundle).config.layers)
        for kind in "kv"
        for name in [f"{kind}_ctx.{layer}.step"]
        if name in initializers
        for part in ("ctx", "new")
    }


def dequantize_cache(tensors: Tensors, scales: Mapping[str, np.ndarray]) -> Tensors:
    """Multiply tensors that have scales by them, in fp32."""
    return {
        name: array.astype(np.float32) * scales[name] if name in scales else array
        for name, array in tensors.items()
    }


def quantize_context(
    tensors: Tensors, scales: Mapping[str, np.ndarray], spec: GraphSpec
) -> Tensors:
    """Divide inputs that have scales by them, and round as QuantizeLinear does.

    Args:
        tensors: Inputs of a denoiser, fp32.
        scales: By name of the input.
        spec: The denoiser's, with the quantized dtypes.
    """
    result = dict(tensors)
    for tensor in spec.inputs:
        if tensor.name in scales:
            is_integer = tensor.dtype == DTYPES["int8"]
            limits = (np.iinfo if is_integer else ml_dtypes.finfo)(tensor.dtype)
            value = tensors[tensor.name] / scales[tensor.name]
            value = np.clip(value, float(limits.min), float(limits.max))
            result[tensor.name] = (np.rint(value) if is_integer else value).astype(tensor.dtype)
    return result
