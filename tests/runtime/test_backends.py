"""Engines as the runtime loads and binds them, on an emulated GPU; and what a backend refuses
before any weight is loaded, in one line with a remedy."""

import dataclasses
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from packforcing import model_config
from packforcing.app.reports.plan import load_figures
from packforcing.errors import BackendError, MissingDependency, RenderStopped, ResumeError
from packforcing.runtime import Session, demo_bundle
from packforcing.runtime.backends.onnxruntime import cuda_options
from packforcing.runtime.device import CudaDevice
from packforcing.runtime.nvml import driver
from packforcing.runtime.plan import RESERVE, make_plan
from tests import emulated
from tests.emulated import SCRATCH, Cuda, TensorRT, build_engines, cuda_device
from tests.helpers import assert_one_line, run

PROMPT = "a red star over navy stripes"
DEMO = model_config("demo")


@pytest.fixture
def bundle(tmp_path):
    """A copy of the demo bundle, with engines that the emulated library runs."""
    shutil.copytree(demo_bundle(), tmp_path / "bundle")
    build_engines(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def library(monkeypatch):
    """TensorRT-RTX and CUDA, both emulated."""
    library = TensorRT(Cuda())
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda extra: library.cuda)
    return library


def video(backend, bundle, seconds=3):
    with Session.open(bundle, backend=backend, threads=1) as session:
        return np.concatenate(list(session.stream(PROMPT, seconds)))


def test_engines_and_graphs_make_the_same_video(library, bundle):
    frames = video("tensorrt-rtx", bundle)
    np.testing.assert_array_equal(frames, video("onnxruntime", bundle))
    assert library.cuda.used("device") == library.cuda.used("host") == 0, "not given back"


def test_a_render_resumes_only_with_its_own_engines_and_gpu(library, bundle, tmp_path, monkeypatch):
    def render(directory, **changes):
        with Session.open(directory, backend="tensorrt-rtx", threads=1) as session:
            stop = changes or {"on_block": lambda info: session.stop()}
            session.render(PROMPT, 3, tmp_path / "a.mkv", **stop)

    with pytest.raises(RenderStopped):
        render(bundle)
    rebuilt = shutil.copytree(bundle, tmp_path / "rebuilt")
    build_engines(rebuilt)
    with pytest.raises(ResumeError, match=r"runs on was .*denoiser [0-9a-f]{16}"):
        render(rebuilt, resume=True)
    other = emulated.Status.cudaSuccess, SimpleNamespace(name=b"NVIDIA Other")
    monkeypatch.setattr(library.cuda, "cudaGetDeviceProperties", lambda number: other)
    with pytest.raises(ResumeError, match=r"NVIDIA Nothing .* now .* NVIDIA Other"):
        render(bundle, resume=True)


def test_engines_allocate_what_the_plan_says(library, bundle):
    """To the byte: the buffers and one scratch for all engines. The library allocates weights."""
    with Session.open(bundle, backend="tensorrt-rtx") as session:
        next(session.stream(PROMPT, 1))
        plan = make_plan(session.config, "sm89", built={"scratch.denoiser.block": SCRATCH})
        planned = {name: size for name, size in plan.device.items() if "weights." not in name}
        del planned["reserve"], planned["scratch"]
        assert library.cuda.used("device") == sum(planned.values()) + SCRATCH


def test_loaded_engines_report_their_scratch_to_the_plan(library, bundle):
    figures = load_figures("tensorrt-rtx", bundle, DEMO)
    assert figures == {
        "scratch.denoiser.block": SCRATCH,
        "scratch.denoiser.compressed": SCRATCH - 1,
        "scratch.compressor": SCRATCH,
        "scratch.vae_decoder": SCRATCH,
    }


def test_engines_make_a_video_of_a_single_block(library, bundle):
    """It reads less context than the engines' fixed shapes have room for."""
    frames = DEMO.block_pixel_frames - DEMO.trimmed_frames
    assert len(video("tensorrt-rtx", bundle, seconds=frames / DEMO.fps)) == frames


