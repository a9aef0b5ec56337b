"""`packforcing doctor` on machines unlike this one: broken, old or doubly installed libraries, and
NVIDIA GPUs, put before the installed modules of the interpreter that it runs in."""

import json
import os
import subprocess
import sys
from importlib import metadata

import pytest
from click.testing import CliRunner

from packforcing.app.cli import main

DRIVER = """
class NVMLError(Exception): pass
class NVMLError_NotSupported(NVMLError): pass
class Memory: total, free = 12 << 30, 11 << 30
DEVICES = [("GPU A", (9, 0)), ("GPU B", (8, 9))]
def nvmlInit(): pass
def nvmlShutdown(): pass
def nvmlSystemGetDriverVersion(): return "590.44"
def nvmlSystemGetCudaDriverVersion(): return 13010
def nvmlDeviceGetCount(): return len(DEVICES)
def nvmlDeviceGetHandleByIndex(index): return DEVICES[index]
def nvmlDeviceGetName(device): return device[0]
def nvmlDeviceGetCudaComputeCapability(device): return device[1]
def nvmlDeviceGetMemoryInfo(device): return Memory
def nvmlDeviceGetEnforcedPowerLimit(device): raise NVMLError_NotSupported("not here")
"""
# GPU B is the first that CUDA lists
CUDA = """
from enum import Enum
from types import SimpleNamespace
cudaError_t = Enum("cudaError_t", {"cudaSuccess": 0})
cudaDeviceAttr = Enum(
    "Attr", ["cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor",
             "cudaDevAttrIntegrated"]
)
cudaStreamNonBlocking = 1
CAPABILITY, NAME = (8, 9), b"GPU B"
def done(*result): return (cudaError_t.cudaSuccess, *result)
def cudaGetDeviceCount(): return done(1)
def cudaDeviceGetAttribute(which, device): return done((*CAPABILITY, 0)[which.value - 1])
def cudaGetDeviceProperties(device): return done(SimpleNamespace(name=NAME))
def cudaSetDevice(device): return done()
def cudaStreamCreateWithFlags(flags): return done(7)
def cudaStreamDestroy(stream): return done()
"""
TENSORRT_RTX = """
import enum
ComputeCapability = enum.Enum("ComputeCapability", "NONE CURRENT SM75 SM89 SM120")
"""


@pytest.fixture
def doctor(tmp_path):
    """Run it with modules, and with pip's records of packages, before the installed ones."""

    def run(packages=None, **modules):
        for name, code in modules.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            (path.parent / "__init__.py").touch()
            path.write_text(code)
        for name, version in (packages or {}).items():
            info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        code = "from packforcing.app.cli import main; main(['doctor', '--json'])"
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        finished = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert (finished.returncode, finished.stderr) == (0, "")
        diagnosis = json.loads(finished.stdout)
        capabilities = {entry.pop("name"): entry for entry in diagnosis["capabilities"]}
        return diagnosis, capabilities

    return run


def test_what_this_machine_cannot_do_has_a_remedy(doctor):
    diagnosis, able = doctor()
    assert diagnosis["memory_total"] > diagnosis["memory_free"] > 0 < diagnosis["disk_free"]
    assert able["export"]["able"] and "torch 2" in able["export"]["detail"]
    assert able["run with onnxruntime"]["able"] and "CPU" in able["run with onnxruntime"]["detail"]
    for name, capability in able.items():
        remedies = "pip install", "nvidia.com/drivers", "use another backend"
        assert capability["able"] or any(r in capability["detail"] for r in remedies), name


def test_text_output_has_one_line_for_each_capability(doctor):
    names = doctor()[1].keys()
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for name in names:
        assert len([line for line in lines if line[5:].startswith(f"{name}  ")]) == 1


