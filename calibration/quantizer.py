"""Write a quantized bundle: standard ONNX, the denoiser's graph changed, all else copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec
import onnx_ir as ir
from onnx_ir.passes import common

from packforcing.calibration.activations import load_statistics
from packforcing.calibration.attention import (
    attention_scales,
    mix_channels,
    quantize_attention,
)
from packforcing.calibration.kv_cache import quantize_cache
from packforcing.calibration.recipes import CACHE_RECIPES, INPUT_RECIPES, SNR_FILE
from packforcing.calibration.scales import fit_cache_scales
from packforcing.calibration.weights import quantize_matrices
from packforcing.errors import BundleError, CalibrationError, ConfigError
from packforcing.export.exporter import new_bundle, save_graph, write_bundle_manifest
from packforcing.export.lint import lint
from packforcing.geometry import layer_matrices, quantized_layers
from packforcing.runtime.bundle import check_files, contract, graph_file, read_manifest
from packforcing.runtime.estimate import weight_block

DENOISER = graph_file("denoiser")


class Quantized(msgspec.Struct, frozen=True, kw_only=True):
    """What `quantize_bundle` did.

    Attributes:
        snr: SQNR of every quantized matrix in dB, lowest first. With statistics it is that of the
            matrix's outputs, without that of its weights.
        before: Bytes of the denoiser's files in the source bundle.
        after: Bytes of the denoiser's files in the quantized bundle.
    """

    snr: dict[str, float]
    before: int
    after: int

    @property
    def lowest_snr(self) -> tuple[str, float] | None:
        """The matrix with the lowest SQNR, and that SQNR in dB; None without quantized weights."""
        return next(iter(self.snr.items()), None)


def quantize_bundle(
    source: str | Path,
    directory: str | Path,
    weights: Literal["int8", "w8a8", "int4", "fp8", "nvfp4"] | None = None,
    cache: Literal["int8", "fp8"] | None = None,
    calibration: str | Path | None = None,
    on_matrix: Callable[[int, int], None] | None = None,
    attention: Literal["fp8"] | None = None,
) -> Quantized:
    """Write a bundle again with quantized weights, cache or attention.

    Args:
        source: The bundle to quantize.
        directory: The folder to write; it changes once the bundle is complete.
        weights: dtype of the matrices of all layers but the first and the last.
        cache: dtype of keys and values.
        calibration: A file of activation statistics that `calibrate` wrote of `source`. A cache,
            attention, and weights that are multiplied in their own dtype, need it; the scales of
            other weights are fitted to it.
        on_matrix: Called with the number of matrices that are done and that of all.
        attention: dtype of the products of attention over the context.

    Returns:
        SQNRs and sizes.

    Raises:
        BundleError: The source is damaged, a weight is NaN or infinite, or the denoiser's matrices
            are not those of the model.
        ConfigError: There is nothing to do, or the bundle is quantized already.
        CalibrationError: Statistics are missing, or are of another model.
        OutputError: The folder cannot be written.
    """
    source = Path(source)
    manifest = read_manifest(source)
    config = manifest.config
    named = (("weights", weights), ("cache", cache), ("attention", attention))
    dtypes = {part: dtype for part, dtype in named if dtype}
    if not dtypes:
        raise ConfigError("nothing to quantize: name --weights, --cache or --attention-dtype")
    for part in dtypes:
        if getattr(config.precision, part) not in (config.precision.compute, None):
            raise ConfigError(
                f"{source} has {part} in {getattr(config.precision, part)} already; name the "
                "bundle that it was made from"
            )
    if calibration is None and (cache or attention or weights in INPUT_RECIPES):
        purpose = "a quantized cache" if cache else attention or weights
        raise CalibrationError(
            f"{purpose} needs activation statistics: make a file with 'packforcing calibrate' and "
            "name it with --calibration"
        )
    if Path(directory).resolve() == source.resolve():
        raise ConfigError(f"{directory} is the bundle to be quantized; choose another folder")
    statistics = load_statistics(calibration, manifest) if calibration else None
    cache_scales = (
        fit_cache_scales(statistics, CACHE_RECIPES[cache]) if statistics and cache else {}
    )
    if weights and not quantized_layers(config):
        raise ConfigError(f"{config.name} has no layer between its first and its last")
    for inputs, outputs in layer_matrices(config):
        if weights and inputs % weight_block(weights, inputs, outputs):
            raise ConfigError(
                f"{config.name} has matrices of {inputs} rows, which {weights} cannot divide into "
                f"blocks of {weight_block(weights, inputs, outputs)}; choose another dtype"
            )
    config = msgspec.structs.replace(
        config, precision=msgspec.structs.replace(config.precision, **dtypes)
    )
    scales = attention_scales(statistics, config, cache_scales) if statistics and attention else []
    check_files(source, manifest)
    with new_bundle(directory, sum(record.bytes for record in manifest.files.values())) as folder:
        for name in manifest.files:
            if not name.startswith(DENOISER):
                shutil.copyfile(source / name, folder / name)
        model = ir.load(source / DENOISER)
        snr: dict[str, float] = {}
        if weights:
            try:
                snr = quantize_matrices(model, config, weights, statistics, on_matrix)
            except ValueError as error:
                raise BundleError(f"{source / DENOISER}: {error}") from error
        if cache:
            quantize_cache(model.graph, cache_scales, cache)
        if attention:
            mix_channels(model.graph, config.head_dim)
            quantize_attention(model.graph, [scale.max(-1) for scale in scales], attention)
        common.RemoveUnusedNodesPass()(model)  # the weights that were quantized, and their casts
        lint("denoiser", model, contract(config)["denoiser"])
        save_graph(model, folder / DENOISER)
        if snr:
            (folder / SNR_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(snr)))
        write_bundle_manifest(folder, config, manifest.tools, manifest.origins)
        before, after = (
            sum(path.stat().st_size for path in bundle.glob(f"{DENOISER}*"))
            for bundle in (source, folder)
        )
    return Quantized(snr=snr, before=before, after=after)