def test_compiled_kernels_are_stored_beside_the_engines(library, bundle):
    kernels = bundle / "engines" / "tensorrt-rtx" / "runtime.cache"
    video("tensorrt-rtx", bundle, seconds=1)
    assert kernels.read_bytes() == b"compiled kernels"
    written = kernels.stat().st_mtime_ns
    video("tensorrt-rtx", bundle, seconds=1)
    assert kernels.stat().st_mtime_ns == written
    assert not list(kernels.parent.glob("*.partial*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tool": "tensorrt-rtx 1.6.0.5"}, r"built by tensorrt-rtx 1\.6\.0\.5, installed is 1\.7"),
        ({"targets": ("sm120",)}, "for sm120; NVIDIA Nothing is sm89: run .* --targets sm89"),
        ({"graph": {"denoiser.onnx": "0" * 64}}, "another graph .* run 'packforcing build"),
        (
            {"shapes": {"denoiser.block": {"N": DEMO.block_tokens, "C": 9}}},
            f"9 tokens of context, .* reads {DEMO.context_tokens}",
        ),
    ],
)
def test_engines_with_another_key_are_refused(library, bundle, changes, message):
    build_engines(bundle, **changes)
    refused(library, bundle, message)


def refused(library, bundle, message):
    """With this message, and before anything was loaded or allocated."""
    with pytest.raises(BackendError, match=message):
        Session.open(bundle, backend="tensorrt-rtx")
    assert not library.cuda.log


def test_engines_that_are_missing_or_damaged_are_refused(library, bundle):
    engine = bundle / "engines" / "tensorrt-rtx" / "compressor.engine"
    engine.write_bytes(b"damaged")
    refused(library, bundle, r"compressor\.engine is damaged .* run 'packforcing build")
    shutil.rmtree(bundle / "engines")
    refused(library, bundle, "not built for tensorrt-rtx: run 'packforcing build")


def test_a_refusal_of_the_library_has_a_remedy(library, bundle):
    library.validity = library.EngineValidity.INVALID, 4
    refused(library, bundle, "the NVIDIA driver is too old: update it")
    library.validity = library.EngineValidity.INVALID, 0
    refused(library, bundle, "cannot run .*denoiser.engine: no reason given")


def test_a_gpu_with_too_little_memory_is_refused(library, bundle):
    library.cuda.total = RESERVE // 2
    refused(library, bundle, r"demo needs 0\.\d+ GiB of GPU memory; NVIDIA Nothing has 0\.06 of")


def test_more_scratch_than_planned_is_refused(library, bundle):
    library.scratch = 256 << 20
    with pytest.raises(BackendError, match=r"want 0\.25 GiB of scratch .* 0\.00 GiB was planned"):
        Session.open(bundle, backend="tensorrt-rtx")


def test_unaligned_tensors_are_refused(library, tiny_bundle, tmp_path):
    """TensorRT takes addresses at multiples of 256 bytes; layers of the tiny model are smaller."""
    shutil.copytree(tiny_bundle, tmp_path / "tiny")
    build_engines(tmp_path / "tiny")
    with (
        Session.open(tmp_path / "tiny", backend="tensorrt-rtx") as session,
        pytest.raises(BackendError, match="only at addresses that are multiples of 256"),
    ):
        next(session.stream(PROMPT, 1))


def test_weights_are_streamed_as_the_plan_says(library, bundle, monkeypatch):
    """The budget is what stays on the GPU; an engine that cannot stream is refused."""

    def streamed(plan, budget):
        return dataclasses.replace(plan, streamed=300)

    monkeypatch.setattr("packforcing.runtime.backends.tensorrt.stream", streamed)
    refused(library, bundle, "packforcing build --stream-weights")
    build_engines(bundle, flags=("WEIGHT_STREAMING",))
    with Session.open(bundle, backend="tensorrt-rtx"):
        budgets = {n: e.weight_streaming_budget_v2 for n, e in library.loaded.items()}
    assert budgets == {"denoiser": 700, "compressor": None, "vae_decoder": None}


@pytest.mark.parametrize(
    "name", ["Runtime", "ICudaEngine", "IExecutionContext", "IRuntimeConfig", "IRuntimeCache"]
)
def test_the_emulated_library_is_a_subset_of_the_real_one(name):
    real = pytest.importorskip("tensorrt_rtx")
    own = {"trt", "logger", "config", "spec", "graph", "tensors", "profiles", "bound"}
    used = {n for n in vars(getattr(emulated, name)) if not n.startswith("_")}
    used -= {"strategy", "cache"}  # how the emulation remembers what was set
    assert used - own <= set(dir(getattr(real, name)))
    for enum in ("EngineValidity", "ExecutionContextAllocationStrategy", "CudaGraphStrategy",
                 "DynamicShapesKernelSpecializationStrategy",
                 "EngineInvalidityDiagnostics"):  # fmt: skip
        for member in getattr(TensorRT, enum):
            assert getattr(real, enum).__members__[member.name].value == member.value