def test_neither_the_exporter_nor_pyav_is_imported():
    code = """if True:
        import sys
        from pathlib import Path
        from packforcing.runtime.doctor import diagnose
        diagnose(Path("."))
        print({"torch", "onnx", "onnxscript", "av", "cv2"} & set(sys.modules))"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.stdout == "set()\n", finished.stderr


def test_a_library_that_does_not_load_is_reported_with_its_reason(doctor):
    _, able = doctor(onnxruntime="raise OSError('libstdc++.so.6 is too old')")
    broken = able["run with onnxruntime"]
    assert not broken["able"]
    assert "libstdc++.so.6 is too old" in broken["detail"] and "pip install" in broken["detail"]
    assert able["export"]["able"]


def test_two_onnxruntimes_at_once_are_reported(doctor):
    _, able = doctor({"onnxruntime-gpu": "1.31.1"})
    twice = able["run with onnxruntime"]
    assert not twice["able"]
    assert "both installed" in twice["detail"]
    assert "pip uninstall onnxruntime onnxruntime-gpu" in twice["detail"]


def test_a_release_older_than_the_requirement_is_reported(doctor):
    _, able = doctor({"onnx": "1.2"})
    assert not able["export"]["able"]
    assert "onnx 1.2 is not >=" in able["export"]["detail"]


def test_without_a_driver_no_gpu_backend_can_run(doctor):
    _, able = doctor(pynvml=DRIVER + "def nvmlInit(): raise NVMLError('Driver Not Loaded')")
    for name in ("onnxruntime-cuda", "tensorrt-rtx"):
        assert not able[f"run with {name}"]["able"]


def test_a_gpu_that_engines_can_be_built_for_is_able(doctor):
    diagnosis, able = doctor(
        {"tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5.0"},
        pynvml=DRIVER, tensorrt_rtx=TENSORRT_RTX, cuda__bindings__runtime=CUDA,
    )  # fmt: skip
    assert diagnosis["driver"] == {"version": "590.44", "cuda": [13, 1]}
    assert diagnosis["no_gpu"] == ""
    assert diagnosis["gpus"][1] == {
        "index": 1, "name": "GPU B", "target": "sm89",
        "memory_total": 12 << 30, "memory_free": 11 << 30, "power_limit": 0,
    }  # fmt: skip
    assert able["build with tensorrt-rtx"]["detail"].endswith("for sm75, sm89, sm120")
    assert able["run with tensorrt-rtx"]["able"]
    assert able["run with tensorrt-rtx"]["detail"].endswith("on GPU B")


@pytest.mark.parametrize("answer", [
    "raise NVMLError_NotSupported('Not Supported')", "return Memory",
])  # fmt: skip
def test_a_gpu_that_shares_the_hosts_memory_has_that_memory(doctor, answer):
    """Whatever NVML says of it: nothing, or 8 GiB where there are 128."""
    gb10 = "DEVICES[0] = ('NVIDIA GB10', (12, 1))\n"
    gb10 += f"def nvmlDeviceGetMemoryInfo(device): {answer}\nDEVICES.pop()"
    diagnosis, _ = doctor(pynvml=DRIVER + gb10)
    (gpu,) = diagnosis["gpus"]
    assert gpu["memory_total"] == diagnosis["memory_total"]
    assert abs(gpu["memory_free"] - diagnosis["memory_free"]) < 1 << 30  # asked at two moments


def test_a_jetson_is_sent_to_tensorrt(doctor):
    _, able = doctor(
        {"tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5.0"},
        pynvml=DRIVER + "DEVICES[:] = [('Orin', (8, 7))]",
        tensorrt_rtx=TENSORRT_RTX,
        cuda__bindings__runtime=CUDA + "CAPABILITY, NAME = (8, 7), b'Orin'",
    )
    assert able["run with tensorrt-rtx"]["detail"].endswith("sm120: use the backend tensorrt")


def test_jetpack_6_is_refused_with_the_upgrade(doctor):
    release = """
from pathlib import Path
from packforcing.runtime import tensorrt_releases
tensorrt_releases.L4T = Path(__file__).with_name("nv_tegra_release")
tensorrt_releases.L4T.write_text("# R36 (release), REVISION: 4.7, GCID: 1, BOARD: generic")
"""
    _, able = doctor({"tensorrt": "10.3.0"}, sitecustomize=release, pynvml=DRIVER)
    for name in ("build with tensorrt", "run with tensorrt"):
        assert able[name]["detail"].startswith(
            "this is JetPack 6 (L4T 36.4.7: TensorRT 10.3, CUDA 12.6, Python 3.10); "
            "upgrade the Jetson to JetPack 7.2 or later"
        )


def test_a_tensorrt_too_old_is_refused_elsewhere_too(doctor):
    _, able = doctor({"tensorrt": "10.3.0"})
    assert not able["run with tensorrt"]["able"]
    assert able["run with tensorrt"]["detail"].startswith(
        "tensorrt 10.3.0 is too old, 10.16 or newer is needed: install a newer one"
    )


def test_a_gpu_that_no_engine_can_be_built_for_is_reported(doctor):
    _, able = doctor(
        {"tensorrt-rtx": "1.7.1", "cuda-bindings": "13.5.0"},
        pynvml=DRIVER + "DEVICES.pop()",
        tensorrt_rtx=TENSORRT_RTX,
        cuda__bindings__runtime=CUDA + "CAPABILITY, NAME = (9, 0), b'GPU A'",
    )
    unfit = able["run with tensorrt-rtx"]
    assert not unfit["able"]
    assert unfit["detail"] == (
        "GPU A is sm90, which is not one of sm75, sm89, sm120: use another backend"
    )


def test_code_that_is_on_the_path_alone_is_not_installed(monkeypatch):
    def unknown(distribution):
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(metadata, "version", unknown)
    monkeypatch.setattr(metadata, "requires", unknown)
    result = CliRunner().invoke(main, ["doctor"])
    assert "packforcing is not installed: pip install" in result.output
    assert not result.exception or isinstance(result.exception, SystemExit)
