"""Measure how sensitive each part of a denoiser is to quantized weights.

    python -m benchmarks.ablate_layers [BUNDLE] [--calibration FILE]

One part at a time has its matrices quantized as `packforcing quantize` would without statistics:
each layer, and what stands around the layers, which `quantize` leaves as it is. What that costs is
the error's RMS relative to the flow's, both denoisers on the same inputs in every step of a
rollout, in fp32. With FILE, the bundle's statistics, it is products in int8 and fp4 instead: those
of each inner layer, and of each matrix in all inner layers.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import onnx_ir as ir

from packforcing.calibration.activations import load_statistics
from packforcing.calibration.matmuls import MATRIX_NAMES, layer_matmuls, not_none, stored_weight
from packforcing.calibration.output_error import measure_output_losses
from packforcing.calibration.quantizer import DENOISER
from packforcing.calibration.weights import quantize_matmul, quantize_products
from packforcing.errors import PackForcingError
from packforcing.export.exporter import save_graph
from packforcing.files import write_file
from packforcing.geometry import quantized_layers
from packforcing.runtime import demo_bundle
from packforcing.runtime.bundle import MANIFEST, read_manifest

KINDS, PRODUCTS = ("int8", "int4"), ("w8a8", "nvfp4")


class PartCost(NamedTuple):
    """A part of a denoiser, the number of its matrices, and the flow's relative error by dtype."""

    part: str
    matrices: int
    errors: dict[str, float]


def parts(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Return the products of each part with its stored matrices: blocks.0, ..., head."""
    products: dict[str, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and stored_weight(node).const_value is not None:
            name = not_none(stored_weight(node).name).removeprefix("transformer.")
            products.setdefault(re.match(r"blocks\.\d+|[^.]+", name)[0], []).append(node)
    return products


def measure_parts(bundle: Path) -> list[PartCost]:
    """Quantize the weights of one part of a denoiser at a time and measure its flow."""
    counts = {
        name: len(products) for name, products in parts(ir.load(bundle / DENOISER).graph).items()
    }

    def quantize(model: ir.Model, name: str, kind: str) -> None:
        for number, product in enumerate(parts(model.graph)[name]):
            quantize_matmul(product, f"{name}.{number}", kind)

    return measure_variants(bundle, counts, KINDS, quantize)


def measure_products(bundle: Path, calibration: Path) -> list[PartCost]:
    """Quantize the products of one inner layer or of one kind at a time and measure the flow.

    Args:
        bundle: Of an exact model.
        calibration: Its statistics.
    """
    manifest = read_manifest(bundle)
    statistics, layers = load_statistics(calibration, manifest), quantized_layers(manifest.config)

    def matmuls(model: ir.Model, name: str) -> dict[str, ir.Node]:
        inner = layer_matmuls(model.graph, manifest.config, layers)
        return {key: node for key, node in inner.items() if f".{name}." in f".{key}."}

    def quantize(model: ir.Model, name: str, kind: str) -> None:
        quantize_products(model, matmuls(model, name), kind, statistics)

    names = [*(f"blocks.{layer}" for layer in layers), *MATRIX_NAMES]
    exact = ir.load(bundle / DENOISER)
    counts = {name: len(matmuls(exact, name)) for name in names}
    return measure_variants(bundle, counts, PRODUCTS, quantize)


def measure_variants(
    bundle: Path,
    counts: dict[str, int],
    kinds: tuple[str, ...],
    quantize: Callable[[ir.Model, str, str], None],
) -> list[PartCost]:
    """Measure the flow of a denoiser with one part quantized.

    Args:
        bundle: The exact one.
        counts: Matrices of each part, by name.
        kinds: dtypes.
        quantize: Quantizes a part of a model in place, by its name and the dtype.
    """
    variants: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in counts:
            for kind in kinds:
                model = ir.load(bundle / DENOISER)
                quantize(model, name, kind)
                variants[f"{name} {kind}"] = path = Path(folder, f"{name}-{kind}")
                path.mkdir()
                shutil.copyfile(bundle / MANIFEST, path / MANIFEST)
                save_graph(model, path / DENOISER)
        losses = measure_output_losses(bundle, variants)
    return [
        PartCost(name, count, {kind: losses[f"{name} {kind}"]["flow"].error for kind in kinds})
        for name, count in counts.items()
    ]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    options.add_argument("--calibration", type=Path, help="statistics: measure products instead")
    options.add_argument("--json", type=Path, help="also write the results here")
    args = options.parse_args()
    if args.calibration:
        costs = measure_products(args.bundle, args.calibration)
    else:
        costs = measure_parts(args.bundle)
    print(f"{'part':18}{'matrices':>10}" + "".join(f"{kind:>10}" for kind in costs[0].errors))
    for cost in costs:
        errors = "".join(f"{error:10.1e}" for error in cost.errors.values())
        print(f"{cost.part:18}{cost.matrices:10}{errors}")
    if args.json:
        write_file(args.json, msgspec.json.encode([cost._asdict() for cost in costs]))


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
