"""How sensitive each part of a denoiser is to quantised weights: a table.

    python -m benchmarks.ablate_layers [BUNDLE]

One part at a time has its matrices quantised as `packforcing quantize` would without statistics:
each layer, and what stands around the layers, which `quantize` leaves as it is. What that costs is
the error's RMS relative to the flow's, both denoisers given the same inputs in every step of a
rollout, in fp32.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import onnx_ir as ir

from packforcing.calibration.matmuls import known, stored
from packforcing.calibration.output_error import output_losses
from packforcing.calibration.weights import DENOISER, quantize_product
from packforcing.errors import PackForcingError
from packforcing.export.exporter import save_graph
from packforcing.runtime import demo_bundle
from packforcing.runtime.bundle import MANIFEST

KINDS = "int8", "int4"


def parts(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """The products of each part with its stored matrices: blocks.0, ..., time_embedding, head."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and stored(known(node.inputs[1])).const_value is not None:
            name = known(stored(known(node.inputs[1])).name).removeprefix("transformer.")
            found.setdefault(re.match(r"blocks\.\d+|[^.]+", name)[0], []).append(node)
    return found


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("bundle", type=Path, nargs="?", default=demo_bundle())
    bundle = options.parse_args().bundle
    found = parts(ir.load(bundle / DENOISER).graph)
    counts = {name: len(products) for name, products in found.items()}
    variants: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in counts:
            for kind in KINDS:
                model = ir.load(bundle / DENOISER)
                for number, product in enumerate(parts(model.graph)[name]):
                    quantize_product(product, f"{name}.{number}", kind)
                variants[f"{name} {kind}"] = path = Path(folder, f"{name}-{kind}")
                path.mkdir()
                shutil.copyfile(bundle / MANIFEST, path / MANIFEST)
                save_graph(model, path / DENOISER)
        losses = output_losses(bundle, variants)
    print(f"{'part':18}{'matrices':>10}" + "".join(f"{kind:>10}" for kind in KINDS))
    for name, count in counts.items():
        errors = "".join(f"{losses[f'{name} {kind}']['flow'].error:10.1e}" for kind in KINDS)
        print(f"{name:18}{count:10}{errors}")


if __name__ == "__main__":
    try:
        main()
    except PackForcingError as error:
        sys.exit(f"error: {error}")
