"""Writes a bundle: every graph of the contract, then the manifest."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir

from packforcing.config import Config
from packforcing.errors import OutputError
from packforcing.export.graphs import WRAPPERS, export_graph
from packforcing.files import file_record
from packforcing.model import Weights, weight_shapes
from packforcing.runtime.bundle import (
    DTYPES,
    ENGINE_FOLDER,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    contract,
    graph_file,
    write_manifest,
)

LARGEST_INSIDE = 1 << 28  # bytes of weights; a protobuf is built in memory, and ends at two GiB
TOOLS = ("packforcing", "torch", "onnx", "onnxscript")


def export_bundle(
    config: Config,
    weights: Weights,
    directory: str | Path,
    on_graph: Callable[[str, int, int], None] | None = None,
) -> Manifest:
    """Exports a model into `directory`, replacing a bundle that is there, engines included.

    weights: by checkpoint name, as `Model.weights`, `open_weights` and `random_weights` give
    them; each is read when its graph is written and let go again, so that memory stays small
    whatever the size of the model. Graphs are written beside the directory, which changes only
    once all are done. `on_graph` is told each graph's name, its number and how many there are,
    before it is exported. Raises `ExportError` when a graph breaks the contract and `OutputError`
    when the directory cannot be written or holds something that is not a bundle.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it reports absent torchvision ops
    item = np.dtype(DTYPES[config.precision.compute]).itemsize
    needed = item * sum(map(math.prod, weight_shapes(config).values()))
    with writing(directory, needed) as partial:
        for number, name in enumerate(WRAPPERS):
            if on_graph:
                on_graph(name, number, len(WRAPPERS))
            save(export_graph(config, weights, name), partial / graph_file(name))
        tools = {tool: importlib.metadata.version(tool) for tool in TOOLS}
        return complete(partial, config, tools)


@contextmanager
def writing(directory: str | Path, needed: int) -> Iterator[Path]:
    """An empty folder beside `directory`, to write a bundle into; it takes its place at the end.

    needed: bytes. Raises `OutputError` as `export_bundle` does.
    """
    try:
        target = Path(directory).resolve()  # so that '.' has a name and a link stays a link
        if target.exists() and not replaceable(target):
            raise OutputError(f"{target} is not empty and not just a bundle; choose another folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except (OSError, RuntimeError) as error:  # pathlib reports a loop of links as the latter
        raise OutputError(f"cannot write a bundle to {directory}: {error}") from error
    try:
        require_space(partial, needed)
        yield partial
        partial.chmod(0o755)
        replace(target, partial)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def complete(folder: Path, config: Config, tools: dict[str, str]) -> Manifest:
    """Writes the manifest of a bundle whose graphs are all there."""
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        config=config,
        graphs=contract(config),
        files={path.name: file_record(path) for path in sorted(folder.iterdir())},
        tools=tools,
    )
    write_manifest(folder, manifest)
    return manifest


def require_space(folder: Path, needed: int) -> None:
    """Raises `OutputError` unless so many bytes fit on the disk."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"the bundle needs {needed / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB "
            "free: make room or choose a folder on another disk"
        )


def save(graph: ir.Model, path: Path) -> None:
    """Writes a graph, its weights beside it where one file could not hold them."""
    size = sum(value.const_value.nbytes for value in graph.graph.initializers.values()
               if value.const_value is not None)  # fmt: skip
    beside = f"{path.name}.data" if size > LARGEST_INSIDE else None
    if beside is None:  # or what was read from beside another graph would be looked for here
        ir.external_data.load_to_model(graph)
    ir.save(graph, path, external_data=beside)


def replaceable(path: Path) -> bool:
    """Whether a folder is empty or holds a bundle of any schema version and nothing else."""
    if not path.is_dir():
        return False
    found = {entry.name for entry in path.iterdir()}
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=_Listed)
    except (OSError, ValueError):
        return not found
    return found <= {MANIFEST, ENGINE_FOLDER, *manifest.files}


class _Listed(msgspec.Struct):
    schema_version: int
    files: dict[str, object]


def replace(target: Path, new: Path) -> None:
    """Gives a folder another one's name; on an error the old one stays or comes back."""
    if not target.exists():
        new.rename(target)
        return
    retired = new.with_name(f"{new.name}.old")
    target.rename(retired)
    try:
        new.rename(target)
    except OSError:
        retired.rename(target)
        raise
    shutil.rmtree(retired, ignore_errors=True)