@pytest.fixture
def no_driver():
    try:
        driver()
    except BackendError:
        return
    pytest.skip("this machine has an NVIDIA driver")


@pytest.mark.parametrize(
    ("backend", "module", "message"),
    [
        ("tensorrt-rtx", "tensorrt_rtx", r"pip install .*\[tensorrt-rtx\]"),
        ("tensorrt", "tensorrt", r"pip install .*\[tensorrt\]"),
        ("tensorrt-rtx", "onnxruntime", r"pip install .*\[cpu\].* install one of the two"),
        ("onnxruntime", "onnxruntime", r"pip install .*\[cpu\].*\[gpu\]"),
    ],
)
def test_a_missing_library_names_its_extra(monkeypatch, tmp_path, backend, module, message):
    monkeypatch.setitem(sys.modules, module, None)
    result = run("render", PROMPT, "--out", tmp_path / "a.mp4", "--backend", backend)
    assert_one_line(result.exit_code, result.stdout, result.stderr, message)
    assert not list(tmp_path.iterdir())


def test_an_onnxruntime_without_the_cuda_provider_is_refused(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this is onnxruntime-gpu")
    result = run("render", PROMPT, "--out", tmp_path / "a.mp4", "--backend", "onnxruntime-cuda")
    message = r"pip uninstall onnxruntime, then pip install .*\[gpu\]"
    assert_one_line(result.exit_code, result.stdout, result.stderr, message)


def test_a_machine_without_a_driver_is_refused(no_driver, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings.runtime")
    result = run("render", PROMPT, "--out", tmp_path / "a.mp4", "--backend", "tensorrt-rtx")
    assert_one_line(result.exit_code, result.stdout, result.stderr, "no NVIDIA driver .* install")


def test_missing_cuda_bindings_name_their_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependency, match=r"needs cuda, .*\[gpu\]"):
        CudaDevice("gpu")


@pytest.mark.parametrize("name", ["cuda", "onnxruntime-tensorrt", "onnxruntime-rtx"])
def test_an_unknown_backend_is_refused_with_those_that_exist(name):
    existing = "onnxruntime, onnxruntime-cuda, tensorrt-rtx, tensorrt$"
    with pytest.raises(BackendError, match=f"'{name}'; known backends: {existing}"):
        Session.open(demo_bundle(), backend=name)


def pretend_onnxruntime_gpu(monkeypatch, cuda):
    """Make ONNX Runtime list its CUDA provider, on an emulated GPU."""
    onnxruntime = pytest.importorskip("onnxruntime")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda extra: cuda)


def test_a_gpu_too_small_for_the_cuda_provider_is_refused(monkeypatch):
    cuda = Cuda(total=1 << 16)
    pretend_onnxruntime_gpu(monkeypatch, cuda)
    with pytest.raises(BackendError, match=r"demo with onnxruntime-cuda needs .* GiB of GPU mem"):
        Session.open(demo_bundle(), backend="onnxruntime-cuda")
    assert not cuda.log


def test_the_cuda_provider_works_in_the_devices_stream():
    """Copies and calls would not follow each other otherwise."""
    assert cuda_options(cuda_device(Cuda())) == {
        "device_id": "0",
        "has_user_compute_stream": "1",
        "user_compute_stream": str(emulated.STREAM),
    }


def test_too_little_free_memory_is_refused_with_its_figures():
    cuda = Cuda(total=3 << 30)
    cuda.used = lambda where: 1 << 30
    device = cuda_device(cuda)
    with pytest.raises(BackendError, match=r"2\.50 GiB .* has 2\.00 of 3\.00 GiB free: close"):
        device.allocate("scratch", (5 << 29,), "uint8")
    assert not device.allocated


def test_a_failing_cuda_call_is_in_the_message():
    cuda = Cuda()
    device = cuda_device(cuda)
    cuda.cudaMalloc = lambda size: (cuda.cudaError_t.cudaErrorMemoryAllocation, None)
    with pytest.raises(BackendError, match=r"cudaMalloc: out of memory \(cudaErrorMemory"):
        device.allocate("context", (8,), "uint8")
