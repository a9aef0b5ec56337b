"""What ONNX Runtime's GPU providers are given, so that none drops the length of the context.

None of them has run on a GPU; what can be known without one is: the graph with a mask computes
what the graph with the length does, TensorRT-RTX takes it whole, and what a session is told.
"""

import sys
from types import SimpleNamespace

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

from packforcing.config import policies
from packforcing.errors import BackendError
from packforcing.runtime.attention_mask import with_mask
from packforcing.runtime.backends import BESIDE, Provider, open_backend, profile
from packforcing.runtime.bundle import contract, graph_file, read_manifest
from packforcing.runtime.engine_records import shapes
from tests import emulated
from tests.app.test_cli import assert_one_line, run
from tests.emulated import Cuda, cuda_device

RTX, TENSORRT = "NvTensorRTRTXExecutionProvider", "TensorrtExecutionProvider"


def denoiser_inputs(config, valid: int, garbage: float) -> dict[str, np.ndarray]:
    """Random inputs of a compressed block's call; the context holds garbage from `valid` on."""
    rng = np.random.Generator(np.random.Philox(5))
    (call,) = [c for n, c in shapes(config, "denoiser").items() if n.endswith("compressed")]
    inputs = {}
    for tensor in contract(config)["denoiser"].inputs:
        shape = [call.get(n, n) for n in tensor.shape]
        inputs[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
        if "_ctx." in tensor.name:
            inputs[tensor.name][:, :, valid:] = garbage
    inputs["kv_len"] = np.array([call["N"] + valid])
    return inputs


@pytest.mark.parametrize("valid", [0, 1, 40])
def test_a_mask_says_what_the_length_says(tiny_bundle, valid):
    """By ONNX's own evaluator, as ONNX Runtime's CPU takes no mask of one row."""
    path = tiny_bundle / graph_file("denoiser")
    config = read_manifest(tiny_bundle).config
    masked = onnx.load_from_string(with_mask(path))
    onnx.checker.check_model(masked, full_check=True)
    clean, dirty = (denoiser_inputs(config, valid, garbage) for garbage in (0.0, 300.0))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    wanted = session.run(None, clean)
    for inputs in (clean, dirty):
        found = ReferenceEvaluator(masked).run(None, inputs)
        for name, one, other in zip(session.get_outputs(), found, wanted):
            np.testing.assert_allclose(one, other, atol=2e-4, err_msg=name.name)


def test_without_a_length_the_garbage_is_seen(tiny_bundle):
    """What the mask is for: this is what a parser makes of the graph that drops the length."""
    path = tiny_bundle / graph_file("denoiser")
    config = read_manifest(tiny_bundle).config
    dropped = onnx.load(path)
    for node in dropped.graph.node:
        if node.op_type == "Attention":
            del node.input[3:]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = onnxruntime.InferenceSession(
        dropped.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    inputs = denoiser_inputs(config, 40, 300.0)
    assert np.abs(session.run(["flow"], inputs)[0] - other.run(["flow"], inputs)[0]).max() > 0.1


def test_tensorrt_rtx_takes_the_masked_denoiser_whole(tiny_half_bundle, tmp_path):
    """The plugin has the same parser: one part with every node, and it builds."""
    trt = pytest.importorskip("tensorrt_rtx")
    path = tiny_half_bundle / graph_file("denoiser")
    graph = with_mask(path)
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    assert parser.supports_model_v2(graph)
    assert parser.num_subgraphs == 1

    from packforcing.export import engines

    (tmp_path / "masked.onnx").write_bytes(graph)
    config = read_manifest(tiny_half_bundle).config
    axes = shapes(config, "denoiser")["denoiser.block"]
    job = engines.Job(
        backend="tensorrt-rtx",
        graph=str(tmp_path / "masked.onnx"),
        engine=str(tmp_path / "masked.engine"),
        targets=("sm89",),
        profiles=(
            {
                tensor.name: tuple(axes.get(n, n) for n in tensor.shape)
                for tensor in contract(config)["denoiser"].inputs
                if any(isinstance(n, str) for n in tensor.shape)
            },
        ),
        attentions=0,
        length=None,  # nothing is carried by hand: an unused kv_len would end the build
        flags=(),
    )
    assert engines.build_engine(job).file.bytes > 0


def test_weights_beside_a_graph_stay_there(tiny_bundle, tmp_path):
    """The session is told where; at full size they are gigabytes."""
    model, path = onnx.load(tiny_bundle / graph_file("denoiser")), tmp_path / "denoiser.onnx"
    onnx.save(
        model, path, save_as_external_data=True,
        location="denoiser.onnx.data", size_threshold=256,
    )  # fmt: skip
    provider, options = Provider(RTX, cuda_device(Cuda())), onnxruntime.SessionOptions()
    options.add_session_config_entry(BESIDE, str(path.parent))
    spec = contract(read_manifest(tiny_bundle).config)["denoiser"]
    graph = provider.graph(path, spec)
    assert len(graph) < (tmp_path / "denoiser.onnx.data").stat().st_size / 2
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    assert [tensor.name for tensor in session.get_inputs()] == [t.name for t in spec.inputs]


def test_weights_outside_the_bundle_are_not_read(tiny_bundle, tmp_path):
    model = onnx.load(tiny_bundle / graph_file("denoiser"))
    (tmp_path / "bundle").mkdir()
    path = tmp_path / "bundle" / "denoiser.onnx"
    onnx.save(model, path, save_as_external_data=True, location="inside", size_threshold=256)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../outside"
    path.with_name("inside").rename(tmp_path / "outside")
    path.write_bytes(model.SerializeToString())
    provider, options = Provider(RTX, cuda_device(Cuda())), onnxruntime.SessionOptions()
    options.add_session_config_entry(BESIDE, str(path.parent))
    spec = contract(read_manifest(tiny_bundle).config)["denoiser"]
    with pytest.raises(Exception, match=r"external|directory|path"):
        onnxruntime.InferenceSession(
            provider.graph(path, spec), options, providers=["CPUExecutionProvider"]
        )


def test_a_policy_of_another_context_is_refused(tiny_half_bundle):
    """The plugin's shapes are the bundle's; a session would bind smaller ones to a short video."""
    manifest = read_manifest(tiny_half_bundle)
    for name in ("sliding-window", "full-history"):
        config = msgspec.structs.replace(manifest.config, policy=policies(manifest.config)[name])
        with pytest.raises(BackendError, match=r"fixes its shapes .* this policy reads"):
            open_backend("onnxruntime-rtx", tiny_half_bundle, manifest, config, 1)


def test_a_graph_that_reads_no_length_is_refused(tiny_bundle):
    with pytest.raises(BackendError, match="no attention that reads kv_len"):
        with_mask(tiny_bundle / graph_file("compressor"))


def test_attention_is_kept_from_tensorrts_parser():
    """Which drops `kv_len`: CUDA computes it, in the same stream."""
    place = Provider(TENSORRT, cuda_device(Cuda())).place(None, None, [])
    (first, tensorrt), (second, cuda) = place["providers"]
    assert (first, second) == (TENSORRT, "CUDAExecutionProvider")
    assert tensorrt["trt_op_types_to_exclude"] == "Attention"
    assert tensorrt["user_compute_stream"] == cuda["user_compute_stream"] == str(emulated.STREAM)


def test_the_plugin_is_told_the_shapes_the_stream_and_the_first_device(monkeypatch, tiny_config):
    devices = [SimpleNamespace(ep_name=name) for name in ("CPUExecutionProvider", RTX, RTX)]
    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: devices)
    asked = []
    options = SimpleNamespace(add_provider_for_devices=lambda *given: asked.append(given))
    spec, calls = contract(tiny_config)["denoiser"], shapes(tiny_config, "denoiser").values()
    assert Provider(RTX, cuda_device(Cuda())).place(options, spec, list(calls)) == {}
    ((chosen, told),) = asked
    assert chosen == devices[1:2]
    assert told["has_user_compute_stream"] == "1"
    assert told["user_compute_stream"] == str(emulated.STREAM)
    # 3 frames of 4x6 tokens; compressed, 2 frames of 1x1
    assert "tokens:1x2x16," in told["nv_profile_min_shapes"]
    assert "tokens:1x72x16," in told["nv_profile_max_shapes"]
    assert told["nv_profile_opt_shapes"] == told["nv_profile_max_shapes"]
    context = f"k_ctx.0:1x2x{tiny_config.context_tokens}x24"
    assert all(context in told[f"nv_profile_{end}_shapes"] for end in ("min", "max"))
    assert profile(contract(tiny_config)["compressor"], [{}]) == {}


def test_the_plugin_needs_fp16(tmp_path):
    result = run(
        "render", "a red star", "--out", tmp_path / "a.mp4", "--backend", "onnxruntime-rtx"
    )
    assert_one_line(result.exit_code, result.stdout, result.stderr, "--precision fp16")


def open_plugin(bundle, monkeypatch, plugin, cuda=None):
    """Opens the backend with this package as the plugin, on an emulated GPU."""
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_nv_tensorrt_rtx", plugin)
    monkeypatch.setattr("packforcing.runtime.device._cuda_runtime", lambda: cuda or Cuda())
    manifest = read_manifest(bundle)
    return open_backend("onnxruntime-rtx", bundle, manifest, manifest.config, 1)


def plugin(monkeypatch, devices=(), error=None):
    """The plugin's package, and what ONNX Runtime finds through it: devices or an error."""
    found = []

    def register(name, path):
        assert (name, path) == (RTX, "plugin.so")
        if error:
            raise RuntimeError(error)
        found.extend(devices)

    monkeypatch.setattr(onnxruntime, "get_ep_devices", lambda: found)
    monkeypatch.setattr(onnxruntime, "register_execution_provider_library", register)
    return SimpleNamespace(get_ep_name=lambda: RTX, get_library_path=lambda: "plugin.so")


def test_a_plugin_that_is_not_installed(tiny_half_bundle, monkeypatch):
    with pytest.raises(BackendError, match="pip install onnxruntime-ep-nv-tensorrt-rtx"):
        open_plugin(tiny_half_bundle, monkeypatch, None)


def test_a_plugin_of_another_version(tiny_half_bundle, monkeypatch):
    broken = plugin(monkeypatch, error="no such symbol")
    with pytest.raises(BackendError, match="no such symbol; install the plugin's version that"):
        open_plugin(tiny_half_bundle, monkeypatch, broken)


def test_a_card_that_the_plugin_does_not_take(tiny_half_bundle, monkeypatch):
    with pytest.raises(BackendError, match=r"does not take NVIDIA Nothing \(sm89\): choose"):
        open_plugin(tiny_half_bundle, monkeypatch, plugin(monkeypatch))


def test_too_small_a_card_is_seen_before_the_plugin_loads(tiny_half_bundle, monkeypatch):
    unused = plugin(monkeypatch, error="must not be loaded")
    with pytest.raises(BackendError, match=r"tiny with onnxruntime-rtx needs .* GiB of GPU memory"):
        open_plugin(tiny_half_bundle, monkeypatch, unused, Cuda(total=1 << 16))
