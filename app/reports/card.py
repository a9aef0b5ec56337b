"""The model card of a bundle: README.md of its repository on the hub, with metadata on top."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from packforcing.app.reports.page import fill_template
from packforcing.app.reports.plan import ROWS
from packforcing.app.reports.tables import model_rows
from packforcing.checkpoints.published import PARTS, describe_differences
from packforcing.extras import optional_imports
from packforcing.origins import UNKNOWN, UNREAD, Origin
from packforcing.runtime.nvml import UNIFIED_TARGETS
from packforcing.runtime.plan import TARGETS, make_plan
from packforcing.units import format_memory

if TYPE_CHECKING:
    from packforcing.config import Config
    from packforcing.runtime.bundle import Manifest
    from packforcing.runtime.engine_records import EngineRecord

PROMPTS = {"words": "a red star over navy stripes", "umt5-xxl": "a cat walks on the beach"}
# What the hub takes for a license, of software and weights (its documentation, "Licenses")
LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "bsl-1.0", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc0-1.0", "creativeml-openrail-m", "gemma", "gpl", "gpl-2.0", "gpl-3.0", "isc",
    "lgpl", "lgpl-2.1", "lgpl-3.0", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "mit",
    "mpl-2.0", "ms-pl", "openrail", "openrail++", "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip


def model_card(
    manifest: Manifest, engines: Mapping[str, Sequence[EngineRecord]], repository: str
) -> str:
    """Write the model card: how to run the bundle, its model, licenses and memory.

    Args:
        manifest: Of the bundle.
        engines: The records of its engines, by backend.
        repository: Its name on the hub, as in "user/repo".

    Raises:
        MissingDependency: huggingface_hub is not installed.
    """
    with optional_imports("a model card", "fetch"):
        from huggingface_hub import ModelCardData

    config = manifest.config
    data = ModelCardData(**card_metadata(manifest, engines))
    embedding = config.text_encoder != "words"
    text = fill_template(
        "model_card.md.j2",
        title=f"{config.name} at {config.width}x{config.height}",
        version=manifest.tools.get("packforcing", "of an unknown version"),
        extras=",".join(("cpu", "fetch", *(("text",) if embedding else ()))),
        repository=repository,
        folder=repository.rpartition("/")[2],
        embedding=embedding,
        encoder=config.text_encoder,
        prompt=PROMPTS[config.text_encoder],
        engines=[_engine_row(backend, records) for backend, records in engines.items()],
        model=list(model_rows(config).items()),
        differences=describe_differences(config),
        licenses=[_license_row(origin) for origin in _origins(manifest)],
        memory=list(_memory_rows(config, engines)),
        sha256=manifest.sha256,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def card_metadata(
    manifest: Manifest, engines: Mapping[str, Sequence[EngineRecord]]
) -> dict[str, Any]:
    """Return the metadata of the model card, in the terms of the hub's documentation.

    A license that nobody read is "unknown", and one that the hub has no identifier for "other", by
    name and with a link. What was only converted has no `base_model_relation`: the hub knows none.
    """
    origins = manifest.origins
    sources = [origin.source for origin in origins if origin.part != "autoencoder"]
    quantized = {manifest.config.precision.weights} & {"int8", "int4", "fp8"}
    licenses = sorted({_license_id(origin.license) for origin in origins}) or ["unknown"]
    metadata: dict[str, Any] = {
        "license": licenses[0] if len(licenses) == 1 else licenses,
        "library_name": "packforcing",
        "pipeline_tag": "text-to-video",
        "tags": ["packforcing", "video-generation", "onnx", *engines],
        "base_model": list(dict.fromkeys(filter(None, sources))) or None,
    }
    if metadata["base_model"] and quantized:
        metadata["base_model_relation"] = "quantized"
    for origin in origins:
        if _license_id(origin.license) == "other":
            name = re.sub(r"[^a-z0-9.]+", "-", _stated(origin.license).lower()).strip("-.")
            metadata["license_name"] = name or "other"
            link = f"https://huggingface.co/{origin.source}"
            metadata["license_link"] = link if origin.source else "README.md"
    return metadata


def _license_id(text: str) -> str:
    """Return what the hub calls a license."""
    if text in (UNKNOWN, UNREAD, "") or "not read" in text:
        return "unknown"
    name = _stated(text).lower()
    return name if name in LICENSES else "other"


def _stated(text: str) -> str:
    """Return the license that a model card stated, without who says so."""
    return text.removesuffix(", says its model card")


def _origins(manifest: Manifest) -> list[Origin]:
    """Return the origins of the bundle's weights, and of those that rendering needs besides."""
    origins = list(manifest.origins) or [Origin("model", "", UNKNOWN)]
    if encoder := PARTS.get(manifest.config.text_encoder):
        part = f"text encoder ({manifest.config.text_encoder}, not in this repository)"
        origins.append(Origin(part, encoder.source, encoder.license))
    return origins


def _license_row(origin: Origin) -> tuple[str, str, str]:
    return origin.part, origin.source or "not recorded", origin.license


def _engine_row(backend: str, records: Sequence[EngineRecord]) -> tuple[str, str, str]:
    return backend, records[0].key.tool, ", ".join(records[0].key.targets)


def _memory_rows(
    config: Config, engines: Mapping[str, Sequence[EngineRecord]]
) -> Iterator[tuple[str, str]]:
    """Lay out the plan; it is the same for every GPU that has the dtypes."""
    records = next(iter(engines.values()), ())
    built = {name: size for record in records for name, size in record.figures.items()}
    needed = {config.precision.weights, config.precision.cache}
    discrete = {name: has for name, has in TARGETS.items() if name not in UNIFIED_TARGETS}
    target = next(name for name, has in discrete.items() if needed <= {"fp32", "fp16", *has})
    plan = make_plan(config, target, built=built)
    yield from ((ROWS[name], format_memory(size)) for name, size in plan.device.items())
    yield "total", format_memory(plan.total)
