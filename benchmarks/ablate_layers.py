"""Measure how sensitive each part of a denoiser is to quantized weights.

    python -m benchmarks.ablate_layers [BUNDLE]

One part at a time has its matrices quantized as `packforcing quantize` would without statistics:
each layer, and what stands around the layers, which `quantize` leaves as it is. What that costs is
the error's RMS relative to the flow's, both denoisers on the same inputs in every step of a
rollout, in fp32.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import msgspec
import onnx_ir as ir

from packforcing.calibration.matmuls import not_none, stored_weight
from packforcing.calibration.output_error import measure_output_losses
from packforcing.calibration.quantizer import DENOISER
from packforcing.calibration.weights import quantize_matmul
from packforcing.errors import PackForcingError
from packforcing.export.exporter import save_graph
from packforcing.files import write_file
from packforcing.runtime import demo_bundle
from packforcing.runtime.bundle import MANIFEST

KINDS = "int8", "int4"


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
    """Quantize one part of a bundle's denoiser at a time and measure its flow."""
    counts = {
        name: len(products) for name, products in parts(ir.load(bundle / DENOISER).graph).items()
    }
    variants: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in counts:
            for kind in KINDS:
                model = ir.load(bundle / DENOISER)
                for number, product in enumerate(parts(model.graph)[name]):
                    quantize_matmul(product, f"{name}.{number}", kind)
                variants[f"{name} {kind}"] = path = Path(folder, f"{name}-{kind}")
                path.mkdir()
                shutil.copyfile(bundle / MANIFEST, path / MANIFEST)
                save_graph(model, path / DENOISER)
        losses = measure_output_losses(bundle, variants)
    return [
        PartCost(name, count, {kind: losses[f"{name} {kind}"]["flow"].error for kind in KINDS})
        for name, count in counts.items()
    ]


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    options.add_argument("--json", type=Path, help="also write the results here")
    args = options.parse_args()
    costs = measure_parts(args.bundle)
    print(f"{'part':18}{'matrices':>10}" + "".join(f"{kind:>10}" for kind in KINDS))
    for cost in costs:
        errors = "".join(f"{cost.errors[kind]:10.1e}" for kind in KINDS)
        print(f"{cost.part:18}{cost.matrices:10}{errors}")
    if args.json:
        write_file(args.json, msgspec.json.encode([cost._asdict() for cost in costs]))


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
