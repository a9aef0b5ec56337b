"""Tell what this machine can export, build and run, and for everything else what to do.

It is quick, and safe on broken installations. Whether a library works is found out by loading it,
except for the exporter's, which take seconds: for those the installed versions have to do.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec

from packforcing import __version__
from packforcing.errors import BackendError, MissingDependency, PackForcingError
from packforcing.extras import install_command, installed_version
from packforcing.machine import cpu_cores, free_memory, total_memory
from packforcing.runtime.backends.onnxruntime import CUDA_PROVIDER, import_onnxruntime
from packforcing.runtime.device import CudaDevice
from packforcing.runtime.nvml import Driver, Gpu, driver, gpus
from packforcing.runtime.plan import JETSON_TARGETS
from packforcing.runtime.tensorrt_releases import find_release, old_jetpack

MODULES = {"onnxruntime-gpu": "onnxruntime", "cuda-bindings": "cuda"}  # where the name differs
ONNXRUNTIMES = {"cpu": "onnxruntime", "gpu": "onnxruntime-gpu"}  # extras and distributions


class Capability(msgspec.Struct, frozen=True):
    """Something a machine can do or not.

    Attributes:
        name: What, like "run with tensorrt-rtx".
        able: Whether it can.
        detail: With which packages on which GPU; or why not, and the remedy.
    """

    name: str
    able: bool
    detail: str


class Diagnosis(msgspec.Struct, frozen=True):
    """A machine and what it can do.

    Cores and memory are those that this process may use. Memory and disk space are in bytes, as
    they are now.
    """

    packforcing: str
    system: str
    python: str
    cpu_cores: int
    memory_total: int
    memory_free: int
    disk_free: int
    driver: Driver | None
    gpus: list[Gpu]
    no_gpu: str  # why there is none, and the remedy; empty where there is one
    capabilities: list[Capability]


def diagnose(folder: Path) -> Diagnosis:
    """Look at this machine and at the disk of a folder, without changing anything."""
    installed_driver, devices, no_gpu = None, [], ""
    try:
        installed_driver = driver()
        devices = gpus()
    except PackForcingError as error:
        no_gpu = _one_line(error)
    return Diagnosis(
        packforcing=__version__,
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        python=platform.python_version(),
        cpu_cores=cpu_cores(),
        memory_total=total_memory(),
        memory_free=free_memory(),
        disk_free=shutil.disk_usage(folder).free,
        driver=installed_driver,
        gpus=devices,
        no_gpu=no_gpu,
        capabilities=[_capability(name, check) for name, check in CHECKS.items()],
    )


def _capability(name: str, check: Callable[[], str]) -> Capability:
    try:
        return Capability(name, True, check())
    except PackForcingError as error:
        return Capability(name, False, _one_line(error))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def require_packages(extra: str) -> str:
    """Check that everything is installed that an extra of this package requires.

    Returns:
        Names and versions.

    Raises:
        MissingDependency: Names all packages that are missing or too old.
    """
    from packaging.requirements import Requirement

    if installed_version("packforcing") is None:  # its code is on the path alone
        raise MissingDependency(f"packforcing is not installed: {install_command(extra)}")
    installed, problems = [], []
    for text in importlib.metadata.requires("packforcing") or ():
        requirement = Requirement(text)
        name, marker = requirement.name, requirement.marker
        if marker is None or not marker.evaluate({"extra": extra}):
            continue
        version = installed_version(name)
        if version is None:
            problems.append(f"{name} is not installed")
            continue
        installed.append(f"{name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{name} {version} is not {requirement.specifier}")
        elif importlib.util.find_spec(_module(name)) is None:
            problems.append(f"{name} {version} is installed but its files are gone")
    if not (installed or problems):
        problems.append(f"this installation has no extra '{extra}' yet")
    if problems:
        raise MissingDependency(f"{', '.join(problems)}: {install_command(extra)}")
    return ", ".join(installed)


def _load(name: str, extra: str) -> ModuleType:
    """Import an installed library."""
    try:
        return importlib.import_module(_module(name))
    except Exception as error:  # a broken installation raises anything
        raise BackendError(
            f"{name} is installed but does not load ({type(error).__name__}: {error}): "
            f"pip uninstall {name}, then {install_command(extra)}"
        ) from error


def _module(name: str) -> str:
    return MODULES.get(name, name.replace("-", "_"))


def _verify() -> str:
    return f"{require_packages('verify')}, {_onnxruntime()[0]}"


def _onnxruntime() -> tuple[str, list[str]]:
    """Return the installed ONNX Runtime, and its providers."""
    installed = [extra for extra, name in ONNXRUNTIMES.items() if installed_version(name)]
    if len(installed) > 1:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: "
            f"pip uninstall onnxruntime onnxruntime-gpu, then {install_command('cpu')}, or for "
            f"the backend onnxruntime-cuda {install_command('gpu')}"
        )
    extra = next(iter(installed), "cpu")
    packages = require_packages(extra)
    _load(ONNXRUNTIMES[extra], extra)
    return packages, import_onnxruntime().get_available_providers()


def _run_onnxruntime() -> str:
    packages, providers = _onnxruntime()
    names = [name.removesuffix("ExecutionProvider") for name in providers]
    return f"{packages}, with {', '.join(names)}"


def _run_onnxruntime_cuda() -> str:
    gpu = _first_gpu()
    packages, providers = _onnxruntime()
    if CUDA_PROVIDER not in providers:
        raise BackendError(
            f"{packages} is without {CUDA_PROVIDER}: pip uninstall onnxruntime, then "
            f"{install_command('gpu')}"
        )
    return f"{packages}, on {gpu.name}"


def rtx_targets() -> list[str]:
    """Return the targets that the installed TensorRT-RTX builds for, like "sm89".

    Raises:
        BackendError: It does not load.
        MissingDependency: It is not installed.
    """
    require_packages("tensorrt-rtx")
    library = _load("tensorrt-rtx", "tensorrt-rtx")
    names = [name for name in library.ComputeCapability.__members__ if name.startswith("SM")]
    return sorted(map(str.lower, names), key=lambda name: int(name[2:]))


def _first_gpu(targets: list[str] | None = None) -> CudaDevice:
    """Return the GPU that a backend would use, if its target is one of these."""
    if problem := old_jetpack():
        raise BackendError(problem)
    devices = gpus()  # without a driver or a GPU, nothing else is worth reporting
    first = CudaDevice()
    first.close()
    if targets is None or first.target in targets:
        return first
    remedy = "use another backend"
    if first.target in JETSON_TARGETS:
        remedy = "use the backend tensorrt"
    if any(device.target in targets for device in devices):
        remedy = "make another GPU the first with CUDA_VISIBLE_DEVICES, or use another backend"
    raise BackendError(
        f"{first.name} is {first.target}, which is not one of {', '.join(targets)}: {remedy}"
    )


def _build_tensorrt_rtx() -> str:
    return f"{require_packages('tensorrt-rtx')}, for {', '.join(rtx_targets())}"


def _run_tensorrt_rtx() -> str:
    return f"{require_packages('tensorrt-rtx')}, on {_first_gpu(rtx_targets()).name}"


def _tensorrt() -> str:
    if problem := old_jetpack():
        raise BackendError(problem)
    if version := installed_version("tensorrt"):
        find_release("tensorrt", version)
    packages = require_packages("tensorrt")
    _load("tensorrt", "tensorrt")
    gpu = _first_gpu()
    return f"{packages}, on {gpu.name} ({gpu.target})"


CHECKS: dict[str, Callable[[], str]] = {
    "export": lambda: require_packages("export"),
    "verify": _verify,
    "build with tensorrt-rtx": _build_tensorrt_rtx,
    "build with tensorrt": _tensorrt,  # it builds on the GPU that is to run the engine
    "run with onnxruntime": _run_onnxruntime,
    "run with onnxruntime-cuda": _run_onnxruntime_cuda,
    "run with tensorrt-rtx": _run_tensorrt_rtx,
    "run with tensorrt": _tensorrt,
}
