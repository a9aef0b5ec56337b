"""Export the reference model to ONNX graphs, build engines from them, verify both.

Exporting needs the extra `export`, building `tensorrt-rtx` or `tensorrt`, verifying `verify`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from packforcing.config import Config
    from packforcing.model import Weights
    from packforcing.origins import Origin
    from packforcing.runtime.bundle import Manifest

__all__ = ["export_bundle"]


def export_bundle(
    config: Config,
    weights: Weights,
    directory: str | Path,
    on_graph: Callable[[str, int, int], None] | None = None,
    origins: Sequence[Origin] = (),
) -> Manifest:
    """Write the bundle of a model; see `packforcing.export.exporter.export_bundle`."""
    from packforcing.export.exporter import export_bundle

    return export_bundle(config, weights, directory, on_graph, origins)
