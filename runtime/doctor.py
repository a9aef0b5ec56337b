"""What this machine can export, build and run, and why not: each "no" says what to do.

Quick, and safe on broken installs. Whether a library loads is seen by loading it, but for those
of the exporter, which take seconds: they go by what pip knows of them.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec

from packforcing import __version__
from packforcing.errors import BackendError
from packforcing.runtime.device import CudaDevice
from packforcing.runtime.nvml import Driver, Gpu, driver, gpus

MODULES = {"onnxruntime-gpu": "onnxruntime", "cuda-bindings": "cuda"}  # where the name is another


class Capability(msgspec.Struct, frozen=True):
    """Something a machine can do or not; the detail says with what, or why not and what to do."""

    name: str
    able: bool
    detail: str


class Diagnosis(msgspec.Struct, frozen=True):
    """A machine and what it can do. Memory and disk in bytes, free ones as they are now."""

    packforcing: str
    system: str
    python: str
    cpu_cores: int
    memory_total: int
    memory_free: int
    disk_free: int
    driver: Driver | None
    gpus: list[Gpu]
    no_gpu: str  # why there is none, and what to do; empty where there is one
    capabilities: list[Capability]


def diagnose(folder: Path) -> Diagnosis:
    """Looks at this machine, and at the disk that `folder` is on. Changes nothing."""
    import psutil

    memory = psutil.virtual_memory()
    found, cards, missing = None, [], ""
    try:
        found = driver()
        cards = gpus()
    except BackendError as error:
        missing = _line(error)
    return Diagnosis(
        packforcing=__version__,
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        cpu_cores=os.cpu_count() or 1,
        memory_total=memory.total,
        memory_free=memory.available,
        disk_free=shutil.disk_usage(folder).free,
        driver=found,
        gpus=cards,
        no_gpu=missing,
        capabilities=[_capability(name, check) for name, check in CHECKS.items()],
    )


def _capability(name: str, check: Callable[[], str]) -> Capability:
    try:
        return Capability(name, True, check())
    except BackendError as error:
        return Capability(name, False, _line(error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def packages(extra: str) -> str:
    """Names and versions of what an extra of this package asks for.

    Raises `BackendError` naming all that are missing or too old.
    """
    from packaging.requirements import Requirement

    found, wrong = [], []
    for text in importlib.metadata.requires("packforcing") or ():
        wanted = Requirement(text)
        if wanted.marker is None or not wanted.marker.evaluate({"extra": extra}):
            continue
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is not installed")
            continue
        found.append(f"{wanted.name} {version}")
        if not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} {version} is not {wanted.specifier}")
        elif importlib.util.find_spec(_module(wanted.name)) is None:
            wrong.append(f"{wanted.name} {version} is installed but its files are gone")
    if not (found or wrong):
        wrong.append(f"this installation has no extra '{extra}' yet")
    if wrong:
        raise BackendError(f"{', '.join(wrong)}: {_install(extra)}")
    return ", ".join(found)


def _load(name: str, extra: str) -> ModuleType:
    """An installed library, imported; raises `BackendError` for whatever goes wrong in it."""
    try:
        return importlib.import_module(_module(name))
    except Exception as error:  # a broken install raises anything
        raise BackendError(
            f"{name} is installed but does not load ({type(error).__name__}: {error}): "
            f"pip uninstall {name}, then {_install(extra)}"
        ) from error


def _module(name: str) -> str:
    return MODULES.get(name, name.replace("-", "_"))


def _install(extra: str) -> str:
    return f"pip install '.[{extra}]' in the checkout"


def _verify() -> str:
    return f"{packages('verify')}, {_onnxruntime()[0]}"


def _onnxruntime() -> tuple[str, list[str]]:
    """The one ONNX Runtime that is installed, and its providers."""
    found = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}
    for extra, name in list(found.items()):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            del found[extra]
    if len(found) > 1:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed, one over the other: "
            f"pip uninstall onnxruntime onnxruntime-gpu, then {_install('cpu')}, or gpu"
        )
    extra = next(iter(found), "cpu")
    library = packages(extra)
    return library, _load(found[extra], extra).get_available_providers()


def _on_cpu() -> str:
    library, providers = _onnxruntime()
    names = [name.removesuffix("ExecutionProvider") for name in providers]
    return f"{library}, with {', '.join(names)}"


def _onnxruntime_cuda() -> str:
    card = _card()
    library, providers = _onnxruntime()
    if "CUDAExecutionProvider" not in providers:
        raise BackendError(
            f"{library} is without CUDAExecutionProvider: pip uninstall onnxruntime, then "
            f"{_install('gpu')}"
        )
    return f"{library}, on {card.name}"


def rtx_targets() -> list[str]:
    """The targets that the installed TensorRT-RTX builds for; raises `BackendError`."""
    packages("tensorrt-rtx")
    library = _load("tensorrt-rtx", "tensorrt-rtx")
    names = [name for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted(map(str.lower, names), key=lambda name: int(name[2:]))


def _card(targets: list[str] | None = None) -> CudaDevice:
    """The card that a backend would take, if its target is one of these."""
    cards = gpus()  # without a driver or a card, nothing else is worth saying
    device = CudaDevice()
    device.close()
    if targets is None or device.target in targets:
        return device
    advice = "use another backend"
    if any(card.target in targets for card in cards):
        advice = "make another card the first with CUDA_VISIBLE_DEVICES, or use another backend"
    raise BackendError(
        f"{device.name} is {device.target}; it takes one of {', '.join(targets)}: {advice}"
    )


def _build_rtx() -> str:
    return f"{packages('tensorrt-rtx')}, for {', '.join(rtx_targets())}"


def _run_rtx() -> str:
    return f"{packages('tensorrt-rtx')}, on {_card(rtx_targets()).name}"


def _tensorrt() -> str:
    found = packages("tensorrt")
    _load("tensorrt", "tensorrt")
    card = _card()
    return f"{found}, on {card.name} ({card.target})"


CHECKS: dict[str, Callable[[], str]] = {
    "export": lambda: packages("export"),
    "verify": _verify,
    "build with tensorrt-rtx": _build_rtx,
    "build with tensorrt": _tensorrt,  # it builds on the card that is to run the engine
    "run with onnxruntime": _on_cpu,
    "run with onnxruntime-cuda": _onnxruntime_cuda,
    "run with tensorrt-rtx": _run_rtx,
    "run with tensorrt": _tensorrt,
}
